"""Role x relation x RPC, from the descriptors, over real gRPC: who lacks a permission is refused, who holds it is not,
and what is out of sight answers exactly as what does not exist."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from chassis.testing.harness import ALL
from gateway.contract import Rpc
from services.patients.roles import SHIPPED
from tests.minimal import minimal
from tests.surface import RPCS, servers_of, short
from tests.world import World

_ETAG = '"1"'
_SERVED = [rpc for rpc in RPCS.values() if rpc.owner != "gateway"]
_ASKED = [rpc for rpc in _SERVED if rpc.rule.permission]


def _ids(rpcs: list[Rpc]) -> list[str]:
    return [short(rpc.name) for rpc in rpcs]


@pytest.mark.parametrize("rpc", _ASKED, ids=_ids(_ASKED))
async def test_a_role_may_what_its_permissions_say_and_nothing_else(world: World, rpc: Rpc) -> None:
    permission = rpc.rule.permission
    for server in servers_of(rpc)[:1]:
        roles = {**SHIPPED, "nobody": frozenset[str]()}
        outcomes = await asyncio.gather(
            *(
                world.outcome(rpc, server, _request(rpc, world.near, world.clinic), world.harness.as_user(role))
                for role in roles
            )
        )
        for (role, permissions), problem in zip(roles.items(), outcomes, strict=True):
            lacks = problem is not None and problem.reason == "PERMISSION_MISSING"
            if permission in permissions:
                assert not (lacks and problem is not None and problem.metadata["permission"] == permission), role
                assert problem is None or problem.code is not grpc.StatusCode.INTERNAL, world.why(server)
            else:
                assert problem is not None and lacks and problem.code is grpc.StatusCode.PERMISSION_DENIED, role
                assert problem.metadata == {"permission": permission}


@pytest.mark.parametrize("rpc", _SERVED, ids=_ids(_SERVED))
async def test_of_our_own_services_only_those_named_may_call(world: World, rpc: Rpc) -> None:
    server = servers_of(rpc)[0]
    request = _request(rpc, world.nowhere, world.clinic)
    for caller in ALL:
        problem = await world.outcome(rpc, server, request, world.harness.as_service(caller))
        if caller in rpc.rule.callers:
            assert problem is None or problem.reason not in ("CALLER_NOT_ALLOWED", "INTERNAL"), caller
        else:
            assert problem is not None and problem.reason == "CALLER_NOT_ALLOWED", caller
            assert problem.code is grpc.StatusCode.PERMISSION_DENIED
    stranger = await world.outcome(rpc, server, request, ())
    assert stranger is not None and stranger.code is grpc.StatusCode.UNAUTHENTICATED
    if not rpc.rule.permission:
        anybody = await world.outcome(rpc, server, request, world.harness.as_user("everybody"))
        assert anybody is not None and anybody.reason == "INTERNAL_ONLY"


def _names_a_row(rpc: Rpc) -> bool:
    """Whether the request names one row, at its top or, of an update, in the resource that it carries."""
    return rpc.method.name.startswith("Update") or "id" in rpc.method.input_type.fields_by_name


def _id_fields(rpc: Rpc) -> set[str]:
    found = set()
    for field in rpc.method.input_type.fields:
        found.add(field.name)
        if field.message_type is not None and not field.message_type.full_name.startswith("google."):
            found |= {each.name for each in field.message_type.fields}
    return found


_OF_ROWS = [rpc for rpc in _ASKED if _names_a_row(rpc)]
_OF_PATIENTS = [rpc for rpc in _ASKED if not _names_a_row(rpc) and _id_fields(rpc) & {"patient_id", "patient_ids"}]


@pytest.mark.parametrize("rpc", _OF_ROWS, ids=_ids(_OF_ROWS))
async def test_a_row_out_of_sight_answers_as_one_that_does_not_exist(world: World, rpc: Rpc) -> None:
    absent = await _seen(world, rpc, world.nowhere)
    assert absent["reason"] == "NOT_FOUND", absent
    assert await _seen(world, rpc, world.foreign) == absent
    if not rpc.rule.tenant_wide:
        assert await _seen(world, rpc, world.far) == absent


@pytest.mark.parametrize("rpc", _OF_PATIENTS, ids=_ids(_OF_PATIENTS))
async def test_a_patient_out_of_sight_is_one_that_does_not_exist(world: World, rpc: Rpc) -> None:
    absent = await _seen(world, rpc, world.nowhere)
    assert await _seen(world, rpc, world.foreign) == absent
    if not rpc.rule.tenant_wide:
        assert await _seen(world, rpc, world.far) == absent


async def test_the_callers_own_rows_are_seen_so_that_the_matrix_proves_something(world: World) -> None:
    seen = {}
    for rpc in _OF_ROWS:
        if rpc.method.name.startswith("Get") and await _seen(world, rpc, world.near) == {"reason": ""}:
            seen[rpc.owner] = rpc.method.name
    assert {"patients", "scheduling", "referrals", "notifications"} <= seen.keys()


def _request(rpc: Rpc, row_id: str, clinic_id: str) -> Message:
    known = {"id": row_id, "etag": _ETAG, "patient_id": row_id, "patient_ids": [row_id], "clinic_id": clinic_id}
    return minimal(rpc.method.input_type, known)


async def _seen(world: World, rpc: Rpc, row_id: str) -> Mapping[str, Any]:
    """All that a caller learns, without what is random by itself."""
    call = world.harness.as_user("everybody")
    problem = await world.outcome(rpc, servers_of(rpc)[0], _request(rpc, row_id, world.clinic), call)
    if problem is None:
        return {"reason": ""}
    told = f"{problem.message} {sorted(problem.metadata.items())}"
    assert row_id not in told, "an answer that repeats the id would differ by it"
    return {"reason": problem.reason, "code": problem.code, "told": re.sub(r"\s+", " ", told)}

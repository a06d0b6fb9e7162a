"""Every public RPC leaves its audit row, answered or refused: who, which RPC, by which permission, about whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from sqlalchemy import text

from chassis.errors import Problem
from chassis.ids import new_id
from chassis.model import Aggregate, Living
from gateway.contract import Rpc
from services.patients.roles import PERMISSIONS
from tests.minimal import minimal
from tests.planting import plant
from tests.surface import RPCS, aggregates, servers_of, short
from tests.world import World

_PUBLIC = [rpc for rpc in RPCS.values() if rpc.rule.permission and rpc.owner != "gateway"]
every_public_rpc = pytest.mark.parametrize("rpc", _PUBLIC, ids=[short(rpc.name) for rpc in _PUBLIC])
_ROW = text(
    "SELECT tenant_id::text, permission, subject_ids::text[] AS subjects FROM audit"
    " WHERE method = :method AND actor = :actor AND outcome = :outcome"
)


@dataclass
class Called:
    """What became of the calls of one RPC."""

    answered: bool = False
    subject_id: str = ""
    problem: Problem | None = None
    refused: Problem | None = None


class Walk:
    """Calls every public RPC as one who may all, and as one who may nothing."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.called: dict[str, Called] = {}
        self.auditor = self.outsider = ""

    async def go(self) -> None:
        harness, clinic = self.world.harness, self.world.clinic
        self.auditor = await harness.staff("auditor", sorted(PERMISSIONS), clinics=[clinic])
        self.outsider = await harness.staff("outsider", [], clinics=[clinic])
        for rpc in _PUBLIC:
            self.called[rpc.name] = await self._call(rpc)
        await asyncio.sleep(1)  # pages of lists are noted within half a second

    async def _call(self, rpc: Rpc) -> Called:
        called, server = Called(), servers_of(rpc)[0]
        as_outsider, as_auditor = (self.world.harness.as_user(name) for name in ("outsider", "auditor"))
        async for request, subject_id in self._requests(rpc, server):
            if called.refused is None:
                called.refused = await self.world.outcome(rpc, server, request, as_outsider)
            called.subject_id = subject_id
            problem = await self.world.outcome(rpc, server, request, as_auditor)
            if problem is None:
                called.answered = True
                break
            if problem.reason != "ILLEGAL_TRANSITION":
                called.problem = problem
        return called

    async def _requests(self, rpc: Rpc, server: str) -> AsyncIterator[tuple[Message, str]]:
        """Requests to try: about a row in each status of its lifecycle, one after the other."""
        names_row = not rpc.method.name.startswith(("List", "Search", "Create", "Upsert", "Batch", "Hold"))
        models = [model for model in aggregates(server) if model.__name__ == rpc.method.output_type.name]
        if not (names_row and models):
            models = list(aggregates(server))[:1]
        for model in models:
            for status in _statuses(model):
                row_id = new_id()
                await self.world.harness.subject(self.world.clinic, patient_id=row_id)
                engine = self.world.harness.servers[server].database.engine
                async with engine.begin() as connection:
                    for each in aggregates(server):
                        values = {each.status_field: status} if status and each is model else {}  # type: ignore[attr-defined]
                        await plant(
                            connection,
                            each,
                            tenant_id=self.world.harness.tenant_id,
                            row_id=row_id,
                            subject_id=row_id,
                            **values,
                        )
                yield self._request(rpc, row_id), row_id

    def _request(self, rpc: Rpc, row_id: str) -> Message:
        known = {
            "id": row_id,
            "etag": '"1"',
            "patient_id": row_id,
            "patient_ids": [row_id],
            "clinic_id": self.world.clinic,
        }
        request = minimal(rpc.method.input_type, known)
        if more := BY_HAND.get(rpc.method.name):
            more(request, row_id)
        return request


def _statuses(model: type[Aggregate]) -> list[Any]:
    if not issubclass(model, Living):
        return [None]
    table: Any = model.__table__
    return list(table.c[model.status_field].type.enum_class)


# What the descriptors alone can't know.
BY_HAND: dict[str, Callable[[Any, str], None]] = {}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def walk(world: World) -> Walk:
    walk = Walk(world)
    await walk.go()
    return walk


@every_public_rpc
async def test_an_answered_call_leaves_its_row(walk: Walk, rpc: Rpc) -> None:
    called = walk.called[rpc.name]
    assert called.answered, (
        f"{called.problem!r} {called.problem and called.problem.message} {called.problem and called.problem.metadata}"
    )
    rows = await _rows(walk, rpc, walk.auditor, "OK")
    assert len(rows) == 1
    assert (rows[0].tenant_id, rows[0].permission) == (walk.world.harness.tenant_id, rpc.rule.permission)


@every_public_rpc
async def test_a_refused_call_leaves_its_row(walk: Walk, rpc: Rpc) -> None:
    refused = walk.called[rpc.name].refused
    assert refused is not None and refused.code is grpc.StatusCode.PERMISSION_DENIED
    rows = await _rows(walk, rpc, walk.outsider, "PERMISSION_DENIED")
    assert len(rows) == 1
    assert (rows[0].tenant_id, rows[0].permission) == (walk.world.harness.tenant_id, rpc.rule.permission)


async def _rows(walk: Walk, rpc: Rpc, principal_id: str, outcome: str) -> list[Any]:
    engine = walk.world.harness.servers[servers_of(rpc)[0]].database.engine
    async with engine.connect() as connection:
        found = await connection.execute(
            _ROW, {"method": rpc.name, "actor": f"staff:{principal_id}", "outcome": outcome}
        )
        return list(found.all())

"""The contract by reflection: nothing can be called that doesn't say who may, how and what for."""

from __future__ import annotations

import re

import pytest
from buf.validate import validate_pb2
from google.protobuf.descriptor import FieldDescriptor

from gateway.contract import IDEMPOTENT, NO_SIDE_EFFECTS, Rpc, comments
from services.patients.roles import PERMISSIONS, SHIPPED
from system import topology
from tests.surface import RPCS, SERVICES, calls, fields_within, messages, servers_of, short

every_rpc = pytest.mark.parametrize("rpc", RPCS.values(), ids=[short(name) for name in RPCS])
_PERMISSION = re.compile(r"[a-z]+\.[a-z][a-z_]*")


@every_rpc
def test_every_rpc_says_who_may_call_it(rpc: Rpc) -> None:
    rule = rpc.rule
    if rule.permission:
        assert _PERMISSION.fullmatch(rule.permission)
    else:
        assert rule.internal and rule.callers, "an RPC without a permission is for our own services, by name"
    if rule.link:
        assert rule.internal and list(rule.callers) == ["gateway"] and not rule.permission


@every_rpc
def test_only_known_services_call_an_rpc_and_those_that_must_can_reach_it(rpc: Rpc) -> None:
    for caller in rpc.rule.callers:
        assert caller in topology.NODES
        for served in servers_of(rpc) if not rpc.rule.permission else ():
            assert served == caller or served in topology.NODES[caller].calls, f"{caller} can't reach {served}"


def test_a_service_calls_only_those_that_the_topology_connects_it_with() -> None:
    for name in SERVICES:
        called = {call.args[0].value for what, call in calls(f"services/{name}") if what == "channel"}  # type: ignore[attr-defined]
        assert called <= set(topology.NODES[name].calls)


@every_rpc
def test_every_rpc_has_an_http_path_or_is_internal(rpc: Rpc) -> None:
    pattern = rpc.http.WhichOneof("pattern")
    assert (pattern is None) == bool(rpc.rule.internal)


@every_rpc
def test_a_path_is_a_collection_an_id_and_a_verb(rpc: Rpc) -> None:
    pattern = rpc.http.WhichOneof("pattern")
    if pattern is None:
        return
    path = getattr(rpc.http, pattern)
    assert re.fullmatch(r"/v1/[a-z][A-Za-z]*(/\{[a-z_.]+\})?(/[a-z][A-Za-z]*)?(:[a-z][A-Za-z]*)?", path), path
    reads = rpc.idempotency == NO_SIDE_EFFECTS
    assert pattern in (("get",) if reads and ":" not in path else ("get", "post", "patch"))
    assert not (pattern == "get" and not reads), "a GET has no effect"
    request = rpc.method.input_type
    for bound in re.findall(r"\{([a-z_.]+)\}", path):
        message = request
        *parents, last = bound.split(".")
        for parent in parents:
            message = message.fields_by_name[parent].message_type
        field = message.fields_by_name[last]
        assert _rules(field).string.uuid, f"{bound} stands in the path, so it is an opaque id"
    if pattern == "get":
        assert not rpc.http.body
    elif rpc.http.body != "*":
        assert rpc.http.body in request.fields_by_name


@every_rpc
def test_every_rpc_says_whether_it_may_be_repeated_and_writes_have_a_key(rpc: Rpc) -> None:
    assert rpc.idempotency in (NO_SIDE_EFFECTS, IDEMPOTENT)
    has_key = "request_id" in rpc.method.input_type.fields_by_name
    # A link answers once: its token is the key.
    assert has_key == (rpc.idempotency == IDEMPOTENT and not rpc.rule.link)
    if has_key:
        assert rpc.method.input_type.fields_by_name["request_id"].type == FieldDescriptor.TYPE_STRING


@every_rpc
def test_reads_begin_with_a_verb_of_reading(rpc: Rpc) -> None:
    verbs = ("Get", "List", "Search", "Batch", "Resolve", "Watch")
    assert rpc.method.name.startswith(verbs) == (rpc.idempotency == NO_SIDE_EFFECTS)


@every_rpc
def test_a_live_view_is_a_read_that_answers_ids_and_nothing_else(rpc: Rpc) -> None:
    method = rpc.method
    assert method.server_streaming == method.name.startswith("Watch") and not method.client_streaming
    if not method.server_streaming:
        return
    assert method.output_type.full_name == "care.type.v1.Change"
    assert rpc.rule.permission and not rpc.rule.callers and not rpc.rule.link, (
        "who looks is judged again while it is open"
    )
    assert rpc.http.get.endswith(":watch")


@every_rpc
def test_lists_come_in_pages(rpc: Rpc) -> None:
    # The gateway's lists are views of several services' first pages.
    if not rpc.method.name.startswith("List") or rpc.owner == "gateway":
        return
    request, answer = rpc.method.input_type.fields_by_name, rpc.method.output_type.fields_by_name
    assert {"page_size", "page_token"} <= set(request)
    assert "next_page_token" in answer
    assert [field.name for field in answer.values() if field.is_repeated] != []


@every_rpc
def test_updates_take_the_etag_that_the_resource_showed(rpc: Rpc) -> None:
    if not rpc.method.name.startswith("Update"):
        return
    request = rpc.method.input_type.fields_by_name
    assert {"etag", "update_mask"} <= set(request)
    assert "etag" in rpc.method.output_type.fields_by_name
    assert rpc.http.WhichOneof("pattern") == "patch"


@every_rpc
def test_nothing_that_tells_who_a_patient_is_can_stand_in_a_url(rpc: Rpc) -> None:
    if rpc.http.WhichOneof("pattern") != "get":
        return
    telling = re.compile(r"family|given|birth|phone|email|value$|address|city|postal|search|query|text")
    assert not [field.full_name for field in rpc.method.input_type.fields if telling.search(field.name)]


def test_every_part_of_the_contract_has_a_comment() -> None:
    told = comments()
    bare = []
    for rpc in RPCS.values():
        bare += [
            name for name in (rpc.service.full_name, f"{rpc.service.full_name}.{rpc.method.name}") if name not in told
        ]
    for message in messages():
        if message.GetOptions().map_entry:
            continue
        names = [message.full_name, *(field.full_name for field in message.fields)]
        for enum in message.enum_types:
            names += [enum.full_name, *(f"{enum.full_name}.{value.name}" for value in enum.values)]
        bare += [name for name in names if name not in told]
    assert sorted(set(bare)) == []


def test_every_permission_is_in_a_shipped_role_and_every_role_asks_for_real_ones() -> None:
    asked = {rpc.rule.permission for rpc in RPCS.values() if rpc.rule.permission}
    for name in SERVICES:
        for called, call in calls(f"services/{name}"):
            if called in ("require", "allows") and call.args:
                asked.add(call.args[0].value)  # type: ignore[attr-defined]
    assert PERMISSIONS == asked
    assert set().union(*SHIPPED.values()) == asked


def test_every_service_offers_the_rpcs_of_its_package_and_no_others() -> None:
    for name, service in SERVICES.items():
        offered = {descriptor.full_name for descriptor in service.servicers}
        written = {rpc.service.full_name for rpc in RPCS.values() if servers_of(rpc) == (name,)}
        assert offered == written
        for descriptor, servicer in service.servicers.items():
            for method in descriptor.methods:
                assert method.name in type(servicer).__dict__, f"{descriptor.full_name}/{method.name} is not written"


def test_events_about_patients_hold_no_words() -> None:
    words = re.compile(
        r"(^|_)(name|names|phone|telecom|email|note|notes|text|comment|description|title|address|birth_date|display"
        r"|line|lines|city|reason|answer|answers|gender|value)$"
    )
    for name, service in SERVICES.items():
        directory = {model.aggregate for model in _directory(name)}
        for key, payload in service.payloads.items():
            if key.partition(".")[0] in directory:
                continue
            found = [
                field.full_name
                for field in fields_within(payload.DESCRIPTOR)
                if field.type == FieldDescriptor.TYPE_STRING and words.search(field.name)
            ]
            assert found == [], f"{key} of {name}"


def _directory(service: str):
    from tests.surface import aggregates

    return [model for model in aggregates(service) if model.subject_field is None]


def _rules(field: FieldDescriptor) -> validate_pb2.FieldRules:
    return field.GetOptions().Extensions[validate_pb2.field]


def test_no_label_is_empty() -> None:
    """A label that nobody can be cleared for would hide a record from all."""
    checked = 0
    for message in messages():
        for field in message.fields:
            rules = field.GetOptions().Extensions[validate_pb2.field]
            if field.name == "security_labels" and rules.HasField("repeated"):
                assert rules.repeated.items.string.min_len == 1, field.full_name
                checked += 1
    assert checked >= 4

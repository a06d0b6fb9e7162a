"""The five services by reflection: models fit the contract, events can be made and heard, reasons are published."""

from __future__ import annotations

import ast
import re
from functools import cache
from typing import Any

import pytest
from care.access.v1 import access_pb2
from care.options.v1 import options_pb2
from google.protobuf.descriptor import Descriptor

from chassis import calendar
from chassis.model import Living
from chassis.settings import Settings
from gateway.contract import comments, files
from gateway.settings import GatewaySettings
from tests.surface import ROOT, RPCS, SERVICES, aggregates, calls, living, servers_of, sources, told

every_service = pytest.mark.parametrize("name", SERVICES)
every_living = pytest.mark.parametrize(
    ("name", "model"), living(), ids=[f"{name}-{model.__name__}" for name, model in living()]
)
_REASON = re.compile(r"[A-Z][A-Z0-9]+(_[A-Z0-9]+)+")
_PROBLEMS = {
    "Aborted", "AlreadyExists", "DeadlineExceeded", "FailedPrecondition", "Invalid", "NotFound", "PermissionDenied",
    "Problem", "ResourceExhausted", "Unauthenticated", "Unavailable", "Unimplemented",
}  # fmt: skip
_OF_NO_AGGREGATE = {"patients": (access_pb2.Heartbeat,)}
# What rows answer beside their columns where they tell their whole state.
_STATE = {
    "staff": {"kind", "principal_id", "group_ids"},
    "login": {"kind", "principal_id", "group_ids", "roles", "clearances", "active"},
}


# -- statuses ----------------------------------------------------------------------------------------------------------


@every_living
def test_a_lifecycle_speaks_of_the_statuses_of_its_message(name: str, model: type[Living]) -> None:
    statuses = _statuses(model)
    message = _message(name, model.__name__)
    assert message is not None, f"care.{name}.v1 has no message {model.__name__}"
    enum = message.fields_by_name[model.status_field].enum_type
    assert {status.name for status in statuses} <= set(enum.values_by_name)
    for arrow in model.lifecycle:
        assert {*arrow.sources, *([arrow.target] if arrow.target else [])} <= set(statuses)


@every_living
def test_every_action_can_be_taken_some_day(name: str, model: type[Living]) -> None:
    arrows = list(model.lifecycle)
    reached = {arrow.target for arrow in arrows if not arrow.sources}
    assert reached, "nothing is ever born"
    while True:
        more = {arrow.target for arrow in arrows if reached & set(arrow.sources) and arrow.target} - reached
        if not more:
            break
        reached |= more
    # Some may be left that nothing leads to yet, but no action may wait for such alone.
    for arrow in arrows:
        assert not arrow.sources or reached & set(arrow.sources), arrow.action


@every_living
def test_an_action_leaves_a_status_by_one_arrow_only(name: str, model: type[Living]) -> None:
    taken = [(arrow.action, source) for arrow in model.lifecycle for source in (arrow.sources or (None,))]
    assert len(taken) == len(set(taken))


@every_service
def test_a_row_about_a_patient_refers_to_the_record_subject(name: str) -> None:
    for model in aggregates(name):
        if model.subject_field in (None, "id"):
            continue
        table: Any = model.__table__
        keys = {key.name for key in table.foreign_key_constraints}
        assert f"{table.name}_subject_fkey" in keys, model.__name__


# -- events ------------------------------------------------------------------------------------------------------------


@every_service
def test_what_is_told_has_a_payload(name: str) -> None:
    payloads = SERVICES[name].payloads
    for event in told(name):
        aggregate = event.partition(".")[0]
        assert event in payloads or aggregate in payloads or aggregate in ("*", "access"), event


@every_service
def test_what_is_told_is_what_the_payloads_declare(name: str) -> None:
    declared = {
        event
        for payload in {*SERVICES[name].payloads.values(), *_OF_NO_AGGREGATE.get(name, ())}
        for event in payload.DESCRIPTOR.GetOptions().Extensions[options_pb2.event_types]
    }
    events = told(name)
    loose = {event.partition(".")[2] for event in events if event.startswith("*.")}
    exact = {event for event in events if not event.startswith("*.")}
    assert exact - declared == set(), "a consumer would keep these for its replay, as newer than its build"
    assert {event for event in declared - exact if event.partition(".")[2] not in loose} == set(), "never told"


@every_service
def test_every_field_of_a_payload_comes_from_the_row_or_is_told_beside_it(name: str) -> None:
    by_aggregate = {model.aggregate: model for model in aggregates(name)}
    extras = {"previous_status", "reason_code"}
    for called, call in calls(f"services/{name}"):
        if called in ("tell", "move"):
            extras |= {keyword.arg for keyword in call.keywords if keyword.arg}
    for key, payload in SERVICES[name].payloads.items():
        aggregate = key.partition(".")[0]
        fields = {field.name for field in payload.DESCRIPTOR.fields} - extras - _STATE.get(aggregate, set()) - {"etag"}
        # `hold.expired` is told by a row of another name.
        models = [by_aggregate[aggregate]] if aggregate in by_aggregate else by_aggregate.values()
        missing = min(([name for name in fields if not hasattr(model, name)] for model in models), key=len)
        assert missing == [], f"{key}: nothing fills these fields of {payload.DESCRIPTOR.full_name}"


@every_service
def test_what_a_service_waits_for_is_told_by_one_that_it_hears(name: str) -> None:
    service = SERVICES[name]
    heard = {topic.removeprefix("care.") for topic in service.topics}
    events = set().union(*(told(other) for other in heard if other in SERVICES))
    loose = {event.partition(".")[2] for event in events if event.startswith("*.")}
    unheard = {
        event for event in service.reactions.types if event not in events and event.partition(".")[2] not in loose
    }
    assert unheard == set()
    assert heard <= set(SERVICES)


@every_service
def test_a_reaction_reads_the_payload_that_is_told(name: str) -> None:
    payloads = {}
    for other in SERVICES.values():
        payloads |= {key: payload.DESCRIPTOR.full_name for key, payload in other.payloads.items()}
    for event in SERVICES[name].reactions.types:
        sent = payloads.get(event) or payloads.get(event.partition(".")[0])
        if sent is None:
            continue
        for registered in SERVICES[name].reactions.for_type(event):
            assert registered.payload.DESCRIPTOR.full_name == sent, event


# -- reasons -----------------------------------------------------------------------------------------------------------


@every_service
def test_every_reason_that_a_service_gives_stands_in_its_readme(name: str) -> None:
    given = _raised(f"services/{name}") | {reason for _, reason, _ in SERVICES[name].reasons.values()}
    published = {found.group() for found in _REASON.finditer(_readme(name))}
    assert given - published - _raised("chassis") == set()


@every_service
def test_every_reason_that_the_contract_names_is_given_by_the_service_or_the_chassis(name: str) -> None:
    given = _raised(f"services/{name}") | {reason for _, reason, _ in SERVICES[name].reasons.values()}
    for rpc in RPCS.values():
        if servers_of(rpc) == (name,):
            comment = comments()[f"{rpc.service.full_name}.{rpc.method.name}"]
            named = set(re.findall(r"`([A-Z][A-Z0-9_]*_[A-Z0-9_]+)`", comment))
            assert named - given - _raised("chassis") - {"NOT_FOUND"} == set(), rpc.name


def test_a_message_of_a_problem_holds_no_value() -> None:
    """An f-string in a message may name what is ours (permission, status, limit), never what came in a request."""
    for folder in ("chassis", *(f"services/{name}" for name in SERVICES)):
        for called, call in calls(folder):
            if called not in _PROBLEMS or len(call.args) < 2 or not isinstance(call.args[1], ast.JoinedStr):
                continue
            for part in ast.walk(call.args[1]):
                if isinstance(part, ast.Name):
                    assert part.id != "request", ast.unparse(call)


# -- walls -------------------------------------------------------------------------------------------------------------


@every_service
def test_a_service_that_looks_at_holidays_has_their_calendar_warmed(name: str) -> None:
    looks = {"add_business_days", "is_business_day", "is_holiday"}
    imported = {
        alias.name
        for _, module in sources(f"services/{name}")
        for node in ast.walk(module)
        if isinstance(node, ast.ImportFrom) and node.module == "chassis.calendar"
        for alias in node.names
    }
    assert (calendar.warm in SERVICES[name].warm) == bool(imported & looks)


@every_service
def test_no_service_imports_another(name: str) -> None:
    for path, module in sources(f"services/{name}"):
        for imported in _imports(module):
            parts = imported.split(".")
            assert parts[0] not in ("gateway", "system", "tests"), path
            assert parts[0] != "services" or parts[1:2] == [name], f"{path} imports {imported}"


def test_the_chassis_speaks_no_word_of_the_domain() -> None:
    for path, module in sources("chassis"):
        for imported in _imports(module):
            assert imported.split(".")[0] not in ("services", "gateway", "system", "tests"), path
            if imported.startswith("care."):
                assert imported.split(".")[1] in ("access", "audit", "batch", "events", "options", "type"), path


@every_service
def test_a_table_says_its_tenant_first(name: str) -> None:
    chassis_tables = {table.name for table in _chassis_tables(SERVICES[name].base.metadata)}
    for table in SERVICES[name].base.metadata.sorted_tables:
        if table.name not in chassis_tables:
            first = next(iter(table.primary_key.columns)).name
            assert first == "tenant_id", table.name


def test_services_in_one_process_share_neither_metadata_nor_tables_nor_reactions() -> None:
    services = list(SERVICES.values())
    for shared in ("base", "reactions", "servicers", "payloads"):
        assert len({id(getattr(service, shared)) for service in services}) == len(services)
    for shared in ("metadata", "registry"):
        assert len({id(getattr(service.base, shared)) for service in services}) == len(services)
    tables = [id(table) for service in services for table in service.base.metadata.tables.values()]
    assert len(tables) == len(set(tables))
    servicers = [id(servicer) for service in services for servicer in service.servicers.values()]
    assert len(servicers) == len(set(servicers))
    assert len({service.name for service in services}) == len({service.topic for service in services}) == len(services)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_each_setting_is_declared_in_one_place() -> None:
    classes = {GatewaySettings, *(service.settings for service in SERVICES.values())} - {Settings}
    declared = [name for one in classes for name in one.__annotations__ if name != "model_config"]
    # The gateway listens elsewhere; whatever else a service sets for itself is nobody else's.
    assert set(declared) & set(Settings.__annotations__) <= {"model_config", "port"}
    assert len(declared) == len(set(declared))


def test_the_shipped_limits_are_these() -> None:
    assert _limits(Settings) == {
        "port": 50051,
        "health_port": 50052,
        "metrics_port": 9464,
        "pool_size": 8,
        "statement_timeout": 10.0,
        "lock_timeout": 2.0,
        "drain_timeout": 8.0,
        "heartbeat_interval": 10.0,
        "access_stale_patient": 30.0,
        "access_stale_staff": 900.0,
        "idempotency_hours": 48,
        "token_cache": 60.0,
        "principal_cache": 2.0,
        "max_connection_age": 60.0,
        "relay_lease": 10.0,
        "concurrency": 200,
        "live_views": 2000,
        "live_longest": 600.0,
        "live_heartbeat": 15.0,
        "live_recheck": 30.0,
        "live_queue": 100,
    }
    own = {name: _limits(service.settings, beyond=Settings) for name, service in SERVICES.items()}
    own["gateway"] = _limits(GatewaySettings, beyond=Settings)
    assert own == {
        "patients": {},
        "scheduling": {
            "hold_default": 300,
            "offer_lifetime": 900,
            "no_show_grace": 900,
            "arrival_early": 7200,
            "walk_in": 900,
            "video_timeout": 5,
            "video_lease": 60,
            "occupancy_kept": 604_800,
            "freed_slots_kept": 34_560_000,
            "waitlist_kept": 15_552_000,
            "backfill_every": 1,
            "backfill_retry": 30,
            "backfill_lockout": 14_400,
            "offer_standing": 7200,
            "offer_standing_at_least": 900,
            "clearing_settle": 10,
            "clearing_offer": 172_800,
        },
        "referrals": {},
        "notifications": {
            "sms_rate": 50.0,
            "email_rate": 50.0,
            "provider_timeout": 10.0,
            "provider_connections": 20,
            "send_every": 1.0,
            "send_batch": 25,
            "send_lanes": 4,
            "send_lease": 30.0,
            "check_timeout": 0.8,
            "check_age": 0.95,
            "service_away_pause": 2.0,
            "tries_at_most": 5,
            "retry_base": 5.0,
            "survey_useful": 14 * 86400.0,
        },
        "feedback": {"survey_delay": 7200.0, "survey_expiry": 14 * 86400.0, "survey_pause": 30 * 86400.0},
        "gateway": {
            "port": 8080,
            "request_timeout": 10.0,
            "leg_timeout": 0.8,
            "body_limit": 1 << 20,
            "streams": 2000,
            "streams_per_login": 10,
            "ready_grace": 15.0,
            "drain_delay": 0.0,
        },
    }


def _limits(settings: type[Settings], *, beyond: type[Settings] | None = None) -> dict[str, float]:
    shared = beyond.model_fields if beyond else {}
    return {
        name: field.default
        for name, field in settings.model_fields.items()
        if isinstance(field.default, int | float)
        and not isinstance(field.default, bool)
        and (name not in shared or shared[name].default != field.default)
    }


# -- inside ------------------------------------------------------------------------------------------------------------


def _statuses(model: type[Living]) -> Any:
    table: Any = model.__table__
    return table.c[model.status_field].type.enum_class


def _message(service: str, name: str) -> Descriptor | None:
    for file in files():
        if file.package == f"care.{service}.v1" and name in file.message_types_by_name:
            return file.message_types_by_name[name]
    return None


def _readme(service: str) -> str:
    return (ROOT / "services" / service / "README.md").read_text()


@cache
def _raised(folder: str) -> set[str]:
    found = set()
    for called, call in calls(folder):
        texts = [call.args[0]] if called in _PROBLEMS and call.args else []
        texts += [keyword.value for keyword in call.keywords if keyword.arg in ("what", "reason")]
        for text in texts:
            if isinstance(text, ast.Constant) and isinstance(text.value, str) and _REASON.fullmatch(text.value):
                found.add(text.value)
    return found


def _imports(module: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def _chassis_tables(metadata: Any) -> list[Any]:
    from sqlalchemy import MetaData

    from chassis import tables

    own = MetaData()
    tables.all_tables(own)
    return [metadata.tables[name] for name in own.tables]

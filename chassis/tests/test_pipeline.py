"""A request's way: the order of its stages, keys, deadlines, refusals, and what a caller is told of a driver's errors."""

import asyncio
import json
import re
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from care.access.v1 import access_pb2, access_pb2_grpc
from care.batch.v1 import batch_pb2, batch_pb2_grpc
from care.feedback.v1 import feedback_pb2, feedback_pb2_grpc
from care.patients.v1 import staff_pb2, staff_pb2_grpc, tasks_pb2
from google.rpc import status_pb2
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from sqlalchemy import text

from chassis.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    Internal,
    Invalid,
    LostRace,
    NotFound,
    PermissionDenied,
    Problem,
    ResourceExhausted,
    Unauthenticated,
    Unavailable,
    problem_from_rpc,
)
from chassis.ids import new_id
from chassis.pipeline import Credentials
from chassis.tests.small import Small

PLANTED = "Xanthippe-Quandt 555-0142"


async def refused(kind: type[Problem], reason: str, calling: Any) -> Problem:
    """What a call was told. Its own exception stays out of the way of the next."""
    with pytest.raises(Problem) as caught:
        await calling
    assert (type(caught.value), caught.value.reason) == (kind, reason), caught.value.message
    return caught.value


async def raw(small: Small, method: str, request: Any, metadata: Any, timeout: float | None = 10) -> Any:
    try:
        rpc = getattr(staff_pb2_grpc.PoolsServiceStub(small.harness.channel(small.name)), method)
        return await rpc(request, metadata=metadata, timeout=timeout)
    except grpc.RpcError as error:
        raise problem_from_rpc(error) from None


# -- the order of the stages -------------------------------------------------------------------------------------------

WRONG = staff_pb2.CreatePoolRequest(pool={"name": "x" * 101, "staff_ids": [PLANTED]})


async def test_a_stranger_learns_nothing_not_even_that_the_request_is_wrong(small: Small) -> None:
    unknown_login = small.harness.as_user(f"nobody {new_id()}")
    for metadata, reason in [
        ((), "TOKEN_MISSING"),
        ((("authorization", "Bearer nonsense"),), "TOKEN_INVALID"),
        ((("authorization", "Basic YTpi"),), "TOKEN_MISSING"),
        (unknown_login, "LOGIN_UNKNOWN"),
    ]:
        for request in (WRONG, staff_pb2.CreatePoolRequest(pool={"name": "x"})):
            await refused(Unauthenticated, reason, raw(small, "CreatePool", request, metadata))
        await refused(Unauthenticated, reason, raw(small, "GetPool", staff_pb2.GetPoolRequest(id="x"), metadata))


async def test_a_caller_without_the_permission_learns_nothing_about_the_request(small: Small) -> None:
    await small.harness.staff("reader", ["pools.read"])
    pool = await small.pool()
    for request in (WRONG, staff_pb2.CreatePoolRequest(pool={"name": "fine"})):
        problem = await refused(
            PermissionDenied,
            "PERMISSION_MISSING",
            raw(small, "CreatePool", request, small.harness.as_user("reader")),
        )
        assert problem.metadata == {"permission": "pools.write"}
    for etag in ("", '"1"', '"9"'):
        request = staff_pb2.UpdatePoolRequest(pool={"id": pool.id}, etag=etag)
        await refused(
            PermissionDenied, "PERMISSION_MISSING", raw(small, "UpdatePool", request, small.harness.as_user("reader"))
        )


async def test_a_wrong_field_is_named_with_its_rule_and_without_its_value(small: Small) -> None:
    calling = raw(small, "CreatePool", WRONG, small.harness.as_user("ada"))
    problem = await refused(Invalid, "FIELD_INVALID", calling)
    assert problem.metadata == {"field": "pool.name", "rule": "string.max_len"}
    assert re.fullmatch(r"pool\.name must be at most \d+ characters\.", problem.message)
    problem = await refused(
        Invalid, "FIELD_INVALID", small.rpc("CreatePool", pool={"name": "x", "staff_ids": [PLANTED]})
    )
    assert problem.metadata == {"field": "pool.staff_ids[0]", "rule": "string.uuid"}
    assert PLANTED not in problem.message
    assert PLANTED not in small.harness.log_of(small.name)


async def test_an_unknown_source_is_the_callers_mistake(small: Small) -> None:
    consent = await small.consent(await small.patient())
    await refused(Invalid, "FIELD_INVALID", small.rpc("RevokeConsent", id=consent.id, source=99))


async def test_a_filter_by_a_value_that_does_not_exist_finds_nothing(small: Small) -> None:
    patient = await small.patient()
    await small.consent(patient)
    assert not (await small.rpc("ListConsents", patient_id=patient, statuses=[99])).consents


async def test_nobody_says_on_whose_behalf_he_calls_but_a_service_by_ids(small: Small) -> None:
    on_behalf = (("care-on-behalf-of", f"patient:{new_id()}"),)
    request = staff_pb2.ListPoolsRequest()
    metadata = (*small.harness.as_user("ada"), *on_behalf)
    await refused(PermissionDenied, "ON_BEHALF_OF_REFUSED", raw(small, "ListPools", request, metadata))
    batch = batch_pb2_grpc.BatchServiceStub(small.harness.channel(small.name)).BatchRead
    item = batch_pb2.BatchReadRequest(items=[{"method": "x"}])
    await batch(item, metadata=(*small.harness.as_service("gateway"), *on_behalf))
    with pytest.raises(grpc.RpcError) as caught:
        await batch(item, metadata=(*small.harness.as_service("gateway"), ("care-on-behalf-of", PLANTED)))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_only_the_services_that_a_rule_names_may_call(small: Small) -> None:
    stub = access_pb2_grpc.AccessServiceStub(small.harness.channel(small.name))
    request = access_pb2.BatchGetSubjectAccessRequest(tenant_id=small.harness.tenant_id, subject_ids=[new_id()])
    await stub.BatchGetSubjectAccess(request, metadata=small.harness.as_service("feedback"))
    for metadata, reason in [
        (small.harness.as_service("gateway"), "CALLER_NOT_ALLOWED"),
        (small.harness.as_user("ada"), "INTERNAL_ONLY"),
    ]:
        with pytest.raises(grpc.RpcError) as caught:
            await stub.BatchGetSubjectAccess(request, metadata=metadata)
        assert problem_from_rpc(caught.value).reason == reason
    for tenant in ("", "north", "'; DROP TABLE audit"):
        bad = access_pb2.BatchGetSubjectAccessRequest(tenant_id=tenant, subject_ids=[new_id()])
        with pytest.raises(grpc.RpcError) as caught:
            await stub.BatchGetSubjectAccess(bad, metadata=small.harness.as_service("feedback"))
        assert problem_from_rpc(caught.value).reason == "FIELD_INVALID"


async def test_more_calls_than_there_is_room_for_are_refused_at_once(small: Small) -> None:
    let_go = asyncio.Event()

    async def wait(*_: Any) -> None:
        await let_go.wait()

    small.hooks["GetPool"] = wait
    pool = await small.pool()
    small.server.settings.concurrency, room = 2, small.server.settings.concurrency
    try:
        held = [asyncio.create_task(small.rpc("GetPool", id=pool.id)) for _ in range(2)]
        await asyncio.sleep(0.2)
        await refused(ResourceExhausted, "OVERLOADED", small.rpc("ListPools"))
    finally:
        let_go.set()
        small.server.settings.concurrency = room
    await asyncio.gather(*held)
    await small.rpc("ListPools")


# -- keys --------------------------------------------------------------------------------------------------------------


async def count(small: Small, name: str) -> int:
    return int((await small.sql("SELECT count(*) FROM pool WHERE name = :name", name=name))[0][0])


async def outbox_of(small: Small, key: str) -> int:
    """Events ever told of an aggregate: those that wait and those on the bus."""
    bus: Any = small.harness.bus
    async with asyncio.timeout(5):
        while (await small.sql("SELECT count(*) FROM outbox WHERE key = :key", key=key))[0][0]:
            await asyncio.sleep(0.02)
    async with bus.connection() as connection:
        return int(await connection.fetchval("SELECT count(*) FROM log WHERE key = $1", key))


async def test_sixty_four_twins_have_one_effect_and_one_answer_while_others_go_on(small: Small) -> None:
    let_go = asyncio.Event()

    async def hold(request: Any, _call: Any) -> None:
        if request.request_id == key:
            await let_go.wait()

    key, name = new_id(), f"twins {new_id()}"
    small.hooks["CreatePool"] = hold
    twins = [asyncio.create_task(small.rpc("CreatePool", pool={"name": name}, request_id=key)) for _ in range(64)]
    await asyncio.sleep(0.1)
    waits = []
    for method in ("ListPools", "CreatePool", "ListPools", "CreatePool", "ListPools"):
        began = time.perf_counter()
        await (small.pool() if method == "CreatePool" else small.rpc(method))
        waits.append(time.perf_counter() - began)
    assert not any(twin.done() for twin in twins), "the others were to go on meanwhile"
    assert sorted(waits)[1] < 0.5, waits
    let_go.set()
    answers = await asyncio.gather(*twins)
    assert len({answer.SerializeToString() for answer in answers}) == 1
    assert await count(small, name) == 1
    assert await outbox_of(small, answers[0].id) == 1
    assert not small.server.database._twins


async def test_a_key_with_another_body_is_refused_and_anothers_key_is_another_key(small: Small) -> None:
    await small.harness.staff("bert", ["pools.write", "pools.read"])
    key, name = new_id(), f"keys {new_id()}"
    first = await small.rpc("CreatePool", pool={"name": name}, request_id=key)
    await refused(AlreadyExists, "IDEMPOTENCY_KEY_REUSED", small.pool(name + " other", request_id=key))
    assert await count(small, name + " other") == 0
    second = await small.rpc("CreatePool", "bert", pool={"name": name + " of bert"}, request_id=key)
    assert second.id != first.id
    # One key may serve two methods: clients count per request, not per method.
    await small.rpc("UpdatePool", pool={"id": first.id, "purpose": "urgent"}, etag=first.etag, request_id=key)


async def test_a_refusal_is_not_stored(small: Small) -> None:
    key, name = new_id(), f"refused {new_id()}"
    first = await small.pool(name)
    await refused(AlreadyExists, "NAME_TAKEN", small.rpc("CreatePool", pool={"name": name}, request_id=key))
    await small.sql("UPDATE pool SET name = name || ' gone' WHERE id = :id", id=first.id)
    assert (await small.rpc("CreatePool", pool={"name": name}, request_id=key)).id != first.id


async def test_an_answer_that_got_lost_after_the_commit_comes_with_the_replay(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small.server.pipeline._run
    lost: list[Any] = []

    async def lose(exchange: Any) -> Any:
        answer = await run(exchange)
        if not lost:
            lost.append(answer)
            raise ConnectionResetError(PLANTED)
        return answer

    monkeypatch.setattr(small.server.pipeline, "_run", lose)
    key, name = new_id(), f"lost {new_id()}"
    await refused(Unavailable, "DATABASE_UNAVAILABLE", small.rpc("CreatePool", pool={"name": name}, request_id=key))
    answer = await small.rpc("CreatePool", pool={"name": name}, request_id=key)
    assert answer == lost[0]
    assert await count(small, name) == 1
    assert await outbox_of(small, answer.id) == 1


async def test_a_crash_before_the_commit_leaves_nothing_and_the_replay_does_the_work(small: Small) -> None:
    async def crash(*_: Any) -> None:
        raise RuntimeError(PLANTED)

    small.hooks["CreatePool"] = crash
    key, name = new_id(), f"crashed {new_id()}"
    await refused(Internal, "INTERNAL", small.rpc("CreatePool", pool={"name": name}, request_id=key))
    assert await count(small, name) == 0
    assert not await small.sql("SELECT 1 FROM idempotency_key WHERE request_id = :key", key=key)
    small.hooks.clear()
    answer = await small.rpc("CreatePool", pool={"name": name}, request_id=key)
    assert await outbox_of(small, answer.id) == 1


async def test_a_twin_in_another_process_is_waited_for_and_then_told_in_progress(small: Small) -> None:
    key, name = new_id(), f"elsewhere {new_id()}"
    engine = small.server.database.engine
    async with engine.connect() as elsewhere:
        await elsewhere.execute(
            text(
                "INSERT INTO idempotency_key (tenant_id, actor, method, request_id, body_hash)"
                " VALUES (:tenant, :actor, 'care.patients.v1.PoolsService/CreatePool', :key, '')"
            ),
            {"tenant": small.harness.tenant_id, "actor": f"staff:{small.ada}", "key": key},
        )
        began = time.perf_counter()
        await refused(Aborted, "IN_PROGRESS", small.rpc("CreatePool", pool={"name": name}, request_id=key))
        assert 1.8 < time.perf_counter() - began < 5
        await elsewhere.rollback()
    assert (await small.rpc("CreatePool", pool={"name": name}, request_id=key)).name == name


async def test_a_twin_that_hangs_makes_its_siblings_give_up_without_a_place(small: Small) -> None:
    let_go = asyncio.Event()

    async def hang(request: Any, _call: Any) -> None:
        if request.request_id == key:
            await let_go.wait()

    small.hooks["CreatePool"] = hang
    key, name = new_id(), f"hanging {new_id()}"
    first = asyncio.create_task(small.rpc("CreatePool", pool={"name": name}, request_id=key))
    await asyncio.sleep(0.1)
    await refused(Aborted, "IN_PROGRESS", small.rpc("CreatePool", pool={"name": name}, request_id=key))
    let_go.set()
    assert (await first) == await small.rpc("CreatePool", pool={"name": name}, request_id=key)


async def test_a_replay_passes_the_object_check_again(small: Small) -> None:
    patient, key = await small.patient(), new_id()
    first = await small.consent(patient, request_id=key)
    assert await small.consent(patient, request_id=key) == first
    await small.harness.subject(new_id(), patient_id=patient, version=2)
    await refused(NotFound, "NOT_FOUND", small.consent(patient, request_id=key))
    await small.harness.subject(small.clinic, patient_id=patient, version=3)
    assert await small.consent(patient, request_id=key) == first


async def test_a_link_is_called_by_the_gateway_alone_and_names_its_own_row(small: Small) -> None:
    token = f"token {new_id()}"
    task = await small.task(await small.patient(), note=token)
    stub = feedback_pb2_grpc.SurveyLinksServiceStub(small.harness.channel(small.name))
    gateway = small.harness.as_service("gateway")
    assert (
        await stub.AnswerSurveyByLink(feedback_pb2.AnswerSurveyByLinkRequest(token=token), metadata=gateway)
    ).answered
    for metadata, said in [
        (gateway, "token that is none"),
        (small.harness.as_user("ada"), token),
        (small.harness.as_service("feedback"), token),
        ((), token),
    ]:
        with pytest.raises(grpc.RpcError):
            await stub.AnswerSurveyByLink(feedback_pb2.AnswerSurveyByLinkRequest(token=said), metadata=metadata)
    ((tenant, actor, subjects),) = await small.sql(
        "SELECT tenant_id::text, actor, subject_ids::text[] FROM audit WHERE method LIKE '%AnswerSurveyByLink' AND outcome = 'OK'"
    )
    assert (tenant, actor, subjects) == (small.harness.tenant_id, "link", [task.patient_id])


# -- deadlines ---------------------------------------------------------------------------------------------------------


async def test_a_passed_deadline_rolls_back_and_gives_the_connection_back(small: Small) -> None:
    async def dawdle(_request: Any, call: Any) -> None:
        await call.db.execute(text("SELECT pg_sleep(8)"))

    small.hooks["CreatePool"] = dawdle
    key, name = new_id(), f"late {new_id()}"
    request = staff_pb2.CreatePoolRequest(pool={"name": name}, request_id=key)
    calling = raw(small, "CreatePool", request, small.harness.as_user("ada"), timeout=0.4)
    await refused(DeadlineExceeded, "DEADLINE_EXCEEDED", calling)
    method = small.server.pipeline.methods["care.patients.v1.PoolsService/CreatePool"]
    told = small.server.pipeline.invoke(
        method, request, Credentials(small.harness.token("ada")), time_remaining=lambda: 0.4
    )
    await refused(DeadlineExceeded, "DEADLINE_EXCEEDED", told)
    assert await count(small, name) == 0
    left = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    async with asyncio.timeout(4):  # well before the statement would have ended by itself
        while await small.sql(f"{left} AND query LIKE '%pg_sleep%' AND state <> 'idle'"):
            await asyncio.sleep(0.05)
    old = "state LIKE 'idle in%' AND state_change < clock_timestamp() - interval '1 second'"
    assert not await small.sql(f"{left} AND {old}")
    small.hooks.clear()
    assert (await small.rpc("CreatePool", pool={"name": name}, request_id=key)).name == name


# -- a driver's errors -------------------------------------------------------------------------------------------------


def raising(sqlstate: str) -> str:
    return f"DO $$ BEGIN RAISE EXCEPTION '{PLANTED}' USING ERRCODE = '{sqlstate}', DETAIL = '{PLANTED}'; END $$"


_POOL = "INSERT INTO pool (tenant_id, id, version, name, purpose, staff_ids, clinic_ids, specialty_codes, active)"
_VALUES = "'{}', '{}', '{}', true"
NAMED = f"{_POOL} VALUES (gen_random_uuid(), gen_random_uuid(), 1, 'Forbidden', '{PLANTED}', {_VALUES})"
NULLED = f"{_POOL} VALUES (gen_random_uuid(), gen_random_uuid(), 1, NULL, '{PLANTED}', {_VALUES})"
DOUBLED = (
    "INSERT INTO lease (name, owner, epoch, until) SELECT '" + PLANTED + "', gen_random_uuid(), 1, now()"
    " FROM generate_series(1, 2)"
)
ORPHAN = (
    "INSERT INTO task (tenant_id, id, version, history, patient_id, code, due_time, note, done, status, security_labels)"
    f" VALUES (gen_random_uuid(), gen_random_uuid(), 1, '[]', gen_random_uuid(), '{PLANTED}', now(), '', 0, 'READY', '{{}}')"
)
ERRORS: list[tuple[str, str, type[Problem], str]] = [
    ("unique, undeclared", DOUBLED, Internal, "INTERNAL"),
    ("check", NAMED, Internal, "INTERNAL"),
    ("not null", NULLED, Internal, "INTERNAL"),
    ("unknown subject", ORPHAN, NotFound, "NOT_FOUND"),
    ("foreign key", raising("23503"), Internal, "INTERNAL"),
    ("data", f"SELECT CAST('{PLANTED}' AS integer)", Invalid, "VALUE_REFUSED"),
    ("date", f"SELECT CAST('{PLANTED}' AS date)", Invalid, "VALUE_REFUSED"),
    ("overflow", "SELECT 2147483647::int + 1", Invalid, "VALUE_REFUSED"),
    ("syntax", f"SELECT FROM WHERE '{PLANTED}'", Internal, "INTERNAL"),
    ("deadlock", raising("40P01"), Internal, "INTERNAL"),
    ("serialization", raising("40001"), Aborted, "CHANGED_MEANWHILE"),
    ("lock", raising("55P03"), Aborted, "IN_PROGRESS"),
    ("disk full", raising("53100"), Unavailable, "DATABASE_UNAVAILABLE"),
    ("statement timeout", f"SET LOCAL statement_timeout = 50; SELECT pg_sleep(3), '{PLANTED}'", Unavailable, "DATABASE_UNAVAILABLE"),
    ("connection", "SELECT pg_terminate_backend(pg_backend_pid())", Unavailable, "DATABASE_UNAVAILABLE"),
    ("own code", raising("P0001"), Internal, "INTERNAL"),
]  # fmt: skip


@pytest.fixture
def spans(running: Small) -> Iterator[InMemorySpanExporter]:
    """Spans as they are made, before anything is scrubbed off."""
    exporter = InMemorySpanExporter()
    provider = running.server.telemetry._provider
    tracer: Any = running.server.telemetry.tracer
    before, sampler = provider._active_span_processor._span_processors, tracer.sampler
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracer.sampler = ALWAYS_ON
    yield exporter
    provider._active_span_processor._span_processors, tracer.sampler = before, sampler


@pytest.mark.parametrize(
    ("kind", "reason", "statement"), [(k, r, s) for _, s, k, r in ERRORS], ids=[e[0] for e in ERRORS]
)
async def test_a_drivers_error_is_told_in_our_words(
    small: Small,
    spans: InMemorySpanExporter,
    caplog: pytest.LogCaptureFixture,
    kind: type[Problem],
    reason: str,
    statement: str,
) -> None:
    async def fail(_request: Any, call: Any) -> None:
        for each in statement.split("; ") if "DO $$" not in statement else [statement]:
            await call.db.execute(text(each.replace(":", "\\:")))

    deadlocks = small.server.telemetry.registry.get_sample_value("care_deadlocks_total") or 0
    small.hooks.update(CreatePool=fail, GetPool=fail)
    problem = await refused(kind, reason, small.pool())
    assert "(" not in problem.message
    assert not problem.metadata
    small.hooks.clear()
    assert await small.pool()  # the connection is as good as new
    told = small.server.telemetry.registry.get_sample_value("care_deadlocks_total") or 0
    assert told - deadlocks == (1 if "40P01" in statement else 0)
    everything = [
        problem.message,
        json.dumps(problem.metadata),
        small.harness.log_of(small.name),
        caplog.text,
        *(span.to_json() for span in spans.get_finished_spans()),
    ]
    for said in everything:
        for word in (PLANTED, *PLANTED.split(), "Traceback", "DETAIL"):
            assert word not in said
    ours = [span for span in spans.get_finished_spans() if span.name.endswith("CreatePool")]
    assert ours[0].attributes["rpc.response.status_code"] == kind.code.name  # type: ignore[index]
    rows = await small.sql("SELECT outcome FROM audit WHERE method LIKE '%CreatePool' ORDER BY id DESC LIMIT 2")
    assert sorted(row.outcome for row in rows) == sorted(["OK", kind.code.name])


async def test_a_lost_race_is_tried_again_by_itself_and_told_in_the_end(small: Small) -> None:
    tries: list[Any] = []

    async def lose(_request: Any, call: Any) -> None:
        tries.append(call.db)
        if len(tries) < 3:
            if len(tries) == 1:
                await call.db.execute(text(raising("40001").replace(":", "\\:")))
            raise LostRace(AlreadyExists("SLOT_TAKEN", "It is taken."))

    small.hooks["CreatePool"] = lose
    name = f"raced {new_id()}"
    assert (await small.pool(name)).name == name
    assert len(tries) == len(set(map(id, tries))) == 3
    tries[:] = []

    async def always(*_: Any) -> None:
        raise LostRace(AlreadyExists("SLOT_TAKEN", "It is taken."))

    small.hooks["CreatePool"] = always
    await refused(AlreadyExists, "SLOT_TAKEN", small.pool())


async def test_no_room_in_the_pool_or_no_database_is_unavailable(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncpg
    from sqlalchemy.exc import TimeoutError as PoolTimeout

    for error in (
        PoolTimeout("QueuePool limit"),
        asyncpg.CannotConnectNowError(PLANTED),
        asyncpg.TooManyConnectionsError(PLANTED),
        ConnectionRefusedError(PLANTED),
        TimeoutError(PLANTED),
    ):

        async def fail(*_: Any, error: Exception = error) -> None:
            raise error

        small.hooks["GetPool"] = fail
        pool = await small.pool()
        problem = await refused(Unavailable, "DATABASE_UNAVAILABLE", small.rpc("GetPool", id=pool.id))
        assert PLANTED not in problem.message


async def test_a_lost_update_is_told_and_none_happens(small: Small) -> None:
    task = await small.task(await small.patient())

    async def bump() -> bool:
        try:
            await small.rpc("AssignTask", id=task.id, owner={"type": "Staff", "id": small.ada}, etag=task.etag)
        except Aborted as problem:
            assert problem.reason == "ETAG_MISMATCH"
            return False
        return True

    assert sum(await asyncio.gather(*(bump() for _ in range(64)))) == 1
    ((done, version),) = await small.sql("SELECT done, version FROM task WHERE id = :id", id=task.id)
    assert (done, version) == (1, 2)


# -- audit -------------------------------------------------------------------------------------------------------------


async def audited(small: Small, method: str, **more: Any) -> list[Any]:
    return list(
        await small.sql(
            "SELECT actor, outcome, permission, subject_ids::text[] AS subjects, trace_id, tenant_id::text FROM audit"
            " WHERE method = :method AND (:actor = '' OR actor = :actor) ORDER BY id",
            method=method,
            actor=more.get("actor", ""),
        )
    )


async def test_success_and_refusal_leave_their_rows_before_the_answer(small: Small) -> None:
    who = await small.harness.staff("clara", ["consents.read", "consents.write"], clinics=[small.clinic])
    patient = await small.patient()
    consent = await small.consent(patient, "clara")
    (row,) = await audited(small, "care.patients.v1.ConsentsService/CreateConsent", actor=f"staff:{who}")
    assert (row.outcome, row.permission, row.subjects, row.tenant_id) == (
        "OK", "consents.write", [patient], small.harness.tenant_id,
    )  # fmt: skip
    assert len(row.trace_id) == 32
    await small.rpc("GetConsent", "clara", id=consent.id)
    await refused(NotFound, "NOT_FOUND", small.rpc("GetConsent", "clara", id=new_id()))
    await refused(Invalid, "FIELD_INVALID", small.rpc("GetConsent", "clara", id="x"))
    rows = await audited(small, "care.patients.v1.ConsentsService/GetConsent", actor=f"staff:{who}")
    assert [row.outcome for row in rows] == ["OK", "NOT_FOUND", "INVALID_ARGUMENT"]
    assert [row.subjects for row in rows] == [[patient], [], []]
    await refused(PermissionDenied, "PERMISSION_MISSING", small.rpc("GetPool", "clara", id=new_id()))
    rows = await audited(small, "care.patients.v1.PoolsService/GetPool", actor=f"staff:{who}")
    assert [row.outcome for row in rows] == ["PERMISSION_DENIED"]
    await refused(Unauthenticated, "LOGIN_UNKNOWN", small.rpc("GetPool", f"nobody {new_id()}", id=new_id()))
    assert [row.outcome for row in await audited(small, "care.patients.v1.PoolsService/GetPool", actor="unknown")]


async def test_a_list_is_noted_within_a_second_with_all_whom_it_showed(small: Small) -> None:
    who = await small.harness.staff("dora", ["tasks.read"], clinics=[small.clinic])
    patient = await small.patient()
    await small.task(patient)
    await small.rpc("ListTasks", "dora", patient_id=patient)
    ((ended,),) = await small.sql("SELECT clock_timestamp()")
    async with asyncio.timeout(5):
        while not (rows := await audited(small, "care.patients.v1.TasksService/ListTasks", actor=f"staff:{who}")):
            await asyncio.sleep(0.02)
    assert rows[0].subjects == [patient]
    late = await small.sql(
        "SELECT 1 FROM audit WHERE actor = :who AND time > CAST(:ended AS timestamptz) + interval '1 s'",
        who=f"staff:{who}",
        ended=ended,
    )
    assert not late


async def test_a_replay_is_noted_too(small: Small) -> None:
    who = await small.harness.staff("emil", ["consents.write"], clinics=[small.clinic])
    patient, key = await small.patient(), new_id()
    for _ in range(2):
        await small.consent(patient, "emil", request_id=key)
    rows = await audited(small, "care.patients.v1.ConsentsService/CreateConsent", actor=f"staff:{who}")
    assert [(row.outcome, row.subjects) for row in rows] == [("OK", [patient])] * 2


async def test_a_crowd_of_refusals_is_noted_whole_on_one_connection(small: Small) -> None:
    who = await small.harness.staff("fred", ["tasks.read"], clinics=[small.clinic])
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, small.server.database.engine.pool.checkedout())  # type: ignore[attr-defined]
            await asyncio.sleep(0.001)

    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*(small.rpc("GetTask", "fred", id="x") for _ in range(150)), return_exceptions=True)
    watching.cancel()
    assert all(isinstance(answer, Invalid) for answer in answers)
    await small.server.database.audit._flush()  # what a slow machine did not note within two seconds
    assert len(await audited(small, "care.patients.v1.TasksService/GetTask", actor=f"staff:{who}")) == 150


async def test_a_refusal_that_cannot_be_noted_in_time_is_noted_later_and_once(small: Small) -> None:
    who = await small.harness.staff("wanda", ["tasks.read"], clinics=[small.clinic])
    audit = small.server.database.audit
    async with small.server.database.engine.connect() as connection:
        await connection.begin()
        await connection.execute(text("LOCK TABLE audit IN EXCLUSIVE MODE"))
        await refused(Invalid, "FIELD_INVALID", small.rpc("GetTask", "wanda", id="x"))
        await connection.rollback()
    await audit._flush()
    await audit._flush()
    assert len(await audited(small, "care.patients.v1.TasksService/GetTask", actor=f"staff:{who}")) == 1


async def test_no_words_of_a_caller_keep_a_refusal_out_of_the_audit(small: Small) -> None:
    who = await small.harness.staff("nora", ["pools.read"])
    pool = await small.pool()

    async def hook(_: Any, call: Any) -> None:
        call.purpose = "for\0care"
        raise NotFound

    small.hooks["GetPool"] = hook
    await refused(NotFound, "NOT_FOUND", small.rpc("GetPool", "nora", id=pool.id))
    assert len(await audited(small, "care.patients.v1.PoolsService/GetPool", actor=f"staff:{who}")) == 1


async def test_rows_that_wait_are_written_once_even_if_the_first_try_was_not_seen_to_succeed(small: Small) -> None:
    audit = small.server.database.audit
    entry = {
        "id": new_id(), "tenant_id": new_id(), "actor": "staff:x", "on_behalf_of": "", "method": "twice",
        "permission": "", "purpose": "", "subject_ids": [], "outcome": "OK", "trace_id": "",
    }  # fmt: skip
    await audit.read(entry, at_once=False)
    await audit._flush()
    await audit.read(entry, at_once=False)
    await audit.read({**entry, "id": new_id()}, at_once=False)
    await audit._flush()
    assert len(await audited(small, "twice")) == 2
    assert not audit._buffer


async def test_a_row_that_no_database_takes_keeps_no_other_waiting(small: Small) -> None:
    audit = small.server.database.audit
    entry = {
        "id": new_id(), "tenant_id": new_id(), "actor": "staff:x", "on_behalf_of": "", "method": "poison",
        "permission": "", "purpose": "", "subject_ids": [], "outcome": "OK", "trace_id": "",
    }  # fmt: skip
    await audit.refused({**entry, "actor": "staff:\0"})
    for _ in range(2):
        await audit.read({**entry, "id": new_id()}, at_once=False)
    await audit._flush()
    assert len(await audited(small, "poison")) == 2
    assert not audit._buffer


# -- several reads in one ----------------------------------------------------------------------------------------------


def item(small: Small, method: str, request: Any, who: str) -> dict[str, Any]:
    body = request if isinstance(request, bytes) else request.SerializeToString()
    return {"method": f"care.patients.v1.{method}", "request": body, "token": small.harness.token(who) if who else ""}


async def batch(small: Small, items: list[dict[str, Any]]) -> list[Any]:
    stub = batch_pb2_grpc.BatchServiceStub(small.harness.channel(small.name))
    request = batch_pb2.BatchReadRequest(items=items)  # type: ignore[arg-type]
    return list((await stub.BatchRead(request, metadata=small.harness.as_service("gateway"), timeout=10)).results)


async def test_batches_leave_no_more_rows_waiting_than_lists_do(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    log, written = small.server.database.audit, 0
    write = log.write

    async def count(rows: Any) -> None:
        nonlocal written
        written += 1
        await write(rows)

    monkeypatch.setattr("chassis.database._AUDIT_BUFFER_AT_MOST", 0)
    monkeypatch.setattr(log, "write", count)
    await batch(small, [item(small, "PoolsService/ListPools", staff_pb2.ListPoolsRequest(), "ada")])
    assert written == 2  # the list's, the batch's


async def test_each_item_of_a_batch_is_its_own_callers(small: Small) -> None:
    await small.harness.staff("greta", ["tasks.read"], clinics=[new_id()])
    patient = await small.patient()
    task = await small.task(patient)
    get = tasks_pb2.GetTaskRequest(id=task.id)
    results = await batch(
        small,
        [
            item(small, "TasksService/GetTask", get, "ada"),
            item(small, "TasksService/GetTask", get, "greta"),
            item(small, "TasksService/GetTask", get, ""),
            item(small, "TasksService/GetTask", tasks_pb2.GetTaskRequest(id="x"), "ada"),
            item(small, "TasksService/GetTask", b"\xff\xff\xff", "ada"),
            item(small, "TasksService/ClaimTask", tasks_pb2.ClaimTaskRequest(id=task.id), "ada"),
            item(small, "TasksService/Nothing", get, "ada"),
            item(small, "PoolsService/ListPools", staff_pb2.ListPoolsRequest(), "greta"),
            {
                **item(small, "TasksService/GetTask", get, "ada"),
                "method": "care.access.v1.AccessService/ResolvePrincipal",
            },
            item(small, "TasksService/GetTask", get, "ada"),
        ],
    )
    names = [grpc.StatusCode.OK if not one.code else _code(one.code) for one in results]
    assert [name.name for name in names] == [
        "OK", "NOT_FOUND", "UNAUTHENTICATED", "INVALID_ARGUMENT", "INVALID_ARGUMENT", "INVALID_ARGUMENT",
        "INVALID_ARGUMENT", "PERMISSION_DENIED", "INVALID_ARGUMENT", "OK",
    ]  # fmt: skip
    assert tasks_pb2.Task.FromString(results[0].response).id == task.id
    assert status_pb2.Status.FromString(results[1].status).code == 5
    rows = await small.sql(
        "SELECT outcome FROM audit WHERE method = 'care.patients.v1.TasksService/GetTask' ORDER BY id DESC LIMIT 4"
    )
    assert sorted(row.outcome for row in rows) == ["INVALID_ARGUMENT", "NOT_FOUND", "OK", "OK"]
    ((status,),) = await small.sql("SELECT status FROM task WHERE id = :id", id=task.id)
    assert status == "READY"


def _code(number: int) -> grpc.StatusCode:
    return next(code for code in grpc.StatusCode if code.value[0] == number)


async def test_only_the_gateway_may_batch(small: Small) -> None:
    stub = batch_pb2_grpc.BatchServiceStub(small.harness.channel(small.name))
    request = batch_pb2.BatchReadRequest(items=[{"method": "x"}])
    for metadata in (small.harness.as_user("ada"), small.harness.as_service("feedback")):
        with pytest.raises(grpc.RpcError) as caught:
            await stub.BatchRead(request, metadata=metadata)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_more_batches_than_places_do_not_wait_for_each_other(small: Small) -> None:
    task = await small.task(await small.patient())
    one = item(small, "TasksService/GetTask", tasks_pb2.GetTaskRequest(id=task.id), "ada")
    batches = small.server.settings.pool_size + 4
    async with asyncio.timeout(8):
        found = await asyncio.gather(*(batch(small, [one] * 8) for _ in range(batches)))
    assert all(result.code == 0 for results in found for result in results)


async def test_health_and_reflection_answer_a_stock_client(small: Small) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

    channel: Any = small.harness.channel(small.name)
    stub: Any = health_pb2_grpc.HealthStub(channel)
    for name in ("", "live", "referrals", "care.patients.v1.PoolsService"):
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=name))).status == 1
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(channel)
    asking = reflection.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    async for answer in asking:
        assert "care.patients.v1.PoolsService" in {one.name for one in answer.list_services_response.service}
        break
    asking.cancel()

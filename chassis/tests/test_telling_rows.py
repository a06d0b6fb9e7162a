"""Rows that tell: versions, order, history, what is lost with a rollback, and how few statements a write takes."""

import enum
from collections import deque
from collections.abc import AsyncIterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest
from care.events.v1.envelope_pb2 import Event
from care.patients.v1 import events_pb2
from google.protobuf.type_pb2 import Field
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client import CollectorRegistry
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.bus import Record
from chassis.consumer import Consumer
from chassis.errors import FailedPrecondition, Invalid
from chassis.ids import new_id
from chassis.lifecycle import Lifecycle
from chassis.reactions import Reactions
from chassis.tests.small import ALL, Small, TaskStatus, models
from chassis.tests.telling import LOG, event_of


@pytest.fixture
async def still(small: Small) -> AsyncIterator[Small]:
    """The relay rests, so that the outbox can be looked at."""
    await small.server.relay.stop()
    await small.sql("DELETE FROM outbox")
    yield small
    await small.server.relay.start()


async def outbox(small: Small) -> list[Event]:
    return [Event.FromString(row.value) for row in await small.sql("SELECT value FROM outbox ORDER BY id")]


# -- lifecycles --------------------------------------------------------------------------------------------------------


class Visit(enum.Enum):
    BOOKED = "booked"
    ARRIVED = "arrived"
    CHECKED_IN = "checked-in"


def visit() -> Any:
    living = models().Task
    arrows = Lifecycle(
        ("book", [], Visit.BOOKED, None),
        ("arrive", [Visit.BOOKED], Visit.ARRIVED, None),
        ("check_in", [Visit.ARRIVED], Visit.CHECKED_IN, None),
        ("revert", [Visit.BOOKED, Visit.ARRIVED, Visit.CHECKED_IN], None, None),
    )
    living.lifecycle = arrows
    row = living(id=new_id())
    row.move("book")
    return row


def test_an_action_out_of_its_status_is_refused_and_changes_nothing() -> None:
    row = visit()
    with pytest.raises(FailedPrecondition) as refused:
        row.move("check_in")
    assert (refused.value.reason, refused.value.metadata) == (
        "ILLEGAL_TRANSITION", {"action": "check_in", "status": "BOOKED"},
    )  # fmt: skip
    with pytest.raises(FailedPrecondition):
        row.move("book")
    with pytest.raises(FailedPrecondition):
        row.move("fly")
    assert row.status is Visit.BOOKED
    assert len(row.history) == 1


def test_two_reverts_take_two_steps_back() -> None:
    row = visit()
    row.move("arrive")
    row.move("check_in")
    row.move("revert")
    assert row.status is Visit.ARRIVED
    row.move("revert")
    assert row.status is Visit.BOOKED
    with pytest.raises(FailedPrecondition) as refused:  # nothing was before the birth
        row.move("revert")
    assert refused.value.reason == "ILLEGAL_TRANSITION"
    row.move("arrive")
    assert [step["action"] for step in row.history] == ["book", "arrive", "check_in", "revert", "revert", "arrive"]


# -- history -----------------------------------------------------------------------------------------------------------


async def test_every_step_says_who_when_and_from_where(small: Small) -> None:
    await small.harness.staff("second", ALL, clinics=[small.clinic])
    consent = await small.consent(await small.patient())
    await small.rpc("RevokeConsent", "second", id=consent.id, source="PHONE")
    ((history, created, updated),) = await small.sql(
        "SELECT history, create_time, update_time FROM consent WHERE id = :id", id=consent.id
    )
    first, last = history
    assert (first["action"], first["from_status"], first["to_status"]) == ("record", "", "ACTIVE")
    assert (last["action"], last["from_status"], last["to_status"]) == ("revoke", "ACTIVE", "INACTIVE")
    assert first["actor"] == f"staff:{small.ada}" != last["actor"]
    assert (first["source"], last["source"]) == ("CODE_UNSPECIFIED", "PHONE")
    assert last["reason_code"] == "revoked"
    assert (first["time"], last["time"]) == (created.isoformat(), updated.isoformat())
    assert created < updated


async def test_the_history_goes_over_the_wire(small: Small) -> None:
    task = await small.task(await small.patient())
    claimed = await small.rpc("ClaimTask", id=task.id)
    assert [(step.action, step.from_status, step.to_status) for step in claimed.history] == [
        ("create", "", "READY"),
        ("claim", "READY", "IN_PROGRESS"),
    ]
    released = await small.rpc("ReleaseTask", id=task.id)
    assert released.status == released.READY
    assert released.history[2].time.ToDatetime() == released.update_time.ToDatetime()


# -- events ------------------------------------------------------------------------------------------------------------


async def test_an_event_told_on_a_row_that_nothing_else_changed_is_not_lost(still: Small) -> None:
    task = await still.task(await still.patient())
    snoozed = await still.rpc("SnoozeTask", id=task.id, snooze_time=task.due_time)
    created, told = await outbox(still)
    assert (created.type, told.type) == ("task.created", "task.snoozed")
    assert (created.version, told.version) == (1, 2)
    assert snoozed.etag == '"2"'
    assert snoozed.update_time.ToNanoseconds() > task.update_time.ToNanoseconds()


async def test_the_envelope_says_whose_who_when_and_with_which_labels(still: Small) -> None:
    await still.harness.staff("told of", ALL, clinics=[still.clinic], clearances=["hiv"])
    patient = await still.patient()
    task = await still.task(patient, who="told of", reason_code="hiv")
    (told,) = await outbox(still)
    assert (told.tenant_id, told.aggregate_id, told.patient_id) == (still.harness.tenant_id, task.id, patient)
    assert told.actor.startswith("staff:")
    assert list(told.security_labels) == ["hiv"]
    assert told.time.ToDatetime() == task.create_time.ToDatetime()
    assert told.payload_type == "care.patients.v1.TaskEvent"
    assert events_pb2.TaskEvent.FromString(told.payload).status == "READY"
    ((key, traceparent),) = await still.sql("SELECT key, traceparent FROM outbox")
    assert key == task.id
    assert told.traceparent == traceparent
    ((trace,),) = await still.sql("SELECT trace_id FROM audit WHERE method LIKE '%CreateTask' ORDER BY id DESC LIMIT 1")
    assert traceparent.split("-")[1] == trace


async def test_events_of_one_transaction_keep_the_order_in_which_they_were_told(still: Small) -> None:
    model, database = still.models, still.server.database
    patient = await still.patient()
    rows = [await still.task(patient) for _ in range(12)]
    await still.sql("DELETE FROM outbox")
    told: list[tuple[str, str]] = []
    async with database.acting("system:referrals") as db:
        tasks = [
            await db.get_one(model.Task, {"tenant_id": still.harness.tenant_id, "id": row.id}) for row in reversed(rows)
        ]
        new = model.Pool(id=new_id(), tenant_id=still.harness.tenant_id, name=f"order {new_id()}", purpose="")
        for number, task in enumerate(tasks):
            task.tell(f"first{number}")
            told.append((task.id, f"task.first{number}"))
            if number == 5:
                new.tell("changed")
                told.append((new.id, "pool.changed"))
                db.add(new)
        for task in tasks[::2]:
            task.tell("second")
            told.append((task.id, "task.second"))
        await db.flush()
        tasks[3].tell("third")
        told.append((tasks[3].id, "task.third"))
    assert [(event.aggregate_id, event.type) for event in await outbox(still)] == told
    versions = {event.type: event.version for event in await outbox(still) if event.aggregate_id == tasks[3].id}
    assert versions == {"task.first3": 2, "task.third": 3}
    ((version,),) = await still.sql("SELECT version FROM task WHERE id = :id", id=tasks[3].id)
    assert version == 3


async def test_what_events_that_share_a_transaction_make_is_told_by_each_ones_act_in_its_trace(still: Small) -> None:
    reactions, woken = Reactions(), list[str]()

    @reactions.on("thing.changed", payload=Field, shares=True)
    async def tell(payload: Field, event: Event, db: AsyncSession) -> None:
        pool = still.models.Pool(id=event.aggregate_id, tenant_id=still.harness.tenant_id, name=new_id(), purpose="")
        pool.tell("changed")
        db.add(pool)
        db.info.setdefault("wakes", {})[event.aggregate_id] = lambda: woken.append(event.aggregate_id)
        if payload.number == 9:
            raise ZeroDivisionError

    consumer = Consumer(
        still.server.bus,
        "sharing",
        [],
        reactions,
        still.server.database.sessions,
        tracer=TracerProvider().get_tracer("test"),
        registry=CollectorRegistry(),
        log=LOG,
        actor="system:referrals",
    )

    def waiting(*numbers: int) -> list[Any]:
        traces = [f"00-{number:032x}-b7ad6b7169203331-01" for number in numbers]
        events = [event_of(new_id(), n, traceparent=trace) for n, trace in zip(numbers, traces, strict=True)]
        records = [Record("x", e.version, 0, e.aggregate_id, e.SerializeToString(), (), 0) for e in events]
        return [consumer._fit(("x", record.partition), record) for record in records]

    given_up = waiting(1, 9)
    for each in given_up:
        consumer._queues[each.partition] = deque()
    await consumer._settle_together(given_up)
    assert (await outbox(still), woken) == ([], [])
    taken = waiting(2, 3, 4)
    await consumer._settle_together(taken)
    told = await outbox(still)
    assert sorted(woken) == [one.aggregate_id for one in told] == sorted(each.event.aggregate_id for each in taken)
    traces = {each.event.aggregate_id: each.event.traceparent.split("-")[1] for each in taken}
    assert all(one.traceparent.split("-")[1] == traces[one.aggregate_id] for one in told)
    assert len({one.traceparent for one in told}) == 3
    assert {one.actor for one in told} == {"system:referrals"}
    rows = await still.sql("SELECT id, update_time FROM pool WHERE id = ANY(:ids)", ids=[*map(UUID, traces)])
    assert {str(row.id): row.update_time.replace(tzinfo=None) for row in rows} == {
        one.aggregate_id: one.time.ToDatetime() for one in told
    }
    assert len({row.update_time for row in rows}) == 3
    assert [row.traceparent for row in await still.sql("SELECT traceparent FROM outbox ORDER BY id")] == [
        one.traceparent for one in told
    ]


async def test_the_version_of_an_event_is_the_rows_own(still: Small) -> None:
    task = await still.task(await still.patient())
    for method in ("ClaimTask", "ReleaseTask", "ClaimTask"):
        await still.rpc(method, id=task.id)
    told = await outbox(still)
    assert [event.version for event in told] == [1, 2, 3, 4]
    ((version,),) = await still.sql("SELECT version FROM task WHERE id = :id", id=task.id)
    assert version == 4


async def test_what_is_told_of_a_row_that_is_deleted_or_was_not_loaded_is_not_lost(still: Small) -> None:
    pools = [await still.pool() for _ in range(2)]
    await still.sql("DELETE FROM outbox")
    async with still.server.database.acting("system:referrals") as db:
        gone, faded = [
            await db.get_one(still.models.Pool, {"tenant_id": still.harness.tenant_id, "id": pool.id}) for pool in pools
        ]
        gone.tell("deleted")
        await db.delete(gone)
        db.expire(faded, ["update_time"])
        faded.tell("changed")
    assert {(event.aggregate_id, event.type) for event in await outbox(still)} == {
        (pools[0].id, "pool.deleted"),
        (pools[1].id, "pool.changed"),
    }


async def test_nothing_is_told_when_the_transaction_is_rolled_back(still: Small) -> None:
    woken: list[int] = []
    still.server.database.wake, wake = (lambda: woken.append(1)), still.server.database.wake
    try:
        with pytest.raises(ZeroDivisionError):
            async with still.server.database.acting("system:referrals") as db:
                pool = still.models.Pool(id=new_id(), tenant_id=still.harness.tenant_id, name="never", purpose="")
                pool.tell("changed")
                db.add(pool)
                await db.flush()
                _ = 1 / 0
        assert await outbox(still) == []
        assert not woken
        await still.pool()
        assert len(await outbox(still)) == 1
        assert woken
    finally:
        still.server.database.wake = wake


async def test_an_event_on_the_bus_comes_from_a_committed_row_only(small: Small) -> None:
    async def fail(*_: Any) -> None:
        raise Invalid("NO", "No.")

    small.hooks["CreatePool"] = fail
    name = f"never {new_id()}"
    with pytest.raises(Invalid):
        await small.pool(name)
    assert not await small.sql(
        "SELECT 1 FROM outbox WHERE position(:name in convert_from(value, 'LATIN1')) > 0", name=name
    )


async def test_a_simple_write_is_six_statements(still: Small) -> None:
    task = await still.task(await still.patient())
    with still.statements() as seen:
        await still.rpc("ClaimTask", id=task.id)
    assert [" ".join(one.split()[:3]) for one in seen] == [
        "SELECT p.kind, p.principal_id,",  # kept for two seconds, but not in tests
        "BEGIN",
        "INSERT INTO idempotency_key",
        "SELECT task.tenant_id, task.id,",
        "UPDATE task SET",
        "WITH told AS",
        "COMMIT",
    ]


# -- pages -------------------------------------------------------------------------------------------------------------


async def pages(small: Small, method: str, size: int, field: str, between: Any = None, **fields: Any) -> list[str]:
    found: list[str] = []
    token = ""
    while True:
        page = await small.rpc(method, page_size=size, page_token=token, **fields)
        rows = getattr(page, field)
        assert len(rows) <= size
        found += [row.id for row in rows]
        if not (token := page.next_page_token):
            return found
        if between is not None:
            await between(found)


async def test_pages_hold_every_row_once_in_order_while_others_write(small: Small) -> None:
    patient = await small.patient()
    rows = [await small.task(patient, due=timedelta(minutes=number // 3)) for number in range(11)]
    early, late = [], []

    async def write(found: list[str]) -> None:
        early.append((await small.task(patient, due=timedelta(minutes=-5))).id)
        late.append((await small.task(patient, due=timedelta(hours=5))).id)
        if len(found) == 4:
            await small.sql("DELETE FROM task WHERE id = :id", id=found[-1])

    found = await pages(small, "ListTasks", 2, "tasks", write, patient_id=patient)
    assert len(found) == len(set(found))
    assert [one for one in found if one not in late] == [row.id for row in rows]
    assert not set(found) & set(early)
    descending = [await small.consent(patient) for _ in range(5)]
    found = await pages(small, "ListConsents", 2, "consents", patient_id=patient)
    assert found == [one.id for one in reversed(descending)]


async def test_a_page_token_serves_its_own_query_alone(small: Small) -> None:
    patient, other = await small.patient(), await small.patient()
    for _ in range(3):
        await small.consent(patient)
        await small.consent(other)
        await small.task(patient)
    token = (await small.rpc("ListConsents", patient_id=patient, page_size=2)).next_page_token
    assert (await small.rpc("ListConsents", patient_id=patient, page_size=1, page_token=token)).consents
    tampered = ("A" if token[30] != "A" else "B").join((token[:30], token[31:]))
    for method, fields in [
        ("ListConsents", {"patient_id": other, "page_token": token}),
        ("ListConsents", {"patient_id": patient, "statuses": ["ACTIVE"], "page_token": token}),
        ("ListTasks", {"patient_id": patient, "page_token": token}),
        ("ListPools", {"page_token": token}),
        ("ListConsents", {"patient_id": patient, "page_token": tampered}),
        ("ListConsents", {"patient_id": patient, "page_token": token[:-4]}),
        ("ListConsents", {"patient_id": patient, "page_token": "é" * 8}),
        ("ListConsents", {"patient_id": patient, "page_token": small.server.runtime.page_signer.sign([])}),
        ("ListConsents", {"patient_id": patient, "page_token": small.server.runtime.page_signer.sign({"a": 1})}),
    ]:
        with pytest.raises(Invalid) as refused:
            await small.rpc(method, **fields)
        assert refused.value.reason == "PAGE_TOKEN_INVALID", (method, fields)


async def test_a_size_out_of_bounds_is_coerced(small: Small) -> None:
    patient = await small.patient()
    for _ in range(3):
        await small.task(patient)
    for size, expected in ((-7, 1), (0, 3), (2, 2), (10**6, 3)):
        page = await small.rpc("ListTasks", patient_id=patient, page_size=size)
        assert len(page.tasks) == expected, size


# -- the rest ----------------------------------------------------------------------------------------------------------


async def test_what_changes_outside_of_a_call_has_the_services_name(still: Small) -> None:
    task = await still.task(await still.patient())
    await still.sql("DELETE FROM outbox")
    async with still.server.database.acting("system:referrals") as db:
        row = await db.get_one(still.models.Task, {"tenant_id": still.harness.tenant_id, "id": task.id})
        row.move("claim")
    (told,) = await outbox(still)
    assert told.actor == "system:referrals"
    ((history,),) = await still.sql("SELECT history FROM task WHERE id = :id", id=task.id)
    assert history[-1]["actor"] == "system:referrals"


async def test_two_metadata_of_two_services_share_no_table(small: Small) -> None:
    other: SimpleNamespace = models()
    assert other.Base.metadata is not small.models.Base.metadata
    assert other.Pool.__table__ is not small.models.Pool.__table__
    assert TaskStatus.READY.name == "READY"


async def test_the_database_keeps_no_row_of_a_patient_whom_it_does_not_know(small: Small) -> None:
    async with small.server.database.engine.connect() as connection:
        with pytest.raises(Exception, match="task_subject_fkey"):
            await connection.execute(
                text(
                    "INSERT INTO task (tenant_id, id, version, history, patient_id, code, due_time, note, done, status)"
                    " VALUES (gen_random_uuid(), gen_random_uuid(), 1, '[]', gen_random_uuid(), '', now(), '', 0, 'READY')"
                )
            )

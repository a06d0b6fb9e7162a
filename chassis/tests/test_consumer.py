"""The consumer against a real database: one effect per event, retried or parked as the cause demands."""

import asyncio
import uuid
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest
from google.protobuf.type_pb2 import Field, Option
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import event as events
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.bus import AppendRefused, BusUnavailable, MayLeave, Message, Record
from chassis.bus.postgres import PostgresBus
from chassis.consumer import _MARK_ALL, Consumer, Retry, trim_inbox
from chassis.errors import Unavailable
from chassis.reactions import Reactions, need_own_transaction
from chassis.tests.telling import TRACEPARENT, Thing, event_of, message_of, metric
from system.postgres import Postgres

MakeDatabase = Callable[[str], Awaitable[str]]


class Watched(PostgresBus):
    """Fails for dead letters while told to."""

    parking_fails = False

    async def append(
        self, topic: str, messages: Sequence[Message], may_leave: MayLeave | None = None
    ) -> list[AppendRefused | None]:
        if self.parking_fails and topic.startswith("care.dlq."):
            raise BusUnavailable("away")
        return await super().append(topic, messages, may_leave)


@pytest.fixture(scope="module")
async def bus(database: MakeDatabase) -> AsyncIterator[Watched]:
    bus = Watched(await database("bus"), poll=0.05, lease=2)
    await bus.start()
    yield bus
    await bus.stop()


@pytest.fixture
async def thing(database: MakeDatabase) -> AsyncIterator[Thing]:
    thing = await Thing(await database("thing")).create()
    yield thing
    await thing.engine.dispose()


@pytest.fixture
def topic() -> str:
    return f"care.t-{uuid.uuid4().hex[:8]}"


class Running:
    """A consumer of the topic for the length of a test."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer

    async def __aenter__(self) -> Consumer:
        await self.consumer.start()
        return self.consumer

    async def __aexit__(self, *_: object) -> None:
        await self.consumer.stop()


async def until(condition: Callable[[], Awaitable[Any]], within: float = 15) -> None:
    async with asyncio.timeout(within):
        while not await condition():
            await asyncio.sleep(0.02)


async def effects(thing: Thing, number: int) -> None:
    async def there() -> bool:
        return await thing.count("effect") >= number

    await until(there)


async def letters(bus: PostgresBus, group: str) -> list[dict[str, str]]:
    """The headers of the group's dead letters."""
    async with bus.connection() as connection:
        rows = await connection.fetch(
            'SELECT headers, key, value FROM log WHERE topic = $1 ORDER BY partition, "offset"', f"care.dlq.{group}"
        )
    return [{name.removeprefix("care-dlq-"): value for name, value in orjson.loads(row["headers"])} for row in rows]


async def parked(bus: PostgresBus, group: str, number: int) -> list[dict[str, str]]:
    async def there() -> bool:
        return len(await letters(bus, group)) >= number

    await until(there)
    return await letters(bus, group)


async def committed(bus: PostgresBus, group: str) -> int:
    async with bus.connection() as connection:
        return int(
            await connection.fetchval(
                "SELECT coalesce(sum(next_offset), 0) FROM group_offset WHERE group_name = $1", group
            )
        )


async def test_an_event_delivered_twice_has_one_effect(thing: Thing, bus: Watched, topic: str) -> None:
    event = message_of(event_of("k", 1))
    await bus.append(topic, [event, event, message_of(event_of("k", 2)), event])
    async with Running(thing.consumer(bus, topic, [topic])) as consumer:
        await effects(thing, 2)

        async def settled() -> bool:
            return metric(consumer, "care_consumer_events_total", group=topic, outcome="already") == 2

        await until(settled)
    assert await thing.seen() == [("k", 1), ("k", 2)]
    assert await thing.count("inbox") == 2
    assert await committed(bus, topic) == 4


async def test_two_members_that_read_the_same_event_at_once_have_one_effect(
    thing: Thing, bus: Watched, topic: str
) -> None:
    async def slow(_: Any) -> None:
        await asyncio.sleep(0.2)

    thing.troubles["k"] = slow
    event = event_of("k", 1)
    record = Record(topic, 0, 0, "k", event.SerializeToString(), (), 0)
    members = [thing.consumer(bus, topic, [topic]) for _ in range(2)]
    await asyncio.gather(*(member._settle(record, (topic, 0)) for member in members))
    assert await thing.seen() == [("k", 1)]


async def test_events_of_types_without_a_reaction_are_passed_over_without_a_mark(
    thing: Thing, bus: Watched, topic: str
) -> None:
    await bus.append(topic, [message_of(event_of("k", 1, type="thing.other", payload_type="newer.Message"))])
    await bus.append(topic, [message_of(event_of("k", 2))])
    async with Running(thing.consumer(bus, topic, [topic])):
        await effects(thing, 1)
    assert (await thing.count("inbox"), await committed(bus, topic)) == (1, 2)
    assert await letters(bus, topic) == []


async def test_what_this_build_cannot_read_is_parked_with_its_reason_and_later_events_go_on(
    thing: Thing, bus: Watched, topic: str
) -> None:
    newer = Field(number=1, kind=Field.TYPE_BOOL).SerializeToString() + b"\x08\x63"  # kind = 99
    poison = [
        Message("k", b"\xff\xff not a message"),
        Message("k", b""),
        message_of(event_of("k", 1, id="no-uuid")),
        message_of(event_of("k", 1, type="thing.newer")),
        message_of(event_of("k", 1, payload_type="care.things.v9.Thing")),
        message_of(event_of("k", 1, payload=b"\xff\xff\xff")),
        message_of(event_of("k", 1, payload=newer)),
    ]
    await bus.append(topic, [*poison, message_of(event_of("k", 7))])
    async with Running(thing.consumer(bus, topic, [topic], known_types={"thing.other"})):
        found = await parked(bus, topic, len(poison))
        await effects(thing, 1)
    assert [letter["reason"] for letter in found] == [
        "ENVELOPE_UNREADABLE",
        "ENVELOPE_UNREADABLE",
        "ENVELOPE_UNREADABLE",
        "TYPE_UNKNOWN",
        "PAYLOAD_TYPE_UNKNOWN",
        "PAYLOAD_UNREADABLE",
        "ENUM_VALUE_UNKNOWN",
    ]
    assert [letter["offset"] for letter in found] == [str(n) for n in range(7)]
    assert await thing.seen() == [("k", 7)]
    # A build that knows more takes them on; the others wait for theirs.
    upgraded = Reactions()
    upgraded.on("thing.changed", "thing.newer", payload=Field, shares=True)(thing.write_effect)
    newer_build = thing.consumer(bus, topic, [topic], reactions=upgraded)
    assert await newer_build.replay() == (1, 0, 0, 6)
    assert {letter["times"] for letter in await letters(bus, topic)} == {"1", "2"}


async def test_a_reaction_that_fails_takes_back_the_whole_events_work_and_leaks_no_value(
    thing: Thing, bus: Watched, topic: str
) -> None:
    class SlotTaken(Exception):
        reason = "SLOT_TAKEN"

    @thing.reactions.on("thing.changed", payload=Field, shares=True)
    async def refuse(payload: Field, event: Any, db: AsyncSession) -> None:
        assert db.info["record"].topic == topic
        if payload.number == 1:
            raise SlotTaken("Jane Doe")
        if payload.number == 2:
            await db.execute(text("SELECT CAST('Jane Doe' AS int)"))

    await bus.append(topic, [message_of(event_of("k", n)) for n in (1, 2, 3)])
    async with Running(thing.consumer(bus, topic, [topic])) as consumer:
        found = await parked(bus, topic, 2)
        await effects(thing, 1)
        assert metric(consumer, "care_consumer_parked_total", group=topic, reason="SLOT_TAKEN") == 1
    assert [(letter["reason"], letter["error"], letter["sqlstate"]) for letter in found] == [
        ("SLOT_TAKEN", "SlotTaken", ""),
        ("REACTION_FAILED", "DBAPIError", "22P02"),
    ]
    assert "Jane" not in str(found)
    assert await thing.seen() == [("k", 3)]


async def test_while_one_partition_is_retried_the_others_go_on_and_nothing_is_parked(
    thing: Thing, bus: Watched, topic: str
) -> None:
    async def away(_: Any) -> None:
        raise Retry("AWAY")

    thing.troubles["stuck"] = away
    await bus.append(topic, [message_of(event_of("stuck", n)) for n in (1, 2)])
    await bus.append(topic, [message_of(event_of(f"k{n}", n)) for n in range(20)])
    async with Running(thing.consumer(bus, topic, [topic])) as consumer:
        await effects(thing, 15)  # some of the twenty may share its partition
        assert not [key for key, _ in await thing.seen() if key == "stuck"]
        assert metric(consumer, "care_consumer_retries_total", group=topic, error="Retry") >= 1
        del thing.troubles["stuck"]
        await effects(thing, 22)
    assert [number for key, number in await thing.seen() if key == "stuck"] == [1, 2]
    assert await letters(bus, topic) == []


async def test_while_one_event_takes_long_the_others_go_on(thing: Thing, bus: Watched, topic: str) -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow(_: Any) -> None:
        begun.set()
        await go_on.wait()

    thing.troubles["slow"] = slow
    await bus.append(topic, [message_of(event_of("slow", 1))])
    async with Running(thing.consumer(bus, topic, [topic])):
        await begun.wait()
        await bus.append(topic, [message_of(event_of(f"k{n}", n)) for n in range(20)])
        await effects(thing, 15)  # some of the twenty may share its partition
        assert not [key for key, _ in await thing.seen() if key == "slow"]
        go_on.set()
        await effects(thing, 21)


@pytest.mark.parametrize("state", ["08006", "40001", "40P01", "53300", "57P01", "55P03"])
async def test_sqlstates_that_say_busy_are_retried_in_place(thing: Thing, bus: Watched, topic: str, state: str) -> None:
    tries = 0

    @thing.reactions.on("thing.changed", payload=Field, shares=True)
    async def busy(payload: Field, event: Any, db: AsyncSession) -> None:
        nonlocal tries
        tries += 1
        if tries <= 2:
            await db.execute(text(f"DO $$ BEGIN RAISE SQLSTATE '{state}'; END $$"))

    record = Record(topic, 0, 0, "k", event_of("k", 1).SerializeToString(), (), 0)
    assert await thing.consumer(bus, topic, [topic])._settle(record, (topic, 0))
    assert (await thing.seen(), tries) == ([("k", 1)], 3)
    assert await letters(bus, topic) == []


async def test_a_statement_cancelled_five_times_is_parked(thing: Thing, bus: Watched, topic: str) -> None:
    tries = 0

    @thing.reactions.on("thing.changed", payload=Field, shares=True)
    async def endless(payload: Field, event: Any, db: AsyncSession) -> None:
        nonlocal tries
        tries += 1
        await db.execute(text("SET LOCAL statement_timeout = 10"))
        await db.execute(text("SELECT pg_sleep(60)"))

    record = Record(topic, 0, 0, "k", event_of("k", 1).SerializeToString(), (), 0)
    assert await thing.consumer(bus, topic, [topic])._settle(record, (topic, 0))
    assert tries == 5
    (letter,) = await letters(bus, topic)
    assert letter["sqlstate"] == "57014"


async def test_while_the_database_is_away_nothing_is_parked_and_all_have_their_effect_once(
    bus: Watched, topic: str, postgres_folder: Path
) -> None:
    server = Postgres(postgres_folder, durable=False)
    await server.start()
    supervision: asyncio.Task[None] | None = None
    thing = Thing(await server.create_database("thing", "thing"))
    try:
        await thing.create()
        async with Running(thing.consumer(bus, topic, [topic], retry_at_most=0.3)) as consumer:
            await bus.append(topic, [message_of(event_of(f"k{n}", n)) for n in range(10)])
            await effects(thing, 10)
            await server.kill()
            await bus.append(topic, [message_of(event_of(f"k{n}", n)) for n in range(10, 20)])

            async def retried() -> bool:
                return sum(s.value for m in consumer._metrics.retried.collect() for s in m.samples) >= 5

            await until(retried)
            supervision = asyncio.create_task(server.supervise())

            async def caught_up() -> bool:
                return metric(consumer, "care_consumer_events_total", group=topic, outcome="applied") == 20

            await until(caught_up)
        assert sorted(number for _, number in await thing.seen()) == list(range(20))
        assert await letters(bus, topic) == []
    finally:
        await thing.engine.dispose()
        await server.stop()
        if supervision is not None:
            await supervision


async def test_if_parking_fails_nothing_is_committed_until_it_succeeds(thing: Thing, bus: Watched, topic: str) -> None:
    bus.parking_fails = True
    await bus.append(topic, [Message("k", b"\xff poison"), message_of(event_of("k", 1))])
    try:
        async with Running(thing.consumer(bus, topic, [topic])) as consumer:

            async def retried() -> bool:
                return metric(consumer, "care_consumer_retries_total", group=topic, error="BusUnavailable") >= 2

            await until(retried)
        assert (await committed(bus, topic), await thing.seen()) == (0, [])
        bus.parking_fails = False
        async with Running(thing.consumer(bus, topic, [topic])):
            await effects(thing, 1)
            assert len(await parked(bus, topic, 1)) == 1
        assert await committed(bus, topic) == 2
    finally:
        bus.parking_fails = False


async def test_hooks_run_after_the_commit_and_where_something_can_be_mended(
    thing: Thing, bus: Watched, topic: str
) -> None:
    calls: list[str] = []

    async def lacks(event: Any) -> None:
        raise LookupError

    async def recover(error: Exception, event: Any) -> bool:
        calls.append(f"recover {type(error).__name__}")
        thing.troubles.pop("k", None)
        return isinstance(error, LookupError)

    thing.troubles["k"] = lacks
    consumer = thing.consumer(
        bus, topic, [topic], recover=recover, applied=lambda e, r: calls.append(f"applied {r.offset}")
    )
    record = Record(topic, 0, 5, "k", event_of("k", 1).SerializeToString(), (), 0)
    assert await consumer._settle(record, (topic, 0))
    assert calls == ["recover LookupError", "applied 5"]
    assert await thing.seen() == [("k", 1)]


async def test_an_event_whose_mending_needs_somebody_who_is_away_waits_and_is_not_parked(
    thing: Thing, bus: Watched, topic: str
) -> None:
    tries = 0

    async def lacks(event: Any) -> None:
        raise LookupError

    async def recover(error: Exception, event: Any) -> bool:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise Unavailable("ACCESS_UNCONFIRMED", "")
        thing.troubles.pop("k", None)
        return True

    thing.troubles["k"] = lacks
    consumer = thing.consumer(bus, topic, [topic], recover=recover)
    record = Record(topic, 0, 5, "k", event_of("k", 1).SerializeToString(), (), 0)
    async with asyncio.timeout(5):
        assert await consumer._settle(record, (topic, 0))
    assert (tries, await thing.seen()) == (3, [("k", 1)])
    assert metric(consumer, "care_consumer_events_total", group=topic, outcome="parked") == 0


async def test_the_span_is_a_child_of_the_request_links_to_it_and_tells_a_failure(
    thing: Thing, bus: Watched, topic: str
) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    consumer = thing.consumer(bus, topic, [topic], tracer=provider.get_tracer("test"))

    async def fails(_: Any) -> None:
        raise ValueError("Jane Doe")

    for number in (1, 2):
        record = Record(topic, 0, number, "k", event_of("k", number).SerializeToString(), (), 0)
        assert await consumer._settle(record, (topic, 0))
        thing.troubles["k"] = fails
    good, failed = exporter.get_finished_spans()
    assert (good.name, good.kind) == ("process thing.changed", SpanKind.CONSUMER)
    trace_id, span_id = (int(part, 16) for part in TRACEPARENT.split("-")[1:3])
    assert good.parent is not None
    assert (good.parent.trace_id, good.parent.span_id) == (trace_id, span_id)
    assert [link.context.span_id for link in good.links] == [span_id]
    assert failed.status.status_code is StatusCode.ERROR
    assert "Jane" not in failed.to_json()


@pytest.mark.parametrize("header", [b"x", b"9" * 5000])
async def test_a_record_with_headers_that_nobody_of_ours_wrote_blocks_nothing(
    thing: Thing, bus: Watched, topic: str, header: bytes
) -> None:
    consumer = thing.consumer(bus, topic, [topic])
    record = Record(topic, 0, 1, "k", b"\xff", (("care-dlq-times", header),), 0)
    settling = asyncio.create_task(consumer._settle(record, (topic, 0)))
    await asyncio.sleep(0.2)  # never comes back where it is tried again at once
    consumer._stopping.set()
    assert await settling is (header == b"x")
    assert metric(consumer, "care_consumer_events_total", group=topic, outcome="parked") == (header == b"x")


# -- events that share a transaction -----------------------------------------------------------------------------------


def together(consumer: Consumer, topic: str, *told: Any) -> list[Any]:
    """Events as they were read from partitions of their own."""
    records = [Record(topic, n, 7, one.aggregate_id, one.SerializeToString(), (), 0) for n, one in enumerate(told)]
    found = [consumer._fit((topic, record.partition), record) for record in records]
    for record in records:
        consumer._queues.setdefault((topic, record.partition), deque())
    assert None not in found
    return found


async def test_a_backlog_is_applied_in_few_transactions_and_in_order_per_key(
    thing: Thing, bus: Watched, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chassis.consumer._TOGETHER_FOR", 60.0)  # however slow this machine is now
    commits = 0

    @events.listens_for(thing.engine.sync_engine, "commit")
    def count(_: Any) -> None:
        nonlocal commits
        commits += 1

    keys = [f"k{n}" for n in range(200)]
    for number in (1, 2, 3):
        await bus.append(topic, [message_of(event_of(key, number)) for key in keys])
    async with Running(thing.consumer(bus, topic, [topic])) as consumer:

        async def settled() -> bool:
            return metric(consumer, "care_consumer_events_total", group=topic, outcome="applied") == 600

        await until(settled)
        shared = metric(consumer, "care_consumer_shared_transactions_total", group=topic, outcome="applied")
    assert commits < 600 / 8
    assert shared <= commits
    seen = await thing.seen()
    assert {key: [number for name, number in seen if name == key] for key in keys} == {key: [1, 2, 3] for key in keys}
    assert await committed(bus, topic) == 600
    assert await thing.count("inbox") == 600


async def test_of_events_that_wait_together_a_poisoned_one_is_parked_and_its_neighbours_have_one_effect(
    thing: Thing, bus: Watched, topic: str
) -> None:
    hooks: list[int] = []

    async def fails(_: Any) -> None:
        raise ValueError("Jane Doe")

    thing.troubles["k9"] = fails
    await bus.append(topic, [message_of(event_of(f"k{n}", n)) for n in range(20)])
    consumer = thing.consumer(bus, topic, [topic], applied=lambda event, _: hooks.append(event.version))
    async with Running(consumer):
        await effects(thing, 19)
        (letter,) = await parked(bus, topic, 1)

        async def settled() -> bool:
            return await committed(bus, topic) == 20

        await until(settled)
    assert letter["key"] == "k9"
    assert sorted(number for _, number in await thing.seen()) == [n for n in range(20) if n != 9] == sorted(hooks)
    # Its neighbours shared a transaction again.
    assert metric(consumer, "care_consumer_shared_transactions_total", group=topic, outcome="applied") >= 1
    assert metric(consumer, "care_consumer_shared_transactions_total", group=topic, outcome="given_up") >= 1
    assert metric(consumer, "care_consumer_events_total", group=topic, outcome="applied") == 19


async def test_a_connection_lost_in_the_middle_leaves_nothing_and_counts_nothing(
    thing: Thing, bus: Watched, topic: str
) -> None:
    hooks: list[int] = []
    losses = 0

    @thing.reactions.on("thing.changed", payload=Field, shares=True)
    async def lose(payload: Field, event: Any, db: AsyncSession) -> None:
        nonlocal losses
        if payload.number == 3 and not losses:
            losses = 1
            await db.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    consumer = thing.consumer(bus, topic, [topic], applied=lambda event, _: hooks.append(event.version))
    taken = together(consumer, topic, *(event_of(f"k{n}", n) for n in range(6)))
    await consumer._settle_together(taken)
    assert (losses, hooks, await thing.seen(), await thing.count("inbox")) == (1, [], [], 0)
    assert metric(consumer, "care_consumer_events_total", group=topic, outcome="applied") == 0
    assert not consumer._done
    consumer._spread()  # the one that met it by itself now, the others together again

    async def applied() -> bool:
        return len(hooks) == 6

    await until(applied)
    assert sorted(number for _, number in await thing.seen()) == sorted(hooks) == list(range(6))
    assert set(consumer._done.values()) == {8}


async def test_members_that_share_their_events_or_their_rows_have_one_effect_each_and_never_wait_in_a_circle(
    thing: Thing, bus: Watched, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient = text(_MARK_ALL.text.replace("'250'", "'10000'"))  # however slow this machine is now
    monkeypatch.setattr("chassis.consumer._MARK_ALL", patient)

    @thing.reactions.on("thing.changed", payload=Field, shares=True)
    async def lock(payload: Field, event: Any, db: AsyncSession) -> None:
        await db.execute(text("SELECT pg_advisory_xact_lock(hashtext(:key))"), {"key": event.aggregate_id})
        await asyncio.sleep(0.005)

    first, second = (thing.consumer(bus, topic, [topic]) for _ in range(2))
    twins = [event_of(f"k{n}", 1) for n in range(10)]
    others = [event_of(f"k{n}", 2) for n in range(10)]
    await asyncio.gather(
        first._settle_together(together(first, topic, *twins)),
        second._settle_together(together(second, topic, *reversed(twins))),
        second._settle_together(together(second, topic, *reversed(others))),
    )
    assert sorted(await thing.seen()) == sorted((f"k{n}", number) for n in range(10) for number in (1, 2))
    for consumer, shared in ((first, 1), (second, 2)):
        labels = {"group": topic, "outcome": "applied"}
        assert metric(consumer, "care_consumer_shared_transactions_total", **labels) == shared
    already = [metric(one, "care_consumer_events_total", group=topic, outcome="already") for one in (first, second)]
    assert sorted(already) == [0, 10]


async def test_events_of_one_patient_or_one_aggregate_share_no_transaction(
    thing: Thing, bus: Watched, topic: str
) -> None:
    consumer = thing.consumer(bus, topic, [topic])
    one, other = (str(uuid.uuid4()) for _ in range(2))
    event = event_of("a", 1, patient_id=one)
    waiting = [event, event, event_of("b", 1, patient_id=one), event_of("a", 2, patient_id=other), event_of("c", 1)]
    together(consumer, topic, *waiting)
    for n, each in enumerate(waiting):
        record = Record(topic, n, 7, each.aggregate_id, each.SerializeToString(), (), 0)
        consumer._queues[(topic, n)].append(record)
    taken = consumer._take(list(consumer._queues))
    assert [(each.event.aggregate_id, each.partition[1]) for each in taken] == [("a", 0), ("c", 4)]


async def test_a_reaction_that_must_be_alone_is(thing: Thing, bus: Watched, topic: str) -> None:
    shared: dict[str, bool] = {}
    reactions = Reactions()

    async def note(payload: Field, event: Any, db: AsyncSession) -> None:
        if event.aggregate_id == "k5":
            need_own_transaction(db)
        shared[event.aggregate_id] = bool(db.info.get("together"))
        await thing.write_effect(payload, event, db)

    reactions.on("thing.changed", payload=Field, shares=True)(note)
    reactions.on("thing.locked", payload=Field)(note)
    await bus.append(
        topic,
        [message_of(event_of(f"k{n}", n, type="thing.locked" if n % 3 == 0 else "thing.changed")) for n in range(40)],
    )
    async with Running(thing.consumer(bus, topic, [topic], reactions=reactions)):
        await effects(thing, 40)
    assert not any(shared[f"k{n}"] for n in (5, *range(0, 40, 3)))
    assert sorted(number for _, number in await thing.seen()) == list(range(40))


async def test_a_shared_transaction_waits_for_no_row_for_long(thing: Thing, bus: Watched, topic: str) -> None:
    @thing.reactions.on("thing.changed", payload=Field, shares=True)
    async def lock(payload: Field, event: Any, db: AsyncSession) -> None:
        await db.execute(text("SELECT pg_advisory_xact_lock(:number)"), {"number": payload.number})

    consumer = thing.consumer(bus, topic, [topic])
    async with thing.engine.connect() as connection:
        await connection.execute(text("SELECT pg_advisory_xact_lock(2)"))
        async with asyncio.timeout(2):
            await consumer._settle_together(together(consumer, topic, *(event_of(f"k{n}", n) for n in range(4))))
        assert await thing.seen() == []
    consumer._spread()
    await effects(thing, 4)


async def test_each_event_that_shared_a_transaction_has_its_own_span(thing: Thing, bus: Watched, topic: str) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    consumer = thing.consumer(bus, topic, [topic], tracer=provider.get_tracer("test"))
    traces = [f"{n + 1:032x}" for n in range(3)]
    told = [event_of(f"k{n}", n, traceparent=f"00-{trace}-b7ad6b7169203331-01") for n, trace in enumerate(traces)]
    await consumer._settle_together(together(consumer, topic, *told))
    spans = exporter.get_finished_spans()
    assert [f"{span.context.trace_id:032x}" for span in spans] == traces
    assert {(span.attributes or {})["care.outcome"] for span in spans} == {"applied"}
    exporter.clear()

    async def fails(_: Any) -> None:
        raise ValueError("Jane Doe")

    thing.troubles["k1"] = fails
    await consumer._settle_together(together(consumer, topic, *(event_of(f"k{n}", n) for n in range(3))))
    spans = exporter.get_finished_spans()
    assert [span.status.is_ok for span in spans] == [True, False]
    assert {(span.attributes or {})["care.outcome"] for span in spans} == {"given_up"}


# -- the rest ----------------------------------------------------------------------------------------------------------


async def test_old_marks_are_trimmed(thing: Thing, bus: Watched, topic: str) -> None:
    consumer = thing.consumer(bus, topic, [topic])
    for number in (1, 2):
        record = Record(topic, 0, number, "k", event_of("k", number).SerializeToString(), (), 0)
        await consumer._settle(record, (topic, 0))
    assert await trim_inbox(thing.engine, 3600) == 0
    assert await trim_inbox(thing.engine, 0) == 2


async def test_the_log_is_trimmed_and_a_group_that_was_behind_goes_on_with_what_is_left(
    thing: Thing, bus: Watched, topic: str
) -> None:
    await bus.append(topic, [message_of(event_of("k", n)) for n in range(3)])
    await asyncio.sleep(0.05)
    async with bus.connection() as connection:
        await connection.execute(
            "UPDATE log SET time = time - interval '1 day' WHERE topic = $1 AND \"offset\" < 2", topic
        )
    assert await bus.trim(3600) == 2
    async with Running(thing.consumer(bus, topic, [topic])):
        await effects(thing, 1)
    assert await thing.seen() == [("k", 2)]


def test_a_type_has_one_payload_and_many_reactions() -> None:
    reactions = Reactions()

    async def react(payload: Any, event: Any, db: AsyncSession) -> None: ...

    reactions.on("a.b", payload=Field, shares=True)(react)
    reactions.on("a.b", "a.c", payload=Field, shares=True)(react)
    assert (len(reactions.for_type("a.b")), reactions.types) == (2, {"a.b", "a.c"})
    with pytest.raises(ValueError, match=r"a\.b already has another payload"):
        reactions.on("a.b", payload=Option, shares=True)(react)

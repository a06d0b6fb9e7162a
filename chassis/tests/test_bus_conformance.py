"""What both implementations of the bus promise."""

import asyncio
import contextlib
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from chassis.bus import HELD_BACK, TOO_LARGE, Bus, Message, Reader, Record, partition_of
from chassis.bus.kafka import KafkaBus
from chassis.bus.postgres import PostgresBus
from chassis.tests.telling import Thing, event_of, message_of, metric

MakeDatabase = Callable[[str], Awaitable[str]]
ROOT = Path(__file__).parents[2]


@pytest.fixture(
    params=[pytest.param(one, marks=getattr(pytest.mark, one)) for one in ("postgres", "kafka")], scope="module"
)
def where(request: Any) -> tuple[str, Any]:
    """Which bus, and the fixture that tells where it is: only the one that is asked for gets started."""
    return request.param, request.getfixturevalue("database" if request.param == "postgres" else "kafka_server")


@pytest.fixture(scope="module")
async def bus(where: tuple[str, Any]) -> AsyncIterator[Bus]:
    kind, at = where
    bus: Bus = PostgresBus(await at("bus"), lease=1.5, poll=0.1) if kind == "postgres" else KafkaBus(at, session=6)
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


@contextlib.asynccontextmanager
async def reading(bus: Bus, group: str, topic: str) -> AsyncIterator[Reader]:
    reader = bus.reader(group, [topic])
    await reader.start()
    try:
        yield reader
    finally:
        await reader.stop()


async def take(reader: Reader, number: int, *, within: float = 20) -> list[Record]:
    """That many records, in the order of each partition."""
    taken: list[Record] = []
    async with asyncio.timeout(within):
        while len(taken) < number:
            for records in (await reader.fetch(100, 0.5)).values():
                taken.extend(records)
    return taken


async def until(condition: Callable[[], Awaitable[Any]], within: float = 20) -> None:
    async with asyncio.timeout(within):
        while not await condition():
            await asyncio.sleep(0.05)


async def test_records_of_a_key_keep_their_order_and_share_a_partition(bus: Bus, topic: str) -> None:
    keys = [str(uuid.uuid4()) for _ in range(20)]
    for start in range(0, 10, 5):
        batch = [Message(key, f"{n}".encode(), (("h", b"\x00\xff"),)) for n in range(start, start + 5) for key in keys]
        assert await bus.append(topic, batch) == [None] * 100
    async with reading(bus, "order", topic) as reader:
        taken = await take(reader, 200)
    for key in keys:
        of_key = [record for record in taken if record.key == key]
        assert [record.value for record in of_key] == [f"{n}".encode() for n in range(10)]
        assert {record.partition for record in of_key} == {partition_of(key, 12)}
        assert of_key[0].headers == (("h", b"\x00\xff"),)
    assert len({record.partition for record in taken}) > 4


async def test_appends_from_many_sides_skip_no_record_and_double_none(bus: Bus, topic: str) -> None:
    key = "one-partition"
    async with reading(bus, "many", topic) as reader:

        async def write(side: int) -> None:
            for number in range(20):
                await bus.append(topic, [Message(key, f"{side}:{number}".encode()), Message(f"{side}", b"x")])

        writing = asyncio.gather(*(write(side) for side in range(8)))
        taken = await take(reader, 320)
        await writing
    offsets: dict[int, list[int]] = {}
    for record in taken:
        offsets.setdefault(record.partition, []).append(record.offset)
    assert all(seen == sorted(set(seen)) for seen in offsets.values())
    assert len({r.value for r in taken if r.key == key}) == 160


async def test_a_message_too_large_is_refused_alone_with_what_follows_under_its_key(bus: Bus, topic: str) -> None:
    large = b"x" * 1_200_000
    verdicts = await bus.append(
        topic,
        [Message("a", b"1"), Message("b", b"1"), Message("b", large), Message("b", b"3"), Message("a", b"2")],
    )
    assert verdicts == [None, None, TOO_LARGE, HELD_BACK, None]
    async with reading(bus, "large", topic) as reader:
        taken = await take(reader, 3)
    assert sorted((record.key, record.value) for record in taken) == [("a", b"1"), ("a", b"2"), ("b", b"1")]


async def test_what_was_not_committed_comes_again_and_what_was_does_not(bus: Bus, topic: str) -> None:
    await bus.append(topic, [Message("k", f"{n}".encode()) for n in range(4)])
    async with reading(bus, "again", topic) as reader:
        taken = await take(reader, 4)
        await reader.commit({(topic, taken[0].partition): taken[1].offset + 1})
    async with reading(bus, "again", topic) as reader:
        assert [record.value for record in await take(reader, 2)] == [b"2", b"3"]
        assert await reader.fetch(10, 0.3) == {}


async def test_a_new_group_reads_from_the_start_whatever_others_have_read(bus: Bus, topic: str) -> None:
    await bus.append(topic, [Message("k", b"1"), Message("l", b"2")])
    for group in ("first", "second"):
        async with reading(bus, group, topic) as reader:
            taken = await take(reader, 2)
            await reader.commit({(record.topic, record.partition): record.offset + 1 for record in taken})


async def test_a_fetch_under_way_does_not_undo_a_seek(
    database: MakeDatabase, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = PostgresBus(await database("bus"))
    await bus.append(topic, [Message("k", b"1"), Message("k", b"2")])
    async with reading(bus, "sought", topic) as reader:
        (first, _) = await take(reader, 2)
        await bus.append(topic, [Message("k", b"3")])
        connection = bus.connection

        @contextlib.asynccontextmanager
        async def slow() -> AsyncIterator[Any]:
            async with connection() as one:
                yield one
            monkeypatch.undo()
            await reader.seek((topic, first.partition), first.offset)

        monkeypatch.setattr(bus, "connection", slow)
        assert [record.value for record in await take(reader, 3)] == [b"1", b"2", b"3"]
    await bus.stop()


async def test_a_paused_partition_yields_nothing_until_it_is_resumed(bus: Bus, topic: str) -> None:
    async with reading(bus, "paused", topic) as reader:
        await bus.append(topic, [Message("k", b"1")])
        (first,) = await take(reader, 1)
        place = (topic, first.partition)
        await reader.pause([place])
        await bus.append(topic, [Message("k", b"2"), Message("other", b"3")])
        assert [record.value for record in await take(reader, 1)] == [b"3"]
        assert await reader.fetch(10, 0.3) == {}
        await reader.resume([place])
        assert [record.value for record in await take(reader, 1)] == [b"2"]
        await reader.seek(place, first.offset)
        assert [record.value for record in await take(reader, 2)] == [b"1", b"2"]


async def test_the_lag_counts_what_is_not_committed(bus: Bus, topic: str) -> None:
    await bus.append(topic, [Message("k", f"{n}".encode()) for n in range(5)])
    async with reading(bus, "lag", topic) as reader:
        taken = await take(reader, 5)
        place = (topic, taken[0].partition)
        await asyncio.sleep(0.2)
        lag = (await reader.lag())[place]
        assert (lag.records, lag.end) == (5, 5)
        assert 0.2 <= lag.seconds < 30
        await reader.commit({place: 3})
        assert (await reader.lag())[place].records == 2
        await reader.commit({place: 5})
        assert (await reader.lag())[place] == (0, 0.0, 5)


async def test_two_members_share_the_partitions_and_one_that_leaves_gives_up_its_own(bus: Bus, topic: str) -> None:
    await bus.ensure_topics([topic])
    async with reading(bus, "two", topic) as first:
        await first.fetch(1, 0.1)
        assert len(first.assignment()) == 12
        async with reading(bus, "two", topic) as second:

            async def shared() -> bool:
                await asyncio.gather(first.fetch(1, 0.1), second.fetch(1, 0.1))
                return len(first.assignment()) == len(second.assignment()) == 6

            await until(shared)
            assert not first.assignment() & second.assignment()

        async def alone() -> bool:
            await first.fetch(1, 0.1)
            return len(first.assignment()) == 12

        await until(alone)


_MEMBER = """
import asyncio, sys
from chassis.bus.kafka import KafkaBus
from chassis.bus.postgres import PostgresBus
async def main(kind, where, group, topic):
    bus = PostgresBus(where, lease=1.5, poll=0.1) if kind == "postgres" else KafkaBus(where, session=6)
    await bus.start()
    reader = bus.reader(group, [topic])
    await reader.start()
    while not await reader.fetch(100, 1):
        pass
    print(len(reader.assignment()), flush=True)
    while True:
        await reader.fetch(100, 1)
asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_killed_members_partitions_are_taken_over_with_what_it_had_not_committed(bus: Bus, topic: str) -> None:
    await bus.append(topic, [Message(f"{n}", b"x") for n in range(40)])
    where = bus._url if isinstance(bus, PostgresBus) else bus.client["bootstrap_servers"]  # type: ignore[attr-defined]
    kind = "postgres" if isinstance(bus, PostgresBus) else "kafka"
    member = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _MEMBER, kind, where, "killed", topic,
        stdout=asyncio.subprocess.PIPE, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT}/gen"},
    )  # fmt: skip
    assert member.stdout is not None
    assert int(await asyncio.wait_for(member.stdout.readline(), 20)) == 12
    member.send_signal(signal.SIGKILL)
    await member.wait()
    async with reading(bus, "killed", topic) as reader:
        assert len({record.key for record in await take(reader, 40, within=25)}) == 40


# -- the consumer on each of them -------------------------------------------------------------------------------------


async def test_an_event_is_told_relayed_and_has_its_effect_once(bus: Bus, thing: Thing, topic: str) -> None:
    relay = thing.relay(bus)
    consumer = thing.consumer(bus, "once", [topic])
    await relay.start()
    await consumer.start()
    for number in range(30):
        async with thing.sessions() as db, db.begin():
            await thing.tell(db, topic, event_of(f"k{number % 3}", number))
        relay.wake()
    await until(lambda: _has(thing, 30))
    await relay.stop()
    await consumer.stop()
    seen = await thing.seen()
    for key in range(3):
        assert [n for k, n in seen if k == f"k{key}"] == list(range(key, 30, 3))
    assert (await thing.count("outbox"), await thing.count("inbox")) == (0, 30)


async def test_a_consumer_that_died_before_its_commit_repeats_no_effect(bus: Bus, thing: Thing, topic: str) -> None:
    await bus.append(topic, [message_of(event_of("k", n)) for n in range(5)])
    first = thing.consumer(bus, "died", [topic])
    first._commit = _no_commit  # type: ignore[method-assign]
    await first.start()
    await until(lambda: _has(thing, 5))
    await first.stop()
    second = thing.consumer(bus, "died", [topic])
    await bus.append(topic, [message_of(event_of("k", 5))])
    await second.start()
    await until(lambda: _has(thing, 6))
    await second.stop()
    assert [n for _, n in await thing.seen()] == list(range(6))
    assert metric(second, "care_consumer_events_total", group="died", outcome="already") == 5


async def test_a_parked_event_holds_up_none_of_its_key_and_is_replayed_after_later_ones(
    bus: Bus, thing: Thing, topic: str
) -> None:
    group = f"g-{topic}"

    async def fails(event: Event_) -> None:
        if event.version == 2:
            raise ValueError("a value that must not travel")

    thing.troubles["k"] = fails
    consumer = thing.consumer(bus, group, [topic])
    await bus.append(topic, [message_of(event_of("k", n)) for n in range(5)])
    await consumer.start()
    await until(lambda: _has(thing, 4))
    assert [n for _, n in await thing.seen()] == [0, 1, 3, 4]
    async with reading(bus, "operator", f"care.dlq.{group}") as reader:
        (letter,) = await take(reader, 1)
    assert letter.header("care-dlq-reason") == b"REACTION_FAILED"
    assert letter.header("care-dlq-error") == b"ValueError"
    assert letter.header("care-dlq-topic") == topic.encode()
    assert letter.header("care-dlq-offset") == b"2"
    assert letter.key == "k"
    assert b"must not travel" not in b"".join(value for _, value in letter.headers)

    # Still poisoned: parked anew, and this replay ends all the same.
    assert await consumer.replay() == (0, 0, 0, 1)
    del thing.troubles["k"]
    assert await consumer.replay() == (1, 0, 0, 0)
    assert await consumer.replay() == (0, 0, 0, 0)
    await consumer.stop()
    assert [n for _, n in await thing.seen()] == [0, 1, 3, 4, 2]


Event_ = Any


async def _has(thing: Thing, number: int) -> bool:
    return await thing.count("effect") >= number


async def _no_commit(_: Reader) -> None:
    return None


async def test_a_tail_reads_all_partitions_from_where_they_end_and_shares_with_nobody(bus: Bus, topic: str) -> None:
    keys = [str(uuid.uuid4()) for _ in range(20)]
    await bus.append(topic, [Message(key, b"before") for key in keys])
    tails = [bus.tail([topic]) for _ in range(2)]
    for tail in tails:
        await tail.start()
    await bus.append(topic, [Message(key, b"after") for key in keys])
    for tail in tails:
        taken = await take(tail, len(keys))
        assert {record.value for record in taken} == {b"after"}
        assert sorted(record.key for record in taken) == sorted(keys)
        await tail.stop()

"""Kills, refusals and races on a real Kafka."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from aiokafka import TopicPartition

from chassis.bus import HELD_BACK, TOO_LARGE, BusUnavailable, Message, Record
from chassis.bus.kafka import KafkaBus
from chassis.tests.telling import Thing, event_of
from system.kafka import Kafka
from system.process import free_port

MakeDatabase = Callable[[str], Awaitable[str]]


@pytest.fixture
async def thing(database: MakeDatabase) -> AsyncIterator[Thing]:
    thing = await Thing(await database("thing")).create()
    yield thing
    await thing.engine.dispose()


@pytest.fixture
def topic() -> str:
    return f"care.t-{uuid.uuid4().hex[:8]}"


async def effects(thing: Thing, number: int, within: float = 60) -> None:
    async with asyncio.timeout(within):
        while await thing.count("effect") < number:
            await asyncio.sleep(0.05)


async def test_a_broker_that_refuses_a_batch_costs_only_the_guilty_messages_key(kafka_server: str, topic: str) -> None:
    bus = KafkaBus(kafka_server, topic_configs={"max.message.bytes": "3000"})
    await bus.start()
    await bus.ensure_topics([topic], 1)  # all in one batch, so that the broker's refusal hits all
    verdicts = await bus.append(
        topic,
        [Message("a", b"1"), Message("b", b"x" * 5000), Message("b", b"2"), Message("c", b"3")],
    )
    assert verdicts == [None, TOO_LARGE, HELD_BACK, None]
    assert await bus.append(topic, [Message("a", b"4")]) == [None]  # the producer is well again
    reader = bus.reader("refused", [topic])
    await reader.start()
    values: list[bytes | None] = []
    async with asyncio.timeout(20):
        while len(values) < 3:
            for records in (await reader.fetch(10, 1)).values():
                values.extend(record.value for record in records)
    assert sorted(value for value in values if value) == [b"1", b"3", b"4"]
    await reader.stop()
    await bus.stop()


async def test_what_may_no_longer_leave_is_kept_back_at_the_last_moment(kafka_server: str, topic: str) -> None:
    bus = KafkaBus(kafka_server)
    await bus.start()
    may, refused = True, 0

    def may_leave() -> bool:
        nonlocal refused
        refused += not may
        return may

    assert await bus.append(topic, [Message("a", b"1")], may_leave) == [None]
    may = False
    with pytest.raises(BusUnavailable):
        await bus.append(topic, [Message("a", b"kept back")], may_leave)
    assert refused == 1, "it was tried again although it may not leave"
    may = True
    assert await bus.append(topic, [Message("a", b"2")], may_leave) == [None]
    reader = bus.reader("kept-back", [topic])
    await reader.start()
    values: list[bytes | None] = []
    async with asyncio.timeout(20):
        while len(values) < 2:
            for records in (await reader.fetch(10, 1)).values():
                values.extend(record.value for record in records)
    assert values == [b"1", b"2"]
    await reader.stop()
    await bus.stop()


async def test_a_broker_that_is_not_there_is_unavailable_and_keeps_nobody_from_starting() -> None:
    bus = KafkaBus(f"127.0.0.1:{free_port()}", delivery=3)
    await bus.start()
    reader = bus.reader("g", ["care.things"])
    await reader.start()
    for asked in (bus.append("care.things", [Message("k", b"1")]), reader.fetch(1, 0.1), bus.ensure_topics(["a"])):
        with pytest.raises(BusUnavailable):
            async with asyncio.timeout(10):
                await asked
    assert await reader.lag() == {}
    await reader.stop()
    await bus.stop()


@pytest.mark.parametrize("call", ["getmany", "commit", "end_offsets"])
async def test_a_consumer_that_fails_in_no_known_way_is_built_anew(kafka_server: str, topic: str, call: str) -> None:
    bus = KafkaBus(kafka_server)
    await bus.start()
    await bus.append(topic, [Message("a", b"1")])
    reader = bus.reader(f"broken-{topic}", [topic])
    await reader.start()

    async def first() -> Record:
        async with asyncio.timeout(20):
            while True:
                for records in (await reader.fetch(10, 1)).values():
                    return records[0]

    async def broken(*_: object, **__: object) -> None:
        raise RuntimeError

    record = await first()
    setattr(reader._consumer, call, broken)
    with pytest.raises(BusUnavailable):
        await reader.lag()
        await reader.commit({(topic, record.partition): record.offset + 1})
        await reader.fetch(10, 1)
    await bus.append(topic, [Message("a", b"2")])
    assert (await first()).value in (b"1", b"2")
    await reader.stop()
    await bus.stop()


async def test_what_fails_on_an_old_consumer_costs_the_new_one_nothing(topic: str) -> None:
    reader = KafkaBus("127.0.0.1:1").reader("old", [topic])
    old, new = (SimpleNamespace(assignment=lambda: {TopicPartition(topic, 0)}) for _ in range(2))

    async def broken(_: object) -> None:
        reader._consumer = new  # the reading task was faster
        raise RuntimeError

    old.end_offsets, reader._consumer = broken, old
    with pytest.raises(BusUnavailable):
        await reader.lag()
    assert reader._consumer is new


@pytest.mark.slow
async def test_a_killed_broker_loses_nothing_and_everyone_goes_on_by_himself(
    thing: Thing, topic: str, kafka_folder: Path
) -> None:
    server = Kafka(kafka_folder)
    await server.start()
    bus = KafkaBus(server.bootstrap, session=6, delivery=15)
    await bus.start()
    relay, consumer = thing.relay(bus), thing.consumer(bus, topic, [topic])
    supervision: asyncio.Task[None] | None = None
    told = 0

    async def tell(until_killed: asyncio.Event) -> None:
        nonlocal told
        while not until_killed.is_set():
            async with thing.sessions() as db, db.begin():
                await thing.tell(db, topic, event_of(f"k{told % 7}", told))
            told += 1
            relay.wake()
            await asyncio.sleep(0.005)

    try:
        await relay.start()
        await consumer.start()
        enough = asyncio.Event()
        telling = asyncio.create_task(tell(enough))
        await effects(thing, 100)
        await server.kill()
        await asyncio.sleep(2)  # told all the while: the outbox takes it
        supervision = asyncio.create_task(server.supervise())
        await asyncio.sleep(4)
        enough.set()
        await telling
        back = time.monotonic()
        await effects(thing, told)
        assert time.monotonic() - back < 20
        seen = await thing.seen()
        assert sorted(number for _, number in seen) == list(range(told))
        for key in range(7):
            numbers = [number for name, number in seen if name == f"k{key}"]
            assert numbers == sorted(numbers)
    finally:
        await consumer.stop()
        await relay.stop()
        await bus.stop()
        await server.stop()
        if supervision is not None:
            await supervision


@pytest.mark.slow
async def test_members_that_come_and_go_while_events_flow_change_no_effect(
    thing: Thing, topic: str, kafka_server: str
) -> None:
    bus = KafkaBus(kafka_server, session=6)
    await bus.start()
    await bus.ensure_topics([topic])
    relay, steady = thing.relay(bus), thing.consumer(bus, topic, [topic])
    await relay.start()
    await steady.start()

    async def tell() -> None:
        for number in range(800):
            async with thing.sessions() as db, db.begin():
                await thing.tell(db, topic, event_of(f"k{number % 20}", number))
            relay.wake()
            await asyncio.sleep(0.005)

    telling = asyncio.create_task(tell())
    while not telling.done():
        guest = thing.consumer(bus, topic, [topic])
        await guest.start()
        await asyncio.sleep(1)
        await guest.stop()
    await telling
    await effects(thing, 800)
    await steady.stop()
    await relay.stop()
    await bus.stop()
    seen = await thing.seen()
    assert sorted(number for _, number in seen) == list(range(800))
    for key in range(20):
        assert [number for name, number in seen if name == f"k{key}"] == list(range(key, 800, 20))

"""The relay against a real database and bus: nothing lost, one sender, a refused key aside."""

import asyncio
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import text

from chassis.bus import AppendRefused, BusUnavailable, MayLeave, Message
from chassis.bus.postgres import PostgresBus
from chassis.relay import Relay, _LeaseLost
from chassis.tests.telling import TRACEPARENT, Thing, event_of, metric

MakeDatabase = Callable[[str], Awaitable[str]]
ROOT = Path(__file__).parents[2]
TOPIC = "care.things"


class Watched(PostgresBus):
    """Counts what it was asked to append, and fails while told to."""

    away = False
    appended = 0

    async def append(
        self, topic: str, messages: Sequence[Message], may_leave: MayLeave | None = None
    ) -> list[AppendRefused | None]:
        if self.away:
            raise BusUnavailable("away")
        self.appended += len(messages)
        return await super().append(topic, messages, may_leave)


@pytest.fixture(scope="module")
async def bus_url(database: MakeDatabase) -> str:
    return await database("bus")


@pytest.fixture
async def bus(bus_url: str) -> AsyncIterator[Watched]:
    bus = Watched(bus_url, poll=0.05)
    await bus.start()
    async with bus.connection() as connection:
        await connection.execute("TRUNCATE log")
    yield bus
    await bus.stop()


@pytest.fixture
async def thing(database: MakeDatabase) -> AsyncIterator[Thing]:
    thing = await Thing(await database("thing")).create()
    yield thing
    await thing.engine.dispose()


async def tell(thing: Thing, key: str, *numbers: int, **more: Any) -> None:
    async with thing.sessions() as db, db.begin():
        for number in numbers:
            await thing.tell(db, TOPIC, event_of(key, number, **more))


async def on_the_bus(bus: PostgresBus) -> list[tuple[str, int]]:
    async with bus.connection() as connection:
        rows = await connection.fetch('SELECT key, value FROM log ORDER BY partition, "offset"')
    return [(row["key"], event_of("", 0).FromString(row["value"]).version) for row in rows]


async def until(condition: Callable[[], Awaitable[bool]], within: float = 15) -> None:
    async with asyncio.timeout(within):
        while not await condition():
            await asyncio.sleep(0.02)


async def drained(thing: Thing) -> None:
    async def empty() -> bool:
        return await thing.count("outbox") == 0

    await until(empty)


async def test_with_32_writers_at_once_nothing_is_lost_and_each_keys_order_stands(thing: Thing, bus: Watched) -> None:
    relay = thing.relay(bus, batch=50)
    await relay.start()

    async def write(writer: int) -> None:
        for number in range(0, 30, 2):
            async with thing.sessions() as db, db.begin():
                await thing.tell(db, TOPIC, event_of(f"w{writer}", number))
                await asyncio.sleep(0.001 * (writer % 5))  # commits in another order than ids were drawn
                await thing.tell(db, TOPIC, event_of(f"w{writer}", number + 1))
            relay.wake()

    await asyncio.gather(*(write(writer) for writer in range(32)))
    await drained(thing)
    await relay.stop()
    sent = await on_the_bus(bus)
    assert len(sent) == 32 * 30
    for writer in range(32):
        assert [number for key, number in sent if key == f"w{writer}"] == list(range(30))
    assert metric(relay, "care_outbox_published_total", topic=TOPIC) == 32 * 30


async def test_a_row_with_a_lower_id_that_commits_later_is_not_skipped(thing: Thing, bus: Watched) -> None:
    relay = thing.relay(bus)
    async with thing.sessions() as slow:
        await slow.begin()
        await thing.tell(slow, TOPIC, event_of("slow", 1))
        await tell(thing, "quick", 2)
        assert await relay.send_batch() == 1
        await tell(thing, "quick", 3)
        assert await relay.send_batch() == 1
        await slow.commit()
    assert await relay.send_batch() == 1
    assert sorted(await on_the_bus(bus)) == [("quick", 2), ("quick", 3), ("slow", 1)]


async def test_of_two_relays_only_the_holder_of_the_lease_sends_and_the_other_takes_over(
    thing: Thing, bus_url: str, bus: Watched
) -> None:
    other_bus = Watched(bus_url)
    first, second = thing.relay(bus, ttl=1.5), thing.relay(other_bus, ttl=1.5)
    await first.start()
    await tell(thing, "k", 1)
    await drained(thing)
    await second.start()
    for number in range(2, 12):
        await tell(thing, "k", number)
        second.wake()
        await asyncio.sleep(0.02)
    await drained(thing)
    assert (bus.appended, other_bus.appended) == (11, 0)
    await first.stop()
    await tell(thing, "k", 12)
    await drained(thing)
    assert other_bus.appended == 1
    assert second._lease.epoch == 2
    await second.stop()
    await other_bus.stop()
    assert [number for _, number in await on_the_bus(bus)] == list(range(1, 13))


async def test_a_relay_whose_lease_another_took_sends_nothing(thing: Thing, bus: Watched) -> None:
    relay = thing.relay(bus, ttl=3)
    await tell(thing, "k", 1)
    assert await relay.send_batch() == 1
    async with thing.engine.begin() as connection:
        await connection.execute(text("UPDATE lease SET owner = gen_random_uuid(), epoch = epoch + 1"))
    await tell(thing, "k", 2)
    relay._lease._confirmed_at -= 1.1  # older than a third: it has to ask before it sends
    with pytest.raises(_LeaseLost):
        await relay.send_batch()
    assert (bus.appended, await thing.count("outbox")) == (1, 1)


_STALE = """
import asyncio, sys
from chassis.bus.postgres import PostgresBus
from chassis.tests.telling import Thing
class Signed(PostgresBus):
    async def append(self, topic, messages, may_leave):
        return await super().append(topic, [m._replace(headers=(("by", b"stale"),)) for m in messages], may_leave)
async def main(url, bus_url):
    thing = Thing(url)
    relay = thing.relay(Signed(bus_url), ttl=1.0, sweep=0.05)
    await relay.start()
    while True:
        await asyncio.sleep(0.01)
        if relay._lease.epoch == 1:
            print("leads", flush=True)
            break
    await asyncio.sleep(3600)
asyncio.run(main(*sys.argv[1:]))
"""


async def test_a_process_stopped_past_its_lease_sends_nothing_when_it_goes_on(
    thing: Thing, bus_url: str, bus: Watched
) -> None:
    stale = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _STALE, thing.url, bus_url,
        stdout=asyncio.subprocess.PIPE, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT}/gen"},
    )  # fmt: skip
    assert stale.stdout is not None
    try:
        assert await asyncio.wait_for(stale.stdout.readline(), 20) == b"leads\n"
        await tell(thing, "k", 1)
        await drained(thing)
        stale.send_signal(signal.SIGSTOP)
        relay = thing.relay(bus, ttl=1.0)
        await relay.start()
        await tell(thing, "k", 2)
        await drained(thing)  # taken over
        bus.away = True
        await tell(thing, "k", 3, 4)
        stale.send_signal(signal.SIGCONT)
        await asyncio.sleep(1.0)
        assert await thing.count("outbox") == 2
        bus.away = False
        await drained(thing)
        await relay.stop()
    finally:
        stale.kill()
        await stale.wait()
    async with bus.connection() as connection:
        rows = await connection.fetch('SELECT headers FROM log ORDER BY "offset"')
    assert [b"stale" in row["headers"] for row in rows] == [True, False, False, False]


async def test_a_refused_key_is_set_aside_in_order_and_everything_else_goes_on(thing: Thing, bus: Watched) -> None:
    relay = thing.relay(bus)
    await tell(thing, "bad", 1)
    await tell(thing, "bad", 2, security_labels=["x" * 1_000_000])
    await tell(thing, "bad", 3)
    await tell(thing, "good", 1, 2)
    await relay.start()

    async def settled() -> bool:
        return await thing.count("outbox") == 2

    await until(settled)
    await tell(thing, "bad", 4)
    await tell(thing, "good", 3)
    relay.wake()

    async def sent() -> bool:
        return ("good", 3) in await on_the_bus(bus)

    await until(sent)
    assert sorted(await on_the_bus(bus)) == [("bad", 1), ("good", 1), ("good", 2), ("good", 3)]
    async with thing.engine.connect() as connection:
        (aside,) = (await connection.execute(text("SELECT topic, key, reason FROM outbox_aside"))).all()
    assert tuple(aside) == (TOPIC, "bad", "MESSAGE_TOO_LARGE")
    assert metric(relay, "care_outbox_refused_total", topic=TOPIC, reason="MESSAGE_TOO_LARGE") == 1

    bus._limit = 2_000_000  # what the operator mended
    assert await relay.release_key(TOPIC, "bad")
    await drained(thing)
    await relay.stop()
    assert [number for key, number in await on_the_bus(bus) if key == "bad"] == [1, 2, 3, 4]


async def test_while_the_bus_is_away_events_wait_and_then_go(thing: Thing, bus: Watched) -> None:
    relay = thing.relay(bus)
    bus.away = True
    await relay.start()
    await tell(thing, "k", *range(20))
    relay.wake()
    await asyncio.sleep(0.3)
    assert await thing.count("outbox") == 20
    assert metric(relay, "care_outbox_failures_total", error="BusUnavailable") >= 2
    bus.away = False
    await drained(thing)
    await relay.stop()
    assert [number for _, number in await on_the_bus(bus)] == list(range(20))


async def test_the_age_of_the_oldest_event_is_shown_and_a_key_set_aside_does_not_count(
    thing: Thing, bus: Watched
) -> None:
    bus.away = True
    relay = thing.relay(bus)
    await tell(thing, "aside", 1)
    async with thing.engine.begin() as connection:
        await connection.execute(text("UPDATE outbox SET create_time = now() - interval '1 day'"))
        await connection.execute(
            text("INSERT INTO outbox_aside (topic, key, reason, outbox_id) VALUES (:topic, 'aside', 'X', 1)"),
            {"topic": TOPIC},
        )
    await tell(thing, "k", 2)
    await asyncio.sleep(0.1)
    await relay.start()

    async def shown() -> bool:
        return metric(relay, "care_outbox_rows") == 2

    await until(shown)
    await relay.stop()
    assert 0.1 <= metric(relay, "care_outbox_oldest_age_seconds") < 30
    assert metric(relay, "care_outbox_aside_keys") == 1


def traced() -> tuple[Any, InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider.get_tracer("test"), exporter


async def test_the_senders_span_links_to_the_request_and_its_context_travels(thing: Thing, bus: Watched) -> None:
    tracer, exporter = traced()
    relay: Relay = thing.relay(bus, tracer=tracer)
    await tell(thing, "k", 1, 2)
    await relay.send_batch()
    bus.away = True
    await tell(thing, "k", 3)
    with pytest.raises(BusUnavailable):
        await relay.send_batch()
    good, failed = exporter.get_finished_spans()
    assert (good.name, good.kind) == (f"send {TOPIC}", SpanKind.PRODUCER)
    assert [f"{link.context.trace_id:032x}" for link in good.links] == [TRACEPARENT.split("-")[1]]
    assert "k" not in map(str, (good.attributes or {}).values())
    assert failed.status.status_code is StatusCode.ERROR
    reader = bus.reader(f"g{uuid.uuid4()}", [TOPIC])
    found: dict[Any, Any] = {}
    await reader.start()
    while not found:
        found = await reader.fetch(1, 1)
    await reader.stop()
    assert next(iter(found.values()))[0].headers == (("traceparent", TRACEPARENT.encode()),)

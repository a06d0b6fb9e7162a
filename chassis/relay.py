"""The relay: sends what the outbox holds to the bus, in order per key, and deletes what was acknowledged."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from opentelemetry.trace import Link, SpanKind, Status, StatusCode, Tracer
from prometheus_client import CollectorRegistry, Counter, Gauge
from sqlalchemy import ARRAY, BigInteger, Row, bindparam, text
from sqlalchemy.ext.asyncio import AsyncEngine

from chassis.bus import HELD_BACK, AppendRefused, Bus, Message
from chassis.lease import Lease
from chassis.telemetry import links_to

# Always from the start, never behind a cursor: ids are drawn before the commit, so a lower one may appear later.
_NEXT = text("""
SELECT id, topic, key, value, traceparent FROM outbox o
 WHERE NOT EXISTS (SELECT FROM outbox_aside a WHERE a.topic = o.topic AND a.key = o.key)
 ORDER BY id LIMIT :batch
""")
_SENT = text("DELETE FROM outbox WHERE id = ANY(:ids)").bindparams(bindparam("ids", type_=ARRAY(BigInteger)))
_ASIDE = text(
    "INSERT INTO outbox_aside (topic, key, reason, outbox_id) VALUES (:topic, :key, :reason, :outbox_id)"
    " ON CONFLICT DO NOTHING"
)
# Counting stops at 100,000: beyond that the figure's only use is "very many".
_DEPTH = text("""
SELECT (SELECT count(*) FROM (SELECT FROM outbox LIMIT 100000) AS counted) AS rows,
       (SELECT count(*) FROM outbox_aside) AS aside,
       coalesce((SELECT extract(epoch FROM clock_timestamp() - o.create_time)::float8 FROM outbox o
                  WHERE NOT EXISTS (SELECT FROM outbox_aside a WHERE a.topic = o.topic AND a.key = o.key)
                  ORDER BY o.id LIMIT 1), 0) AS oldest
""")
_OBSERVE_EVERY = 5.0
_PACE = 0.015
"""Seconds between the beginnings of two batches where one follows the other."""
_LINKS_AT_MOST = 100


class _LeaseLost(Exception):
    """Another process may send now; whatever was going on here is broken off."""


class Relay:
    """Sends one database's outbox; of all relays on it, only the holder of the lease `name` does.

    `wake()` right after a commit: what comes alone is sent at once, what follows at most 15 ms later. The sweep (50 ms,
    doubling to `sweep` seconds while there is nothing) finds what was committed elsewhere. Delivery is at least once and in
    order per key. A message that the bus refuses for good sets its key aside with the reason; nothing else waits for it.
    """

    def __init__(
        self,
        bus: Bus,
        engine: AsyncEngine,
        *,
        tracer: Tracer,
        registry: CollectorRegistry,
        log: Any,
        name: str = "relay",
        ttl: float = 10.0,
        batch: int = 500,
        sweep: float = 1.0,
    ) -> None:
        self._bus = bus
        # Statements stand alone: no transaction is ever open while sending.
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._lease = Lease(engine, name, ttl=ttl)
        self._batch = batch
        self._sweep = sweep
        self._tracer = tracer
        self._log = log
        self._woken = asyncio.Event()
        self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._oldest = Gauge(
            "care_outbox_oldest_age_seconds", "Age of the oldest event that waits to be sent.", registry=registry
        )
        self._rows = Gauge("care_outbox_rows", "Events in the outbox, those set aside included.", registry=registry)
        self._aside = Gauge("care_outbox_aside_keys", "Keys set aside that wait for a person.", registry=registry)
        self._published = Counter(
            "care_outbox_published", "Events the bus acknowledged.", ("topic",), registry=registry
        )
        self._refused = Counter(
            "care_outbox_refused", "Events the bus refused for good.", ("topic", "reason"), registry=registry
        )
        self._failures = Counter("care_outbox_failures", "Batches to be sent again.", ("error",), registry=registry)
        self._leads = Gauge("care_outbox_leads", "1 where this relay holds the lease.", registry=registry)

    def wake(self) -> None:
        """Something was committed. Cheap; call it after every commit that told an event."""
        self._woken.set()

    async def start(self) -> None:
        self._stopping = False
        self._tasks = [
            asyncio.create_task(self._run(), name="relay"),
            asyncio.create_task(self._observe(), name="relay depth"),
        ]

    async def stop(self, timeout: float = 10.0) -> None:
        """Finish the batch in hand, give the lease up."""
        self._stopping = True
        self._woken.set()
        running, observing = self._tasks or (None, None)
        if observing is not None and running is not None:
            observing.cancel()
            await asyncio.wait({running}, timeout=timeout)
            running.cancel()
            await asyncio.gather(running, observing, return_exceptions=True)
        self._tasks = []
        with contextlib.suppress(Exception):  # the database is away: the lease runs out by itself
            await asyncio.wait_for(self._lease.release(), 2)

    async def _run(self) -> None:
        pause, trouble = 0.05, ""
        while not self._stopping:
            self._woken.clear()
            began = time.monotonic()
            try:
                if not await self._lease.hold():
                    self._leads.set(0)
                    await self._rest(self._lease.retry_after, wakes=False)
                    continue
                self._leads.set(1)
                sent = await self.send_batch()
            except _LeaseLost:
                continue
            except Exception as error:  # bus or database away, or anything else: nothing was deleted, so try again
                kind = type(error).__name__
                self._failures.labels(kind).inc()
                if kind != trouble:  # once, not at every try
                    trouble = kind
                    self._log.warning("outbox not sent, trying again", error=kind)
                await self._rest(pause, wakes=False)
                pause = min(pause * 2, self._sweep)
                continue
            if trouble:
                trouble = ""
                self._log.info("outbox is sent again")
            if sent:
                pause = 0.05
                # Under load a batch takes what was committed meanwhile: three statements and a send each are worth a wait.
                if sent < self._batch:
                    await self._rest(_PACE - (time.monotonic() - began), wakes=False)
                continue
            await self._rest(pause)
            pause = 0.05 if self._woken.is_set() else min(pause * 2, self._sweep)

    async def _rest(self, seconds: float, *, wakes: bool = True) -> None:
        if wakes:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), seconds)
            return
        until = time.monotonic() + seconds  # not woken by commits, but by stop()
        while not self._stopping and (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, 0.1))

    async def send_batch(self) -> int:
        """Send up to one batch, return how many rows left the queue. Raises BusUnavailable and the driver's errors."""
        async with self._engine.connect() as connection:
            rows = (await connection.execute(_NEXT, {"batch": self._batch})).all()
        done = 0
        # Stable: order by id stands within a topic.
        for topic, group in groupby(sorted(rows, key=_topic), key=_topic):
            done += await self._send(topic, list(group))
        return done

    async def _send(self, topic: str, rows: Sequence[Row[Any]]) -> int:
        links: list[Link] = []
        for traceparent in dict.fromkeys(row.traceparent for row in rows if row.traceparent):
            links.extend(links_to(traceparent))
            if len(links) >= _LINKS_AT_MOST:
                break
        with self._tracer.start_as_current_span(
            f"send {topic}",
            kind=SpanKind.PRODUCER,
            links=links,
            attributes={
                "messaging.operation.name": "send",
                "messaging.operation.type": "send",
                "messaging.destination.name": topic,
                "messaging.batch.message_count": len(rows),
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                verdicts = await self._append(
                    topic,
                    [
                        # The context of the request that told the event, not the relay's own: consumers go on from there.
                        Message(
                            row.key,
                            row.value,
                            (("traceparent", row.traceparent.encode()),) if row.traceparent else (),
                        )
                        for row in rows
                    ],
                )
            except BaseException as error:
                span.set_attribute("error.type", type(error).__name__)
                span.set_status(Status(StatusCode.ERROR))
                raise
            acknowledged = [row.id for row, verdict in zip(rows, verdicts, strict=True) if verdict is None]
            refused = [
                (row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if verdict not in (None, HELD_BACK)
            ]
            if refused:
                span.set_attribute("error.type", refused[0][1].reason if refused[0][1] else "")
                span.set_status(Status(StatusCode.ERROR))
        async with self._engine.connect() as connection:
            # Aside first: were it lost after the delete, the rows behind would overtake the refused one.
            for row, verdict in refused:
                reason = verdict.reason if verdict else ""
                await connection.execute(
                    _ASIDE, {"topic": topic, "key": row.key, "reason": reason, "outbox_id": row.id}
                )
                self._refused.labels(topic, reason).inc()
                self._log.error("event refused, its key is set aside", topic=topic, outbox_id=row.id, reason=reason)
            if acknowledged:
                await connection.execute(_SENT, {"ids": acknowledged})
        self._published.labels(topic).inc(len(acknowledged))
        return len(acknowledged) + len(refused)

    async def _append(self, topic: str, messages: list[Message]) -> list[AppendRefused | None]:
        """Append under the lease, which is renewed while the bus takes its time and broken off when lost."""
        if not await self._lease.hold():
            raise _LeaseLost
        sending = asyncio.ensure_future(self._append_if_fresh(topic, messages))
        try:
            while not (await asyncio.wait({sending}, timeout=self._lease.retry_after))[0]:
                if not await self._lease.hold():
                    raise _LeaseLost
            return sending.result()
        finally:
            if not sending.done():
                sending.cancel()
                await asyncio.gather(sending, return_exceptions=True)

    async def _append_if_fresh(self, topic: str, messages: list[Message]) -> list[AppendRefused | None]:
        # The process may have been stopped since it asked: nothing is awaited between this look and the append.
        if not self._lease.fresh:
            raise _LeaseLost
        # While the bus takes its time, the lease is renewed; a process that was stopped meanwhile finds that it ended.
        return await self._bus.append(topic, messages, lambda: self._lease.stands)

    async def _observe(self) -> None:
        trouble = ""
        while True:
            try:
                async with self._engine.connect() as connection:
                    depth = (await connection.execute(_DEPTH)).one()
                self._rows.set(depth.rows)
                self._aside.set(depth.aside)
                self._oldest.set(max(depth.oldest, 0.0))
                trouble = ""
            except Exception as error:  # a database that is away says nothing about the outbox
                if type(error).__name__ != trouble:
                    trouble = type(error).__name__
                    self._log.warning("outbox not measured", error=trouble)
            await asyncio.sleep(_OBSERVE_EVERY)

    async def release_key(self, topic: str, key: str) -> bool:
        """Let a key that was set aside go on, once what made it refused is mended; False if it was not aside."""
        async with self._engine.connect() as connection:
            gone = await connection.execute(
                text("DELETE FROM outbox_aside WHERE topic = :topic AND key = :key"), {"topic": topic, "key": key}
            )
        self.wake()
        return bool(gone.rowcount)


def _topic(row: Row[Any]) -> str:
    return str(row.topic)

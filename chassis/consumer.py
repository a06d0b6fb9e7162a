"""The consumer: an event's effect and inbox mark in one transaction, which those that wait share; the offset follows."""

import asyncio
import contextlib
import random
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from care.events.v1.envelope_pb2 import Event
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Payload
from grpc import StatusCode
from opentelemetry.trace import Span, SpanKind, Status, Tracer, use_span
from opentelemetry.trace import StatusCode as SpanStatus
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from chassis.bus import Bus, BusUnavailable, Message, Partition, Reader, Record
from chassis.logs import REASON, status_code_of
from chassis.model import Act
from chassis.reactions import Reactions, Registered, knows_all_values
from chassis.telemetry import context_from, links_to

# Whole classes, or one state.
_AWAY = ("08", "40", "53", "57P", "55P03")
_AWAY_CODES = (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED)
_CANCELLED, _CANCELLED_AT_MOST = "57014", 5
# Text, because SQLAlchemy compiles ON CONFLICT anew each time: half a millisecond of CPU an event.
_MARK = text(
    "INSERT INTO inbox (group_name, event_id, type) VALUES (:group_name, CAST(:event_id AS uuid), :type)"
    " ON CONFLICT DO NOTHING RETURNING time"
)
# As above, for several. Ordered, so that two members with the same events don't wait for each other. Whoever waits long
# while holding other events' rows gives them back: what waited then goes by itself, with more patience.
_MARK_ALL = text(
    "WITH patience AS (SELECT set_config('lock_timeout', '250', true))"
    " INSERT INTO inbox (group_name, event_id, type) SELECT :group_name, e.id, e.type"
    " FROM patience, unnest(CAST(:event_ids AS uuid[]), CAST(:types AS text[])) AS e (id, type) ORDER BY e.id"
    " ON CONFLICT DO NOTHING RETURNING event_id, time"
)
_TOGETHER_AT_MOST = 50
_SHARING_AT_ONCE = 2  # with one an event waits for those before it; more of them hold rows for longer, for nothing
_TOGETHER_FOR = 0.1  # seconds that it may take, and rows be locked: by this the next one's size is chosen
_COMMIT_EVERY = 0.5  # what is read again after a crash: the inbox knows it
_LOOK_EVERY = 0.1  # whether a worker of a partition that is full or being retried has come further
_LAG_EVERY = 5.0
_QUEUED_AT_MOST = 500  # per partition; above it the partition is paused
_HEADERS = "care-dlq-"
_FRESHNESS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)


class Retry(Exception):
    """Raised by a hook or a reaction where something is away for now: the event is tried again, never parked."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Unreadable(Exception):
    """The record can't be applied by this build; it is parked and waits for its replay."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class NoConnection(Exception):
    """No connection to the database could be had, for whatever reason: that can't be the event's fault."""


class ReplayCounts(NamedTuple):
    """What a replay did with the dead letters that were there when it began."""

    applied: int = 0
    already: int = 0
    passed: int = 0
    parked_again: int = 0


def sqlstate_of(error: BaseException) -> str | None:
    """The SQLSTATE that an exception of SQLAlchemy's or the driver's carries."""
    state = getattr(getattr(error, "orig", error), "sqlstate", None)
    return state if isinstance(state, str) else None


def is_away(error: BaseException) -> bool:
    """Whether it says that something is away or busy, rather than that the event can't be applied."""
    if isinstance(error, Retry | NoConnection | BusUnavailable | ConnectionError | TimeoutError | PoolTimeoutError):
        return True
    if isinstance(error, DBAPIError) and error.connection_invalidated:
        return True
    return status_code_of(error) in _AWAY_CODES or (sqlstate_of(error) or "").startswith(_AWAY)


class Consumer:
    """Reads `topics` as a member of `group` and applies each event once.

    Each partition goes in order. Events that wait share a transaction, whichever partitions they are of; where one of them
    fails all are rolled back, and that one goes by itself (all of them, where it isn't known which). What goes by itself goes
    side by side with other partitions (at most `parallel` transactions). What says that something is away is retried in
    place with its partition paused; everything else is parked in the dead-letter topic with its reason, and later events go
    on. Nothing is committed before its effect or its parking is.

    Shared transactions lock rows for several events, and still nobody waits in a circle:
    - Marks come first, all at once and in the order of their ids: who waits for a mark has locked nothing else.
    - Events in one transaction differ in patient and in aggregate, and go in the order of these; what they lock belongs
      to these (`Reactions`). So two such transactions meet in the same order, and a request, an event by itself or a
      replay, which all lock one patient's rows, waits for what never comes back to this patient.
    - Loops that lock several patients' rows pass over those that are locked. Rows for which one of them waits are locked
      by reactions that don't share only.

    `recover(error, event)` may mend what a reaction lacked, outside any transaction; True means try once more, and where it
    raises that something is away the event waits.
    `applied(event, record)` runs after the commit (wake the relay, a heartbeat). `known_types`: where given, an event
    of a type that is neither here nor has a reaction is newer than this build and is parked for its replay.
    """

    def __init__(
        self,
        bus: Bus,
        group: str,
        topics: Sequence[str],
        reactions: Reactions,
        sessions: async_sessionmaker[AsyncSession],
        *,
        tracer: Tracer,
        registry: CollectorRegistry,
        log: Any,
        dead_letter_topic: str | None = None,
        parallel: int = 4,
        recover: Callable[[Exception, Event], Awaitable[bool]] | None = None,
        applied: Callable[[Event, Record], None] | None = None,
        known_types: Collection[str] | None = None,
        retry_at_most: float = 5.0,
        actor: str = "",
    ) -> None:
        self.group = group
        self.dead_letter_topic = dead_letter_topic or f"care.dlq.{group}"
        self._bus = bus
        self._topics = list(topics)
        self._reactions = reactions
        self._sessions = sessions
        self._tracer = tracer
        self._log = log
        self._room = asyncio.Semaphore(parallel)
        self._recover, self._applied = recover, applied
        self._known = None if known_types is None else frozenset(known_types) | reactions.types
        self._retry_at_most = retry_at_most
        self._actor = actor or f"system:{group}"
        self._metrics = _Metrics(registry, group)
        self._reader: Reader | None = None
        self._queues: dict[Partition, deque[Record]] = {}
        # Who has a partition in hand; those that may share a transaction are in `_sharing`, too.
        self._workers: dict[Partition, asyncio.Task[None]] = {}
        self._sharing: dict[asyncio.Task[None], float] = {}  # since when
        self._heads: dict[Partition, _Waiting] = {}  # read already, so that nothing is read twice
        self._singly: dict[Partition, int] = {}  # up to this offset each event goes by itself
        self._size = _TOGETHER_AT_MOST
        self._paused: set[Partition] = set()
        self._retrying: set[Partition] = set()
        self._done: dict[Partition, int] = {}
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._observer: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Begin to read; neither the bus nor the database need be there yet."""
        self._stopping.clear()
        self._reader = self._bus.reader(self.group, self._topics)
        await self._reader.start()
        self._task = asyncio.create_task(self._run(self._reader), name=f"consumer {self.group}")
        self._observer = asyncio.create_task(self._observe(self._reader), name=f"lag {self.group}")

    async def stop(self, timeout: float = 10.0) -> None:
        """Stop reading, finish the events in hand, commit, leave the group."""
        self._stopping.set()
        tasks = [task for task in (self._task, self._observer) if task is not None]
        if self._observer is not None:
            self._observer.cancel()
        if self._task is not None:
            await asyncio.wait({self._task}, timeout=timeout)
            self._task.cancel()
        for worker in self._workers.values():
            worker.cancel()
        await asyncio.gather(*tasks, *self._workers.values(), return_exceptions=True)
        self._workers.clear()
        self._queues.clear()
        self._paused.clear()
        self._task = self._observer = None
        if self._reader is not None:
            with contextlib.suppress(BusUnavailable):
                await self._reader.stop()
            self._reader = None

    async def _run(self, reader: Reader) -> None:
        pause, trouble, committed_at = 0.1, "", 0.0
        while not self._stopping.is_set():
            try:
                if self._done and time.monotonic() - committed_at > _COMMIT_EVERY:
                    committed_at = time.monotonic()
                    await self._commit(reader)
                busy = any(not worker.done() for worker in self._workers.values())
                found = await reader.fetch(_QUEUED_AT_MOST, _LOOK_EVERY if busy else _COMMIT_EVERY)
                for partition, records in found.items():
                    self._queues.setdefault(partition, deque()).extend(records)
                await self._balance(reader)
            except Exception as error:  # bus away, or anything else: what was not committed comes again
                kind = type(error).__name__
                if kind != trouble:
                    trouble = kind
                    unexpected = {"exc_info": error} if _is_unexpected(error) else {}
                    self._log.warning("events can't be read, trying again", group=self.group, error=kind, **unexpected)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), pause)
                pause = min(pause * 2, 2.0)
                continue
            pause, trouble = 0.1, ""
        if self._workers:
            await asyncio.wait(self._workers.values())
        with contextlib.suppress(BusUnavailable):
            await self._commit(reader)

    async def _balance(self, reader: Reader) -> None:
        """Have what waits applied; pause partitions that are full or being retried, resume the others."""
        ours = reader.assignment()
        for partition, queue in self._queues.items():
            if partition not in ours:
                # Lost to another member, which reads it from the committed offset: no use in doing it twice.
                queue.clear()
                self._done.pop(partition, None)
        self._spread()
        full = {partition for partition, queue in self._queues.items() if len(queue) >= _QUEUED_AT_MOST}
        low = {partition for partition, queue in self._queues.items() if len(queue) < _QUEUED_AT_MOST // 5}
        pausing = (full | self._retrying) - self._paused
        resuming = (self._paused & low) - self._retrying
        if pausing:
            await reader.pause(pausing)
        if resuming:
            await reader.resume(resuming)
        self._paused = (self._paused | pausing) - resuming

    async def _commit(self, reader: Reader) -> None:
        if self._done:
            done, self._done = self._done, {}
            try:
                await reader.commit(done)
            except BaseException:
                self._done = done | self._done
                raise

    # -- who does what -------------------------------------------------------------------------------------------------

    def _spread(self) -> None:
        """Give what waits in partitions that nobody has in hand to tasks: what may share a transaction to one."""
        if self._stopping.is_set():
            return
        for partition in self._waiting():
            queue = self._queues[partition]
            if self._fit(partition, queue[0]) is None:
                self._give(self._settle_all(partition, [queue.popleft()]), [partition])
        # A few at a time, not counting those that take long: what comes meanwhile goes together.
        young = time.monotonic() - _TOGETHER_FOR
        busy = {
            task
            for partition, task in self._workers.items()
            if self._sharing.get(task, 0.0) > young and partition not in self._retrying
        }
        if len(busy) >= _SHARING_AT_ONCE or not (waiting := self._waiting()):
            return
        taken = self._take(waiting)
        partitions = dict.fromkeys(each.partition for each in taken)
        for partition in partitions:
            self._queues[partition] = self._queues.pop(partition)  # next time it is the others' turn
        if sum(bool(each.registered) for each in taken) != 1:
            self._sharing[self._give(self._settle_together(taken), partitions)] = time.monotonic()
            return
        for partition in partitions:
            records = [each.record for each in taken if each.partition == partition]
            self._sharing[self._give(self._settle_all(partition, records), [partition])] = time.monotonic()

    def _waiting(self) -> list[Partition]:
        workers = self._workers
        return [
            partition
            for partition, queue in self._queues.items()
            if queue and (partition not in workers or workers[partition].done())
        ]

    def _give(self, work: Coroutine[Any, Any, None], partitions: Collection[Partition]) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=f"{self.group} {next(iter(partitions))}")
        for partition in partitions:
            self._workers[partition] = task
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._sharing.pop(task, None)
        self._spread()

    def _fit(self, partition: Partition, record: Record) -> "_Waiting | None":
        """What is known of a record that may share a transaction; None where it has to go by itself."""
        if record.offset <= self._singly.get(partition, -1):
            return None
        known = self._heads.get(partition)
        if known is not None and known.record is record:
            return known
        try:
            event, registered = self._read(record)
            if registered and (not event.aggregate_id or not all(each.shares for each in registered)):
                return None
            payload = _payload(event, registered) if registered else None
        except Unreadable:
            return None
        found = self._heads[partition] = _Waiting(partition, record, event, registered, payload)
        return found

    def _take(self, partitions: Sequence[Partition]) -> list["_Waiting"]:
        """Out of the queues, in order, what goes together. What has no reaction goes along."""
        taken: list[_Waiting] = []
        met: set[str] = set()
        count = 0
        for partition in partitions:
            queue = self._queues[partition]
            while queue and count < self._size and len(taken) < _QUEUED_AT_MOST:
                if (found := self._fit(partition, queue[0])) is None:
                    break
                if found.registered:
                    touched = {found.event.id, found.event.aggregate_id, found.event.patient_id} - {""}
                    if not met.isdisjoint(touched):
                        break
                    met |= touched
                    count += 1
                taken.append(found)
                queue.popleft()
        return taken

    async def _settle_all(self, partition: Partition, records: Sequence[Record]) -> None:
        """One after the other; one of them has a reaction."""
        for record in records:
            if self._stopping.is_set() or not await self._settle(record, partition):
                return  # stopped, or in the middle of retrying: not done, not committed
            self._done[partition] = record.offset + 1

    async def _settle_together(self, taken: Sequence["_Waiting"]) -> None:
        """In one transaction; if anything is wrong nothing has happened, and what failed is settled by itself."""
        failed: Sequence[_Waiting] = ()
        try:
            await self._apply_together([each for each in taken if each.registered])
        except _GivenUp as given_up:
            failed = [given_up.failed]
        except Exception:  # whose fault it is shows when each has a transaction of its own
            failed = taken
        if failed:
            self._metrics.shared.labels(self.group, "given_up").inc()
            self._size = max(2, self._size // 4)  # there may be more of its kind
            for each in reversed(taken):
                self._queues[each.partition].appendleft(each.record)
            for each in failed:
                self._singly[each.partition] = each.record.offset
            return
        self._metrics.settled.labels(self.group, "passed").inc(sum(not each.registered for each in taken))
        for each in taken:
            self._done[each.partition] = each.record.offset + 1

    async def _observe(self, reader: Reader) -> None:
        trouble = ""
        while True:
            try:
                self._metrics.show_lag(self._topics, await reader.lag())
                trouble = ""
            except Exception as error:  # no figure rather than a false one
                if type(error).__name__ != trouble:
                    trouble = type(error).__name__
                    unexpected = {"exc_info": error} if _is_unexpected(error) else {}
                    self._log.warning("lag not measured", group=self.group, error=trouble, **unexpected)
            await asyncio.sleep(_LAG_EVERY)

    # -- one event -----------------------------------------------------------------------------------------------------

    async def _settle(self, record: Record, partition: Partition) -> bool:
        """Apply or park, retrying in place for as long as it takes; False if stopped before either was done."""
        tries = cancelled = 0
        event: Event | None = None
        trouble: Exception | None = None
        try:
            while True:
                try:
                    if trouble is not None:
                        await self._park(record, event, trouble)
                        return True
                    event, registered = self._read(record)
                    await self._apply_mended(event, registered, record)
                    return True
                except _ParkingFailed as error:
                    away: BaseException = error.__cause__ or error
                except Exception as error:
                    is_cancelled = sqlstate_of(error) == _CANCELLED
                    cancelled += is_cancelled
                    # What can't even be parked waits, too: another try at once would leave nothing else its turn.
                    waits = trouble is not None or is_away(error) or (is_cancelled and cancelled < _CANCELLED_AT_MOST)
                    if not waits:
                        trouble = error
                        continue
                    away = error.__cause__ or error
                tries += 1
                self._retrying.add(partition)
                kind = type(away).__name__
                self._metrics.retried.labels(self.group, kind).inc()
                if tries == 1:
                    self._log.warning("event waits, trying again", group=self.group, error=kind)
                pause = min(0.05 * 2 ** min(tries - 1, 10), self._retry_at_most) * random.uniform(0.75, 1.25)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), pause)
                if self._stopping.is_set():
                    return False
        finally:
            self._retrying.discard(partition)

    async def _apply_mended(self, event: Event, registered: list[Registered], record: Record) -> str:
        """`_apply`, once more where what it lacked could be mended; raises what says that this has to wait."""
        try:
            return await self._apply(event, registered, record)
        except Exception as error:
            if self._recover is None or isinstance(error, Unreadable):
                raise
            try:
                mended = await self._recover(error, event)
            except Exception as failure:
                if is_away(failure):
                    raise
                mended = False
            if not mended:
                raise
        return await self._apply(event, registered, record)

    def _read(self, record: Record) -> tuple[Event, list[Registered]]:
        """The envelope and its reactions (none: the event is passed over). Raises Unreadable."""
        try:
            event = Event.FromString(record.value or b"")
        except DecodeError:
            raise Unreadable("ENVELOPE_UNREADABLE") from None
        if not event.type or not _is_uuid(event.id):
            raise Unreadable("ENVELOPE_UNREADABLE")
        registered = self._reactions.for_type(event.type)
        if not registered:
            if self._known is not None and event.type not in self._known:
                raise Unreadable("TYPE_UNKNOWN")
        elif event.payload_type != registered[0].payload.DESCRIPTOR.full_name:
            raise Unreadable("PAYLOAD_TYPE_UNKNOWN")
        return event, registered

    async def _apply(self, event: Event, registered: list[Registered], record: Record) -> str:
        """One transaction: mark and effects. Answers "applied", "already" (the mark was there) or "passed"."""
        if not registered:
            self._metrics.settled.labels(self.group, "passed").inc()
            return "passed"
        async with self._room:
            started = time.perf_counter()
            span = self._span(event, record)
            with _inside(span, end=True):
                try:
                    outcome = await self._effects(event, registered, record)
                except BaseException as error:
                    _tell_failure(span, error)
                    raise
                span.set_attribute("care.outcome", outcome)
        self._count(event, record, outcome, time.perf_counter() - started)
        return outcome

    def _count(self, event: Event, record: Record, outcome: str, seconds: float) -> None:
        """After the commit."""
        self._metrics.seconds.labels(self.group).observe(seconds)
        self._metrics.settled.labels(self.group, outcome).inc()
        if outcome == "applied":
            self._metrics.freshness.labels(self.group).observe(max(0.0, time.time() - event.time.ToNanoseconds() / 1e9))
        if self._applied is not None:
            self._applied(event, record)

    async def _apply_together(self, taken: Sequence["_Waiting"]) -> None:
        """One transaction: marks, then the effects of those that were not marked yet."""
        if not taken:
            return
        taken = sorted(taken, key=lambda each: each.event.patient_id or each.event.aggregate_id)
        spans: list[Span] = []
        outcomes: list[str] = []
        async with self._room:
            started = time.perf_counter()
            try:
                async with self._sessions() as db, db.begin():
                    await self._effects_together(db, taken, spans, outcomes)
            except BaseException as error:
                for span in spans:
                    if span is spans[-1] and len(spans) > len(outcomes):
                        _tell_failure(span, error)
                    span.set_attribute("care.outcome", "given_up")
                    span.end()
                if isinstance(error, Exception) and len(spans) > len(outcomes):
                    raise _GivenUp(taken[len(outcomes)]) from error
                raise
            took = time.perf_counter() - started
        self._size = max(2, min(_TOGETHER_AT_MOST, int(len(taken) * _TOGETHER_FOR / took)))
        self._metrics.shared.labels(self.group, "applied").inc()
        for each, span, outcome in zip(taken, spans, outcomes, strict=True):
            span.set_attribute("care.outcome", outcome)
            span.end()
            self._count(each.event, each.record, outcome, took / len(taken))

    async def _effects_together(
        self, db: AsyncSession, taken: Sequence["_Waiting"], spans: list[Span], outcomes: list[str]
    ) -> None:
        ids = [uuid.UUID(each.event.id) for each in taken]
        marks = {"group_name": self.group, "event_ids": ids, "types": [each.event.type for each in taken]}
        fresh = {row.event_id: row.time for row in await db.execute(_MARK_ALL, marks)}
        marked = time.perf_counter()
        db.info["together"] = True
        for each, event_id in zip(taken, ids, strict=True):
            spans.append(span := self._span(each.event, each.record))
            if (then := fresh.get(event_id)) is None:
                outcomes.append("already")
                continue
            db.info["record"], db.info["event"] = each.record, each.event
            db.info["act"] = Act(self._actor, then + timedelta(seconds=time.perf_counter() - marked))
            with _inside(span, end=False):
                for reaction in each.registered:
                    await reaction.function(each.payload, each.event, db)
                await db.flush()  # here, so that what it tells is told by this act in this span
            outcomes.append("applied")

    async def _effects(self, event: Event, registered: list[Registered], record: Record) -> str:
        payload = _payload(event, registered)
        async with self._sessions() as db, db.begin():
            try:
                await db.connection()
            except Exception as error:
                raise NoConnection from error
            db.info["record"], db.info["event"] = record, event
            # A twin in another member's open transaction makes this wait for its end: first come, one effect.
            mark = {"group_name": self.group, "event_id": event.id, "type": event.type}
            if (fresh := (await db.execute(_MARK, mark)).first()) is None:
                return "already"
            db.info["act"] = Act(self._actor, fresh.time)
            for each in registered:
                await each.function(payload, event, db)
        return "applied"

    async def _park(self, record: Record, event: Event | None, trouble: Exception) -> None:
        """Put the record in the dead-letter topic; raises _ParkingFailed where that is not certain."""
        reason = reason_of(trouble) or "REACTION_FAILED"
        times = _origin(record, "times", "0")
        headers = [(name, value) for name, value in record.headers if not name.startswith(_HEADERS)]
        for name, value in (
            ("reason", reason),
            ("error", type(trouble).__name__),
            ("sqlstate", sqlstate_of(trouble) or ""),
            ("group", self.group),
            ("topic", _origin(record, "topic", record.topic)),
            ("partition", _origin(record, "partition", str(record.partition))),
            ("offset", _origin(record, "offset", str(record.offset))),
            ("key", _origin(record, "key", record.key)),
            ("time", str(int(time.time() * 1000))),
            ("times", str(int(times) + 1 if times.isdecimal() else 1)),
        ):
            headers.append((_HEADERS + name, value.encode()))
        letter = Message(record.key, record.value or b"", tuple(headers))
        try:
            (refused,) = await self._bus.append(self.dead_letter_topic, [letter])
            if refused is not None:
                # Too large even here (someone else wrote it): keep the pointer, the value is still in its own topic.
                omitted = (*letter.headers, (_HEADERS + "value-omitted", b"1"))
                (refused,) = await self._bus.append(self.dead_letter_topic, [Message(record.key, b"", omitted)])
        except Exception as error:
            raise _ParkingFailed from error
        if refused is not None:
            raise _ParkingFailed
        self._metrics.settled.labels(self.group, "parked").inc()
        self._metrics.parked.labels(self.group, reason).inc()
        self._log.error(
            "event parked",
            group=self.group,
            reason=reason,
            error=type(trouble).__name__,
            event_id=event.id if event else "",
            event_type=event.type if event else "",
            topic=record.topic,
            partition=record.partition,
            offset=record.offset,
        )

    def _span(self, event: Event, record: Record) -> Span:
        traceparent = event.traceparent or (record.header("traceparent") or b"").decode("latin-1")
        return self._tracer.start_span(
            f"process {event.type}",
            context=context_from(traceparent),
            kind=SpanKind.CONSUMER,
            links=links_to(traceparent),
            attributes={
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": record.topic,
                "messaging.destination.partition.id": str(record.partition),
                "messaging.consumer.group.name": self.group,
                "care.event.id": event.id,
                "care.event.type": event.type,
            },
        )

    # -- replay --------------------------------------------------------------------------------------------------------

    async def replay(self, *, patience: float = 5.0) -> ReplayCounts:
        """Apply the dead letters of this group that are there now and were not replayed yet.

        Runs beside the group's members (the inbox keeps effects single). A letter that fails again is parked anew,
        behind the ones there are. Raises Retry where the database or the bus is away; what was done stays done.
        `patience` in seconds: how long to wait for the reader's share of the partitions.
        """
        reader = self._bus.reader(f"{self.group}.replay", [self.dead_letter_topic])
        await reader.start()
        counts = dict.fromkeys(ReplayCounts._fields, 0)
        try:
            ends = {p: lag.end for p, lag in (await self._shares(reader, patience)).items() if lag.records}
            while ends:
                found = await reader.fetch(100, 0.5)
                for partition, records in found.items():
                    for record in records:
                        if record.offset < ends.get(partition, 0):
                            counts[await self._replay_one(record)] += 1
                            await reader.commit({partition: record.offset + 1})
                    if records[-1].offset + 1 >= ends.get(partition, 0):
                        ends.pop(partition, None)
                        await reader.pause([partition])  # what was parked since waits for the next replay
                if not found:  # nothing comes: is it another replay's now, or gone from the log?
                    left = {p: lag.end - lag.records for p, lag in (await reader.lag()).items() if lag.records}
                    ends = {p: end for p, end in ends.items() if left.get(p, end) < end}
        except BusUnavailable as error:
            raise Retry("BUS_UNAVAILABLE") from error
        finally:
            with contextlib.suppress(BusUnavailable):
                await reader.stop()
        return ReplayCounts(**counts)

    async def _shares(self, reader: Reader, patience: float) -> dict[Partition, Any]:
        until = time.monotonic() + patience
        while True:
            for partition, records in (await reader.fetch(1, 0.2)).items():
                await reader.seek(partition, records[0].offset)  # only there to join; nothing is taken yet
            if (lags := await reader.lag()) or time.monotonic() > until:
                return lags

    async def _replay_one(self, record: Record) -> str:
        event: Event | None = None
        try:
            if record.header(_HEADERS + "value-omitted"):
                raise Unreadable("VALUE_OMITTED")
            event, registered = self._read(record)
            return await self._apply_mended(event, registered, record)
        except Exception as error:
            if is_away(error):
                raise Retry(reason_of(error) or "AWAY") from error
            try:
                await self._park(record, event, error)
            except _ParkingFailed as failed:
                raise Retry("PARKING_FAILED") from failed
            return "parked_again"


class _GivenUp(Exception):
    """A shared transaction was rolled back, in the midst of this one's reactions."""

    def __init__(self, failed: "_Waiting") -> None:
        super().__init__()
        self.failed = failed


class _Waiting(NamedTuple):
    """A record that may share a transaction; one without a reaction is passed over."""

    partition: Partition
    record: Record
    event: Event
    registered: list[Registered]
    payload: Payload | None


def _payload(event: Event, registered: Sequence[Registered]) -> Payload:
    try:
        payload = registered[0].payload.FromString(event.payload)
    except DecodeError:
        raise Unreadable("PAYLOAD_UNREADABLE") from None
    if not knows_all_values(payload, registered[0].enums):
        raise Unreadable("ENUM_VALUE_UNKNOWN")
    return payload


def _inside(span: Span, *, end: bool) -> contextlib.AbstractContextManager[Span]:
    return use_span(span, end_on_exit=end, record_exception=False, set_status_on_exception=False)


def _tell_failure(span: Span, error: BaseException) -> None:
    span.set_attribute("error.type", type(error).__name__)
    if reason := reason_of(error):
        span.set_attribute("care.reason", reason)
    span.set_status(Status(SpanStatus.ERROR))


def _is_unexpected(error: Exception) -> bool:
    """Whether it is more than a bus that is away, and so worth its frames in the log."""
    return not isinstance(error, BusUnavailable) or error.__cause__ is not None


class _ParkingFailed(Exception):
    """The dead-letter topic did not take it; nothing is committed."""


class _Metrics:
    def __init__(self, registry: CollectorRegistry, group: str) -> None:
        self._group = group
        by_topic = ("group", "topic")
        self._records = Gauge("care_consumer_lag_records", "Records behind.", by_topic, registry=registry)
        self._seconds = Gauge(
            "care_consumer_lag_seconds", "Age of the oldest record not yet committed.", by_topic, registry=registry
        )
        self.settled = Counter(
            "care_consumer_events", "Events by what became of them.", ("group", "outcome"), registry=registry
        )
        self.shared = Counter(
            "care_consumer_shared_transactions",
            "Transactions of several events, by what became of them.",
            ("group", "outcome"),
            registry=registry,
        )
        self.retried = Counter("care_consumer_retries", "Tries again in place.", ("group", "error"), registry=registry)
        self.parked = Counter("care_consumer_parked", "Events parked.", ("group", "reason"), registry=registry)
        self.seconds = Histogram(
            "care_consumer_process_seconds", "Time per event that has a reaction.", ("group",), registry=registry
        )
        self.freshness = Histogram(
            "care_consumer_freshness_seconds",
            "From the telling of an event to its effect.",
            ("group",),
            buckets=_FRESHNESS,
            registry=registry,
        )
        for outcome in ("applied", "already", "passed", "parked"):
            self.settled.labels(group, outcome)

    def show_lag(self, topics: Sequence[str], lags: dict[Partition, Any]) -> None:
        for topic in topics:
            of_topic = [lag for (name, _), lag in lags.items() if name == topic]
            self._records.labels(self._group, topic).set(sum(lag.records for lag in of_topic))
            self._seconds.labels(self._group, topic).set(max((lag.seconds for lag in of_topic), default=0.0))


def reason_of(error: BaseException) -> str | None:
    """Our own reason word, if the exception carries one; never its text."""
    reason = getattr(error, "reason", None)
    return reason if isinstance(reason, str) and REASON.fullmatch(reason) else None


def _origin(record: Record, name: str, otherwise: str) -> str:
    found = record.header(_HEADERS + name)
    return otherwise if found is None else found.decode("latin-1")


def _is_uuid(value: str) -> bool:
    try:
        uuid.UUID(value)
    except ValueError:
        return False
    return True


async def trim_inbox(engine: AsyncEngine, older_than_seconds: float, at_most: int = 10_000) -> int:
    """Delete marks older than that; must be longer than the bus keeps events, or a redelivery has its effect twice."""
    async with engine.begin() as connection:
        gone = await connection.execute(
            text(
                "DELETE FROM inbox WHERE (group_name, event_id) IN (SELECT group_name, event_id FROM inbox"
                " WHERE time < clock_timestamp() - :age * interval '1 second' ORDER BY time LIMIT :at_most)"
            ),
            {"age": float(older_than_seconds), "at_most": at_most},
        )
        return int(gone.rowcount)

"""Live views: whoever has one open is told which resources of it changed, by ids only, and reads them again."""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from care.events.v1.envelope_pb2 import Event
from care.type.v1.live_pb2 import Change
from google.protobuf.message import Message
from prometheus_client import Counter, Gauge

from chassis.access import Access, Caller
from chassis.auth import Identity
from chassis.bus import Bus, Record
from chassis.call import missing
from chassis.errors import DeadlineExceeded, NotFound, Problem, ResourceExhausted, Unauthenticated, Unavailable
from chassis.settings import Settings
from chassis.telemetry import Telemetry

_RESET = Change(kind=Change.RESET).SerializeToString()
_HEARTBEAT = Change(kind=Change.HEARTBEAT).SerializeToString()
_LINGER = 60.0
"""Seconds for which changes are followed after nobody listens any more: screens are opened again and again."""
_STANDING_WITHIN = 5.0
_AT_A_TIME = 500
_LEAVE_WITHIN = 1.0

Key = tuple["View", str, str]


@dataclass(frozen=True)
class View:
    """Which events of a service's own topic a live view tells, and whom they concern.

    `kinds`: names before the dot of event types (`thing` of `thing.changed`); `payload` is what they all carry. `scopes`
    are the payload's fields that name what one listens to (a place, an owner): several where what moved concerns
    the scope that it left, too. `resource` is the type under which what changed is told.
    """

    resource: str
    kinds: frozenset[str]
    payload: type[Message]
    scopes: tuple[str, ...]

    def __post_init__(self) -> None:
        for scope in self.scopes:
            if scope not in self.payload.DESCRIPTOR.fields_by_name:
                raise ValueError(f"{self.payload.DESCRIPTOR.full_name} has no field {scope}")

    def watch(
        self, scope: str, *, allowed: Callable[[Caller], bool], concerns: Callable[[Any], bool] | None = None
    ) -> "Watch":
        """What a servicer answers: its caller will be told what changes in `scope`, as long as `allowed` says yes of
        them; `concerns` looks at the payload where the view is narrower than the scope.
        """
        return Watch(self, scope, allowed, concerns)

    def scopes_of(self, payload: Any) -> set[str]:
        """What an event concerns."""
        found: set[str] = set()
        for name in self.scopes:
            value = getattr(payload, name)
            found.update([value] if isinstance(value, str) else value)
        found.discard("")
        return found


@dataclass(frozen=True)
class Watch:
    """One caller's wish to be told; see `View.watch`."""

    view: View
    scope: str
    allowed: Callable[[Caller], bool]
    concerns: Callable[[Any], bool] | None


def of_group(group_id: str) -> Callable[[Caller], bool]:
    """Whether a caller is staff of a group. To all others it looks as if there were none."""
    return lambda caller: caller.kind == "staff" and group_id in caller.group_ids


class Watcher:
    """One open view. `pass_on` is its whole life; nobody else waits for its reader."""

    def __init__(self, live: "Live", watch: Watch, caller: Caller, identity: Identity, permission: str) -> None:
        settings, now = live.settings, asyncio.get_running_loop().time()
        self.watch = watch
        self.caller = caller
        self.key: Key = (watch.view, caller.tenant_id, watch.scope)
        self.ends_at = now + settings.live_longest * random.uniform(0.9, 1.0)  # so that not all come back at once
        self._ending: Problem = DeadlineExceeded("VIEW_ENDED", "The view was open for its longest time; open it again.")
        token_ends_at = now + identity.expire_time - time.time()
        if token_ends_at < self.ends_at:
            self.ends_at = token_ends_at
            self._ending = Unauthenticated("TOKEN_EXPIRED", "The token has expired; sign in again.")
        self._live = live
        self._identity = identity
        self._permission = permission
        self._pending: deque[bytes] = deque()
        self._lost = True  # the first item says: read now
        self._bell = asyncio.Event()
        self._look_at = now + settings.live_recheck
        self._beat_at = now + settings.live_heartbeat
        self._waiting: asyncio.Timeout | None = None
        self._leaving = False

    # -- by the hub ----------------------------------------------------------------------------------------------------

    def tell(self, item: bytes) -> None:
        """Queue one item; a reader who lets too many wait is told to read everything instead."""
        if self._lost:
            return
        if len(self._pending) >= self._live.settings.live_queue:
            self.reset("slow")
            return
        self._pending.append(item)
        self._bell.set()

    def reset(self, why: str) -> None:
        """Something may have been missed."""
        self._pending.clear()
        if not self._lost:
            self._lost = True
            self._live.resets.labels(why).inc()
        self._bell.set()

    def end(self, problem: Problem) -> None:
        """Close the view, whatever its reader does."""
        now = asyncio.get_running_loop().time()
        if not self._leaving:
            self._ending, self.ends_at = problem, now
        self._bell.set()
        if self._waiting is not None:  # for a reader who doesn't read
            with contextlib.suppress(RuntimeError):  # it is over at this very moment
                self._waiting.reschedule(now + _LEAVE_WITHIN if self._leaving else now)

    # -- by the call ---------------------------------------------------------------------------------------------------

    async def pass_on(
        self, write: Callable[[bytes], Awaitable[Any]], leave: Callable[[Problem], Awaitable[Any]]
    ) -> None:
        """Write items until the view ends, then say why. A reader who doesn't read is waited for until the drain."""
        why = "READER_GONE"
        self._live.opened(self)
        try:
            try:
                while True:
                    item = await self._next()
                    async with asyncio.timeout_at(self.ends_at) as self._waiting:
                        await write(item)
                    self._waiting = None
            except TimeoutError:
                problem = self._ending
            except Problem as ended:
                problem = ended
            why = problem.reason
            self._leaving = True
            async with asyncio.timeout(_LEAVE_WITHIN if self._live.draining else None) as self._waiting:
                await leave(problem)
        except TimeoutError:
            # Any other exception would be said to the reader, who doesn't read.
            raise asyncio.CancelledError from None
        finally:
            self._live.closed(self, why)

    async def _next(self) -> bytes:
        loop = asyncio.get_running_loop()
        while True:
            now = loop.time()
            if now >= self.ends_at:
                raise self._ending
            if now >= self._look_at:
                await self._look_again()
                self._look_at = now + self._live.settings.live_recheck
                continue
            self._bell.clear()
            item = self._take()
            if item is None and now >= self._beat_at:
                item = _HEARTBEAT
            if item is not None:
                self._beat_at = now + self._live.settings.live_heartbeat
                return item
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(min(self.ends_at, self._look_at, self._beat_at)):
                    await self._bell.wait()

    def _take(self) -> bytes | None:
        if self._lost:
            self._lost = False
            return _RESET
        return self._pending.popleft() if self._pending else None

    async def _look_again(self) -> None:
        """Whether the caller may still look: by the projection, as at the opening."""
        try:
            self.caller = await self._live.judge(self._identity, self._permission, self.watch)
        except Problem as problem:
            self._ending = problem
            raise
        except Exception as error:  # who can't be judged is not shown anything
            self._ending = Unavailable("DATABASE_UNAVAILABLE", "The database does not answer; try again.")
            raise self._ending from error


class Live:
    """All live views that are open in one process, and the one reading of the service's topic behind them.

    Each replica reads the whole topic, from its end on and in no group, while somebody listens: what was committed at any
    replica is told at all of them as soon as the relay has sent it. What could have been missed is told as a reset.
    """

    def __init__(self, bus: Bus, topic: str, access: Access, settings: Settings, telemetry: Telemetry) -> None:
        self.settings = settings
        self.draining = False
        self._bus, self._topic, self._access, self._log = bus, topic, access, telemetry.log
        self._watchers: dict[Key, set[Watcher]] = {}
        self._views: dict[str, set[View]] = {}
        self._open: set[Watcher] = set()
        self._standing = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._wanted = 0
        self._idle_since = time.monotonic()
        registry = telemetry.registry
        self._streams = Gauge("care_live_views_open", "Live views that are open.", registry=registry)
        self._told = Counter("care_live_changes", "Items told to live views.", registry=registry)
        self.resets = Counter("care_live_resets", "Readers told to read everything again.", ("why",), registry=registry)
        self._ends = Counter("care_live_views_closed", "Live views that ended.", ("reason",), registry=registry)

    async def judge(self, identity: Identity, permission: str, watch: Watch) -> Caller:
        """The caller as the projection knows them now. Raises what the opening would raise."""
        caller = await self._access.caller(identity)
        if permission not in caller.permissions:
            raise missing(permission)
        if not watch.allowed(caller):
            raise NotFound
        return caller

    def refuse_more(self) -> None:
        """Raises ResourceExhausted `TOO_MANY_STREAMS`, Unavailable `DRAINING`."""
        if self.draining:
            raise _draining()
        if len(self._open) >= self.settings.live_views:
            raise ResourceExhausted("TOO_MANY_STREAMS", "Too many live views are open; try again later.")

    async def open(self, watch: Watch, caller: Caller, identity: Identity, permission: str) -> Watcher:
        """A view whose caller was checked. Raises as `refuse_more`, and Unavailable `CHANGES_UNAVAILABLE` where changes
        can't be followed.
        """
        self.refuse_more()
        self._wanted += 1
        try:
            if self._following is None or self._following.done():
                self._following = asyncio.create_task(self._follow(), name="live views")
            async with asyncio.timeout(_STANDING_WITHIN):
                await self._standing.wait()
        except TimeoutError:
            raise Unavailable("CHANGES_UNAVAILABLE", "Changes can't be followed now; try again.") from None
        finally:
            self._wanted -= 1
        return Watcher(self, watch, caller, identity, permission)

    def opened(self, watcher: Watcher) -> None:
        """From now on nothing is missed: its reader may read."""
        self._open.add(watcher)
        self._watchers.setdefault(watcher.key, set()).add(watcher)
        for kind in watcher.watch.view.kinds:
            self._views.setdefault(kind, set()).add(watcher.watch.view)
        self._streams.inc()
        if self.draining:
            watcher.end(_draining())

    def closed(self, watcher: Watcher, why: str) -> None:
        """Nobody listens there any more."""
        self._open.discard(watcher)
        listening = self._watchers[watcher.key]
        listening.discard(watcher)
        if not listening:
            del self._watchers[watcher.key]
            view = watcher.watch.view
            if not any(one is view for one, _, _ in self._watchers):
                for kind in view.kinds:
                    self._views[kind].discard(view)
                    if not self._views[kind]:
                        del self._views[kind]
        self._streams.dec()
        self._ends.labels(why).inc()

    def drain(self) -> None:
        """End all views, so that their readers go on elsewhere, and take no more."""
        self.draining = True
        for watcher in list(self._open):
            watcher.end(_draining())

    async def stop(self) -> None:
        """Follow no more."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)

    # -- what changed --------------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        trouble = ""
        while self._is_needed():
            tail = self._bus.tail([self._topic])
            try:
                await tail.start()
                if trouble:
                    trouble = ""
                    self._log.info("changes are followed again")
                    for watcher in self._open:
                        watcher.reset("source")
                self._standing.set()
                while self._is_needed():
                    for records in (await tail.fetch(_AT_A_TIME, 5.0)).values():
                        await self._tell(records)
            except Exception as error:  # the bus is away, or an event is none of ours: from the end on, after a reset
                if not trouble:
                    trouble = type(error).__name__
                    self._log.warning("changes can't be followed, trying again", error=trouble)
                self._standing.clear()
                await asyncio.sleep(0.5)
            finally:
                self._standing.clear()
                with contextlib.suppress(Exception):
                    await tail.stop()

    def _is_needed(self) -> bool:
        if self._open or self._wanted:
            self._idle_since = time.monotonic()
        return time.monotonic() - self._idle_since < _LINGER

    async def _tell(self, records: Sequence[Record]) -> None:
        """Pass on what concerns somebody who is cleared for it."""
        if not self._open:
            return
        matched: list[tuple[Event, View, list[Watcher]]] = []
        for record in records:
            event = Event.FromString(record.value or b"")
            for view in self._views.get(event.type.partition(".")[0], ()):
                if watchers := self._concerned(event, view):
                    matched.append((event, view, watchers))
        labels = await self._labels([event for event, _, _ in matched])
        for event, view, watchers in matched:
            item = _item(event, view)
            needed = labels.get((event.tenant_id, event.patient_id)) if event.patient_id else frozenset[str]()
            for watcher in watchers:
                if needed is None:
                    watcher.reset("labels")
                elif watcher.caller.kind != "staff" or needed.union(event.security_labels).issubset(
                    watcher.caller.clearances
                ):
                    watcher.tell(item)
                    self._told.inc()

    def _concerned(self, event: Event, view: View) -> list[Watcher]:
        if event.payload_type not in (
            "",
            view.payload.DESCRIPTOR.full_name,
        ):  # told of the same kind, but something else
            return []
        payload = view.payload.FromString(event.payload)
        scopes = view.scopes_of(payload)
        listening = [one for scope in scopes for one in self._watchers.get((view, event.tenant_id, scope), ())]
        return [one for one in listening if one.watch.concerns is None or one.watch.concerns(payload)]

    async def _labels(self, events: Sequence[Event]) -> dict[tuple[str, str], frozenset[str]]:
        """Labels of the records that the events are about, which clear or hide them beside the events' own."""
        found: dict[tuple[str, str], frozenset[str]] = {}
        by_tenant: dict[str, set[str]] = {}
        for event in events:
            if event.patient_id:
                by_tenant.setdefault(event.tenant_id, set()).add(event.patient_id)
        for tenant_id, ids in by_tenant.items():
            try:
                known = await self._access.labels(tenant_id, sorted(ids))
            except Exception as error:  # without them nobody is told what; that something happened is said by the reset
                self._log.warning("labels not read", error=type(error).__name__)
                continue
            found |= {(tenant_id, one): known.get(one, frozenset(("unknown",))) for one in ids}
        return found


def _item(event: Event, view: View) -> bytes:
    change = Change(
        kind=Change.CHANGED,
        event_type=event.type,
        event_id=event.id,
        time=event.time if event.HasField("time") else None,
    )
    change.resource.type, change.resource.id = view.resource, event.aggregate_id
    return change.SerializeToString()


def _draining() -> Unavailable:
    return Unavailable("DRAINING", "This server is being stopped; open the view again.")

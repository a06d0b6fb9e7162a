"""The hub behind live views, with a bus and a projection that are made up: what is told, and what becomes a reset."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from care.events.v1.envelope_pb2 import Event
from care.patients.v1 import events_pb2
from care.type.v1.live_pb2 import Change

from chassis.access import Caller
from chassis.auth import Identity
from chassis.bus import BusUnavailable, Record
from chassis.errors import Problem, Unavailable
from chassis.live import Live, View, Watch, of_group
from chassis.settings import Settings
from chassis.telemetry import Telemetry

THINGS = View("Pool", frozenset({"pool"}), events_pb2.PoolState, ("clinic_ids",))
RECORDS = View("Task", frozenset({"task"}), events_pb2.TaskEvent, ("clinic_id",))


class MadeUp:
    """A bus with one tail, and a projection: items put into `coming` are fetched, an exception is raised."""

    def __init__(self) -> None:
        self.coming: asyncio.Queue[list[Record] | Exception] = asyncio.Queue()
        self.tails = self.stopped = 0
        self.known: dict[str, frozenset[str]] | None = {}
        self.caller_now: Caller | Problem = staff("here")

    def tail(self, topics: Sequence[str]) -> "MadeUp":
        assert list(topics) == ["care.made-up"]
        self.tails += 1
        return self

    async def start(self) -> None: ...

    async def stop(self) -> None:
        self.stopped += 1

    async def fetch(self, max_records: int, timeout: float) -> dict[tuple[str, int], list[Record]]:
        try:
            found = await asyncio.wait_for(self.coming.get(), timeout)
        except TimeoutError:
            return {}
        if isinstance(found, Exception):
            raise found
        return {("care.made-up", 0): found}

    async def caller(self, identity: Identity) -> Caller:
        if isinstance(self.caller_now, Problem):
            raise self.caller_now
        return self.caller_now

    async def labels(self, tenant_id: str, subject_ids: Sequence[str]) -> dict[str, frozenset[str]]:
        if self.known is None:
            raise OSError
        return {one: self.known[one] for one in subject_ids if one in self.known}


def staff(*groups: str, clearances: tuple[str, ...] = (), kind: str = "staff") -> Caller:
    return Caller(kind, "ada", "north", frozenset({"look"}), group_ids=groups, clearances=clearances)


class Hub:
    def __init__(self, **settings: Any) -> None:
        self.made_up = MadeUp()
        telemetry = Telemetry.create("made-up", otlp_endpoint=None, environment="test", version="0")
        bus: Any = self.made_up
        self.live = Live(bus, "care.made-up", bus, Settings(**settings), telemetry)
        self.registry = telemetry.registry
        self._open: list[asyncio.Task[None]] = []

    async def watch(
        self, watch: Watch | None = None, caller: Caller | None = None, write: Any = None, ends_in: float = 60
    ) -> tuple[list[Any], asyncio.Task[None]]:
        """What a reader was told, the Problem at the end too, and the task that passes it on."""
        told: list[Any] = []
        identity = Identity("north", "issuer", "ada", time.time() + ends_in, "token")
        watch = watch or THINGS.watch("here", allowed=of_group("here"))
        watcher = await self.live.open(watch, caller or staff("here"), identity, "look")

        async def keep(item: bytes) -> None:
            told.append(Change.FromString(item))

        async def leave(problem: Problem) -> None:
            told.append(problem.reason)

        task = asyncio.create_task(watcher.pass_on(write or keep, leave))
        self._open.append(task)
        await asyncio.sleep(0)
        return told, task

    async def tell(self, *records: Record) -> None:
        await self.made_up.coming.put(list(records))
        await asyncio.sleep(0.02)

    def sample(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(name, labels)

    async def close(self) -> None:
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)
        await self.live.stop()


@pytest.fixture
async def hub() -> AsyncIterator[Hub]:
    hub = Hub(live_queue=3)
    yield hub
    await hub.close()


def happened(
    kind: str,
    payload: Any,
    tenant: str = "north",
    patient: str = "",
    labels: Sequence[str] = (),
    payload_type: str = "",
) -> Record:
    event = Event(id="e1", type=kind, tenant_id=tenant, aggregate_id="a1", payload=payload.SerializeToString())
    event.payload_type = payload_type or payload.DESCRIPTOR.full_name
    event.patient_id = patient
    event.security_labels.extend(labels)
    return Record("care.made-up", 0, 0, "a1", event.SerializeToString(), (), 0)


def pool(*clinics: str) -> events_pb2.PoolState:
    return events_pb2.PoolState(clinic_ids=clinics)


def kinds(told: list[Any]) -> list[str]:
    return [one if isinstance(one, str) else Change.Kind.Name(one.kind) for one in told]


async def test_only_the_scope_of_the_same_tenant_is_told(hub: Hub) -> None:
    told, _ = await hub.watch()
    await hub.tell(
        happened("pool.changed", pool("there")),
        happened("pool.changed", pool("here"), tenant="south"),
        happened("consent.created", pool("here")),
        happened("pool.counted", pool("here"), payload_type="care.patients.v1.TaskEvent"),
        happened("pool.changed", pool("there", "here")),
    )
    assert kinds(told) == ["RESET", "CHANGED"]
    assert (told[1].resource.type, told[1].resource.id, told[1].event_type) == ("Pool", "a1", "pool.changed")


async def test_what_nobody_looks_at_is_no_longer_kept(hub: Hub) -> None:
    """Each kind of view that was ever opened was kept, and its events read for nobody."""
    await hub.watch()
    assert hub.live._views
    for task in list(hub._open):
        task.cancel()
    await asyncio.gather(*hub._open, return_exceptions=True)
    assert not hub.live._views and not hub.live._watchers


async def test_a_view_of_a_field_that_events_do_not_have_is_refused_when_it_is_made() -> None:
    with pytest.raises(ValueError, match="no field clinic"):
        View("Pool", frozenset({"pool"}), events_pb2.PoolState, ("clinic",))


async def test_labels_of_the_event_and_of_the_record_hide_and_unread_ones_are_a_reset(hub: Hub) -> None:
    view = RECORDS.watch("here", allowed=of_group("here"))
    plain, _ = await hub.watch(view)
    cleared, _ = await hub.watch(view, staff("here", clearances=("R", "V")))
    own, _ = await hub.watch(view, staff("here", kind="patient"))
    task = events_pb2.TaskEvent(clinic_id="here")
    hub.made_up.known = {"p": frozenset({"R"})}
    await hub.tell(happened("task.created", task, patient="p"), happened("task.created", task, labels=["V"]))
    await hub.tell(happened("task.created", task, patient="nobody"))
    assert [kinds(one) for one in (plain, cleared, own)] == [
        ["RESET"],
        ["RESET", *["CHANGED"] * 2],
        ["RESET", *["CHANGED"] * 3],
    ]
    hub.made_up.known = None
    await hub.tell(happened("task.created", task, patient="p"))
    assert kinds(plain) == ["RESET", "RESET"]


@pytest.mark.parametrize("trouble", [BusUnavailable("away"), [Record("t", 0, 0, "k", b"no event", (), 0)]])
async def test_after_trouble_all_read_again_and_are_told_again(hub: Hub, trouble: Any) -> None:
    told, _ = await hub.watch()
    await hub.made_up.coming.put(trouble)
    await asyncio.sleep(0.6)
    await hub.tell(happened("pool.changed", pool("here")))
    assert kinds(told) == ["RESET", "RESET", "CHANGED"]
    assert hub.made_up.tails == 2 and hub.made_up.stopped == 1
    assert hub.sample("care_live_resets_total", why="source") == 1


async def test_a_reader_who_stands_still_stalls_nobody_and_is_cut_when_time_is_over(hub: Hub) -> None:
    never = asyncio.Event()

    async def stand_still(_item: bytes) -> None:
        await never.wait()

    slow, task = await hub.watch(write=stand_still, ends_in=0.3)
    quick, _ = await hub.watch()
    for _ in range(6):
        await hub.tell(happened("pool.changed", pool("here")))
    assert kinds(quick) == ["RESET", *["CHANGED"] * 6]
    assert hub.sample("care_live_resets_total", why="slow") == 1
    await asyncio.wait_for(task, 2)
    assert slow == ["TOKEN_EXPIRED"]
    assert hub.sample("care_live_views_open") == 1


async def test_a_drain_ends_all_even_who_stands_still_or_does_not_hear_the_end(hub: Hub) -> None:
    never = asyncio.Event()

    async def stand_still(_item: object) -> None:
        await never.wait()

    told, first = await hub.watch()
    _, second = await hub.watch(write=stand_still)
    identity = Identity("north", "issuer", "ada", time.time() + 0.05, "token")
    deaf = await hub.live.open(THINGS.watch("here", allowed=of_group("here")), staff("here"), identity, "look")
    third = asyncio.create_task(deaf.pass_on(stand_still, stand_still))
    await asyncio.sleep(0.2)  # its token is over, and nobody hears that
    began = time.monotonic()
    hub.live.drain()
    with contextlib.suppress(asyncio.CancelledError):
        await asyncio.wait_for(asyncio.gather(first, second, third, return_exceptions=True), 3)
    assert time.monotonic() - began < 2
    assert told[-1] == "DRAINING" and third.cancelled()
    with pytest.raises(Unavailable, match="DRAINING"):
        await hub.watch()
    assert hub.sample("care_live_views_open") == 0 and not hub.live._watchers


async def test_who_cannot_be_judged_is_shown_nothing_more() -> None:
    hub = Hub(live_recheck=0.05)
    told, task = await hub.watch()
    hub.made_up.caller_now = staff("there")
    await asyncio.wait_for(task, 2)
    assert told[-1] == "NOT_FOUND"
    hub.made_up.caller_now = Unavailable("ACCESS_UNCONFIRMED", "x")
    told, task = await hub.watch()
    await asyncio.wait_for(task, 2)
    assert told[-1] == "ACCESS_UNCONFIRMED"
    await hub.close()

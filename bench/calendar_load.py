"""What is asked of the scheduling service alone, at gRPC, beside what its own statements take without it."""

import asyncio
import json
import pickle
import random
import re
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg
import grpc
from care.scheduling.v1 import appointments_pb2, availability_views_pb2, board_pb2
from sqlalchemy import event

from bench.calendar_world import (
    CLINICS,
    HERE,
    MINUTES,
    PRACTITIONERS,
    STAFF,
    VISIT_TYPE,
    WINDOW,
    CalendarWorld,
    clinic_id,
    opening,
    patient_id,
    practitioner_id,
)
from bench.grpc_load import Job, Measured
from bench.workloads import pace
from chassis.bus.postgres import PostgresBus
from chassis.service import Server
from chassis.telemetry import Telemetry
from services.scheduling.service import SERVICE
from system.issuer import TENANT_ID

CONNECTIONS, RIVALS = 16, 16
WARM_UP = 1.5
_DAY = 86_400
_CAPTURED = 32
Requests = list[tuple[str, bytes]]
Statements = list[tuple[str, Sequence[Any]]]


@dataclass(frozen=True)
class Workload:
    """What is asked, how much of it the order of the work asks for, and how the requests are made."""

    name: str
    method: str
    target: str
    floor: float
    make: Callable[["Asking", int], Requests]
    writes: bool = False
    rivals: int = 1


@dataclass
class Run:
    """One run of a workload on both data sets and without the service."""

    rate: float
    p50: float
    p99: float
    service: float
    postgres: float
    client: float
    """CPU-ms per operation; for rivals, per attempt."""
    wrong: int
    limit: float
    """Operations per second of the same statements without the service."""
    limit_postgres: float
    tenth: float
    """CPU-ms per operation of service and PostgreSQL at a tenth of the data."""
    tenth_rate: float
    statements: int
    pace: float


@dataclass
class Result:
    """Medians of the runs of one workload."""

    workload: Workload
    runs: list[Run] = field(default_factory=list)

    def of(self, name: str) -> float:
        """A figure's median."""
        return float(median(getattr(run, name) for run in self.runs))

    @property
    def growth(self) -> float:
        """What an operation costs at ten times the data, in terms of what it costs at one time: of interleaved runs."""
        return float(median((run.service + run.postgres) / run.tenth for run in self.runs))


class Asking:
    """Requests on one data set, made of the same draws for both."""

    def __init__(self, world: CalendarWorld, name: str, seed: int) -> None:
        self.world, self.name, self._tokens = world, name, world.tokens()
        self.random = random.Random(seed)

    def anybody(self) -> str:
        """A token of a member of staff."""
        return self.random.choice(self._tokens)

    def of_clinic(self, clinic: int) -> str:
        """A token of a member of staff who works there."""
        return self._tokens[(clinic - self.random.randrange(5)) % STAFF]

    def search(self, start: int, days: int, clinics: Sequence[str] = (), size: int = 0) -> Any:
        """A search for what is free."""
        asked = appointments_pb2.SearchAvailabilityRequest(visit_type_id=VISIT_TYPE, clinic_ids=clinics, page_size=size)
        asked.start_time.seconds, asked.end_time.seconds = start, start + days * _DAY
        return asked

    def within(self) -> int:
        """A second of the first two days."""
        return int(opening(0, self.world.day)) + 60 * self.random.randrange(2 * 1440)

    def booking(self, slot: int, rival: int = 0, rivals: int = 1) -> tuple[str, bytes]:
        """Asks for a slot that nobody has."""
        practitioner, start = self.world.free_slot(slot)
        patient = self.world.patient_for(slot, self.name, rival, rivals)
        asked = appointments_pb2.CreateAppointmentRequest(
            request_id=str(uuid.uuid4()),
            patient_id=patient_id(patient),
            visit_type_id=VISIT_TYPE,
            clinic_id=clinic_id(practitioner // HERE),
            practitioner_id=practitioner_id(practitioner),
        )
        asked.start_time.seconds = start
        return self.of_clinic(practitioner // HERE), asked.SerializeToString()


def _first_hundred(asking: Asking, _: int) -> Requests:
    return [
        (asking.anybody(), asking.search(asking.within(), WINDOW - 2, size=100).SerializeToString()) for _ in range(200)
    ]


def _counts(asking: Asking, _: int) -> Requests:
    found = []
    for _ in range(200):
        asked = availability_views_pb2.SearchDayCountsRequest()
        asked.search.CopyFrom(asking.search(asking.within(), WINDOW - 2))
        found.append((asking.anybody(), asked.SerializeToString()))
    return found


def _one_day(asking: Asking, _: int) -> Requests:
    found = []
    for _ in range(500):
        clinic, day = asking.random.randrange(CLINICS), asking.random.randrange(WINDOW)
        start = opening(clinic, asking.world.day + timedelta(days=day))
        found.append((asking.anybody(), asking.search(start, 1, [clinic_id(clinic)]).SerializeToString()))
    return found


def _board(asking: Asking, _: int) -> Requests:
    found = []
    for _ in range(500):
        clinic = asking.random.randrange(CLINICS)
        # Every third day at most is as full as today; yesterday is as full as can be.
        day = asking.world.day + timedelta(days=asking.random.randrange(-2, 5))
        asked = board_pb2.ListDayBoardRequest(clinic_id=clinic_id(clinic), date=day.isoformat())
        found.append((asking.of_clinic(clinic), asked.SerializeToString()))
    return found


def _book(asking: Asking, count: int) -> Requests:
    return [asking.booking(slot) for slot in asking.world.slots(count)]


def _contest(asking: Asking, count: int) -> Requests:
    return [asking.booking(slot, rival, RIVALS) for slot in asking.world.slots(count) for rival in range(RIVALS)]


_SERVICE = "/care.scheduling.v1."
WORKLOADS = (
    Workload(
        "first 100 slots, 50 clinics, 28 days",
        f"{_SERVICE}AvailabilityService/SearchAvailability",
        "700/s, p99 60 ms",
        700,
        _first_hundred,
    ),
    Workload(
        "counts by clinic and day, 50 clinics, 28 days",
        f"{_SERVICE}AvailabilityViewsService/SearchDayCounts",
        "150/s",
        150,
        _counts,
    ),
    Workload(
        "one clinic, one day",
        f"{_SERVICE}AvailabilityService/SearchAvailability",
        "1,500/s",
        1500,
        _one_day,
    ),
    Workload("day board", f"{_SERVICE}DayBoardService/ListDayBoard", "500/s", 500, _board),
    Workload("booking", f"{_SERVICE}AppointmentsService/CreateAppointment", "400/s", 400, _book, writes=True),
    Workload(
        "16 rivals a slot",
        f"{_SERVICE}AppointmentsService/CreateAppointment",
        "60 booked/s, loser's p99 50 ms",
        60,
        _contest,
        writes=True,
        rivals=RIVALS,
    ),
)


async def measure(
    world: CalendarWorld, only: Sequence[str], seconds: float, repeats: int, tell: Callable[[Result], None]
) -> list[Result]:
    """All workloads, the runs of each on both data sets and without the service one after the other."""
    chosen = [one for one in WORKLOADS if not only or any(word in one.name for word in only)]
    captured = {one.name: await _capture(world, one) for one in chosen}
    results = {one.name: Result(one) for one in chosen}
    for name in world.targets:  # directories and calendars are read, once
        for one in chosen:
            if not one.writes:
                await _load(world, one, name, WARM_UP, 0)
    for number in range(repeats):
        for one in chosen:
            results[one.name].runs.append(await _run(world, one, captured[one.name], seconds, number))
            tell(results[one.name])
    return list(results.values())


async def _run(
    world: CalendarWorld, workload: Workload, captured: Sequence[Statements], seconds: float, number: int
) -> Run:
    loads = {}
    # Now this one first, now the other: what came before weighs on neither.
    for name in ("whole", "tenth") if number % 2 else ("tenth", "whole"):
        loads[name] = await _load(world, workload, name, seconds, number)
    if workload.rivals > 1:
        limit, limit_postgres = await _rival_limit(world, captured, seconds / 2)
    else:
        limit, limit_postgres = await _limit(world, workload, captured, seconds / 2)
    found, service, postgres = loads["whole"]
    attempts = found.won + found.lost
    tenth, *used = loads["tenth"]
    won_only = workload.rivals == 1
    return Run(
        found.won / found.seconds,
        found.p50 if won_only else found.lost_p50,
        found.p99 if won_only else found.lost_p99,
        1000 * service / max(1, attempts),
        1000 * postgres / max(1, attempts),
        1000 * found.cpu / max(1, attempts),
        found.wrong,
        limit,
        limit_postgres,
        1000 * sum(used) / max(1, tenth.won + tenth.lost),
        tenth.won / tenth.seconds,
        len(captured[0]),
        pace(),
    )


async def _load(
    world: CalendarWorld, workload: Workload, name: str, seconds: float, seed: int
) -> tuple[Measured, float, float]:
    """What the client measured, and CPU seconds of service and PostgreSQL."""
    expected = int(1.6 * workload.floor * (seconds + WARM_UP)) + 64
    job = Job(
        world.targets[name],
        workload.method,
        workload.make(Asking(world, name, seed), expected),
        seconds,
        WARM_UP,
        CONNECTIONS,
        again=not workload.writes,
        rivals=workload.rivals,
    )
    with tempfile.NamedTemporaryFile(prefix="care-bench-") as file:
        file.write(pickle.dumps(job))
        file.flush()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.grpc_load", file.name,
            stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).resolve().parents[1],
        )  # fmt: skip
        assert process.stdout is not None
        if (await process.stdout.readline()).strip() != b"GO":
            raise RuntimeError("the load client failed")
        before = world.used(name)
        answer = await process.stdout.readline()
        if workload.writes:
            await asyncio.sleep(1)  # what the relay still sends belongs to the bookings
        after = world.used(name)
        await process.wait()
    found = Measured(**json.loads(answer))
    if found.wrong > found.won:
        raise RuntimeError(f"{workload.name}: {found.reasons}")
    return found, after[0] - before[0], after[1] - before[1]


# -- the limit --------------------------------------------------------------------------------------------------------


async def _capture(world: CalendarWorld, workload: Workload) -> list[Statements]:
    """What single requests send to the database, each by itself: by the service's own code, in this process."""
    values = {**world.settings("whole", 0), "health_port": 0, "metrics_port": 0}
    with (world.folder / "capture.log").open("a") as log:
        telemetry = Telemetry.create(
            "scheduling", otlp_endpoint=None, environment="development", version="0", log_stream=log
        )
        server = Server(SERVICE, SERVICE.settings(**values), PostgresBus(world.bus_url), telemetry=telemetry)
        await server.start()
        try:
            return await _captured(world, workload, server)
        finally:
            await server.stop()
            await server.bus.stop()


async def _captured(world: CalendarWorld, workload: Workload, server: Server) -> list[Statements]:
    sent: dict[Any, Statements] = {}
    loader, engine = server.database._loader, server.database.engine.sync_engine
    fetch = loader._fetch

    async def noted(sql: str, together: Any) -> Any:
        if "FROM principal" not in sql:  # who a login is, is kept for two seconds
            sent.setdefault("reads", []).append((sql, together[0].arguments))
        return await fetch(sql, together)

    def executed(connection: Any, _cursor: Any, sql: str, arguments: Any, *_more: Any) -> None:
        sent.setdefault(connection, []).append((sql, arguments))

    listeners: list[tuple[str, Callable[..., None]]] = [
        ("before_cursor_execute", executed),
        ("begin", lambda connection: sent.setdefault(connection, []).append(("BEGIN", ()))),
        ("commit", lambda connection: sent.setdefault(connection, []).append(("COMMIT", ()))),
    ]
    loader._fetch = noted  # type: ignore[method-assign]
    for name, hear in listeners:
        event.listen(engine, name, hear)
    found: list[Statements] = []
    requests = workload.make(Asking(world, "whole", 99), 4)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = channel.unary_unary(workload.method)
            # Reads twice: the first time a clinic's calendar is read, too.
            for number in range(4 if workload.writes else 2 * _CAPTURED):
                token, message = requests[number % _CAPTURED * workload.rivals]
                sent.clear()
                await call(message, metadata=(("authorization", token),), timeout=20)
                if not workload.writes:
                    found.append(sent["reads"])
                    continue
                (own,) = [one for one in sent.values() if any("INTO idempotency_key" in sql for sql, _ in one)]
                found.append(own)
    finally:
        for name, hear in listeners:
            event.remove(engine, name, hear)
        del loader._fetch
    return found[-2:] if workload.writes else found[_CAPTURED:]


async def _limit(
    world: CalendarWorld, workload: Workload, captured: Sequence[Statements], seconds: float
) -> tuple[float, float]:
    """(operations per second, PostgreSQL's CPU-ms for each) of sixteen connections that send these statements."""
    if not workload.writes:
        since = await _snapshot(world)
        asked = [[(sql, _since(arguments, since)) for sql, arguments in one] for one in captured]
        return await _sent(world, lambda number: asked[number % len(asked)], seconds)
    slots = world.slots(int(3000 * seconds))
    retold = _Retold(world, captured[0])
    return await _sent(world, lambda number: retold.of(slots[number]), seconds)


async def _snapshot(world: CalendarWorld) -> str:
    db = await asyncpg.connect(world.urls["whole"].replace("+asyncpg", ""))
    try:
        return str(await db.fetchval("SELECT pg_current_snapshot()::text"))
    finally:
        await db.close()


def _since(arguments: Sequence[Any], snapshot: str) -> list[Any]:
    """A look since now: since it was captured much was booked, which the service would have seen look by look."""
    before = next((one for one in arguments if isinstance(one, str) and re.fullmatch(r"\d+:\d+:[\d,]*", one)), None)
    if before is None:
        return list(arguments)
    told = {before: snapshot, int(before.split(":")[0]): int(snapshot.split(":")[0])}
    return [told.get(one, one) if isinstance(one, str | int) else one for one in arguments]


async def _rival_limit(world: CalendarWorld, captured: Sequence[Statements], seconds: float) -> tuple[float, float]:
    """Slots booked per second by sixteen connections that all want the same one, one slot after the other."""
    slots = world.slots(int(600 * seconds))
    retold = _Retold(world, captured[0])
    connections = await _connections(world, writes=True)
    used, began, booked = world.used("whole")[1], time.perf_counter(), 0
    try:
        for slot in slots:
            if time.perf_counter() - began > seconds:
                break
            won = await asyncio.gather(
                *(one.run(retold.of(slot, rival, RIVALS)) for rival, one in enumerate(connections))
            )
            booked += sum(won)
    finally:
        took = time.perf_counter() - began
        await asyncio.gather(*(one.db.close() for one in connections))
    return booked / took, 1000 * (world.used("whole")[1] - used) / max(1, booked * RIVALS)


async def _sent(world: CalendarWorld, make: Callable[[int], Statements], seconds: float) -> tuple[float, float]:
    count, stopped = 0, False
    connections = await _connections(world, writes=make(0)[0][0] == "BEGIN")

    async def work(one: "_Connection") -> None:
        nonlocal count
        while not stopped:
            count += 1
            await one.run(make(count - 1))

    try:
        working = [asyncio.create_task(work(one)) for one in connections]
        await asyncio.sleep(0.5)
        before, began, used = count, time.perf_counter(), world.used("whole")[1]
        await asyncio.sleep(seconds)
        done, took, used = count - before, time.perf_counter() - began, world.used("whole")[1] - used
        stopped = True
        await asyncio.gather(*working)
    finally:
        await asyncio.gather(*(one.db.close() for one in connections))
    return done / took, 1000 * used / max(1, done)


async def _connections(world: CalendarWorld, *, writes: bool) -> list["_Connection"]:
    settings = {"jit": "off", "timezone": "UTC"} | ({} if writes else {"plan_cache_mode": "force_generic_plan"})
    url = world.urls["whole"].replace("+asyncpg", "")
    return [_Connection(await asyncpg.connect(url, server_settings=settings)) for _ in range(CONNECTIONS)]


class _Connection:
    """A connection with its prepared statements."""

    def __init__(self, db: Any) -> None:
        self.db = db
        self._prepared: dict[str, Any] = {}

    async def run(self, statements: Statements) -> bool:
        """Send them one after the other; whether each found its rows to be had (a lost race ends in a rollback)."""
        lost = False
        for sql, arguments in statements:
            if sql in ("BEGIN", "COMMIT"):
                await self.db.execute("ROLLBACK" if lost and sql == "COMMIT" else sql)
                continue
            prepared = self._prepared.get(sql)
            if prepared is None:
                prepared = self._prepared[sql] = await self.db.prepare(sql)
            if lost:
                continue
            rows = await prepared.fetch(*arguments)
            lost = "INTO occupancy" in sql and len(rows) < 2
        return not lost


class _Retold:
    """A captured booking told anew for another slot and patient."""

    def __init__(self, world: CalendarWorld, captured: Statements) -> None:
        self._world, self._captured = world, captured
        (find,) = [arguments for sql, arguments in captured if "INTO bookable" in sql]
        known = {str(value) for value in find if isinstance(value, str | uuid.UUID)}
        numbers = {practitioner_id(n): n for n in range(PRACTITIONERS)}
        self._practitioner = next(numbers[one] for one in known if one in numbers)
        patient = next(one for one in known if one.startswith(patient_id(0)[:8]))
        self._patient = int(patient[-12:], 16)
        self._start = next(value for value in find if isinstance(value, int) and value > 1_000_000_000)
        (key,) = [arguments for sql, arguments in captured if "INTO idempotency_key" in sql]
        self._once = {str(value) for value in key if isinstance(value, str) and len(value) == 36} - known
        self._once |= _ids(captured) - known - set(numbers)
        self._kept = {VISIT_TYPE, *(clinic_id(n) for n in range(CLINICS))}

    def of(self, slot: int, rival: int = 0, rivals: int = 1) -> Statements:
        """The statements that would book it."""
        practitioner, start = self._world.free_slot(slot)
        patient = self._world.patient_for(slot, "whole", rival, rivals)
        told: dict[Any, Any] = {
            patient_id(self._patient): patient_id(patient),
            practitioner_id(self._practitioner): practitioner_id(practitioner),
            clinic_id(self._practitioner // HERE): clinic_id(practitioner // HERE),
            PRACTITIONERS + 1 + self._patient: PRACTITIONERS + 1 + patient,
            self._practitioner + 1: practitioner + 1,
            self._start: start,
            self._start + 60 * MINUTES: start + 60 * MINUTES,
            **{
                datetime.fromtimestamp(self._start + more, UTC): datetime.fromtimestamp(start + more, UTC)
                for more in (0, 60 * MINUTES)
            },
            **{one: str(uuid.uuid4()) for one in self._once - self._kept},
        }
        return [(sql, _again(arguments, told)) for sql, arguments in self._captured]


def _ids(statements: Statements) -> set[str]:
    """Ids that a booking makes for its rows."""
    return {
        str(value)
        for sql, arguments in statements
        if sql.startswith("INSERT INTO appointment") or "INTO audit" in sql
        for value in arguments
        if (isinstance(value, uuid.UUID) or (isinstance(value, str) and len(value) == 36)) and str(value)[14] == "7"
    } - {TENANT_ID}


def _again(value: Any, told: Mapping[Any, Any]) -> Any:
    if isinstance(value, list | tuple):
        return [_again(one, told) for one in value]
    if isinstance(value, uuid.UUID):
        return uuid.UUID(told.get(str(value), str(value)))
    if isinstance(value, bool | bytes) or value is None:
        return value
    return told.get(value, value)


__all__: Sequence[str] = ["Result", "Run", "Workload", "measure"]

"""The workloads, each measured once per call; repeats and medians are the caller's."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import asyncpg
import httpx2

from bench import cpu
from bench.client import Client
from bench.data import STAFF_CLINICS
from bench.world import CLINICS, STAFF, World
from bench.wrk import Load, Scripts, run
from system.process import LOOPBACK, free_port

WARM_UP = 3.0
RIVALS = 16


@dataclass
class Figure:
    """One measured run."""

    name: str
    rate: float
    p50: float
    p99: float
    """Milliseconds."""
    cpu: dict[str, float] = field(default_factory=dict)
    """CPU-ms per operation by group."""
    refused: int = 0
    broken: int = 0
    more: dict[str, float] = field(default_factory=dict)
    """Further figures by name."""
    pace: float = field(default_factory=lambda: pace())
    """Milliseconds that this very Python took for a million additions, right after the run."""


def middle(figures: list[Figure]) -> Figure:
    """Medians of repeats of one workload; refusals are added up."""
    first = figures[0]
    return Figure(
        first.name,
        median(each.rate for each in figures),
        median(each.p50 for each in figures),
        median(each.p99 for each in figures),
        {group: median(each.cpu[group] for each in figures) for group in first.cpu},
        sum(each.refused for each in figures),
        sum(each.broken for each in figures),
        {name: median(each.more[name] for each in figures) for name in first.more},
        median(each.pace for each in figures),
    )


def pace() -> float:
    """A shared machine's cores run at changing speed; this says at which they ran."""
    began, total = time.process_time(), 0
    for number in range(1_000_000):
        total += number
    return (time.process_time() - began) * 1000


def _percentiles(milliseconds: list[float]) -> tuple[float, float]:
    if len(milliseconds) < 2:
        return (milliseconds or [0.0])[0], (milliseconds or [0.0])[0]
    cuts = quantiles(milliseconds, n=100, method="inclusive")
    return cuts[49], cuts[98]


async def _counted(
    world: World, name: str, load: Load, before: dict[str, float], *, drain: bool, pid: int | None
) -> Figure:
    more: dict[str, float] = {}
    at_end = cpu.used(world.system, pid)
    if drain:  # what the bookings set off in other services belongs to them
        more["drained after s"] = await cpu.settled(world.system)
        more["CPU-ms/op until the answer"] = sum(at_end.values()) - sum(before.values())
        more["CPU-ms/op until the answer"] *= 1000 / max(1, load.requests)
    after = cpu.used(world.system, pid)
    per_op = {group: (after[group] - before[group]) * 1000 / max(1, load.requests) for group in cpu.GROUPS}
    return Figure(name, load.rate, load.p50, load.p99, per_op, load.refused, load.broken, more)


# -- summary ----------------------------------------------------------------------------------------------------------


async def check_summary(world: World) -> None:
    """Raises RuntimeError unless a summary is whole: figures of degraded answers would be worth nothing."""
    token = world.tokens(1)[0]
    async with httpx2.AsyncClient(timeout=10, trust_env=False, headers={"authorization": f"Bearer {token}"}) as http:
        # By heartbeat each service first makes sure that it knows who may see whom.
        for _ in range(40):
            answer = await http.get(f"{world.system.url}/v1/patients/{world.patient(0)}/summary")
            if answer.status_code == 200 and "degraded" not in answer.json():
                break
            await asyncio.sleep(0.5)
    body = answer.json()
    if answer.status_code != 200 or "degraded" in body:
        raise RuntimeError(
            f"a summary answers {answer.status_code}, degraded: {body.get('degraded')} {body.get('error')}"
        )
    parts = {
        f"{section}.{part}": len(rows)
        for section, found in body.items()
        if isinstance(found, dict)
        for part, rows in found.items()
        if isinstance(rows, list) and section != "patient"
    }
    print(f"  a summary has {len(answer.content):,} bytes: {parts}", flush=True)


async def summary(
    world: World,
    scripts: Scripts,
    name: str,
    *,
    tokens: int,
    seconds: float,
    seed: int,
    url: str = "",
    pid: int | None = None,
) -> Figure:
    """Random patients with `tokens` tokens in turn."""
    script = scripts.summary(
        world.tokens(tokens),
        clinics=CLINICS,
        staff_clinics=STAFF_CLINICS,
        per_clinic=world.data.patients // CLINICS,
        seed=seed,
    )
    url = url or world.system.url
    await run(url, script, WARM_UP)
    before = cpu.used(world.system, pid)
    load = await run(url, script, seconds)
    return await _counted(world, name, load, before, drain=False, pid=pid)


# -- book -------------------------------------------------------------------------------------------------------------


async def book(world: World, scripts: Scripts, *, seconds: float) -> Figure:
    """Every request another slot and another patient."""
    expected = int(900 * seconds) + 16
    tokens = world.tokens(STAFF)
    await run(world.system.url, _booking_script(world, scripts, tokens, int(900 * WARM_UP)), WARM_UP)
    script = _booking_script(world, scripts, tokens, expected)
    await cpu.settled(world.system)
    before = cpu.used(world.system)
    load = await run(world.system.url, script, seconds)
    return await _counted(world, "book", load, before, drain=True, pid=None)


def _booking_script(world: World, scripts: Scripts, tokens: list[str], count: int) -> Path:
    def bodies() -> list[tuple[int, bytes]]:
        found = []
        for slot in world.slots(count):
            patient = world.patient_at(slot)
            found.append((world.staff_of(patient), world.booking(slot, patient)))
        return found

    return scripts.bookings(tokens, bodies())


async def contested(world: World, *, seconds: float) -> Figure:
    """Sixteen rivals, each for another patient, ask for one slot at the same moment; the next when all are answered."""
    tokens = world.tokens(STAFF)
    won: list[float] = []
    lost: list[float] = []
    wrong = 0
    async with Client(world.system.url, RIVALS) as client:

        async def one(request: bytes) -> None:
            nonlocal wrong
            began = time.perf_counter()
            status, body = await client.send(request)
            took = (time.perf_counter() - began) * 1000
            if status == 200:
                won.append(took)
            elif status == 409 and b"SLOT_TAKEN" in body:
                lost.append(took)
            else:
                wrong += 1

        async def rounds(until: float) -> int:
            count = 0
            while time.perf_counter() < until:
                slot = world.slots(1)[0]
                requests = []
                for rival in range(RIVALS):
                    # Another patient each, so that it is the practitioner's time alone that they fight for.
                    patient = world.patient_at(slot, rival, RIVALS)
                    token, body = tokens[world.staff_of(patient)], world.booking(slot, patient)
                    requests.append(client.request("POST", "/v1/appointments", token, body))
                await asyncio.gather(*map(one, requests))
                count += 1
            return count

        await rounds(time.perf_counter() + WARM_UP)
        won.clear(), lost.clear()
        wrong = 0
        await cpu.settled(world.system)
        before = cpu.used(world.system)
        began = time.perf_counter()
        count = await rounds(began + seconds)
        took = time.perf_counter() - began
        await cpu.settled(world.system)
        after = cpu.used(world.system)
    attempts = count * RIVALS
    p50, p99 = _percentiles(lost)
    winner50, winner99 = _percentiles(won)
    return Figure(
        "16 rivals a slot",
        len(won) / took,
        p50,
        p99,
        {group: (after[group] - before[group]) * 1000 / attempts for group in cpu.GROUPS},
        wrong,
        0,
        {
            "attempts/s": attempts / took,
            "winner p50 ms": winner50,
            "winner p99 ms": winner99,
            "slots without one winner": float(count - len(won)),
        },
    )


# -- lag --------------------------------------------------------------------------------------------------------------


async def lag(world: World, *, seconds: float, rate: float = 100.0) -> Figure:
    """Bookings at a steady pace; milliseconds from a booking's commit to the commit of its reminders.

    Both by the server's clock (`pg_xact_commit_timestamp`), the reminders by one that nothing has changed since.
    """
    tokens = world.tokens(STAFF)
    ids: list[str] = []
    wrong = 0

    async with Client(world.system.url, 64) as client:

        async def one(request: bytes, keep: bool) -> None:
            nonlocal wrong
            status, body = await client.send(request)
            if status != 200:
                wrong += 1
            elif keep:
                ids.append(json.loads(body)["id"])

        async def pace(length: float, keep: bool) -> None:
            count = int(length * rate)
            slots = world.slots(count)
            began, tasks = time.perf_counter(), []
            for number, slot in enumerate(slots):
                patient = world.patient_at(slot)
                staff, body = world.staff_of(patient), world.booking(slot, patient)
                wait = began + number / rate - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                request = client.request("POST", "/v1/appointments", tokens[staff], body)
                tasks.append(asyncio.create_task(one(request, keep)))
            await asyncio.gather(*tasks)

        await pace(WARM_UP, False)
        wrong = 0
        before = cpu.used(world.system)
        began = time.perf_counter()
        await pace(seconds, True)
        took = time.perf_counter() - began
        await cpu.settled(world.system)
        after = cpu.used(world.system)
    booked = await _commits(
        world,
        "scheduling",
        "SELECT id, pg_xact_commit_timestamp(xmin) AS time FROM appointment WHERE id = ANY($1)",
        ids,
    )
    told = await _commits(
        world,
        "notifications",
        "SELECT appointment_id AS id, min(pg_xact_commit_timestamp(xmin)) AS time FROM reminder"
        " WHERE appointment_id = ANY($1) AND status = 'ACTIVE' GROUP BY 1",
        ids,
    )
    waits = [(told[one] - booked[one]).total_seconds() * 1000 for one in ids if one in told]  # type: ignore[operator]
    p50, p99 = _percentiles(waits)
    return Figure(
        f"commit to reminder row, {rate:.0f}/s",
        len(ids) / took,
        p50,
        p99,
        {group: (after[group] - before[group]) * 1000 / max(1, len(ids)) for group in cpu.GROUPS},
        wrong,
        len(ids) - len(waits),
        {"longest ms": max(waits, default=0.0)},
    )


async def _commits(world: World, service: str, query: str, ids: list[str]) -> dict[str, object]:
    db = await asyncpg.connect(world.system.database_url(service).replace("+asyncpg", ""))
    try:
        return {str(row["id"]): row["time"] for row in await db.fetch(query, ids)}
    finally:
        await db.close()


# -- start ------------------------------------------------------------------------------------------------------------


def start_times(folder: Path) -> list[float]:
    """Seconds from the command `care up` to the first 200 of /readyz, with the sample tenant: cold, then warm twice."""
    return [_start_once(folder) for _ in range(3)]


def _start_once(folder: Path) -> float:
    port = free_port()
    command = [
        sys.executable,
        "-c",
        "from system.cli import main; main()",
        "up",
        "--data",
        str(folder),
        "--port",
        str(port),
    ]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        while process.poll() is None and time.perf_counter() - began < 120:
            if _ready(port):
                took = time.perf_counter() - began
                assert process.stdout is not None
                process.stdout.readline()  # "Ready in …", once the sample is in
                return took
            time.sleep(0.05)
        raise RuntimeError("`care up` does not get ready")
    finally:
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)


def _ready(port: int) -> bool:
    try:
        with socket.create_connection((LOOPBACK, port), 0.2) as link:
            link.settimeout(2)
            link.sendall(b"GET /readyz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return link.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False

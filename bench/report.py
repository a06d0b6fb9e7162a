"""What was measured as a table, and as docs/performance.md."""

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import psutil

from bench.calendar_load import Result
from bench.workloads import Figure

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "performance.md"
_BEGIN, _END = "<!-- measured: begin -->", "<!-- measured: end -->"
_CALENDAR = "<!-- calendar: begin -->", "<!-- calendar: end -->"
FLOORS = {
    "summary, 50 tokens": "300/s",
    "book": "250/s",
    "16 rivals a slot": "60 booked/s, loser's p99 < 100 ms",
    "commit to reminder row, 100/s": "p99 < 100 ms",
}


def table(figures: list[Figure]) -> str:
    """A Markdown table; milliseconds, and CPU-ms per operation by group of processes."""
    lines = [
        "| workload | per second | p50 ms | p99 ms | CPU-ms/op | gateway | services | postgres | kafka | not 2xx | pace | first floor |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in figures:
        groups = " | ".join(f"{each.cpu.get(name, 0):.2f}" for name in ("gateway", "services", "postgres", "kafka"))
        lines.append(
            f"| {each.name} | {each.rate:,.0f} | {each.p50:.1f} | {each.p99:.1f} | {sum(each.cpu.values()):.2f} | {groups} |"
            f" {each.refused + each.broken} | {each.pace:.0f} | {FLOORS.get(each.name, '')} |"
        )
    return "\n".join(lines)


def remarks(figures: list[Figure]) -> str:
    """The further figures, one line per workload."""
    return "\n".join(
        f"- {each.name}: " + ", ".join(f"{name} {value:,.1f}" for name, value in each.more.items())
        for each in figures
        if each.more
    )


def calendar(results: Sequence[Result]) -> str:
    """A Markdown table of what is asked of the scheduling service alone."""
    lines = [
        "| workload | target | per second | p50 ms | p99 ms | CPU-ms/op | service | postgres | client | statements | "
        "without the service, per second | ratio | its postgres CPU-ms | at ten times the data | not answered | pace |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results:
        of = one.of
        lines.append(
            f"| {one.workload.name} | {one.workload.target} | {of('rate'):,.0f} | {of('p50'):.1f} | {of('p99'):.1f} |"
            f" {of('service') + of('postgres'):.2f} | {of('service'):.2f} | {of('postgres'):.2f} | {of('client'):.2f} |"
            f" {of('statements'):.0f} | {of('limit'):,.0f} | {of('rate') / max(of('limit'), 1e-9):.2f} |"
            f" {of('limit_postgres'):.2f} | x {one.growth:.2f} | {sum(run.wrong for run in one.runs)} | {of('pace'):.0f} |"
        )
    return "\n".join(lines)


def write_calendar(command: str, results: Sequence[Result]) -> None:
    """Replace the table of the scheduling service in docs/performance.md."""
    begin, end = _CALENDAR
    part = "\n\n".join([begin, f"Measured on {machine()}, by `{command}`:", calendar(results), end])
    before, _, rest = FILE.read_text().partition(begin)
    FILE.write_text(before + part + rest.partition(end)[2])


def machine() -> str:
    """What it ran on and what was measured."""
    model = next(
        (line.split(":", 1)[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.machine(),
    )
    memory = psutil.virtual_memory().total / 2**30
    changed = "; with changes not committed" if _git("status", "--porcelain", "--untracked-files=no") else ""
    return (
        f"{os.cpu_count()} cores ({model}), {memory:.0f} GB, Python {platform.python_version()}, "
        f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC, commit {_git('rev-parse', '--short', 'HEAD')}{changed}"
    )


def write(command: str, figures: list[Figure], notes: list[str]) -> None:
    """Replace the measured part of docs/performance.md; the text around it stays."""
    part = "\n\n".join(
        [
            _BEGIN,
            f"Measured on {machine()}, by `{command}`:",
            table(figures),
            "\n".join([remarks(figures), *(f"- {note}" for note in notes)]).strip(),
            _END,
        ]
    )
    old = FILE.read_text() if FILE.exists() else _FIRST
    before, _, rest = old.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(before + part + (after or "\n"))


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown" if arguments[0] == "rev-parse" else found.stdout.strip()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


_FIRST = f"""# Performance

`make bench` starts the whole system as it runs in production, on one machine: six processes, a real Apache Kafka, PostgreSQL
with fsync on (and `shared_buffers` of 4 GB); authentication, validation and audit are on, no collector takes spans. The data
set: 100,000 patients, 1,000,000 appointments with their occupancy, 200,000 referrals, 300,000 messages, 100,000 survey answers
and tasks; it is loaded once (some minutes) and kept in `.cache/bench`. The load comes from wrk (16 connections, one thread) on
the same cores. Each figure is the median of three interleaved runs after three seconds of warm-up. CPU-ms per operation is user
and system time of a group's processes; for bookings it includes everything that their events set off in other services.
*Pace* is the milliseconds that a million additions in Python took right after a run: shared cores run at changing speed
(30 when nobody else is there), and CPU-ms and rates go with it. An interpreter
that was built without profile-guided optimization takes a third more: the figures are Debian's python3.11.

- *summary*: `GET /v1/patients/{{id}}/summary` of random patients, 50 tokens in turn; also with one token, and with each leg
  as an RPC of its own (`CARE_BATCH_LEGS=false`).
- *book*: `POST /v1/appointments`, another slot and patient each time; practitioner and patient are taken.
- *16 rivals a slot*: sixteen clients ask for one slot at the same moment, the next slot when all are answered. Per second:
  bookings; latencies: the losers'.
- *commit to reminder row*: bookings at 25 and at 100 per second; from the booking's commit to the commit of its reminders in the
  database of notifications, over outbox, relay, Kafka and consumer, both by PostgreSQL's commit timestamps.

{_BEGIN}
{_END}

## What the figures say
The first floors are not reached: a summary by a factor of two, a booking by more than three, and with it all that is asked at a
hundred bookings a second, which is more than this machine books. Time goes into Python in small pieces: a statement costs
0.1 to 0.3 CPU-ms in the client whoever sends it, an event that is handled alone five to six statements, and each booking sets
off two events in patients, one in referrals and feedback each, a message with its own checks, claims and outcome. Batching
halves what a summary costs; the same would help events, which are still applied one transaction each.
"""

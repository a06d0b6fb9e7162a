"""Puts another system's visits in through the gateway, row by row, and says what became of each by its line."""

import asyncio
import bisect
import csv
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table

from system.importing.bundles import Json
from system.importing.client import GatewayClient, Refused, Stopped
from system.importing.visits_file import Reading, VisitRow, read_visits

AT_ONCE = 8
_WAITING = 32  # rows read ahead of each lane
_SHOWN = 200  # lines on the screen; the rest is in the file
IMPORTED, THERE, REFUSED = "imported", "already there", "refused"


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What became of a row, or would: outcome, reason and field of a refusal, a note, the appointment's id."""

    line: int
    number: int
    outcome: str
    reason: str = ""
    field: str = ""
    what: str = ""
    appointment_id: str = ""

    def place(self) -> str:
        """How the row is named."""
        return f"line {self.line}" + (f", visit {self.number} of its rule" if self.number else "")


@dataclass(slots=True)
class VisitsReport:
    """Filled by `load_visits`. `stopped` says why it ended before its end."""

    rows: list[RowOutcome] = field(default_factory=list)
    stopped: str = ""

    def exit_status(self) -> int:
        """0: all is in. 1: something is refused or not tried. 2: it could not start."""
        if self.stopped and not self.rows:
            return 2
        return 1 if self.stopped or any(row.outcome == REFUSED for row in self.rows) else 0

    def print(self, console: Console, dry_run: bool) -> None:
        """Counts, and the lines that somebody should look at. No value of a visit."""
        self.rows.sort(key=lambda row: (row.line, row.number))
        told = [row for row in self.rows if row.outcome == REFUSED or row.what]
        for row in told[:_SHOWN]:
            if row.outcome == REFUSED:
                where = f" ({row.field})" if row.field else ""
                console.print(
                    f"[red]refused[/] {escape(f'{row.place()}: {row.reason}{where}: {row.what}')}", soft_wrap=True
                )
            else:
                console.print(f"[yellow]note[/] {escape(f'{row.place()}: {row.outcome}, {row.what}')}", soft_wrap=True)
        if len(told) > _SHOWN:
            console.print(f"… and {len(told) - _SHOWN} more; --report FILE has every row")
        counts = Counter(row.outcome for row in self.rows)
        table = Table("Outcome", "visits", title="Would become" if dry_run else "Became", title_justify="left")
        for outcome in (IMPORTED, THERE, REFUSED):
            table.add_row(outcome, str(counts[outcome]))
        console.print(table)
        for reason, count in Counter(row.reason for row in self.rows if row.reason).most_common():
            console.print(f"  {count} x {escape(reason)}")
        if self.stopped:
            console.print(
                f"[red]stopped[/] {escape(self.stopped)}. What is in stays; run it again to go on.", soft_wrap=True
            )

    def write(self, path: Path) -> None:
        """Every row as CSV."""
        self.rows.sort(key=lambda row: (row.line, row.number))
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("line", "visit", "outcome", "reason", "field", "what", "appointment"))
            writer.writerows(
                (row.line, row.number or "", row.outcome, row.reason, row.field, row.what, row.appointment_id)
                for row in self.rows
            )


@dataclass(slots=True)
class _Taken:
    """What the rows of a dry run would take: the service sees only what stands there already."""

    of: dict[str, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    identifiers: set[str] = field(default_factory=set)

    def free(self, who: str, start: str, end: str) -> bool:
        """Whether nothing of the file is there. Times are written alike, so that text sorts as they do."""
        spans = self.of[who]
        at = bisect.bisect(spans, (start, end))
        return not ((at and spans[at - 1][1] > start) or (at < len(spans) and spans[at][0] < end))

    def take(self, who: str, start: str, end: str) -> None:
        """From here on something is there."""
        bisect.insort(self.of[who], (start, end))


def check_visits(path: Path, reading: Reading) -> int:
    """Reads the whole file before anything is sent; answers how many rows it has. Raises FileBroken."""
    return sum(1 for _ in read_visits(path, reading))


async def load_visits(
    path: Path,
    reading: Reading,
    client: GatewayClient,
    report: VisitsReport,
    *,
    past: str = "",
    at_once: int = AT_ONCE,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> None:
    """Sends every row; each is in or isn't by itself, and a second run finds the first one's.

    Rows of one practitioner go one after the other, so that of two at the same time the first of the file is in. `past`
    (FULFILLED, NOSHOW or CANCELLED) is what became of visits that are over and of which the file says no more than that
    they were booked. Raises FileBroken before anything is sent.
    """
    progress = progress or Progress(disable=True)
    total = await asyncio.to_thread(check_visits, path, reading)
    bar = progress.add_task("Trying" if dry_run else "Importing", total=total)
    lanes: list[asyncio.Queue[VisitRow | None]] = [asyncio.Queue(_WAITING) for _ in range(at_once)]
    taken = _Taken()

    async def work(lane: asyncio.Queue[VisitRow | None]) -> None:
        while (row := await lane.get()) is not None:
            report.rows.append(await _sent(client, row, past, taken if dry_run else None))
            progress.advance(bar)

    async def feed() -> None:
        rows: Iterator[VisitRow] = read_visits(path, reading)
        while (row := await asyncio.to_thread(next, rows, None)) is not None:
            if row.refusal is not None:
                report.rows.append(
                    RowOutcome(row.line, row.number, REFUSED, row.refusal.reason, row.refusal.field, row.refusal.what)
                )
                progress.advance(bar)
            else:
                await lanes[_lane(row.record, at_once)].put(row)
        for lane in lanes:
            await lane.put(None)

    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(feed())
            for lane in lanes:
                group.create_task(work(lane))
    except* Stopped as stopped:
        report.stopped = str(stopped.exceptions[0])


def _lane(record: Json, lanes: int) -> int:
    whose = record.get("practitionerId") or record["practitionerIdentifier"]["value"]
    return zlib.crc32(whose.encode()) % lanes


async def _sent(client: GatewayClient, row: VisitRow, past: str, taken: _Taken | None) -> RowOutcome:
    body = row.record | ({"validateOnly": True} if taken is not None else {})
    try:
        answer = await _posted(client, body, past)
    except Refused as refused:
        return RowOutcome(
            row.line, row.number, REFUSED, refused.reason or str(refused.code), refused.field, refused.said
        )
    if answer.get("outcome") == "ALREADY_THERE":
        what = "but not as the file has it; change it by hand" if answer.get("differs") else ""
        return RowOutcome(row.line, row.number, THERE, what=what, appointment_id=answer.get("appointmentId", ""))
    if taken is not None and (other := _against_the_file(answer, row, taken)) is not None:
        return other
    what = "outside of the practitioner's hours" if answer.get("outsideHours") else ""
    return RowOutcome(row.line, row.number, IMPORTED, what=what, appointment_id=answer.get("appointmentId", ""))


async def _posted(client: GatewayClient, body: Json, past: str) -> Json:
    try:
        return await client.post("/v1/appointments:import", body)
    except Refused as refused:
        if refused.reason != "STATUS_UNFIT" or body["status"] != "BOOKED" or not past:
            raise
        return await client.post("/v1/appointments:import", body | {"status": past})


def _against_the_file(answer: Json, row: VisitRow, taken: _Taken) -> RowOutcome | None:
    """What an earlier row of the file would leave of this one in a dry run; rooms only the service can tell."""
    if (identifier := row.record["identifier"]) in taken.identifiers:
        return RowOutcome(row.line, row.number, THERE, what="an earlier row has the same identifier")
    if answer.get("status") == "BOOKED":
        span = answer["startTime"], answer["endTime"]
        for who, reason in (("practitionerId", "SLOT_TAKEN"), ("patientId", "PATIENT_BUSY")):
            if not taken.free(answer[who], *span):
                return RowOutcome(
                    row.line, row.number, REFUSED, reason, what="an earlier row of the file has this time"
                )
        for who in ("practitionerId", "patientId"):
            taken.take(answer[who], *span)
    taken.identifiers.add(identifier)
    return None

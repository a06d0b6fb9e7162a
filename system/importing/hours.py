"""Weekly hours out of a CSV file: a block a line, all of a practitioner's at a clinic together.

Columns: `practitioner` and `clinic` (an identifier that each has here, of `practitioner_system` and `clinic_system`: NPI's
and the importer's usual one if absent, `id` for our own ids), `weekday` (Mo … Su, or Mo-Fr), `from` and `to` (09:00; an
end not after the start is on the next day), and if wanted `visit_types` (codes parted by `;`; all if empty), `valid_from`
and `valid_until` (2027-03-02), `staff_only` (yes or no), `release_hours`.

What the file has of a practitioner at a clinic replaces all weekly hours there; days that differ stay, and so do quotas of
a block whose weekday and times stay. All is checked and tried before anything is set.
"""

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from system.importing.bundles import NPI, SYNTHEA, Json, Key
from system.importing.client import GatewayClient, Refused, Stopped
from system.importing.load import same
from system.importing.visits_file import NUMBER, OWN_ID, FileBroken

_NEEDED = ("practitioner", "clinic", "weekday", "from", "to")
_COLUMNS = (
    *_NEEDED, "practitioner_system", "clinic_system", "visit_types", "valid_from", "valid_until", "staff_only", "release_hours",
)  # fmt: skip
_DAYS = ("mo", "tu", "we", "th", "fr", "sa", "su")
_CLOCK = re.compile(r"([01]?\d|2[0-3]):[0-5]\d")
_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Block:
    """One line: proto3 JSON of `Schedule.WeeklyHours` for each of its weekdays, visit types still by code."""

    line: int
    practitioner: Key
    clinic: Key
    hours: tuple[Json, ...]
    visit_types: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Seat:
    """What became of a practitioner's hours at a clinic, or would, and which visits they leave outside."""

    lines: tuple[int, ...]
    outcome: str
    left: int = 0
    visits: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class HoursReport:
    """Filled by `load_hours`; `problems` are (line, what), and with any of them nothing was set."""

    seats: list[Seat] = field(default_factory=list)
    problems: list[tuple[int, str]] = field(default_factory=list)
    stopped: str = ""

    def exit_status(self) -> int:
        """0: all is set. 1: something is refused or not tried. 2: it could not start."""
        if self.stopped and not self.seats and not self.problems:
            return 2
        return 1 if self.stopped or self.problems else 0

    def print(self, console: Console, dry_run: bool) -> None:
        """What became of each, and the visits that stand outside."""
        for line, what in sorted(self.problems):
            console.print(f"[red]refused[/] {escape(f'line {line}: {what}')}", soft_wrap=True)
        if self.problems:
            console.print("Nothing was set; mend these lines and run it again.")
        for seat in self.seats:
            lines = ", ".join(map(str, seat.lines))
            console.print(f"lines {lines}: {'would be ' if dry_run else ''}{seat.outcome}", soft_wrap=True)
            if seat.left:
                console.print(f"  {seat.left} visits {'would stand' if dry_run else 'stand'} outside, none is moved:")
                for appointment_id, at in seat.visits[:_SHOWN]:
                    console.print(f"  {at}  {appointment_id}", highlight=False)
                if seat.left > _SHOWN:
                    console.print(f"  … and {seat.left - _SHOWN} more")
        if self.stopped:
            console.print(f"[red]stopped[/] {escape(self.stopped)}. What is set stays; run it again to go on.")


def read_hours(path: Path) -> tuple[list[Block], list[tuple[int, str]]]:
    """The blocks of a file and what is wrong in it, by line. Raises FileBroken where it is no such file."""
    blocks: list[Block] = []
    problems: list[tuple[int, str]] = []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, strict=True, skipinitialspace=True)
            header = [str(name).strip() for name in rows.fieldnames or ()]
            rows.fieldnames = header
            if missing := [name for name in _NEEDED if name not in header]:
                raise FileBroken(f"{path.name}, line 1: has no column {', '.join(missing)}")
            if unknown := sorted(set(header) - set(_COLUMNS)):
                raise FileBroken(f"{path.name}, line 1: has a column that means nothing: {', '.join(unknown)}")
            for row in rows:
                line = rows.line_num
                if None in row or None in row.values():
                    problems.append((line, "has not as many columns as the header"))
                    continue
                try:
                    blocks.append(_block(line, {name: value.strip() for name, value in row.items()}))
                except ValueError as wrong:
                    problems.append((line, str(wrong)))
    except csv.Error:
        raise FileBroken(f"{path.name}: is no CSV, such as a quote that doesn't end") from None
    except UnicodeDecodeError:
        raise FileBroken(f"{path.name}: is not text in UTF-8; save it as such") from None
    except OSError as error:
        raise FileBroken(f"{path.name}: {error.strerror or 'can not be read'}") from None
    if not blocks and not problems:
        raise FileBroken(f"{path.name}: holds no hours")
    return blocks, problems


def _block(line: int, row: Mapping[str, str]) -> Block:
    """Raises ValueError with what to do."""
    for name in _NEEDED:
        if not row[name]:
            raise ValueError(f"has no {name}")
    times = []
    for name in ("from", "to"):
        if not _CLOCK.fullmatch(row[name]):
            raise ValueError(f"{name}: write times as 09:00, up to 23:59")
        times.append(row[name].zfill(5))
    hours: Json = {"start": times[0], "end": times[1]}
    for name, column in (("validFrom", "valid_from"), ("validUntil", "valid_until")):
        if row.get(column):
            hours[name] = _day(row[column], column)
    if row.get("staff_only", "").lower() not in ("", "yes", "no"):
        raise ValueError("staff_only: write yes or no")
    if row.get("staff_only", "").lower() == "yes":
        hours["staffOnly"] = True
    if held := row.get("release_hours", ""):
        if not (NUMBER.fullmatch(held) and int(held) <= 8760):
            raise ValueError("release_hours: write a number of hours up to 8760")
        hours["releaseHours"] = int(held)
    return Block(
        line,
        Key(row.get("practitioner_system") or NPI, row["practitioner"]),
        Key(row.get("clinic_system") or SYNTHEA, row["clinic"]),
        tuple({"weekday": day, **hours} for day in _weekdays(row["weekday"])),
        tuple(code.strip() for code in row.get("visit_types", "").split(";") if code.strip()),
    )


def _day(text: str, name: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise ValueError(f"{name}: write days as 2027-03-02") from None


def _weekdays(text: str) -> list[int]:
    ends = [one.strip().lower()[:2] for one in text.split("-")]
    if len(ends) > 2 or not set(ends) <= set(_DAYS):
        raise ValueError("weekday: write Mo, Tu, We, Th, Fr, Sa or Su, or a span such as Mo-Fr")
    first, last = _DAYS.index(ends[0]), _DAYS.index(ends[-1])
    return [number % 7 + 1 for number in range(first, last + 1 if last >= first else last + 8)]


async def load_hours(
    path: Path, client: GatewayClient, report: HoursReport, *, dry_run: bool = False, progress: Progress | None = None
) -> None:
    """Sets the hours of a file: all lines are checked and all hours tried first. Raises FileBroken."""
    blocks, report.problems = read_hours(path)
    try:
        await _Loading(client, report, progress or Progress(disable=True)).run(blocks, dry_run)
    except Stopped as stopped:
        report.stopped = str(stopped)


@dataclass(slots=True)
class _Loading:
    client: GatewayClient
    report: HoursReport
    progress: Progress

    async def run(self, blocks: list[Block], dry_run: bool) -> None:
        practitioners = _by_key(await self.client.all_of("/v1/practitioners", "practitioners"))
        clinics = _by_key(await self.client.all_of("/v1/clinics", "clinics"))
        types = {one["code"]: one["id"] for one in await self.client.all_of("/v1/visitTypes", "visitTypes")}
        wanted: dict[tuple[str, str], tuple[list[int], list[Json]]] = {}
        for block in blocks:
            who, where = practitioners.get(block.practitioner), clinics.get(block.clinic)
            unknown = [code for code in block.visit_types if code not in types]
            for wrong, what in ((who is None, "practitioner"), (where is None, "clinic"), (unknown, "visit type")):
                if wrong:
                    self.report.problems.append((block.line, f"there is no such {what}"))
            if who is None or where is None or unknown:
                continue
            ids = {"visitTypeIds": [types[code] for code in block.visit_types]} if block.visit_types else {}
            lines, hours = wanted.setdefault((who["id"], where["id"]), ([], []))
            lines.append(block.line)
            hours += [one | ids for one in block.hours]
        known = {
            (one["practitionerId"], one["clinicId"]): one
            for one in await self.client.all_of("/v1/schedules", "schedules")
        }
        zones = {one["id"]: one.get("timeZone") or "UTC" for one in clinics.values()}
        seats = []
        for seat, (lines, hours) in self.progress.track(sorted(wanted.items()), description="Trying"):
            now = known.get(seat)
            hours = [_with_quotas(one, now) for one in hours]
            try:
                told = await self.client.post(
                    "/v1/schedules:preview", {"practitionerId": seat[0], "clinicId": seat[1], "weeklyHours": hours}
                )
            except Refused as refused:
                self.report.problems.append((lines[0], f"{refused.reason}: {refused.said}"))
                continue
            seats.append((seat, lines, hours, now, told))
        if self.report.problems:
            return
        for seat, lines, hours, now, told in self.progress.track(seats, description="Setting"):
            outcome = (
                "created" if now is None else "unchanged" if same(hours, now.get("weeklyHours", [])) else "changed"
            )
            if not dry_run and not await self._set(seat, hours, now, outcome, lines):
                continue
            visits = tuple(
                (one["appointmentId"], _at(one["startTime"], zones[seat[1]])) for one in told.get("visits", ())
            )
            self.report.seats.append(Seat(tuple(lines), outcome, int(told.get("total", 0)), visits))

    async def _set(
        self, seat: tuple[str, str], hours: list[Json], now: Json | None, outcome: str, lines: list[int]
    ) -> bool:
        try:
            if now is None:
                record = {"practitionerId": seat[0], "clinicId": seat[1], "weeklyHours": hours}
                await self.client.post("/v1/schedules", record)
            elif outcome == "changed":
                await self.client.patch(f"/v1/schedules/{now['id']}", {"weeklyHours": hours}, now["etag"])
        except Refused as refused:  # somebody else has changed them meanwhile
            self.report.seats.append(Seat(tuple(lines), f"refused ({refused.reason}: {refused.said})"))
            self.report.stopped = "since somebody else was at these hours"
            return False
        return True


def _by_key(records: list[Json]) -> dict[Key, Json]:
    found = {Key(OWN_ID, one["id"]): one for one in records}
    for one in records:
        found |= {Key(key["system"], key["value"]): one for key in one.get("identifiers", ())}
    return found


def _with_quotas(block: Json, now: Json | None) -> Json:
    quotas = [one.get("quotas") for one in (now or {}).get("weeklyHours", ()) if _place(one) == _place(block)]
    return block | {"quotas": quotas[0]} if quotas and quotas[0] else block


def _place(block: Json) -> tuple[Any, ...]:
    return tuple(block.get(name) for name in ("weekday", "start", "end"))


def _at(instant: str, zone: str) -> str:
    return f"{datetime.fromisoformat(instant).astimezone(ZoneInfo(zone)):%Y-%m-%d %H:%M} {zone}"

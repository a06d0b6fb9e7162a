"""Reads the calendar of another system, CSV or iCalendar, a row at a time.

CSV has one visit a line under a header; iCalendar one a VEVENT. What a visit has, in the file's own words by `columns`:

- `identifier`: what the other system calls the visit (UID)
- `patient`, `practitioner`, `clinic`: an identifier that each has here, of the system `patient_system` and so on (the
  importer's usual ones if absent; `id` for our own id). `visit_type`: its code
- `start`, `end` or `duration_minutes`: `2026-03-02 09:00` by the clinic's clock, with `time_zone` by that one's, or with an
  offset or Z (DTSTART, DTEND or DURATION)
- `status`: booked, fulfilled, noshow or cancelled; `reason` of a cancelled one; `comment`

A VEVENT with RRULE stands for each of its visits, as `services.scheduling.recurrence` expands a series; exceptions and
single visits that were moved or cancelled are kept to. A rule without an end goes on until `until`, or is refused.
Skipped local times move forward by the gap, repeated ones mean the first. Nothing of a row is in any error.
"""

import contextlib
import csv
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from pathlib import Path
from typing import Any, TextIO
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import icalendar

from chassis.calendar import at_local
from chassis.errors import Invalid
from services.scheduling import recurrence
from system.importing.bundles import NPI, SYNTHEA, Json

NAMES = (
    "identifier", "patient", "patient_system", "practitioner", "practitioner_system", "clinic", "clinic_system",
    "visit_type", "start", "end", "duration_minutes", "time_zone", "status", "reason", "comment",
)  # fmt: skip
OWN_ID = "id"
"""In place of an identifier's system: the value is our own id."""
SYSTEMS = {"patient": SYNTHEA, "practitioner": NPI, "clinic": SYNTHEA}
_NEEDED = ("identifier", "patient", "practitioner", "clinic", "visit_type", "start")
_PROPERTIES = {
    "identifier": "UID",
    "patient": "X-CARE-PATIENT",
    "practitioner": "X-CARE-PRACTITIONER",
    "clinic": "X-CARE-CLINIC",
    "visit_type": "X-CARE-VISIT-TYPE",
    "status": "STATUS",
}
_STATUSES = {
    "": "BOOKED", "booked": "BOOKED", "confirmed": "BOOKED", "fulfilled": "FULFILLED", "completed": "FULFILLED",
    "noshow": "NOSHOW", "no-show": "NOSHOW", "cancelled": "CANCELLED", "canceled": "CANCELLED",
}  # fmt: skip
_LONGEST_LINE = 1 << 20
_DAY_MINUTES = 24 * 60
NUMBER = re.compile(r"0{0,9}[0-9]{1,4}")
"""What may be read as a whole number; Python refuses thousands of digits."""


class FileBroken(Exception):
    """The file can't be read as a whole; the message says where and what to do."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a row isn't sent: reason (UPPER_SNAKE), name of what is wrong, and a sentence without any value of the row."""

    reason: str
    field: str
    what: str


@dataclass(frozen=True, slots=True)
class VisitRow:
    """One visit: its line in the file, which visit of a rule it is (0 for one that doesn't recur), and what to send or why not."""

    line: int
    number: int = 0
    record: Json = field(default_factory=dict)
    refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """How a file is read: `columns` maps our names to the file's, `values` holds where the file says nothing."""

    source_system: str
    columns: Mapping[str, str] = field(default_factory=dict)
    values: Mapping[str, str] = field(default_factory=dict)
    until: date | None = None
    today: date = field(default_factory=lambda: datetime.now(UTC).date())


class _Bad(Exception):
    def __init__(self, reason: str, name: str, what: str) -> None:
        self.refusal = Refusal(reason, name, what)
        super().__init__(reason)


def read_visits(path: Path, reading: Reading) -> Iterator[VisitRow]:
    """The visits of a file in its order; memory doesn't grow with the file. Raises FileBroken where it ends being one."""
    if path.suffix.lower() not in (".csv", ".ics"):
        raise FileBroken(f"{path.name}: give a file that ends in .csv or .ics")
    try:
        # utf-8-sig: what spreadsheets write begins with a mark.
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from (
                _read_csv(path, file, reading) if path.suffix.lower() == ".csv" else _read_ics(path, file, reading)
            )
    except UnicodeDecodeError:
        raise FileBroken(f"{path.name}: is not text in UTF-8; save it as such") from None
    except OSError as error:
        raise FileBroken(f"{path.name}: {error.strerror or 'can not be read'}") from None


def _record(said: Mapping[str, str], reading: Reading) -> Json:
    """What is sent of a row, but for its times."""
    for name in _NEEDED:
        if not said.get(name):
            raise _Bad("VALUE_MISSING", name, f"has no {name}; fill it in, or give one for all with --set")
    if len(said["identifier"]) > 300:
        raise _Bad("IDENTIFIER_TOO_LONG", "identifier", "has an identifier of more than 300 characters")
    status = _STATUSES.get(said.get("status", "").strip().lower())
    if status is None:
        raise _Bad("STATUS_UNKNOWN", "status", "has a status that is none of booked, fulfilled, noshow, cancelled")
    record: Json = {
        "sourceSystem": reading.source_system,
        "identifier": said["identifier"],
        "visitTypeCode": said["visit_type"],
        "status": status,
        "source": "INTEGRATION",
    }
    for name, usual in SYSTEMS.items():
        system = said.get(f"{name}_system") or usual
        if system == OWN_ID:
            record[f"{name}Id"] = said[name]
        else:
            record[f"{name}Identifier"] = {"system": system, "value": said[name]}
    if said.get("comment"):
        record["comment"] = said["comment"][:1000]
    if status == "CANCELLED" and said.get("reason"):
        record["cancelationReason"] = {"code": said["reason"]}
    return record


# -- CSV ---------------------------------------------------------------------------------------------------------------


def _read_csv(path: Path, file: TextIO, reading: Reading) -> Iterator[VisitRow]:
    rows = csv.reader(file, strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        columns = {name: reading.columns.get(name, name) for name in NAMES}
        missing = [name for name in _NEEDED if columns[name] not in header and not reading.values.get(name)]
        missing += [name for name in reading.columns if reading.columns[name] not in header and name not in missing]
        if missing:
            raise FileBroken(
                f"{path.name}, line 1: has no column for {', '.join(missing)}; name it with --column NAME=COLUMN,"
                " or give one value for all with --set NAME=VALUE"
            )
        if len(set(header)) < len(header):
            raise FileBroken(f"{path.name}, line 1: names a column twice")
        places = {name: header.index(column) for name, column in columns.items() if column in header}
        line = rows.line_num + 1
        for row in rows:
            begins, line = line, rows.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            try:
                if len(row) != len(header):
                    raise _Bad("COLUMNS_DIFFER", "", "has not as many columns as the header")
                said = {name: row[place].strip() for name, place in places.items()}
                said = {name: said.get(name) or reading.values.get(name, "") for name in NAMES}
                record = _record(said, reading)
                yield VisitRow(begins, 0, record | _csv_times(said))
            except _Bad as bad:
                yield VisitRow(begins, refusal=bad.refusal)
    except csv.Error:
        raise FileBroken(f"{path.name}, line {rows.line_num}: is no CSV, such as a quote that doesn't end") from None


def _csv_times(said: Mapping[str, str]) -> Json:
    zone = _zone_named(said["time_zone"])
    found = _time("start", said["start"], zone)
    if said["end"] and said["duration_minutes"]:
        raise _Bad("END_INVALID", "end", "has both an end and a duration")
    if said["end"]:
        found |= _time("end", said["end"], zone)
    if said["duration_minutes"]:
        minutes = said["duration_minutes"]
        if not (NUMBER.fullmatch(minutes) and 0 < int(minutes) <= _DAY_MINUTES):
            raise _Bad("END_INVALID", "duration_minutes", "has a duration that is no number of minutes up to a day")
        found["durationMinutes"] = int(minutes)
    return found


def _time(name: str, text: str, zone: str) -> Json:
    try:
        wall = datetime.fromisoformat(text.strip())
    except ValueError:
        wall = None
    if wall is None or len(text.strip()) < len("2026-03-02T09:00"):
        raise _Bad(f"{name.upper()}_INVALID", name, f"has a {name} that isn't written as 2026-03-02 09:00")
    if wall.tzinfo is None and zone:
        try:
            wall = at_local(wall.date(), wall.time(), zone)
        except OverflowError:
            raise _beyond(name) from None
    return _sent(name, wall)


def _zone_named(zone: str) -> str:
    if zone:
        try:
            ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise _Bad("TIME_ZONE_UNKNOWN", "time_zone", "names a time zone that isn't IANA's") from None
    return zone


def _sent(name: str, when: datetime) -> Json:
    if when.microsecond:
        raise _Bad(f"{name.upper()}_INVALID", name, f"has a {name} within a second")
    if when.tzinfo is None:
        return {f"local{name.capitalize()}Time": f"{when:%Y-%m-%dT%H:%M:%S}"}
    # The first of a repeated time; a skipped one moves on.
    return {f"{name}Time": f"{_utc(when.replace(fold=0), name):%Y-%m-%dT%H:%M:%SZ}"}


def _utc(when: datetime, name: str) -> datetime:
    try:
        return when.astimezone(UTC)
    except OverflowError:
        raise _beyond(name) from None


def _beyond(name: str) -> _Bad:
    """What exports write for "never": 0001-01-01, 9999-12-31."""
    return _Bad(f"{name.upper()}_INVALID", name, f"has a {name} beyond the calendar")


# -- iCalendar ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Calendar:
    """What the whole file says: its method, and which visits of a rule have an item of their own, by UID."""

    method: str = ""
    single: dict[str, set[str]] = field(default_factory=dict)
    items: int = 0


def _read_ics(path: Path, file: TextIO, reading: Reading) -> Iterator[VisitRow]:
    """Twice through the file: first zones and single visits, which may stand after what they are about."""
    whole = _Calendar()
    for name, line, block in _blocks(path, file, whole):
        if name == "VTIMEZONE":
            _learn_zone(path, line, block)
        elif "\nRECURRENCE-ID" in block.upper():
            item = _parsed(block)
            with contextlib.suppress(_Bad):  # said when its visits are read
                if item is not None and (key := _key_of(item)):
                    whole.single.setdefault(str(item.get("UID", "")), set()).add(key)
    if not whole.items:
        raise FileBroken(f"{path.name}: holds no VEVENT")
    file.seek(0)
    for name, line, block in _blocks(path, file, _Calendar()):
        if name == "VEVENT":
            yield from _visits(line, block, whole, reading)


def _blocks(path: Path, file: TextIO, whole: _Calendar) -> Iterator[tuple[str, int, str]]:
    """Each VEVENT and VTIMEZONE with the line where it begins. Raises FileBroken for what is no calendar."""
    inside = ""
    held: list[str] = []
    begins, depth, opened, size = 0, 0, False, 0
    number = 0
    for number in itertools.count(1):
        text = file.readline(_LONGEST_LINE)
        if not text:
            break
        line = text.rstrip("\r\n")
        word = line.strip().upper()
        if not opened:
            if word and word != "BEGIN:VCALENDAR":
                raise FileBroken(f"{path.name}, line {number}: is no iCalendar, which begins with BEGIN:VCALENDAR")
            opened = bool(word)
        elif inside:
            held.append(line)
            size += len(line)
            if size > _LONGEST_LINE:
                raise FileBroken(f"{path.name}, line {begins}: {inside} is larger than a visit can be")
            if word == f"BEGIN:{inside}" or word in ("BEGIN:VCALENDAR", "END:VCALENDAR"):
                raise FileBroken(f"{path.name}, line {begins}: this {inside} has no end")
            if word == f"END:{inside}":
                yield inside, begins, "\n".join(held) + "\n"
                inside = ""
        elif word in ("BEGIN:VEVENT", "BEGIN:VTIMEZONE") and depth == 0:
            inside, begins, held, size = word.partition(":")[2], number, [line], 0
            whole.items += inside == "VEVENT"
        elif word == "END:VCALENDAR":
            opened = False  # some exports hold several one after the other
        elif word.startswith("BEGIN:"):
            depth += 1
        elif word.startswith("END:"):
            depth -= 1
        elif word.startswith("METHOD:"):
            whole.method = word.partition(":")[2]
    if opened or inside:
        raise FileBroken(
            f"{path.name}, line {begins or number}: the file ends before its END:VCALENDAR; it was cut off"
        )


def _learn_zone(path: Path, line: int, block: str) -> None:
    """A zone that the file describes itself is known by its name from here on."""
    try:
        icalendar.Calendar.from_ical(f"BEGIN:VCALENDAR\nVERSION:2.0\nPRODID:-\n{block}END:VCALENDAR\n")
    except (ValueError, KeyError, IndexError):
        raise FileBroken(f"{path.name}, line {line}: this VTIMEZONE can't be read") from None


def _parsed(block: str) -> Any:
    try:
        return icalendar.Event.from_ical(block)
    except (ValueError, KeyError, IndexError, TypeError):
        return None


def _visits(line: int, block: str, whole: _Calendar, reading: Reading) -> Iterator[VisitRow]:
    try:
        item = _parsed(block)
        if item is None or item.errors:
            raise _Bad("ITEM_INVALID", "", "is no item as RFC 5545 has it")
        said = {name: reading.values.get(name, "") for name in NAMES}
        for name, usual in _PROPERTIES.items():
            value = _one(item, reading.columns.get(name, usual))
            said[name] = value or said[name]
        for name in set(reading.columns) - set(_PROPERTIES):
            said[name] = _one(item, reading.columns[name]) or said[name]
        if whole.method == "CANCEL":
            said["status"] = "cancelled"
        said["start"] = "DTSTART"  # looked at below
        start, length, end = _when(item)
        if "RDATE" in item:
            raise _Bad("RULE_INVALID", "RDATE", "has dates besides its rule (RDATE); give those as items of their own")
        if "RRULE" in item and "RECURRENCE-ID" not in item:
            yield from _recurring(line, item, said, start, length, whole, reading)
            return
        if own := _key_of(item):
            said["identifier"] += f"/{own}"
        times = _sent("start", start)
        if end is not None:
            times |= _sent("end", end)
        elif length:
            times["durationMinutes"] = _minutes(length)
        yield VisitRow(line, 0, _record(said, reading) | times)
    except _Bad as bad:
        yield VisitRow(line, refusal=bad.refusal)


def _recurring(
    line: int, item: Any, said: dict[str, str], start: datetime, length: timedelta, whole: _Calendar, reading: Reading
) -> Iterator[VisitRow]:
    zone: tzinfo = start.tzinfo or UTC
    rules = item["RRULE"]
    if isinstance(rules, list):
        raise _Bad("RULE_INVALID", "RRULE", "has several rules")
    try:
        rule = recurrence.read(rules.to_ical().decode(), zone)  # type: ignore[arg-type]
        if not rule.count and rule.until is None and reading.until is not None:
            rule = replace(rule, until=datetime.combine(reading.until, time(23, 59, 59)))
        walls = recurrence.wall_times(rule, start.replace(tzinfo=None), reading.today)
    except Invalid as invalid:
        raise _Bad(
            invalid.reason, "RRULE", _ABOUT_RULES.get(invalid.reason, "has a rule that can't be taken over")
        ) from None
    record = _record(said, reading)
    if length:
        record["durationMinutes"] = _minutes(length)
    left_out = whole.single.get(said["identifier"], set()) | _exceptions(item, start)
    for number, wall in enumerate(walls, 1):
        when = wall.replace(tzinfo=start.tzinfo)
        key = _key(when)
        if key not in left_out:
            yield VisitRow(line, number, record | {"identifier": f"{said['identifier']}/{key}"} | _sent("start", when))


_ABOUT_RULES = {
    "SERIES_WITHOUT_END": "recurs without an end; say with --until up to which day its visits are promised",
    "TOO_MANY_OCCURRENCES": f"recurs more than {recurrence.MOST} times",
    "SERIES_TOO_LONG": f"recurs beyond {recurrence.MONTHS} months from today",
    "FIRST_NOT_IN_RULE": "begins on a day that its rule doesn't name",
}


def _when(item: Any) -> tuple[datetime, timedelta, datetime | None]:
    """Start, length (0 where unknown) and end, as far as the item says."""
    start = _instant(item, "DTSTART", "start")
    if start is None:
        raise _Bad("START_INVALID", "DTSTART", "has no start")
    end = _instant(item, "DTEND", "end")
    if end is not None:
        if (end.tzinfo is None) != (start.tzinfo is None):
            raise _Bad("END_INVALID", "DTEND", "has an end of another kind of time than its start")
        return start, _span(start, end), end
    length = _dt(item["DURATION"], "DURATION", "END_INVALID") if "DURATION" in item else timedelta(0)
    if not isinstance(length, timedelta):
        raise _Bad("END_INVALID", "DURATION", "has a DURATION that is none")
    return start, length, None


def _span(start: datetime, end: datetime) -> timedelta:
    if start.tzinfo is None:
        return end - start
    return _utc(end, "end") - _utc(start, "start")


def _instant(item: Any, name: str, what: str) -> datetime | None:
    value = item.get(name)
    if value is None:
        return None
    when = _dt(value, name, f"{what.upper()}_INVALID")
    if not isinstance(when, datetime):
        raise _Bad(f"{what.upper()}_INVALID", name, "is about whole days: that is no visit")
    if when.tzinfo is None and "TZID" in value.params:
        raise _Bad("TIME_ZONE_UNKNOWN", name, "names a time zone that neither IANA nor the file describes")
    return when.replace(fold=0)


def _dt(value: Any, name: str, reason: str) -> Any:
    """What a property holds: a time, a day, a length, as its kind says."""
    if isinstance(value, list):
        raise _Bad(reason, name, f"has several of {name}")
    try:
        return value.dt
    except (AttributeError, ValueError):  # of another kind, or not to be read
        raise _Bad(reason, name, f"has a {name} that is none") from None


def _minutes(length: timedelta) -> int:
    whole, rest = divmod(length, timedelta(minutes=1))
    if rest or not 0 < whole <= _DAY_MINUTES:
        raise _Bad("END_INVALID", "DTEND", "doesn't end whole minutes after its start, within a day")
    return whole


def _exceptions(item: Any, start: datetime) -> set[str]:
    found = item.get("EXDATE")
    lists = found if isinstance(found, list) else [found] if found is not None else []
    times = [one.dt for each in lists for one in each.dts]
    if not all(isinstance(one, datetime) and (one.tzinfo is None) == (start.tzinfo is None) for one in times):
        # It would fit no visit, and the one that was called off would be taken over.
        raise _Bad("RULE_INVALID", "EXDATE", "has an EXDATE of another kind of time than its start")
    return {_key(one) for one in times}


def _key_of(item: Any) -> str:
    value = item.get("RECURRENCE-ID")
    when = None if value is None else _dt(value, "RECURRENCE-ID", "ITEM_INVALID")
    if when is not None and not isinstance(when, datetime):
        raise _Bad("ITEM_INVALID", "RECURRENCE-ID", "names a visit of its rule by a day; name it by its time")
    return _key(when) if when is not None else ""


def _key(when: datetime) -> str:
    """Which visit of a rule: by its instant, however it is written, or by the clinic's clock."""
    if when.tzinfo is None:
        return f"{when:%Y%m%dT%H%M%S}"
    return f"{_utc(when.replace(fold=0), 'start'):%Y%m%dT%H%M%SZ}"


def _one(item: Any, name: str) -> str:
    value = item.get(name)
    value = value[0] if isinstance(value, list) else value
    return "" if value is None else str(value).strip()

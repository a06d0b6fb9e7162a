"""Reads the file on clinics: hours, zones, holidays, specialties, visit types and whatever else no bundle holds.

JSON (`example-clinics.json` beside this module) is `{"clinics": [...], "visit_types": [...], "practitioners": [...]}`, each
list optional. CSV has one clinic a line under a header of the same names; lists are parted by `;`.

A clinic, by `identifier_system` (Synthea's if absent) and `identifier`; what is absent stays as it is, a new one needs `name`
and `time_zone` too:

- `name`, `discreet_name` (used in messages), `directions`
- `time_zone`: IANA, such as `America/Chicago`; `holiday_region`: `US` or `US-MA`
- `closed_dates`: days `YYYY-MM-DD`
- `hours`: `Mo-Fr 08:00-12:00`, `Mo,We 13:00-17:00`; days Mo Tu We Th Fr Sa Su; an end not after the start is on the next day.
  They become the hours of every practitioner who works there and has none of their own in the file
- `specialties`: `394579002|Cardiology` (SNOMED CT) or `system|code|display`
- `rooms`: `exam-room:Room 1` (kind and name of a room or device); `security_labels`: `R`
- `street`, `city`, `state`, `postal_code`, `country`, `phone`, `email`

A visit type (JSON only), by `code`: `name`, `discreet_name`, `duration_minutes`, `buffer_before_minutes`,
`buffer_after_minutes`, `modality` (IN_PERSON, VIDEO, PHONE), `resource_kinds`, `specialty`, `start_grid_minutes`,
`minimum_notice_minutes`, `late_cancel_hours`, `overbooking_cap`, `preparation` (text by language), `security_labels`, `active`.

A practitioner (JSON only), by `identifier_system` (NPI's if absent) and `identifier`: `family_name`, `given_names`,
`prefixes`, `languages` (BCP-47), `licensed_states` (two letters), `roles`: at a clinic (`clinic_system`, `clinic`) with
`specialties` and `hours` of their own.
"""

import csv
import io
import itertools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any
from zoneinfo import available_timezones

from chassis.calendar import is_business_day
from system.importing.bundles import NPI, SYNTHEA, Json, Key
from system.importing.places import phone_line

_SNOMED = "http://snomed.info/sct"
_DAYS = ("Mo", "Tu", "We", "Th", "Fr", "Sa", "Su")
_HOURS = re.compile(r"^([A-Za-z ,-]+?)\s+(\d\d?:\d\d)\s*-\s*(\d\d?:\d\d)$")
_DAY_SPAN = re.compile(r"^([A-Z][a-z])(?:-([A-Z][a-z]))?$")
_PLAIN_CODE = re.compile(r"^[a-z0-9]+(-[a-z0-9]+)*$")
_LANGUAGE = re.compile(r"^[A-Za-z]{2,3}(-[A-Za-z0-9]{2,8})*$")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to mend: line (0 if unknown), column name or JSON path, and what to do."""

    line: int
    column: str
    what: str


class ClinicsFileBroken(Exception):
    """A file on clinics with everything that is wrong in it."""

    def __init__(self, file: str, problems: list[Problem]) -> None:
        self.file, self.problems = file, problems
        super().__init__(
            "\n".join(f"{file}, line {problem.line or '?'}, {problem.column}: {problem.what}" for problem in problems)
        )


@dataclass(frozen=True, slots=True)
class ClinicEntry:
    """A clinic: what the file states as proto3 JSON of `Clinic`, hours as of `Schedule.WeeklyHours`, rooms (kind, name)."""

    key: Key
    record: Json
    hours: tuple[Json, ...]
    rooms: tuple[tuple[str, str], ...]
    line: int


@dataclass(frozen=True, slots=True)
class VisitTypeEntry:
    """A visit type: what the file states as proto3 JSON of `VisitType`, with its code."""

    code: str
    record: Json
    line: int


@dataclass(frozen=True, slots=True)
class RoleEntry:
    """Work at a clinic; `hours` are None where the clinic's apply."""

    clinic: Key
    specialties: tuple[Json, ...]
    hours: tuple[Json, ...] | None


@dataclass(frozen=True, slots=True)
class PractitionerEntry:
    """A practitioner: what the file states as proto3 JSON of `Practitioner`, without roles."""

    key: Key
    record: Json
    roles: tuple[RoleEntry, ...]
    line: int


@dataclass(frozen=True, slots=True)
class ClinicsFile:
    """What a file on clinics states."""

    path: Path
    clinics: tuple[ClinicEntry, ...] = ()
    visit_types: tuple[VisitTypeEntry, ...] = ()
    practitioners: tuple[PractitionerEntry, ...] = ()


class _Bad(Exception):
    """What is wrong with one value, as a sentence that says what to do."""


@lru_cache(maxsize=1)
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())


Read = Callable[[Any], Any]
"""Takes a value of the file and gives proto3 JSON, or raises _Bad."""


def _text(longest: int) -> Read:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise _Bad("write a text that isn't empty, or leave it out")
        if len(value.strip()) > longest:
            raise _Bad(f"shorten it to {longest} characters")
        return value.strip()

    return read


def _matching(pattern: re.Pattern[str], wanted: str) -> Read:
    def read(value: Any) -> str:
        if not isinstance(value, str) or not pattern.fullmatch(value.strip()):
            raise _Bad(f"write {wanted}")
        return value.strip()

    return read


def _whole(least: int, most: int) -> Read:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise _Bad(f"write a whole number from {least} to {most}")
        return value

    return read


def _list(read: Read, most: int) -> Read:
    """A JSON list, or a text whose items are parted by `;`."""

    def read_all(value: Any) -> list[Any]:
        items = [item for item in value.split(";") if item.strip()] if isinstance(value, str) else value
        if not isinstance(items, list):
            raise _Bad("write a list")
        if len(items) > most:
            raise _Bad(f"keep to {most} items")
        return [read(item) for item in items]

    return read_all


def _zone(value: Any) -> str:
    if not isinstance(value, str) or value.strip() not in _zones():
        raise _Bad("write an IANA time zone such as America/New_York")
    return value.strip()


def _holiday_region(value: Any) -> str:
    region = _matching(re.compile(r"[A-Z]{2}(-[A-Z]{2})?"), "a country or a country and state, such as US or US-MA")(
        value
    )
    try:
        is_business_day(date(2026, 1, 1), region)
    except ValueError:
        raise _Bad(
            "no holidays are known for this region; write a country or a country and state, such as US or US-MA"
        ) from None
    return str(region)


def _day(value: Any) -> str:
    text = str(_matching(re.compile(r"\d{4}-\d{2}-\d{2}"), "days as YYYY-MM-DD")(value))
    try:
        date.fromisoformat(text)
    except ValueError:
        raise _Bad("one is no day of the calendar; write days as YYYY-MM-DD") from None
    return text


def _coding(value: Any) -> Json:
    if isinstance(value, str):
        parts = [part.strip() for part in value.split("|")]
        names = {2: ("code", "display"), 3: ("system", "code", "display")}.get(len(parts))
        if names is None:
            raise _Bad("write code|display (SNOMED CT) or system|code|display")
        value = dict(zip(names, parts, strict=True))
    if not isinstance(value, dict) or not set(value) <= {"system", "code", "display"} or not value.get("code"):
        raise _Bad("write code|display (SNOMED CT), system|code|display, or an object with system, code and display")
    return {name: _text(200)(text) for name, text in {"system": _SNOMED, **value}.items()}


def _hours(value: Any) -> list[Json]:
    """`Mo-Fr 08:00-12:00; Sa 09:00-12:00` or a list of such."""
    found: list[Json] = []
    for span in _list(_text(100), 50)(value):
        match = _HOURS.match(span)
        if not match:
            raise _Bad("write hours like Mo-Fr 08:00-12:00 or Mo,We 13:00-17:00")
        clocks = [clock.zfill(5) for clock in match.groups()[1:]]
        if any(clock[:2] > "23" or clock[3:] > "59" for clock in clocks):
            raise _Bad("write times of day from 00:00 to 23:59")
        for days in match[1].replace(" ", "").split(","):
            ends = _DAY_SPAN.match(days)
            if not ends or not {end for end in ends.groups() if end} <= set(_DAYS):
                raise _Bad("write days as Mo, Tu, We, Th, Fr, Sa, Su or spans like Mo-Fr")
            first = _DAYS.index(ends[1])
            last = _DAYS.index(ends[2] or ends[1])
            for number in range(first, last + 1 if last >= first else last + 8):
                found.append({"weekday": number % 7 + 1, "start": clocks[0], "end": clocks[1]})
    found.sort(key=lambda block: (block["weekday"], block["start"]))
    for one, other in itertools.pairwise(found):
        if one["weekday"] == other["weekday"] and (one["end"] > other["start"] or one["end"] <= one["start"]):
            raise _Bad(f"two spans overlap on {_DAYS[one['weekday'] - 1]}; join or part them")
    if not found:
        raise _Bad("write at least one span, or leave it out")
    return found


def _room(value: Any) -> tuple[str, str]:
    kind, _, name = str(value).partition(":") if isinstance(value, str) else ("", "", "")
    if not _PLAIN_CODE.match(kind.strip()) or not 0 < len(name.strip()) <= 100:
        raise _Bad("write kind:name, the kind in small letters, such as exam-room:Room 1")
    return kind.strip(), name.strip()


def _texts_by_language(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(_LANGUAGE.match(language) for language in value):
        raise _Bad('write texts by language, such as {"en": "Come fasting."}')
    return {language: _text(2000)(text) for language, text in value.items()}


def _modality(value: Any) -> str:
    if value not in ("IN_PERSON", "VIDEO", "PHONE"):
        raise _Bad("write IN_PERSON, VIDEO or PHONE")
    return str(value)


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _Bad("write true or false")
    return value


_CODE = _matching(_PLAIN_CODE, "small letters, digits and single hyphens, such as follow-up")
_LANGUAGES = _list(_matching(_LANGUAGE, "languages as BCP-47, such as en-US"), 20)
_LABELS = _list(_text(40), 10)
_SPECIALTIES = _list(_coding, 20)

# Column -> field of the proto's JSON and how it is read; no field: put to its place further below.
_ADDRESS = {
    "street": ("lines", _text(200)),
    "city": ("city", _text(100)),
    "state": ("state", _text(100)),
    "postal_code": ("postalCode", _text(20)),
    "country": ("country", _text(60)),
}
_CONTACTS = {
    "phone": ("PHONE", _text(200)),
    "email": ("EMAIL", _matching(re.compile(r"[^@\s]+@[^@\s]+"), "an e-mail address")),
}
_IDENTITY = {"identifier_system": ("", _text(200)), "identifier": ("", _text(100))}
_CLINIC: dict[str, tuple[str, Read]] = {
    **_IDENTITY,
    "name": ("name", _text(200)),
    "discreet_name": ("discreetName", _text(200)),
    "directions": ("directions", _text(1000)),
    "time_zone": ("timeZone", _zone),
    "holiday_region": ("holidayRegion", _holiday_region),
    "closed_dates": ("closedDates", _list(_day, 400)),
    "specialties": ("specialties", _SPECIALTIES),
    "security_labels": ("securityLabels", _LABELS),
    "hours": ("", _hours),
    "rooms": ("", _list(_room, 100)),
    **{column: ("", read) for column, (_, read) in (_ADDRESS | _CONTACTS).items()},
}
_VISIT_TYPE: dict[str, tuple[str, Read]] = {
    "code": ("code", _CODE),
    "name": ("name", _text(200)),
    "discreet_name": ("discreetName", _text(200)),
    "duration_minutes": ("durationMinutes", _whole(1, 720)),
    "buffer_before_minutes": ("bufferBeforeMinutes", _whole(0, 240)),
    "buffer_after_minutes": ("bufferAfterMinutes", _whole(0, 240)),
    "modality": ("modality", _modality),
    "resource_kinds": ("resourceKinds", _list(_CODE, 5)),
    "specialty": ("specialty", _coding),
    "start_grid_minutes": ("startGridMinutes", _whole(0, 240)),
    "minimum_notice_minutes": ("minimumNoticeMinutes", _whole(0, 43200)),
    "late_cancel_hours": ("lateCancelHours", _whole(0, 720)),
    "overbooking_cap": ("overbookingCap", _whole(0, 3)),
    "preparation": ("preparation", _texts_by_language),
    "security_labels": ("securityLabels", _LABELS),
    "active": ("active", _yes_or_no),
}
_PRACTITIONER: dict[str, tuple[str, Read]] = {
    **_IDENTITY,
    "family_name": ("", _text(100)),
    "given_names": ("", _list(_text(100), 10)),
    "prefixes": ("", _list(_text(50), 5)),
    "languages": ("languages", _LANGUAGES),
    "licensed_states": (
        "licensedStates",
        _list(_matching(re.compile(r"[A-Z]{2}"), "states as two letters, such as MA"), 60),
    ),
    "roles": ("", lambda value: value),
}
_ROLE: dict[str, tuple[str, Read]] = {
    "clinic_system": ("", _text(200)),
    "clinic": ("", _text(100)),
    "specialties": ("", _SPECIALTIES),
    "hours": ("", _hours),
}


@dataclass(slots=True)
class _Reading:
    """The file while it is read; `line_of` tells the line of a JSON path or of a CSV row's number and column."""

    line_of: Callable[[tuple[Any, ...]], int]
    column_of: Callable[[tuple[Any, ...]], str]
    problems: list[Problem] = field(default_factory=list)

    def bad(self, where: tuple[Any, ...], what: str) -> None:
        self.problems.append(Problem(self.line_of(where), self.column_of(where), what))

    def rows(self, value: Any, where: tuple[Any, ...]) -> list[tuple[tuple[Any, ...], Mapping[str, Any]]]:
        if not isinstance(value, list):
            self.bad(where, "write a list of objects")
            return []
        rows = [((*where, number), row) for number, row in enumerate(value)]
        for place, row in rows:
            if not isinstance(row, dict):
                self.bad(place, "write an object")
        return [(place, row) for place, row in rows if isinstance(row, dict)]

    def values(self, row: Mapping[str, Any], fields: Mapping[str, tuple[str, Read]], where: tuple[Any, ...]) -> Json:
        """The values that are given, read, by column."""
        found: Json = {}
        for column, value in row.items():
            if column not in fields:
                self.bad((*where, column), f"no such name; remove it or use one of {', '.join(fields)}")
            elif value is not None:
                try:
                    found[column] = fields[column][1](value)
                except _Bad as bad:
                    self.bad((*where, column), str(bad))
        return found

    def key(
        self, values: Json, row: Mapping[str, Any], system: str, where: tuple[Any, ...], name: str = "identifier"
    ) -> Key:
        if not row.get(name):
            self.bad((*where, name), "is missing; write the identifier that the record has or shall have")
        return Key(str(values.get(f"{name}_system", system)), str(values.get(name, where)))

    def once(self, key: Any, seen: set[Any], where: tuple[Any, ...]) -> None:
        if key in seen and key not in (None, ""):
            self.bad(where, "stands in the file before; keep one of the two")
        seen.add(key)

    # -- the three kinds of entries

    def clinics(self, value: Any, where: tuple[Any, ...]) -> tuple[ClinicEntry, ...]:
        found, seen = [], set[Any]()
        for place, row in self.rows(value, where):
            values = self.values(row, _CLINIC, place)
            key = self.key(values, row, SYNTHEA, place)
            self.once(key, seen, (*place, "identifier"))
            record = _record(values, _CLINIC, key)
            if address := {_ADDRESS[column][0]: values[column] for column in _ADDRESS if column in values}:
                if "lines" in address:
                    address["lines"] = [address["lines"]]
                record["address"] = address
            if telecom := [_contact(_CONTACTS[column][0], values[column]) for column in _CONTACTS if column in values]:
                record["telecom"] = telecom
            found.append(
                ClinicEntry(
                    key, record, tuple(values.get("hours", ())), tuple(values.get("rooms", ())), self.line_of(place)
                )
            )
        return tuple(found)

    def visit_types(self, value: Any, where: tuple[Any, ...]) -> tuple[VisitTypeEntry, ...]:
        found, seen = [], set[Any]()
        for place, row in self.rows(value, where):
            values = self.values(row, _VISIT_TYPE, place)
            if "code" not in row:
                self.bad((*place, "code"), "is missing; write a short code such as follow-up")
            self.once(values.get("code"), seen, (*place, "code"))
            found.append(
                VisitTypeEntry(str(values.get("code")), _record(values, _VISIT_TYPE, None), self.line_of(place))
            )
        return tuple(found)

    def practitioners(self, value: Any, where: tuple[Any, ...]) -> tuple[PractitionerEntry, ...]:
        found, seen = [], set[Any]()
        for place, row in self.rows(value, where):
            values = self.values(row, _PRACTITIONER, place)
            key = self.key(values, row, NPI, place)
            self.once(key, seen, (*place, "identifier"))
            record = _record(values, _PRACTITIONER, key)
            if key.system == NPI:
                record["identifiers"][0]["type"] = "NPI"
            if "given_names" in values or "prefixes" in values or "family_name" in values:
                if "family_name" not in row:
                    self.bad((*place, "family_name"), "is missing; a name is given whole or not at all")
                names = {"familyName": "family_name", "givenNames": "given_names", "prefixes": "prefixes"}
                record["name"] = {ours: values[column] for ours, column in names.items() if column in values}
            roles, clinics = [], set[Any]()
            for role_place, role in self.rows(row.get("roles", []), (*place, "roles")):
                role_values = self.values(role, _ROLE, role_place)
                clinic = self.key(role_values, role, SYNTHEA, role_place, "clinic")
                self.once(clinic, clinics, (*role_place, "clinic"))
                hours = tuple(role_values["hours"]) if "hours" in role_values else None
                roles.append(RoleEntry(clinic, tuple(role_values.get("specialties", ())), hours))
            found.append(PractitionerEntry(key, record, tuple(roles), self.line_of(place)))
        return tuple(found)


def _record(values: Json, fields: Mapping[str, tuple[str, Read]], key: Key | None) -> Json:
    record = {fields[column][0]: value for column, value in values.items() if fields[column][0]}
    return {"identifiers": [{"system": key.system, "value": key.value}], **record} if key else record


def _contact(system: str, value: str) -> Json:
    contact = {"system": system, "value": value, "use": "WORK"}
    if system == "PHONE":
        e164, contact["lineType"] = phone_line(value, "US")
        contact |= {"e164": e164} if e164 else {}
    return contact


def read_clinics(path: Path) -> ClinicsFile:
    """Reads a file on clinics, CSV or JSON by its suffix. ClinicsFileBroken tells all that is wrong, with lines and columns."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ClinicsFileBroken(path.name, [Problem(0, "-", f"can't be read: {why}")]) from None
    if path.suffix.lower() == ".csv":
        return _read_csv(path, text)
    if path.suffix.lower() == ".json":
        return _read_json(path, text)
    raise ClinicsFileBroken(path.name, [Problem(0, "-", "name the file .csv or .json, after what it holds")])


def _read_csv(path: Path, text: str) -> ClinicsFile:
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True, skipinitialspace=True)
    rows, lines = [], []
    try:
        for row in reader:
            rows.append({column: value for column, value in row.items() if value and (column == "" or value.strip())})
            lines.append(reader.line_num)
    except csv.Error as error:
        raise ClinicsFileBroken(path.name, [Problem(reader.line_num, "-", f"mend the quoting: {error}")]) from None
    if not rows:
        raise ClinicsFileBroken(path.name, [Problem(1, "-", "holds no clinic; write a header and a line for each")])
    reading = _Reading(
        lambda where: lines[where[0]] if where else 1, lambda where: str(where[-1]) if len(where) > 1 else "-"
    )
    for number, row in enumerate(rows):
        if row.pop("", None):
            reading.bad((number,), "has more cells than the header; put quotes around a cell with a comma")
    clinics = reading.clinics(rows, ())
    if reading.problems:
        raise ClinicsFileBroken(path.name, reading.problems)
    return ClinicsFile(path, clinics)


def _read_json(path: Path, text: str) -> ClinicsFile:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise ClinicsFileBroken(
            path.name, [Problem(error.lineno, f"column {error.colno}", f"mend the JSON: {error.msg}")]
        ) from None
    lines = _json_lines(text)

    def line_of(where: tuple[Any, ...]) -> int:
        return next(lines[where[:length]] for length in range(len(where), -1, -1) if where[:length] in lines)

    reading = _Reading(line_of, _json_path)
    kinds = ("clinics", "visit_types", "practitioners")
    if not isinstance(content, dict):
        raise ClinicsFileBroken(path.name, [Problem(1, "$", f"write an object with {', '.join(kinds)}")])
    for name in content:
        if name not in kinds:
            reading.bad((name,), f"no such name; remove it or use one of {', '.join(kinds)}")
    file = ClinicsFile(
        path,
        reading.clinics(content.get("clinics", []), ("clinics",)),
        reading.visit_types(content.get("visit_types", []), ("visit_types",)),
        reading.practitioners(content.get("practitioners", []), ("practitioners",)),
    )
    if reading.problems:
        raise ClinicsFileBroken(path.name, reading.problems)
    return file


def _json_path(where: Sequence[Any]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".") or "$"


_SPACE = re.compile(r"[ \t\r\n]*")


def _json_lines(text: str) -> dict[tuple[Any, ...], int]:
    """The line of every value of a valid JSON text, by path."""
    decoder, lines, line, counted = json.JSONDecoder(), dict[tuple[Any, ...], int](), 1, 0

    def skip(at: int) -> int:
        match = _SPACE.match(text, at)
        return match.end() if match else at

    def value(at: int, path: tuple[Any, ...]) -> int:
        nonlocal line, counted
        at = skip(at)
        line, counted = line + text.count("\n", counted, at), at
        lines[path] = line
        opening = text[at]
        if opening not in "{[":
            return decoder.raw_decode(text, at)[1]
        at, number = skip(at + 1), 0
        while text[at] not in "}]":
            if text[at] == ",":
                at = skip(at + 1)
            part: Any = number
            if opening == "{":
                part, at = decoder.raw_decode(text, at)
                at = skip(at) + 1
            at, number = skip(value(at, (*path, part))), number + 1
        return at + 1

    value(0, ())
    return lines

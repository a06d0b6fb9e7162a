"""Visits as iCalendar text (RFC 5545): pure, from rows to bytes that any calendar program reads as the same instants.

The rules, each said once here:

* **Instants.** A visit is written in its clinic's wall time with the zone's definition beside it, and in UTC where that wall
  time occurs twice: then the clock alone doesn't say which one is meant, and programs differ in what they take it for.
* **Zones** are written out change by change for all years that the calendar touches, never as a rule: what is written is
  what the visits were reckoned with, and a program that knows other rules still shows the same instants.
* **Revisions.** SEQUENCE rises with each move and with the end of a visit, never with what reminders don't tell either.
  The text is made of the rows alone, without the present time: the same rows give the same text.
* **Discretion.** Who the patient is stands nowhere. Without details a visit is "Visit". What is labelled goes by its
  discreet name or by none, and leaves out its address: calendars are shared with families and shown on screens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

PRODUCT = "-//Care Coordinator//Calendar feeds//EN"
UTC_ZONE = "UTC"
_ENDED = ("CANCELLED", "ENTERED_IN_ERROR")
_TENTATIVE = ("PROPOSED", "PENDING", "WAITLIST")
_WHERE = {"VIDEO": "Video visit", "PHONE": "Phone call"}
_FOLDED_AT = 75
_PROBE = timedelta(hours=6)
_SECOND = timedelta(seconds=1)


class Visit(NamedTuple):
    """One visit as it is written."""

    id: str
    sequence: int
    status: str
    """CONFIRMED, TENTATIVE or CANCELLED."""
    start: datetime
    end: datetime
    zone: str
    changed: datetime
    created: datetime
    summary: str
    location: str


class Named(NamedTuple):
    """A clinic, visit type or practitioner, as far as a calendar may name it."""

    name: str
    discreet_name: str = ""
    labels: Sequence[str] = ()
    address: Mapping[str, Any] | None = None


def visit(
    row: Any, clinic: Named | None, kind: Named | None, practitioner: Named | None, *, whose: str, details: bool
) -> Visit:
    """What a calendar says of a row of `appointment`. `whose` calendar it is: "patient", "practitioner" or "clinic"."""
    labelled = any((row.security_labels, clinic and clinic.labels, kind and kind.labels))
    where = _name(clinic, labelled)
    minutes = round((row.end_time - row.start_time).total_seconds() / 60)
    what, who = "Visit", ""
    if details and not labelled:
        what = _name(kind, labelled) or what
        who = practitioner.name if practitioner and whose != "practitioner" else ""
    if whose == "patient":
        summary = ", ".join(filter(None, (f"{what} with {who}" if who else what, where)))
    else:
        # Neither says who comes; how and how long is what a day is planned by.
        how = row.modality.lower().replace("_", " ")
        summary = f"{', '.join(filter(None, (what, who)))} ({how}, {minutes} min)"
    if row.modality in _WHERE:
        location = _WHERE[row.modality]
    else:
        location = where if labelled else ", ".join(filter(None, (where, _address(clinic))))
    ended = row.status in _ENDED
    return Visit(
        id=row.id,
        sequence=2 * (row.schedule_version - 1) + ended,
        status="CANCELLED" if ended else "TENTATIVE" if row.status in _TENTATIVE else "CONFIRMED",
        start=row.start_time,
        end=row.end_time,
        zone=_known(row.time_zone),
        changed=row.update_time,
        created=row.create_time,
        summary=summary,
        location=location,
    )


def promised(status: str, last_step: Mapping[str, Any] | None) -> bool:
    """Whether a visit stands or has stood in somebody's calendar: a hold that was given back or ran out never did."""
    step = last_step or {}
    return status != "CANCELLED" or (step.get("action") == "cancel" and step.get("from_status") != "PENDING")


def calendar(visits: Sequence[Visit], name: str = "Visits") -> str:
    """A whole calendar."""
    lines = ["BEGIN:VCALENDAR", "VERSION:2.0", f"PRODID:{PRODUCT}", "CALSCALE:GREGORIAN"]
    # The later standard's word for it, and what programs knew before there was one.
    lines += [f"NAME:{_text(name)}", f"X-WR-CALNAME:{_text(name)}"]
    lines += ["REFRESH-INTERVAL;VALUE=DURATION:PT15M", "X-PUBLISHED-TTL:PT15M"]
    years: dict[str, tuple[int, int]] = {}
    for one in visits:
        first, last = years.get(one.zone, (9999, 0))
        years[one.zone] = min(first, one.start.year), max(last, one.end.year)
    for zone, (first, last) in sorted(years.items()):
        if zone != UTC_ZONE:
            lines += _zone(zone, first, last)
    for one in visits:
        lines += _event(one)
    lines.append("END:VCALENDAR")
    return "".join(f"{_folded(line)}\r\n" for line in lines)


def _event(one: Visit) -> Iterator[str]:
    yield "BEGIN:VEVENT"
    yield f"UID:{one.id}"
    yield f"SEQUENCE:{one.sequence}"
    # Without a METHOD this is when the visit last changed, as LAST-MODIFIED is.
    yield f"DTSTAMP:{_utc(one.changed)}"
    yield f"CREATED:{_utc(one.created)}"
    yield f"LAST-MODIFIED:{_utc(one.changed)}"
    zone = ZoneInfo(one.zone)
    if one.zone == UTC_ZONE or _twice(one.start, zone) or _twice(one.end, zone):
        yield f"DTSTART:{_utc(one.start)}"
        yield f"DTEND:{_utc(one.end)}"
    else:
        yield f"DTSTART;TZID={one.zone}:{_local(one.start.astimezone(zone))}"
        yield f"DTEND;TZID={one.zone}:{_local(one.end.astimezone(zone))}"
    yield f"SUMMARY:{_text(one.summary)}"
    if one.location:
        yield f"LOCATION:{_text(one.location)}"
    yield f"STATUS:{one.status}"
    yield f"TRANSP:{'TRANSPARENT' if one.status == 'CANCELLED' else 'OPAQUE'}"
    yield "CLASS:PRIVATE"
    yield "END:VEVENT"


# -- zones ---------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _known(name: str) -> str:
    """The zone, or UTC for one that this machine's calendar doesn't have."""
    try:
        return ZoneInfo(name).key
    except (OSError, ValueError, LookupError):
        return UTC_ZONE


@lru_cache(maxsize=256)
def _zone(name: str, first_year: int, last_year: int) -> tuple[str, ...]:
    """A VTIMEZONE that is right from the first year's begin to the last year's end."""
    zone = ZoneInfo(name)
    # A day earlier and later: local years begin and end at other instants than those of UTC.
    at = datetime(first_year, 1, 1, tzinfo=UTC) - timedelta(days=1)
    end = datetime(last_year + 1, 1, 1, tzinfo=UTC) + timedelta(days=1)
    lines = ["BEGIN:VTIMEZONE", f"TZID:{name}"]
    lines += _observance(at.astimezone(zone).replace(tzinfo=None), at, at, zone)
    while at < end:
        following = at + _PROBE
        if _rule(following, zone) != _rule(at, zone):
            low, high = at, following
            while high - low > _SECOND:
                middle = (low + (high - low) / 2).replace(microsecond=0)
                low, high = (middle, high) if _rule(middle, zone) == _rule(at, zone) else (low, middle)
            before = high - _SECOND
            # The onset as the clock showed it that was about to be turned.
            onset = (high + _offset(before, zone)).replace(tzinfo=None)
            lines += _observance(onset, before, high, zone)
        at = following
    lines.append("END:VTIMEZONE")
    return tuple(lines)


def _observance(onset: datetime, before: datetime, after: datetime, zone: ZoneInfo) -> list[str]:
    local = after.astimezone(zone)
    kind = "DAYLIGHT" if local.dst() else "STANDARD"
    return [
        f"BEGIN:{kind}",
        f"DTSTART:{_local(onset)}",
        f"TZOFFSETFROM:{_signed(_offset(before, zone))}",
        f"TZOFFSETTO:{_signed(_offset(after, zone))}",
        f"TZNAME:{_text(local.tzname() or '')}",
        f"END:{kind}",
    ]


def _rule(at: datetime, zone: ZoneInfo) -> tuple[Any, ...]:
    local = at.astimezone(zone)
    return local.utcoffset(), local.dst(), local.tzname()


def _offset(at: datetime, zone: ZoneInfo) -> timedelta:
    return at.astimezone(zone).utcoffset() or timedelta()


def _signed(offset: timedelta) -> str:
    seconds = round(offset.total_seconds())
    minutes, rest = divmod(abs(seconds), 60)
    return f"{'-' if seconds < 0 else '+'}{minutes // 60:02d}{minutes % 60:02d}{f'{rest:02d}' if rest else ''}"


def _twice(at: datetime, zone: ZoneInfo) -> bool:
    """Whether the clock shows this time twice that day."""
    local = at.astimezone(zone)
    return local.replace(fold=0).utcoffset() != local.replace(fold=1).utcoffset()


# -- words ---------------------------------------------------------------------------------------------------------------


def _name(one: Named | None, labelled: bool) -> str:
    if one is None:
        return ""
    return one.discreet_name or ("" if labelled else one.name)


def _address(clinic: Named | None) -> str:
    address = clinic.address if clinic and clinic.address else {}
    town = " ".join(filter(None, (address.get("state", ""), address.get("postal_code", ""))))
    return ", ".join(filter(None, (*address.get("lines", ()), address.get("city", ""), town)))


def _utc(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y%m%dT%H%M%SZ}"


def _local(at: datetime) -> str:
    return f"{at:%Y%m%dT%H%M%S}"


def _text(value: str) -> str:
    """A TEXT value: escaped, without the control characters that the format knows no way for."""
    lines = value.replace("\r\n", "\n").replace("\r", "\n")
    clean = "".join(one for one in lines if (one >= " " and one != "\x7f") or one in "\n\t")
    return clean.replace("\\", "\\\\").replace(";", "\\;").replace(",", "\\,").replace("\n", "\\n")


def _folded(line: str) -> str:
    """At most 75 octets to a line, and no character torn in two."""
    if line.isascii() and len(line) <= _FOLDED_AT:
        return line
    return "\r\n ".join(_parts(line))


def _parts(line: str) -> Iterable[str]:
    part, size = [], 0
    for character in line:
        octets = len(character.encode())
        if size + octets > _FOLDED_AT:
            yield "".join(part)
            part, size = [], 1  # the blank by which a line goes on
        part.append(character)
        size += octets
    yield "".join(part)

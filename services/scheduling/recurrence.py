"""Recurring visits: which local wall times a rule of RFC 5545 names, and how a rule changes with its visits.

The rules, each said once here:

* **A rule names local wall times**, and each becomes an instant by itself in the clinic's zone: 09:00 stays 09:00 over a
  clock change. Skipped and repeated times are read as everywhere else (`availability.py`): a skipped one moves forward
  by the gap, a repeated one means the first.
* **A rule ends**, by COUNT or UNTIL, within `MONTHS` months from today, and names `MOST` times at the most. Nothing is
  expanded beyond that: what a rule would name in a million years costs nothing.
* **The first visit is one of the rule's.** RFC 5545 would count one that isn't, too, which nobody expects. It also bounds
  the search for the next one: a rule that names a day once names it again within some periods.
* **A move stays within its period**: a weekly visit within its week, so that every 8th week remains every 8th week.
"""

import calendar
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, time, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

from dateutil.relativedelta import relativedelta
from dateutil.rrule import DAILY, MONTHLY, WEEKLY, rrule, weekday

from chassis.calendar import at_local
from chassis.errors import Invalid

MOST = 200
MONTHS = 24
_DAYS = ("MO", "TU", "WE", "TH", "FR", "SA", "SU")
_FREQUENCIES = {"DAILY": DAILY, "WEEKLY": WEEKLY, "MONTHLY": MONTHLY}
_INTERVAL_AT_MOST = 1000
_PART = re.compile(r"[A-Z]+=[A-Z0-9,+-]+")
_BY_DAY = re.compile(r"([+-]?[1-9][0-9]?)?(MO|TU|WE|TH|FR|SA|SU)")
_UNTIL = re.compile(r"([0-9]{8})(?:T([0-9]{6})(Z?))?")
_NUMBER = re.compile(r"[0-9]{1,9}")
_SIGNED = re.compile(r"[+-]?[0-9]{1,3}")


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule as far as visits need it. `until` is local wall time, inclusive; weekdays count from 0 for Monday."""

    frequency: str
    interval: int = 1
    by_day: tuple[tuple[int, int], ...] = ()
    """(ordinal within the month or 0, weekday)."""
    by_month_day: tuple[int, ...] = ()
    by_set_position: tuple[int, ...] = ()
    week_start: int = 0
    count: int = 0
    until: datetime | None = None

    def __str__(self) -> str:
        """The rule as RFC 5545 writes it."""
        parts = [f"FREQ={self.frequency}"]
        if self.interval > 1:
            parts.append(f"INTERVAL={self.interval}")
        if self.by_day:
            parts.append("BYDAY=" + ",".join(f"{ordinal or ''}{_DAYS[day]}" for ordinal, day in self.by_day))
        for name, values in (("BYMONTHDAY", self.by_month_day), ("BYSETPOS", self.by_set_position)):
            if values:
                parts.append(f"{name}={','.join(map(str, values))}")
        if self.week_start:
            parts.append(f"WKST={_DAYS[self.week_start]}")
        if self.count:
            parts.append(f"COUNT={self.count}")
        if self.until is not None:
            parts.append(f"UNTIL={self.until:%Y%m%dT%H%M%S}")
        return ";".join(parts)

    def ending(self, last: datetime) -> "Rule":
        """The same rule until this local time."""
        return replace(self, count=0, until=last)

    def on(self, day: int, first: datetime) -> "Rule":
        """The same weekly rule on another weekday. Raises Invalid `WEEKDAY_NOT_MOVABLE` for any other rule."""
        days = {one for _, one in self.by_day} or {first.weekday()}
        if self.frequency != "WEEKLY" or len(days) > 1:
            raise Invalid(
                "WEEKDAY_NOT_MOVABLE", "Only a weekly series on one weekday moves to another weekday.", field="weekday"
            )
        return replace(self, by_day=((0, day),))


def read(text: str, zone: ZoneInfo) -> Rule:
    """A rule as it was sent; an UNTIL in UTC is read by the clock of `zone`. Raises Invalid `RULE_INVALID`."""
    parts: dict[str, str] = {}
    for part in text.strip().removeprefix("RRULE:").rstrip(";").upper().split(";"):
        if not _PART.fullmatch(part):
            raise _invalid("is not written as in RFC 5545, such as FREQ=WEEKLY;COUNT=10")
        name, _, value = part.partition("=")
        if name in parts:
            raise _invalid("names a part twice")
        parts[name] = value
    frequency = parts.pop("FREQ", "")
    if frequency not in _FREQUENCIES:
        raise _invalid("needs FREQ as DAILY, WEEKLY or MONTHLY")
    rule = Rule(
        frequency,
        _number(parts.pop("INTERVAL", "1"), 1, _INTERVAL_AT_MOST, "INTERVAL"),
        tuple(_by_day(one, frequency) for one in _values(parts.pop("BYDAY", ""))),
        tuple(_signed(one, 31, "BYMONTHDAY") for one in _values(parts.pop("BYMONTHDAY", ""))),
        tuple(_signed(one, 31, "BYSETPOS") for one in _values(parts.pop("BYSETPOS", ""))),
        _week_start(parts.pop("WKST", "MO")),
        _number(parts.pop("COUNT"), 1, 10**9, "COUNT") if "COUNT" in parts else 0,
        _until(parts.pop("UNTIL"), zone) if "UNTIL" in parts else None,
    )
    if parts:
        raise _invalid("has a part that visits have no use for")
    if rule.count and rule.until is not None:
        raise _invalid("ends by COUNT or by UNTIL, not by both")
    if (rule.by_month_day or rule.by_set_position) and frequency != "MONTHLY":
        raise _invalid("has BYMONTHDAY or BYSETPOS, which only a monthly one can")
    if rule.by_set_position and not (rule.by_day or rule.by_month_day):
        raise _invalid("has BYSETPOS without anything that it counts")
    return rule


def wall_times(rule: Rule, first: datetime, today: date) -> list[datetime]:
    """The local wall times of a series that begins with `first`, ascending; `today` is the clinic's.

    Raises Invalid `SERIES_WITHOUT_END`, `TOO_MANY_OCCURRENCES`, `SERIES_TOO_LONG`, `FIRST_NOT_IN_RULE`, `RULE_INVALID`.
    """
    if not rule.count and rule.until is None:
        raise Invalid("SERIES_WITHOUT_END", "The rule needs an end: COUNT or UNTIL.", field="rule")
    if rule.count > MOST:
        raise _too_many()
    # The last second of that day, whatever the rule says beyond it.
    horizon = datetime.combine(today + relativedelta(months=MONTHS), time(23, 59, 59))
    if first > horizon or (rule.until is not None and rule.until > horizon):
        raise _too_long()
    if not _names(rule, first.date()):
        raise Invalid("FIRST_NOT_IN_RULE", "The first visit's day is none of those that the rule names.", field="start")
    found = list(islice(_expansion(rule, first, rule.until or horizon), rule.count or MOST + 1))
    if len(found) > MOST:
        raise _too_many()
    if len(found) < rule.count:
        raise _too_long()
    if not found:
        raise Invalid("RULE_INVALID", "The rule ends before the series begins.", field="rule")
    return found


def instant(local: datetime, zone: str) -> datetime:
    """The instant (UTC) of a local wall time."""
    return at_local(local.date(), local.time(), zone)


def moved(local: datetime, clock: time | None, day: int | None, week_start: int = 0) -> datetime:
    """A wall time at another time of day, or on another weekday of its own week (0 is Monday); None stays as it is."""
    if day is not None:
        local += timedelta(days=(day - week_start) % 7 - (local.weekday() - week_start) % 7)
    return datetime.combine(local.date(), clock if clock is not None else local.time())


def _names(rule: Rule, day: date) -> bool:
    """Whether a rule names the very day with which it begins."""
    if rule.frequency != "MONTHLY" or not (rule.by_day or rule.by_month_day):
        return not rule.by_day or day.weekday() in {one for _, one in rule.by_day}
    length = calendar.monthrange(day.year, day.month)[1]
    found = []
    for number in range(1, length + 1):
        of_week = day.replace(day=number).weekday()
        ordinals = {0, (number - 1) // 7 + 1, -((length - number) // 7 + 1)}
        if rule.by_day and not any(one == of_week and ordinal in ordinals for ordinal, one in rule.by_day):
            continue
        if not rule.by_month_day or {number, number - length - 1} & {*rule.by_month_day}:
            found.append(number)
    if rule.by_set_position:
        places = [at - 1 if at > 0 else at + len(found) for at in rule.by_set_position]
        found = [found[at] for at in places if 0 <= at < len(found)]
    return day.day in found


def _expansion(rule: Rule, first: datetime, last: datetime) -> rrule:
    days = list(rule.by_day)
    if any(ordinal for ordinal, _ in days):
        # Each by its ordinals: of "MO,1TU" dateutil would name what is both, where RFC 5545 means either.
        days = [(each, day) for ordinal, day in days for each in ((ordinal,) if ordinal else range(1, 6))]
    return rrule(
        _FREQUENCIES[rule.frequency],
        dtstart=first,
        interval=rule.interval,
        wkst=rule.week_start,
        until=last,
        bysetpos=rule.by_set_position or None,
        bymonthday=rule.by_month_day or None,
        byweekday=[weekday(day, ordinal) if ordinal else weekday(day) for ordinal, day in days] or None,
    )


def _values(text: str) -> Sequence[str]:
    return text.split(",") if text else ()


def _number(text: str, least: int, most: int, name: str) -> int:
    if not _NUMBER.fullmatch(text) or not least <= int(text) <= most:
        raise _invalid(f"has a {name} that is no whole number from {least} to {most}")
    return int(text)


def _signed(text: str, most: int, name: str) -> int:
    if not _SIGNED.fullmatch(text) or not 1 <= abs(int(text)) <= most:
        raise _invalid(f"has a {name} that is none from 1 to {most}, or from -1 to -{most}")
    return int(text)


def _by_day(text: str, frequency: str) -> tuple[int, int]:
    found = _BY_DAY.fullmatch(text)
    if found is None:
        raise _invalid("has a BYDAY that is none of MO to SU, with a number before it or not")
    ordinal = int(found[1] or 0)
    if ordinal and frequency != "MONTHLY":
        raise _invalid("has a BYDAY with a number, which only a monthly one can")
    if abs(ordinal) > 5:
        raise _invalid("has a BYDAY whose number no month reaches")
    return ordinal, _DAYS.index(found[2])


def _week_start(text: str) -> int:
    if text not in _DAYS:
        raise _invalid("has a WKST that is none of MO to SU")
    return _DAYS.index(text)


def _until(text: str, zone: ZoneInfo) -> datetime:
    found = _UNTIL.fullmatch(text)
    try:
        if found is None:
            raise ValueError
        day = datetime.strptime(found[1], "%Y%m%d").replace(tzinfo=UTC)
        if not 1000 <= day.year <= 2999:
            raise ValueError
        if found[2] is None:
            return datetime.combine(day.date(), time(23, 59, 59))
        local = datetime.combine(day.date(), datetime.strptime(found[2], "%H%M%S").replace(tzinfo=UTC).time())
    except ValueError:
        raise _invalid("has an UNTIL that is no date or time, such as 20270131 or 20270131T170000Z") from None
    return local.replace(tzinfo=UTC).astimezone(zone).replace(tzinfo=None) if found[3] else local


def _invalid(what: str) -> Invalid:
    return Invalid("RULE_INVALID", f"The rule {what}.", field="rule")


def _too_many() -> Invalid:
    return Invalid("TOO_MANY_OCCURRENCES", f"The rule names more than {MOST} visits.", field="rule")


def _too_long() -> Invalid:
    return Invalid("SERIES_TOO_LONG", f"The rule goes on for longer than {MONTHS} months from today.", field="rule")

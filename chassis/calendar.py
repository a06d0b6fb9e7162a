"""Business days, local wall times and windows of the day: pure functions on zone and holiday calendar."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import holidays

END_OF_DAY = time(23, 59, 59)
SATURDAY = 5


@lru_cache(maxsize=512)
def _holidays(region: str, year: int) -> frozenset[date]:
    country, _, subdivision = region.partition("-")
    try:
        return frozenset(holidays.country_holidays(country, subdiv=subdivision or None, years=year))
    except NotImplementedError:
        raise ValueError(f"unknown holiday region {region!r}") from None


def warm() -> None:
    """Pay now for what the first look at a calendar costs: some tenths of a CPU-second, against a millisecond later."""
    today = datetime.now(UTC)
    for year in (today.year, today.year + 1):
        _holidays("US", year)


def at_local(day: date, clock: time, zone: str) -> datetime:
    """The instant (UTC) of a wall time: skipped ones move forward by the gap, repeated ones mean the first."""
    return datetime.combine(day, clock.replace(tzinfo=None, fold=0), ZoneInfo(zone)).astimezone(UTC)


def is_business_day(day: date, holiday_region: str = "US", closed: frozenset[date] = frozenset()) -> bool:
    """Monday to Friday, no public holiday of the region, not in `closed`.

    `holiday_region` is an ISO 3166 country or subdivision ("US", "US-MA"); ValueError if unknown.
    """
    return day.weekday() < SATURDAY and day not in closed and day not in _holidays(holiday_region, day.year)


def is_holiday(day: date, holiday_region: str) -> bool:
    """Whether a day is a public holiday of the region. ValueError for an unknown region."""
    return day in _holidays(holiday_region, day.year)


def add_business_days(
    start: datetime, days: int, zone: str, holiday_region: str = "US", closed: frozenset[date] = frozenset()
) -> datetime:
    """The same local wall time `days` business days later, in UTC.

    The day of `start` does not count. A start on a day that is no business day is due at the end (23:59:59) of the
    last day counted, so that what begins later is never due earlier. 0 days gives the start itself. ValueError for a
    naive start, negative days or an unknown region.
    """
    if start.tzinfo is None or days < 0:
        raise ValueError("start must be aware and days not negative")
    if days == 0:
        return start.astimezone(UTC)
    local = start.astimezone(ZoneInfo(zone))
    clock = local.time() if is_business_day(local.date(), holiday_region, closed) else END_OF_DAY
    day = local.date()
    while days:
        day += timedelta(days=1)
        days -= is_business_day(day, holiday_region, closed)
    return at_local(day, clock, zone)


def add_days(start: datetime, days: int, zone: str) -> datetime:
    """The same local wall time `days` calendar days later (or earlier, if negative), in UTC."""
    local = start.astimezone(ZoneInfo(zone))
    return at_local(local.date() + timedelta(days=days), local.time(), zone)


def is_in_local_window(at: datetime, zones: Sequence[str], start: time, end: time) -> bool:
    """Whether every zone's clock shows `start <= time < end` (one local day: start before end)."""
    return all(start <= at.astimezone(ZoneInfo(zone)).time() < end for zone in zones)


def next_local_time_in_window(
    at: datetime, zones: Sequence[str], start: time, end: time, within: timedelta = timedelta(days=8)
) -> datetime | None:
    """The first instant (UTC) from `at` on at which every zone's clock shows `start <= time < end`; None if none is.

    ValueError for a naive instant, no zone, or a window that is empty or passes midnight.
    """
    if at.tzinfo is None or not zones or start >= end:
        raise ValueError("an aware instant, at least one zone and a window within one day are needed")
    instant = at.astimezone(UTC)
    limit = instant + within
    while instant <= limit:
        # Each zone only moves the instant forward, past times at which that zone is shut: no open instant is skipped.
        latest = max(_next_in_zone(instant, zone, start, end) for zone in zones)
        if latest == instant:
            return instant
        instant = latest
    return None


def _next_in_zone(at: datetime, zone: str, start: time, end: time) -> datetime:
    local = at.astimezone(ZoneInfo(zone))
    if start <= local.time() < end:
        return at
    opens = at_local(local.date() + timedelta(days=local.time() >= end), start, zone)
    if opens <= at:  # the second showing of a repeated hour: the first opening is over, so it is the second one
        opens = datetime.combine(local.date(), start.replace(fold=1), ZoneInfo(zone)).astimezone(UTC)
    return opens

"""A day at a clinic: from midnight to midnight by the clock on its wall."""

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

from chassis.calendar import at_local
from chassis.errors import Invalid

_MIDNIGHT = time(0)


def day_named(value: str) -> date:
    """The day that a request names. Raises Invalid `DATE_INVALID`."""
    try:
        day = date.fromisoformat(value)
        if not 1000 <= day.year <= 2999:  # at the ends of the calendar no next day can be counted
            raise ValueError
    except ValueError:
        raise Invalid("DATE_INVALID", "There is no such day in the calendar.", field="date") from None
    return day


def window(day: date, zone: str) -> tuple[datetime, datetime]:
    """The first instant of a day, and that of the next day. Without a zone it is UTC's."""
    return at_local(day, _MIDNIGHT, zone or "UTC"), at_local(day + timedelta(days=1), _MIDNIGHT, zone or "UTC")


def today(now: datetime, zone: str) -> date:
    """The day that the clinic's clock shows."""
    return now.astimezone(ZoneInfo(zone) if zone else UTC).date()

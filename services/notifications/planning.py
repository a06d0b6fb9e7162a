"""Which messages a visit gets and when each is due, from the offsets of a reminder policy."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, NamedTuple

from chassis.calendar import add_days

OffsetKind = Literal["at_booking", "days_before", "minutes_before"]


@dataclass(frozen=True, slots=True)
class Offset:
    """One message of a policy: at booking, `amount` local days before the start, or `amount` minutes before it."""

    name: str
    kind: OffsetKind
    amount: int = 0

    def __post_init__(self) -> None:
        if (self.kind == "at_booking") != (self.amount == 0) or self.amount < 0:
            raise ValueError("an offset before the start needs a positive amount, one at booking has none")


# Two reminders beat one (AJMC 2018, n = 54,066: 4.4 % missed against 5.8 % and 5.3 %).
DEFAULT_POLICY = (
    Offset("booked", "at_booking"),
    Offset("3d", "days_before", 3),
    Offset("1d", "days_before", 1),
)
TWO_HOURS = Offset("2h", "minutes_before", 120)


class Planned(NamedTuple):
    """A message to send: not before `due_time`, and not once `latest_time` (the visit's start) is reached; both UTC."""

    offset_name: str
    due_time: datetime
    latest_time: datetime


def plan(
    policy: Sequence[Offset], booked_time: datetime, appointment_start: datetime, now: datetime, zone: str
) -> list[Planned]:
    """The messages still worth sending, in order of their due times.

    `booked_time` is when this time was agreed (booking or latest reschedule); `zone` is the clinic's. "Days before" keeps
    the visit's local wall time over a clock change. Offsets not after `booked_time` are dropped, nothing is due at or after
    the start, and after an outage only the last of the reminders missed is caught up.
    """
    if now >= appointment_start:
        return []
    start = appointment_start.astimezone(UTC)
    at_booking: list[Planned] = []
    reminders: list[Planned] = []
    for offset in policy:
        if offset.kind == "at_booking":
            # Not `now`: a replay plans the same row, and lateness counts from the booking.
            at_booking.append(Planned(offset.name, min(booked_time, now).astimezone(UTC), start))
            continue
        if offset.kind == "days_before":
            due = add_days(start, -offset.amount, zone)
        else:
            due = start - timedelta(minutes=offset.amount)
        if booked_time < due < start:
            reminders.append(Planned(offset.name, due, start))
    reminders.sort(key=lambda planned: planned.due_time)
    missed = sum(planned.due_time <= now for planned in reminders)
    return at_booking + reminders[max(0, missed - 1) :]

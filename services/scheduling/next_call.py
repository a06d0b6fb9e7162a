"""What must happen next for a request for a visit, by when, and which of several comes first."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from typing import NamedTuple

from chassis.calendar import END_OF_DAY, add_business_days, at_local

ATTEMPTS = 3
"""So many tries in a row without success, and a letter is due."""
UNREACHABLE = "unreachable"
"""The reason to close that only a letter makes true."""
_LEAD = timedelta(days=14)
_OPENING = time(8)
_RANK = {"STAT": 0, "ASAP": 1, "URGENT": 2}
_ROUTINE = 3
# Minutes after the last step, or else business days of the clinic.
_MINUTES: Mapping[str, int] = {"STAT": 60, "ASAP": 240}
_DAYS: Mapping[str, tuple[int, int]] = {
    # What to do: business days where it is urgent, and where it is not.
    "call the patient": (1, 3),
    "call again": (1, 2),
    "send the letter": (1, 1),
    "wait for the answer": (5, 10),
}


@dataclass(frozen=True, slots=True)
class Calendar:
    """The days and the zone by which a clinic works."""

    zone: str
    region: str
    closed: frozenset[date] = frozenset()


class Step(NamedTuple):
    """What must happen next, by when, and by which rule."""

    action: str
    due: datetime
    basis: str


def rank(priority: str) -> int:
    """What is more urgent has the lower number."""
    return _RANK.get(priority, _ROUTINE)


def failed_in_a_row(outcomes: Iterable[str]) -> int:
    """How many tries there were since the last that reached the patient."""
    count = 0
    for outcome in outcomes:
        count = 0 if outcome == "REACHED" else count + 1
    return count


def is_letter_due(outcomes: Iterable[str]) -> bool:
    """Whether calling has been tried often enough."""
    return failed_in_a_row(outcomes) >= ATTEMPTS


def next_step(
    status: str,
    priority: str,
    tries: int,
    since: datetime,
    calendar: Calendar,
    *,
    earliest: date | None = None,
    latest: date | None = None,
    call_back: datetime | None = None,
) -> Step:
    """The step of an open request: status OPEN, LETTER_DUE or LETTER_SENT.

    `since` (aware) is when the last step was done, `tries` how many were made. What isn't wanted before a day rests until two
    weeks before it; what is wanted by a day is due by its end, or at once where that is past. A call that the patient
    asked for is due when they asked for it.
    """
    action = {"LETTER_DUE": "send the letter", "LETTER_SENT": "wait for the answer"}.get(
        status, "call again" if tries else "call the patient"
    )
    if call_back is not None and status == "OPEN":
        return Step(action, call_back, "as the patient asked")
    start, resting = since, ""
    if earliest is not None:
        opens = at_local(earliest, _OPENING, calendar.zone) - _LEAD
        if opens > start:
            start, resting = opens, ", from two weeks before the earliest day"
    waits = status == "LETTER_SENT"
    if priority in _MINUTES and not waits:
        minutes = _MINUTES[priority]
        due, basis = start + timedelta(minutes=minutes), f"{action} within {minutes} minutes"
    else:
        days = _DAYS[action][rank(priority) == _ROUTINE]
        due = add_business_days(start, days, calendar.zone, calendar.region, calendar.closed)
        basis = f"{action} within {days} business {'day' if days == 1 else 'days'} of the clinic"
    basis = f"{basis} ({priority.lower()}){resting}"
    if latest is not None and not waits:
        end = at_local(latest, END_OF_DAY, calendar.zone)
        if end < due:
            due, basis = max(end, since), f"{action} by the latest day wished"
    return Step(action, due, basis)

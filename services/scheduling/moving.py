"""Which other time suits a visit that can't take place best, and whether the patient lets us move it there without asking."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import NamedTuple
from zoneinfo import ZoneInfo

_ELSE = 14.0
"""Days that one would rather wait than see somebody else."""
_PREFERRED = 2.0
_ELSEWHERE = 7.0
_AGAINST_WISHES = 30.0
_DAY = 86_400


class Place(NamedTuple):
    """A visit's time and place, in epoch seconds; `zone` is the clinic's."""

    start: int
    end: int
    clinic_id: str
    practitioner_id: str
    zone: str
    resource_ids: tuple[str, ...] = ()

    @property
    def local(self) -> datetime:
        """The start by the clinic's clock."""
        return datetime.fromtimestamp(self.start, UTC).astimezone(ZoneInfo(self.zone))

    @property
    def day(self) -> date:
        """The day by the clinic's clock."""
        return self.local.date()


@dataclass(frozen=True, slots=True)
class Limits:
    """How far a visit may be moved without asking."""

    within_days: int
    same_practitioner: bool = False
    same_clinic: bool = False


@dataclass(frozen=True, slots=True)
class Wishes:
    """How the patient wishes to be scheduled; `weekdays` with 1 for Monday, times of day as `HH:MM`; what is empty isn't wished."""

    clinic_ids: frozenset[str] = frozenset()
    practitioner_ids: frozenset[str] = frozenset()
    weekdays: frozenset[int] = frozenset()
    earliest: str = ""
    latest: str = ""
    may_be_moved: Limits | None = None


NONE = Wishes()


class Cost(NamedTuple):
    """What speaks against a time, each in days that one would rather wait; the sum decides."""

    days: float
    practitioner: float
    clinic: float
    wishes: float
    time_of_day: float


def fits(place: Place, wishes: Wishes) -> bool:
    """Whether a time lies within the weekdays and times of day wished."""
    begin, end = place.local, datetime.fromtimestamp(place.end, UTC).astimezone(ZoneInfo(place.zone))
    if wishes.weekdays and begin.isoweekday() not in wishes.weekdays:
        return False
    if wishes.earliest and begin.strftime("%H:%M") < wishes.earliest:
        return False
    return not wishes.latest or (end.strftime("%H:%M") <= wishes.latest and end.date() == begin.date())


def may_move(visit: Place, place: Place, wishes: Wishes) -> bool:
    """Whether the patient lets us move the visit there without asking; without stored limits nobody may."""
    limits = wishes.may_be_moved
    if limits is None or not fits(place, wishes):
        return False
    if limits.same_practitioner and place.practitioner_id != visit.practitioner_id:
        return False
    if limits.same_clinic and place.clinic_id != visit.clinic_id:
        return False
    return abs((place.day - visit.day).days) <= limits.within_days


def cost(visit: Place, place: Place, wishes: Wishes) -> Cost:
    """What speaks against a time; 0 in all for the visit's own day, hour, clinic and practitioner where they are as wished."""
    practitioner = 0.0
    if place.practitioner_id != visit.practitioner_id:
        practitioner = _PREFERRED if place.practitioner_id in wishes.practitioner_ids else _ELSE
    clinic = 0.0
    if place.clinic_id != visit.clinic_id and place.clinic_id not in wishes.clinic_ids:
        clinic = _ELSEWHERE
    was, now = visit.local, place.local
    minutes = abs((was.hour - now.hour) * 60 + was.minute - now.minute)
    return Cost(
        float(abs((place.day - visit.day).days)),
        practitioner,
        clinic,
        0.0 if fits(place, wishes) else _AGAINST_WISHES,
        minutes / 1440,
    )


def ranked(visit: Place, places: Iterable[Place], wishes: Wishes) -> list[Place]:
    """The best first; of equals the earliest."""
    return sorted(
        set(places),
        key=lambda one: (sum(cost(visit, one, wishes)), one.start, one.clinic_id, one.practitioner_id),
    )

"""What the measures mean: pure definitions, and what was measured each night.

* **Third next available** (IHI): the days between today and the day of the third time that could be booked, by the clinic's
  calendar, weekends and closed days counted; the first and second may be chance, such as a cancellation. Times that
  would overlap are one: with a grid of 15 minutes three starts of a 30-minute visit are no three appointments. Held
  times are not free. It is counted for each practitioner who sees such visits; the clinic's figure is their mean. Who
  has no third time within the horizon is told beside it and not in it.
* **Utilisation**: open minutes in which a visit stood, each once, of all open minutes. Cancelled visits and holds took none;
  no-shows did.
* **Lead time**: from the making of a visit to its start, the median: few visits far ahead would carry a mean away.
* **No-show rate**: of the visits that were due, ended in any way but a cancellation.
* **Late-cancel rate**: of all visits that were promised. **Fill rate**: of those cancelled before their start, whose time
  a standing visit of the same practitioner has taken since, however it came there. **Waitlist fill rate**: of the times
  that came free while somebody waited for such a visit and in which nothing more is done, those that an accepted offer
  filled.
"""

import enum
from collections.abc import Iterable, Sequence
from datetime import date, datetime, time, timedelta
from statistics import fmean
from typing import NamedTuple
from zoneinfo import ZoneInfo

from sqlalchemy import BigInteger, DateTime, Float, Index, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from chassis.calendar import at_local
from chassis.errors import Invalid
from chassis.model import Aggregate, Id, Owned, status_type
from services.scheduling.availability import Interval, VisitType, intersect, merge
from services.scheduling.directory import Base

FEWEST = 11
"""Figures made of fewer visits are left out: whose they are could be guessed."""
NIGHTLY_DAYS = 28
NIGHT = time(2, 30)


class Kind(enum.StrEnum):
    """What is measured each night."""

    THIRD_NEXT_AVAILABLE = "THIRD_NEXT_AVAILABLE"
    UTILIZATION = "UTILIZATION"
    LEAD_TIME = "LEAD_TIME"
    NO_SHOW_RATE = "NO_SHOW_RATE"
    LATE_CANCEL_RATE = "LATE_CANCEL_RATE"
    FILL_RATE = "FILL_RATE"
    WAITLIST_FILL_RATE = "WAITLIST_FILL_RATE"


class Measure(Aggregate, Base):
    """What was measured of a clinic in one night. Of no patient; never changed."""

    __tablename__ = "measure"
    __table_args__ = (
        UniqueConstraint(
            "tenant_id",
            "clinic_id",
            "date",
            "kind",
            "visit_type_id",
            name="measure_key",
            postgresql_nulls_not_distinct=True,
        ),
        Index("measure_by_time", "tenant_id", "create_time", "id"),
    )
    aggregate = "measure"
    subject_field = None

    clinic_id: Mapped[str] = mapped_column(Id)
    visit_type_id: Mapped[str | None] = mapped_column(Id)
    kind: Mapped[Kind] = mapped_column(status_type(Kind))
    date: Mapped[str]
    value: Mapped[float] = mapped_column(Float)
    counted: Mapped[int] = mapped_column(BigInteger)


class MeasureRun(Owned, Base):
    """When a clinic is measured next; `id` is the clinic's."""

    __tablename__ = "measure_run"
    __table_args__ = (Index("measure_run_due", "due_time"),)

    due_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class Figure(NamedTuple):
    """A figure and how many it is made of."""

    value: float
    counted: int


class Wait(NamedTuple):
    """Third next available of a visit type at a clinic."""

    days: float | None
    """The mean, None where nobody has a third time."""
    practitioners: int
    full: int


def starts_to_look_at(visit_type: VisitType) -> int:
    """How many free starts hold the third appointment in any case."""
    return 2 * -(-_span(visit_type) // (60 * visit_type.grid)) + 1


def third(starts: Iterable[int], visit_type: VisitType) -> int | None:
    """The start of the third of the appointments that could be booked one after the other; starts ascend."""
    free_from, count = 0, 0
    for start in starts:
        if start >= free_from:
            count += 1
            if count == 3:
                return start
            free_from = start + _span(visit_type)
    return None


def wait(now: int, thirds: Sequence[int | None], zone: ZoneInfo) -> Wait:
    """The clinic's figure from the third start of each practitioner."""
    today = datetime.fromtimestamp(now, zone).date()
    days = [(datetime.fromtimestamp(at, zone).date() - today).days for at in thirds if at is not None]
    return Wait(fmean(days) if days else None, len(days), len(thirds) - len(days))


def minutes(opened: Iterable[Interval], visits: Iterable[Interval]) -> tuple[int, int]:
    """Open minutes, and those of them in which a visit stood."""
    opened = merge(opened)
    return _minutes(opened), _minutes(intersect(opened, visits))


def share(part: int, whole: int) -> Figure | None:
    """A share, or None where it would be made of too few."""
    return Figure(part / whole, whole) if whole >= FEWEST else None


def days(first: str, last: str, zone: ZoneInfo, most: int) -> tuple[datetime, datetime]:
    """The first instant of the first day and that after the last one, by the clinic's clock.

    Raises Invalid `DATE_INVALID`, `WINDOW_TOO_LONG`.
    """
    try:
        begin, end = date.fromisoformat(first), date.fromisoformat(last)
        if begin.year < 1000 or end.year > 2999:
            raise ValueError
    except ValueError:
        raise Invalid("DATE_INVALID", "There is no such day in the calendar.", field="first_date") from None
    if not 1 <= (end - begin).days + 1 <= most:
        raise Invalid("WINDOW_TOO_LONG", f"The first to the last day are 1 to {most} days.", field="last_date")
    return at_local(begin, time(0), zone.key), at_local(end + timedelta(days=1), time(0), zone.key)


def next_night(now: datetime, zone: ZoneInfo) -> datetime:
    """When the clinic's day is over and nobody waits for the database."""
    today = now.astimezone(zone).date()
    tonight = at_local(today, NIGHT, zone.key)
    return tonight if tonight > now else at_local(today + timedelta(days=1), NIGHT, zone.key)


def _span(visit_type: VisitType) -> int:
    return 60 * (visit_type.duration + visit_type.buffer_before + visit_type.buffer_after)


def _minutes(intervals: Iterable[Interval]) -> int:
    return sum(end - start for start, end in intervals) // 60

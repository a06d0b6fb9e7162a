"""Series of visits: which of them a change is about, and how the rule changes with them."""

import enum
from collections.abc import Sequence
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from sqlalchemy import Index
from sqlalchemy.orm import Mapped, mapped_column

from chassis.errors import FailedPrecondition, Invalid
from chassis.lifecycle import Lifecycle
from chassis.model import Id, Living, about_subject, status_type
from services.scheduling import recurrence
from services.scheduling.appointment import Appointment, Status
from services.scheduling.directory import Base


class SeriesStatus(enum.StrEnum):
    """Whether more may come."""

    ACTIVE = "ACTIVE"
    CANCELLED = "CANCELLED"


class Scope(enum.StrEnum):
    """Which visits of a series a change is about."""

    THIS = "THIS"
    THIS_AND_FOLLOWING = "THIS_AND_FOLLOWING"
    ALL = "ALL"


class Series(Living, Base):
    """Visits of a patient that recur by a rule. The rule counts from `start` on, in local wall time."""

    __tablename__ = "series"
    __table_args__ = (
        about_subject("series"),
        Index("series_by_patient", "tenant_id", "patient_id", "create_time", "id"),
    )
    aggregate = "series"
    lifecycle = Lifecycle(
        ("book", [], SeriesStatus.ACTIVE, "booked"),
        ("reschedule", [SeriesStatus.ACTIVE], SeriesStatus.ACTIVE, "rescheduled"),
        ("shorten", [SeriesStatus.ACTIVE], SeriesStatus.ACTIVE, "shortened"),
        ("cancel", [SeriesStatus.ACTIVE], SeriesStatus.CANCELLED, "cancelled"),
    )

    patient_id: Mapped[str] = mapped_column(Id)
    status: Mapped[SeriesStatus] = mapped_column(status_type(SeriesStatus))
    visit_type_id: Mapped[str] = mapped_column(Id)
    clinic_id: Mapped[str] = mapped_column(Id)
    practitioner_id: Mapped[str] = mapped_column(Id)
    rule: Mapped[str]
    start: Mapped[str]
    time_zone: Mapped[str]
    previous_series_id: Mapped[str | None] = mapped_column(Id)

    def book(self, visits: int) -> None:
        """It stands, with so many visits."""
        self.move("book", visits=visits)

    def reschedule(self, visits: int, **values: Any) -> None:
        """So many of its visits have moved."""
        for name, value in values.items():
            setattr(self, name, value)
        self.move("reschedule", visits=visits)

    def shorten(self, rule: str, visits: int) -> None:
        """So many visits at its end are no longer its own."""
        self.rule = rule
        self.move("shorten", visits=visits)

    def cancel(self, reason_code: str, visits: int) -> None:
        """Nothing more comes."""
        self.move("cancel", reason_code=reason_code, visits=visits)

    @property
    def practitioner_ids(self) -> list[str]:
        """With whom."""
        return [self.practitioner_id]

    @property
    def first(self) -> datetime:
        """`start` as a local wall time."""
        return datetime.fromisoformat(self.start)

    @property
    def read_rule(self) -> recurrence.Rule:
        """The rule, read."""
        return recurrence.read(self.rule, ZoneInfo(self.time_zone))

    def has_moved(self, visit: Appointment) -> bool:
        """Whether a visit was moved by itself: it is elsewhere, or at another time, than the series has it."""
        return (visit.start_time, visit.clinic_id, visit.practitioner_id) != (
            visit.series_start_time,
            self.clinic_id,
            self.practitioner_id,
        )


def local(visit: Appointment, zone: str) -> datetime:
    """The wall time at which the series has a visit. Where the clock skips that time it is the one that it shows instead."""
    assert visit.series_start_time is not None
    return visit.series_start_time.astimezone(ZoneInfo(zone)).replace(tzinfo=None)


def anchor(visits: Sequence[Appointment], scope: Scope, appointment_id: str, now: datetime) -> Appointment | None:
    """The visit that a change begins with; None for all. Raises Invalid `OCCURRENCE_MISSING`; FailedPrecondition
    `OCCURRENCE_PAST`."""
    if scope is Scope.ALL:
        return None
    found = next((visit for visit in visits if visit.id == appointment_id), None)
    if found is None:
        raise Invalid("OCCURRENCE_MISSING", "This scope needs a visit of the series.", field="appointment_id")
    if found.start_time <= now:
        raise FailedPrecondition("OCCURRENCE_PAST", "What is past is never changed with its series.")
    return found


def following(visits: Sequence[Appointment], begin: Appointment | None) -> list[Appointment]:
    """The visits of a series from one on, by the series' order; all where there is none."""
    ordered = sorted(visits, key=_order)
    return [visit for visit in ordered if begin is None or _order(visit) >= _order(begin)]


def touched(
    series: Series,
    visits: Sequence[Appointment],
    scope: Scope,
    begin: Appointment | None,
    now: datetime,
    *,
    exceptions: bool,
) -> list[Appointment]:
    """The visits that a change is about, in the series' order: booked ones that lie ahead, and those that were moved by
    themselves only with `exceptions` or where the change names them."""
    if scope is Scope.THIS:
        assert begin is not None
        begin.lifecycle.arrow(
            "reschedule", begin.status
        )  # only what is booked still can be moved, or cancelled with a series
        return [begin]
    return [
        visit
        for visit in following(visits, begin)
        if visit.status is Status.BOOKED
        and visit.start_time > now
        and (exceptions or visit is begin or not series.has_moved(visit))
    ]


def _order(visit: Appointment) -> tuple[datetime, int]:
    assert visit.series_start_time is not None
    return visit.series_start_time, visit.series_number or 0

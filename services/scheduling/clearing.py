"""Clearings: days that a practitioner can't see patients on, and what became of each visit there."""

import enum
from datetime import date, datetime, timedelta
from typing import Any

from sqlalchemy import DateTime, Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from chassis.errors import Invalid
from chassis.lifecycle import Lifecycle
from chassis.model import Id, Ids, Living, about_subject, status_type
from services.scheduling.directory import Base

DAYS_AT_MOST = 31
_TIME = DateTime(timezone=True)


class Status(enum.StrEnum):
    """How far a clearing is."""

    RUNNING = "RUNNING"
    DONE = "DONE"


class Outcome(enum.StrEnum):
    """What became of a visit."""

    PENDING = "PENDING"
    MOVED = "MOVED"
    OFFERED = "OFFERED"
    LEFT = "LEFT"
    GONE = "GONE"


class Clearing(Living, Base):
    """Days of a practitioner that are being cleared."""

    __tablename__ = "clearing"
    __table_args__ = (
        Index("clearing_due", "look_time", postgresql_where=text("look_time IS NOT NULL")),
        Index("clearing_by_time", "tenant_id", "create_time", "id"),
    )
    aggregate = "clearing"
    subject_field = None
    lifecycle = Lifecycle(
        ("start", [], Status.RUNNING, "started"),
        ("finish", [Status.RUNNING], Status.DONE, "finished"),
    )

    practitioner_id: Mapped[str] = mapped_column(Id)
    clinic_id: Mapped[str | None] = mapped_column(Id)
    first_date: Mapped[str] = mapped_column(Text)
    last_date: Mapped[str] = mapped_column(Text)
    # [clinic, first instant, last instant]: days begin by each clinic's own clock.
    windows: Mapped[list[Any]] = mapped_column(JSONB, nullable=False, default=list)
    # The clinics of the windows: whose staff may know of it.
    clinic_ids: Mapped[list[str]] = mapped_column(Ids, default=list, server_default=text("'{}'"))
    reason: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    status: Mapped[Status] = mapped_column(status_type(Status))
    # When to look for visits once more; a booking may have looked at the hours just before they were closed.
    look_time: Mapped[datetime | None] = mapped_column(_TIME)

    def start(self, now: datetime) -> None:
        """Begin."""
        self.move("start", reason_code=(self.reason or {}).get("code", ""))
        self.look_time = now

    def finish(self) -> None:
        """Every visit has an outcome."""
        self.move("finish")
        self.look_time = None


class ClearingVisit(Living, Base):
    """One visit of a clearing."""

    __tablename__ = "clearing_visit"
    __table_args__ = (
        about_subject("clearing_visit"),
        UniqueConstraint("tenant_id", "clearing_id", "appointment_id", name="clearing_visit_appointment_key"),
        Index("clearing_visit_by_start", "tenant_id", "clearing_id", "start_time", "id"),
        Index("clearing_visit_by_appointment", "tenant_id", "appointment_id"),
        Index("clearing_visit_due", "due_time", postgresql_where=text("due_time IS NOT NULL")),
    )
    aggregate = "clearing_visit"
    lifecycle = Lifecycle(
        ("find", [], Outcome.PENDING, None),
        ("move_visit", [Outcome.PENDING], Outcome.MOVED, "moved"),
        ("offer", [Outcome.PENDING], Outcome.OFFERED, "offered"),
        ("leave", [Outcome.PENDING], Outcome.LEFT, "left"),
        ("miss", [Outcome.PENDING], Outcome.GONE, "gone"),
        ("accept", [Outcome.OFFERED], Outcome.MOVED, "accepted"),
    )

    clearing_id: Mapped[str] = mapped_column(Id)
    patient_id: Mapped[str] = mapped_column(Id)
    appointment_id: Mapped[str] = mapped_column(Id)
    status: Mapped[Outcome] = mapped_column(status_type(Outcome))
    clinic_id: Mapped[str] = mapped_column(Id)
    practitioner_id: Mapped[str] = mapped_column(Id)
    visit_type_id: Mapped[str] = mapped_column(Id)
    start_time: Mapped[datetime] = mapped_column(_TIME)
    offers: Mapped[list[Any]] = mapped_column(JSONB, nullable=False, default=list)
    hold_id: Mapped[str | None] = mapped_column(Id)
    hold_expire_time: Mapped[datetime | None] = mapped_column(_TIME)
    # Until it has an outcome.
    due_time: Mapped[datetime | None] = mapped_column(_TIME)

    def find(self, now: datetime) -> None:
        """It must be seen to."""
        self.move("find")
        self.due_time = now

    def decide(self, action: str, *, appointment_version: int, offers: list[Any], reason_code: str = "") -> None:
        """Keep what became of it."""
        self.offers, self.due_time = offers, None
        self.move(action, reason_code=reason_code, appointment_version=appointment_version)


def days(first: str, last: str) -> list[date]:
    """The days from the first to the last. Raises Invalid `DATE_INVALID`, `PERIOD_INVALID`."""
    begin, end = _day(first, "date"), _day(last or first, "last_date")
    count = (end - begin).days + 1
    if not 1 <= count <= DAYS_AT_MOST:
        raise Invalid(
            "PERIOD_INVALID", f"The last day is the first, or at most {DAYS_AT_MOST - 1} days later.", field="last_date"
        )
    return [begin + timedelta(days=n) for n in range(count)]


def _day(value: str, field: str) -> date:
    try:
        day = date.fromisoformat(value)
        if not 1000 <= day.year <= 2999:
            raise ValueError
    except ValueError:
        raise Invalid("DATE_INVALID", "There is no such day in the calendar.", field=field) from None
    return day

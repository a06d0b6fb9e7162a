"""Scheduling requests: visits that somebody must still make; each open one has an owner and a due time."""

import enum
from collections.abc import Sequence
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, DateTime, Index, Text, UniqueConstraint, select, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from chassis.calendar import is_holiday
from chassis.errors import FailedPrecondition, Invalid
from chassis.lifecycle import Lifecycle
from chassis.model import Aggregate, Id, Ids, Living, about_subject, status_type
from services.scheduling import next_call
from services.scheduling.appointment import Appointment
from services.scheduling.appointment import Status as VisitStatus
from services.scheduling.directory import Base, Clinic
from services.scheduling.next_call import Calendar

_FAR = datetime(9999, 12, 31, tzinfo=UTC)
_TIME = DateTime(timezone=True)
LIVE = (VisitStatus.BOOKED, VisitStatus.ARRIVED, VisitStatus.CHECKED_IN, VisitStatus.FULFILLED)
"""Statuses of a visit that a request needs nobody for any more."""
ELSEWHERE = "scheduled-elsewhere"
"""Why a request is closed whose visit was made outside this system."""


class Status(enum.StrEnum):
    """Where a request stands."""

    OPEN = "OPEN"
    LETTER_DUE = "LETTER_DUE"
    LETTER_SENT = "LETTER_SENT"
    BOOKED = "BOOKED"
    CLOSED = "CLOSED"


OPEN = (Status.OPEN, Status.LETTER_DUE, Status.LETTER_SENT)
"""Statuses in which somebody must still act."""


class SchedulingRequest(Living, Base):
    """A visit that somebody must make with a patient."""

    __tablename__ = "scheduling_request"
    __table_args__ = (
        about_subject("scheduling_request"),
        UniqueConstraint("tenant_id", "referral_id", name="scheduling_request_referral_key"),
        # What is open, by what is next; the done ones of years are not passed over each time.
        Index(
            "scheduling_request_next",
            "tenant_id",
            "rank",
            "list_time",
            "id",
            postgresql_where=text("due_time IS NOT NULL"),
        ),
        Index(
            "scheduling_request_by_owner",
            "tenant_id",
            "owner_id",
            "rank",
            "list_time",
            "id",
            postgresql_where=text("due_time IS NOT NULL"),
        ),
        Index("scheduling_request_by_patient", "tenant_id", "patient_id", "rank", "list_time", "id"),
        Index(
            "scheduling_request_overdue",
            "due_time",
            postgresql_where=text("due_time IS NOT NULL AND NOT overdue_told"),
        ),
    )
    aggregate = "scheduling_request"
    lifecycle = Lifecycle(
        ("open", [], Status.OPEN, "opened"),
        ("attempt", [Status.OPEN], Status.OPEN, "attempted"),
        ("attempt", [Status.LETTER_DUE], Status.LETTER_DUE, "attempted"),
        ("attempt", [Status.LETTER_SENT], Status.LETTER_SENT, "attempted"),
        ("ask_letter", [Status.OPEN], Status.LETTER_DUE, "letter_due"),
        ("send_letter", [Status.LETTER_DUE], Status.LETTER_SENT, "letter_sent"),
        ("book", OPEN, Status.BOOKED, "booked"),
        # The visit fell through, or the patient was reached after all: calling begins anew.
        ("reopen", [Status.LETTER_DUE, Status.LETTER_SENT, Status.BOOKED, Status.CLOSED], Status.OPEN, "reopened"),
        ("close", OPEN, Status.CLOSED, "closed"),
    )

    patient_id: Mapped[str] = mapped_column(Id)
    status: Mapped[Status] = mapped_column(status_type(Status))
    origin: Mapped[str] = mapped_column(Text, default="STAFF")
    visit_type_id: Mapped[str | None] = mapped_column(Id)
    clinic_id: Mapped[str] = mapped_column(Id)
    preferred_clinic_ids: Mapped[list[str]] = mapped_column(Ids, default=list)
    preferred_practitioner_ids: Mapped[list[str]] = mapped_column(Ids, default=list)
    earliest_date: Mapped[str] = mapped_column(Text, default="")
    latest_date: Mapped[str] = mapped_column(Text, default="")
    priority: Mapped[str] = mapped_column(Text, default="ROUTINE")
    rank: Mapped[int] = mapped_column(BigInteger)
    based_on: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    referral_id: Mapped[str | None] = mapped_column(Id)
    owner: Mapped[dict[str, Any]] = mapped_column(JSONB)
    owner_id: Mapped[str] = mapped_column(Id)
    step_time: Mapped[datetime] = mapped_column(_TIME)
    due_time: Mapped[datetime | None] = mapped_column(_TIME)
    due_basis: Mapped[str] = mapped_column(Text, default="")
    next_action: Mapped[str] = mapped_column(Text, default="")
    # Beside `due_time`, since a page's key can't be null; what is not open comes last.
    list_time: Mapped[datetime] = mapped_column(_TIME)
    overdue_told: Mapped[bool] = mapped_column(default=False)
    attempts: Mapped[list[Any]] = mapped_column(JSONB, nullable=False, default=list, server_default=text("'[]'"))
    letter_time: Mapped[datetime | None] = mapped_column(_TIME)
    appointment_id: Mapped[str | None] = mapped_column(Id)
    close_reason: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    note: Mapped[str] = mapped_column(Text, default="")

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def open(self, owner: dict[str, Any], calendar: Calendar, now: datetime) -> None:
        """Begin, with somebody who must act."""
        self.attempts = []
        self._own(owner)
        self._step("open", Status.OPEN, calendar, now)

    def attempt(
        self,
        outcome: str,
        actor: str,
        calendar: Calendar,
        now: datetime,
        *,
        note: str = "",
        call_back: datetime | None = None,
    ) -> None:
        """Keep what came of a try to reach the patient. A patient who was reached needs no letter.

        Raises Invalid `CALL_BACK_PAST`.
        """
        if call_back is not None and call_back <= now:
            raise Invalid("CALL_BACK_PAST", "The patient can't be called again in the past.", field="call_back_time")
        tried = {"outcome": outcome, "time": now.isoformat(), "actor": actor}
        if note:
            tried["note"] = note
        if call_back is not None:
            tried["call_back_time"] = call_back.isoformat()
        self.lifecycle.arrow("attempt", self.status)
        self.attempts = [*self.attempts, tried]
        reason = outcome.lower().replace("_", "-")
        self._step("attempt", self.status, calendar, now, reason_code=reason)
        if outcome == "REACHED" and self.status is not Status.OPEN:
            self._step("reopen", Status.OPEN, calendar, now, reason_code=reason)
        elif self.status is Status.OPEN and next_call.is_letter_due(one["outcome"] for one in self.attempts):
            self._step("ask_letter", Status.LETTER_DUE, calendar, now)

    def send_letter(self, calendar: Calendar, now: datetime) -> None:
        """The letter is on its way."""
        self._step("send_letter", Status.LETTER_SENT, calendar, now)
        self.letter_time = now

    def book(self, appointment_id: str, calendar: Calendar, now: datetime) -> None:
        """The visit is made."""
        self.appointment_id = appointment_id
        self._step("book", Status.BOOKED, calendar, now)

    def reopen(self, calendar: Calendar, now: datetime, reason_code: str = "") -> None:
        """The visit fell through: somebody must make another one."""
        self.appointment_id, self.close_reason, self.letter_time = None, None, None
        self._step("reopen", Status.OPEN, calendar, now, reason_code=reason_code)

    def close(self, reason: dict[str, Any], calendar: Calendar, now: datetime) -> None:
        """End it without a visit. Raises FailedPrecondition `LETTER_NOT_SENT`."""
        self.lifecycle.arrow("close", self.status)
        if reason["code"] == next_call.UNREACHABLE and self.status is not Status.LETTER_SENT:
            raise FailedPrecondition(
                "LETTER_NOT_SENT", "Nobody is out of reach before three calls and a letter: send the letter first."
            )
        self.close_reason = reason
        self._step("close", Status.CLOSED, calendar, now, reason_code=reason["code"])

    def change(self, values: dict[str, Any], calendar: Calendar) -> None:
        """Set fields of an open request. Raises FailedPrecondition `ILLEGAL_TRANSITION`, Invalid `OWNER_MISSING`."""
        if not self.is_open:
            raise FailedPrecondition(
                "ILLEGAL_TRANSITION",
                f"update is not possible in status {self.status.name}.",
                action="update",
                status=self.status.name,
            )
        owner = values.pop("owner", self.owner)
        if owner is None:
            raise Invalid("OWNER_MISSING", "An open request has an owner.", field="scheduling_request.owner")
        before = self.owner
        self._own(owner)
        differing = {name: value for name, value in values.items() if getattr(self, name) != value}
        for name, value in differing.items():
            setattr(self, name, value)
        if differing or owner != before:
            self._run_clock(calendar)
            self.tell("updated", previous_status=self.status.name)

    def tell_overdue(self) -> None:
        """Say once per due time that it is past."""
        self.overdue_told = True
        self.tell("overdue", previous_status=self.status.name)

    # -- what events and answers are made of ---------------------------------------------------------------------------

    @property
    def is_open(self) -> bool:
        """Whether somebody must still act."""
        return self.status in OPEN

    @property
    def attempt_count(self) -> int:
        """So many tries to reach the patient were made."""
        return len(self.attempts)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _own(self, owner: dict[str, Any]) -> None:
        self.owner, self.owner_id = owner, owner["id"]

    def _step(self, action: str, target: Status, calendar: Calendar, now: datetime, *, reason_code: str = "") -> None:
        # Named, since a second step in the same transaction must not change what the first one's event says.
        self.move(action, reason_code=reason_code, status=target)
        self.step_time = now
        self._run_clock(calendar)

    def _run_clock(self, calendar: Calendar) -> None:
        """Set what must happen next, and by when."""
        self.rank = next_call.rank(self.priority)
        self.overdue_told = False
        self.due_time, self.due_basis, self.next_action = None, "", ""
        if self.is_open:
            last = self.attempts[-1] if self.attempts else {}
            back = last.get("call_back_time")
            step = next_call.next_step(
                self.status.name,
                self.priority,
                len(self.attempts),
                self.step_time,
                calendar,
                earliest=_day(self.earliest_date, "earliest_date"),
                latest=_day(self.latest_date, "latest_date"),
                call_back=datetime.fromisoformat(back) if back else None,
            )
            self.next_action, self.due_time, self.due_basis = step
        self.list_time = self.due_time or _FAR


class SchedulingPreferences(Aggregate, Base):
    """How a patient wishes to be scheduled; its id is the patient's, so that there is one."""

    __tablename__ = "scheduling_preferences"
    __table_args__ = (about_subject("scheduling_preferences"),)
    aggregate = "scheduling_preferences"

    patient_id: Mapped[str] = mapped_column(Id)
    clinic_ids: Mapped[list[str]] = mapped_column(Ids, default=list)
    practitioner_ids: Mapped[list[str]] = mapped_column(Ids, default=list)
    weekdays: Mapped[list[int]] = mapped_column(ARRAY(BigInteger), default=list)
    earliest: Mapped[str] = mapped_column(Text, default="")
    latest: Mapped[str] = mapped_column(Text, default="")
    modality: Mapped[str] = mapped_column(Text, default="MODALITY_UNSPECIFIED")
    may_be_moved: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    barriers: Mapped[list[Any]] = mapped_column(JSONB, nullable=False, default=list, server_default=text("'[]'"))


class ReferralState(Base):
    """The newest state of a referral that was heard of: what is older opens and closes nothing."""

    __tablename__ = "referral_state"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    business_status: Mapped[str] = mapped_column(Text)


async def calendar_of(db: AsyncSession, tenant_id: str, clinic_id: str) -> Calendar:
    """The calendar of a clinic; UTC and the country's days where it has none."""
    columns = select(Clinic.time_zone, Clinic.holiday_region, Clinic.closed_dates)
    row = (await db.execute(columns.where(Clinic.tenant_id == tenant_id, Clinic.id == clinic_id))).one_or_none()
    if row is None:
        return Calendar("UTC", "US")
    days = frozenset(date.fromisoformat(day) for day in row.closed_dates or ())
    return Calendar(row.time_zone or "UTC", _known_region(row.holiday_region), days)


async def request_of(db: AsyncSession, tenant_id: str, visit: Appointment) -> SchedulingRequest | None:
    """The request that a visit answers, locked: the one that it names, else that of its referral."""
    which = _which(visit)
    if which is None:
        return None
    query = select(SchedulingRequest).where(
        SchedulingRequest.tenant_id == tenant_id, which, SchedulingRequest.patient_id == visit.patient_id
    )
    return (await db.execute(query.with_for_update(of=SchedulingRequest, key_share=True))).scalar_one_or_none()


def _which(visit: Appointment) -> ColumnElement[bool] | None:
    named = next((one["id"] for one in visit.based_on or () if one["type"] == "SchedulingRequest"), None)
    if named is not None:
        return SchedulingRequest.id == named
    if visit.referral_id:
        return SchedulingRequest.referral_id == visit.referral_id
    return None


async def follow_visit(db: AsyncSession, visit: Appointment, now: datetime) -> None:
    """Let the request that a visit answers go where the visit goes, in the visit's own transaction.

    A visit that was promised answers it; one that fell through opens it again. Its row is locked last: whoever holds a
    request's row waits for no visit and no time.
    """
    request = await request_of(db, visit.tenant_id, visit)
    if request is None:
        return
    calendar = await calendar_of(db, request.tenant_id, request.clinic_id)
    if visit.status in LIVE:
        if request.is_open:
            request.book(visit.id, calendar, now)
    elif request.status is Status.BOOKED and request.appointment_id == visit.id:
        other = await _other_of_series(db, visit)
        if other is not None:
            request.appointment_id = other
        else:
            request.reopen(calendar, now, visit.status.name.lower().replace("_", "-"))


async def follow_visits(db: AsyncSession, visits: Sequence[Appointment], now: datetime) -> None:
    """As `follow_visit`, for several: one after the other by request, so that nobody waits for somebody who waits."""
    ordered = {}
    for visit in visits:
        if (which := _which(visit)) is not None:
            query = select(SchedulingRequest.id).where(SchedulingRequest.tenant_id == visit.tenant_id, which)
            ordered[visit.id] = str((await db.execute(query)).scalar_one_or_none() or "")
    for visit in sorted(visits, key=lambda one: (ordered.get(one.id, ""), one.start_time)):
        if ordered.get(visit.id):
            await follow_visit(db, visit, now)
            await db.flush()  # two versions of the request for two steps


async def _other_of_series(db: AsyncSession, visit: Appointment) -> str | None:
    """The first visit of the same series that still stands: then nobody need make another one."""
    if visit.series_id is None:
        return None
    query = (
        select(Appointment.id)
        .where(
            Appointment.tenant_id == visit.tenant_id,
            Appointment.series_id == visit.series_id,
            Appointment.id != visit.id,
            Appointment.status.in_(LIVE),
        )
        .order_by(Appointment.start_time)
        .limit(1)
    )
    return (await db.execute(query)).scalar_one_or_none()


async def is_referred(db: AsyncSession, tenant_id: str, patient_id: str, based_on: Sequence[Any]) -> bool:
    """Whether a referral of the patient's that needs, or needed, a visit is among what a request says it is based on.

    For patients: what staff says of a referral is taken as said, since one on paper is known to nobody else.
    """
    ids = [one.id for one in based_on if one.type == "Referral"]
    if not ids:
        return False
    query = select(SchedulingRequest.id).where(
        SchedulingRequest.tenant_id == tenant_id,
        SchedulingRequest.patient_id == patient_id,
        SchedulingRequest.referral_id.in_(ids),
    )
    return (await db.execute(query.limit(1))).first() is not None


async def standing_visit(db: AsyncSession, tenant_id: str, patient_id: str, referral_id: str) -> str | None:
    """A visit of the patient's that is based on a referral and stands."""
    rows = await db.execute(
        select(Appointment.id, Appointment.based_on)
        .where(Appointment.tenant_id == tenant_id, Appointment.patient_id == patient_id, Appointment.status.in_(LIVE))
        .order_by(Appointment.start_time)
    )
    named = {"type": "Referral", "id": referral_id}
    return next((row.id for row in rows if any(named.items() <= one.items() for one in row.based_on or ())), None)


def _known_region(region: str) -> str:
    """The region, or "US": a clock by an approximate calendar is better than none."""
    try:
        is_holiday(date(2026, 1, 1), region or "US")
    except ValueError:
        return "US"
    return region or "US"


def _day(value: str, field: str) -> date | None:
    if not value:
        return None
    try:
        day = date.fromisoformat(value)
        if not 1000 <= day.year <= 2999:
            raise ValueError
    except ValueError:
        raise Invalid(
            "DATE_INVALID", "There is no such day in the calendar.", field=f"scheduling_request.{field}"
        ) from None
    return day

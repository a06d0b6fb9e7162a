"""Referrals: the loop from the wish to the patient who knows; one owner and one clock in every open state."""

import enum
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from sqlalchemy import BigInteger, DateTime, Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from chassis.calendar import END_OF_DAY, at_local
from chassis.errors import FailedPrecondition, Invalid
from chassis.lifecycle import Lifecycle
from chassis.model import Id, Living, Owned, about_subject, by_change, status_type
from services.referrals import clocks
from services.referrals.projections import Base, Calendar

_FAR = datetime(9999, 12, 31, tzinfo=UTC)
_TIME = DateTime(timezone=True)


class State(enum.StrEnum):
    """Where the loop stands: `business_status`."""

    DRAFT = "DRAFT"
    SUBMITTED = "SUBMITTED"
    ACCEPTED = "ACCEPTED"
    DECLINED = "DECLINED"
    SCHEDULED = "SCHEDULED"
    UNATTENDED = "UNATTENDED"
    SEEN = "SEEN"
    REPORT_RECEIVED = "REPORT_RECEIVED"
    REPORT_ACKNOWLEDGED = "REPORT_ACKNOWLEDGED"
    PATIENT_INFORMED = "PATIENT_INFORMED"
    CLOSED = "CLOSED"
    CANCELLED = "CANCELLED"


FHIR_STATUS: Mapping[State, str] = {
    State.DRAFT: "DRAFT",
    State.SUBMITTED: "ACTIVE",
    State.ACCEPTED: "ACTIVE",
    State.DECLINED: "REVOKED",
    State.SCHEDULED: "ACTIVE",
    State.UNATTENDED: "ACTIVE",
    State.SEEN: "ACTIVE",
    State.REPORT_RECEIVED: "ACTIVE",
    State.REPORT_ACKNOWLEDGED: "ACTIVE",
    State.PATIENT_INFORMED: "ACTIVE",
    State.CLOSED: "COMPLETED",
    State.CANCELLED: "REVOKED",
}
"""FHIR's request-status of each state."""
CLOSED_STATES = (State.DECLINED, State.CLOSED, State.CANCELLED)
OPEN_STATES = tuple(state for state in State if state not in CLOSED_STATES)
FOLLOWING = (State.ACCEPTED, State.SCHEDULED, State.UNATTENDED, State.SEEN)
"""States in which the visits say where the loop stands."""

_LIVE = ("BOOKED", "ARRIVED", "CHECKED_IN")
_MISSED = ("NOSHOW", "CANCELLED")
_FOLLOW = {
    State.ACCEPTED: "unschedule",
    State.SCHEDULED: "schedule",
    State.UNATTENDED: "miss",
    State.SEEN: "see",
}


class ReferralVisit(Owned, Base):
    """A visit that is based on a referral, as its latest event told it, or as somebody recorded it (`outside`)."""

    __tablename__ = "referral_visit"
    __table_args__ = (about_subject("referral_visit"), Index("referral_visit_by_referral", "tenant_id", "referral_id"))

    referral_id: Mapped[str] = mapped_column(Id)
    patient_id: Mapped[str] = mapped_column(Id)
    appointment_version: Mapped[int] = mapped_column(BigInteger, default=0)
    status: Mapped[str]
    start_time: Mapped[datetime] = mapped_column(_TIME)
    end_time: Mapped[datetime] = mapped_column(_TIME)
    outside: Mapped[bool] = mapped_column(default=False)

    @property
    def live(self) -> bool:
        """Whether it is still to take place."""
        return self.status in _LIVE


class Standing(NamedTuple):
    """Where the loop stands by its visits alone."""

    state: State
    visit: ReferralVisit | None
    attempts: int


def standing(visits: Iterable[ReferralVisit]) -> Standing:
    """A function of the visits' present states: in whatever order their events came, the answer is the same.

    One that took place counts before one that is promised, that before one that was missed; of several the earliest, of
    missed ones the last.
    """
    known = list(visits)
    missed = [one for one in known if one.status in _MISSED]
    seen = [one for one in known if one.status == "FULFILLED"]
    live = [one for one in known if one.live]
    if seen:
        return Standing(State.SEEN, min(seen, key=lambda one: (one.end_time, one.id)), len(missed))
    if live:
        return Standing(State.SCHEDULED, min(live, key=lambda one: (one.start_time, one.id)), len(missed))
    if missed:
        return Standing(State.UNATTENDED, max(missed, key=lambda one: (one.start_time, one.id)), len(missed))
    return Standing(State.ACCEPTED, None, 0)


class Referral(Living, Base):
    """A request that somebody else sees the patient, after FHIR ServiceRequest and its fulfilment Task."""

    __tablename__ = "referral"
    __table_args__ = (
        about_subject("referral"),
        by_change("referral"),
        Index("referral_by_due", "tenant_id", "list_time", "id"),
        Index("referral_by_patient", "tenant_id", "patient_id", "list_time", "id"),
        Index("referral_by_owner", "tenant_id", "owner_id", "list_time", "id"),
        Index("referral_overdue", "due_time", postgresql_where=text("due_time IS NOT NULL AND NOT overdue_told")),
    )
    aggregate = "referral"
    status_field = "business_status"
    lifecycle = Lifecycle(
        ("create", [], State.DRAFT, "created"),
        ("submit", [State.DRAFT], State.SUBMITTED, "submitted"),
        ("accept", [State.SUBMITTED], State.ACCEPTED, "accepted"),
        ("decline", [State.SUBMITTED], State.DECLINED, "declined"),
        ("schedule", [State.ACCEPTED, State.UNATTENDED, State.SEEN], State.SCHEDULED, "scheduled"),
        ("reschedule", [State.SCHEDULED], State.SCHEDULED, "rescheduled"),
        # A visit that was made by mistake never was.
        ("unschedule", [State.SCHEDULED, State.UNATTENDED, State.SEEN], State.ACCEPTED, "unscheduled"),
        ("miss", [State.ACCEPTED, State.SCHEDULED, State.SEEN], State.UNATTENDED, "unattended"),
        ("see", [State.ACCEPTED, State.SCHEDULED, State.UNATTENDED], State.SEEN, "seen"),
        ("record_report", [State.SCHEDULED, State.SEEN], State.REPORT_RECEIVED, "report_received"),
        ("acknowledge_report", [State.REPORT_RECEIVED], State.REPORT_ACKNOWLEDGED, "report_acknowledged"),
        ("inform_patient", [State.REPORT_ACKNOWLEDGED], State.PATIENT_INFORMED, "patient_informed"),
        ("close", [State.PATIENT_INFORMED], State.CLOSED, "closed"),
        (
            "cancel",
            [State.DRAFT, State.SUBMITTED, State.ACCEPTED, State.SCHEDULED, State.UNATTENDED, State.SEEN],
            State.CANCELLED,
            "cancelled",
        ),
    )

    patient_id: Mapped[str] = mapped_column(Id)
    business_status: Mapped[State] = mapped_column(status_type(State))
    priority: Mapped[str] = mapped_column(Text, default="ROUTINE")
    specialty: Mapped[dict[str, Any]] = mapped_column(JSONB)
    reason: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    note: Mapped[str] = mapped_column(Text, default="")
    clinic_id: Mapped[str] = mapped_column(Id)
    owner: Mapped[dict[str, Any]] = mapped_column(JSONB)
    owner_id: Mapped[str] = mapped_column(Id)
    requester_id: Mapped[str | None] = mapped_column(Id)
    state_time: Mapped[datetime] = mapped_column(_TIME)
    due_time: Mapped[datetime | None] = mapped_column(_TIME)
    due_basis: Mapped[str] = mapped_column(Text, default="")
    next_action: Mapped[str] = mapped_column(Text, default="")
    # Beside `due_time`, since a page's key can't be null; what is not open comes last.
    list_time: Mapped[datetime] = mapped_column(_TIME)
    overdue_told: Mapped[bool] = mapped_column(default=False)
    pool_id: Mapped[str | None] = mapped_column(Id)
    appointment_id: Mapped[str | None] = mapped_column(Id)
    appointment_time: Mapped[datetime | None] = mapped_column(_TIME)
    appointment_end_time: Mapped[datetime | None] = mapped_column(_TIME)
    attempts: Mapped[int] = mapped_column(default=0)
    report: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    outcome: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    identifiers: Mapped[list[Any]] = mapped_column(JSONB, nullable=False, default=list, server_default=text("'[]'"))

    @property
    def status(self) -> str:
        """FHIR's status."""
        return FHIR_STATUS[self.business_status]

    @property
    def is_open(self) -> bool:
        """Whether somebody must still act."""
        return self.business_status in OPEN_STATES

    def own(self, kind: str, owner_id: str) -> None:
        """Make a staff member or a pool the one who must act next."""
        self.owner, self.owner_id = {"type": kind, "id": owner_id}, owner_id

    # -- the loop ------------------------------------------------------------------------------------------------------

    def create(self, calendar: Calendar, now: datetime) -> None:
        """Begin as a draft; whoever owns it must submit it."""
        self._step("create", calendar, now)

    def submit(self, pool_id: str, calendar: Calendar, now: datetime) -> None:
        """Send it to a pool, which owns it from now on."""
        self._step("submit", calendar, now)
        self.pool_id = pool_id
        self.own("Pool", pool_id)

    def accept(self, calendar: Calendar, now: datetime) -> None:
        """Take it: a visit may be made."""
        self._step("accept", calendar, now)

    def decline(self, reason: dict[str, Any], calendar: Calendar, now: datetime) -> None:
        """Refuse it; it goes back to whoever refers."""
        self._step("decline", calendar, now, reason_code=reason["code"])
        self.outcome = reason
        self._to_requester()

    def record_report(self, report: dict[str, Any], calendar: Calendar, now: datetime) -> None:
        """The report is there; whoever refers must read it."""
        self._step("record_report", calendar, now)
        self.report = {**report, "receive_time": now.isoformat()}
        self._to_requester()

    def acknowledge_report(self, calendar: Calendar, now: datetime) -> None:
        """The report is read; the patient must be told."""
        self._step("acknowledge_report", calendar, now)
        self.report = {**(self.report or {}), "acknowledge_time": now.isoformat()}

    def inform_patient(self, how: dict[str, Any], calendar: Calendar, now: datetime) -> None:
        """The patient knows."""
        self._step("inform_patient", calendar, now)
        self.report = {**(self.report or {}), **how, "inform_time": now.isoformat()}

    def close(self, outcome: dict[str, Any] | None, calendar: Calendar, now: datetime) -> None:
        """The loop is closed."""
        self._step("close", calendar, now, reason_code=(outcome or {}).get("code", ""))
        self.outcome = outcome

    def cancel(self, reason: dict[str, Any], calendar: Calendar, now: datetime) -> None:
        """Withdraw it."""
        self._step("cancel", calendar, now, reason_code=reason["code"])
        self.outcome = reason

    def follow(
        self, visits: Iterable[ReferralVisit], calendar: Calendar, since: datetime, *, reason_code: str = ""
    ) -> None:
        """Go where the visits say. Before the acceptance and after the report they say nothing."""
        if self.business_status not in FOLLOWING:
            return
        state, visit, attempts = standing(visits)
        before = (self.appointment_id, self.appointment_time, self.appointment_end_time)
        self.attempts = attempts
        self.appointment_id = visit.id if visit is not None and not visit.outside else None
        self.appointment_time = visit.start_time if visit is not None else None
        self.appointment_end_time = visit.end_time if visit is not None else None
        moved = before != (self.appointment_id, self.appointment_time, self.appointment_end_time)
        if state is not self.business_status:
            self._step(_FOLLOW[state], calendar, since, reason_code=reason_code)
        elif state is State.SCHEDULED and moved:
            # The clock of the state runs on: moving the visit gives nobody more time.
            self._step("reschedule", calendar, self.state_time)
        elif moved:
            self.run_clock(calendar, self.state_time)

    def refuse_unless(self, states: Iterable[State], action: str) -> None:
        """Raises FailedPrecondition `ILLEGAL_TRANSITION`."""
        if self.business_status not in states:
            name = self.business_status.name
            raise FailedPrecondition(
                "ILLEGAL_TRANSITION", f"{action} is not possible in status {name}.", action=action, status=name
            )

    def change(self, values: dict[str, Any], calendar: Calendar) -> None:
        """Set fields of a draft, or the owner of an open one. Raises FailedPrecondition, Invalid `OWNER_MISSING`."""
        differing = {name: value for name, value in values.items() if getattr(self, name) != value}
        owner = differing.pop("owner", self.owner)
        if owner is None:
            raise Invalid("OWNER_MISSING", "An open referral has an owner.", field="referral.owner")
        if differing:
            self.refuse_unless([State.DRAFT], "update")
        for name, value in differing.items():
            setattr(self, name, value)
        if differing:
            self.run_clock(calendar, self.state_time)
            self.tell("updated", previous_status=self.business_status.name)
        if owner != self.owner:
            self.refuse_unless(OPEN_STATES, "assign")
            self.own(owner["type"], owner["id"])
            self.tell("assigned", previous_status=self.business_status.name)

    def tell_overdue(self) -> None:
        """Say once per due time that it is past."""
        self.overdue_told = True
        self.tell("overdue", previous_status=self.business_status.name)

    # -- inside --------------------------------------------------------------------------------------------------------

    def _step(self, action: str, calendar: Calendar, since: datetime, *, reason_code: str = "") -> None:
        target = self.lifecycle.arrow(action, self.business_status).target
        # Named, since a second step in the same transaction must not change what the first one's event says.
        self.move(action, reason_code=reason_code, business_status=target)
        self.run_clock(calendar, since)

    def run_clock(self, calendar: Calendar, since: datetime) -> None:
        """Set what must happen next, and by when; `since` is when the present state began."""
        self.state_time = since
        self.overdue_told = False
        self.due_time, self.due_basis, self.next_action = None, "", ""
        if self.is_open:
            state, priority = self.business_status.name, self.priority.lower()
            if self.business_status is State.SEEN and self.appointment_end_time is not None:
                since = self.appointment_end_time
            self.due_time, self.due_basis = clocks.due(
                state, priority, since, calendar.zone, calendar.region, closed=calendar.closed
            )
            self.next_action = clocks.DEFAULT_CLOCKS[state, priority].next_action
            if self.business_status is State.SCHEDULED and self.appointment_end_time is not None:
                day = self.appointment_end_time.astimezone(ZoneInfo(calendar.zone)).date()
                evening = at_local(day, END_OF_DAY, calendar.zone)
                # What came of a visit is known on its day; waiting for the end of the clock would be too late.
                if evening < self.due_time:
                    self.due_time, self.due_basis = evening, f"{self.next_action} on the day of the visit"
        self.list_time = self.due_time or _FAR

    def _to_requester(self) -> None:
        if self.requester_id is not None:
            self.own("Staff", self.requester_id)


class ReferralIdentifier(Owned, Base):
    """A business identifier of a referral, unique per tenant and system."""

    __tablename__ = "referral_identifier"
    __table_args__ = (UniqueConstraint("tenant_id", "system", "value", name="referral_identifier_key"),)

    referral_id: Mapped[str] = mapped_column(Id, index=True)
    system: Mapped[str]
    value: Mapped[str]

"""Appointments: time that a clinic has promised to a patient, and everything that can become of it."""

import enum
from datetime import datetime, timedelta
from typing import Any, ClassVar
from zoneinfo import ZoneInfo

from sqlalchemy import BigInteger, DateTime, Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from chassis.errors import FailedPrecondition, Invalid
from chassis.lifecycle import Lifecycle
from chassis.model import Id, Living, Owned, about_subject, by_change, status_type
from services.scheduling.directory import Base

REASON_SYSTEM = "http://terminology.hl7.org/CodeSystem/appointment-cancellation-reason"
DECEASED = {"system": REASON_SYSTEM, "code": "pat-dec"}
CANCELLATION_REASONS = frozenset(
    "pat pat-crs pat-cpp pat-dec pat-fb pat-lt pat-mt pat-mv pat-preg pat-swl pat-ucp"
    " prov prov-pers prov-dch prov-edu prov-hosp prov-labs prov-mri prov-onc maint meds-inc"
    " other oth-cms oth-err oth-fin oth-iv oth-int oth-mu oth-room oth-oerr oth-swie oth-weath".split()
)
"""FHIR R4 CodeSystem appointment-cancellation-reason."""


class Status(enum.StrEnum):
    """FHIR appointmentstatus."""

    PROPOSED = "PROPOSED"
    PENDING = "PENDING"
    BOOKED = "BOOKED"
    ARRIVED = "ARRIVED"
    FULFILLED = "FULFILLED"
    CANCELLED = "CANCELLED"
    NOSHOW = "NOSHOW"
    ENTERED_IN_ERROR = "ENTERED_IN_ERROR"
    CHECKED_IN = "CHECKED_IN"
    WAITLIST = "WAITLIST"


_TAKEN_OVER = {
    Status.BOOKED: "take_over",
    Status.FULFILLED: "record_fulfilled",
    Status.NOSHOW: "record_no_show",
    Status.CANCELLED: "record_cancelled",
}


class Appointment(Living, Base):
    """Time that a clinic has promised to a patient."""

    __tablename__ = "appointment"
    __table_args__ = (
        about_subject("appointment"),
        Index("appointment_by_patient", "tenant_id", "patient_id", "start_time", "id"),
        Index("appointment_by_clinic", "tenant_id", "clinic_id", "start_time", "id"),
        Index("appointment_by_practitioner", "tenant_id", "practitioner_id", "start_time", "id"),
        by_change("appointment"),
        Index("appointment_by_series", "tenant_id", "series_id", postgresql_where=text("series_id IS NOT NULL")),
        Index("appointment_video", "update_time", postgresql_where=text("video_stale")),
        UniqueConstraint("tenant_id", "session_id", "seat_no", name="appointment_seat_key"),
        Index("appointment_held", "hold_expire_time", postgresql_where=text("status = 'PENDING'")),
    )
    aggregate = "appointment"
    lifecycle = Lifecycle(
        ("hold", [], Status.PENDING, "held"),
        ("book", [], Status.BOOKED, "booked"),
        ("wait", [], Status.WAITLIST, "waitlisted"),
        ("take_over", [], Status.BOOKED, "booked"),
        ("record_fulfilled", [], Status.FULFILLED, "imported"),
        ("record_no_show", [], Status.NOSHOW, "imported"),
        ("record_cancelled", [], Status.CANCELLED, "imported"),
        ("book", [Status.PENDING], Status.BOOKED, "booked"),
        ("seat", [Status.WAITLIST], Status.BOOKED, "booked"),
        ("release", [Status.PENDING], Status.CANCELLED, "released"),
        ("expire", [Status.PENDING], Status.CANCELLED, "hold.expired"),
        ("reschedule", [Status.BOOKED], Status.BOOKED, "rescheduled"),
        ("confirm", [Status.BOOKED], Status.BOOKED, "confirmed"),
        ("arrive", [Status.BOOKED, Status.NOSHOW], Status.ARRIVED, "arrived"),
        ("check_in", [Status.ARRIVED], Status.CHECKED_IN, "checked_in"),
        ("fulfill", [Status.BOOKED, Status.ARRIVED, Status.CHECKED_IN], Status.FULFILLED, "fulfilled"),
        ("mark_no_show", [Status.BOOKED, Status.ARRIVED, Status.CHECKED_IN], Status.NOSHOW, "noshow"),
        (
            "cancel",
            [Status.PENDING, Status.BOOKED, Status.ARRIVED, Status.CHECKED_IN, Status.WAITLIST],
            Status.CANCELLED,
            "cancelled",
        ),
        ("revert", [Status.ARRIVED, Status.CHECKED_IN, Status.NOSHOW], None, "reverted"),
        (
            "enter_in_error",
            [one for one in Status if one is not Status.ENTERED_IN_ERROR],
            Status.ENTERED_IN_ERROR,
            "entered_in_error",
        ),
    )

    patient_id: Mapped[str] = mapped_column(Id)
    status: Mapped[Status] = mapped_column(status_type(Status))
    visit_type_id: Mapped[str] = mapped_column(Id)
    clinic_id: Mapped[str] = mapped_column(Id)
    practitioner_id: Mapped[str] = mapped_column(Id)
    start_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    end_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    time_zone: Mapped[str]
    modality: Mapped[str]
    participants: Mapped[list[Any]] = mapped_column(JSONB)
    based_on: Mapped[list[Any]] = mapped_column(JSONB, default=list, server_default=text("'[]'"))
    hold_expire_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    schedule_version: Mapped[int] = mapped_column(BigInteger)
    cancelation_reason: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    late_cancel: Mapped[bool] = mapped_column(default=False)
    # As the visit type said when the time was promised.
    late_cancel_hours: Mapped[int] = mapped_column(BigInteger)
    confirm_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    overbooking: Mapped[int] = mapped_column(BigInteger, default=0)
    comment: Mapped[str] = mapped_column(Text, default="")
    previous_appointment_id: Mapped[str | None] = mapped_column(Id)
    walk_in: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    # Of a video visit: its room doesn't follow it yet.
    video_stale: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    series_id: Mapped[str | None] = mapped_column(Id)
    series_number: Mapped[int | None] = mapped_column(BigInteger)
    series_start_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    session_id: Mapped[str | None] = mapped_column(Id)
    seat_no: Mapped[int | None] = mapped_column(BigInteger)
    series_part: ClassVar[int] = 0
    """Of several visits of a series that the present act is about: which one; told with its event, not kept."""
    interpreter_language: Mapped[str] = mapped_column(Text, default="", server_default=text("''"))
    # What other systems call it, and the one from which it was imported. It is kept here since: unlike an entry of the
    # directory it doesn't stay another system's, or nobody could check it in.
    identifiers: Mapped[list[Any]] = mapped_column(JSONB, default=list, server_default=text("'[]'"))
    source_system: Mapped[str] = mapped_column(Text, default="", server_default=text("''"))
    # As it was when the time was promised; quotas count it.
    new_patient: Mapped[bool] = mapped_column(default=False, server_default=text("false"))

    def move(self, action: str, *, reason_code: str = "", **extra: Any) -> None:
        """As `Living.move`; a video visit's room has to follow."""
        super().move(action, reason_code=reason_code, **extra)
        if self.modality == "VIDEO" and self.status is not Status.PENDING:
            self.video_stale = True

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def place(self, **values: Any) -> None:
        """Set time, place and participants; `schedule_version` rises where what a reminder tells has changed."""
        before = self._told_in_reminders()
        labels = {*(self.security_labels or ()), *values.pop("security_labels")}
        for name, value in values.items():
            setattr(self, name, value)
        self.security_labels = sorted(labels)
        if before != self._told_in_reminders():
            self.schedule_version = (self.schedule_version or 0) + 1

    def hold(self, until: datetime) -> None:
        """Take the time until `until`."""
        self.move("hold")
        self.hold_expire_time = until
        self.participants = [{**one, "status": "TENTATIVE"} for one in self.participants]

    def book(self, overbooking_reason: str = "") -> None:
        """Promise the time. The reason for overbooking stays in the history: words never leave the record."""
        self.move("book")
        self.participants = [{**one, "status": "ACCEPTED"} for one in self.participants]
        if overbooking_reason:
            self.history[-1]["reason_code"] = overbooking_reason

    def take_over(self, status: Status, reason: dict[str, Any] | None = None) -> None:
        """Keep here what another system has kept; what is over only as history. Raises Invalid `REASON_UNKNOWN`."""
        if status is Status.CANCELLED:
            self.cancelation_reason = _known(reason or {"code": "other"})
        self.move(_TAKEN_OVER[status], imported=True)
        if status is not Status.BOOKED:
            self.video_stale = False

    def wait(self) -> None:
        """Stand on the waitlist of a session: nothing is taken yet."""
        self.move("wait")
        self.participants = [{**one, "status": "TENTATIVE"} for one in self.participants]

    def seat(self, number: int) -> None:
        """Move up from the waitlist."""
        self.move("seat")
        self.seat_no = number
        self.participants = [{**one, "status": "ACCEPTED"} for one in self.participants]

    def check_alone(self) -> None:
        """Raises FailedPrecondition `IN_SESSION` for a seat of a session, which moves with its session only."""
        if self.session_id is not None:
            raise FailedPrecondition("IN_SESSION", "A seat moves with its session; give it back and take another one.")

    def reschedule(self, overbooking_reason: str = "", **values: Any) -> None:
        """Move to another time or place. Who had confirmed had confirmed the old one."""
        left, clinic, video = self.start_time, self.clinic_id, self.modality == "VIDEO"
        self.place(**values)
        self.move("reschedule", previous_start_time=left, previous_clinic_id=clinic)
        self.confirm_time = None
        self.video_stale = self.video_stale or video
        self.history[-1]["previous_start_time"] = left.isoformat()
        if overbooking_reason:
            self.history[-1]["reason_code"] = overbooking_reason

    def release(self) -> None:
        """Give a hold back."""
        self.move("release")

    def expire(self) -> None:
        """End a hold whose time is over."""
        self.move("expire")

    def confirm(self, now: datetime) -> None:
        """The patient will come."""
        self.move("confirm")
        self.confirm_time = now

    def arrive(self, now: datetime, early: timedelta) -> None:
        """The patient is there, today or up to `early` before the start. Raises FailedPrecondition `NOT_CLINIC_DAY`.

        What has been missed to be written down on the day may be later, but for a no-show.
        """
        self.lifecycle.arrow("arrive", self.status)
        today, day = self._day(now), self._day(self.start_time)
        if today != day and (self.status is Status.NOSHOW or (now < self.start_time - early and today < day)):
            raise _not_clinic_day()
        self.move("arrive")
        self.cancelation_reason = None

    def check_in(self) -> None:
        """The patient is checked in."""
        self.move("check_in")

    def fulfill(self) -> None:
        """The visit took place. Only one by video or phone does so without an arrival."""
        if self.status is Status.BOOKED and self.modality == "IN_PERSON":
            raise FailedPrecondition(
                "ILLEGAL_TRANSITION", "The patient has not arrived.", action="fulfill", status=self.status.name
            )
        self.move("fulfill")

    def mark_no_show(self, now: datetime, grace: timedelta, reason: dict[str, Any] | None = None) -> None:
        """The patient did not come, or left without being seen.

        Raises FailedPrecondition `TOO_EARLY`; Invalid `REASON_UNKNOWN`, `REASON_MISSING` after an arrival.
        """
        self.lifecycle.arrow("mark_no_show", self.status)
        if now < self.start_time + grace:
            raise FailedPrecondition("TOO_EARLY", "The patient may still come: the grace after the start isn't over.")
        if reason is None and self.status is not Status.BOOKED:
            raise Invalid("REASON_MISSING", "Why did the patient leave without being seen?", field="reason")
        self.cancelation_reason = _known(reason) if reason is not None else None
        self.move("mark_no_show", reason_code=reason["code"] if reason is not None else "")

    def cancel(self, reason: dict[str, Any], now: datetime) -> None:
        """It won't take place. Raises Invalid `REASON_UNKNOWN`."""
        known = _known(reason)
        promised = self.status not in (Status.PENDING, Status.WAITLIST)
        self.seat_no = None
        self.move("cancel", reason_code=reason["code"])
        self.cancelation_reason = known
        self.late_cancel = promised and now > self.start_time - timedelta(hours=self.late_cancel_hours)

    def revert(self, now: datetime) -> None:
        """Take the last step back. Raises FailedPrecondition `NOT_CLINIC_DAY` once the clinic's day of it is over."""
        self.lifecycle.arrow("revert", self.status)
        if self._day(now) != self._day(datetime.fromisoformat(self.last_step["time"])):
            raise _not_clinic_day()
        self.move("revert")
        left = [step["reason_code"] for step in self.history if step["action"] == "mark_no_show"][-1:]
        missed = self.status is Status.NOSHOW and any(left)
        self.cancelation_reason = _known({"code": left[0]}) if missed else None

    def follow(self, previous: "Appointment") -> None:
        """Make up for one that did not take place. Raises FailedPrecondition `PREVIOUS_STANDS`."""
        if previous.status not in (Status.CANCELLED, Status.NOSHOW):
            raise FailedPrecondition("PREVIOUS_STANDS", "The visit to be made up for was neither cancelled nor missed.")
        self.previous_appointment_id = previous.id

    def enter_in_error(self) -> None:
        """It was made by mistake."""
        self.move("enter_in_error")
        self.seat_no = None

    # -- what events and answers are made of ---------------------------------------------------------------------------

    @property
    def practitioner_ids(self) -> list[str]:
        """With whom."""
        return [self.practitioner_id]

    @property
    def referral_id(self) -> str:
        """The referral that it is based on, or ""."""
        return next((one["id"] for one in self.based_on or () if one["type"] == "Referral"), "")

    @property
    def expired(self) -> bool:
        """Whether it was a hold that ended by itself."""
        return self.status is Status.CANCELLED and self.last_step.get("action") == "expire"

    def _told_in_reminders(self) -> tuple[Any, ...]:
        return self.start_time, self.end_time, self.clinic_id, self.practitioner_id, self.modality

    def _day(self, at: datetime) -> Any:
        return at.astimezone(ZoneInfo(self.time_zone)).date()


class AppointmentIdentifier(Owned, Base):
    """What another system calls an appointment, unique per tenant and system: the same one is imported once."""

    __tablename__ = "appointment_identifier"
    __table_args__ = (
        about_subject("appointment_identifier"),
        UniqueConstraint("tenant_id", "system", "value", name="appointment_identifier_key"),
        Index("appointment_identifier_by_patient", "tenant_id", "patient_id"),
    )

    patient_id: Mapped[str] = mapped_column(Id)
    appointment_id: Mapped[str] = mapped_column(Id)
    system: Mapped[str]
    value: Mapped[str]


class DeceasedPatient(Base):
    """Nothing is booked for somebody who has died."""

    __tablename__ = "deceased_patient"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    patient_id: Mapped[str] = mapped_column(Id, primary_key=True)


class PatientVersion(Base):
    """The newest version of a patient that was heard of: what is older says nothing about who has died."""

    __tablename__ = "patient_version"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    patient_id: Mapped[str] = mapped_column(Id, primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)


def _not_clinic_day() -> FailedPrecondition:
    return FailedPrecondition("NOT_CLINIC_DAY", "This can only be done on the same day in the clinic's zone.")


def _known(reason: dict[str, Any]) -> dict[str, Any]:
    if reason["code"] not in CANCELLATION_REASONS or reason.get("system", REASON_SYSTEM) != REASON_SYSTEM:
        raise Invalid(
            "REASON_UNKNOWN",
            "The reason must be a code of FHIR's appointment-cancellation-reason, such as pat.",
            field="reason",
        )
    return {**reason, "system": REASON_SYSTEM}

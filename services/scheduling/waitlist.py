"""The waitlist: who waits, what was freed meanwhile, and the offers that were made of it."""

import enum
import hashlib
import secrets
from datetime import date, datetime
from typing import Any

from sqlalchemy import (
    DDL,
    BigInteger,
    DateTime,
    Identity,
    Index,
    LargeBinary,
    Text,
    UniqueConstraint,
    event,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from chassis.errors import FailedPrecondition, Invalid
from chassis.lifecycle import Lifecycle
from chassis.model import Aggregate, Id, Ids, Living, about_subject, status_type
from services.scheduling.appointment import Appointment
from services.scheduling.directory import Base
from services.scheduling.matching import Score, Slot, Wish

TIME = DateTime(timezone=True)


class EntryStatus(enum.StrEnum):
    """Where an entry stands."""

    WAITING = "WAITING"
    OFFERED = "OFFERED"
    ACCEPTED = "ACCEPTED"
    FULFILLED = "FULFILLED"
    WITHDRAWN = "WITHDRAWN"
    EXPIRED = "EXPIRED"


class OfferStatus(enum.StrEnum):
    """What became of an offer."""

    OPEN = "OPEN"
    ACCEPTED = "ACCEPTED"
    DECLINED = "DECLINED"
    EXPIRED = "EXPIRED"
    UNAVAILABLE = "UNAVAILABLE"


class SlotStatus(enum.StrEnum):
    """What became of a freed slot."""

    OPEN = "OPEN"
    """To be offered at `due_time`."""
    OFFERED = "OFFERED"
    FILLED = "FILLED"
    FREE = "FREE"
    """Nobody who waits wants it: anybody may book it."""
    GONE = "GONE"
    """Taken by somebody else, or no longer bookable."""
    LATE = "LATE"
    """Within the lock-out before its start."""


OPEN = [EntryStatus.WAITING, EntryStatus.OFFERED]
_STILL_OPEN = text("status IN ('WAITING', 'OFFERED')")


class WaitlistEntry(Living, Base):
    """A patient who waits for a visit of one type."""

    __tablename__ = "waitlist_entry"
    __table_args__ = (
        about_subject("waitlist_entry"),
        Index(
            "waitlist_entry_open_key",
            "tenant_id",
            "patient_id",
            "visit_type_id",
            unique=True,
            postgresql_where=_STILL_OPEN,
        ),
        Index("waitlist_entry_waiting", "tenant_id", "visit_type_id", postgresql_where=_STILL_OPEN),
        Index("waitlist_entry_ending", "expire_time", postgresql_where=text("status = 'WAITING'")),
        Index("waitlist_entry_by_patient", "tenant_id", "patient_id", "create_time", "id"),
        Index("waitlist_entry_by_time", "tenant_id", "create_time", "id"),
    )
    aggregate = "waitlist"
    lifecycle = Lifecycle(
        ("add", [], EntryStatus.WAITING, "added"),
        ("offer", [EntryStatus.WAITING], EntryStatus.OFFERED, "offered"),
        ("accept", [EntryStatus.OFFERED], EntryStatus.ACCEPTED, "accepted"),
        ("decline", [EntryStatus.OFFERED], EntryStatus.WAITING, "declined"),
        ("lapse", [EntryStatus.OFFERED], EntryStatus.WAITING, "lapsed"),
        ("miss", [EntryStatus.OFFERED], EntryStatus.WAITING, "unavailable"),
        ("fulfill", OPEN, EntryStatus.FULFILLED, "fulfilled"),
        ("withdraw", OPEN, EntryStatus.WITHDRAWN, "withdrawn"),
        ("expire", [EntryStatus.WAITING], EntryStatus.EXPIRED, "expired"),
    )

    patient_id: Mapped[str] = mapped_column(Id)
    status: Mapped[EntryStatus] = mapped_column(status_type(EntryStatus))
    visit_type_id: Mapped[str] = mapped_column(Id)
    clinic_ids: Mapped[list[str]] = mapped_column(Ids, default=list)
    practitioner_ids: Mapped[list[str]] = mapped_column(Ids, default=list)
    weekdays: Mapped[list[int]] = mapped_column(ARRAY(BigInteger), default=list)
    earliest_time: Mapped[str] = mapped_column(Text, default="")
    latest_time: Mapped[str] = mapped_column(Text, default="")
    # Days as text: they are by the clock of whichever clinic has the slot, and compare as they are.
    earliest_date: Mapped[str] = mapped_column(Text, default="")
    latest_date: Mapped[str] = mapped_column(Text, default="")
    priority: Mapped[str] = mapped_column(Text, default="ROUTINE")
    expire_time: Mapped[datetime] = mapped_column(TIME)
    appointment_id: Mapped[str | None] = mapped_column(Id)
    channel: Mapped[str] = mapped_column(Text, default="CODE_UNSPECIFIED")
    skips: Mapped[int] = mapped_column(BigInteger, default=0)
    offer_id: Mapped[str | None] = mapped_column(Id)
    booked_appointment_id: Mapped[str | None] = mapped_column(Id)
    language: Mapped[str] = mapped_column(Text, default="")
    age_band: Mapped[str] = mapped_column(Text, default="")

    # -- verbs ---------------------------------------------------------------------------------------------------------

    def wish_for(self, **values: Any) -> None:
        """Set the wishes. Raises Invalid `DATE_INVALID`, `PERIOD_INVALID`, FailedPrecondition `ILLEGAL_TRANSITION`."""
        if self.status is not None and self.status not in OPEN:
            raise FailedPrecondition(
                "ILLEGAL_TRANSITION", "This entry has ended.", action="update", status=self.status.name
            )
        for name, value in values.items():
            setattr(self, name, value)
        for name in ("earliest_date", "latest_date"):
            _day(getattr(self, name) or "", f"waitlist_entry.{name}")
        for earliest, latest in (("earliest_date", "latest_date"), ("earliest_time", "latest_time")):
            first, last = getattr(self, earliest) or "", getattr(self, latest) or ""
            if first and last and (last < first or (last == first and latest == "latest_time")):
                raise Invalid("PERIOD_INVALID", "The end lies before the beginning.", field=f"waitlist_entry.{latest}")

    def add(self) -> None:
        """Begin to wait."""
        self._step("add")

    def offer(self, offer: "WaitlistOffer") -> None:
        """A slot is held for the patient."""
        self.offer_id = offer.id
        self._step("offer", offer)

    def accept(self, offer: "WaitlistOffer") -> None:
        """The offer is booked."""
        self.booked_appointment_id = offer.id
        self._step("accept", offer)

    def decline(self, offer: "WaitlistOffer") -> None:
        """The patient doesn't want this one, and goes on waiting."""
        self._step("decline", offer)
        self.offer_id = None

    def lapse(self, offer: "WaitlistOffer") -> None:
        """Nobody answered in time: the patient goes on waiting, with a skip more."""
        self.skips = (self.skips or 0) + 1
        self._step("lapse", offer)
        self.offer_id = None

    def miss(self, offer: "WaitlistOffer") -> None:
        """The slot is no longer to be had, by no doing of the patient's."""
        self._step("miss", offer)
        self.offer_id = None

    def fulfill(self, appointment_id: str) -> None:
        """A visit of this type was booked in another way."""
        self._step("fulfill")
        self.booked_appointment_id, self.offer_id = appointment_id, None

    def withdraw(self, reason_code: str = "") -> None:
        """The patient no longer waits."""
        self._step("withdraw", reason_code=reason_code)
        self.offer_id = None

    def expire(self) -> None:
        """The time to wait is over."""
        self._step("expire")

    def _step(self, action: str, offer: "WaitlistOffer | None" = None, reason_code: str = "") -> None:
        # The offer's id as well: when the event is written the entry may have let go of it.
        self.move(
            action,
            reason_code=reason_code,
            channel="" if self.channel in (None, "CODE_UNSPECIFIED") else self.channel,
            offer_id=offer.id if offer is not None else "",
            clinic_id=offer.clinic_id if offer is not None else "",
            practitioner_id=offer.practitioner_id if offer is not None else "",
            start_time=offer.start_time if offer is not None else None,
            offer_expire_time=offer.expire_time if offer is not None else None,
        )

    # -- what is made of it --------------------------------------------------------------------------------------------

    def wish(self, before: datetime | None) -> Wish:
        """As matching takes it; `before` is the start of the visit that would be given up, as long as it stands."""
        return Wish(
            self.id,
            self.visit_type_id,
            self.priority,
            self.create_time,
            self.expire_time,
            self.clinic_ids,
            self.practitioner_ids,
            self.weekdays,
            self.earliest_time,
            self.latest_time,
            self.earliest_date,
            self.latest_date,
            self.skips,
            before,
        )


class WaitlistOffer(Living, Base):
    """A slot that is held for one patient; its id is that of the appointment that holds it. Of its link only the hash is kept."""

    __tablename__ = "waitlist_offer"
    __table_args__ = (
        about_subject("waitlist_offer"),
        UniqueConstraint("token_hash", name="waitlist_offer_token_key"),
        Index("waitlist_offer_due", "expire_time", postgresql_where=text("status = 'OPEN'")),
        Index("waitlist_offer_by_patient", "tenant_id", "patient_id", "create_time", "id"),
        Index("waitlist_offer_by_time", "tenant_id", "create_time", "id"),
        Index("waitlist_offer_by_entry", "tenant_id", "entry_id", "create_time", "id"),
    )
    aggregate = "waitlist_offer"
    lifecycle = Lifecycle(
        ("make", [], OfferStatus.OPEN, None),
        ("accept", [OfferStatus.OPEN], OfferStatus.ACCEPTED, None),
        ("decline", [OfferStatus.OPEN], OfferStatus.DECLINED, None),
        ("expire", [OfferStatus.OPEN], OfferStatus.EXPIRED, None),
        ("end", [OfferStatus.OPEN], OfferStatus.UNAVAILABLE, None),
    )

    patient_id: Mapped[str] = mapped_column(Id)
    entry_id: Mapped[str] = mapped_column(Id)
    slot_id: Mapped[str] = mapped_column(Id)
    status: Mapped[OfferStatus] = mapped_column(status_type(OfferStatus))
    visit_type_id: Mapped[str] = mapped_column(Id)
    clinic_id: Mapped[str] = mapped_column(Id)
    practitioner_id: Mapped[str] = mapped_column(Id)
    start_time: Mapped[datetime] = mapped_column(TIME)
    end_time: Mapped[datetime] = mapped_column(TIME)
    time_zone: Mapped[str]
    expire_time: Mapped[datetime] = mapped_column(TIME)
    answer_time: Mapped[datetime | None] = mapped_column(TIME)
    score: Mapped[int] = mapped_column(BigInteger)
    score_parts: Mapped[list[Any]] = mapped_column(JSONB)
    policy_version: Mapped[int] = mapped_column(BigInteger, default=0)
    token_hash: Mapped[bytes | None] = mapped_column(LargeBinary)

    def make(self, score: Score) -> None:
        """It stands from now on."""
        self.move("make")
        self.score, self.score_parts = score.total, parts_of(score)

    def new_link(self) -> str:
        """A token of 128 random bits; a former one stops working."""
        token = f"w-{secrets.token_urlsafe(16)}"
        self.token_hash = hash_of(token)
        return token

    def answer(self, action: str, now: datetime) -> None:
        """`accept` or `decline`."""
        self.move(action)
        self.answer_time = now

    def expire(self) -> None:
        """Nobody answered in time."""
        self.move("expire")

    def end(self, reason_code: str) -> None:
        """There is nothing to answer any more."""
        self.move("end", reason_code=reason_code)


class FreedSlot(Aggregate, Base):
    """Time that came free or was opened while somebody waited for its visit type.

    What comes free is written by the database with the change itself, what was opened by the loop that looks into it.
    """

    __tablename__ = "freed_slot"
    __table_args__ = (
        Index("freed_slot_due", "due_time", postgresql_where=text("status = 'OPEN'")),
        Index("freed_slot_by_time", "tenant_id", "create_time"),
        Index("freed_slot_by_clinic", "tenant_id", "clinic_id", "start_time"),
    )
    aggregate = "freed_slot"
    subject_field = None

    visit_type_id: Mapped[str] = mapped_column(Id)
    clinic_id: Mapped[str] = mapped_column(Id)
    practitioner_id: Mapped[str] = mapped_column(Id)
    start_time: Mapped[datetime] = mapped_column(TIME)
    end_time: Mapped[datetime] = mapped_column(TIME)
    time_zone: Mapped[str]
    cause: Mapped[str]
    """Status after the change that freed it: CANCELLED, ENTERED_IN_ERROR, or BOOKED for one that moved away; else OPENED."""
    status: Mapped[SlotStatus] = mapped_column(status_type(SlotStatus))
    due_time: Mapped[datetime] = mapped_column(TIME)
    offers: Mapped[int] = mapped_column(BigInteger, default=0, server_default=text("0"))
    end_status_time: Mapped[datetime | None] = mapped_column(TIME)
    """When it was filled or given up."""

    @property
    def slot(self) -> Slot:
        """As matching takes it."""
        return Slot(
            self.visit_type_id, self.clinic_id, self.practitioner_id, self.start_time, self.end_time, self.time_zone
        )

    def wait(self, until: datetime) -> None:
        """To be offered, but not before then."""
        self.status, self.due_time = SlotStatus.OPEN, until

    def close(self, status: SlotStatus, now: datetime) -> None:
        """Nothing more is done with it."""
        self.status, self.end_status_time = status, now


class WaitlistNotice(Base):
    """Something has happened to a visit that concerns an open entry: it was booked, or it held an offered slot."""

    __tablename__ = "waitlist_notice"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    no: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True, unique=True)
    entry_id: Mapped[str] = mapped_column(Id)
    appointment_id: Mapped[str] = mapped_column(Id)


class OpenedHours(Base):
    """Times of a practitioner that are open now and weren't, for visits of a type that somebody waits for."""

    __tablename__ = "opened_hours"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    no: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True, unique=True)
    visit_type_id: Mapped[str] = mapped_column(Id)
    clinic_id: Mapped[str] = mapped_column(Id)
    practitioner_id: Mapped[str] = mapped_column(Id)
    windows: Mapped[list[Any]] = mapped_column(JSONB)
    """[first, last) in epoch seconds, in order."""


def hash_of(token: str) -> bytes:
    """How a link's token is kept and looked up. 128 random bits need no slow hash."""
    return hashlib.sha256(token.encode()).digest()


def parts_of(score: Score) -> list[dict[str, Any]]:
    """The parts of a score, as answers have them."""
    return [{"name": name, "points": points} for name, points in score.parts.items()]


def _day(value: str, field: str) -> None:
    if not value:
        return
    try:
        date.fromisoformat(value)
    except ValueError:
        raise Invalid("DATE_INVALID", "There is no such day in the calendar.", field=field) from None


# Triggers, because every way in which a visit gives time back must be heard, in the same transaction, those of features to
# come too; and because a booking pays nothing for it but the test of a condition. Neither waits for any lock: entries and
# offers are only read, and what follows is the loop's work.
_FREED = """
CREATE FUNCTION waitlist_freed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF OLD.status = 'PENDING' AND EXISTS (
    SELECT FROM waitlist_offer o WHERE o.tenant_id = OLD.tenant_id AND o.id = OLD.id
  ) THEN
    INSERT INTO waitlist_notice (tenant_id, entry_id, appointment_id)
    SELECT o.tenant_id, o.entry_id, o.id FROM waitlist_offer o
     WHERE o.tenant_id = OLD.tenant_id AND o.id = OLD.id AND o.status = 'OPEN';
  ELSIF OLD.overbooking = 0 AND OLD.start_time > clock_timestamp() AND EXISTS (
    SELECT FROM waitlist_entry e
     WHERE e.tenant_id = OLD.tenant_id AND e.visit_type_id = OLD.visit_type_id AND e.status IN ('WAITING', 'OFFERED')
  ) THEN
    INSERT INTO freed_slot (tenant_id, id, version, visit_type_id, clinic_id, practitioner_id, start_time, end_time,
                            time_zone, cause, status, due_time)
    VALUES (OLD.tenant_id, gen_random_uuid(), 1, OLD.visit_type_id, OLD.clinic_id, OLD.practitioner_id, OLD.start_time,
            OLD.end_time, OLD.time_zone, NEW.status, 'OPEN', clock_timestamp());
  END IF;
  RETURN NULL;
END $$
"""
_FREED_BY = """
CREATE TRIGGER waitlist_freed AFTER UPDATE ON appointment FOR EACH ROW
WHEN (OLD.session_id IS NULL AND OLD.status IN ('PENDING', 'BOOKED', 'ARRIVED', 'CHECKED_IN') AND (
  NEW.status IN ('CANCELLED', 'ENTERED_IN_ERROR')
  OR OLD.start_time <> NEW.start_time OR OLD.end_time <> NEW.end_time
  OR OLD.practitioner_id <> NEW.practitioner_id OR OLD.clinic_id <> NEW.clinic_id))
EXECUTE FUNCTION waitlist_freed()
"""
_BOOKED = """
CREATE FUNCTION waitlist_booked() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO waitlist_notice (tenant_id, entry_id, appointment_id)
  SELECT e.tenant_id, e.id, NEW.id FROM waitlist_entry e
   WHERE e.tenant_id = NEW.tenant_id AND e.patient_id = NEW.patient_id AND e.visit_type_id = NEW.visit_type_id
     AND e.status IN ('WAITING', 'OFFERED') AND e.appointment_id IS DISTINCT FROM NEW.id
     AND NEW.start_time > clock_timestamp();
  RETURN NULL;
END $$
"""
_BOOKED_AT_ONCE = """
CREATE TRIGGER waitlist_booked AFTER INSERT ON appointment FOR EACH ROW
WHEN (NEW.status = 'BOOKED') EXECUTE FUNCTION waitlist_booked()
"""
_BOOKED_LATER = """
CREATE TRIGGER waitlist_booked_later AFTER UPDATE ON appointment FOR EACH ROW
WHEN (NEW.status = 'BOOKED' AND OLD.status <> 'BOOKED') EXECUTE FUNCTION waitlist_booked()
"""
TRIGGERS = tuple(one.strip() for one in (_FREED, _FREED_BY, _BOOKED, _BOOKED_AT_ONCE, _BOOKED_LATER))
for _statement in TRIGGERS:
    event.listen(Appointment.__table__, "after_create", DDL(_statement))

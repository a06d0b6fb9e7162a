"""Group sessions: one teacher and room for several patients, each with a seat or a place on the waitlist."""

import enum
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, Index, Text, Uuid, bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from chassis.errors import AlreadyExists, FailedPrecondition, Invalid
from chassis.lifecycle import Lifecycle
from chassis.model import Id, Living, status_type
from services.scheduling import booking, occupancy
from services.scheduling.appointment import Appointment, Status
from services.scheduling.directory import Base
from services.scheduling.occupancy import Span
from services.scheduling.offers import Place
from services.scheduling.terms import terms


class SessionStatus(enum.StrEnum):
    """Whether it takes place."""

    SCHEDULED = "SCHEDULED"
    CANCELLED = "CANCELLED"


class Session(Living, Base):
    """A class or group at one time. It holds its teacher and rooms; who takes part stands in appointments only."""

    __tablename__ = "session"
    __table_args__ = (Index("session_by_clinic", "tenant_id", "clinic_id", "start_time", "id"),)
    aggregate = "session"
    subject_field = None
    lifecycle = Lifecycle(
        ("schedule", [], SessionStatus.SCHEDULED, "scheduled"),
        ("reschedule", [SessionStatus.SCHEDULED], SessionStatus.SCHEDULED, "rescheduled"),
        ("cancel", [SessionStatus.SCHEDULED], SessionStatus.CANCELLED, "cancelled"),
    )

    name: Mapped[str]
    status: Mapped[SessionStatus] = mapped_column(status_type(SessionStatus))
    visit_type_id: Mapped[str] = mapped_column(Id)
    clinic_id: Mapped[str] = mapped_column(Id)
    practitioner_id: Mapped[str] = mapped_column(Id)
    start_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    end_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    time_zone: Mapped[str]
    modality: Mapped[str] = mapped_column(Text, default="IN_PERSON")
    late_cancel_hours: Mapped[int] = mapped_column(BigInteger, default=0)
    capacity: Mapped[int] = mapped_column(BigInteger)
    waitlist_size: Mapped[int] = mapped_column(BigInteger)

    def place(self, values: dict[str, Any]) -> None:
        """Set time and place, out of what a booking chose."""
        for name in (*_PLACE, "security_labels"):
            setattr(self, name, values[name])

    def schedule(self) -> None:
        """It takes place."""
        self.move("schedule")

    def reschedule(self, values: dict[str, Any]) -> None:
        """It takes place then and there instead."""
        self.place(values)
        self.move("reschedule")

    def update(self, enrolled: int, **values: Any) -> None:
        """Another name, other numbers of seats. Raises Invalid `CAPACITY_INVALID`, FailedPrecondition `SEATS_TAKEN`."""
        if not values.get("capacity", 1) or not values.get("name", "x").strip():
            raise Invalid("CAPACITY_INVALID", "A session has a name and at least one seat.", field="session.capacity")
        if values.get("capacity", enrolled) < enrolled:
            raise FailedPrecondition(
                "SEATS_TAKEN", "More seats are taken than there would be.", field="session.capacity"
            )
        for name, value in values.items():
            setattr(self, name, value)
        self.tell("updated")

    def cancel(self, reason_code: str) -> None:
        """It doesn't take place."""
        self.move("cancel", reason_code=reason_code)

    def check_open(self, now: datetime) -> None:
        """Raises FailedPrecondition `SESSION_CLOSED` where it is cancelled or has begun."""
        if self.status is not SessionStatus.SCHEDULED or self.start_time <= now:
            raise FailedPrecondition("SESSION_CLOSED", "The session is cancelled or has begun.")

    def values(self, patient_id: str) -> dict[str, Any]:
        """What the appointment of one participant says: nothing of any other."""
        period = {"start_time": self.start_time.isoformat(), "end_time": self.end_time.isoformat()}
        patient = {"actor": {"type": "Patient", "id": patient_id}, "role": "patient", "status": "ACCEPTED"}
        return {
            **{name: getattr(self, name) for name in _PLACE},
            "security_labels": list(self.security_labels or ()),
            "overbooking": 0,
            "participants": [{**patient, "period": period}],
        }

    @property
    def taken_at(self) -> Place:
        """Where and when, as a booking takes it."""
        return Place(self.visit_type_id, self.clinic_id, self.practitioner_id, int(self.start_time.timestamp()))

    def span(self, no: int) -> Span:
        """The time for which a participant is taken."""
        return Span(no, 0, int(self.start_time.timestamp()), int(self.end_time.timestamp()))


_PLACE = (
    "visit_type_id", "clinic_id", "practitioner_id", "start_time", "end_time", "time_zone", "modality",
    "late_cancel_hours",
)  # fmt: skip


def full() -> AlreadyExists:
    """No seat is left, or none on the waitlist where that was asked for."""
    return AlreadyExists("SESSION_FULL", "No place is left in this session.")


async def participants(
    db: AsyncSession, tenant_id: str, session_id: str, *, waiting: bool = False
) -> list[Appointment]:
    """The appointments that stand in a session, locked by id; with `waiting` only those on the waitlist that nobody has
    in hand, the first one first."""
    statuses = [Status.WAITLIST] if waiting else [Status.BOOKED, Status.WAITLIST, Status.ARRIVED, Status.CHECKED_IN]
    query = select(Appointment).where(
        Appointment.tenant_id == tenant_id, Appointment.session_id == session_id, Appointment.status.in_(statuses)
    )
    if waiting:
        query = query.order_by(Appointment.create_time, Appointment.id).with_for_update(
            skip_locked=True, key_share=True
        )
    else:
        query = query.order_by(Appointment.id).with_for_update(key_share=True)
    return list((await db.execute(query)).scalars())


async def counts(db: AsyncSession, tenant_id: str, session_ids: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(seats taken, patients waiting) by session; absent where nobody is."""
    rows = await db.execute(_COUNTS, {"tenant": tenant_id, "sessions": list(session_ids)})
    return {row.session_id: (row.enrolled, row.waiting) for row in rows}


async def seat(db: AsyncSession, session: Session) -> int | None:
    """The lowest seat that is free; the session's row must be locked."""
    values = {"tenant": session.tenant_id, "session": session.id, "capacity": session.capacity}
    found: int | None = (await db.execute(_SEAT, values)).scalar_one_or_none()
    return found


async def number(db: AsyncSession, tenant_id: str, patient_id: str) -> int:
    """The patient's number in the calendar; made when it is first asked for."""
    values = {"tenant": tenant_id, "patient": patient_id}
    await db.execute(_NUMBERED, values)
    found: int = (await db.execute(_NUMBER, values)).scalar_one()
    return found


async def take(db: AsyncSession, session: Session, appointment: Appointment) -> bool:
    """Take a participant's own time and nobody else's; whether it was to be had."""
    no = await number(db, session.tenant_id, appointment.patient_id)
    span = session.span(no)
    if await occupancy.take(db, session.tenant_id, appointment.id, [span], patient_id=appointment.patient_id):
        # What stands there may be a hold whose time is over.
        await occupancy.lock(db, [no])
        ended = await booking.end_expired(db, session.tenant_id, [span])
        if not ended:
            return False
        return not await occupancy.take(
            db, session.tenant_id, appointment.id, [span], patient_id=appointment.patient_id, freed=ended
        )
    return True


async def promote(
    db: AsyncSession, tenant_id: str, session_ids: Sequence[str], now: datetime, *, wait: bool = True
) -> list[Appointment]:
    """Give each free seat of these sessions to the first on the waitlist who has the time; answers who moved up.

    In the transaction that gave a seat back, and before it gives back the patient's time. At most one patient's time is
    taken for a session; `wait` false raises where somebody has a session in hand. Within the lock-out before the start
    nobody moves up: who waits would learn of it too late.
    """
    seated: list[Appointment] = []
    query = (
        select(Session)
        .where(Session.tenant_id == tenant_id, Session.id.in_(session_ids))
        .order_by(Session.id)
        .with_for_update(key_share=True, nowait=not wait)
    )
    for session in (await db.execute(query)).scalars().all():
        if session.status is not SessionStatus.SCHEDULED or session.start_time <= now:
            continue
        if await _too_late(db, session, now):
            continue
        free = await seat(db, session)
        for waiting in await participants(db, tenant_id, session.id, waiting=True) if free is not None else ():
            if await take(db, session, waiting):
                waiting.seat(free)
                await db.flush()
                seated.append(waiting)
                break
    return seated


async def promote_all(db: AsyncSession, session: Session, now: datetime) -> list[Appointment]:
    """As `promote`, all free seats of a session whose row is locked, the first one on the waitlist first.

    Several patients' times are taken in one transaction, so their numbers are locked before the first, by number.
    """
    seated: list[Appointment] = []
    if await _too_late(db, session, now):
        return seated
    waiting = await participants(db, session.tenant_id, session.id, waiting=True)
    ids = sorted({one.patient_id for one in waiting})
    await occupancy.lock(db, sorted([await number(db, session.tenant_id, patient_id) for patient_id in ids]))
    for one in waiting:
        free = await seat(db, session)
        if free is None:
            break
        if await take(db, session, one):
            one.seat(free)
            await db.flush()
            seated.append(one)
    return seated


async def _too_late(db: AsyncSession, session: Session, now: datetime) -> bool:
    held = await terms(db, session.tenant_id, session.visit_type_id, session.clinic_id)
    return session.start_time - held.rules.lockout <= now


_UUID = Uuid(as_uuid=False)
_COUNTS = text(
    "SELECT session_id, count(seat_no) AS enrolled, count(*) FILTER (WHERE status = 'WAITLIST') AS waiting FROM appointment"
    " WHERE tenant_id = :tenant AND session_id = ANY(:sessions) GROUP BY session_id"
).bindparams(
    bindparam("tenant", type_=_UUID), bindparam("sessions", type_=ARRAY(_UUID))
).columns(session_id=_UUID, enrolled=BigInteger, waiting=BigInteger)  # fmt: skip
_SEAT = text(
    "SELECT n FROM generate_series(1, :capacity) AS n WHERE NOT EXISTS (SELECT FROM appointment a"
    " WHERE a.tenant_id = :tenant AND a.session_id = :session AND a.seat_no = n)"
    # Seats above a capacity that was lowered stay whose they are, and count.
    " AND (SELECT count(seat_no) FROM appointment a WHERE a.tenant_id = :tenant AND a.session_id = :session) < :capacity"
    " ORDER BY n LIMIT 1"
).bindparams(
    bindparam("tenant", type_=_UUID), bindparam("session", type_=_UUID), bindparam("capacity", type_=BigInteger)
)  # fmt: skip
_NUMBERED = text(
    "INSERT INTO bookable (tenant_id, ref_id, kind) VALUES (:tenant, :patient, 'patient') ON CONFLICT DO NOTHING"
).bindparams(bindparam("tenant", type_=_UUID), bindparam("patient", type_=_UUID))
_NUMBER = text("SELECT no FROM bookable WHERE tenant_id = :tenant AND ref_id = :patient").bindparams(
    bindparam("tenant", type_=_UUID), bindparam("patient", type_=_UUID)
)

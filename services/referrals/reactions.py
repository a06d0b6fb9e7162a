"""What referrals does on events and as time passes: visits move the loop, pools and clinics are kept, lateness is told."""

from datetime import datetime

from care.events.v1.envelope_pb2 import Event
from care.patients.v1 import events_pb2 as patients
from care.scheduling.v1 import directory_pb2
from care.scheduling.v1 import events_pb2 as scheduling
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.pipeline import Runtime
from chassis.projections import keep_state, keep_team
from chassis.reactions import Reactions
from chassis.timers import due
from chassis.wire import to_time
from services.referrals.projections import Clinic, Pool, calendar_of
from services.referrals.referral import Referral, ReferralVisit

reactions = Reactions()
OVERDUE = "overdue referrals"
"""Name of the loop that tells what is past due."""
_NEVER_PROMISED = ("PENDING", "PROPOSED", "WAITLIST")


@reactions.on("pool.changed", payload=patients.PoolState, shares=True)
async def store_pool(pool: patients.PoolState, event: Event, db: AsyncSession) -> None:
    """By full state and version: any order gives the same."""
    await keep_team(db, Pool, event, pool, specialty_codes=list(pool.specialty_codes))


@reactions.on("clinic.changed", payload=directory_pb2.Clinic, shares=True)
async def store_clinic(clinic: directory_pb2.Clinic, event: Event, db: AsyncSession) -> None:
    """By full state and version: any order gives the same."""
    await keep_state(
        db,
        Clinic,
        event,
        time_zone=clinic.time_zone,
        holiday_region=clinic.holiday_region,
        closed_dates=sorted(clinic.closed_dates),
        security_labels=sorted(clinic.security_labels),
    )


@reactions.on(
    "appointment.booked",
    "appointment.rescheduled",
    "appointment.confirmed",
    "appointment.arrived",
    "appointment.checked_in",
    "appointment.fulfilled",
    "appointment.noshow",
    "appointment.cancelled",
    "appointment.released",
    "appointment.reverted",
    "appointment.entered_in_error",
    payload=scheduling.AppointmentEvent,
    shares=True,
)
async def follow_visit(visit: scheduling.AppointmentEvent, event: Event, db: AsyncSession) -> None:
    """Keep the visit's latest state, and let the referral follow all its visits.

    An event older than what is known of its visit changes nothing; what the referral does follows from the states, not
    from the order in which they were heard.
    """
    if not visit.referral_id:
        return
    # Locked first: of two visits of one referral, heard at once, the second sees the first.
    found = await db.execute(
        select(Referral)
        .where(
            Referral.tenant_id == event.tenant_id,
            Referral.id == visit.referral_id,
            Referral.patient_id == event.patient_id,
        )
        .with_for_update(of=Referral, key_share=True)
    )
    referral = found.scalar_one_or_none()
    if referral is None or not await _keep(db, referral, visit, event.version):
        return
    await follow(db, referral, to_time(event.time), visit.reason_code)


async def _keep(db: AsyncSession, referral: Referral, visit: scheduling.AppointmentEvent, version: int) -> bool:
    """Store what the event says of its visit; False where something later is known."""
    known = await db.get(ReferralVisit, (referral.tenant_id, visit.id))
    if known is not None and known.appointment_version >= version:
        return False
    if known is None:
        known = ReferralVisit(tenant_id=referral.tenant_id, id=visit.id, referral_id=referral.id)
        known.patient_id = referral.patient_id
        db.add(known)
    known.appointment_version = version
    # A hold that ends was never a visit: nobody missed it.
    released = visit.status == "CANCELLED" and visit.previous_status in _NEVER_PROMISED
    known.status = "RELEASED" if released else visit.status
    known.start_time, known.end_time = to_time(visit.start_time), to_time(visit.end_time)
    return True


async def follow(db: AsyncSession, referral: Referral, since: datetime, reason_code: str = "") -> None:
    """Let a referral, whose row is locked, go where its visits say."""
    visits = await db.execute(
        select(ReferralVisit).where(
            ReferralVisit.tenant_id == referral.tenant_id, ReferralVisit.referral_id == referral.id
        )
    )
    calendar = await calendar_of(db, referral.tenant_id, referral.clinic_id)
    referral.follow(visits.scalars(), calendar, since, reason_code=reason_code)


async def tell_overdue(runtime: Runtime) -> int:
    """Tell `referral.overdue` once per due time of an open referral; closed ones have none."""
    async with runtime.database.acting("system:referrals") as db:
        rows = await due(db, Referral, Referral.due_time, ~Referral.overdue_told)  # as its index says
        for referral in rows:
            referral.tell_overdue()
    return len(rows)

"""Walk-ins: who stands at the desk gets the first free start of today."""

from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession

from chassis.errors import AlreadyExists, LostRace
from services.scheduling import booking, days
from services.scheduling.appointment import Appointment
from services.scheduling.booking import Chosen
from services.scheduling.finding import Search, free_slots
from services.scheduling.offers import Place


async def soonest(
    db: AsyncSession, tenant_id: str, patient_id: str, wanted: Place, now: datetime, time_zone: str, *, referral: bool
) -> Place:
    """The first free start between now and the clinic's midnight, with whom is wanted or with anybody.

    Raises AlreadyExists `SLOT_TAKEN` where there is none, FailedPrecondition `NOT_ELIGIBLE` where there can be none.
    """
    _, midnight = days.window(days.today(now, time_zone), time_zone)
    search = Search(
        tenant_id=tenant_id,
        visit_type_id=wanted.visit_type_id,
        clinic_ids=[wanted.clinic_id],
        practitioner_ids=[wanted.practitioner_id] if wanted.practitioner_id else [],
        start=wanted.start,
        end=int(midnight.timestamp()),
        patient_id=patient_id,
        referral=referral,
    )
    free = await free_slots(db, search, 1)
    if free.ineligible:
        raise booking.not_eligible(free.ineligible)
    if not free.slots:
        raise AlreadyExists("SLOT_TAKEN", "Nobody is free at this clinic today.")
    slot = free.slots[0]
    return wanted._replace(practitioner_id=slot.practitioner_id, start=slot.start, resource_ids=slot.resource_ids)


async def take(db: AsyncSession, chosen: Chosen, appointment: Appointment) -> None:
    """As `Chosen.take`, but whoever loses the time looks for the next free one."""
    try:
        await chosen.take(db, appointment)
    except AlreadyExists as lost:
        raise LostRace(lost) from None

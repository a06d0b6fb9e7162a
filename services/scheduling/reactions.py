"""What scheduling does on others' events."""

from care.events.v1.envelope_pb2 import Event
from care.patients.v1 import events_pb2 as patients
from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.projections import keep_newer
from chassis.reactions import Reactions, need_own_transaction
from services.scheduling import occupancy
from services.scheduling.appointment import DECEASED, Appointment, DeceasedPatient, PatientVersion, Status

reactions = Reactions()


@reactions.on("patient.deceased", payload=patients.PatientEvent)
@reactions.on("patient.registered", "patient.updated", payload=patients.PatientEvent, shares=True)
async def follow_death(patient: patients.PatientEvent, event: Event, db: AsyncSession) -> None:
    """Who has died is a projection: the newest state decides, and an older event changes nothing.

    A correction lets bookings go on; what the death has cancelled stays cancelled.
    """
    dead = event.type == "patient.deceased" or patient.deceased
    if not dead and (event.type == "patient.registered" or not patient.HasField("deceased")):
        return  # nothing is older than a registration; an event without the field doesn't say
    state = {"tenant_id": event.tenant_id, "patient_id": patient.id, "version": event.version}
    if not await keep_newer(db, PatientVersion, state, key=("tenant_id", "patient_id")):
        return
    if dead:
        await _stop_visits(patient, event, db)
    else:
        await db.execute(
            delete(DeceasedPatient).where(
                DeceasedPatient.tenant_id == event.tenant_id, DeceasedPatient.patient_id == patient.id
            )
        )


async def _stop_visits(patient: patients.PatientEvent, event: Event, db: AsyncSession) -> None:
    """Nothing more is booked, and what lies ahead is cancelled.

    The patient's row is locked against bookings under way: each has either committed, and is cancelled here, or finds
    the patient dead when it takes its time. What the visits occupied is locked by other patients' bookings, too.
    """
    need_own_transaction(db)
    subject = db.info["runtime"].tables.access.subject
    await db.execute(
        select(subject.c.patient_id)
        .where(subject.c.tenant_id == event.tenant_id, subject.c.patient_id == patient.id)
        .with_for_update()
    )
    await db.execute(
        insert(DeceasedPatient).values(tenant_id=event.tenant_id, patient_id=patient.id).on_conflict_do_nothing()
    )
    now = db.info["act"].now
    ahead = (
        select(Appointment)
        .where(
            Appointment.tenant_id == event.tenant_id,
            Appointment.patient_id == patient.id,
            Appointment.status.in_([Status.PENDING, Status.BOOKED]),
            Appointment.start_time > now,
        )
        # Whoever has one in hand may wait for somebody who waits for this patient's row: then all is tried again.
        .with_for_update(of=Appointment, key_share=True, nowait=True)
    )
    visits = list((await db.execute(ahead)).scalars())
    for visit in visits:
        visit.cancel(DECEASED, now)
    if visits:
        await occupancy.free(db, *((one.tenant_id, one.id) for one in visits))

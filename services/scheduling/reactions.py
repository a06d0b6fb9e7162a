"""What scheduling does on others' events."""

from care.events.v1.envelope_pb2 import Event
from care.patients.v1 import events_pb2 as patients
from care.referrals.v1 import events_pb2 as referrals
from care.type.v1 import type_pb2
from sqlalchemy import delete, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.ids import new_id
from chassis.pipeline import Runtime
from chassis.projections import keep_newer, keep_state, keep_team
from chassis.reactions import Reactions, need_own_transaction
from chassis.timers import due
from services.scheduling import occupancy, session
from services.scheduling.appointment import DECEASED, Appointment, DeceasedPatient, PatientVersion, Status
from services.scheduling.pools import Pool, pool_for
from services.scheduling.scheduling_request import (
    ELSEWHERE,
    ReferralState,
    SchedulingRequest,
    calendar_of,
    follow_visits,
    standing_visit,
)
from services.scheduling.scheduling_request import Status as Stands
from services.scheduling.waitlist import OPEN, WaitlistEntry

reactions = Reactions()
OVERDUE = "overdue requests"
"""Name of the loop that tells which requests are past due."""
_NEEDS_VISIT = ("ACCEPTED", "UNATTENDED")
_OVER = ("DECLINED", "CLOSED", "CANCELLED")


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
            Appointment.status.in_([Status.PENDING, Status.BOOKED, Status.WAITLIST]),
            Appointment.start_time > now,
        )
        # Whoever has one in hand may wait for somebody who waits for this patient's row: then all is tried again.
        .with_for_update(of=Appointment, key_share=True, nowait=True)
    )
    visits = list((await db.execute(ahead)).scalars())
    for visit in visits:
        visit.cancel(DECEASED, now)
    seated: list[Appointment] = []
    sessions = [visit.session_id for visit in visits if visit.session_id is not None]
    if sessions:
        await db.flush()
        seated = await session.promote(db, event.tenant_id, sessions, now, wait=False)
    if visits:
        await occupancy.free(db, *((one.tenant_id, one.id) for one in visits))
    waiting = (
        select(WaitlistEntry)
        .where(
            WaitlistEntry.tenant_id == event.tenant_id,
            WaitlistEntry.patient_id == patient.id,
            WaitlistEntry.status.in_(OPEN),
        )
        .with_for_update(of=WaitlistEntry, key_share=True, nowait=True)
    )
    for entry in (await db.execute(waiting)).scalars():
        entry.withdraw("deceased")  # an offer that was open has just lost its hold, and ends by that
    asked = select(SchedulingRequest).where(
        SchedulingRequest.tenant_id == event.tenant_id,
        SchedulingRequest.patient_id == patient.id,
        SchedulingRequest.due_time.is_not(None),
    )
    for request in (await db.execute(asked.with_for_update(of=SchedulingRequest, key_share=True))).scalars():
        request.close({"code": "deceased"}, await calendar_of(db, event.tenant_id, request.clinic_id), now)
    await follow_visits(db, seated, now)


@reactions.on("pool.changed", payload=patients.PoolState, shares=True)
async def store_pool(pool: patients.PoolState, event: Event, db: AsyncSession) -> None:
    """By full state and version: any order gives the same."""
    await keep_team(db, Pool, event, pool)


@reactions.on(
    "referral.accepted",
    "referral.declined",
    "referral.scheduled",
    "referral.unscheduled",
    "referral.unattended",
    "referral.seen",
    "referral.closed",
    "referral.cancelled",
    payload=referrals.ReferralEvent,
    shares=True,
)
async def follow_referral(referral: referrals.ReferralEvent, event: Event, db: AsyncSession) -> None:
    """A referral that needs a visit has one open request; by the referral's newest state, in whatever order it is heard.

    Whether a visit is needed is known here sooner than there: one that stands, answers the request.
    """
    state = referral.business_status
    if not await keep_state(db, ReferralState, event, business_status=state):
        return
    query = select(SchedulingRequest).where(
        SchedulingRequest.tenant_id == event.tenant_id, SchedulingRequest.referral_id == referral.id
    )
    request = (await db.execute(query.with_for_update(of=SchedulingRequest, key_share=True))).scalar_one_or_none()
    now = db.info["act"].now
    calendar = await calendar_of(db, event.tenant_id, referral.clinic_id)
    if state in _NEEDS_VISIT:
        visit = await standing_visit(db, event.tenant_id, event.patient_id, referral.id)
        if request is None:
            request = await _open_request(referral, event, db)
        elif not request.is_open and visit is None and _may_reopen(request):
            request.reopen(calendar, now, state.lower())
        if visit is not None and request.is_open:
            await db.flush()  # two versions for two steps
            request.book(visit, calendar, now)
    elif request is not None and request.is_open:
        if state not in _OVER and referral.appointment_id:
            request.book(referral.appointment_id, calendar, now)
        else:
            code = f"referral-{state.lower()}" if state in _OVER else ELSEWHERE
            request.close({"code": code}, calendar, now)


def _may_reopen(request: SchedulingRequest) -> bool:
    """What a person has closed stays closed."""
    return request.status is Stands.BOOKED or (request.close_reason or {}).get("code") == ELSEWHERE


async def _open_request(referral: referrals.ReferralEvent, event: Event, db: AsyncSession) -> SchedulingRequest:
    owner = {"type": referral.owner.type, "id": referral.owner.id}
    if not referral.HasField("owner"):
        owner = {"type": "Pool", "id": await pool_for(db, event.tenant_id, referral.clinic_id)}
    request = SchedulingRequest(
        tenant_id=event.tenant_id,
        id=new_id(),
        patient_id=event.patient_id,
        origin="REFERRAL",
        clinic_id=referral.clinic_id,
        priority=type_pb2.Priority.Code.Name(referral.priority) if referral.priority else "ROUTINE",
        based_on={"type": "Referral", "id": referral.id},
        referral_id=referral.id,
        security_labels=list(event.security_labels),
    )
    request.open(owner, await calendar_of(db, event.tenant_id, referral.clinic_id), db.info["act"].now)
    db.add(request)
    return request


async def tell_overdue_requests(runtime: Runtime) -> int:
    """Tell `scheduling_request.overdue` once per due time of an open request; others have none."""
    async with runtime.database.acting("system:scheduling") as db:
        rows = await due(db, SchedulingRequest, SchedulingRequest.due_time, ~SchedulingRequest.overdue_told)
        for request in rows:
            request.tell_overdue()
    return len(rows)

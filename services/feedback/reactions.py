"""What feedback does on others' events: a visit took place, or it didn't after all."""

from datetime import datetime, timedelta

from care.events.v1.envelope_pb2 import Event
from care.patients.v1 import events_pb2 as patients
from care.scheduling.v1 import events_pb2 as scheduling
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from chassis import policies
from chassis.ids import new_id
from chassis.reactions import Reactions
from chassis.wire import to_time
from services.feedback.invitation import Status, SurveyInvitation
from services.feedback.questionnaire import Questionnaire
from services.feedback.questionnaire import Status as Publication
from services.feedback.undone import UndoneVisit

reactions = Reactions()
_UNDONE, _DECEASED = "visit-undone", "deceased"


@reactions.on("appointment.fulfilled", payload=scheduling.AppointmentEvent, shares=True)
async def plan_survey(visit: scheduling.AppointmentEvent, event: Event, db: AsyncSession) -> None:
    """Plan the survey of a visit, once; not where the visit was taken back at a later version, nor too soon again."""
    undone = await db.get(UndoneVisit, (event.tenant_id, visit.id))
    if undone is not None and undone.visit_version > event.version:
        return
    invitation = await _invitation(db, event.tenant_id, visit.id)
    if invitation is not None and (
        invitation.status is not Status.REVOKED or invitation.last_step["reason_code"] != _UNDONE
    ):
        return
    questionnaire_id = await _after_visit(db, event.tenant_id)
    if questionnaire_id is None:
        return
    settings = db.info["runtime"].settings
    policy = await policies.current(
        db,
        event.tenant_id,
        "survey",
        {"delay": settings.survey_delay, "expiry": settings.survey_expiry, "pause": settings.survey_pause},
        clinic=visit.clinic_id,
        visit_type=visit.visit_type_id,
    )
    due_time = to_time(event.time) + timedelta(seconds=policy.settings["delay"])
    if await _asked_lately(db, event, due_time - timedelta(seconds=policy.settings["pause"])):
        return
    if invitation is None:
        invitation = SurveyInvitation(
            tenant_id=event.tenant_id,
            id=new_id(),
            patient_id=event.patient_id,
            recipient={"type": "Patient", "id": event.patient_id},
            recipient_id=event.patient_id,
            appointment_id=visit.id,
            clinic_id=visit.clinic_id,
            security_labels=list(event.security_labels),
        )
        db.add(invitation)
    invitation.plan(questionnaire_id, due_time, due_time + timedelta(seconds=policy.settings["expiry"]), policy.version)


@reactions.on("appointment.reverted", "appointment.entered_in_error", payload=scheduling.AppointmentEvent, shares=True)
async def take_back_survey(visit: scheduling.AppointmentEvent, event: Event, db: AsyncSession) -> None:
    """A visit that didn't take place after all is asked about by nobody, unless its survey has left already."""
    statement = insert(UndoneVisit).values(
        tenant_id=event.tenant_id, appointment_id=visit.id, visit_version=event.version
    )
    # Remembered by version, since the event of the visit itself may come later, out of the dead letters.
    await db.execute(
        statement.on_conflict_do_update(
            index_elements=["tenant_id", "appointment_id"],
            set_={"visit_version": func.greatest(UndoneVisit.visit_version, statement.excluded.visit_version)},
        )
    )
    invitation = await _invitation(db, event.tenant_id, visit.id)
    if invitation is not None and invitation.status is Status.PLANNED:
        invitation.revoke(_UNDONE)


@reactions.on("patient.deceased", payload=patients.PatientEvent, shares=True)
async def ask_no_more(_patient: patients.PatientEvent, event: Event, db: AsyncSession) -> None:
    """Nobody deceased is asked; a link that is under way stops working."""
    query = (
        select(SurveyInvitation)
        .where(
            SurveyInvitation.tenant_id == event.tenant_id,
            SurveyInvitation.patient_id == event.patient_id,
            SurveyInvitation.status.in_([Status.PLANNED, Status.INVITED]),
        )
        .with_for_update()
    )
    for invitation in (await db.execute(query)).scalars():
        invitation.revoke(_DECEASED)


async def _invitation(db: AsyncSession, tenant_id: str, appointment_id: str) -> SurveyInvitation | None:
    query = (
        select(SurveyInvitation)
        .where(SurveyInvitation.tenant_id == tenant_id, SurveyInvitation.appointment_id == appointment_id)
        .with_for_update()
    )
    return (await db.execute(query)).scalar_one_or_none()


async def _after_visit(db: AsyncSession, tenant_id: str) -> str | None:
    query = (
        select(Questionnaire.id)
        .where(
            Questionnaire.tenant_id == tenant_id,
            Questionnaire.after_visit,
            Questionnaire.status == Publication.ACTIVE,
        )
        .order_by(Questionnaire.create_time.desc(), Questionnaire.number.desc(), Questionnaire.id.desc())
        .limit(1)
    )
    return (await db.execute(query)).scalar_one_or_none()


async def _asked_lately(db: AsyncSession, event: Event, since: datetime) -> bool:
    # Two visits of one patient may be worked on at once: without the lock neither would see the other's invitation.
    await db.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(event.patient_id, 0))))
    query = (
        select(SurveyInvitation.id)
        .where(
            SurveyInvitation.tenant_id == event.tenant_id,
            SurveyInvitation.recipient_id == event.patient_id,
            SurveyInvitation.due_time > since,
            SurveyInvitation.status != Status.REVOKED,
        )
        .limit(1)
    )
    return (await db.execute(query)).first() is not None

"""What notifications does on others' events: keep projections, plan, revoke. Nothing leaves from here."""

from datetime import UTC, datetime, timedelta
from typing import Any

from care.events.v1.envelope_pb2 import Event
from care.feedback.v1.events_pb2 import SurveyEvent
from care.patients.v1.events_pb2 import PatientEvent
from care.scheduling.v1.directory_pb2 import Clinic as ClinicState
from care.scheduling.v1.directory_pb2 import VisitType as VisitTypeState
from care.scheduling.v1.events_pb2 import AppointmentEvent
from care.scheduling.v1.waitlist_pb2 import WaitlistEvent
from care.type.v1.type_pb2 import ContactPoint
from sqlalchemy import and_, select
from sqlalchemy.ext.asyncio import AsyncSession

from chassis import policies
from chassis.ids import new_id
from chassis.projections import keep_state
from chassis.reactions import Reactions, need_own_transaction
from chassis.telemetry import current_traceparent
from chassis.timers import wake_after_commit
from chassis.wire import plain, to_time
from services.notifications.checking import CANCELLED_NOTICES, GONE
from services.notifications.message import (
    CORRECTION,
    REMINDER,
    SURVEY,
    WAITING,
    WAITLIST_OFFER,
    Message,
    MessageStatus,
    Reminder,
    ReminderStatus,
)
from services.notifications.planning import DEFAULT_POLICY, Offset, plan
from services.notifications.projections import (
    NEVER_PLANNED,
    Appointment,
    Clinic,
    Patient,
    VisitType,
    is_deceased,
    keep_visit,
    visit_row,
)

SHIPPED: dict[str, Any] = {
    "offsets": [{"name": each.name, "kind": each.kind, "amount": each.amount} for each in DEFAULT_POLICY],
    "channels": ["SMS", "EMAIL"],
    "open_from": "09:00",
    "open_until": "20:00",
}
"""The policy `reminders` where a tenant has none of its own."""
SEND_LOOP = "send"
# A message that begins in the very second of the change must not overtake its correction.
_CORRECTION_WAITS = timedelta(seconds=1)
_DECEASED = "deceased"
_LEFT = (MessageStatus.IN_PROGRESS, MessageStatus.COMPLETED, MessageStatus.UNKNOWN)

reactions = Reactions()


@reactions.on("clinic.changed", payload=ClinicState, shares=True)
async def keep_clinic(state: ClinicState, event: Event, db: AsyncSession) -> None:
    phones = [point.e164 or point.value for point in state.telecom if point.system == ContactPoint.PHONE]
    await keep_state(
        db,
        Clinic,
        event,
        name=state.name,
        discreet_name=state.discreet_name,
        time_zone=state.time_zone,
        address=plain(state.address),
        phone=phones[0] if phones else "",
        directions=state.directions,
        security_labels=list(state.security_labels),
    )


@reactions.on("visit_type.changed", payload=VisitTypeState, shares=True)
async def keep_visit_type(state: VisitTypeState, event: Event, db: AsyncSession) -> None:
    await keep_state(
        db,
        VisitType,
        event,
        name=state.name,
        discreet_name=state.discreet_name,
        modality=VisitTypeState.Modality.Name(state.modality),
        preparation=dict(state.preparation),
        security_labels=list(state.security_labels),
    )


# What these take back the send loop may have locked, together with other patients' messages that it waits for.
@reactions.on(
    "appointment.rescheduled",
    "appointment.arrived",
    "appointment.checked_in",
    "appointment.fulfilled",
    "appointment.noshow",
    "appointment.cancelled",
    "appointment.reverted",
    "appointment.entered_in_error",
    payload=AppointmentEvent,
)
@reactions.on("appointment.booked", "appointment.confirmed", payload=AppointmentEvent, shares=True)
async def follow_visit(visit: AppointmentEvent, event: Event, db: AsyncSession) -> None:
    """Planning is a projection: the newest state decides what stands in the ledger, an older event plans nothing."""
    row = await visit_row(db, event.tenant_id, visit.id, event.patient_id)
    if event.version <= row.version:
        return
    before = row.status
    row.version, row.status = event.version, visit.status
    row.clinic_id, row.visit_type_id = visit.clinic_id or None, visit.visit_type_id or None
    row.start_time, row.time_zone = to_time(visit.start_time), visit.time_zone
    row.schedule_version, row.security_labels = visit.schedule_version, list(event.security_labels)
    if visit.status != "BOOKED":
        overtaken = await _revoke(db, row, GONE.get(visit.status, "not-booked"), event)
        if event.type == "appointment.cancelled" and visit.previous_status not in ("", "PENDING", "WAITLIST"):
            await _notice_of_cancelling(db, row, visit, event, overtaken)
    elif row.planned_version < visit.schedule_version:
        await _plan(db, row, visit, event)
    elif before and before != "BOOKED":
        await _restore(db, row)
    await keep_visit(db, row)
    wake_after_commit(db, SEND_LOOP)


@reactions.on("patient.updated", "patient.deceased", payload=PatientEvent)
@reactions.on("patient.registered", payload=PatientEvent, shares=True)
async def follow_death(patient: PatientEvent, event: Event, db: AsyncSession) -> None:
    """Nobody deceased is written to; what is in hand already is stopped by the last check.

    The newest state decides, in whatever order events come: after a correction the reminders of visits that still stand
    are there again.
    """
    dead = event.type == "patient.deceased" or patient.deceased
    if not dead and (event.type == "patient.registered" or not patient.HasField("deceased")):
        return  # nothing is older than a registration; an event without the field doesn't say
    need_own_transaction(db)
    if not await keep_state(db, Patient, event, deceased=dead):
        return
    theirs = select(Reminder).where(Reminder.tenant_id == event.tenant_id, Reminder.patient_id == patient.id)
    if dead:
        active = theirs.where(Reminder.status == ReminderStatus.ACTIVE).with_for_update(key_share=True)
        for reminder in (await db.execute(active)).scalars():
            reminder.revoke(_DECEASED)
        return
    revoked = (
        theirs.join(
            Appointment,
            and_(
                Appointment.tenant_id == Reminder.tenant_id,
                Appointment.id == Reminder.appointment_id,
                Appointment.schedule_version == Reminder.schedule_version,
                Appointment.status == "BOOKED",
            ),
        )
        .where(
            Reminder.status == ReminderStatus.REVOKED,
            Reminder.status_reason == _DECEASED,
            Reminder.due_time > db.info["act"].now,
        )
        .with_for_update(of=Reminder, key_share=True)
    )
    for reminder in (await db.execute(revoked)).scalars():
        reminder.restore()
    wake_after_commit(db, SEND_LOOP)


@reactions.on("survey.invited", payload=SurveyEvent, shares=True)
async def invite(survey: SurveyEvent, event: Event, db: AsyncSession) -> None:
    once = (Message.tenant_id == event.tenant_id, Message.about_id == survey.id, Message.kind == SURVEY)
    if (await db.execute(select(Message.id).where(*once))).first() is not None:
        return
    policy = await policies.current(db, event.tenant_id, "reminders", SHIPPED, clinic=survey.clinic_id)
    due = to_time(event.time)
    useful = db.info["runtime"].settings.survey_useful
    message = Message(
        tenant_id=event.tenant_id,
        id=new_id(),
        patient_id=event.patient_id,
        recipient={"type": survey.recipient.type or "Patient", "id": survey.recipient.id or event.patient_id},
        recipient_id=survey.recipient.id or event.patient_id,
        about={"type": "SurveyInvitation", "id": survey.id},
        about_id=survey.id,
        clinic_id=survey.clinic_id or None,
        kind=SURVEY,
        purpose=SURVEY,
        expire_time=due + timedelta(seconds=useful),
        **_by_policy(policy),
        **_at(due),
        security_labels=list(event.security_labels),
    )
    message.move("make")
    db.add(message)
    wake_after_commit(db, SEND_LOOP)


@reactions.on("waitlist.offered", payload=WaitlistEvent, shares=True)
async def tell_offer(entry: WaitlistEvent, event: Event, db: AsyncSession) -> None:
    """An offered slot is told at once or, by night, not at all: what comes after its end is of no use."""
    if entry.channel not in ("", "SMS", "EMAIL"):
        return  # somebody calls
    once = (Message.tenant_id == event.tenant_id, Message.about_id == entry.offer_id, Message.kind == WAITLIST_OFFER)
    if (await db.execute(select(Message.id).where(*once))).first() is not None:
        return
    scopes = {"clinic": entry.clinic_id, "visit_type": entry.visit_type_id}
    policy = await policies.current(db, event.tenant_id, "reminders", SHIPPED, **scopes)
    wished = {**_by_policy(policy)}
    if entry.channel:
        wished["channels"] = [entry.channel, *(each for each in wished["channels"] if each != entry.channel)]
        wished["channel"] = entry.channel
    message = Message(
        tenant_id=event.tenant_id,
        id=new_id(),
        patient_id=event.patient_id,
        recipient={"type": "Patient", "id": event.patient_id},
        recipient_id=event.patient_id,
        about={"type": "WaitlistOffer", "id": entry.offer_id},
        about_id=entry.offer_id,
        clinic_id=entry.clinic_id or None,
        kind=WAITLIST_OFFER,
        purpose=WAITLIST_OFFER,
        expire_time=to_time(entry.offer_expire_time),
        **wished,
        **_at(to_time(event.time)),
        security_labels=list(event.security_labels),
    )
    message.move("make")
    db.add(message)
    wake_after_commit(db, SEND_LOOP)


async def _plan(db: AsyncSession, row: Appointment, visit: AppointmentEvent, event: Event) -> None:
    moved = row.planned_version != NEVER_PLANNED
    overtaken = await _revoke(db, row, "rescheduled", event) if moved else False
    scopes = {"clinic": row.clinic_id, "visit_type": row.visit_type_id}
    policy = await policies.current(db, row.tenant_id, "reminders", SHIPPED, **scopes)
    offsets = [Offset(**each) for each in policy.settings["offsets"]]
    assert row.start_time is not None
    booked, now = to_time(event.time), db.info["act"].now
    dead = await is_deceased(db, row.tenant_id, row.patient_id)
    for planned in plan(offsets, booked, row.start_time, now, row.time_zone or "UTC"):
        at_booking = planned.offset_name in {each.name for each in offsets if each.kind == "at_booking"}
        if at_booking and _spoken_for(visit) and not overtaken:
            continue
        kind = REMINDER if not at_booking else f"{_about(visit)}-moved" if moved else f"{_about(visit)}-booked"
        due = planned.due_time + _CORRECTION_WAITS if at_booking and overtaken else planned.due_time
        reminder = Reminder(
            tenant_id=row.tenant_id,
            id=new_id(),
            patient_id=row.patient_id,
            recipient={"type": "Patient", "id": row.patient_id},
            recipient_id=row.patient_id,
            appointment_id=row.id,
            clinic_id=row.clinic_id,
            schedule_version=row.schedule_version,
            offset=planned.offset_name,
            kind=kind,
            purpose=CORRECTION if at_booking and moved else REMINDER,
            due_time=due,
            expire_time=planned.latest_time,
            own_action_time=booked if at_booking else None,
            traceparent=current_traceparent(),
            **_by_policy(policy),
            security_labels=row.security_labels,
        )
        reminder.move("plan")
        if dead:
            reminder.revoke(_DECEASED)
        db.add(reminder)
    row.planned_version = row.schedule_version


async def _revoke(db: AsyncSession, row: Appointment, reason: str, event: Event) -> bool:
    """Take back what has not left; answers whether something is leaving at this very moment.

    What left after the change was committed is counted: inside the one second that RULES F grants, a correction follows.
    """
    need_own_transaction(db)
    active = (
        select(Reminder)
        .where(
            Reminder.tenant_id == row.tenant_id,
            Reminder.appointment_id == row.id,
            Reminder.status == ReminderStatus.ACTIVE,
        )
        .with_for_update(key_share=True)
    )
    for reminder in (await db.execute(active)).scalars():
        reminder.revoke(reason)
    # Only after the reminders: one that was just due became a message in a transaction that this waited for.
    messages = (
        select(Message)
        .where(
            Message.tenant_id == row.tenant_id,
            Message.about_id == row.id,
            Message.status.in_([*WAITING, *_LEFT]),
            Message.kind.not_in(CANCELLED_NOTICES),
        )
        .order_by(Message.id)
        .with_for_update(of=Message, key_share=True)
    )
    changed, leaving = to_time(event.time), False
    for message in (await db.execute(messages)).scalars():
        if message.status in WAITING:
            message.suppress("moved" if reason == "rescheduled" else reason)
            continue
        leaving = leaving or message.status is MessageStatus.IN_PROGRESS
        if message.attempts[-1].start_time > changed:
            sender = db.info["runtime"].loops.get(SEND_LOOP)
            if sender is not None:
                sender.metrics.overtaken.labels(message.channel.lower()).inc()
    return leaving


async def _restore(db: AsyncSession, row: Appointment) -> None:
    need_own_transaction(db)
    revoked = (
        select(Reminder)
        .where(
            Reminder.tenant_id == row.tenant_id,
            Reminder.appointment_id == row.id,
            Reminder.schedule_version == row.schedule_version,
            Reminder.status == ReminderStatus.REVOKED,
            Reminder.message_id.is_(None),
            Reminder.due_time > db.info["act"].now,
        )
        .with_for_update(key_share=True)
    )
    for reminder in (await db.execute(revoked)).scalars():
        reminder.restore()


async def _notice_of_cancelling(
    db: AsyncSession, row: Appointment, visit: AppointmentEvent, event: Event, overtaken: bool
) -> None:
    cancelled = to_time(event.time)
    assert row.start_time is not None
    if row.start_time <= db.info["act"].now or (_spoken_for(visit) and not overtaken):
        return
    once = (Message.tenant_id == row.tenant_id, Message.about_id == row.id, Message.kind.in_(CANCELLED_NOTICES))
    if (await db.execute(select(Message.id).where(*once))).first() is not None:
        return
    scopes = {"clinic": row.clinic_id, "visit_type": row.visit_type_id}
    policy = await policies.current(db, row.tenant_id, "reminders", SHIPPED, **scopes)
    by_patient = visit.reason_code.startswith("pat") or event.actor.startswith(("patient:", "related:"))
    message = Message(
        tenant_id=row.tenant_id,
        id=new_id(),
        patient_id=row.patient_id,
        recipient={"type": "Patient", "id": row.patient_id},
        recipient_id=row.patient_id,
        about={"type": "Appointment", "id": row.id},
        about_id=row.id,
        clinic_id=row.clinic_id,
        schedule_version=row.schedule_version,
        kind=f"{_about(visit)}-cancelled",
        purpose=CORRECTION,
        expire_time=row.start_time,
        own_action_time=cancelled if by_patient else None,
        **_by_policy(policy),
        **_at(cancelled + _CORRECTION_WAITS if overtaken else cancelled),
        security_labels=row.security_labels,
    )
    message.move("make")
    db.add(message)


def _about(visit: AppointmentEvent) -> str:
    """What a message at once is about: of visits that one act has changed together, the first one's speaks for all."""
    return "series" if visit.series_part == 1 else "appointment"


def _spoken_for(visit: AppointmentEvent) -> bool:
    """Whether nobody needs to be told now: of 52 visits of a series one text says so, and one that was taken over from
    another system was agreed there."""
    return visit.series_part > 1 or visit.imported


def _by_policy(policy: policies.Policy) -> dict[str, Any]:
    settings = policy.settings
    return {
        "channel": settings["channels"][0],
        "channels": list(settings["channels"]),
        "open_from": settings["open_from"],
        "open_until": settings["open_until"],
        "policy_version": policy.version,
    }


def _at(due: datetime) -> dict[str, Any]:
    due = due.astimezone(UTC)
    return {"due_time": due, "next_time": due, "traceparent": current_traceparent()}

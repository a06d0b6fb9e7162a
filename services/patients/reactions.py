"""What patients does on events: the timeline, relations to clinics, and tasks that come and go with their cause."""

from datetime import UTC
from typing import Any

from care.events.v1.envelope_pb2 import Event
from care.feedback.v1 import events_pb2 as feedback
from care.notifications.v1 import events_pb2 as notifications
from care.patients.v1 import events_pb2 as own
from care.referrals.v1 import events_pb2 as referrals
from care.scheduling.v1 import clearings_pb2 as clearings
from care.scheduling.v1 import directory_pb2
from care.scheduling.v1 import events_pb2 as scheduling
from care.scheduling.v1 import requests_pb2 as requests
from care.scheduling.v1 import waitlist_pb2 as waitlist
from google.protobuf.message import Message
from sqlalchemy import Text, bindparam, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.model import Id
from chassis.reactions import Reactions
from services.patients import timeline
from services.patients.due_times import due, keep_clinic
from services.patients.patient import Patient, is_related, relate, tell_access
from services.patients.task import OPEN, Task, open_task

reactions = Reactions()

# What goes on the timeline. Holds don't: they are no promise yet, and most of them end by themselves.
_TIMELINE: dict[type[Message], tuple[str, ...]] = {
    scheduling.AppointmentEvent: (
        "appointment.booked",
        "appointment.rescheduled",
        "appointment.confirmed",
        "appointment.arrived",
        "appointment.checked_in",
        "appointment.fulfilled",
        "appointment.noshow",
        "appointment.cancelled",
        "appointment.reverted",
        "appointment.entered_in_error",
        "appointment.stranded",
        "appointment.imported",
    ),
    waitlist.WaitlistEvent: (
        "waitlist.added",
        "waitlist.offered",
        "waitlist.accepted",
        "waitlist.declined",
        "waitlist.lapsed",
        "waitlist.unavailable",
        "waitlist.fulfilled",
        "waitlist.withdrawn",
        "waitlist.expired",
    ),
    referrals.ReferralEvent: (
        "referral.created",
        "referral.submitted",
        "referral.accepted",
        "referral.declined",
        "referral.scheduled",
        "referral.rescheduled",
        "referral.unscheduled",
        "referral.unattended",
        "referral.seen",
        "referral.report_received",
        "referral.report_acknowledged",
        "referral.patient_informed",
        "referral.closed",
        "referral.cancelled",
        "referral.overdue",
    ),
    requests.SchedulingRequestEvent: (
        "scheduling_request.opened",
        "scheduling_request.attempted",
        "scheduling_request.letter_due",
        "scheduling_request.letter_sent",
        "scheduling_request.booked",
        "scheduling_request.reopened",
        "scheduling_request.closed",
        "scheduling_request.overdue",
    ),
    notifications.MessageEvent: ("message.sent", "message.failed", "message.suppressed", "message.unknown"),
    feedback.SurveyEvent: ("survey.invited", "survey.completed"),
    feedback.ResponseEvent: ("response.low_score", "response.critical"),
    # Its own too, from its own topic: one way in for all, and an entry is never without its event.
    own.TaskEvent: (
        "task.created",
        "task.assigned",
        "task.claimed",
        "task.released",
        "task.snoozed",
        "task.completed",
        "task.cancelled",
    ),
    own.ContactEvent: ("contact.recorded",),
    own.ConsentEvent: ("consent.created", "consent.revoked"),
    own.PatientEvent: ("patient.registered", "patient.deceased"),
}


SOURCES = {
    "appointment": "Appointment",
    "waitlist": "WaitlistEntry",
    "referral": "Referral",
    "scheduling_request": "SchedulingRequest",
    "message": "Message",
    "survey": "SurveyInvitation",
    "response": "QuestionnaireResponse",
    "task": "Task",
    "contact": "Contact",
    "consent": "Consent",
    "patient": "Patient",
}
"""First word of an event's type to the resource that it happened to."""


async def _on_timeline(payload: Any, event: Event, db: AsyncSession) -> None:
    if not event.patient_id:  # what is about nobody leaves no entry
        return
    entry = {
        "tenant_id": event.tenant_id,
        "id": event.id,
        "patient_id": event.patient_id,
        "time": event.time.ToDatetime(tzinfo=UTC),
        "type": event.type,
        "source_type": SOURCES[event.type.partition(".")[0]],
        "source_id": event.aggregate_id,
        "source_version": event.version,
        "actor": event.actor,
        "clinic_id": _first(payload, "clinic_id") or None,
        "status": _first(payload, "business_status", "status", "outcome"),
        "reason_code": _first(payload, "reason_code", "outcome_code"),
        "security_labels": list(event.security_labels),
    }
    await timeline.put(db, entry)


def _first(payload: Message, *names: str) -> Any:
    """The first field of these names that the payload has and that is set, or ""."""
    return next((value for name in names if (value := getattr(payload, name, ""))), "")


async def _is_outdated(db: AsyncSession, event: Event) -> bool:
    return await timeline.is_outdated(db, event.tenant_id, event.patient_id, event.aggregate_id, event.version)


# First, so that the others of the same event see by the timeline whether it is the latest.
for _payload, _types in _TIMELINE.items():
    reactions.on(*_types, payload=_payload, shares=True)(_on_timeline)


@reactions.on("clinic.changed", payload=directory_pb2.Clinic, shares=True)
async def keep_calendar(clinic: directory_pb2.Clinic, event: Event, db: AsyncSession) -> None:
    """By full state and version: any order gives the same."""
    await keep_clinic(
        db,
        event.tenant_id,
        clinic.id,
        event.version,
        zone=clinic.time_zone,
        region=clinic.holiday_region,
        closed=list(clinic.closed_dates),
        labels=list(clinic.security_labels),
    )


@reactions.on(
    "appointment.booked",
    "appointment.rescheduled",
    "appointment.imported",
    payload=scheduling.AppointmentEvent,
    shares=True,
)
async def relate_by_appointment(appointment: scheduling.AppointmentEvent, event: Event, db: AsyncSession) -> None:
    """Where a visit is promised, its clinic sees the patient. Relations are only added: any order gives the same."""
    await _relate(db, event, appointment.clinic_id, "appointment")


@reactions.on("referral.submitted", payload=referrals.ReferralEvent, shares=True)
async def relate_by_referral(referral: referrals.ReferralEvent, event: Event, db: AsyncSession) -> None:
    """The clinic that refers sees the patient."""
    await _relate(db, event, referral.clinic_id, "referral")


@reactions.on("appointment.noshow", payload=scheduling.AppointmentEvent, shares=True)
async def rebook_no_show(appointment: scheduling.AppointmentEvent, event: Event, db: AsyncSession) -> None:
    """A missed visit asks for another one, unless the appointment has moved on from NOSHOW since."""
    await _patient(db, event)
    if not await _is_outdated(db, event):
        # The appointment's version is the episode: missed again after a revert is another one.
        await _open(
            db,
            event,
            "rebook-no-show",
            "Appointment",
            clinic_id=appointment.clinic_id,
            episode=str(event.version),
            reason_code=appointment.reason_code,
        )


@reactions.on(
    "appointment.reverted",
    "appointment.arrived",
    "appointment.entered_in_error",
    payload=scheduling.AppointmentEvent,
    shares=True,
)
async def forget_no_show(appointment: scheduling.AppointmentEvent, event: Event, db: AsyncSession) -> None:
    """It was no no-show: the task of an earlier version is no longer needed, that of a later one is."""
    if appointment.previous_status == "NOSHOW":
        await _patient(db, event)
        await _cancel(db, event, "rebook-no-show", event.type.partition(".")[2].replace("_", "-"))


@reactions.on("appointment.stranded", payload=scheduling.AppointmentEvent, shares=True)
async def move_stranded(appointment: scheduling.AppointmentEvent, event: Event, db: AsyncSession) -> None:
    """A change of hours has left a visit outside: somebody moves it, unless it has moved on since."""
    await _patient(db, event)
    if not await _is_outdated(db, event):
        await _open(
            db,
            event,
            "stranded-visit",
            "Appointment",
            clinic_id=appointment.clinic_id,
            episode=str(event.version),
        )


@reactions.on(
    "appointment.rescheduled",
    "appointment.cancelled",
    "appointment.arrived",
    "appointment.fulfilled",
    "appointment.entered_in_error",
    payload=scheduling.AppointmentEvent,
    shares=True,
)
async def stranded_no_more(_appointment: scheduling.AppointmentEvent, event: Event, db: AsyncSession) -> None:
    """The visit was moved, ended, or takes place after all."""
    await _cancel(db, event, "stranded-visit", event.type.partition(".")[2].replace("_", "-"))


@reactions.on("response.critical", payload=feedback.ResponseEvent, shares=True)
async def answer_critical(response: feedback.ResponseEvent, event: Event, db: AsyncSession) -> None:
    """Somebody must look now."""
    await _open(
        db,
        event,
        "critical-answer",
        "QuestionnaireResponse",
        clinic_id=response.clinic_id,
        purpose="urgent",
        priority="STAT",
    )


@reactions.on("response.low_score", payload=feedback.ResponseEvent, shares=True)
async def answer_low_score(response: feedback.ResponseEvent, event: Event, db: AsyncSession) -> None:
    """Somebody calls and asks what went wrong."""
    await _open(db, event, "low-score", "QuestionnaireResponse", clinic_id=response.clinic_id)


@reactions.on("message.failed", "message.unknown", payload=notifications.MessageEvent, shares=True)
async def reach_otherwise(message: notifications.MessageEvent, event: Event, db: AsyncSession) -> None:
    """A message that did not arrive, or perhaps not: a person finds out, once per message."""
    if not await _is_outdated(db, event):
        await _open(
            db,
            event,
            "undelivered-message",
            "Message",
            clinic_id=message.clinic_id,
            reason_code=message.reason_code,
        )


@reactions.on("message.sent", payload=notifications.MessageEvent, shares=True)
async def reached_after_all(_message: notifications.MessageEvent, event: Event, db: AsyncSession) -> None:
    """What was unknown turned out to have been sent."""
    await _cancel(db, event, "undelivered-message", "sent")


@reactions.on("referral.overdue", payload=referrals.ReferralEvent, shares=True)
async def chase_referral(referral: referrals.ReferralEvent, event: Event, db: AsyncSession) -> None:
    """A referral rests beyond its due time: somebody finds out why. Each version that is overdue is an episode."""
    if not await _is_outdated(db, event):
        await _open(
            db,
            event,
            "referral-overdue",
            "Referral",
            clinic_id=referral.clinic_id,
            purpose="referrals",
            episode=str(event.version),
            reason_code=referral.business_status.lower().replace("_", "-"),
        )


@reactions.on("referral.cancelled", payload=referrals.ReferralEvent, shares=True)
async def free_visit(referral: referrals.ReferralEvent, event: Event, db: AsyncSession) -> None:
    """Withdrawn, but its visit stands: a person decides about the visit. What was overdue no longer is."""
    await _cancel(db, event, "referral-overdue", "referral-cancelled")
    if referral.appointment_id:
        await _open(db, event, "visit-without-referral", "Referral", clinic_id=referral.clinic_id)


@reactions.on(
    "referral.accepted",
    "referral.declined",
    "referral.scheduled",
    "referral.seen",
    "referral.report_received",
    "referral.report_acknowledged",
    "referral.patient_informed",
    "referral.closed",
    payload=referrals.ReferralEvent,
    shares=True,
)
async def referral_went_on(_referral: referrals.ReferralEvent, event: Event, db: AsyncSession) -> None:
    """It moved: what was overdue no longer is."""
    await _cancel(db, event, "referral-overdue", "moved-on")


@reactions.on("scheduling_request.overdue", payload=requests.SchedulingRequestEvent, shares=True)
async def chase_request(request: requests.SchedulingRequestEvent, event: Event, db: AsyncSession) -> None:
    """Nobody called in time: somebody finds out why. Each version that is overdue is an episode."""
    if not await _is_outdated(db, event):
        await _open(
            db,
            event,
            "request-overdue",
            "SchedulingRequest",
            clinic_id=request.clinic_id,
            purpose="scheduling",
            episode=str(event.version),
            reason_code=request.status.lower().replace("_", "-"),
        )


@reactions.on(
    "scheduling_request.attempted",
    "scheduling_request.letter_sent",
    "scheduling_request.booked",
    "scheduling_request.closed",
    payload=requests.SchedulingRequestEvent,
    shares=True,
)
async def request_went_on(_request: requests.SchedulingRequestEvent, event: Event, db: AsyncSession) -> None:
    """It moved: what was overdue no longer is."""
    await _cancel(db, event, "request-overdue", "moved-on")


@reactions.on("clearing_visit.offered", "clearing_visit.left", payload=clearings.ClearingVisitEvent, shares=True)
async def ask_about_move(moved: clearings.ClearingVisitEvent, event: Event, db: AsyncSession) -> None:
    """A visit can't take place and nobody may move it without asking: somebody calls, unless it has moved on since.

    The task is about the appointment, whose version is the episode: whatever moves or ends it, ends the task.
    """
    if not await timeline.is_outdated(
        db, event.tenant_id, event.patient_id, moved.appointment_id, moved.appointment_version
    ):
        await _open(
            db,
            event,
            "visit-must-move",
            "Appointment",
            source_id=moved.appointment_id,
            clinic_id=moved.clinic_id,
            purpose="scheduling",
            episode=str(moved.appointment_version),
            reason_code=moved.status.lower(),
        )


@reactions.on(
    "appointment.rescheduled",
    "appointment.cancelled",
    "appointment.entered_in_error",
    payload=scheduling.AppointmentEvent,
    shares=True,
)
async def visit_went_on(_appointment: scheduling.AppointmentEvent, event: Event, db: AsyncSession) -> None:
    """It moved or ended: nobody needs to call about that any more."""
    await _cancel(db, event, "visit-must-move", event.type.partition(".")[2].replace("_", "-"))


async def _patient(db: AsyncSession, event: Event) -> Patient | None:
    """The patient's row, locked: reactions to one patient's visits go one after the other, replays too."""
    query = select(Patient).where(Patient.tenant_id == event.tenant_id, Patient.id == event.patient_id)
    return (await db.execute(query.with_for_update(key_share=True))).scalar_one_or_none()


async def _relate(db: AsyncSession, event: Event, clinic_id: str, reason: str) -> None:
    # Mostly a visit at a clinic that knows the patient: then nothing is locked.
    if not clinic_id or await is_related(db, event.tenant_id, event.patient_id, clinic_id, reason):
        return
    patient = await _patient(db, event)
    if patient is None:
        return
    sees_already = clinic_id in patient.clinic_ids
    if await relate(db, patient, [clinic_id], reason) and not sees_already:
        await tell_access(db, patient)


async def _open(
    db: AsyncSession,
    event: Event,
    code: str,
    source: str,
    *,
    clinic_id: str,
    source_id: str = "",
    purpose: str = "coordination",
    priority: str = "ROUTINE",
    episode: str = "",
    reason_code: str = "",
) -> None:
    # From the event's own time: what is heard late isn't due later.
    until = await due(db, event.tenant_id, code, clinic_id or None, event.time.ToDatetime(tzinfo=UTC))
    await open_task(
        db,
        tenant_id=event.tenant_id,
        patient_id=event.patient_id,
        code=code,
        source=(source, source_id or event.aggregate_id),
        episode=episode,
        purpose=purpose,
        priority=priority,
        clinic_id=clinic_id or None,
        due_time=until.time,
        due_basis=until.basis,
        reason_code=reason_code,
        labels=list(event.security_labels),
    )


# Text: for each message that arrives the answer is no, and through the ORM it costs more than all else.
_IS_OPEN = text(
    "SELECT 1 FROM task WHERE tenant_id = :tenant AND code = :code AND source_id = :source"
    f" AND status IN ({', '.join(repr(each.name) for each in OPEN)}) LIMIT 1"
).bindparams(bindparam("tenant", type_=Id), bindparam("code", type_=Text), bindparam("source", type_=Id))


async def _cancel(db: AsyncSession, event: Event, code: str, reason_code: str) -> None:
    """Cancel what earlier versions of the aggregate opened."""
    values = {"tenant": event.tenant_id, "code": code, "source": event.aggregate_id}
    if (await db.execute(_IS_OPEN, values)).first() is None:
        return
    found = await db.execute(
        select(Task)
        .where(
            Task.tenant_id == event.tenant_id,
            Task.code == code,
            Task.source_id == event.aggregate_id,
            Task.status.in_(OPEN),
        )
        .with_for_update(of=Task, key_share=True)
    )
    for task in found.scalars():
        # An episode that is no version was made by hand: a person ends it.
        if not task.episode or (task.episode.isdigit() and int(task.episode) < event.version):
            task.move("cancel", reason_code=reason_code)

"""What patients does on events: the timeline, relations to clinics, and tasks that come and go with their cause."""

from collections.abc import Callable
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


# -- tasks ---------------------------------------------------------------------------------------------------------


def _by_event(_payload: Any, event: Event) -> tuple[str, int]:
    return event.aggregate_id, event.version


def _opens(
    code: str,
    *types: str,
    payload: type[Message],
    source: str,
    purpose: str = "coordination",
    priority: str = "ROUTINE",
    about: Callable[[Any, Event], tuple[str, int]] = _by_event,
    each_version: bool = False,
    reason: Callable[[Any], str] = lambda _payload: "",
    even_outdated: bool = False,
    locks_patient: bool = False,
) -> None:
    """Have these events open a task about `source`, unless what it is `about` has moved on since.

    `about` answers an id and a version, which is the episode where `each_version` asks for another task. `locks_patient`
    is for what the end of a task must not overtake.
    """

    async def react(told: Any, event: Event, db: AsyncSession) -> None:
        if locks_patient:
            await _patient(db, event)
        source_id, version = about(told, event)
        if not even_outdated and await timeline.is_outdated(db, event.tenant_id, event.patient_id, source_id, version):
            return
        await _open(
            db,
            event,
            code,
            source,
            source_id=source_id,
            clinic_id=told.clinic_id,
            purpose=purpose,
            priority=priority,
            episode=str(version) if each_version else "",
            reason_code=reason(told),
        )

    reactions.on(*types, payload=payload, shares=True)(react)


def _ends(code: str, *types: str, payload: type[Message], reason: str = "") -> None:
    """Have these events cancel the tasks that earlier versions opened; without `reason` for the step that they tell."""

    async def react(_told: Any, event: Event, db: AsyncSession) -> None:
        await _cancel(db, event, code, reason or event.type.partition(".")[2].replace("_", "-"))

    reactions.on(*types, payload=payload, shares=True)(react)


def _status(told: Any) -> str:
    """The status that an event tells, as a reason."""
    said: str = getattr(told, "business_status", "") or told.status
    return said.lower().replace("_", "-")


# A missed visit asks for another one; missed again after a revert is another episode.
_opens(
    "rebook-no-show",
    "appointment.noshow",
    payload=scheduling.AppointmentEvent,
    source="Appointment",
    each_version=True,
    reason=lambda told: str(told.reason_code),
    locks_patient=True,
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


# A change of hours has left a visit outside: somebody moves it, or it was moved, ended, or takes place after all.
_opens(
    "stranded-visit",
    "appointment.stranded",
    payload=scheduling.AppointmentEvent,
    source="Appointment",
    each_version=True,
    locks_patient=True,
)
_ends(
    "stranded-visit",
    "appointment.rescheduled",
    "appointment.cancelled",
    "appointment.arrived",
    "appointment.fulfilled",
    "appointment.entered_in_error",
    payload=scheduling.AppointmentEvent,
)

# Somebody must look now.
_opens(
    "critical-answer",
    "response.critical",
    payload=feedback.ResponseEvent,
    source="QuestionnaireResponse",
    purpose="urgent",
    priority="STAT",
    even_outdated=True,
)
# Somebody calls and asks what went wrong.
_opens(
    "low-score",
    "response.low_score",
    payload=feedback.ResponseEvent,
    source="QuestionnaireResponse",
    even_outdated=True,
)

# A message that did not arrive, or perhaps not: a person finds out, once per message, unless it was sent after all.
_opens(
    "undelivered-message",
    "message.failed",
    "message.unknown",
    payload=notifications.MessageEvent,
    source="Message",
    reason=lambda told: str(told.reason_code),
)
_ends("undelivered-message", "message.sent", payload=notifications.MessageEvent, reason="sent")

# A referral rests beyond its due time: somebody finds out why, until it moves.
_opens(
    "referral-overdue",
    "referral.overdue",
    payload=referrals.ReferralEvent,
    source="Referral",
    purpose="referrals",
    each_version=True,
    reason=_status,
)


@reactions.on("referral.cancelled", payload=referrals.ReferralEvent, shares=True)
async def free_visit(referral: referrals.ReferralEvent, event: Event, db: AsyncSession) -> None:
    """Withdrawn, but its visit stands: a person decides about the visit. What was overdue no longer is."""
    await _cancel(db, event, "referral-overdue", "referral-cancelled")
    if referral.appointment_id:
        await _open(db, event, "visit-without-referral", "Referral", clinic_id=referral.clinic_id)


_ends(
    "referral-overdue",
    "referral.accepted",
    "referral.declined",
    "referral.scheduled",
    "referral.seen",
    "referral.report_received",
    "referral.report_acknowledged",
    "referral.patient_informed",
    "referral.closed",
    payload=referrals.ReferralEvent,
    reason="moved-on",
)

# Nobody called in time: somebody finds out why, until it moves.
_opens(
    "request-overdue",
    "scheduling_request.overdue",
    payload=requests.SchedulingRequestEvent,
    source="SchedulingRequest",
    purpose="scheduling",
    each_version=True,
    reason=_status,
)
_ends(
    "request-overdue",
    "scheduling_request.attempted",
    "scheduling_request.letter_sent",
    "scheduling_request.booked",
    "scheduling_request.closed",
    payload=requests.SchedulingRequestEvent,
    reason="moved-on",
)

# A visit can't take place and nobody may move it without asking: somebody calls. The task is about the appointment:
# whatever moves or ends it, ends the task.
_opens(
    "visit-must-move",
    "clearing_visit.offered",
    "clearing_visit.left",
    payload=clearings.ClearingVisitEvent,
    source="Appointment",
    purpose="scheduling",
    about=lambda told, _event: (told.appointment_id, told.appointment_version),
    each_version=True,
    reason=_status,
)
_ends(
    "visit-must-move",
    "appointment.rescheduled",
    "appointment.cancelled",
    "appointment.entered_in_error",
    payload=scheduling.AppointmentEvent,
)


# -- what they share ---------------------------------------------------------------------------------------------------


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

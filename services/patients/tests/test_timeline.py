"""What follows from events: one timeline entry each, relations to clinics, tasks that come and go with their cause."""

from datetime import UTC, datetime, timedelta

import pytest
from care.feedback.v1 import events_pb2 as feedback
from care.notifications.v1 import events_pb2 as notifications
from care.patients.v1 import tasks_pb2
from care.referrals.v1 import events_pb2 as referrals
from care.scheduling.v1 import directory_pb2
from care.scheduling.v1 import events_pb2 as scheduling
from care.type.v1 import type_pb2

from chassis.errors import Problem
from chassis.ids import new_id
from services.patients.tests.desk import WORK, stamp


def appointment(clinic, appointment_id="", **more):
    return scheduling.AppointmentEvent(id=appointment_id or new_id(), clinic_id=clinic, **more)


async def entries(desk, patient_id, who="cora", **more):
    return list((await desk.rpc("ListTimelineEntries", who, patient_id=patient_id, **more)).entries)


async def types(desk, patient_id):
    return [entry.type for entry in await entries(desk, patient_id)]


async def test_the_timeline_has_one_entry_per_event_however_often_it_is_delivered(desk):
    patient = await desk.patient()
    visit = appointment(desk.clinic, status="BOOKED")
    booked = desk.event("appointment.booked", patient.id, visit)
    await desk.tell(booked, booked)
    await desk.tell(booked)
    found = await entries(desk, patient.id, types=["appointment.booked"])
    assert [entry.id for entry in found] == [booked.id]
    assert (found[0].source.type, found[0].source.id) == ("Appointment", visit.id)
    assert (found[0].clinic_id, found[0].status, found[0].actor) == (desk.clinic, "BOOKED", "system:test")


async def test_the_services_own_events_are_on_the_timeline_latest_first(desk):
    patient = await desk.patient()
    task = await desk.rpc(
        "CreateTask",
        task={
            "code": "call-patient",
            "patient_id": patient.id,
            "due_time": stamp(datetime.now(UTC) + timedelta(hours=1)),
        },
    )
    await desk.rpc("CompleteTask", id=task.id, outcome={"code": "reached"})

    async def all_there():
        found = await types(desk, patient.id)
        return found if len(found) == 3 else None

    assert await desk.until(all_there) == ["task.completed", "task.created", "patient.registered"]
    (done,) = await entries(desk, patient.id, types=["task.completed"])
    assert (done.status, done.reason_code) == ("COMPLETED", "reached")
    first = await desk.rpc("ListTimelineEntries", patient_id=patient.id, page_size=2)
    rest = await desk.rpc("ListTimelineEntries", patient_id=patient.id, page_size=2, page_token=first.next_page_token)
    assert [entry.type for entry in rest.entries] == ["patient.registered"]


async def test_the_timeline_of_another_clinics_patient_does_not_exist(desk):
    patient = await desk.patient()
    with pytest.raises(Problem) as refused:
        await entries(desk, patient.id, "elias")
    assert refused.value.reason == "NOT_FOUND"


async def test_a_labelled_event_is_seen_by_those_who_are_cleared(desk):
    await desk.harness.staff("rosa", WORK, clinics=[desk.clinic], clearances=["42CFRPart2"])
    patient = await desk.patient()
    response = feedback.ResponseEvent(id=new_id(), clinic_id=desk.clinic)
    event = desk.event("response.critical", patient.id, response, security_labels=["42CFRPart2"])
    await desk.tell(event, service="feedback")
    assert "response.critical" not in await types(desk, patient.id)
    assert await entries(desk, patient.id, "rosa", types=["response.critical"])
    assert await desk.tasks(patient.id) == []
    (task,) = (await desk.rpc("ListTasks", "rosa", patient_id=patient.id)).tasks
    assert task.code == "critical-answer"


async def test_a_booked_visit_lets_its_clinic_see_the_patient(desk):
    patient = await desk.patient()
    with pytest.raises(Problem):
        await desk.rpc("GetPatient", "elias", id=patient.id)
    visit = appointment(desk.elsewhere)
    await desk.tell(desk.event("appointment.booked", patient.id, visit))
    seen = await desk.rpc("GetPatient", "elias", id=patient.id)
    assert list(seen.clinic_ids) == [desk.clinic, desk.elsewhere]
    # A second visit, or one where the patient was registered, adds nothing: the record stays as it was read.
    await desk.tell(desk.event("appointment.booked", patient.id, appointment(desk.elsewhere)))
    await desk.tell(desk.event("appointment.booked", patient.id, appointment(desk.clinic)))
    assert (await desk.rpc("GetPatient", "elias", id=patient.id)).etag == seen.etag


async def test_a_visit_of_the_past_lets_its_clinic_see_the_patient_and_starts_nothing(desk):
    patient = await desk.patient()
    visit = appointment(desk.elsewhere, status="NOSHOW")
    await desk.tell(desk.event("appointment.imported", patient.id, visit))
    await desk.rpc("GetPatient", "elias", id=patient.id)
    (entry,) = await entries(desk, patient.id, types=["appointment.imported"])
    assert (entry.source.type, entry.status) == ("Appointment", "NOSHOW")
    assert await entries(desk, patient.id, types=["task.created"]) == []


async def test_a_submitted_referral_lets_the_referring_clinic_see_the_patient(desk):
    patient = await desk.patient()
    referral = referrals.ReferralEvent(id=new_id(), clinic_id=desk.elsewhere, business_status="SUBMITTED")
    await desk.tell(desk.event("referral.submitted", patient.id, referral), service="referrals")
    await desk.rpc("GetPatient", "elias", id=patient.id)
    (entry,) = await entries(desk, patient.id, types=["referral.submitted"])
    assert (entry.source.type, entry.status) == ("Referral", "SUBMITTED")


async def test_a_no_show_makes_one_task_due_a_business_day_later_in_the_clinics_zone(desk):
    clinic = directory_pb2.Clinic(
        id=new_id(), time_zone="America/Denver", holiday_region="US", closed_dates=["2026-03-09"]
    )
    await desk.tell(desk.event("clinic.changed", "", clinic))
    patient = await desk.patient()
    visit = appointment(clinic.id, status="NOSHOW", previous_status="BOOKED", reason_code="pat")
    # A Friday; Monday is closed.
    friday = datetime(2026, 3, 6, 17, 30, tzinfo=UTC)
    missed = desk.event("appointment.noshow", patient.id, visit, version=3, time=stamp(friday))
    again = desk.event("appointment.noshow", patient.id, visit, version=3, time=stamp(friday))
    await desk.tell(missed, missed, again)
    (task,) = await desk.tasks(patient.id)
    assert (task.code, task.source.id, task.clinic_id) == ("rebook-no-show", visit.id, clinic.id)
    assert task.owner.id == desk.pools["coordination"] and task.priority == type_pb2.Priority.ROUTINE
    # The same wall time, an hour earlier in UTC: the clocks went forward on Sunday.
    assert task.due_time.ToDatetime(tzinfo=UTC) == datetime(2026, 3, 10, 16, 30, tzinfo=UTC)
    assert task.due_basis == "1 business day of the clinic (task-due policy 0)"
    assert task.history[0].actor == "system:patients"


async def test_an_older_state_of_a_clinic_changes_no_calendar(desk):
    clinic = directory_pb2.Clinic(id=new_id(), time_zone="America/Denver", closed_dates=["2026-03-09"])
    older = directory_pb2.Clinic(id=clinic.id, time_zone="America/Denver")
    await desk.tell(
        desk.event("clinic.changed", "", clinic, version=2), desk.event("clinic.changed", "", older, version=1)
    )
    patient = await desk.patient()
    friday = stamp(datetime(2026, 3, 6, 17, 30, tzinfo=UTC))
    await desk.tell(desk.event("appointment.noshow", patient.id, appointment(clinic.id), time=friday))
    (task,) = await desk.tasks(patient.id)
    assert task.due_time.ToDatetime().day == 10


async def test_a_reverted_no_show_takes_its_task_back_and_another_no_show_makes_another(desk):
    patient = await desk.patient()
    visit_id = new_id()

    def told(kind, version, **more):
        return desk.event(
            f"appointment.{kind}", patient.id, appointment(desk.clinic, visit_id, **more), version=version
        )

    first = told("noshow", 3, previous_status="BOOKED")
    reverted = told("reverted", 4, previous_status="NOSHOW", status="BOOKED")
    await desk.tell(first)
    (task,) = await desk.tasks(patient.id)
    await desk.rpc("ClaimTask", id=task.id)
    await desk.tell(reverted)
    cancelled = await desk.rpc("GetTask", id=task.id)
    assert cancelled.status == tasks_pb2.Task.CANCELLED
    assert (cancelled.history[-1].action, cancelled.history[-1].reason_code) == ("cancel", "reverted")
    await desk.tell(told("noshow", 5, previous_status="BOOKED"))
    (another,) = await desk.tasks(patient.id)
    assert another.id != task.id
    # The first revert, heard again under another id, is about the first no-show.
    await desk.tell(told("reverted", 4, previous_status="NOSHOW", status="BOOKED"))
    assert [one.id for one in await desk.tasks(patient.id)] == [another.id]


async def test_a_no_show_that_is_heard_after_its_revert_makes_no_task(desk):
    patient = await desk.patient()
    visit = appointment(desk.clinic, previous_status="NOSHOW")
    await desk.tell(desk.event("appointment.reverted", patient.id, visit, version=4))
    await desk.tell(desk.event("appointment.noshow", patient.id, visit, version=3))
    assert await desk.tasks(patient.id) == []
    assert "appointment.noshow" in await types(desk, patient.id)


async def test_a_task_that_is_done_stays_done_when_the_no_show_is_reverted(desk):
    patient = await desk.patient()
    visit = appointment(desk.clinic, previous_status="NOSHOW")
    await desk.tell(desk.event("appointment.noshow", patient.id, visit, version=3))
    (task,) = await desk.tasks(patient.id)
    await desk.rpc("CompleteTask", id=task.id, outcome={"code": "rebooked"})
    await desk.tell(desk.event("appointment.reverted", patient.id, visit, version=4))
    assert (await desk.rpc("GetTask", id=task.id)).status == tasks_pb2.Task.COMPLETED


async def test_a_critical_answer_goes_to_the_urgent_pool_at_once(desk):
    patient = await desk.patient()
    response = feedback.ResponseEvent(id=new_id(), clinic_id=desk.clinic)
    event = desk.event("response.critical", patient.id, response)
    await desk.tell(event, event, service="feedback")
    (task,) = await desk.tasks(patient.id)
    assert (task.code, task.priority, task.owner.id) == (
        "critical-answer",
        type_pb2.Priority.STAT,
        desk.pools["urgent"],
    )
    assert task.due_time.ToDatetime() - event.time.ToDatetime() == timedelta(minutes=15)
    assert task.due_basis == "15 minutes (task-due policy 0)"
    assert task.source.type == "QuestionnaireResponse"


async def test_a_low_score_is_followed_up(desk):
    patient = await desk.patient()
    response = feedback.ResponseEvent(id=new_id(), clinic_id=desk.clinic, band="low")
    await desk.tell(desk.event("response.low_score", patient.id, response), service="feedback")
    (task,) = await desk.tasks(patient.id)
    assert (task.code, task.owner.id) == ("low-score", desk.pools["coordination"])
    assert task.due_basis.startswith("2 business days")


async def test_an_undelivered_message_makes_one_task_until_it_turns_out_to_be_sent(desk):
    patient = await desk.patient()
    message = notifications.MessageEvent(id=new_id(), status="UNKNOWN", reason_code="time-out", clinic_id=desk.clinic)
    unknown = desk.event("message.unknown", patient.id, message, version=2)
    failed = desk.event("message.failed", patient.id, message, version=3)
    await desk.tell(unknown, failed, service="notifications")
    (task,) = await desk.tasks(patient.id)
    assert (task.code, task.source.id, task.reason_code) == ("undelivered-message", message.id, "time-out")
    await desk.tell(desk.event("message.sent", patient.id, message, version=4), service="notifications")
    assert await desk.tasks(patient.id) == []


async def test_a_contact_is_recorded_tied_to_its_task_and_told(desk):
    patient = await desk.patient()
    task = await desk.rpc(
        "CreateTask",
        task={
            "code": "call-patient",
            "patient_id": patient.id,
            "due_time": stamp(datetime.now(UTC) + timedelta(hours=1)),
        },
    )
    contact = {
        "patient_id": patient.id,
        "channel": "VOICE",
        "direction": "OUTBOUND",
        "outcome": "NO_ANSWER",
        "note": "rang ten times",
        "minutes": 2,
        "task_id": task.id,
    }
    first = await desk.rpc("CreateContact", contact=contact)
    assert first.recorder.startswith("staff:") and first.contact_time == first.create_time
    earlier = {**contact, "outcome": "VOICEMAIL", "contact_time": stamp(datetime.now(UTC) - timedelta(hours=2))}
    second = await desk.rpc("CreateContact", contact=earlier)
    await desk.rpc("CreateContact", contact={**contact, "task_id": "", "referral_id": new_id()})
    attempts = await desk.rpc("ListContacts", patient_id=patient.id, task_id=task.id)
    assert [one.id for one in attempts.contacts] == [first.id, second.id]
    assert len((await desk.rpc("ListContacts", patient_id=patient.id)).contacts) == 3

    async def told():
        return len(await entries(desk, patient.id, types=["contact.recorded"])) == 3

    await desk.until(told)


async def test_a_contact_tied_to_another_patients_task_or_lying_ahead_is_refused(desk):
    patient, other = await desk.patient(), await desk.patient(family="Other")
    task = await desk.rpc(
        "CreateTask",
        task={
            "code": "call-patient",
            "patient_id": other.id,
            "due_time": stamp(datetime.now(UTC) + timedelta(hours=1)),
        },
    )
    contact = {"patient_id": patient.id, "channel": "VOICE", "direction": "OUTBOUND", "outcome": "REACHED"}
    with pytest.raises(Problem) as foreign:
        await desk.rpc("CreateContact", contact={**contact, "task_id": task.id})
    with pytest.raises(Problem) as ahead:
        tomorrow = stamp(datetime.now(UTC) + timedelta(days=1))
        await desk.rpc("CreateContact", contact={**contact, "contact_time": tomorrow})
    assert (foreign.value.reason, ahead.value.reason) == ("TASK_UNKNOWN", "CONTACT_TIME_AHEAD")

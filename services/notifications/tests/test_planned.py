"""What stands in the ledger after others' events, in whatever order they come."""

import asyncio
from datetime import UTC, datetime, timedelta

from care.notifications.v1 import notifications_pb2 as pb
from care.notifications.v1.notifications_pb2_grpc import MessagesServiceStub, RemindersServiceStub
from care.patients.v1.events_pb2 import PatientEvent

from chassis.ids import new_id
from services.notifications.message import ReminderStatus
from services.notifications.tests.conftest import Status, eventually


def ledger(rows):
    return [(row.offset, row.schedule_version, row.status.name, row.status_reason) for row in rows]


async def test_a_visit_in_ten_days_gets_confirmation_three_days_and_one_day(world, clinic, visit_type):
    patient_id, _, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    rows = await world.planned(visit, 3)
    assert [row.offset for row in rows] == ["booked", "3d", "1d"]
    assert rows[1].due_time == visit.start_time.ToDatetime(UTC) - timedelta(days=3)
    assert {row.recipient_id for row in rows} == {patient_id}
    assert all(row.channels == ["SMS", "EMAIL"] for row in rows)


async def test_offsets_that_are_past_are_dropped(world, clinic, visit_type):
    patient_id, _, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type, ahead=timedelta(hours=30))
    assert [row.offset for row in await world.planned(visit, 2)] == ["booked", "1d"]
    soon = await world.visit(patient_id, clinic, visit_type, ahead=timedelta(hours=5))
    assert [row.offset for row in await world.planned(soon, 1)] == ["booked"]


async def test_moving_a_visit_plans_anew_and_confirming_it_does_not(world, clinic, visit_type):
    patient_id, _, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.message(visit.id, "COMPLETED")
    await world.tell_visit("confirmed", visit, version=2)
    visit.schedule_version = 2
    visit.start_time.FromDatetime(datetime.now(UTC) + timedelta(days=20))
    await world.tell_visit("rescheduled", visit, version=3)
    rows = await world.planned(visit, 6)
    assert ledger(rows)[1:3] == [("3d", 1, "REVOKED", "rescheduled"), ("1d", 1, "REVOKED", "rescheduled")]
    assert [row.offset for row in rows[3:]] == ["booked", "3d", "1d"]
    moved = await world.message(visit.id, "COMPLETED", kind="appointment-moved")
    assert moved.purpose == "appointment-correction" and "has moved" in moved.text


async def test_an_older_event_that_is_replayed_plans_nothing(world, clinic, visit_type):
    patient_id, _, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.planned(visit, 3)
    old = type(visit).FromString(visit.SerializeToString())
    visit.schedule_version = 2
    visit.start_time.FromDatetime(datetime.now(UTC) + timedelta(days=20))
    await world.tell_visit("rescheduled", visit, version=2)
    await world.planned(visit, 6)
    await world.tell_visit("booked", old, version=1)
    await world.tell_visit("confirmed", visit, version=3)
    await asyncio.sleep(0.3)
    rows = await world.reminders(visit)
    assert len(rows) == 6
    assert {row.schedule_version for row in rows if row.status is ReminderStatus.ACTIVE} == {2}


async def test_a_cancel_that_overtakes_the_booking_leaves_nothing_planned(world, clinic, visit_type):
    patient_id, number, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.planned(visit, 3)
    late = type(visit).FromString(visit.SerializeToString())
    late.id = new_id()
    cancelled = type(visit).FromString(late.SerializeToString())
    world.neighbours.visits[late.id] = cancelled
    await world.cancel(cancelled)
    await world.message(late.id, "COMPLETED")
    await world.tell_visit("booked", late, version=1)
    await asyncio.sleep(0.3)
    assert await world.reminders(late) == []
    assert len(world.sms.texts(number)) == 2  # the first visit's confirmation, this one's cancelling


async def test_cancelling_revokes_and_says_so(world, clinic, visit_type):
    patient_id, number, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.message(visit.id, "COMPLETED")
    await world.cancel(visit)
    notice = await world.message(visit.id, "COMPLETED", kind="appointment-cancelled")
    assert notice.purpose == "appointment-correction"
    assert ledger(await world.reminders(visit))[1:] == [
        ("3d", 1, "REVOKED", "cancelled"),
        ("1d", 1, "REVOKED", "cancelled"),
    ]
    assert "is cancelled" in world.sms.texts(number)[-1]


async def test_a_visit_that_another_system_had_is_reminded_of_and_not_told_as_new(world, clinic, visit_type):
    patient_id, _, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type, imported=True)
    assert [row.offset for row in await world.planned(visit, 2)] == ["3d", "1d"]
    assert await world.messages(visit.id) == []


async def test_a_series_is_told_once_and_each_visit_of_it_is_reminded_of(world, clinic, visit_type):
    patient_id, number, _ = await world.patient()
    visits = [
        await world.visit(patient_id, clinic, visit_type, ahead=timedelta(days=10 + 7 * part), part=part)
        for part in (1, 2, 3)
    ]
    assert [row.offset for row in await world.planned(visits[0], 3)] == ["booked", "3d", "1d"]
    for visit in visits[1:]:
        assert [row.offset for row in await world.planned(visit, 2)] == ["3d", "1d"]
    await world.message(visits[0].id, "COMPLETED", kind="series-booked")
    for part, visit in enumerate(visits, 1):
        visit.schedule_version = 2
        visit.start_time.FromDatetime(visit.start_time.ToDatetime() + timedelta(hours=1))
        await world.tell_visit("rescheduled", visit, version=2, part=part)
    await world.message(visits[0].id, "COMPLETED", kind="series-moved")
    for part, visit in enumerate(visits, 1):
        await world.cancel(visit, version=3, part=part)
    await world.message(visits[0].id, "COMPLETED", kind="series-cancelled")
    for visit in visits[1:]:
        rows = await eventually(
            lambda one=visit: world.reminders(one), lambda rows: {row.status.name for row in rows} == {"REVOKED"}
        )
        assert len(rows) == 4 and await world.messages(visit.id) == []
    first, moved, cancelled = world.sms.texts(number)
    assert "series of visits is booked" in first and "have moved" in moved and "later ones of its series" in cancelled


async def test_what_an_arrival_revoked_comes_back_when_it_is_reverted(world, clinic, visit_type):
    patient_id, _, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.planned(visit, 3)
    visit.status = Status.Value("ARRIVED")
    await world.tell_visit("arrived", visit, version=2, previous="BOOKED")
    await eventually(lambda: world.reminders(visit), lambda rows: rows[1].status is ReminderStatus.REVOKED)
    visit.status = Status.Value("BOOKED")
    await world.tell_visit("reverted", visit, version=3, previous="ARRIVED")
    rows = await eventually(lambda: world.reminders(visit), lambda rows: rows[1].status is ReminderStatus.ACTIVE)
    assert [row.status.name for row in rows[1:]] == ["ACTIVE", "ACTIVE"] and len(rows) == 3


async def test_nobody_deceased_keeps_reminders(world, clinic, visit_type):
    patient_id, _, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.planned(visit, 3)
    await world.tell("patient.deceased", PatientEvent(id=patient_id), aggregate_id=patient_id, patient_id=patient_id)
    rows = await eventually(lambda: world.reminders(visit), lambda rows: rows[1].status is ReminderStatus.REVOKED)
    assert {row.status_reason for row in rows[1:]} == {"deceased"}


async def test_a_corrected_death_brings_reminders_back_and_an_older_one_takes_nothing(world, clinic, visit_type):
    patient_id, _, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.planned(visit, 3)

    async def hear(kind, version, deceased):
        payload = PatientEvent(id=patient_id, deceased=deceased)
        await world.tell(f"patient.{kind}", payload, aggregate_id=patient_id, patient_id=patient_id, version=version)

    await hear("deceased", 5, True)
    await eventually(lambda: world.reminders(visit), lambda rows: rows[1].status is ReminderStatus.REVOKED)
    await hear("updated", 6, False)
    rows = await eventually(lambda: world.reminders(visit), lambda rows: rows[1].status is ReminderStatus.ACTIVE)
    assert {row.status for row in rows[1:]} == {ReminderStatus.ACTIVE}
    await hear("deceased", 4, True)
    await hear("updated", 7, False)
    await asyncio.sleep(0.3)
    assert {row.status for row in (await world.reminders(visit))[1:]} == {ReminderStatus.ACTIVE}


async def test_nobody_who_was_dead_when_imported_gets_a_reminder(world, clinic, visit_type):
    patient_id, number, _ = await world.patient()
    payload = PatientEvent(id=patient_id, deceased=True)
    await world.tell("patient.registered", payload, aggregate_id=patient_id, patient_id=patient_id)
    await asyncio.sleep(0.3)
    visit = await world.visit(patient_id, clinic, visit_type)
    rows = await world.planned(visit, 3)
    assert {(row.status, row.status_reason) for row in rows} == {(ReminderStatus.REVOKED, "deceased")}
    assert world.sms.texts(number) == []


async def test_staff_of_the_clinic_list_reminders_and_messages_and_others_see_none(world, clinic, visit_type):
    here, read = clinic.id, ["reminders.read", "messages.read"]
    await world.harness.staff("nora", read, clinics=[here])
    await world.harness.staff("otto", read, clinics=["00000000-0000-7000-8000-000000000000"])
    patient_id, number, _ = await world.patient()
    await world.harness.subject(here, patient_id=patient_id, version=2)
    visit = await world.visit(patient_id, clinic, visit_type)
    sent = await world.message(visit.id, "COMPLETED")

    async def reminders(subject):
        request = pb.ListRemindersRequest(appointment_id=visit.id)
        answer = await world.harness.call("notifications", RemindersServiceStub, "ListReminders", request, subject)
        return answer.reminders

    shown = await reminders("nora")
    assert [one.offset for one in shown] == ["booked", "3d", "1d"]
    assert shown[0].status == pb.Reminder.COMPLETED and shown[0].message_id == sent.id
    assert not await reminders("otto")
    request = pb.ListMessagesRequest(patient_ids=[patient_id])
    listed = await world.harness.call("notifications", MessagesServiceStub, "ListMessages", request, "nora")
    assert [one.id for one in listed.messages] == [sent.id]
    one = await world.harness.call(
        "notifications", MessagesServiceStub, "GetMessage", pb.GetMessageRequest(id=sent.id), "nora"
    )
    assert (one.status, one.attempts[0].outcome, one.consent_version) == (pb.Message.COMPLETED, "accepted", 3)
    assert one.template == "appointment-booked/sms/en/1" and one.text == world.sms.texts(number)[0] + "\n"

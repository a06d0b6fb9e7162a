"""Hours that are not right, and what a change of hours leaves outside."""

from collections import namedtuple
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from care.scheduling.v1 import appointments_pb2 as pb
from care.scheduling.v1 import directory_pb2, hours_pb2, stranded_pb2
from care.scheduling.v1.directory_pb2_grpc import (
    ClinicsServiceStub,
    PractitionersServiceStub,
    ResourcesServiceStub,
    SchedulesServiceStub,
)
from care.scheduling.v1.hours_pb2_grpc import HoursServiceStub
from care.scheduling.v1.stranded_pb2_grpc import StrandedAppointmentsServiceStub

from chassis.errors import Problem
from chassis.ids import new_id
from services.scheduling import stranding
from services.scheduling.directory import Clinic, Practitioner, Schedule
from services.scheduling.releasing import next_release, released
from services.scheduling.tests.desk import ALWAYS, refused, soon

NEW_YORK = ZoneInfo("America/New_York")


def block(weekday, start, end, **more):
    return {"weekday": weekday, "start": start, "end": end, **more}


A, B = "01890000-0000-7000-8000-00000000000a", "01890000-0000-7000-8000-00000000000b"


@pytest.mark.parametrize(
    ("hours", "reason"),
    [
        ([block(1, "09:00", "12:00"), block(1, "11:45", "13:00")], "HOURS_OVERLAP"),
        ([block(1, "22:00", "02:00"), block(2, "01:00", "03:00")], "HOURS_OVERLAP"),
        ([block(7, "22:00", "02:00"), block(1, "01:00", "03:00")], "HOURS_OVERLAP"),
        ([block(1, "09:00", "12:00", visit_type_ids=[A]), block(1, "09:00", "12:00")], "HOURS_OVERLAP"),
        (
            [
                block(1, "09:00", "12:00", valid_until="2031-06-30"),
                block(1, "09:00", "12:00", valid_from="2031-06-30"),
            ],
            "HOURS_OVERLAP",
        ),
        ([block(1, "09:00", "12:00", valid_from="2031-02-01", valid_until="2031-01-31")], "PERIOD_INVALID"),
        ([block(1, "09:00", "12:00", valid_from="2031-02-30")], "DATE_INVALID"),
        ([block(8, "09:00", "12:00")], "FIELD_INVALID"),
        ([block(1, "24:00", "12:00")], "FIELD_INVALID"),
    ],
)
async def test_hours_that_are_not_right_are_refused_with_field_and_reason(desk, hours, reason):
    doctor = await desk.a_practitioner("Wrong", hours=())
    with pytest.raises(Problem) as problem:
        await desk.hours(doctor, hours)
    assert problem.value.reason == reason and problem.value.metadata["field"].startswith("schedule.weekly_hours")
    assert await refused(desk.a_room("wrong", weekly_hours=hours)) == reason


@pytest.mark.parametrize(
    "hours",
    [
        [block(1, "09:00", "12:00"), block(1, "12:00", "13:00"), block(2, "09:00", "12:00")],
        [block(1, "09:00", "12:00", visit_type_ids=[A]), block(1, "09:00", "12:00", visit_type_ids=[B])],
        [block(1, "09:00", "12:00", valid_until="2031-06-29"), block(1, "10:00", "13:00", valid_from="2031-06-30")],
        [block(7, "22:00", "02:00"), block(1, "02:00", "03:00")],
    ],
)
async def test_blocks_that_touch_or_are_for_others_or_for_other_months_do_not_overlap(desk, hours):
    assert await desk.hours(await desk.a_practitioner("Right", hours=()), hours)


async def test_a_visit_type_or_resource_that_makes_no_sense_is_refused(desk):
    assert await refused(desk.a_visit_type("nothing", requirements=[{}])) == "REQUIREMENT_EMPTY"
    ages = {"minimum_age": 12, "maximum_age": 11}
    assert await refused(desk.a_visit_type("ages", eligibility=ages)) == "AGES_INVALID"
    assert await refused(desk.a_room("patient")) == "KIND_RESERVED"
    assert await refused(desk.a_room("")) == "KIND_MISSING"


async def test_a_room_changes_all_but_its_kind_and_clinic(desk):
    room = await desk.a_room("movable")

    async def update(etag, **values):
        request = directory_pb2.UpdateResourceRequest(
            resource={"id": room, **values}, etag=etag, update_mask={"paths": list(values)}
        )
        return await desk.harness.call("scheduling", ResourcesServiceStub, "UpdateResource", request, "ada")

    renamed = await update('"1"', name="2", weekly_hours=[block(1, "09:00", "12:00")])
    assert (renamed.name, renamed.kind, len(renamed.weekly_hours)) == ("2", "movable", 1)
    assert await refused(update(renamed.etag, kind="other")) == "FIELD_FIXED"
    assert await refused(update('"1"', name="3")) == "ETAG_MISMATCH"


async def stranded(desk, schedule, subject="cora"):
    request = stranded_pb2.GetStrandedAppointmentsRequest(schedule_id=schedule)
    stub = StrandedAppointmentsServiceStub
    answer = await desk.harness.call("scheduling", stub, "GetStrandedAppointments", request, subject)
    return [one.id for one in answer.appointments]


async def change(desk, schedule, etag, **values):
    request = directory_pb2.UpdateScheduleRequest(
        schedule={"id": schedule, **values}, etag=etag, update_mask={"paths": list(values)}
    )
    return await desk.harness.call("scheduling", SchedulesServiceStub, "UpdateSchedule", request, "ada")


async def told(desk, appointment, kind, count):
    events = [one for one, _ in await desk.told(appointment, count)]
    return events.count(kind)


async def test_a_change_of_hours_tells_each_visit_that_it_leaves_outside_and_moves_none(desk):
    """Reported elsewhere, conflict rules: leave that is entered after visits were booked hides none of them."""
    doctor = await desk.a_practitioner("Hours", hours=())
    schedule = await desk.hours(doctor)
    first, second = soon(5, 14), soon(6, 14)
    kept, left = (
        await desk.book(await desk.a_patient(), first, doctor),
        await desk.book(await desk.a_patient(), second, doctor),
    )
    gone = await desk.book(await desk.a_patient(), second + timedelta(hours=2), doctor)
    await desk.do("Cancel", gone, reason={"code": "pat"})
    assert not await stranded(desk, schedule)
    leave = [{"date": str(second.astimezone(NEW_YORK).date()), "kind": "CLOSED"}]
    changed = await change(desk, schedule, '"1"', exceptions=leave)
    assert await stranded(desk, schedule) == [left.id]
    assert await stranded(desk, schedule, "elias") == []  # whose patients these are not
    now = await desk("GetAppointment", pb.GetAppointmentRequest(id=left.id))
    assert now.start_time == left.start_time and now.status == left.status and now.etag != left.etag
    assert await told(desk, left, "appointment.stranded", 2) == 1
    changed = await change(
        desk,
        schedule,
        changed.etag,
        weekly_hours=[block(7, "00:00", "00:00")] if first.astimezone(NEW_YORK).isoweekday() != 7 else ALWAYS[:2],
    )
    assert set(await stranded(desk, schedule)) == {kept.id, left.id}
    assert await told(desk, left, "appointment.stranded", 2) == 1  # it was outside before
    assert await told(desk, kept, "appointment.stranded", 2) == 1
    await change(desk, schedule, changed.etag, weekly_hours=ALWAYS, exceptions=[])
    assert not await stranded(desk, schedule)


async def test_a_day_on_which_the_clinic_closes_strands_its_visits_too(desk):
    clinic = await desk.a_clinic()
    await desk.harness.staff("cleo", ["appointments.read", "appointments.book"], clinics=[clinic])
    doctor = await desk.a_practitioner("Closing", hours=(), clinic=clinic)
    schedule = await desk.hours(doctor, clinic=clinic)
    start = soon(9, 15)
    patient = await desk.harness.subject(clinic)
    visit = await desk.book(patient, start, doctor, "cleo", clinic_id=clinic)
    request = directory_pb2.UpdateClinicRequest(
        clinic={"id": clinic, "closed_dates": [str(start.astimezone(NEW_YORK).date())]},
        etag='"1"',
        update_mask={"paths": ["closed_dates"]},
    )
    await desk.harness.call("scheduling", ClinicsServiceStub, "UpdateClinic", request, "ada")
    assert await stranded(desk, schedule, "cleo") == [visit.id]
    assert await told(desk, visit, "appointment.stranded", 2) == 1


async def test_a_search_sees_a_change_of_the_directory_at_once(desk):
    """Reported elsewhere, slow availability: what is kept is checked against the directory's version each time."""
    doctor = await desk.a_practitioner("Fresh", hours=())
    schedule = await desk.hours(doctor, [block(day, "09:00", "10:00") for day in range(1, 8)])
    monday = datetime(2031, 6, 9, tzinfo=NEW_YORK).astimezone(UTC)
    window = {"start_time": monday, "end_time": monday + timedelta(days=1), "practitioner_ids": [doctor]}
    assert len((await desk.search(**window)).slots) == 3
    await change(desk, schedule, '"1"', weekly_hours=[block(1, "09:00", "11:00")])
    assert len((await desk.search(**window)).slots) == 7


async def update(desk, stub, what, etag="", **values):
    """Change an entry of the directory, named by its aggregate."""
    name = "".join(word.title() for word in what.split("_"))
    request = getattr(directory_pb2, f"Update{name}Request")(
        **{what: values}, etag=etag or '"1"', update_mask={"paths": [one for one in values if one != "id"]}
    )
    return await desk.harness.call("scheduling", stub, f"Update{name}", request, "ada")


async def test_a_clinic_that_is_suspended_strands_all_that_is_booked_there(desk):
    clinic = await desk.a_clinic()
    await desk.harness.staff("clea", ["appointments.read", "appointments.book"], clinics=[clinic])
    doctor = await desk.a_practitioner("Suspended", hours=(), clinic=clinic)
    schedule = await desk.hours(doctor, clinic=clinic)
    patient = await desk.harness.subject(clinic)
    visit = await desk.book(patient, soon(9, 15), doctor, "clea", clinic_id=clinic)
    changed = await update(desk, ClinicsServiceStub, "clinic", id=clinic, status="SUSPENDED")
    assert await stranded(desk, schedule, "clea") == [visit.id]
    assert await told(desk, visit, "appointment.stranded", 2) == 1
    await update(desk, ClinicsServiceStub, "clinic", changed.etag, id=clinic, status="ACTIVE")
    assert not await stranded(desk, schedule, "clea")


async def test_who_no_longer_sees_patients_strands_the_visits_that_are_booked(desk):
    doctor = await desk.a_practitioner("Leaving", hours=())
    schedule = await desk.hours(doctor)
    visit = await desk.book(await desk.a_patient(), soon(9, 16), doctor)
    ends = soon(8, 0)
    changed = await update(
        desk, PractitionersServiceStub, "practitioner", id=doctor,
        roles=[{"clinic_id": desk.clinic, "period": {"end_time": ends}}],
    )  # fmt: skip
    assert await stranded(desk, schedule) == [visit.id]
    later = await update(
        desk, PractitionersServiceStub, "practitioner", changed.etag, id=doctor, roles=[{"clinic_id": desk.clinic}]
    )
    assert not await stranded(desk, schedule)
    await update(desk, PractitionersServiceStub, "practitioner", later.etag, id=doctor, active=False)
    assert await stranded(desk, schedule) == [visit.id]
    assert await told(desk, visit, "appointment.stranded", 3) == 2


async def test_a_room_that_is_no_longer_there_strands_the_visits_that_hold_it(desk):
    kind = f"gone-{desk.clinic}"
    room = await desk.a_room(kind)
    visit_type = await desk.a_visit_type(f"in-{kind}", resource_kinds=[kind])
    doctor = await desk.a_practitioner("Room", hours=())
    schedule = await desk.hours(doctor)
    held = await desk.book(await desk.a_patient(), soon(9, 17), doctor, visit_type_id=visit_type)
    beside = await desk.book(await desk.a_patient(), soon(9, 19), doctor)
    day = soon(9, 17).astimezone(NEW_YORK).isoweekday()
    changed = await update(desk, ResourcesServiceStub, "resource", id=room, weekly_hours=[block(day, "00:00", "01:00")])
    assert await stranded(desk, schedule) == [held.id]
    assert await told(desk, held, "appointment.stranded", 2) == 1
    back = await update(desk, ResourcesServiceStub, "resource", changed.etag, id=room, weekly_hours=[])
    assert not await stranded(desk, schedule)
    await update(desk, ResourcesServiceStub, "resource", back.etag, id=room, active=False)
    assert await stranded(desk, schedule) == [held.id]
    assert (
        await told(desk, held, "appointment.stranded", 3) == 2
        and await told(desk, beside, "appointment.stranded", 1) == 0
    )


async def test_hours_are_tried_out_before_they_are_set(desk):
    doctor = await desk.a_practitioner("Preview", hours=())
    schedule = await desk.hours(doctor)
    start = soon(40, 14)
    left = await desk.book(await desk.a_patient(), start, doctor)
    await desk.book(await desk.a_patient(), start + timedelta(days=1), doctor)
    everywhere = [block(day, "00:00", "00:00") for day in range(1, 8)]

    async def preview(weekly, subject="ada", **more):
        request = hours_pb2.GetHoursPreviewRequest(practitioner_id=doctor, clinic_id=desk.clinic, weekly_hours=weekly)
        request.MergeFrom(hours_pb2.GetHoursPreviewRequest(**more))
        return await desk.harness.call("scheduling", HoursServiceStub, "GetHoursPreview", request, subject)

    assert (await preview(everywhere)).total == 0
    day = start.astimezone(ZoneInfo("America/New_York")).isoweekday()
    found = await preview([one for one in everywhere if one["weekday"] != day])
    assert (found.total, [one.appointment_id for one in found.visits]) == (1, [left.id])
    assert await stranded(desk, schedule) == [] and await told(desk, left.id, "appointment.stranded", 1) == 0
    assert await refused(preview([*everywhere, block(1, "09:00", "10:00")])) == "HOURS_OVERLAP"
    assert await refused(preview([], clinic_id=new_id())) == "CLINIC_UNKNOWN"
    assert await refused(preview([], practitioner_id=new_id())) == "PRACTITIONER_UNKNOWN"
    # What is outside already isn't the new hours' doing.
    await change(desk, schedule, '"1"', weekly_hours=[one for one in everywhere if one["weekday"] != day])
    assert (await preview([])).total == 1


def test_a_release_is_seen_once_whenever_one_looks_and_not_on_days_that_are_closed():
    hours = [
        block(1, "09:00", "12:00", release_hours=48),
        block(3, "09:00", "12:00"),
        block(5, "22:00", "02:00", release_hours=1),
    ]
    schedule = Schedule(weekly_hours=hours, exceptions=[{"date": "2031-06-16", "kind": "CLOSED"}])
    clinic = Clinic(time_zone="America/New_York", closed_dates=[], status="ACTIVE", holiday_region="")
    at, end = (datetime(2031, 6, day, tzinfo=NEW_YORK).astimezone(UTC) for day in (2, 30))
    seen = []
    while at < end:
        following = next_release(schedule, clinic, at)
        assert at < following <= at + timedelta(days=1)
        # As the loop does: from the time at which one was to look, at whatever time that is done.
        late = following + timedelta(minutes=7)
        seen += [one for _, windows in released(schedule, clinic, following, late) for one in windows]
        at = late
    starts = [datetime.fromtimestamp(begin, NEW_YORK).strftime("%m-%d %H:%M") for begin, _ in seen]
    assert starts == [
        "06-06 22:00", "06-09 09:00", "06-13 22:00", "06-20 22:00", "06-23 09:00", "06-27 22:00", "06-30 09:00",
    ]  # fmt: skip


def test_a_visit_of_another_century_costs_no_more_than_one_of_next_week(monkeypatch):
    """A visit that was imported for 2099 had each change of hours count out every day until then."""
    start = datetime(2027, 3, 1, 14, tzinfo=UTC)
    schedule = Schedule(practitioner_id=A, clinic_id=B, weekly_hours=[block(1, "09:00", "17:00")], exceptions=[])
    clinic = Clinic(id=B, time_zone="America/New_York", status="ACTIVE")
    practitioner = Practitioner(id=A, active=True, roles=[{"clinic_id": B}])

    fields = "id practitioner_id clinic_id visit_type_id start_time end_time participants"
    booking, kind, counted = namedtuple("Booking", fields), new_id(), []

    def visit(at):
        return booking(new_id(), A, B, kind, at, at + timedelta(minutes=30), [])

    real = stranding.open_intervals

    def counting(weekly, exceptions, closed, zone, first, last, *more):
        counted.append(last - first)
        return real(weekly, exceptions, closed, zone, first, last, *more)

    monkeypatch.setattr(stranding, "open_intervals", counting)
    hours = stranding.Hours({B: clinic}, {A: practitioner}, {(A, B): schedule})
    held, far = visit(start), visit(datetime(2099, 3, 2, 14, tzinfo=UTC))
    tuesday, on_and_on = visit(start + timedelta(days=1)), [visit(start + timedelta(weeks=n)) for n in range(1, 9)]
    assert {one.id for one in hours.outside([far, *on_and_on, tuesday, held])} == {tuesday.id}
    assert sum(counted) < 100 * 86_400

"""Defects that users of other schedulers reported: each is named by a test that shows that it isn't one here.

Most are named where the rule stands that keeps them away; the others are here.
"""

import ast
import functools
import re
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from care.scheduling.v1 import appointments_pb2 as pb

from chassis.errors import Problem
from services.scheduling.tests.desk import ALWAYS, refused, soon

REPORTED = {
    "race": "cal.diy#13397 cal.diy#29958 cal.diy#10789 cal.diy#28151 cal.diy#22803 CloudMeet#43 aea-investors#21",
    "override": "medplum#10270 medplum#10278",
    "clocks that change": "cal.diy#1092 cal.diy#4702 cal.diy#4753 cal.diy#6217 cal.diy#10517 cal.diy#12137 cal.diy#6622"
    " cal.diy#7667 YosemiteCrew#3140 medplum#8417 medplum#6723 exam#936 calendar#6407 poligest#18",
    "zone of whom": "Bahmni#201 medplum#8247 medplum#8158",
    "buffers": "cal.diy#3662 cal.diy#693 cal.diy#24253 cal.diy#14868 cal.diy#25799 cal.diy#24540",
    "recurring": "cal.diy#5431 cal.diy#12461 cal.diy#10524 cal.diy#13827 cal.diy#6281 cal.diy#9154 cal.diy#16203"
    " cal.diy#3448 cal.diy#30016 openemr#7967 medplum#10408 Bahmni#AP-20",
    "waitlist": "cal.diy#10616 medplum#10141 canvas#446 Yosemite-Crew#1729 booking-activities#70 indico#3036",
    "wave": "cal.diy#17354",
    "several resources": "cal.diy#13745 openemr#13552 easyappointments#1400 calendar#3619 elabftw#5171 calrs#149",
    "by patients": "openemr#562 openemr#4258 openemr#11076 openemr#12483 openemr#6234 craniumcafe#280",
    "conflicts": "openemr#2632 Bahmni#89 Bahmni#95 Bahmni#200 Bahmni#201",
    "duplicates": "Bahmni#133",
    "slow": "cal.diy#5277 cal.diy#21103 cal.diy#4007 cal.diy#4535 cal.diy#9924 cal.diy#23482 Cal-ID#1428",
}
"""By what goes wrong: where it was reported."""

DETROIT = ZoneInfo("America/Detroit")


@functools.cache
def names():
    """Each report that a test's docstring names, as `project#number`; a number without a project is of the last one named."""
    projects = {report.partition("#")[0] for reports in REPORTED.values() for report in reports.split()}
    found = set()
    for file in Path(__file__).parent.glob("test_*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                project = ""
                for word in re.findall(r"AP-\d+|#\d+|[\w./-]+", ast.get_docstring(node) or ""):
                    name = word.rpartition("/")[2]
                    project = name if name in projects else project
                    if word.startswith(("#", "AP-")):
                        found.add(f"{project}#{word.lstrip('#')}")
    return found


@pytest.mark.parametrize("what", REPORTED)
def test_each_report_is_named_by_a_test(what):
    assert set(REPORTED[what].split()) - names() == set()


# -- conflicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["cancelled", "moved away", "released", "entered in error"])
async def test_what_no_longer_stands_conflicts_with_nothing(desk, gone):
    """Conflict rules: in Bahmni PR#89 and PR#95 a visit that was cancelled was still a conflict."""
    # Within the weeks that searches keep a copy of, and beyond them.
    start, patient = soon(days=24 if gone in ("cancelled", "released") else 61), await desk.a_patient()
    doctor = await desk.a_practitioner(f"Gone {gone}")
    if gone == "released":
        slot = (await desk.search(start_time=start, practitioner_ids=[doctor])).slots[0]
        await desk.do("Release", await desk.hold(patient, slot))
    else:
        visit = await desk.book(patient, start, doctor)
        if gone == "cancelled":
            await desk.do("Cancel", visit, reason={"code": "pat"})
        elif gone == "moved away":
            await desk.move(visit, start + timedelta(hours=2))
        else:
            await desk.do("EnterInError", visit)
    found = await desk.search(start_time=start, patient_id=patient, practitioner_ids=[doctor], page_size=1)
    assert found.slots[0].start_time.ToDatetime(tzinfo=UTC) == start
    assert (await desk.book(patient, start, doctor)).status == pb.Appointment.BOOKED


async def test_who_is_away_is_so_at_the_place_and_for_the_visits_that_are_named(desk):
    """Conflict rules: Bahmni PR#200 and PR#201, unavailability by date, location, service and provider."""
    monday = datetime(2031, 6, 9, 16, tzinfo=UTC)  # noon in New York
    elsewhere = await desk.a_clinic()
    shut = await desk.a_clinic(closed_dates=["2031-06-09"])
    await desk.harness.staff("una", [*_WORK], clinics=[desk.clinic, elsewhere, shut])
    only = await desk.a_visit_type("only-this")
    away = await desk.a_practitioner("Away here", exceptions=[{"date": "2031-06-09", "kind": "CLOSED"}])
    await desk.hours(away, clinic=elsewhere)
    here = await desk.a_practitioner("Here")
    for clinic in (elsewhere, shut):
        await desk.hours(here, clinic=clinic)
    picky = await desk.a_practitioner("Picky", [{**day, "visit_type_ids": [only]} for day in ALWAYS])
    asked = [
        (away, desk.clinic, desk.visit, "OUTSIDE_HOURS"),  # the provider's leave there
        (away, elsewhere, desk.visit, ""),  # and not at the other location
        (here, shut, desk.visit, "OUTSIDE_HOURS"),  # the location's day
        (here, desk.clinic, desk.visit, ""),  # which closes no other one
        (picky, desk.clinic, desk.visit, "OUTSIDE_HOURS"),  # hours of another service
        (picky, desk.clinic, only, ""),
    ]
    for number, (doctor, clinic, visit, outcome) in enumerate(asked):
        start, patient = monday + timedelta(hours=number), await desk.a_patient()
        window = {"start_time": start, "end_time": start + timedelta(minutes=1)}
        found = await desk.search(visit, "una", practitioner_ids=[doctor], clinic_ids=[clinic], **window)
        assert bool(found.slots) is (outcome == ""), number
        try:
            await desk.book(patient, start, doctor, "una", clinic_id=clinic, visit_type_id=visit)
        except Problem as problem:
            assert problem.reason == outcome, number
        else:
            assert outcome == "", number


# -- what is held ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("days", [25, 62])
async def test_what_is_asked_for_and_not_confirmed_yet_is_seen_and_keeps_its_time(desk, days):
    """Unconfirmed requests invisible (cal.diy#10789, #29958): PENDING stands in lists and searches leave it out."""
    doctor, patient = await desk.a_practitioner("Asked for"), await desk.a_patient()
    window = {"start_time": soon(days=days), "end_time": soon(days=days, hour=16), "practitioner_ids": [doctor]}
    slot, *rest = (await desk.search(**window)).slots
    held = await desk.hold(patient, slot)
    assert [one.start_time for one in (await desk.search(**window)).slots] == [
        one.start_time for one in rest if one.start_time.seconds >= held.end_time.seconds
    ]
    assert await refused(desk.book(await desk.a_patient(), soon(days=days), doctor)) == "SLOT_TAKEN"
    listed = await desk("ListAppointments", pb.ListAppointmentsRequest(patient_ids=[patient]))
    assert [one.status for one in listed.appointments] == [pb.Appointment.PENDING]


# -- buffers -----------------------------------------------------------------------------------------------------------


async def test_a_buffer_stands_before_or_after_as_it_says_and_no_start_by_hand_gets_into_it(desk):
    """Buffers: cal.diy#3662 (twice after, none before), PR#25799 and PR#24540 (swapped), #14868 (a time of one's own)."""
    begin = soon(days=63, hour=12)
    for code, before, after, free in (
        ("before-only", 30, 0, ["12:00", "12:15", "12:30", "12:45", "13:00", "14:30"]),
        ("after-only", 0, 30, ["12:00", "12:15", "12:30", "12:45", "13:00", "13:15", "13:30", "15:00"]),
    ):
        visit = await desk.a_visit_type(code, buffer_before_minutes=before, buffer_after_minutes=after)
        doctor = await desk.a_practitioner(code)
        await desk.book(await desk.a_patient(), begin + timedelta(hours=2), doctor, visit_type_id=visit)
        found = await desk.search(
            start_time=begin, end_time=begin + timedelta(hours=3, minutes=1), practitioner_ids=[doctor]
        )
        shown = [one.start_time.ToDatetime(tzinfo=UTC).strftime("%H:%M") for one in found.slots]
        assert shown[: len(free)] == free
        late = begin + timedelta(minutes=119 if before else 179)  # a minute into it, from either side
        early = begin + timedelta(minutes=61 if before else 91)
        for inside in (late, early):
            assert await refused(desk.book(await desk.a_patient(), inside, doctor)) == "SLOT_TAKEN"


# -- clocks that change ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [date(2031, 3, 9), date(2031, 11, 2)])
async def test_what_is_shown_beyond_a_change_of_the_clock_is_booked_as_it_is_shown(desk, change):
    """cal.diy#6622 (days of their own were shown and refused), #7667 (none at 18:00 in Detroit)."""
    clinic = await desk.a_clinic("America/Detroit")
    await desk.harness.staff(f"dee {change}", _WORK, clinics=[clinic])
    hours = [{"weekday": weekday, "start": "16:00", "end": "20:00"} for weekday in range(1, 8)]
    doctor = await desk.a_practitioner(
        f"Detroit {change}",
        hours,
        clinic,
        [{"date": change.isoformat(), "kind": "EXTRA", "start": "09:00", "end": "10:00"}],
    )
    midnight = datetime.combine(change, datetime.min.time(), DETROIT)
    window = {"start_time": midnight, "end_time": midnight + timedelta(days=1), "practitioner_ids": [doctor]}
    found = await desk.search(subject=f"dee {change}", **window)
    shown = [one.start_time.ToDatetime(tzinfo=UTC).astimezone(DETROIT) for one in found.slots]
    assert {one.date() for one in shown} == {change}
    assert [f"{one:%H:%M}" for one in shown] == ["09:00", "09:15", "09:30", *_quarters(16, 20)]
    for clock, at in (("09:30", midnight.replace(hour=9, minute=30)), ("18:00", midnight.replace(hour=18))):
        visit = await desk.book(
            await desk.harness.subject(clinic), at.astimezone(UTC), doctor, f"dee {change}", clinic_id=clinic
        )
        assert visit.start_time.ToDatetime(tzinfo=UTC).astimezone(DETROIT).strftime("%H:%M") == clock


def _quarters(first, last):
    """The starts of half an hour's visit between two full hours."""
    return [f"{hour:02}:{minute:02}" for hour in range(first, last) for minute in (0, 15, 30, 45)][:-1]


# -- by patients themselves --------------------------------------------------------------------------------------------


async def test_a_patient_who_may_only_look_sees_the_visit_and_changes_nothing(desk):
    """By patients: openemr#12483, asked for since 2020: they see when it is, and staff alone plans it."""
    patient = await desk.a_patient()
    await desk.harness.staff("looker", _SELF, kind="PATIENT", principal_id=patient)
    closed = {"staff_only": True}
    visit = await desk.a_visit_type("look-only", self_booking=closed, self_rescheduling=closed, self_cancelling=closed)
    start = soon(days=64)
    planned = await desk.book(patient, start, visit_type_id=visit)
    listed = await desk("ListAppointments", pb.ListAppointmentsRequest(patient_ids=[patient]), "looker")
    assert [one.id for one in listed.appointments] == [planned.id]
    for attempt in (
        desk.book(patient, start + timedelta(days=1), subject="looker", visit_type_id=visit),
        desk.move(planned, start + timedelta(days=1), "looker"),
        desk.do("Cancel", planned, "looker", reason={"code": "pat"}),
    ):
        assert await refused(attempt) == "SELF_SERVICE_REFUSED"


async def test_a_patient_takes_the_only_place_of_a_day_and_moves_it_in_one_step(desk):
    """By patients: openemr#6234 (an error where a provider has one place a day), craniumcafe#280 (cancelled and made anew)."""
    patient = await desk.a_patient()
    await desk.harness.staff("mover", _SELF, kind="PATIENT", principal_id=patient)
    doctor = await desk.a_practitioner("Once a day", [{**day, "start": "12:00", "end": "12:30"} for day in ALWAYS])
    found = await desk.search(subject="mover", start_time=soon(days=65, hour=0), practitioner_ids=[doctor], page_size=3)
    first, second, third = found.slots
    assert second.start_time.seconds - first.start_time.seconds >= 23 * 3600
    mine = await desk(
        "CreateAppointment", pb.CreateAppointmentRequest(patient_id=patient, offer_token=first.offer_token), "mover"
    )
    moved = await desk.move(mine, third.start_time.ToDatetime(tzinfo=UTC), "mover")
    assert (moved.id, moved.start_time, moved.status) == (mine.id, third.start_time, pb.Appointment.BOOKED)
    again = await desk.search(start_time=soon(days=65, hour=0), practitioner_ids=[doctor], page_size=2)
    assert [one.start_time for one in again.slots] == [first.start_time, second.start_time]


_SELF = ["availability.search", "appointments.read", "appointments.book", "appointments.write"]
_WORK = [*_SELF, "directory.read"]

"""On what terms a visit is to be had: what it needs, for whom it is, which hours are whose, and when roles count."""

import asyncio
from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import grpc
import pytest
from care.patients.v1 import facts_pb2
from care.patients.v1.facts_pb2_grpc import FactsServiceServicer, add_FactsServiceServicer_to_server
from care.scheduling.v1 import appointments_pb2 as pb

from chassis.errors import Problem
from chassis.ids import new_id
from services.scheduling import occupancy
from services.scheduling.tests.desk import ALWAYS, refused, soon

NEW_YORK = ZoneInfo("America/New_York")
MONDAY = datetime(2031, 6, 9, tzinfo=NEW_YORK).astimezone(UTC)
DAY = timedelta(days=1)


class Patients(FactsServiceServicer):
    """In place of patients: what it knows of whom, and how often it was asked."""

    def __init__(self):
        self.known, self.asked = {}, 0

    async def GetPatientFacts(self, request, _context):
        self.asked += 1
        return facts_pb2.PatientFacts(**self.known.get(request.patient_id, {}))


@pytest.fixture(scope="module")
async def patients(desk):
    server = grpc.aio.server()
    stand_in = Patients()
    add_FactsServiceServicer_to_server(stand_in, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    desk.harness.servers["scheduling"].runtime.clients._peers["patients"] = f"ipv4:127.0.0.1:{port}"
    yield stand_in
    await server.stop(None)


def clock(slots):
    return [slot.start_time.ToDatetime(tzinfo=UTC).astimezone(NEW_YORK).strftime("%H:%M") for slot in slots]


def at(hour, minute=0, day=MONDAY):
    return day + timedelta(hours=hour, minutes=minute)


def office(start="09:00", end="11:00", **more):
    return [{"weekday": day, "start": start, "end": end, **more} for day in range(1, 6)]


async def monday(desk, doctor, visit="", subject="cora", **more):
    """The slots of a Monday."""
    window = {"start_time": MONDAY, "end_time": MONDAY + DAY, "practitioner_ids": [doctor], "page_size": 200}
    return (await desk.search(visit, subject, **{**window, **more})).slots


async def test_all_of_several_sets_are_taken_any_one_of_each_and_none_serves_two(desk):
    """Reported elsewhere, multi-resource: requirement sets are all-of and any-of pools. calrs PR#149 has one or the other."""
    one, two = await desk.a_room("suite"), await desk.a_room("suite")
    named = await desk.a_room("laser")
    other = await desk.a_room("laser")
    needs = [{"kinds": ["suite", "theatre"]}, {"kinds": ["suite"]}, {"resource_ids": [named]}]
    visit = await desk.a_visit_type("laser-both", requirements=needs)
    doctor = await desk.a_practitioner("Laser", office())
    slot = (await monday(desk, doctor, visit))[0]
    assert set(slot.resource_ids) == {one, two, named} and other not in slot.resource_ids
    booked = await desk.hold(await desk.a_patient(), slot)
    taken = {one.actor.id for one in booked.participants if one.actor.type == "Resource"}
    assert taken == {one, two, named}
    assert clock(await monday(desk, doctor, visit))[0] == "09:30"
    single = await desk.a_visit_type("suite-only", requirements=[{"kinds": ["suite"]}])
    beside = await desk.a_practitioner("Beside", office())
    assert clock(await monday(desk, beside, single))[0] == "09:30"
    assert await refused(desk.book(await desk.a_patient(), at(9), beside, visit_type_id=single)) == "SLOT_TAKEN"
    await desk.do("Release", booked)
    assert (await desk.book(await desk.a_patient(), at(9), beside, visit_type_id=single)).id


async def test_a_resource_is_there_only_in_its_own_hours_and_while_it_is_active(desk):
    """Multi-resource: elabftw#5171, openemr#13552."""
    visit = await desk.a_visit_type("scan", resource_kinds=["scanner"])
    doctor = await desk.a_practitioner("Scan", office())
    leave = [{"date": "2031-06-10", "kind": "CLOSED"}]
    await desk.a_room("scanner", weekly_hours=office("09:30", "10:30"), exceptions=leave)
    assert clock(await monday(desk, doctor, visit)) == ["09:30", "09:45", "10:00"]
    assert not await monday(desk, doctor, visit, start_time=MONDAY + DAY, end_time=MONDAY + 2 * DAY)
    patient = await desk.a_patient()
    for start in (at(9), at(10, 15), at(9, 30, MONDAY + DAY)):
        assert await refused(desk.book(patient, start, doctor, visit_type_id=visit)) == "OUTSIDE_HOURS"
    assert (await desk.book(patient, at(9, 30), doctor, visit_type_id=visit)).id


async def test_an_interpreter_of_the_language_is_a_resource_like_others(desk):
    """Reported elsewhere, multi-resource: who interprets is taken with the visit and moves with it."""
    doctor = await desk.a_practitioner("Polyglot", office())
    spanish = await desk.a_room("interpreter", languages=["es-MX"], weekly_hours=office("09:30", "11:00"))
    await desk.a_room("interpreter", languages=["zh"])
    slots = await monday(desk, doctor, interpreter_language="es")
    assert clock(slots)[0] == "09:30" and list(slots[0].resource_ids) == [spanish]
    visit = await desk.hold(await desk.a_patient(), slots[0])
    (interpreter,) = [one for one in visit.participants if one.role == "interpreter"]
    assert interpreter.actor.id == spanish and visit.interpreter_language == "es"
    visit = await desk.do("Book", visit)
    assert await refused(desk.move(visit, at(9))) == "OUTSIDE_HOURS"
    moved = await desk.move(visit, at(10))
    assert spanish in {one.actor.id for one in moved.participants}
    beside = await desk.a_practitioner("Beside2", office())
    assert not await monday(desk, beside, interpreter_language="fr")
    more = {"interpreter_language": "es"}
    assert await refused(desk.book(await desk.a_patient(), at(10), beside, **more)) == "SLOT_TAKEN"
    assert (await desk.book(await desk.a_patient(), at(10), beside)).interpreter_language == ""


async def test_a_block_held_back_is_released_before_it_begins_and_before_that_by_explicit_choice(desk):
    await desk.harness.staff("hilda", ["availability.search", "appointments.book", "appointments.held_back"],
                             clinics=[desk.clinic])  # fmt: skip
    start = soon(3, 14)
    doctor = await desk.a_practitioner("Held", [{**one, "release_hours": 48} for one in ALWAYS])
    window = {"start_time": start, "end_time": start + timedelta(hours=1), "practitioner_ids": [doctor]}
    assert not (await desk.search(**window)).slots
    near = soon(1, 14)
    released = (await desk.search(**{**window, "start_time": near, "end_time": near + timedelta(hours=1)})).slots
    assert released and not released[0].held_back
    patient = await desk.a_patient()
    assert await refused(desk.book(patient, start, doctor)) == "HELD_BACK"
    assert await refused(desk.search(held_back=True, **window)) == "PERMISSION_MISSING"
    assert await refused(desk.book(patient, start, doctor, held_back=True)) == "PERMISSION_MISSING"
    slot = (await desk.search(held_back=True, subject="hilda", **window)).slots[0]
    assert slot.held_back
    assert await refused(desk.hold(patient, slot, subject="hilda")) == "HELD_BACK"
    assert (await desk.hold(patient, slot, subject="hilda", held_back=True)).id


async def test_blocks_for_staff_only_are_neither_shown_to_patients_nor_booked_by_them(desk):
    patient = await desk.a_patient()
    await desk.harness.staff("pat", ["availability.search", "appointments.book"], kind="PATIENT", principal_id=patient)
    doctor = await desk.a_practitioner(
        "Private", [*office("09:00", "10:00"), *office("10:00", "11:00", staff_only=True)]
    )
    assert clock(await monday(desk, doctor))[-1] == "10:30"
    assert clock(await monday(desk, doctor, subject="pat"))[-1] == "09:30"
    assert await refused(desk.book(patient, at(10), doctor, subject="pat")) == "OUTSIDE_HOURS"
    assert (await desk.book(patient, at(10), doctor)).id


async def test_so_many_visits_of_a_type_or_of_new_patients_start_in_a_block(desk):
    scarce = await desk.a_visit_type("procedure")
    quotas = [{"at_most": 1, "visit_type_ids": [scarce]}, {"at_most": 2, "new_patients": True}]
    doctor = await desk.a_practitioner("Quota", [*office("09:00", "11:00", quotas=quotas), *office("11:00", "12:00")])
    known = await desk.a_patient()
    await _seen(desk, known)
    assert clock(await monday(desk, doctor, scarce))[0] == "09:00"
    first = await desk.book(known, at(9), doctor, visit_type_id=scarce)
    assert not first.new_patient
    assert clock(await monday(desk, doctor, scarce)) == ["11:00", "11:15", "11:30"]
    assert await refused(desk.book(await desk.a_patient(), at(10), doctor, visit_type_id=scarce)) == "QUOTA_REACHED"
    assert (await desk.move(first, at(9, 30))).id  # its own place doesn't stand in its way
    for start in (at(10), at(10, 30)):
        assert (await desk.book(await desk.a_patient(), start, doctor)).new_patient
    newcomer = await desk.a_patient()
    assert await refused(desk.book(newcomer, at(9), doctor)) == "QUOTA_REACHED"
    assert clock(await monday(desk, doctor, patient_id=newcomer))[0] == "11:00"
    assert clock(await monday(desk, doctor, patient_id=await _seen(desk, await desk.a_patient())))[0] == "09:00"
    assert clock(await monday(desk, doctor, start_time=MONDAY + DAY, end_time=MONDAY + 2 * DAY))[0] == "09:00"
    await desk.do("Cancel", first, reason={"code": "pat"})
    assert clock(await monday(desk, doctor, scarce))[0] == "09:00"


async def test_the_last_place_of_a_quota_goes_once_however_many_ask_at_once(desk):
    """Reported elsewhere, race: what is counted and then taken is taken under a lock."""
    doctor = await desk.a_practitioner("Rush", office("09:00", "11:00", quotas=[{"at_most": 2}]))
    starts = [at(9, 15 * n) for n in range(0, 8, 2)] * 3
    asked = [desk.book(await desk.a_patient(), start, doctor) for start in starts]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert sum(isinstance(one, pb.Appointment) for one in answers) == 2
    assert {one.reason for one in answers if isinstance(one, Exception)} <= {"QUOTA_REACHED", "SLOT_TAKEN"}


async def test_who_can_have_it_is_decided_before_slots_are_shown_and_again_when_one_is_taken(desk, patients):
    doctor = await desk.a_practitioner("Rules", office())
    girl, boy, old = [await desk.a_patient() for _ in range(3)]
    patients.known = {
        girl: {"birth_date": "2020-06-10", "sex": "female"},
        boy: {"birth_date": "2019-01-01", "sex": "male"},
        old: {"birth_date": "1950", "sex": "unknown"},
    }
    rule = {"maximum_age": 10, "sex": "female"}
    visit = await desk.a_visit_type("girls", eligibility=rule)
    assert clock(await monday(desk, doctor, visit, patient_id=girl))[0] == "09:00"
    # Tomorrow is her eleventh birthday.
    week = {"start_time": MONDAY, "end_time": MONDAY + 3 * DAY, "practitioner_ids": [doctor], "page_size": 200}
    assert len((await desk.search(visit, patient_id=girl, **week)).slots) == 7
    for patient, reasons in ((boy, {"SEX", "AGE"}), (old, {"AGE"})):
        answer = await desk.search(visit, patient_id=patient, **week)
        assert not answer.slots and set(answer.ineligible) == reasons
        assert not (await desk.count(visit, patient_id=patient, **week)).days
        assert await refused(desk.book(patient, at(9), doctor, visit_type_id=visit)) == "NOT_ELIGIBLE"
    assert await refused(desk.book(girl, at(9, 0, MONDAY + DAY), doctor, visit_type_id=visit)) == "NOT_ELIGIBLE"
    booked = await desk.book(girl, at(9), doctor, visit_type_id=visit)
    asked = patients.asked
    assert (await desk.move(booked, at(10))).id and patients.asked == asked  # what was promised may move
    assert (await desk.book(boy, at(9), doctor)).id and patients.asked == asked  # no rule, no question


async def test_new_and_established_patients_referrals_and_payers(desk):
    doctor = await desk.a_practitioner("Intake", office())
    heart = {"system": "http://nucc.org/provider-taxonomy", "code": "207RC0000X"}
    fresh = await desk.a_visit_type("intake", eligibility={"patients": "NEW"})
    again = await desk.a_visit_type(
        "again", eligibility={"patients": "ESTABLISHED", "referral_required": True, "payers": ["medicare"]}
    )
    known, new = await _seen(desk, await desk.a_patient()), await desk.a_patient()
    assert list((await desk.search(fresh, patient_id=known, start_time=MONDAY)).ineligible) == ["NEW_ONLY"]
    assert await monday(desk, doctor, fresh, patient_id=new)
    assert await refused(desk.book(known, at(9), doctor, visit_type_id=fresh)) == "NOT_ELIGIBLE"
    asked = await desk.search(again, patient_id=new, start_time=MONDAY, payer="acme")
    assert set(asked.ineligible) == {"ESTABLISHED_ONLY", "REFERRAL", "PAYER"}
    more = {"visit_type_id": again, "payer": "medicare"}
    assert await refused(desk.book(known, at(9), doctor, **more)) == "NOT_ELIGIBLE"
    based_on = [{"type": "Referral", "id": new_id()}]
    assert (await desk.book(known, at(9), doctor, based_on=based_on, **more)).id
    # A specialty of its own: who was seen for something else is new to it.
    cardiology = await desk.a_visit_type("cardiology", specialty=heart, eligibility={"patients": "NEW"})
    cardiologist = await desk.a_practitioner("Heart", office(), role={"specialties": [heart]})
    assert await monday(desk, cardiologist, cardiology, patient_id=known)


async def test_a_video_visit_that_needs_a_licence_is_with_somebody_licensed_where_the_patient_lives(desk, patients):
    visit = await desk.a_visit_type("tele", modality="VIDEO", licence_required=True)
    here = await desk.a_practitioner("Mass", office(), licensed_states=["MA"])
    there = await desk.a_practitioner("Maine", office(), licensed_states=["ME", "NH"])
    patient = await desk.a_patient()
    patients.known = {patient: {"state": "ME"}}
    assert await monday(desk, there, visit, patient_id=patient) and not await monday(
        desk, here, visit, patient_id=patient
    )
    assert await refused(desk.book(patient, at(9), here, visit_type_id=visit)) == "NOT_LICENSED"
    assert (await desk.book(patient, at(9), there, visit_type_id=visit)).id
    found = await desk.search(visit, start_time=MONDAY, practitioner_ids=[here, there], licensed_state="MA")
    assert {slot.practitioner_id for slot in found.slots} == {here}


async def test_while_patients_can_not_be_asked_a_rule_that_needs_it_is_not_decided(desk, patients):
    visit = await desk.a_visit_type("adults", eligibility={"minimum_age": 18})
    clients = desk.harness.servers["scheduling"].runtime.clients
    channels, peers = clients._channels, clients._peers
    clients._channels, clients._peers = {}, {}
    try:
        patient = await desk.a_patient()
        assert await refused(desk.search(visit, patient_id=patient)) == "PEER_UNKNOWN"
        assert await refused(desk.book(patient, at(9), visit_type_id=visit)) == "PEER_UNKNOWN"
        assert (await desk.search(visit)).slots
    finally:
        clients._channels, clients._peers = channels, peers


async def test_a_role_counts_while_it_is_in_force(desk):
    ends = MONDAY + timedelta(hours=10)
    role = {"period": {"start_time": MONDAY - 30 * DAY, "end_time": ends}}
    doctor = await desk.a_practitioner("Locum", office(), role=role)
    assert clock(await monday(desk, doctor))[-1] == "09:45"
    assert not await monday(desk, doctor, start_time=MONDAY + DAY, end_time=MONDAY + 2 * DAY)
    patient = await desk.a_patient()
    assert await refused(desk.book(patient, at(10), doctor)) == "OUTSIDE_HOURS"
    assert await refused(desk.book(patient, at(9, 0, MONDAY - 35 * DAY), doctor)) == "OUTSIDE_HOURS"
    assert (await desk.book(patient, at(9, 30), doctor)).id


async def test_patients_book_move_and_cancel_by_themselves_as_the_visit_type_says(desk):
    """Reported elsewhere, reschedule and cancel by patient: a policy per visit type says who may, and until when.
    openemr#11076 (all or nothing).
    """
    patient = await desk.a_patient()
    may = ["availability.search", "appointments.read", "appointments.book", "appointments.write"]
    await desk.harness.staff("self", may, kind="PATIENT", principal_id=patient)
    day_before = {"until_minutes": 24 * 60}
    strict = await desk.a_visit_type("strict", self_booking={"staff_only": True})
    timed = await desk.a_visit_type(
        "timed", self_booking=day_before, self_rescheduling=day_before, self_cancelling={"until_minutes": 60 * 24 * 365}
    )
    doctor, reason = await desk.a_practitioner("Self"), {"code": "pat"}
    far = soon(4)
    near = (datetime.now(UTC) + timedelta(hours=5)).replace(minute=0, second=0, microsecond=0)
    shown = await desk.search(strict, "self", practitioner_ids=[doctor])
    assert not shown.slots and list(shown.ineligible) == ["SELF_SERVICE"]
    assert await refused(desk.book(patient, far, doctor, "self", visit_type_id=strict)) == "SELF_SERVICE_REFUSED"
    assert (await desk.book(patient, far + DAY, doctor, visit_type_id=strict)).id
    assert await refused(desk.book(patient, near, doctor, "self", visit_type_id=timed)) == "SELF_SERVICE_TOO_LATE"
    first = (await desk.search(timed, "self", practitioner_ids=[doctor])).slots[0].start_time.ToDatetime(tzinfo=UTC)
    assert first >= datetime.now(UTC) + timedelta(hours=23, minutes=59)
    mine = await desk.book(patient, far, doctor, "self", visit_type_id=timed)
    assert await refused(desk.do("Cancel", mine, "self", reason=reason)) == "SELF_SERVICE_TOO_LATE"
    mine = await desk.move(mine, far + timedelta(hours=2), "self")
    by_staff = await desk.book(patient, near, doctor, visit_type_id=timed)
    assert await refused(desk.move(by_staff, far + 2 * DAY, "self")) == "SELF_SERVICE_TOO_LATE"
    assert (await desk.do("Cancel", by_staff, reason=reason)).status == pb.Appointment.CANCELLED
    free = await desk.book(patient, near, doctor, "self")
    assert (await desk.do("Cancel", free, "self", reason=reason)).status == pb.Appointment.CANCELLED


async def test_patients_book_so_many_visits_of_a_day_by_themselves_also_at_once_and_staff_books_more(desk):
    """Reported elsewhere, reschedule and cancel by patient: a limit for each day. openemr#4258."""
    patient = await desk.a_patient()
    may = ["appointments.read", "appointments.book"]
    await desk.harness.staff("eager", may, kind="PATIENT", principal_id=patient)
    kind = await desk.a_visit_type("twice", self_booking={"at_most_per_day": 2})
    doctors = [await desk.a_practitioner(f"Often {number}") for number in range(6)]
    noon = (datetime.now(NEW_YORK) + timedelta(days=5)).replace(hour=12, minute=0, second=0, microsecond=0)
    starts = [noon + timedelta(hours=number) for number in range(6)]
    answers = await asyncio.gather(
        *(
            desk.book(patient, start, doctor, "eager", visit_type_id=kind)
            for start, doctor in zip(starts, doctors, strict=True)
        ),
        return_exceptions=True,
    )
    reasons = [answer.reason for answer in answers if isinstance(answer, Problem)]
    assert reasons == ["SELF_SERVICE_LIMIT"] * 4, answers
    late = noon.replace(hour=23, minute=30)
    assert await refused(desk.book(patient, late, doctors[0], "eager", visit_type_id=kind)) == "SELF_SERVICE_LIMIT"
    assert (await desk.book(patient, late + timedelta(hours=1), doctors[0], "eager", visit_type_id=kind)).id
    assert (await desk.book(patient, late, doctors[0], visit_type_id=kind)).id


async def _seen(desk, patient):
    """Makes a patient established: a visit that took place."""
    doctor = await desk.a_practitioner(f"Past {new_id()}")
    start = datetime.now(UTC).replace(second=0, microsecond=0) - timedelta(minutes=5)
    visit = await desk.book(patient, start, doctor)
    await desk.do("Fulfill", await desk.do("Arrive", visit))
    return patient


def test_the_monday_of_these_tests_is_one():
    assert date(2031, 6, 9).isoweekday() == 1


async def test_a_hold_booked_in_the_instant_of_its_expiry_takes_no_place_that_another_got_meanwhile(desk, monkeypatch):
    """The hold is still standing when it is booked, and over when the next one counts: both had the last place."""
    doctor = await desk.a_practitioner("Instant", office("09:00", "11:00", quotas=[{"at_most": 1}]))
    held = await desk.hold(await desk.a_patient(), (await monday(desk, doctor))[0], hold_seconds=1)
    ends, keep = held.hold_expire_time.ToDatetime(UTC), occupancy.keep

    async def slowly(*whose):
        kept = await keep(*whose)
        await asyncio.sleep(max((ends - datetime.now(UTC)).total_seconds(), 0) + 0.4)
        return kept

    monkeypatch.setattr(occupancy, "keep", slowly)
    booking = asyncio.create_task(desk.do("Book", held))
    await asyncio.sleep(max((ends - datetime.now(UTC)).total_seconds(), 0) + 0.1)
    other = await asyncio.gather(desk.book(await desk.a_patient(), at(10), doctor), return_exceptions=True)
    results = [*await asyncio.gather(booking, return_exceptions=True), *other]
    started = await desk.sql("SELECT 1 FROM appointment WHERE practitioner_id = :who AND status = 'BOOKED'", who=doctor)
    assert len(started) == 1, results
    assert [getattr(one, "reason", "") for one in results] == ["", "QUOTA_REACHED"]

"""Walk-ins: who stands at the desk is booked and there in one step."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from care.scheduling.v1 import appointments_pb2 as pb

from chassis.ids import new_id
from services.scheduling.tests.desk import WORK, refused

Status = pb.Appointment.Status


@pytest.fixture(scope="module")
async def urgent(desk):
    """A visit of 15 minutes that may be overbooked once, and a clinic where it is never near midnight."""
    zone = f"Etc/GMT{datetime.now(UTC).hour - 10:+}"  # about ten o'clock there
    desk.walk_in = await desk.a_clinic(zone)
    for name in ("tess", "otto"):
        more = ["appointments.overbook"] if name == "otto" else []
        await desk.harness.staff(name, [*WORK, *more], clinics=[desk.walk_in, desk.clinic])
    await desk.harness.staff("books", sorted({*WORK} - {"appointments.check_in"}), clinics=[desk.walk_in])
    await desk.harness.staff("receives", sorted({*WORK} - {"appointments.book"}), clinics=[desk.walk_in])
    desk.first = await desk.a_practitioner("Aalto", clinic=desk.walk_in)
    desk.second = await desk.a_practitioner("Bach", clinic=desk.walk_in)
    return await desk.a_visit_type("urgent", 15, overbooking_cap=1)


async def walk_in(desk, visit, patient="", subject="tess", **more):
    patient = patient or await desk.harness.subject(desk.walk_in)
    request = pb.WalkInAppointmentRequest(
        patient_id=patient, clinic_id=desk.walk_in, visit_type_id=visit, **more
    )  # fmt: skip
    return await desk("WalkInAppointment", request, subject)


def at(stamp):
    return stamp.ToDatetime(tzinfo=UTC)


async def test_a_walk_in_has_arrived_for_the_first_free_start_of_today(desk, urgent):
    before = datetime.now(UTC)
    first = await walk_in(desk, urgent, comment="cut finger")
    assert (first.status, first.walk_in, first.comment) == (Status.ARRIVED, True, "cut finger")
    assert before - timedelta(minutes=1) <= at(first.start_time) <= before + timedelta(minutes=15)
    assert [step.action for step in first.history] == ["book", "arrive"]
    told = await desk.told(first, 2)
    assert [kind for kind, _ in told] == ["appointment.booked", "appointment.arrived"]
    assert all(payload.walk_in for _, payload in told)
    second, third = await walk_in(desk, urgent), await walk_in(desk, urgent)
    assert second.start_time == first.start_time and second.practitioner_id != first.practitioner_id
    assert at(third.start_time) == at(first.start_time) + timedelta(minutes=15), "both are busy until then"
    named = await walk_in(desk, urgent, practitioner_id=third.practitioner_id)
    assert named.practitioner_id == third.practitioner_id
    assert at(named.start_time) == at(third.start_time) + timedelta(minutes=15)


async def test_walk_ins_who_come_together_get_times_of_their_own(desk, urgent):
    """Race (cal.diy#13397): who loses the first free time gets the next one instead of a refusal."""
    answers = await asyncio.gather(*(walk_in(desk, urgent) for _ in range(4)))
    assert len({(one.practitioner_id, one.start_time.seconds) for one in answers}) == 4


async def test_a_walk_in_is_overbooked_by_explicit_choice_only(desk, urgent):
    """Wave (cal.diy#17354): walk-ins beside what is booked."""
    over = {"reason": "chest pain"}
    first = await walk_in(desk, urgent, practitioner_id=desk.second, subject="otto", overbooking=over)
    now = datetime.now(UTC)
    assert now - timedelta(minutes=2) <= at(first.start_time) <= now and first.status == Status.ARRIVED
    assert first.overbooking == 1 and first.history[0].reason_code == "chest pain"
    more = {"practitioner_id": desk.second, "overbooking": over}
    assert await refused(walk_in(desk, urgent, subject="tess", **more)) == "OVERBOOKING_NOT_ALLOWED"
    assert await refused(walk_in(desk, urgent, subject="otto", **more)) == "OVERBOOKING_CAP_REACHED"
    assert await refused(walk_in(desk, urgent, subject="otto", overbooking=over)) == "PLACE_MISSING"


async def test_a_walk_in_who_should_be_elsewhere_is_in_two_places_only_by_choice(desk, urgent):
    """Override needed by staff (medplum#10270): by reason and permission, and said in the history."""
    patient = await desk.harness.subject(desk.walk_in)
    third = await desk.a_practitioner("Cage", clinic=desk.walk_in)
    start = datetime.now(UTC).replace(second=0, microsecond=0)
    there = {"clinic_id": desk.walk_in, "visit_type_id": await desk.a_visit_type("hours", 240)}
    await desk.book(patient, start, third, "tess", **there)
    later = await walk_in(desk, urgent, patient)
    assert at(later.start_time) >= start + timedelta(hours=4)
    fourth = await desk.a_practitioner("Dahl", clinic=desk.walk_in)
    more = {"practitioner_id": fourth, "overbooking": {"reason": "seen by both"}}
    assert await refused(walk_in(desk, urgent, patient, "otto", **more)) == "PATIENT_BUSY"
    more["overbooking"]["patient_overlap"] = True
    both = await walk_in(desk, urgent, patient, "otto", **more)
    assert (both.overbooking, both.history[0].reason_code) == (0, "seen by both")


async def test_a_walk_in_needs_somebody_who_is_there_today(desk, urgent):
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).strftime("%Y-%m-%d")
    away = await desk.a_practitioner(
        "Egk", hours=[{"weekday": day, "start": "00:00", "end": "00:00", "valid_from": "2040-01-01"} for day in (1, 7)],
        clinic=desk.walk_in,
    )  # fmt: skip
    assert tomorrow and await refused(walk_in(desk, urgent, practitioner_id=away)) == "SLOT_TAKEN"
    assert await refused(walk_in(desk, new_id())) == "VISIT_TYPE_UNKNOWN"
    unknown = pb.WalkInAppointmentRequest(patient_id=await desk.a_patient(), clinic_id=new_id(), visit_type_id=urgent)
    assert await refused(desk("WalkInAppointment", unknown)) == "CLINIC_UNKNOWN"


async def test_a_walk_in_takes_both_rights(desk, urgent):
    assert await refused(walk_in(desk, urgent, subject="books")) == "PERMISSION_MISSING"
    assert await refused(walk_in(desk, urgent, subject="receives")) == "PERMISSION_MISSING"
    hidden = await desk.a_patient()
    assert await refused(walk_in(desk, urgent, hidden, "books")) == "PERMISSION_MISSING"


async def test_who_comes_with_a_referral_is_seen_where_one_is_asked_for(desk, urgent):
    kind = await desk.a_visit_type("referred-walk-in", eligibility={"referral_required": True})
    assert await refused(walk_in(desk, kind)) == "NOT_ELIGIBLE"
    assert (await walk_in(desk, kind, based_on=[{"type": "Referral", "id": new_id()}])).id

"""Visits that another system had before: each is there once, takes its time, and nobody is told of it anew."""

import asyncio
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from care.patients.v1 import facts_pb2
from care.patients.v1.facts_pb2_grpc import FactsServiceServicer, add_FactsServiceServicer_to_server
from care.scheduling.v1 import appointments_pb2, directory_pb2
from care.scheduling.v1 import imports_pb2 as pb
from care.scheduling.v1.directory_pb2_grpc import PractitionersServiceStub
from care.scheduling.v1.imports_pb2_grpc import AppointmentImportsServiceStub

from chassis.errors import Invalid, NotFound, Problem, to_status
from chassis.ids import new_id
from chassis.wire import to_time
from services.scheduling import importing
from services.scheduling.appointment import Status
from services.scheduling.tests.desk import refused, soon

STATUS, OUTCOME = appointments_pb2.Appointment.Status, pb.ImportAppointmentResponse
ZONE = "America/New_York"


class Patients(FactsServiceServicer):
    """In place of patients: who has which record number."""

    known: dict[str, str] = {}

    async def GetPatientByIdentifier(self, request, context):
        if request.identifier.value not in self.known:
            status = to_status(NotFound()).SerializeToString()
            await context.abort(grpc.StatusCode.NOT_FOUND, "", (("grpc-status-details-bin", status),))
        return facts_pb2.PatientFound(patient_id=self.known[request.identifier.value])


@pytest.fixture(scope="module")
async def ines(desk):
    """Who imports: of no clinic at all."""
    server = grpc.aio.server()
    add_FactsServiceServicer_to_server(Patients(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    clients = desk.harness.servers["scheduling"].clients
    clients._peers = {**clients._peers, "patients": f"ipv4:127.0.0.1:{port}"}
    await desk.harness.staff("ines", ["appointments.import"])

    async def bring(patient, start=None, subject="ines", **more):
        named = {
            "patient_id": patient,
            "clinic_id": desk.clinic,
            "practitioner_id": desk.doctor,
            "visit_type_id": desk.visit,
        }
        named |= {"source_system": "old", "identifier": new_id(), **more}
        request = pb.ImportAppointmentRequest(**{key: value for key, value in named.items() if value})
        if start is not None:
            request.start_time.FromDatetime(start)
        return await desk.harness.call(
            "scheduling", AppointmentImportsServiceStub, "ImportAppointment", request, subject
        )

    yield bring
    await server.stop(None)


async def problem_of(awaitable):
    with pytest.raises(Problem) as caught:
        await awaitable
    return caught.value.reason, caught.value.metadata.get("field", "")


async def count(desk):
    return (await desk.sql("SELECT count(*) FROM appointment"))[0].count


async def test_a_visit_is_taken_over_once_and_keeps_what_it_is_called_there(desk, ines):
    patient, start = await desk.a_patient(), soon(3, 1)
    first = await ines(patient, start, identifier="A-1")
    assert first.outcome == OUTCOME.IMPORTED and not first.outside_hours
    again = await ines(patient, start, identifier="A-1")
    assert (again.outcome, again.appointment_id, again.differs) == (OUTCOME.ALREADY_THERE, first.appointment_id, False)
    elsewhere = await ines(await desk.a_patient(), soon(3, 2), identifier="A-1", source_system="another")
    assert elsewhere.outcome == OUTCOME.IMPORTED
    visit = await desk("GetAppointment", appointments_pb2.GetAppointmentRequest(id=first.appointment_id))
    assert visit.status == STATUS.BOOKED and visit.source_system == "old"
    assert [(one.system, one.value) for one in visit.identifiers] == [("old", "A-1")]
    ((kind, told),) = await desk.told(first.appointment_id, 1)
    assert (kind, told.imported, told.source_system) == ("appointment.booked", True, "old")
    moved = await ines(patient, soon(3, 4), identifier="A-1")
    assert moved.differs and to_time(moved.start_time) == start


async def test_of_two_imports_of_the_same_visit_at_once_one_writes_it(desk, ines):
    patient, start = await desk.a_patient(), soon(4, 1)
    answers = await asyncio.gather(*(ines(patient, start, identifier="twin") for _ in range(6)))
    assert sorted(one.outcome for one in answers) == [OUTCOME.IMPORTED, *[OUTCOME.ALREADY_THERE] * 5]
    assert len({one.appointment_id for one in answers}) == 1


async def test_an_imported_visit_goes_on_like_any_other(desk, ines):
    patient, start = await desk.a_patient(), soon(5, 1)
    brought = await ines(patient, start)
    assert await refused(desk.book(await desk.a_patient(), start)) == "SLOT_TAKEN"
    visit = await desk("GetAppointment", appointments_pb2.GetAppointmentRequest(id=brought.appointment_id))
    visit = await desk.move(visit, start + timedelta(hours=1))
    assert to_time(visit.start_time) == start + timedelta(hours=1)
    assert [told.imported for _, told in await desk.told(visit, 2)] == [True, False]
    await desk.book(await desk.a_patient(), start)


async def test_nobody_is_booked_over_what_stands_and_back_to_back_is_no_conflict(desk, ines):
    """Buffers of the visit type would refuse every second visit of a calendar that stood back to back."""
    buffered = await desk.a_visit_type("buffered", buffer_before_minutes=10, buffer_after_minutes=10)
    start = soon(6, 1)
    patient = await desk.a_patient()
    for number in range(3):
        brought = await ines(await desk.a_patient(), start + number * timedelta(minutes=30), visit_type_id=buffered)
        assert brought.outcome == OUTCOME.IMPORTED
    before = await count(desk)
    assert await problem_of(ines(patient, start + timedelta(minutes=45))) == ("SLOT_TAKEN", "")
    await ines(patient, start, practitioner_id=desk.other)
    third = await desk.a_practitioner("Chen")
    assert await problem_of(ines(patient, start, practitioner_id=third)) == ("PATIENT_BUSY", "")
    assert await count(desk) == before + 1
    # What was refused may be sent again once there is room.
    assert (await ines(patient, start + timedelta(hours=3), identifier="late")).outcome == OUTCOME.IMPORTED


async def test_an_expired_hold_is_in_nobodys_way(desk, ines):
    start = soon(7, 1)
    slots = (await desk.search(practitioner_ids=[desk.doctor], **window(start))).slots
    held = await desk.hold(await desk.a_patient(), slots[0], hold_seconds=3600)
    await desk.sql(
        "UPDATE occupancy SET expire_time = clock_timestamp() - interval '1 second' WHERE holder_id = :id", id=held.id
    )
    await desk.sql(
        "UPDATE appointment SET hold_expire_time = clock_timestamp() - interval '1 second' WHERE id = :id", id=held.id
    )
    brought = await ines(await desk.a_patient(), to_time(slots[0].start_time))
    assert brought.outcome == OUTCOME.IMPORTED


def window(start):
    return {"start_time": start, "end_time": start + timedelta(hours=2)}


async def test_a_room_is_taken_where_the_visit_needs_one(desk, ines):
    await desk.a_room("scanner-room")
    scan = await desk.a_visit_type("scan", resource_kinds=["scanner-room"])
    start = soon(8, 1)
    brought = await ines(await desk.a_patient(), start, visit_type_id=scan)
    visit = await desk("GetAppointment", appointments_pb2.GetAppointmentRequest(id=brought.appointment_id))
    assert {one.role for one in visit.participants} == {"patient", "practitioner", "room"}
    second = ines(await desk.a_patient(), start, visit_type_id=scan, practitioner_id=desk.other)
    assert (await problem_of(second))[0] == "SLOT_TAKEN"
    none = await desk.a_visit_type("dive", resource_kinds=["pool"])
    assert (await problem_of(ines(await desk.a_patient(), start, visit_type_id=none)))[0] == "OUTSIDE_HOURS"


async def test_what_lies_outside_of_hours_is_imported_and_said_to(desk, ines):
    nights = [{"weekday": day, "start": "20:00", "end": "21:00"} for day in range(1, 8)]
    owl = await desk.a_practitioner("Owl", nights)
    brought = await ines(await desk.a_patient(), soon(9, 16), practitioner_id=owl)
    assert brought.outcome == OUTCOME.IMPORTED and brought.outside_hours


async def test_a_time_beyond_the_calendar_is_refused_in_a_dry_run_too(desk, ines):
    """Placeholders such as 0001-01-01 and 9999-12-31 stand in real exports; nothing can be taken after 2105."""
    patient = await desk.a_patient()
    for local in ("0001-01-01T00:00", "0999-06-01T09:00", "3000-01-01T00:00", "9999-12-31T23:59:59"):
        for status in ("BOOKED", "FULFILLED", "CANCELLED"):
            wrong = ines(patient, local_start_time=local, status=status)
            assert await problem_of(wrong) == ("START_INVALID", "local_start_time")
    for local in ("2106-02-07T06:28", "2106-02-06T12:00", "2110-01-05T09:00"):
        for dry in (False, True):
            wrong = ines(patient, local_start_time=local, validate_only=dry)
            assert await problem_of(wrong) == ("START_INVALID", "local_start_time")
    ends = ines(patient, soon(9, 3), local_end_time="9999-12-31T23:59:59")
    assert await problem_of(ends) == ("END_INVALID", "local_end_time")
    far = await ines(patient, local_start_time="2105-12-31T09:00", status="CANCELLED")
    assert far.outcome == OUTCOME.IMPORTED
    beyond = datetime(2110, 1, 6, 15, tzinfo=UTC)
    assert await refused(desk.book(patient, beyond)) == "START_INVALID"
    found = await desk.search(start_time=beyond, end_time=beyond + timedelta(days=3))
    assert not found.slots


async def test_the_past_is_history_and_starts_nothing(desk, ines):
    """A survey about a visit of last year, a task for a no-show of 2024: history must not set off what news does."""
    past = datetime(2024, 5, 6, 14, 0, tzinfo=UTC)
    patient = await desk.a_patient()
    rows = await desk.sql("SELECT count(*) FROM occupancy")
    for number, status in enumerate(("FULFILLED", "NOSHOW", "CANCELLED")):
        brought = await ines(patient, past, status=status)  # all at once: nothing is taken
        assert STATUS.Name(brought.status) == status, number
        told = await desk.told(brought.appointment_id, 1)
        assert [kind for kind, _ in told] == ["appointment.imported"]
        assert told[0][1].status == status
        visit = await desk("GetAppointment", appointments_pb2.GetAppointmentRequest(id=brought.appointment_id))
        assert visit.cancelation_reason.code == ("other" if status == "CANCELLED" else "")
        assert await refused(desk.do("Revert", visit)) == "ILLEGAL_TRANSITION"
    assert await desk.sql("SELECT count(*) FROM occupancy") == rows
    ahead = await ines(patient, soon(10, 1), status="CANCELLED", cancelation_reason={"code": "pat"})
    assert ahead.status == STATUS.CANCELLED
    await desk.book(await desk.a_patient(), soon(10, 1))
    assert await problem_of(ines(patient, past)) == ("STATUS_UNFIT", "status")
    assert await problem_of(ines(patient, soon(10, 2), status="NOSHOW")) == ("STATUS_UNFIT", "status")
    wrong = ines(patient, past, status="CANCELLED", cancelation_reason={"code": "weather"})
    assert await problem_of(wrong) == ("REASON_UNKNOWN", "reason")
    assert (await problem_of(ines(patient, past, status="ARRIVED")))[0] == "FIELD_INVALID"


async def test_a_dry_run_answers_the_same_and_writes_nothing(desk, ines):
    patient, start = await desk.a_patient(), soon(11, 1)
    tables = ("appointment", "appointment_identifier", "occupancy", "bookable")
    before = [(await desk.sql(f"SELECT count(*) FROM {table}"))[0].count for table in tables]
    dry = await ines(patient, start, identifier="dry", validate_only=True)
    assert dry.outcome == OUTCOME.IMPORTED and not dry.appointment_id and dry.status == STATUS.BOOKED
    assert [(await desk.sql(f"SELECT count(*) FROM {table}"))[0].count for table in tables] == before
    real = await ines(patient, start, identifier="dry")
    assert (real.outcome, to_time(real.start_time), to_time(real.end_time)) == (
        dry.outcome, to_time(dry.start_time), to_time(dry.end_time),
    )  # fmt: skip
    again = await ines(patient, start, identifier="dry", validate_only=True)
    assert again.outcome == OUTCOME.ALREADY_THERE and again.appointment_id == real.appointment_id
    assert (await problem_of(ines(await desk.a_patient(), start, validate_only=True)))[0] == "SLOT_TAKEN"


async def test_who_and_where_are_found_by_what_the_other_system_calls_them(desk, ines):
    patient, key = await desk.a_patient(), {"system": "urn:mr", "value": "77"}
    Patients.known = {"77": patient, "78": new_id()}
    practitioner = directory_pb2.Practitioner(
        name={"family_name": "Dole"}, roles=[{"clinic_id": desk.clinic}], identifiers=[{"system": "npi", "value": "5"}]
    )
    await desk.directory(
        PractitionersServiceStub,
        "CreatePractitioner",
        directory_pb2.CreatePractitionerRequest(practitioner=practitioner),
    )
    by_name = {
        "patient": "",
        "practitioner_id": "",
        "visit_type_id": "",
        "patient_identifier": key,
        "practitioner_identifier": {"system": "npi", "value": "5"},
        "visit_type_code": "follow-up",
    }
    brought = await ines(start=soon(12, 1), **by_name)
    assert brought.patient_id == patient and brought.outside_hours  # Dole has no hours
    wrong = {
        "PATIENT_UNKNOWN patient_identifier": {"patient_identifier": {**key, "value": "79"}},
        "PRACTITIONER_UNKNOWN practitioner_identifier": {"practitioner_identifier": {"system": "npi", "value": "6"}},
        "VISIT_TYPE_UNKNOWN visit_type_code": {"visit_type_code": "nothing"},
        "CLINIC_UNKNOWN clinic_id": {"clinic_id": new_id()},
        "REFERENCE_MISSING patient_id": {"patient_identifier": None},
        "REFERENCE_MISSING visit_type_id": {"visit_type_code": ""},
    }
    for expected, more in wrong.items():
        assert " ".join(await problem_of(ines(start=soon(12, 2), **{**by_name, **more}))) == expected
    # Patients knows the second one, and nobody here has heard of a record.
    unheard = ines(start=soon(12, 2), **{**by_name, "patient_identifier": {**key, "value": "78"}})
    assert await problem_of(unheard) == ("PATIENT_UNKNOWN", "patient_identifier")


async def test_only_who_holds_the_permission_imports(desk, ines):
    assert await refused(ines(await desk.a_patient(), soon(13, 1), subject="cora")) == "PERMISSION_MISSING"


async def test_nobody_who_has_died_is_booked_but_their_past_is_kept(desk, ines):
    patient = await desk.a_patient()
    await desk.hear("patient.deceased", patient, deceased=True)
    await desk.until_known_dead(patient)
    assert (await problem_of(ines(patient, soon(13, 2))))[0] == "PATIENT_DECEASED"
    assert (await ines(patient, datetime(2025, 1, 7, 9, tzinfo=UTC), status="FULFILLED")).outcome == OUTCOME.IMPORTED


@pytest.mark.parametrize(
    ("local", "end", "expected", "minutes"),
    [
        ("2027-03-14T02:30", "", datetime(2027, 3, 14, 7, 30, tzinfo=UTC), 30),  # skipped: 03:30 EDT
        ("2027-11-07T01:30", "", datetime(2027, 11, 7, 5, 30, tzinfo=UTC), 30),  # twice: the first, EDT
        ("2027-11-07T00:30", "2027-11-07T02:30:00", datetime(2027, 11, 7, 4, 30, tzinfo=UTC), 180),
        ("2027-06-01T23:30:00", "2027-06-02T00:15", datetime(2027, 6, 2, 3, 30, tzinfo=UTC), 45),
    ],
)
def test_local_times_are_the_clinics(local, end, expected, minutes):
    start = importing.start_of(None, local, ZONE)
    assert start == expected
    assert importing.minutes_of(start, None, end, 0, 30, ZONE) == minutes


def test_times_that_say_nothing_or_too_much_are_refused():
    at = datetime(2027, 6, 1, 12, tzinfo=UTC)
    for instant, local in (
        (None, ""),
        (at, "2027-06-01T12:00"),
        (None, "2027-02-30T12:00"),
        (at.replace(microsecond=1), ""),
    ):
        with pytest.raises(Invalid, match="START_INVALID"):
            importing.start_of(instant, local, ZONE)
    for end, minutes in ((at, 0), (at - timedelta(minutes=5), 0), (at + timedelta(seconds=90), 0),
                         (at + timedelta(days=1, minutes=1), 0), (at + timedelta(hours=1), 30)):  # fmt: skip
        with pytest.raises(Invalid, match="END_INVALID"):
            importing.minutes_of(at, end, "", minutes, 30, ZONE)


def test_what_has_begun_and_is_not_over_is_still_ahead():
    now = datetime(2027, 6, 1, 12, tzinfo=UTC)
    assert importing.status_of("BOOKED", now + timedelta(minutes=1), now) is Status.BOOKED

"""Group sessions over real gRPC: seats, waitlist, and nobody learns of anybody else."""

import asyncio
from datetime import timedelta

import pytest
from care.scheduling.v1 import appointments_pb2, requests_pb2
from care.scheduling.v1 import sessions_pb2 as pb
from care.scheduling.v1.requests_pb2_grpc import SchedulingRequestsServiceStub
from care.scheduling.v1.sessions_pb2_grpc import SessionsServiceStub
from sqlalchemy import text

from chassis.ids import new_id
from services.scheduling.tests.desk import WORK, refused, soon

DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
Status = appointments_pb2.Appointment


class Sessions:
    def __init__(self, desk):
        self.desk = desk

    async def ask(self, method, request, subject="tess"):
        return await self.desk.harness.call("scheduling", SessionsServiceStub, method, request, subject)

    async def make(self, capacity=3, waitlist=2, doctor="", start=None):
        request = pb.CreateSessionRequest(
            name="Moving well", visit_type_id=self.desk.visit, clinic_id=self.desk.clinic,
            practitioner_id=doctor or await self.desk.a_practitioner("Teacher"), capacity=capacity,
            waitlist_size=waitlist,
        )  # fmt: skip
        request.start_time.FromDatetime(start or soon(9))
        return await self.ask("CreateSession", request)

    async def enroll(self, session, patient, *, waitlist=False):
        request = pb.EnrollSessionRequest(id=session.id, patient_id=patient, join_waitlist=waitlist)
        return await self.ask("EnrollSession", request)

    async def get(self, session, subject="tess"):
        return await self.ask("GetSession", pb.GetSessionRequest(id=session.id), subject)

    async def seats(self, session, subject="tess"):
        request = appointments_pb2.ListAppointmentsRequest(session_ids=[session.id])
        return list((await self.desk("ListAppointments", request, subject)).appointments)


@pytest.fixture(scope="module")
async def sessions(desk):
    await desk.harness.staff("tess", [*WORK, "sessions.write"], clinics=[desk.clinic])
    return Sessions(desk)


async def test_a_session_takes_its_teacher_once_and_each_seat_only_its_patient(desk, sessions):
    teacher = await desk.a_practitioner("Once")
    session = await sessions.make(doctor=teacher)
    patients = [await desk.a_patient() for _ in range(3)]
    seats = [await sessions.enroll(session, patient) for patient in patients]
    assert [one.seat_no for one in seats] == [1, 2, 3] and {one.status for one in seats} == {Status.BOOKED}
    for seat, patient in zip(seats, patients, strict=True):
        assert [one.actor.id for one in seat.participants] == [patient]
    taken = await desk.sql(
        "SELECT b.kind, count(*) FROM occupancy o JOIN bookable b ON b.no = o.no WHERE o.holder_id = ANY(:ids) GROUP BY 1",
        ids=[session.id, *(one.id for one in seats)],
    )
    assert dict(map(tuple, taken)) == {"practitioner": 1, "patient": 3}
    assert await refused(desk.book(await desk.a_patient(), soon(9), teacher)) == "SLOT_TAKEN"
    assert await refused(desk.book(patients[0], soon(9), desk.other)) == "PATIENT_BUSY"
    assert await refused(sessions.enroll(session, patients[0])) == "ALREADY_ENROLLED"
    assert await refused(sessions.enroll(session, await desk.a_patient())) == "SESSION_FULL"
    assert await refused(desk.move(seats[0], soon(10))) == "IN_SESSION"


async def test_no_participant_learns_of_another(desk, sessions):
    session = await sessions.make()
    one, other = await desk.a_patient(), await desk.a_patient()
    for patient in (one, other):
        await sessions.enroll(session, patient)
    read = ["appointments.read", "availability.search"]
    await desk.harness.staff("pia", read, kind="PATIENT", principal_id=one)
    shown = await sessions.get(session, "pia")
    assert (shown.enrolled, shown.waiting, shown.capacity) == (2, 0, 3)
    assert other not in str(shown)
    assert [seat.patient_id for seat in await sessions.seats(session, "pia")] == [one]
    assert {seat.patient_id for seat in await sessions.seats(session)} == {one, other}
    assert await sessions.seats(session, "elias") == []


async def test_the_waitlist_moves_up_in_order_when_a_seat_is_given_back(desk, sessions):
    """Wave (cal.diy#17354): who stands by for a session has the place of who calls off."""
    session = await sessions.make(capacity=1)
    first = await sessions.enroll(session, await desk.a_patient())
    busy, free = await desk.a_patient(), await desk.a_patient()
    waits = [await sessions.enroll(session, patient, waitlist=True) for patient in (busy, free)]
    assert {one.status for one in waits} == {Status.WAITLIST} and {one.seat_no for one in waits} == {0}
    assert await refused(sessions.enroll(session, await desk.a_patient(), waitlist=True)) == "SESSION_FULL"
    assert await refused(desk.do("Book", waits[0])) == "ILLEGAL_TRANSITION"
    await desk.book(busy, soon(9), desk.other)
    await desk.do("Cancel", first, reason={"code": "pat"})
    # Who is elsewhere then is passed over and keeps the place; the next one has the seat at once.
    shown = {one.patient_id: one for one in await sessions.seats(session)}
    assert (shown[free].status, shown[free].seat_no) == (Status.BOOKED, 1)
    assert shown[busy].status == Status.WAITLIST
    assert [kind for kind, _ in await desk.told(waits[1], 2)] == ["appointment.waitlisted", "appointment.booked"]
    assert (await sessions.get(session)).waiting == 1


async def test_a_death_gives_the_seat_to_the_next(desk, sessions):
    session = await sessions.make(capacity=1)
    gone, next_one = await desk.a_patient(), await desk.a_patient()
    await sessions.enroll(session, gone)
    await sessions.enroll(session, next_one, waitlist=True)
    await desk.hear("patient.deceased", gone)
    await desk.until_known_dead(gone)
    seats = {one.patient_id: one.status for one in await sessions.seats(session)}
    assert seats == {gone: Status.CANCELLED, next_one: Status.BOOKED}
    assert await refused(sessions.enroll(await sessions.make(), gone)) == "PATIENT_DECEASED"


async def test_moving_and_cancelling_a_session_moves_and_cancels_every_seat(desk, sessions):
    session = await sessions.make(capacity=2)
    patients = [await desk.a_patient() for _ in range(3)]
    seats = [await sessions.enroll(session, patient, waitlist=True) for patient in patients]
    request = pb.RescheduleSessionRequest(id=session.id)
    request.start_time.FromDatetime(soon(9) + timedelta(minutes=15))  # into its own old time
    moved = await sessions.ask("RescheduleSession", request)
    assert {one.start_time.seconds for one in await sessions.seats(session)} == {moved.start_time.seconds}
    assert [kind for kind, _ in await desk.told(seats[0], 2)][1] == "appointment.rescheduled"
    request.start_time.FromDatetime(soon(10))
    await desk.book(patients[1], soon(10), desk.other)
    assert await refused(sessions.ask("RescheduleSession", request)) == "PATIENT_BUSY"
    assert (await sessions.get(session)).start_time == moved.start_time
    cancelled = await sessions.ask("CancelSession", pb.CancelSessionRequest(id=session.id, reason={"code": "prov"}))
    assert (cancelled.status, cancelled.enrolled, cancelled.waiting) == (pb.Session.CANCELLED, 0, 0)
    assert {one.status for one in await sessions.seats(session)} == {Status.CANCELLED}
    left = await desk.sql(
        "SELECT 1 FROM occupancy WHERE holder_id = ANY(:ids)", ids=[session.id, *(s.id for s in seats)]
    )
    assert left == []
    assert await refused(sessions.enroll(session, patients[0])) == "SESSION_CLOSED"


async def test_forty_patients_for_ten_seats(desk, sessions):
    """cal.diy#13397: parallel requests for the last place all got it."""
    session = await sessions.make(capacity=10, waitlist=0)
    patients = [await desk.a_patient() for _ in range(40)]
    deadlocks = (await desk.sql(DEADLOCKS))[0][0]
    answers = await asyncio.gather(
        *(sessions.enroll(session, patient) for patient in patients), return_exceptions=True
    )  # fmt: skip
    won = [one for one in answers if not isinstance(one, BaseException)]
    assert sorted(one.seat_no for one in won) == list(range(1, 11))
    assert {one.reason for one in answers if isinstance(one, BaseException)} == {"SESSION_FULL"}
    # Half give theirs back while others ask: no seat twice, none lost.
    more = await asyncio.gather(
        *(desk.do("Cancel", one, reason={"code": "pat"}) for one in won[:5]),
        *(sessions.enroll(session, patient) for patient in [await desk.a_patient() for _ in range(5)]),
        return_exceptions=True,
    )
    assert {one.reason for one in more if isinstance(one, BaseException)} <= {"SESSION_FULL"}
    seats = [one.seat_no for one in await sessions.seats(session) if one.status == Status.BOOKED]
    assert len(seats) == len(set(seats)) and set(seats) <= set(range(1, 11))
    assert (await desk.sql(DEADLOCKS))[0][0] == deadlocks


async def test_who_may_not_have_such_a_visit_has_no_seat_either(desk, sessions):
    """A class for established patients, with a referral: the rules of its visit type are the seat's."""
    usual = desk.visit
    desk.visit = await desk.a_visit_type(f"class-{new_id()}", eligibility={"referral_required": True})
    try:
        session = await sessions.make()
        patient = await desk.a_patient()
        assert await refused(sessions.enroll(session, patient)) == "NOT_ELIGIBLE"
        request = pb.EnrollSessionRequest(
            id=session.id, patient_id=patient, based_on=[{"type": "Referral", "id": new_id()}]
        )
        seat = await sessions.ask("EnrollSession", request)
        assert (seat.seat_no, seat.based_on[0].type) == (1, "Referral")
    finally:
        desk.visit = usual


async def test_within_the_lock_out_nobody_moves_up(desk, sessions):
    usual = desk.visit
    desk.visit = await desk.a_visit_type(f"late-class-{new_id()}", lock_out_minutes=10 * 24 * 60)
    try:
        session = await sessions.make(capacity=1)
        first = await sessions.enroll(session, await desk.a_patient())
        waits = await sessions.enroll(session, await desk.a_patient(), waitlist=True)
        await desk.do("Cancel", first, reason={"code": "pat"})
        shown = {one.id: one.status for one in await sessions.seats(session)}
        assert shown[waits.id] == Status.WAITLIST
        assert (await sessions.enroll(session, await desk.a_patient())).seat_no == 1  # by hand it is to be had
    finally:
        desk.visit = usual


async def test_a_seat_answers_the_request_for_a_visit_also_when_it_is_had_by_moving_up(desk, sessions):
    await desk.harness.staff("rolf", ["requests.ask", "requests.read"], clinics=[desk.clinic])

    async def requests(method, request):
        return await desk.harness.call("scheduling", SchedulingRequestsServiceStub, method, request, "rolf")

    async def wait_for(patient):
        wanted = requests_pb2.SchedulingRequest(patient_id=patient, clinic_id=desk.clinic)
        asked = await requests(
            "CreateSchedulingRequest", requests_pb2.CreateSchedulingRequestRequest(scheduling_request=wanted)
        )
        request = pb.EnrollSessionRequest(
            id=session.id, patient_id=patient, join_waitlist=True,
            based_on=[{"type": "SchedulingRequest", "id": asked.id}],
        )  # fmt: skip
        return asked, await sessions.ask("EnrollSession", request)

    async def stands(asked):
        found = await requests("GetSchedulingRequest", requests_pb2.GetSchedulingRequestRequest(id=asked.id))
        return requests_pb2.SchedulingRequest.Status.Name(found.status)

    session = await sessions.make(capacity=1)
    (one, seat), (other, _) = await wait_for(await desk.a_patient()), await wait_for(await desk.a_patient())
    assert (await stands(one), await stands(other)) == ("BOOKED", "OPEN")
    await desk.do("Cancel", seat, reason={"code": "pat"})
    assert (await stands(one), await stands(other)) == ("OPEN", "BOOKED")
    asked, _ = await wait_for(await desk.a_patient())
    session = await update(sessions, await sessions.get(session), capacity=2)
    assert (session.enrolled, await stands(asked)) == (2, "BOOKED")
    await sessions.ask("CancelSession", pb.CancelSessionRequest(id=session.id, reason={"code": "prov"}))
    assert (await stands(other), await stands(asked)) == ("OPEN", "OPEN")


async def test_what_a_session_is_called_is_for_who_takes_part_and_for_staff_who_may_know(desk, sessions):
    """A name such as "Moving on after miscarriage" says of each who comes why; times are looked for by anybody."""
    usual = desk.visit
    desk.visit = await desk.a_visit_type(f"group-{new_id()}", discreet_name="Group", security_labels=["ETH"])
    try:
        await desk.harness.staff("clara", [*WORK, "sessions.write"], clinics=[desk.clinic], clearances=["ETH"])
        session = await sessions.make()
    finally:
        desk.visit = usual
    member, stranger = await desk.a_patient(), await desk.a_patient()
    request = pb.EnrollSessionRequest(id=session.id, patient_id=member)
    await sessions.ask("EnrollSession", request, "clara")
    read = ["appointments.read", "availability.search"]
    await desk.harness.staff("minna", read, kind="PATIENT", principal_id=member)
    await desk.harness.staff("stella", read, kind="PATIENT", principal_id=stranger)
    await desk.harness.staff("bot", ["availability.search"], clinics=[desk.clinic], clearances=["ETH"])
    names = {who: (await sessions.get(session, who)).name for who in ("clara", "tess", "stella", "bot")}
    assert names == {"clara": "Moving well", "tess": "Group", "stella": "Group", "bot": "Group"}
    # Who may not know the name and sends back what was read, with more seats, doesn't overwrite it.
    await update(sessions, await sessions.get(session), name="Group", capacity=4)
    assert (await sessions.get(session, "clara")).name == "Moving well"
    assert (await sessions.get(await sessions.make())).name == "Moving well"
    # The seat is labelled like its visit type; a patient reads all of their own.
    assert (await sessions.get(session, "minna")).name == "Moving well"
    listed = await sessions.ask(
        "ListSessions", pb.ListSessionsRequest(visit_type_ids=[session.visit_type_id]), "stella"
    )
    assert [one.name for one in listed.sessions] == ["Group"]


async def test_other_clinics_staff_lock_nothing_of_a_session_that_isnt_theirs_to_move(desk, sessions):
    """They were refused, but only once all who take part had been locked."""
    session = await sessions.make()
    seat = await sessions.enroll(session, await desk.a_patient())
    await desk.harness.staff("olga", [*WORK, "sessions.write"], clinics=[new_id()])
    cancel = pb.CancelSessionRequest(id=session.id, reason={"code": "prov"})
    async with desk.database.engine.begin() as connection:  # somebody has the seat in hand
        await connection.execute(text("SELECT 1 FROM appointment WHERE id = :id FOR UPDATE"), {"id": seat.id})
        async with asyncio.timeout(2):
            assert await refused(sessions.ask("CancelSession", cancel, "olga")) == "NOT_FOUND"


async def update(sessions, session, subject="tess", etag="", **values):
    request = pb.UpdateSessionRequest(
        session={"id": session.id, **values}, update_mask={"paths": list(values)}, etag=etag or session.etag
    )
    return await sessions.ask("UpdateSession", request, subject)


async def test_more_seats_go_to_who_waits_in_their_order_and_fewer_than_taken_there_are_none(desk, sessions):
    session = await sessions.make(capacity=1, waitlist=4, start=soon(31))
    patients = [await desk.a_patient() for _ in range(5)]
    for patient in patients:
        await sessions.enroll(session, patient, waitlist=True)
    await desk.book(patients[1], soon(31), desk.other)  # elsewhere by now
    session = await sessions.get(session)
    wider = await update(sessions, session, capacity=3, name="Moving better", waitlist_size=1)
    assert (wider.enrolled, wider.waiting, wider.capacity, wider.name) == (3, 2, 3, "Moving better")
    seated = {one.patient_id for one in await sessions.seats(session) if one.status == Status.BOOKED}
    assert seated == {patients[0], patients[2], patients[3]}
    assert await refused(update(sessions, session, capacity=4)) == "ETAG_MISMATCH"
    assert await refused(update(sessions, wider, capacity=2)) == "SEATS_TAKEN"
    assert await refused(update(sessions, wider, capacity=0)) == "CAPACITY_INVALID"
    assert await refused(update(sessions, wider, name=" ")) == "CAPACITY_INVALID"
    assert await refused(update(sessions, wider, clinic_id=new_id())) == "FIELD_FIXED"
    assert await refused(update(sessions, wider, "elias", capacity=9)) == "PERMISSION_MISSING"
    assert (await sessions.get(session)).etag == wider.etag
    # A seat above a number that was lowered counts: seat 3 of 2.
    for _ in range(2):
        first = next(one for one in await sessions.seats(session) if one.seat_no == 1)
        await desk.do("Cancel", first, reason={"code": "pat"})
    fewer = await update(sessions, await sessions.get(session), capacity=2)
    assert (fewer.enrolled, fewer.capacity) == (2, 2)
    assert await refused(sessions.enroll(session, await desk.a_patient())) == "SESSION_FULL"
    ((_, told),) = [one for one in await desk.told(session, 3, pb.SessionEvent) if one[0] == "session.updated"][:1]
    assert told.capacity == 3


async def test_seats_that_are_added_while_people_join_are_given_once(desk, sessions):
    session = await sessions.make(capacity=2, waitlist=20, start=soon(33))
    patients = [await desk.a_patient() for _ in range(12)]
    for patient in patients[:6]:
        await sessions.enroll(session, patient, waitlist=True)
    session = await sessions.get(session)
    await asyncio.gather(
        update(sessions, session, capacity=7),
        *(sessions.enroll(session, patient, waitlist=True) for patient in patients[6:]),
    )
    now = await sessions.get(session)
    assert (now.enrolled, now.waiting) == (7, 5)
    assert sorted(one.seat_no for one in await sessions.seats(session) if one.seat_no) == list(range(1, 8))

"""Clearing a practitioner's days over gRPC: nobody is moved against their wish, no visit is lost, none is doubled."""

import asyncio
import json
import sys
from datetime import UTC, timedelta
from zoneinfo import ZoneInfo

import pytest
from care.scheduling.v1 import clearings_pb2 as pb
from care.scheduling.v1 import directory_pb2
from care.scheduling.v1 import requests_pb2 as wishes_pb
from care.scheduling.v1.clearings_pb2_grpc import ClearingsServiceStub
from care.scheduling.v1.directory_pb2_grpc import SchedulesServiceStub
from care.scheduling.v1.requests_pb2_grpc import SchedulingPreferencesServiceStub

from chassis.ids import new_id
from services.scheduling.clearing_work import CLEARINGS, _look, _see_to_one
from services.scheduling.tests.desk import WORK, refused, soon

Status = pb.ClearingVisit.Status
NEW_YORK = ZoneInfo("America/New_York")


@pytest.fixture(scope="module")
async def clearer(desk):
    await desk.harness.staff("mona", [*WORK, "appointments.clear"], clinics=[desk.clinic])
    server = desk.harness.servers["scheduling"]
    server.settings.clearing_settle = 0.3
    yield Clearer(desk)


class Clearer:
    """Mona's calls."""

    def __init__(self, desk):
        self.desk = desk
        self.runtime = desk.harness.servers["scheduling"].runtime

    async def __call__(self, method, request):
        return await self.desk.harness.call("scheduling", ClearingsServiceStub, method, request, "mona")

    async def clear(self, practitioner, day, **more):
        request = pb.ClearDayRequest(id=practitioner, date=day.date().isoformat(), reason={"code": "prov-pers"}, **more)
        return await self("ClearDay", request)

    async def wish(self, patient, clinics=(), **may_be_moved):
        wishes = wishes_pb.SchedulingPreferences(may_be_moved=may_be_moved, clinic_ids=clinics)
        request = wishes_pb.SetSchedulingPreferencesRequest(patient_id=patient, preferences=wishes)
        await self.desk.harness.call(
            "scheduling", SchedulingPreferencesServiceStub, "SetSchedulingPreferences", request, "mona"
        )

    async def read(self, clearing):
        return await self("GetClearing", pb.GetClearingRequest(id=clearing.id))

    async def done(self, clearing):
        async with asyncio.timeout(20):
            while (now := await self.read(clearing)).status != pb.Clearing.DONE:
                self.runtime.loops[CLEARINGS].wake()
                await asyncio.sleep(0.1)
        return now

    async def found(self, clearing, count):
        async with asyncio.timeout(20):
            while (await self.read(clearing)).affected < count:
                await _look(self.runtime)

    async def visits(self, clearing):
        found = await self("ListClearingVisits", pb.ListClearingVisitsRequest(clearing_id=clearing.id, page_size=200))
        return {one.appointment_id: one for one in found.clearing_visits}


async def a_day(desk, count=3, days=20):
    """A practitioner with a colleague's day full of visits, 30 minutes each from 15:00 UTC on."""
    doctor = await desk.a_practitioner(f"Away {new_id()[-4:]}")
    day = soon(days)
    visits = [await desk.book(await desk.a_patient(), day + timedelta(minutes=30 * n), doctor) for n in range(count)]
    return doctor, day, visits


def start(visit):
    return visit.start_time.ToDatetime(tzinfo=UTC)


async def test_a_preview_says_what_would_become_of_each_and_writes_nothing(clearer, desk):
    doctor, day, visits = await a_day(desk)
    await clearer.wish(visits[0].patient_id, within_days=30, same_practitioner=True)
    before = await desk.sql("SELECT id, version FROM appointment ORDER BY id")
    first = await clearer.clear(doctor, day, preview=True, page_size=2)
    rest = await clearer.clear(doctor, day, preview=True, page_size=2, page_token=first.next_page_token)
    outcomes = [one.status for one in (*first.visits, *rest.visits)]
    assert outcomes == [Status.MOVED, Status.OFFERED, Status.OFFERED] and not rest.next_page_token
    assert first.clearing.affected == 2 and first.clearing.moved == 1 and not first.clearing.id
    for one in (*first.visits, *rest.visits):
        assert 1 <= len(one.offers) <= 3
        best = one.offers[0]
        assert best.practitioner_id == doctor and best.start_time.ToDatetime(tzinfo=UTC).date() > day.date()
    assert len({one.offers[0].start_time.seconds for one in first.visits}) == 2
    assert await desk.sql("SELECT id, version FROM appointment ORDER BY id") == before
    assert await desk.sql("SELECT 1 FROM schedule WHERE practitioner_id = :id AND exceptions <> '[]'", id=doctor) == []


async def test_who_allows_it_is_moved_others_are_offered_a_held_time_and_nothing_new_is_booked(clearer, desk):
    """Reported elsewhere, leave over booked visits: they are never left standing unseen, and never moved without a right to."""
    doctor, day, visits = await a_day(desk)
    allowed, asked, hold_only = visits
    await clearer.wish(allowed.patient_id, within_days=30, same_practitioner=True)
    held = (await desk.search(practitioner_ids=[doctor], start_time=day + timedelta(hours=3))).slots[0]
    hold = await desk.hold(await desk.a_patient(), held)
    clearing = (await clearer.clear(doctor, day)).clearing
    assert clearing.status == pb.Clearing.RUNNING
    done = await clearer.done(clearing)
    assert (done.affected, done.moved, done.offered, done.gone, done.left, done.pending) == (4, 1, 2, 1, 0, 0)
    outcome = await clearer.visits(clearing)
    moved = await desk.do("Get", allowed)
    assert outcome[allowed.id].status == Status.MOVED and start(moved).date() > day.date()
    assert moved.practitioner_id == doctor and moved.schedule_version == allowed.schedule_version + 1
    for one in (asked, hold_only):
        assert outcome[one.id].status == Status.OFFERED and start(await desk.do("Get", one)) == start(one)
        assert (await desk.do("Get", outcome[one.id].hold_id)).patient_id == one.patient_id
    assert outcome[hold.id].status == Status.GONE
    assert await refused(desk.book(await desk.a_patient(), day + timedelta(hours=5), doctor)) == "OUTSIDE_HOURS"
    accepted = await clearer("AcceptClearingVisit", pb.AcceptClearingVisitRequest(id=outcome[asked.id].id))
    assert accepted.status == Status.MOVED
    after = await desk.do("Get", asked)
    assert after.start_time == accepted.offers[0].start_time and after.id == asked.id
    await desk.do("Release", outcome[hold_only.id].hold_id)
    late = pb.AcceptClearingVisitRequest(id=outcome[hold_only.id].id)
    assert await refused(clearer("AcceptClearingVisit", late)) == "HOLD_EXPIRED"
    assert await desk.overlaps() == []
    # A second clearing of the day closes nothing twice, and offers nobody a second time who waits for an answer.
    again = await clearer.done((await clearer.clear(doctor, day)).clearing)
    assert again.affected == 0
    rows = await desk.sql("SELECT exceptions FROM schedule WHERE practitioner_id = :id", id=doctor)
    assert len(rows[0].exceptions) == 1


async def test_a_visit_on_a_referral_is_offered_another_time_as_any_other(clearer, desk):
    kind = await desk.a_visit_type("referred", eligibility={"referral_required": True})
    doctor, based_on = await desk.a_practitioner("Refers"), [{"type": "Referral", "id": new_id()}]
    day = soon(21)
    visit = await desk.book(await desk.a_patient(), day, doctor, visit_type_id=kind, based_on=based_on)
    done = await clearer.done((await clearer.clear(doctor, day)).clearing)
    assert (done.affected, done.offered, done.left) == (1, 1, 0)
    assert start(await desk.do("Get", visit)) == day


async def test_a_visit_that_was_cancelled_or_moved_meanwhile_is_left_alone(clearer, desk):
    doctor, day, (cancelled, stays) = await a_day(desk, 2)
    await clearer.wish(stays.patient_id, within_days=60)
    loop = clearer.runtime.loops[CLEARINGS]
    await loop.stop()
    try:
        clearing = (await clearer.clear(doctor, day)).clearing
        await clearer.found(clearing, 2)
        await desk.do("Cancel", cancelled, reason={"code": "pat"})
        while await _see_to_one(clearer.runtime):
            pass
        outcome = await clearer.visits(clearing)
        assert outcome[cancelled.id].status == Status.GONE and outcome[stays.id].status == Status.MOVED
        # One that looked at the hours just before they were closed is found by the second look.
        await desk.sql("UPDATE schedule SET exceptions = '[]' WHERE practitioner_id = :id", id=doctor)
        late = await desk.book(await desk.a_patient(), day + timedelta(hours=4), doctor)
        await clearer.found(clearing, 3)
        assert late.id in await clearer.visits(clearing)
    finally:
        restart(clearer, desk)


def restart(clearer, desk):
    server = desk.harness.servers["scheduling"]
    (loop,) = [one for one in server.service.loops if one.name == CLEARINGS]
    server.runtime.loops[CLEARINGS] = loop.start(server.runtime)


async def test_two_workers_and_one_killed_in_the_middle_lose_and_double_no_visit(clearer, desk):
    doctor, day, visits = await a_day(desk, 12, days=30)
    for one in visits[:8]:
        await clearer.wish(one.patient_id, within_days=60)
    await clearer.runtime.loops[CLEARINGS].stop()
    worker = await _start_worker(desk)
    try:
        clearing = (await clearer.clear(doctor, day)).clearing
        await clearer.found(clearing, 12)
        for _ in range(3):  # it is in the middle of the fourth
            async with asyncio.timeout(20):
                assert await worker.stdout.readline() == b"done\n"
        worker.kill()
        await worker.wait()
    finally:
        if worker.returncode is None:
            worker.kill()
            await worker.wait()
    part = await clearer.read(clearing)
    assert part.affected == 12 and 3 <= part.affected - part.pending < 12

    async def work():
        while await _see_to_one(clearer.runtime):
            pass

    await asyncio.gather(work(), work())
    restart(clearer, desk)
    done = await clearer.done(clearing)
    assert (done.affected, done.moved, done.offered, done.left) == (12, 8, 4, 0)
    standing = await desk.sql(
        "SELECT count(*) AS visits, count(DISTINCT start_time) AS times FROM appointment WHERE practitioner_id = :id"
        " AND status = 'BOOKED'",
        id=doctor,
    )
    assert standing[0] == (12, 12)
    moves = await desk.sql(
        "SELECT id FROM appointment a, jsonb_array_elements(history) s WHERE practitioner_id = :id"
        " AND s->>'action' = 'reschedule' GROUP BY id HAVING count(*) > 1",
        id=doctor,
    )
    assert moves == [] and await desk.overlaps() == []
    holds = await desk.sql("SELECT count(*) AS held FROM appointment WHERE practitioner_id = :id AND status = 'PENDING'",
                           id=doctor)  # fmt: skip
    assert holds[0].held == 4


async def _start_worker(desk):
    server = desk.harness.servers["scheduling"]
    values = {
        "environment": "test",
        "database_url": str(server.settings.database_url),
        "bus": desk.harness.bus._url if hasattr(desk.harness.bus, "_url") else desk._bus_url,
        "signing_secret": "test",
        "service_key_file": str(desk.harness.key_files["scheduling"]),
        "service_keys_file": str(desk.harness.services_file),
    }
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.scheduling.tests.clearing_worker", json.dumps(values),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip


async def test_a_clearing_that_is_wrong_is_refused_with_its_reason(clearer, desk):
    day = soon(3)
    assert await refused(clearer.clear(new_id(), day)) == "NOT_FOUND"
    assert await refused(clearer.clear(desk.doctor, day, clinic_id=new_id())) == "CLINIC_UNKNOWN"
    assert await refused(clearer.clear(desk.doctor, soon(-3))) == "PERIOD_INVALID"
    assert await refused(clearer.clear(desk.doctor, day, last_date=soon(60).date().isoformat())) == "PERIOD_INVALID"
    wrong = pb.ClearDayRequest(id=desk.doctor, date="2027-02-30")
    assert await refused(clearer("ClearDay", wrong)) == "DATE_INVALID"
    assert await refused(clearer("GetClearing", pb.GetClearingRequest(id=new_id()))) == "NOT_FOUND"


async def test_the_same_request_id_clears_once(clearer, desk):
    doctor, day, _ = await a_day(desk, 1, days=25)
    key = new_id()
    first, second = [(await clearer.clear(doctor, day, request_id=key)).clearing for _ in range(2)]
    assert first.id == second.id
    rows = await desk.sql("SELECT 1 FROM clearing WHERE practitioner_id = :id", id=doctor)
    assert len(rows) == 1
    schedules = await desk.harness.call(
        "scheduling", SchedulesServiceStub, "ListSchedules",
        directory_pb2.ListSchedulesRequest(practitioner_ids=[doctor]), "mona",
    )  # fmt: skip
    assert [one.date for one in schedules.schedules[0].exceptions] == [day.date().isoformat()]


async def test_an_offer_is_accepted_though_somebody_was_overbooked_over_its_hold(clearer, desk):
    """The held time was promised: what is permitted to share it since, shares it with the visit too."""
    crowded = await desk.a_visit_type(f"crowded-{new_id()}", overbooking_cap=2)
    doctor = await desk.a_practitioner(f"Away {new_id()[-4:]}")
    day = soon(26)
    visit = await desk.book(await desk.a_patient(), day, doctor, visit_type_id=crowded)
    clearing = (await clearer.clear(doctor, day)).clearing
    await clearer.done(clearing)
    row = (await clearer.visits(clearing))[visit.id]
    hold = await desk.do("Get", row.hold_id)
    over = await desk.book(
        await desk.a_patient(), start(hold), hold.practitioner_id, "sam", visit_type_id=crowded,
        overbooking={"reason": "urgent"},
    )  # fmt: skip
    assert over.overbooking == 1
    assert (await clearer("AcceptClearingVisit", pb.AcceptClearingVisitRequest(id=row.id))).status == Status.MOVED
    moved = await desk.do("Get", visit)
    assert (moved.start_time, moved.practitioner_id) == (hold.start_time, hold.practitioner_id)
    assert {one.status for one in moved.participants} == {visit.participants[0].status}
    left = await desk.sql(
        "SELECT holder_id::text, expire_time FROM occupancy WHERE holder_id = ANY(:ids)", ids=[visit.id, hold.id]
    )
    assert {tuple(one) for one in left} == {(visit.id, None)} and len(left) == len(moved.participants)
    assert await refused(desk.book(await desk.a_patient(), start(hold), hold.practitioner_id)) == "SLOT_TAKEN"
    assert await desk.overlaps() == []


async def test_colleagues_of_another_clinic_are_considered_where_the_patient_has_named_it(clearer, desk):
    """Only those who share a specialty there, and only at clinics that the stored wishes name."""
    knees = {"specialties": [{"code": f"knees-{new_id()}"}]}
    elsewhere = await desk.a_clinic()
    doctor = await desk.a_practitioner(f"Knees {new_id()[-4:]}", role=knees, hours=())
    day = soon(24)
    local = str(day.astimezone(NEW_YORK).date())
    # Only this one day: there is no later time with the same practitioner.
    await desk.hours(doctor, [], exceptions=[{"date": local, "kind": "EXTRA", "start": "00:00", "end": "00:00"}])
    colleague = await desk.a_practitioner("There", clinic=elsewhere, role=knees)
    await desk.a_practitioner("Hips", clinic=elsewhere)
    visits = [await desk.book(await desk.a_patient(), day + timedelta(minutes=30 * n), doctor) for n in range(3)]
    await clearer.wish(visits[0].patient_id, clinics=[elsewhere], within_days=30)
    await clearer.wish(visits[1].patient_id, clinics=[elsewhere], within_days=30, same_clinic=True)
    seen = {one.appointment_id: one for one in (await clearer.clear(doctor, day, preview=True)).visits}
    moved, kept, stays = (seen[one.id] for one in visits)
    assert moved.status == Status.MOVED
    assert {(one.clinic_id, one.practitioner_id) for one in moved.offers} == {(elsewhere, colleague)}
    assert kept.status == Status.OFFERED and kept.offers[0].clinic_id == elsewhere
    assert stays.status == Status.LEFT and not stays.offers
    clearing = (await clearer.clear(doctor, day)).clearing
    await clearer.done(clearing)
    after = await desk.do("Get", visits[0])
    assert (after.clinic_id, after.practitioner_id) == (elsewhere, colleague)
    assert await desk.overlaps() == []


async def test_cleared_days_are_listed_for_the_staff_of_their_clinics(desk, clearer):
    doctor, day, _ = await a_day(desk, count=2, days=60)
    first = (await clearer.clear(doctor, day)).clearing
    await clearer.done(first)
    second = (await clearer.clear(doctor, day + timedelta(days=1))).clearing
    await clearer.done(second)

    async def listed(subject="mona", **more):
        request = pb.ListClearingsRequest(**{"practitioner_ids": [doctor], **more})
        return await desk.harness.call("scheduling", ClearingsServiceStub, "ListClearings", request, subject)

    found = await listed()
    assert [one.id for one in found.clearings] == [second.id, first.id]
    assert found.clearings[1].affected == 2 and found.clearings[1] == await clearer.read(first)
    page = await listed(page_size=1)
    assert [one.id for one in (await listed(page_size=1, page_token=page.next_page_token)).clearings] == [first.id]
    later = (day + timedelta(days=1)).date().isoformat()
    assert [one.id for one in (await listed(date_from=later)).clearings] == [second.id]
    assert len((await listed(clinic_ids=[desk.clinic], statuses=["DONE"])).clearings) == 2
    assert not (await listed(clinic_ids=[new_id()])).clearings and not (await listed(statuses=["RUNNING"])).clearings
    assert not (await listed("elias")).clearings
    await desk.harness.staff("pat", ["appointments.read"], kind="PATIENT", principal_id=new_id())
    assert not (await listed("pat")).clearings

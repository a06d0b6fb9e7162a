"""Booked twice is impossible: 64 clients fight for 20 practitioners' 20 slots over real gRPC, and nobody can."""

import asyncio
import multiprocessing
import random
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta

import grpc
import pytest
from care.scheduling.v1 import appointments_pb2 as pb
from care.scheduling.v1.appointments_pb2_grpc import AppointmentsServiceStub
from sqlalchemy import event, text

from chassis.errors import problem_from_rpc
from services.scheduling.tests.desk import refused, soon

CLIENTS, ATTEMPTS = 64, 10_000
PRACTITIONERS, SLOTS, ROOMS, PATIENTS = 20, 20, 14, 160
LOST = {("ALREADY_EXISTS", "SLOT_TAKEN"), ("ALREADY_EXISTS", "PATIENT_BUSY")}
TOO_LATE = {("FAILED_PRECONDITION", "HOLD_EXPIRED"), ("FAILED_PRECONDITION", "ILLEGAL_TRANSITION")}

# Rows of occupancy that are missing or left over, by the appointments' own words.
CROOKED = """
SELECT a.id, a.status FROM appointment a
  LEFT JOIN LATERAL (SELECT count(*) AS rows FROM occupancy o
                      WHERE o.tenant_id = a.tenant_id AND o.holder_id = a.id) o ON true
 WHERE o.rows <> CASE WHEN a.status = 'CANCELLED' THEN 0 ELSE jsonb_array_length(a.participants) END
"""
CLAIM = "INTO idempotency_key"  # the first of every transaction that a call begins
DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


class Fight:
    """The clients, what they have, and what came of what they tried. Runs in a process of its own: two cores, two sides."""

    def __init__(self, target, metadata, offers, patients, seed):
        self.stub = AppointmentsServiceStub(grpc.aio.insecure_channel(target))
        self.metadata, self.patients = metadata, patients
        self.offers = [pb.Slot.FromString(offer) for offer in offers]
        self.random = random.Random(seed)
        self.attempts = 0
        self.won, self.lost, self.late = Counter(), Counter(), Counter()
        self.slowest = Counter()
        self.booked = {}

    async def run(self):
        """Counts by kind, and the seconds that it took."""
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self.client())
        return self.attempts, time.monotonic() - started, self.won, self.lost, self.late, dict(self.slowest)

    async def call(self, method, request):
        """(answer, None) or (None, (code, reason))."""
        started = time.perf_counter()
        try:
            return await getattr(self.stub, method)(request, metadata=self.metadata, timeout=30), None
        except grpc.RpcError as error:
            problem = problem_from_rpc(error)
            return None, (problem.code.name, problem.reason)
        finally:
            self.slowest[method] = max(self.slowest[method], time.perf_counter() - started)

    async def take(self, what, method, request):
        """One attempt to take something; losers must all hear the same."""
        self.attempts += 1
        answer, refusal = await self.call(method, request)
        if refusal is None:
            self.won[what] += 1
        elif refusal in TOO_LATE and what == "move":
            self.late[refusal[1]] += 1
        else:
            assert refusal in LOST, (what, refusal)
            self.lost[refusal[1]] += 1
        return answer

    async def client(self):
        while self.attempts < ATTEMPTS:
            step = self.random.random()
            offer = self.random.choice(self.offers)
            patient = self.random.choice(self.patients)
            if step < 0.30:
                request = pb.HoldAppointmentRequest(
                    patient_id=patient, offer_token=offer.offer_token, hold_seconds=self.random.choice((1, 1, 2, 3))
                )
                held = await self.take("hold", "HoldAppointment", request)
                if held is not None:
                    await asyncio.sleep(self.random.choice((0, 0.3, 1.0, 1.3)))
                    await self.book(held)
            elif step < 0.62:
                request = pb.CreateAppointmentRequest(patient_id=patient, offer_token=offer.offer_token)
                self.keep(await self.take("book", "CreateAppointment", request))
            elif step < 0.80 and self.booked:
                visit = self.any_visit()
                self.keep(await self.move(visit, offer))
            elif step < 0.90 and len(self.booked) > 1:
                await self.swap(self.any_visit(), self.any_visit())
            elif self.booked:
                visit = self.booked.pop(self.any_visit().id)
                request = pb.CancelAppointmentRequest(id=visit.id, reason={"code": "pat"})
                _, refusal = await self.call("CancelAppointment", request)
                assert refusal is None or refusal in TOO_LATE, refusal

    async def book(self, held):
        answer, refusal = await self.call("BookAppointment", pb.BookAppointmentRequest(id=held.id))
        assert refusal is None or refusal in TOO_LATE, refusal
        if refusal is not None:
            self.late[refusal[1]] += 1
        self.keep(answer)

    async def move(self, visit, to):
        request = pb.RescheduleAppointmentRequest(
            id=visit.id, clinic_id=to.clinic_id, practitioner_id=to.practitioner_id, start_time=to.start_time
        )
        return await self.take("move", "RescheduleAppointment", request)

    async def swap(self, one, other):
        for moved in await asyncio.gather(self.move(one, other), self.move(other, one)):
            self.keep(moved)

    def any_visit(self):
        return self.booked[self.random.choice(list(self.booked))]

    def keep(self, visit):
        if visit is not None:
            self.booked[visit.id] = visit


def fight(*what):
    """A fight from beginning to end, as the clients' process runs it."""

    async def run():
        return await Fight(*what).run()

    return asyncio.run(run())


@pytest.mark.slow
@pytest.mark.alone
async def test_64_clients_can_not_book_anything_twice(desk):
    """Race: cal.diy#13397, PR#28151 and CloudMeet#43 looked whether a time was free and booked it afterwards."""
    visit = await desk.a_visit_type("fought-for", buffer_after_minutes=5, resource_kinds=["exam-room"])
    doctors = [await desk.a_practitioner(f"Doctor {number}") for number in range(PRACTITIONERS)]
    for _ in range(ROOMS):
        await desk.a_room("exam-room")
    patients = [await desk.a_patient() for _ in range(PATIENTS)]
    start = soon(days=3, hour=6)
    offers, token = [], ""
    window = {"start_time": start, "end_time": start + timedelta(minutes=15 * SLOTS)}
    while not offers or token:
        page = await desk.search(visit, practitioner_ids=doctors, page_size=200, page_token=token, **window)
        offers += page.slots
        token = page.next_page_token
    assert len(offers) == PRACTITIONERS * SLOTS
    ((deadlocks,),) = await desk.sql(DEADLOCKS)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        fought = asyncio.get_running_loop().run_in_executor(
            pool,
            fight,
            f"127.0.0.1:{desk.harness.servers['scheduling'].port}",
            desk.harness.as_user("cora"),
            [offer.SerializeToString() for offer in offers],
            patients,
            seed,
        )
        while not fought.done():  # no two at once at any time, not only in the end
            await asyncio.wait({fought}, timeout=3)
            assert not await desk.overlaps()
        attempts, seconds, won, lost, late, slowest = await fought
    await asyncio.sleep(1.5)  # what PostgreSQL counts comes to light within a second
    print(
        f"{attempts} attempts in {seconds:.0f} s ({attempts / seconds:.0f}/s), won {dict(won)}, lost {dict(lost)},"
        f" too late {dict(late)}, slowest { ({name: round(took, 2) for name, took in slowest.items()}) }"
    )
    assert attempts >= ATTEMPTS
    assert not await desk.overlaps()
    assert not await desk.sql(CROOKED)
    assert lost["SLOT_TAKEN"] > 1000 and min(won[what] for what in ("hold", "book", "move")) > 50
    assert late["HOLD_EXPIRED"], "some holds were too old to be booked"
    ((after,),) = await desk.sql(DEADLOCKS)
    assert after == deadlocks
    assert desk.database.deadlocks._value.get() == 0
    assert '"INTERNAL"' not in desk.harness.log_of("scheduling")


async def test_two_visits_that_swap_places_do_not_deadlock(desk):
    start = soon(days=9)
    for turn in range(15):
        base = start + timedelta(hours=2 * turn)
        one = await desk.book(await desk.a_patient(), base)
        other = await desk.book(await desk.a_patient(), base, desk.other)
        third = await desk.book(await desk.a_patient(), base + timedelta(minutes=30))
        outcomes = await asyncio.gather(
            desk.move(one, base, practitioner_id=desk.other),
            desk.move(other, base, practitioner_id=desk.doctor),
            desk.move(third, base),
            desk.move(one, base + timedelta(minutes=30)),
            return_exceptions=True,
        )
        reasons = {getattr(outcome, "reason", "moved") for outcome in outcomes}
        assert reasons <= {"moved", "SLOT_TAKEN"}, reasons
    assert not await desk.overlaps()
    ((deadlocks,),) = await desk.sql(DEADLOCKS)
    assert deadlocks == 0


async def test_of_16_rivals_for_one_slot_one_wins_and_the_others_hear_so(desk):
    """Race: cal.diy#13397; aea-investors#21 asks that concurrent attempts produce no more than one confirmed."""
    start = soon(days=13)
    times = []
    for turn in range(10):
        base = start + timedelta(hours=turn)
        patients = [await desk.a_patient() for _ in range(16)]

        async def book(patient, base=base):
            began = time.perf_counter()
            try:
                await desk.book(patient, base)
            except Exception as problem:
                times.append(time.perf_counter() - began)
                return problem.reason
            return "booked"

        outcomes = Counter(await asyncio.gather(*(book(patient) for patient in patients)))
        assert outcomes == {"booked": 1, "SLOT_TAKEN": 15}
    times.sort()
    print(f"losers: median {times[len(times) // 2] * 1000:.0f} ms, p99 {times[int(len(times) * 0.99)] * 1000:.0f} ms")


# -- rivals in one process ---------------------------------------------------------------------------------------------


@asynccontextmanager
async def held_up(desk):
    """Nobody can claim a key meanwhile: whoever is first stays at work, and the others come to wait."""
    async with desk.database.engine.begin() as connection:
        await connection.execute(text("LOCK TABLE idempotency_key IN SHARE MODE"))
        yield


@contextmanager
def sent(desk, words=CLAIM):
    """Statements of transactions with these words."""
    heard = []

    def hear(_connection, _cursor, statement, *_rest):
        if words in statement:
            heard.append(statement)

    event.listen(desk.database.engine.sync_engine, "before_cursor_execute", hear)
    yield heard
    event.remove(desk.database.engine.sync_engine, "before_cursor_execute", hear)


def lines(desk):
    return desk.harness.servers["scheduling"].runtime.rivals._lines


async def come(desk, *calls):
    """Start calls one after the other, each when the one before it stands in the queue."""
    tasks = []
    for call in calls:
        tasks.append(asyncio.create_task(call))
        async with asyncio.timeout(2):
            while sum(line.here for line in lines(desk).values()) < len(tasks):
                await asyncio.sleep(0.005)
    return tasks


async def outcomes_of(tasks):
    """Answers, or the reasons for which there are none."""
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    return [getattr(answer, "reason", answer) for answer in answers]


async def test_rivals_who_wait_are_refused_without_a_transaction(desk):
    start, patients = soon(days=30), [await desk.a_patient() for _ in range(16)]
    (slot, *_) = (await desk.search(start_time=start, practitioner_ids=[desk.doctor])).slots
    with sent(desk) as claimed:
        async with held_up(desk):
            # By offer or by name, to hold or to book: it is one time of one practitioner.
            holding = [desk.hold(patient, slot) for patient in patients[:8]]
            booking = [desk.book(patient, start, request_id=f"rival {patient}") for patient in patients[8:]]
            tasks = await come(desk, *booking[:4], *holding, *booking[4:])
            assert len(claimed) == len(lines(desk)) == 1
        first, *others = await outcomes_of(tasks)
    assert first.patient_id == patients[8]
    assert others == ["SLOT_TAKEN"] * 15
    assert len(claimed) == 1
    assert not lines(desk)
    audited = await desk.sql(
        "SELECT 1 FROM audit WHERE outcome = 'ALREADY_EXISTS' AND subject_ids[1] = ANY(:ids)", ids=patients
    )
    assert len(audited) == 15


async def test_when_the_first_rival_fails_the_next_one_has_the_time(desk):
    start, busy = soon(days=31), await desk.a_patient()
    await desk.book(busy, start, desk.other)
    patients = [await desk.a_patient() for _ in range(4)]
    with sent(desk) as claimed:
        async with held_up(desk):
            tasks = await come(desk, desk.book(busy, start), *(desk.book(patient, start) for patient in patients))
        refusal, next_one, *others = await outcomes_of(tasks)
    assert refusal == "PATIENT_BUSY"
    assert next_one.patient_id == patients[0]
    assert others == ["SLOT_TAKEN"] * 3
    assert len(claimed) == 2


async def test_a_rival_that_had_its_answer_already_gets_it_again(desk):
    start, winner, late = soon(days=32), await desk.a_patient(), await desk.a_patient()
    before = await desk.book(late, start, request_id="long ago")
    await desk.do("Cancel", before, reason={"code": "pat"})
    async with held_up(desk):
        tasks = await come(
            desk, desk.book(winner, start, request_id="now"), desk.book(late, start, request_id="long ago")
        )
        twin = asyncio.create_task(desk.book(winner, start, request_id="now"))
        other_body = asyncio.create_task(desk.book(late, start, request_id="long ago", comment="changed"))
    answer, replayed, of_twin, reused = await outcomes_of([*tasks, twin, other_body])
    assert answer.patient_id == winner and of_twin == answer
    assert replayed == before
    assert reused == "IDEMPOTENCY_KEY_REUSED"


async def test_a_rival_whose_twin_wins_elsewhere_while_it_looks_gets_that_answer(desk):
    first = desk.harness.servers["scheduling"]
    second = desk.harness.build(first.service, first.settings.database_url, principal_cache=60.0)
    await desk.harness.hear_patients(second)
    await second.start()
    elsewhere = AppointmentsServiceStub(grpc.aio.insecure_channel(f"127.0.0.1:{second.port}"))
    start, patient = soon(days=44), await desk.a_patient()
    (slot, *_) = (await desk.search(start_time=start, practitioner_ids=[desk.doctor])).slots
    held = await desk.hold(await desk.a_patient(), slot)
    request = pb.CreateAppointmentRequest(
        patient_id=patient,
        visit_type_id=desk.visit,
        clinic_id=desk.clinic,
        practitioner_id=desk.doctor,
        request_id="of two replicas",
    )
    request.start_time.FromDatetime(start)
    contest = first.pipeline.methods["care.scheduling.v1.AppointmentsService/CreateAppointment"].contest
    found, won = contest.look, []

    async def look(*wanted):
        if not won:
            await desk.do("Release", held)
            won.append(await elsewhere.CreateAppointment(request, metadata=desk.harness.as_user("cora"), timeout=10))
        await found(*wanted)

    try:
        async with held_up(desk):
            object.__setattr__(contest, "look", look)
            front = desk.book(await desk.a_patient(), start)
            tasks = await come(desk, front, desk.book(patient, start, request_id="of two replicas"))
        front, answer = await outcomes_of(tasks)
        assert (front, getattr(answer, "id", answer)) == ("SLOT_TAKEN", won[0].id)
    finally:
        object.__setattr__(contest, "look", found)
        await second.stop()


async def test_a_crowd_hears_what_one_hears_and_not_whether_the_time_is_taken(desk):
    start = soon(days=5, hour=3)
    await desk.book(await desk.a_patient(), start)
    late = await desk.a_visit_type("week-ahead", minimum_notice_minutes=7 * 24 * 60)
    for _ in range(3):
        patients = [await desk.a_patient() for _ in range(16)]
        outcomes = await asyncio.gather(
            *(refused(desk.book(patient, start, visit_type_id=late)) for patient in patients)
        )
        assert Counter(outcomes) == {"OUTSIDE_HOURS": 16}


async def test_a_rival_who_may_not_see_the_patient_hears_only_that(desk):
    start, patients = soon(days=34), [await desk.a_patient() for _ in range(3)]
    async with held_up(desk):
        first, *others = patients
        strangers = [desk.book(patient, start, subject="elias") for patient in others]
        tasks = await come(desk, desk.book(first, start), *strangers)
    booked, *refusals = await outcomes_of(tasks)
    assert booked.patient_id == first
    assert refusals == ["NOT_FOUND"] * 2
    # Nor does it who is first.
    assert await refused(desk.book(others[0], start, subject="elias")) == "NOT_FOUND"


async def test_who_overbooks_waits_for_nobody_and_is_not_refused(desk):
    visit, start = await desk.a_visit_type("doubled", overbooking_cap=3), soon(days=35)
    patients, over = [await desk.a_patient() for _ in range(5)], {"reason": "walked in with fever"}
    await desk.book(await desk.a_patient(), start)
    async with held_up(desk):
        tasks = await come(desk, *(desk.book(patient, start, visit_type_id=visit) for patient in patients[:3]))
        more = [
            asyncio.create_task(desk.book(one, start, subject="sam", visit_type_id=visit, overbooking=over))
            for one in patients[3:]
        ]
        await asyncio.sleep(0.1)
        assert [line.here for line in lines(desk).values()] == [3]
    assert {visit.overbooking for visit in await asyncio.gather(*more)} == {1, 2}
    assert await outcomes_of(tasks) == ["SLOT_TAKEN"] * 3


async def test_rivals_who_give_up_keep_nobody_waiting(desk):
    start, patients = soon(days=36), [await desk.a_patient() for _ in range(6)]
    async with held_up(desk):
        tasks = await come(desk, *(desk.book(patient, start) for patient in patients))
        gone = [tasks.pop(0), tasks.pop(1)]  # who is at work, and who waits
        for one in gone:
            one.cancel()
        await asyncio.wait(gone)
        async with asyncio.timeout(2):
            while [line.here for line in lines(desk).values()] != [4]:
                await asyncio.sleep(0.005)
    outcomes = await outcomes_of(tasks)
    assert outcomes[0].patient_id == patients[1]
    assert outcomes[1:] == ["SLOT_TAKEN"] * 3
    assert not lines(desk)


async def test_a_time_that_was_given_back_is_had_by_the_next_rival(desk):
    start, patients = soon(days=37), [await desk.a_patient() for _ in range(3)]
    before = await desk.book(patients[0], start, request_id="given back")
    await desk.do("Cancel", before, reason={"code": "pat"})
    with sent(desk) as claimed, sent(desk, "FROM record_subject") as confirmed:
        async with held_up(desk):
            # The first one's answer is of long ago: the others look, and find the time free.
            replay = desk.book(patients[0], start, request_id="given back")
            tasks = await come(desk, replay, *(desk.book(patient, start) for patient in patients[1:]))
        replayed, booked, lost = await outcomes_of(tasks)
    assert replayed == before
    assert booked.patient_id == patients[1] and lost == "SLOT_TAKEN"
    # Who looked and goes on confirms it all in its own transaction.
    assert len(claimed) == len(confirmed) == 2
    assert not lines(desk)


async def test_rivals_at_two_replicas_have_one_winner(desk):
    first = desk.harness.servers["scheduling"]
    second = desk.harness.build(first.service, first.settings.database_url, principal_cache=60.0)
    await desk.harness.hear_patients(second)
    await second.start()
    stubs = [
        AppointmentsServiceStub(grpc.aio.insecure_channel(f"127.0.0.1:{server.port}")) for server in (first, second)
    ]
    metadata = desk.harness.as_user("cora")
    try:
        for turn in range(6):
            start = soon(days=38) + timedelta(hours=turn)
            patients = [await desk.a_patient() for _ in range(16)]

            async def book(number, patient, start=start):
                request = pb.CreateAppointmentRequest(
                    patient_id=patient, visit_type_id=desk.visit, clinic_id=desk.clinic, practitioner_id=desk.doctor
                )
                request.start_time.FromDatetime(start)
                try:
                    await stubs[number % 2].CreateAppointment(request, metadata=metadata, timeout=10)
                except grpc.RpcError as error:
                    return problem_from_rpc(error).reason
                return "booked"

            outcomes = Counter(await asyncio.gather(*(book(*one) for one in enumerate(patients))))
            assert outcomes == {"booked": 1, "SLOT_TAKEN": 15}
        assert not await desk.overlaps()
        assert not second.runtime.rivals._lines
    finally:
        await second.stop()


async def test_a_hold_that_expires_under_many_eyes_goes_to_one_of_them(desk):
    start = soon(days=16)
    (slot, *_) = (await desk.search(start_time=start, practitioner_ids=[desk.doctor])).slots
    held = await desk.hold(await desk.a_patient(), slot, hold_seconds=1)
    patients = [await desk.a_patient() for _ in range(16)]
    ends = held.hold_expire_time.ToDatetime(tzinfo=UTC)

    async def book(patient):
        while True:
            try:
                return await desk.book(patient, start)
            except Exception as problem:
                assert problem.reason == "SLOT_TAKEN"
                if winners:
                    return None
            await asyncio.sleep(0.02)

    winners = []

    async def one(patient):
        answer = await book(patient)
        if answer is not None:
            winners.append(answer)

    await asyncio.gather(*(one(patient) for patient in patients))
    (winner,) = winners
    assert datetime.now(UTC) >= ends
    assert [one.action for one in winner.history] == ["book"]
    ended = await desk("GetAppointment", pb.GetAppointmentRequest(id=held.id))
    assert pb.Appointment.Status.Name(ended.status) == "CANCELLED" and ended.history[-1].action == "expire"

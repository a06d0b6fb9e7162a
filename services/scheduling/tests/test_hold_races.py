"""A hold is booked or it expires, never both: real calls against the loop that ends holds, in the very second."""

import asyncio
import random
import time
from collections import Counter
from datetime import timedelta

import asyncpg
import pytest
from care.scheduling.v1 import appointments_pb2 as pb

from chassis.errors import Problem
from services.scheduling.tests.desk import Counted, refused, soon
from services.scheduling.tests.replica import seeded, two_replicas
from services.scheduling.tests.test_booking_races import CROOKED, DEADLOCKS

Status = pb.Appointment.Status
ENDS = """
WITH rows AS (
  UPDATE occupancy SET expire_time = clock_timestamp() + make_interval(secs => :after) WHERE holder_id = :id
)
UPDATE appointment SET hold_expire_time = clock_timestamp() + make_interval(secs => :after) WHERE id = :id
"""


async def held(desk, count, start):
    """Holds on times of their own."""
    doctors = [await desk.a_practitioner(f"Holder {number}") for number in range(4)]
    patients = [await desk.a_patient() for _ in range(count // 20 + 1)]
    slots = []
    for doctor in doctors:
        wanted, token = -(-count // len(doctors)), ""
        while wanted > 0:
            page = await desk.search(
                practitioner_ids=[doctor], start_time=start, end_time=start + timedelta(days=60), page_size=200,
                page_token=token,
            )  # fmt: skip
            apart = list(page.slots)[::2][:wanted]  # every half hour
            slots += apart
            wanted, token = wanted - len(apart), page.next_page_token
    # A patient is at one place at a time: the times of one doctor differ, those of another are a patient's of his own.
    by_time = Counter()
    for slot in slots[:count]:
        at = slot.start_time.seconds
        while len(patients) <= by_time[at]:
            patients.append(await desk.a_patient())
        slot.clinic_id, by_time[at] = slot.clinic_id, by_time[at] + 1
    turn, holds, room = Counter(), [], asyncio.Semaphore(12)

    async def hold(slot, patient):
        async with room:
            holds.append(await desk.hold(patient, slot, hold_seconds=3600))

    async with asyncio.TaskGroup() as group:
        for slot in slots[:count]:
            at = slot.start_time.seconds
            group.create_task(hold(slot, patients[turn[at]]))
            turn[at] += 1
    return holds


async def race(desk, count, seed):
    """Book each of `count` holds around the instant at which it expires."""
    holds = await held(desk, count, soon(days=20, hour=0))
    ids, heard, chance, took = [one.id for one in holds], {}, random.Random(seed), 0.05

    async def client():
        nonlocal took
        while holds:
            one = holds.pop()
            # Within about two calls' time, however slow the machine is.
            await desk.sql(ENDS, id=one.id, after=chance.uniform(0, 2 * took))
            began = time.perf_counter()
            try:
                heard[one.id] = (await desk.do("Book", one)).status
            except Problem as problem:
                heard[one.id] = problem.reason
            took = 0.8 * took + 0.2 * (time.perf_counter() - began)

    async with asyncio.TaskGroup() as group:
        for _ in range(12):
            group.create_task(client())
    async with asyncio.timeout(30):  # the loop ends the others
        while await desk.sql(
            "SELECT 1 FROM appointment WHERE id = ANY(CAST(:ids AS uuid[])) AND status = 'PENDING'", ids=ids
        ):
            await asyncio.sleep(0.1)
    return ids, heard


async def judge(desk, ids, heard):
    """What the clients heard is what stands, and what was told."""
    outcomes = Counter(str(one) for one in heard.values())
    print(f"{len(ids)} holds: {dict(outcomes)}")
    assert set(heard.values()) <= {Status.BOOKED, "HOLD_EXPIRED"}, outcomes
    rows = await desk.sql(
        "SELECT a.id::text, a.status, jsonb_array_length(a.participants) AS parts, a.history->-1->>'action' AS last,"
        " (SELECT count(*) FROM occupancy o WHERE o.holder_id = a.id AND o.expire_time IS NULL) AS kept,"
        " (SELECT count(*) FROM occupancy o WHERE o.holder_id = a.id) AS rows"
        " FROM appointment a WHERE a.id = ANY(CAST(:ids AS uuid[]))",
        ids=ids,
    )
    for row in rows:
        if heard[row.id] == Status.BOOKED:
            assert (row.status, row.last, row.kept, row.rows) == ("BOOKED", "book", row.parts, row.parts), row
        else:
            assert (row.status, row.last, row.rows) == ("CANCELLED", "expire", 0), row
    connection = await asyncpg.connect(desk._bus_url)
    try:
        async with asyncio.timeout(20):
            told = {}
            while len(told) < len(ids) or min(told.values()) < 2:
                found = await connection.fetch(
                    "SELECT key, count(*) AS n FROM log WHERE key = ANY($1) GROUP BY key", ids
                )
                told = {row["key"]: row["n"] for row in found}
                await asyncio.sleep(0.1)
    finally:
        await connection.close()
    assert set(told.values()) == {2}, "held, and one end of it"
    return outcomes


async def test_a_hold_that_is_booked_while_it_expires_has_one_end(desk):
    """Race, confirm against expire (cal.diy#10789, #29958): PENDING is busy with a time to live, and ends once."""
    ids, heard = await race(desk, 120, 7)
    outcomes = await judge(desk, ids, heard)
    assert min(outcomes[str(Status.BOOKED)], outcomes["HOLD_EXPIRED"]) > 5, "both must have happened"
    assert not await desk.sql(CROOKED)


@pytest.mark.soak
async def test_five_thousand_holds_that_are_booked_while_they_expire_have_one_end_each(desk):
    """Race, confirm against expire (cal.diy#10789, #29958), at two replicas of which each ends holds too."""
    seed, ends = seeded(), Counter()
    ((deadlocks,),) = await desk.sql(DEADLOCKS)
    async with two_replicas(desk):
        for turn in range(10):
            ids, heard = await race(desk, 500, seed + turn)
            ends += await judge(desk, ids, heard)
            assert not await desk.sql(CROOKED)
            await desk.sql("DELETE FROM occupancy WHERE holder_id = ANY(CAST(:ids AS uuid[]))", ids=ids)
            await desk.sql("DELETE FROM appointment WHERE id = ANY(CAST(:ids AS uuid[]))", ids=ids)
    print(f"all: {dict(ends)}")
    assert ends.total() == 5_000 and min(ends.values()) > 500
    await asyncio.sleep(1.5)
    ((after,),) = await desk.sql(DEADLOCKS)
    assert after == deadlocks


# -- several resources at once ----------------------------------------------------------------------------------------


async def scramble(desk, attempts, seed):
    """Bookings, moves and cancellations that want people, rooms and devices in any order; answers what they heard."""
    tag = f"both-{seed}"
    visit = await desk.a_visit_type(tag, resource_kinds=[f"room-{seed}", f"device-{seed}"], overbooking_cap=1)
    doctors = [await desk.a_practitioner(f"Scrambled {number}") for number in range(3)]
    for kind in ("room", "device"):
        for _ in range(2):
            await desk.a_room(f"{kind}-{seed}")
    patients = [await desk.a_patient() for _ in range(8)]
    chance, start, standing, heard = random.Random(seed), soon(days=60 + seed % 60, hour=0), [], Counter()

    async def client():
        while sum(heard.values()) < attempts:
            doctor, patient = chance.choice(doctors), chance.choice(patients)
            at, step = start + timedelta(minutes=15 * chance.randrange(8)), chance.random()
            try:
                if step < 0.5 or not standing:
                    more = {"overbooking": {"reason": "scramble"}} if step < 0.1 else {}
                    standing.append(await desk.book(patient, at, doctor, "sam", visit_type_id=visit, **more))
                elif step < 0.85:
                    await desk.move(chance.choice(standing), at, "sam", practitioner_id=doctor)
                else:
                    await desk.do(
                        "Cancel", standing.pop(chance.randrange(len(standing))), "sam", reason={"code": "pat"}
                    )
                heard["done"] += 1
            except Problem as problem:
                heard[problem.reason] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(16):
            group.create_task(client())
    return heard


_FINE = {
    "done", "SLOT_TAKEN", "PATIENT_BUSY", "ILLEGAL_TRANSITION", "OVERBOOKING_CAP_REACHED", "CHANGED_MEANWHILE",
}  # fmt: skip


async def test_people_rooms_and_devices_wanted_in_any_order_do_not_deadlock(desk):
    """Multi-resource (cal.diy#13745, openemr#13552): all or nothing, whoever asks for them in whatever order."""
    await scrambled(desk, 150, random.randrange(1 << 20))


@pytest.mark.soak
async def test_twelve_thousand_who_want_people_rooms_and_devices_in_any_order_do_not_deadlock(desk):
    """Multi-resource (cal.diy#13745, openemr#13552), at two replicas."""
    async with two_replicas(desk):
        await scrambled(desk, 12_000, seeded())


async def scrambled(desk, attempts, seed):
    """Scramble, and look at what is left."""
    ((before,),) = await desk.sql(DEADLOCKS)
    began = time.monotonic()
    heard = await scramble(desk, attempts, seed)
    print(f"{heard.total()} attempts in {time.monotonic() - began:.0f} s: {dict(heard)}")
    assert set(heard) <= _FINE and heard["done"] > 20, heard
    assert not await desk.overlaps()
    assert not await desk.sql(CROOKED)
    await asyncio.sleep(1.1)  # what PostgreSQL counts comes to light within a second
    ((after,),) = await desk.sql(DEADLOCKS)
    assert after == before and desk.database.deadlocks._value.get() == 0


async def test_a_visit_that_shares_only_its_room_is_flagged_as_overbooked(desk):
    """Override (medplum#10278): whatever is shared by permission, the record says so."""
    visit = await desk.a_visit_type("one-room", resource_kinds=["one-room"], overbooking_cap=1)
    await desk.a_room("one-room")
    start, other = soon(days=17, hour=9), await desk.a_practitioner("Shares")
    first = await desk.book(await desk.a_patient(), start, visit_type_id=visit)
    over = {"reason": "no other room"}
    second = await desk.book(await desk.a_patient(), start, other, subject="sam", visit_type_id=visit, overbooking=over)
    assert (first.overbooking, second.overbooking) == (0, 1)
    assert not await desk.overlaps()


async def test_the_original_of_an_overbooked_time_goes_and_nobody_finds_it_free(desk):
    """Override (medplum#10278): a visit that stands in a lane of its own still stands when the first one is cancelled."""
    visit = await desk.a_visit_type("shared-time", overbooking_cap=2)
    start = soon(days=12, hour=9)
    first = await desk.book(await desk.a_patient(), start, visit_type_id=visit)
    over = {"reason": "fever"}
    second = await desk.book(await desk.a_patient(), start, subject="sam", visit_type_id=visit, overbooking=over)
    window = {"start_time": start, "end_time": start + timedelta(minutes=1), "practitioner_ids": [desk.doctor]}
    for gone, reason in ((first, "SLOT_TAKEN"), (second, "")):
        await desk.do("Cancel", gone, reason={"code": "pat"})
        assert bool((await desk.search(visit, **window)).slots) is (reason == "")
        if reason:
            assert await refused(desk.book(await desk.a_patient(), start, visit_type_id=visit)) == reason
    await desk.book(await desk.a_patient(), start, visit_type_id=visit)


async def test_what_a_hold_sends_to_the_database(desk):
    """BEGIN and COMMIT among them: each is a round trip, and a slot that is fought for is held for all of them."""
    patient = await desk.a_patient()
    (slot, *_) = (await desk.search(start_time=soon(days=13, hour=9))).slots
    with Counted(desk.database.engine) as counted:
        await desk.hold(patient, slot)
    assert len(counted.statements) == 7, counted.statements
    assert [counted.statements[0], counted.statements[-1]] == ["BEGIN", "COMMIT"]

"""The copy of the calendar that searches look at: it says what the database says, at every replica, at once."""

import asyncio
import random
import time
from datetime import UTC, timedelta

import asyncpg
import grpc
import pytest
from care.scheduling.v1 import appointments_pb2 as pb
from care.scheduling.v1 import availability_views_pb2 as views_pb2
from care.scheduling.v1.appointments_pb2_grpc import AvailabilityServiceStub
from care.scheduling.v1.availability_views_pb2_grpc import AvailabilityViewsServiceStub
from sqlalchemy import event

from chassis.errors import Problem
from chassis.ids import new_id
from services.scheduling import mirror, service, snapshot
from services.scheduling.finding import Search, free_slots
from services.scheduling.service import SERVICE
from services.scheduling.tests.desk import refused, soon


class Replica:
    """Another server of the service on the same database."""

    def __init__(self, desk, server, channel):
        self._desk, self.server, self._channel = desk, server, channel

    async def search(self, **more):
        request = pb.SearchAvailabilityRequest(visit_type_id=more.pop("visit", self._desk.visit), **more)
        return await self._call(AvailabilityServiceStub, "SearchAvailability", request)

    async def count(self, **more):
        request = views_pb2.SearchDayCountsRequest(
            search={"visit_type_id": more.pop("visit", self._desk.visit), **more}
        )
        return await self._call(AvailabilityViewsServiceStub, "SearchDayCounts", request)

    async def _call(self, stub, method, request):
        rpc = getattr(stub(self._channel), method)
        return await rpc(request, metadata=self._desk.harness.as_user("cora"), timeout=10)


@pytest.fixture(scope="module")
async def other(desk):
    harness = desk.harness
    server = harness.build(
        SERVICE, harness.servers["scheduling"].settings.database_url, principal_cache=60.0, max_connection_age=3600.0
    )
    await harness.hear_patients(server)
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield Replica(desk, server, channel)
    await server.stop()


def starts(found):
    return [(one.start_time.seconds, one.practitioner_id) for one in found.slots]


async def said_by_the_database(desk, first, last, doctors, visit="", patient=""):
    """What is free, read for this question alone."""
    search = Search(
        desk.harness.tenant_id, visit or desk.visit, [desk.clinic], doctors, int(first.timestamp()), int(last.timestamp()),
        patient_id=patient,
    )  # fmt: skip
    async with desk.database.reading() as db:
        return [(slot.start, slot.practitioner_id) for slot in (await free_slots(db, search, 10_000)).slots]


async def test_a_copy_at_another_replica_says_what_the_database_says_after_each_change(desk, other):
    """Availability cache staleness: whatever takes, moves or gives back time is seen by the next search, everywhere."""
    draw = random.Random(20261124)
    first = soon(days=3, hour=0)
    last = first + timedelta(days=1)
    doctors = [await desk.a_practitioner("Copied"), await desk.a_practitioner("Copied too")]
    patients = [await desk.a_patient() for _ in range(4)]
    visit = await desk.a_visit_type("copied", overbooking_cap=1, buffer_after_minutes=10)
    window = {"start_time": first, "end_time": last, "practitioner_ids": doctors, "visit": visit}
    standing, done = [], set()
    for number in range(36):
        verb = draw.choice(("book", "book", "hold", "move", "cancel", "confirm", "release", "overbook"))
        patient, doctor = draw.choice(patients), draw.choice(doctors)
        start = first + timedelta(minutes=15 * draw.randrange(90))
        try:
            if verb in ("book", "overbook"):
                more = {"subject": "sam", "overbooking": {"reason": "fever"}} if verb == "overbook" else {}
                standing.append(await desk.book(patient, start, doctor, visit_type_id=visit, **more))
            elif verb == "hold":
                slots = (await desk.search(visit, start_time=start, end_time=last, practitioner_ids=[doctor])).slots
                if slots:
                    standing.append(await desk.hold(patient, slots[0], hold_seconds=3600))
            elif standing:
                one = standing[draw.randrange(len(standing))]
                if verb == "move":
                    await desk.move(one, start)
                elif verb == "cancel":
                    await desk.do("Cancel", one, reason={"code": "pat"})
                else:
                    await desk.do("Book" if verb == "confirm" else "Release", one)
            done.add(verb)
        except Problem as problem:
            assert problem.reason, verb
        for patient_id in ("", patient) if number % 6 == 0 else ("",):
            here = await other.search(page_size=200, **({"patient_id": patient_id} if patient_id else {}), **window)
            there = await said_by_the_database(desk, first, last, doctors, visit, patient_id)
            assert starts(here) == there[:200], (number, verb)
        counted = await other.count(**window)
        assert sum(day.slots for day in counted.days) == len(
            await said_by_the_database(desk, first, last, doctors, visit)
        )
    assert {"book", "hold", "move", "cancel", "overbook"} <= done


async def test_what_commits_after_others_is_not_passed_over(desk, other):
    """A copy that asks for changes after the latest one that it saw would lose those of a transaction that took longer."""
    doctor = await desk.a_practitioner("Late")
    start = soon(days=4, hour=9)
    window = {"start_time": start, "end_time": start + timedelta(hours=1), "practitioner_ids": [doctor]}
    await desk.book(await desk.a_patient(), start - timedelta(hours=2), doctor)  # there is a number
    before = starts(await other.search(**window))
    url = other.server.settings.database_url.replace("+asyncpg", "")
    slow = await asyncpg.connect(url)
    try:
        await slow.execute("BEGIN")
        await slow.execute(
            "INSERT INTO occupancy SELECT tenant_id, gen_random_uuid(), no, 0, int8range((no << 34) + $2, (no << 34) + $3)"
            " FROM bookable WHERE ref_id = $1",
            doctor, int(start.timestamp()), int(start.timestamp()) + 1800,
        )  # fmt: skip
        # Later ones come and are seen meanwhile.
        await desk.book(await desk.a_patient(), start + timedelta(hours=3), doctor)
        assert starts(await other.search(**window)) == before
        await slow.execute("COMMIT")
    finally:
        await slow.close()
    assert starts(await other.search(**window)) == [one for one in before if one[0] >= start.timestamp() + 1800]


async def test_a_hold_that_ends_by_itself_is_free_without_anybody_changing_anything(desk, other):
    doctor = await desk.a_practitioner("Held")
    start = soon(days=5, hour=9)
    window = {"start_time": start, "end_time": start + timedelta(minutes=15), "practitioner_ids": [doctor]}
    (slot,) = (await other.search(**window)).slots
    async with asyncio.timeout(5):
        await desk.hold(await desk.a_patient(), slot, hold_seconds=1)
        assert not (await other.search(**window)).slots
        while not (await other.search(**window)).slots:
            await asyncio.sleep(0.1)


async def test_a_copy_is_made_anew_where_too_much_has_changed_or_too_long_ago(desk, other, monkeypatch):
    doctor = await desk.a_practitioner("Anew")
    start = soon(days=6, hour=9)
    window = {"start_time": start, "end_time": start + timedelta(hours=2), "practitioner_ids": [doctor]}
    free = len((await other.search(**window)).slots)
    await desk.book(await desk.a_patient(), start, doctor)
    await desk.sql("DELETE FROM occupancy_change")  # as the loop does after half an hour
    monkeypatch.setattr(mirror, "_FORGOTTEN_AFTER", 0.0)
    assert len((await other.search(**window)).slots) == free - 2
    monkeypatch.undo()
    await desk.book(await desk.a_patient(), start + timedelta(hours=1), doctor)
    await desk.sql(
        "INSERT INTO occupancy_change (tenant_id, no, first, last) SELECT tenant_id, no, n, n + 1"
        " FROM generate_series(1, 6000) AS n, bookable WHERE ref_id = :doctor",
        doctor=doctor,
    )
    assert len((await other.search(**window)).slots) == free - 5


async def test_another_servers_copy_is_thrown_away_though_its_transactions_have_numbers_that_were_seen(desk):
    """After a failover to a server that lags behind, a snapshot of the one before calls seen what nobody has seen."""
    doctor = await desk.a_practitioner("Failed over")
    start = soon(days=10, hour=9)
    window = {"start_time": start, "end_time": start + timedelta(hours=2), "practitioner_ids": [doctor]}
    before = starts(await desk.search(**window))
    copy = service._directories._kept[desk.database][desk.harness.tenant_id].mirror
    seen = int(copy._snapshot.split(":")[1]) + 100  # the server before was so many ahead
    copy._snapshot, (server, version) = f"{seen}:{seen}:", copy.version
    copy.version = (server - 1, version)
    await desk.book(await desk.a_patient(), start, doctor)
    while (await desk.sql("SELECT pg_current_xact_id()::text::bigint"))[0][0] <= seen:
        pass
    assert starts(await desk.search(**window)) == [one for one in before if one[0] >= start.timestamp() + 1800]


async def test_a_copy_is_made_anew_where_only_the_databases_clock_says_that_it_is_old(desk):
    """The process stood still, its clock too, or the database's one was put forward: what has changed may be forgotten."""
    doctor = await desk.a_practitioner("Stopped")
    start = soon(days=10, hour=9)
    window = {"start_time": start, "end_time": start + timedelta(hours=2), "practitioner_ids": [doctor]}
    before = starts(await desk.search(**window))
    copy = service._directories._kept[desk.database][desk.harness.tenant_id].mirror
    await desk.book(await desk.a_patient(), start, doctor)
    await desk.sql("DELETE FROM occupancy_change")
    copy.now -= 1800
    assert starts(await desk.search(**window)) == [one for one in before if one[0] >= start.timestamp() + 1800]


async def test_a_directory_that_has_changed_is_read_once_for_all_who_search(desk):
    """Each that reads it keeps a place at the database and may wait for the calendar then: all places would wait for one."""
    window = {"start_time": soon(days=10, hour=9), "end_time": soon(days=10, hour=12)}
    await desk.search(**window)
    await desk.a_practitioner("Read once")
    with Sent(desk.database) as sent:
        await asyncio.gather(*(desk.search(**window) for _ in range(20)))
    assert len([one for one in sent.statements if "FROM schedule" in one and "sum(" not in one]) == 1


async def test_calendars_of_many_tenants_take_no_more_room_than_is_allowed_for_all(desk, monkeypatch):
    """Some tenants with many people and visits would else fill a process: what was asked for longest ago goes."""
    doctor, fetch = await desk.a_practitioner("Large"), desk.database.fetch
    await desk.book(await desk.a_patient(), soon(days=10, hour=9), doctor)
    tenants = [desk.harness.tenant_id, *(new_id() for _ in range(2))]
    directories = snapshot.Directories()

    async def ask(tenant_id):
        async with desk.database.reading() as db:
            return await directories.current(desk.database, tenant_id, fetch, lambda: db)

    _, copy = await ask(tenants[0])
    await copy.keep(fetch, tenants[0], [doctor])
    await ask(tenants[1])
    assert list(directories._kept[desk.database]) == tenants[:2]
    monkeypatch.setattr(snapshot, "_ROWS_AT_MOST", 0)
    await ask(tenants[2])
    assert list(directories._kept[desk.database]) == tenants[1:]
    _, copy = await ask(tenants[0])
    await copy.keep(fetch, tenants[0], [doctor])
    assert (await ask(tenants[0]))[1] is copy, "whoever asks is never dropped"
    assert list(directories._kept[desk.database]) == tenants[:1]


async def test_a_search_beyond_the_calendars_last_second_tells_nothing_of_somebody_else(desk):
    """Seconds are packed behind a number: those of year 2570 would be today's of somebody else, of any organisation."""
    doctor, other = await desk.a_practitioner("Near"), await desk.a_practitioner("Far")
    asked, hidden = await desk.a_patient(), await desk.a_patient()
    await desk.book(asked, soon(days=10, hour=9), doctor)
    taken = await desk.book(hidden, soon(days=10, hour=11), doctor)
    numbers = {str(one.ref_id): one.no for one in await desk.sql("SELECT ref_id, no FROM bookable")}
    begin = taken.start_time.ToDatetime(UTC) + timedelta(seconds=(numbers[hidden] - numbers[asked]) << 34)
    window = {"start_time": begin, "end_time": begin + timedelta(hours=1)}
    for patient_id in (asked, ""):
        more = {**window, "patient_id": patient_id}
        assert not (await desk.search(practitioner_ids=[other], **more)).slots
        assert not (await desk.count(practitioner_ids=[other], **more)).days
    step = {"visit_type_id": desk.visit, "practitioner_ids": [other]}
    assert not (await desk.panel(step, step, patient_id=asked, **window)).panels


async def test_a_window_that_is_over_is_empty_for_a_patient_with_visits_too(desk):
    doctor, patient = await desk.a_practitioner("Over"), await desk.a_patient()
    await desk.book(patient, soon(days=10, hour=9), doctor)
    begin = soon(days=-10)
    over = {"start_time": begin, "end_time": begin + timedelta(days=3), "patient_id": patient}
    assert not (await desk.search(**over)).slots
    assert not (await desk.count(**over)).days
    step = {"visit_type_id": desk.visit}
    del over["patient_id"]
    assert not (await desk.panel(step, step, patient_id=patient, **over)).panels


async def test_no_search_shows_what_was_acknowledged_before_it_began_at_another_replica(desk, other):
    """Stale availability: shown free a quarter of a second after somebody was told that it is theirs, at the most."""
    doctor = await desk.a_practitioner("Fresh")
    first = soon(days=8, hour=0)
    slots = [first + timedelta(minutes=30 * number) for number in range(40)]
    window = {
        "start_time": first,
        "end_time": first + timedelta(days=1),
        "practitioner_ids": [doctor],
        "page_size": 200,
    }
    acknowledged, looks, ended = {}, [], False

    async def book(some):
        for start in some:
            await desk.book(await desk.a_patient(), start, doctor)
            acknowledged[int(start.timestamp())] = time.monotonic()

    async def look():
        while not ended:
            began = time.monotonic()
            found = {at for at, _ in starts(await other.search(**window))}
            looks.append((began, time.monotonic(), found))

    looking = [asyncio.create_task(look()) for _ in range(3)]
    await asyncio.gather(*(book(slots[line::4]) for line in range(4)))
    await asyncio.sleep(0.3)
    ended = True
    await asyncio.gather(*looking)
    assert len(looks) >= 10 and len(acknowledged) == 40
    late = [
        (at, began - acknowledged[at]) for began, _, found in looks for at in found
        if at in acknowledged and began - acknowledged[at] > 0.25
    ]  # fmt: skip
    assert not late, late
    # What it is built for: nothing at all that was acknowledged before.
    assert not [at for began, _, found in looks for at in found if at in acknowledged and acknowledged[at] < began]
    assert not looks[-1][2] & set(acknowledged)


async def test_the_original_of_an_overbooked_time_goes_and_the_copy_shows_no_free_slot(desk, other):
    visit = await desk.a_visit_type("shared-copy", overbooking_cap=1)
    doctor = await desk.a_practitioner("Shared")
    start = soon(days=9, hour=9)
    window = {
        "start_time": start, "end_time": start + timedelta(minutes=1), "practitioner_ids": [doctor], "visit": visit,
    }  # fmt: skip
    one = await desk.book(await desk.a_patient(), start, doctor, visit_type_id=visit)
    over = {"reason": "fever"}
    two = await desk.book(await desk.a_patient(), start, doctor, subject="sam", visit_type_id=visit, overbooking=over)
    await desk.do("Cancel", one, reason={"code": "pat"})
    assert not (await other.search(**window)).slots
    await desk.do("Cancel", two, reason={"code": "pat"})
    assert (await other.search(**window)).slots


class Sent:
    """Statements of the searches made while this is open, the audit's and the login's own aside."""

    def __init__(self, database):
        self._engine, self._loader, self.statements = database.engine.sync_engine, database._loader, []

    def __enter__(self):
        self._fetch = self._loader._fetch

        async def fetch(sql, together):
            if "INTO audit" not in sql and "FROM principal" not in sql:
                self.statements.append(sql)
            return await self._fetch(sql, together)

        self._loader._fetch = fetch
        event.listen(self._engine, "before_cursor_execute", self._note)
        return self

    def __exit__(self, *_error):
        del self._loader._fetch
        event.remove(self._engine, "before_cursor_execute", self._note)

    def _note(self, _connection, _cursor, statement, *_rest):
        # Loops of the service are at work beside it.
        if any(
            f" {table} " in statement for table in ("clinic", "schedule", "occupancy", "bookable", "record_subject")
        ):
            if "hold_expire_time" not in statement and "DELETE" not in statement:
                self.statements.append(statement)


@pytest.mark.parametrize("days", [2, 100])
@pytest.mark.parametrize("quotas", [False, True])
async def test_a_search_takes_three_statements_at_most_whatever_it_asks(desk, days, quotas):
    """DOMAIN 2.1, slow availability: an N+1 made others wait 10 seconds to a minute. Slow availability (an N+1, or the
    whole calendar read): cal.diy#5277, #21103, #4007, #4535, #9924, #23482; Cal-ID#1428.
    """
    name = f"counted-{days}-{quotas}".lower()
    visit = await desk.a_visit_type(name, resource_kinds=[name])
    await desk.a_room(name)
    block = {"weekday": 0, "start": "00:00", "end": "00:00", "quotas": [{"at_most": 2}]}
    limited = [{**block, "weekday": day} for day in range(1, 8)] if quotas else None
    doctors = [await desk.a_practitioner(f"{name}-{n}", *([limited] if limited else [])) for n in range(3)]
    patient, begin = await desk.a_patient(), soon(days=days, hour=0)
    asked = {
        "start_time": begin, "end_time": begin + timedelta(days=50), "patient_id": patient, "practitioner_ids": doctors,
        "own_practitioner_id": doctors[0], "team_practitioner_ids": [doctors[1]], "page_size": 200,
    }  # fmt: skip
    await desk.search(visit, **asked)  # directory and calendar are read after they were made, once
    with Sent(desk.database) as sent:
        found = await desk.search(visit, **asked)
    assert len(found.slots) == 200 and len(sent.statements) <= 3, sent.statements
    with Sent(desk.database) as sent:
        assert (await desk.count(visit, **{name: value for name, value in asked.items() if name != "page_size"})).days
    assert len(sent.statements) <= 3, sent.statements
    if days == 2 and not quotas:
        bare = {**asked, "patient_id": "", "end_time": begin + timedelta(days=10)}
        with Sent(desk.database) as sent:
            await desk.search(desk.visit, **bare)
        assert len(sent.statements) == 1, sent.statements


async def test_a_hidden_patient_is_not_found_by_a_search_nor_told_to_be_busy(desk):
    stranger = await desk.harness.subject("01890000-0000-7000-8000-00000000dead")
    assert await refused(desk.search(start_time=soon(days=3), patient_id=stranger)) == "NOT_FOUND"
    assert await refused(desk.count(start_time=soon(days=3), patient_id=stranger)) == "NOT_FOUND"

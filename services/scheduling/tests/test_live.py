"""Live views of a clinic's day, at two replicas over real gRPC: who is told what, and how a view ends."""

import asyncio
import contextlib
import time
from datetime import timedelta

import grpc
import pytest
from care.access.v1 import access_pb2
from care.events.v1.envelope_pb2 import Event
from care.scheduling.v1 import events_pb2
from care.scheduling.v1 import live_pb2 as pb
from care.type.v1.live_pb2 import Change

from chassis import access, live
from chassis.bus import Record
from chassis.bus.postgres import PostgresBus
from chassis.errors import problem_from_rpc
from chassis.ids import new_id
from services.scheduling.service import SERVICE
from services.scheduling.tests.desk import WORK, soon

WATCH = "/care.scheduling.v1.ScheduleLiveService/WatchClinicDay"
DAY = soon(days=9, hour=15)
_quarters = iter(range(10_000))


def when(day=DAY):
    """A time of its own for each test, on one day in New York."""
    return day + timedelta(minutes=30 * next(_quarters))


class Board:
    """One open view: what it was told, and why it ended."""

    def __init__(self, stream):
        self._stream = stream
        self.items, self.ended, self._more = [], None, asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def _read(self):
        with contextlib.suppress(asyncio.CancelledError):
            try:
                while (item := await self._stream.read()) is not grpc.aio.EOF:
                    self.items.append(item)
                    self._more.set()
            except grpc.RpcError as error:
                self.ended = problem_from_rpc(error)
        self._more.set()

    @property
    def told(self):
        """(id, event) of what changed; "reset" for a reset."""
        known = {Change.CHANGED: lambda one: (one.resource.id, one.event_type), Change.RESET: lambda one: "reset"}
        return [known[one.kind](one) for one in self.items if one.kind in known]

    async def until(self, condition, within=15):
        async with asyncio.timeout(within):
            while not condition():
                self._more.clear()
                await self._more.wait()

    async def seconds_until(self, count):
        began = time.monotonic()
        await self.until(lambda: len(self.told) >= count)
        return time.monotonic() - began

    async def close(self):
        self._stream.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)


class Hall:
    """Two replicas: `desk` calls the first; boards hang at the second, which finds what is new by polling."""

    def __init__(self, desk, second):
        self.desk, self.second = desk, second
        self._channels, self.boards = {}, []

    def channel(self, server, options=()):
        made = grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=options)
        self._channels[made] = None
        return made

    async def watch(self, subject="cora", clinic="", day=DAY, server=None, opened=True, options=(), ends_in=3600.0):
        stub = self.channel(server or self.second, options).unary_stream(
            WATCH,
            request_serializer=pb.WatchClinicDayRequest.SerializeToString,
            response_deserializer=Change.FromString,
        )
        token = self.desk.harness.token(subject, ends_in=ends_in)
        request = pb.WatchClinicDayRequest(
            clinic_id=clinic or self.desk.clinic, date=str(getattr(day, "date", lambda: day)())
        )
        board = Board(stub(request, metadata=(("authorization", f"Bearer {token}"),)))
        self.boards.append(board)
        await board.until(lambda: board.items or board.ended)
        if opened:
            assert board.told == ["reset"], board.ended and board.ended.reason
        return board

    async def refusal(self, **more):
        board = await self.watch(opened=False, **more)
        assert not board.items
        return board.ended.reason, board.ended.message, board.ended.metadata

    async def close(self):
        for board in self.boards:
            await board.close()
        for channel in self._channels:
            await channel.close()


def replica(desk, bus, **settings):
    harness = desk.harness
    shared, harness.bus = harness.bus, bus
    try:
        return harness.build(SERVICE, harness.servers["scheduling"].settings.database_url, **settings)
    finally:
        harness.bus = shared


@pytest.fixture(scope="module")
async def second(desk):
    # Another address of the same bus, as in a process of its own: nothing wakes it, so it polls.
    bus = PostgresBus(desk._bus_url.replace("127.0.0.1", "localhost"))
    assert bus.bell is not desk.harness.bus.bell
    server = replica(
        desk, bus, principal_cache=0.0, live_heartbeat=0.4, live_recheck=0.3, live_queue=5, max_connection_age=3600.0
    )
    await desk.harness.hear_patients(server)
    await server.start()
    yield server
    await server.stop()
    await bus.stop()


@pytest.fixture
async def hall(desk, second):
    hall = Hall(desk, second)
    yield hall
    await hall.close()


# -- who is told what --------------------------------------------------------------------------------------------------


async def test_what_is_done_at_one_replica_is_seen_at_another_within_a_second(hall, desk):
    board = await hall.watch()
    appointment = await desk.book(await desk.a_patient(), when())
    took = [await board.seconds_until(2)]
    await desk.do("Arrive", appointment)
    took.append(await board.seconds_until(3))
    await desk.do("Cancel", appointment, reason={"code": "pat"})
    took.append(await board.seconds_until(4))
    assert min(took) < 1, "on a busy machine one of them may take longer"
    kinds = ["appointment.booked", "appointment.arrived", "appointment.cancelled"]
    assert board.told == ["reset", *((appointment.id, kind) for kind in kinds)]
    change = next(one for one in board.items if one.kind == Change.CHANGED)
    assert change.resource.type == "Appointment" and change.event_id and change.time.seconds


async def test_neither_another_clinic_nor_another_day_is_told(hall, desk):
    elsewhere = await desk.a_clinic()
    doctor = await desk.a_practitioner("Cole", clinic=elsewhere)
    await desk.harness.staff("lea", WORK, clinics=[elsewhere])
    board, other = await hall.watch(), await hall.watch("lea", clinic=elsewhere)
    patient = await desk.harness.subject(desk.clinic, elsewhere)
    theirs = await desk.book(patient, when(), doctor, subject="lea", clinic_id=elsewhere)
    await desk.book(patient, when(DAY + timedelta(days=1)))
    ours = await desk.book(patient, when())
    await board.until(lambda: len(board.told) > 1)
    await other.until(lambda: len(other.told) > 1)
    assert board.told[1:] == [(ours.id, "appointment.booked")]
    assert other.told[1:] == [(theirs.id, "appointment.booked")]


async def test_what_is_moved_is_told_where_it_was_and_where_it_is(hall, desk):
    elsewhere = await desk.a_clinic()
    doctor = await desk.a_practitioner("Dole", clinic=elsewhere)
    await desk.harness.staff("mo", WORK, clinics=[desk.clinic, elsewhere])
    patient = await desk.harness.subject(desk.clinic, elsewhere)
    later = DAY + timedelta(days=2)
    left, entered, moved_on = (
        await hall.watch(),
        await hall.watch(day=later),
        await hall.watch("mo", clinic=elsewhere, day=later),
    )
    appointment = await desk.book(patient, when())
    await desk.move(appointment, later)
    await entered.until(lambda: len(entered.told) > 1)
    await desk.move(appointment, later, subject="mo", clinic_id=elsewhere, practitioner_id=doctor)
    for board, number in ((entered, 2), (moved_on, 1)):
        await board.until(lambda board=board, number=number: len(board.told) > number)
        assert board.told[1:] == [(appointment.id, "appointment.rescheduled")] * number
    assert left.told[1:] == [(appointment.id, "appointment.booked"), (appointment.id, "appointment.rescheduled")]


async def test_a_labelled_visit_is_told_only_to_those_who_are_cleared(hall, desk):
    await desk.harness.staff("vera", WORK, clinics=[desk.clinic], clearances=["R"])
    board, cleared = await hall.watch(), await hall.watch("vera")
    hidden = await desk.book(await desk.a_patient(labels=["R"]), when(), subject="vera")
    plain = await desk.book(await desk.a_patient(), when())
    await cleared.until(lambda: len(cleared.told) > 2)
    await board.until(lambda: len(board.told) > 1)
    assert {one[0] for one in cleared.told[1:]} == {hidden.id, plain.id}
    assert board.told[1:] == [(plain.id, "appointment.booked")]


async def test_nothing_of_a_patient_is_in_what_is_told(hall, desk):
    board = await hall.watch()
    patient = await desk.a_patient()
    appointment = await desk.book(patient, when(), comment="Xanthippe")
    await board.until(lambda: len(board.told) > 1)
    told = str(board.items)
    assert appointment.id in told
    for secret in (patient, "Xanthippe", desk.doctor, desk.visit):
        assert secret not in told


# -- who may look ------------------------------------------------------------------------------------------------------


async def test_a_foreign_clinic_answers_as_one_that_does_not_exist(hall, desk):
    foreign = await desk.a_clinic()
    answers = [await hall.refusal(clinic=clinic) for clinic in (foreign, new_id())]
    assert answers[0] == answers[1] and answers[0][0] == "NOT_FOUND"
    await desk.harness.staff("pat", WORK, clinics=[foreign], kind="PATIENT")
    assert (await hall.refusal(subject="pat", clinic=foreign)) == answers[0]


async def test_whoever_may_not_is_refused_before_the_view_opens_and_it_is_noted(hall, desk):
    nobody = await desk.harness.staff("nolan", [], clinics=[desk.clinic])
    assert (await hall.refusal(subject="nolan"))[0] == "PERMISSION_MISSING"
    assert (await hall.refusal(subject="nobody at all"))[0] == "LOGIN_UNKNOWN"
    assert (await hall.refusal(day="2026-02-30"))[0] == "DATE_INVALID"
    noted = "SELECT outcome FROM audit WHERE method LIKE '%WatchClinicDay' AND actor = :actor"
    assert await desk.sql(noted, actor=f"staff:{nobody}") == [("PERMISSION_DENIED",)]


async def test_an_opened_view_is_noted_once_and_holds_no_connection(hall, desk, second):
    olga = await desk.harness.staff("olga", WORK, clinics=[desk.clinic])
    for _ in range(second.settings.pool_size + 2):
        await hall.watch("olga")
    async with asyncio.timeout(5):  # besides the service's own loops
        while second.database.engine.pool.checkedout():
            await asyncio.sleep(0.01)
    assert second.telemetry.registry.get_sample_value("care_live_views_open") == second.settings.pool_size + 2
    async with asyncio.timeout(5):
        while len(noted := await desk.sql("SELECT permission FROM audit WHERE actor = :a", a=f"staff:{olga}")) < 10:
            await asyncio.sleep(0.05)
    assert set(noted) == {("appointments.read",)}


async def test_a_membership_that_ends_ends_the_view(hall, desk, second):
    principal = await desk.harness.staff("rhea", WORK, clinics=[desk.clinic])
    board, other = await hall.watch("rhea"), await hall.watch()
    await _store(desk, second, principal, "rhea", group_ids=[])
    await board.until(lambda: board.ended)
    assert board.ended.reason == "NOT_FOUND"
    await _store(desk, second, principal, "rhea", group_ids=[desk.clinic], version=3)
    again = await hall.watch("rhea")
    await _store(desk, second, principal, "rhea", group_ids=[desk.clinic], roles=[], version=4)
    await again.until(lambda: again.ended)
    assert again.ended.reason == "PERMISSION_MISSING"
    await _store(desk, second, principal, "rhea", group_ids=[desk.clinic], active=False, version=5)
    assert (await hall.refusal(subject="rhea"))[0] == "LOGIN_INACTIVE"
    assert not other.ended


async def _store(desk, server, principal, subject, version=2, active=True, roles=None, **state):
    told = access_pb2.PrincipalState(
        id=principal, tenant_id=desk.harness.tenant_id, issuer="https://issuer.test", subject=subject, kind="STAFF",
        principal_id=principal, active=active, version=version,
        roles=[f"role of {subject}"] if roles is None else roles, **state,
    )  # fmt: skip
    async with server.database.engine.begin() as connection:
        await access.store_principal(connection, server.runtime.tables.access, told)


def happened(desk, kind):
    """An event of the day as it stands on the bus."""
    payload = events_pb2.AppointmentEvent(id=new_id(), clinic_id=desk.clinic, time_zone="America/New_York")
    payload.start_time.FromDatetime(DAY)
    told = Event(
        id=new_id(),
        type=kind,
        tenant_id=desk.harness.tenant_id,
        aggregate_id=payload.id,
        payload=payload.SerializeToString(),
    )
    return Record("care.scheduling", 0, 0, payload.id, told.SerializeToString(), (), 0)


# -- how it ends -------------------------------------------------------------------------------------------------------


async def test_a_view_beats_while_nothing_happens_and_ends_with_its_token(hall):
    board = await hall.watch(ends_in=2)
    await board.until(lambda: board.ended)
    assert board.ended.reason == "TOKEN_EXPIRED" and board.ended.code is grpc.StatusCode.UNAUTHENTICATED
    assert [one.kind for one in board.items][:3] == [Change.RESET, Change.HEARTBEAT, Change.HEARTBEAT]


async def test_a_slow_reader_is_told_to_read_again_and_stalls_nobody(hall, desk, second):
    quick = await hall.watch()
    token = desk.harness.token("cora")
    # The smallest windows that gRPC knows: the view stands still after a few items.
    channel = hall.channel(second, [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)])
    stub = channel.unary_stream(
        WATCH, request_serializer=pb.WatchClinicDayRequest.SerializeToString, response_deserializer=Change.FromString
    )
    request = pb.WatchClinicDayRequest(clinic_id=desk.clinic, date=str(DAY.date()))
    slow = stub(request, metadata=(("authorization", f"Bearer {token}"),))
    assert (await slow.read()).kind == Change.RESET
    before = len(quick.told)
    for number in range(1, 41):
        # As they come from the bus, a few at a time: the quick one reads them all.
        await second.runtime.live._tell([happened(desk, "appointment.arrived"), happened(desk, "appointment.reverted")])
        await quick.until(lambda number=number: len(quick.told) == before + 2 * number)
    assert quick.told.count("reset") == 1
    kinds = []
    async with asyncio.timeout(5):
        while Change.RESET not in kinds:
            kinds.append((await slow.read()).kind)
    assert 0 < kinds.count(Change.CHANGED) < 80
    slow.cancel()


async def test_a_replica_that_is_stopped_sends_its_readers_elsewhere(hall, desk):
    third = replica(desk, desk.harness.bus, drain_timeout=5.0)
    await desk.harness.hear_patients(third)
    await third.start()
    boards = [await hall.watch(server=third) for _ in range(3)]
    stuck = hall.channel(third, [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1024)]).unary_stream(WATCH)
    request = pb.WatchClinicDayRequest(clinic_id=desk.clinic, date=str(DAY.date())).SerializeToString()
    unread = stuck(request, metadata=desk.harness.as_user("cora"))
    await unread.read()
    for one in third.runtime.live._open:  # whoever doesn't read stands still after some of these
        for _ in range(60):
            one.tell(Change(kind=Change.CHANGED).SerializeToString() * 50)
        await asyncio.sleep(0)
    began = time.monotonic()
    await third.stop()
    assert time.monotonic() - began < 4
    for board in boards:
        await board.until(lambda board=board: board.ended)
        assert board.ended.reason == "DRAINING" and board.ended.code is grpc.StatusCode.UNAVAILABLE
    again = await hall.watch()
    appointment = await desk.book(await desk.a_patient(), when())
    await again.until(lambda: len(again.told) > 1)
    assert again.told == ["reset", (appointment.id, "appointment.booked")]


async def test_a_view_is_open_for_a_limited_time_and_only_so_many_are(hall, desk):
    limited = replica(desk, desk.harness.bus, live_longest=0.5, live_views=1)
    await desk.harness.hear_patients(limited)
    await limited.start()
    board = await hall.watch(server=limited)
    assert (await hall.refusal(server=limited))[0] == "TOO_MANY_STREAMS"
    await board.until(lambda: board.ended)
    assert board.ended.reason == "VIEW_ENDED"
    await hall.watch(server=limited)
    await limited.stop()


async def test_readers_are_told_to_read_again_when_changes_could_not_be_followed(hall, desk, second, monkeypatch):
    monkeypatch.setattr(live, "_STANDING_WITHIN", 0.2)
    board = await hall.watch()
    bus = second.bus
    address, bus._url = bus._url, "postgresql://localhost:9/away"
    pool, bus._pool = bus._pool, None
    pool.terminate()
    while second.runtime.live._standing.is_set():
        await asyncio.sleep(0.01)
    assert (await hall.refusal())[0] == "CHANGES_UNAVAILABLE"
    missed = await desk.book(await desk.a_patient(), when())
    bus._url = address
    await board.until(lambda: board.told == ["reset", "reset"])
    appointment = await desk.book(await desk.a_patient(), when())
    await board.until(lambda: len(board.told) > 2)
    assert (missed.id, "appointment.booked") not in board.told
    assert board.told[2:] == [(appointment.id, "appointment.booked")]

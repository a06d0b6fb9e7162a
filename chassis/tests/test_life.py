"""A service's life: waiting for its schema, loops at two replicas, policies, and an end that no client notices."""

import asyncio
import contextlib
import dataclasses
import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import pytest_asyncio
from care.access.v1 import access_pb2
from care.events.v1.envelope_pb2 import Event
from care.patients.v1 import staff_pb2, staff_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from chassis import migrations, policies, timers
from chassis.auth import Credential
from chassis.bus import PARTITIONS, Message, partition_of
from chassis.clients import Clients, RemoteOwner, call
from chassis.errors import Problem, Unavailable
from chassis.ids import new_id
from chassis.service import Server
from chassis.telemetry import Telemetry
from chassis.testing.harness import Harness
from chassis.tests.small import Small, TaskStatus, models
from chassis.timers import Loop

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
FIRST = Path(__file__).parent / "small" / "migrations"


async def until(condition: Any, within: float = 15) -> None:
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.02)


@contextlib.contextmanager
def silence() -> Iterator[int]:
    """The port of a collector that takes connections and never answers."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(64)
    yield listener.getsockname()[1]
    listener.close()


async def health_of(port: int, name: str = "") -> int:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        return int((await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=3)).status)


# -- schema ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def newer(tmp_path: Path) -> Path:
    """The revisions of the next build."""
    for file in FIRST.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text())
    (tmp_path / "0003_more.py").write_text(
        'from alembic import op\n\nrevision, down_revision = "0003", "0002"\n\n\n'
        'def upgrade():\n    op.execute("CREATE TABLE more (id int)")\n'
    )
    return tmp_path


async def test_what_is_slow_at_first_is_done_in_a_thread_before_anything_is_served(database: Any) -> None:
    small = Small(Harness(database), name="feedback")
    seen: list[tuple[bool, int]] = []

    def slow() -> None:
        (server,) = small.harness.servers.values()
        seen.append((threading.current_thread() is threading.main_thread(), server.port))
        assert server.runtime.loops == {}

    await small.harness.start(dataclasses.replace(small.service, warm=(slow,)))
    assert seen == [(False, 0)]
    assert await health_of(small.server.health_port) == SERVING
    await small.harness.stop()


async def test_a_service_waits_for_the_schema_that_it_needs_and_starts_on_a_newer_one(
    database: Any, newer: Path
) -> None:
    url = await database("gate")
    small = Small(Harness(database), name="feedback")
    small.harness.bus = bus = _Bus()
    server = small.harness.build(small.service, url)
    starting = asyncio.create_task(server.start())
    await asyncio.sleep(0.5)
    assert not starting.done()
    assert server.port == server.health_port == 0  # nothing listens, so nobody can take it for ready
    await migrations.upgrade(url, newer, small.models.Base.metadata)
    await asyncio.wait_for(starting, 15)
    assert await health_of(server.health_port) == SERVING
    await server.stop()

    # The other way round: the build needs 0003, the database has 0002.
    older = await database("gate")
    await migrations.upgrade(older, FIRST, models().Base.metadata)
    engine = create_async_engine(older)
    waiting = asyncio.create_task(migrations.wait_for_schema(engine, newer, server.telemetry.log, every=0.05))
    await asyncio.sleep(0.4)
    assert not waiting.done()
    await migrations.upgrade(older, newer, models().Base.metadata)
    await asyncio.wait_for(waiting, 5)
    await engine.dispose()
    assert bus.topics >= {"care.feedback", "care.patients", "care.dlq.feedback"}
    assert "waiting for the schema" in small.harness.log_of("feedback")


class _Bus:
    """Nothing ever comes and all is taken."""

    def __init__(self) -> None:
        self.topics: set[str] = set()

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def trim(self, *_: Any, **__: Any) -> int:
        return 0

    async def ensure_topics(self, topics: Any, partitions: int = PARTITIONS) -> None:
        self.topics |= set(topics)

    async def append(self, _topic: str, messages: Any, *_: Any, **__: Any) -> list[None]:
        return [None] * len(messages)

    def reader(self, _group: str, _topics: Any) -> Any:
        async def nothing(*_: Any, **__: Any) -> dict[Any, Any]:
            await asyncio.sleep(0.05)
            return {}

        return SimpleNamespace(
            start=nothing,
            fetch=nothing,
            commit=nothing,
            pause=nothing,
            resume=nothing,
            seek=nothing,
            lag=nothing,
            stop=nothing,
        )


async def test_two_migrators_at_once_take_turns(database: Any, newer: Path) -> None:
    url = await database("migrators")
    metadata = models().Base.metadata
    await asyncio.gather(*(migrations.upgrade(url, newer, metadata) for _ in range(4)))
    engine = create_async_engine(url)
    assert await migrations.present(engine) == "0003" == migrations.needed(newer)
    assert list(migrations.revisions(newer)) == ["0001", "0002", "0003"]
    await engine.dispose()


async def test_a_service_that_is_told_to_end_before_its_schema_is_there_ends(database: Any) -> None:
    small = Small(Harness(database), name="feedback")
    small.harness.bus = _Bus()
    server = small.harness.build(small.service, await database("never"))
    starting = asyncio.create_task(server.start())
    await asyncio.sleep(0.3)
    starting.cancel()
    began = time.perf_counter()
    await server.stop()
    assert time.perf_counter() - began < 5


# -- two replicas ------------------------------------------------------------------------------------------------------

DONE: list[tuple[int, str]] = []
PAIR: list[Small] = []


async def work(runtime: Any) -> int:
    """Complete what is due, by the database's clock."""
    model = PAIR[0].models.Task
    async with runtime.database.acting("system:notifications") as db:
        rows = await timers.due(db, model, model.due_time, model.status == TaskStatus.READY, limit=7)
        for row in rows:
            row.move("claim")
            row.done += 1
            DONE.append((id(runtime), row.id))
        await asyncio.sleep(0.02)
    return len(rows)


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def pair(database: Any) -> AsyncIterator[Small]:
    """One service with two replicas on one database; the second stands under `twin`."""
    small = Small(Harness(database), name="notifications", loops=[Loop("complete", work, every=0.2)])
    PAIR[:] = [small]
    await small.open(drain_timeout=4.0)
    small.twin = small.harness.build(small.service, small.server.settings.database_url, drain_timeout=4.0)  # type: ignore[attr-defined]
    await small.twin.start()  # type: ignore[attr-defined]
    yield small
    await small.twin.stop()  # type: ignore[attr-defined]
    await small.harness.stop()


async def test_two_loops_on_one_database_do_each_thing_once(pair: Small) -> None:
    patient = await pair.patient()
    past, future = timedelta(minutes=-1), timedelta(hours=1)
    for _ in range(40):
        await pair.task(patient, due=past)
    later = await pair.task(patient, due=future)
    async with asyncio.timeout(15):
        while await pair.sql("SELECT 1 FROM task WHERE done = 0 AND id <> :later", later=later.id):
            await asyncio.sleep(0.05)
    rows = await pair.sql("SELECT id::text, done, version FROM task")
    assert {(row.done, row.version) for row in rows if row.id != later.id} == {(1, 2)}
    assert [row.done for row in rows if row.id == later.id] == [0]
    done = [task for _, task in DONE]
    assert len(done) == len(set(done)) == 40
    assert await pair.sql("SELECT count(*) FROM task WHERE done > 1") == [(0,)]


async def test_what_another_replica_has_in_hand_is_passed_over(pair: Small) -> None:
    await pair.server.runtime.loops["complete"].stop()
    await pair.twin.runtime.loops["complete"].stop()  # type: ignore[attr-defined]
    try:
        patient, model = await pair.patient(), pair.models.Task
        tasks = [(await pair.task(patient, due=timedelta(minutes=-9 + n))).id for n in range(4)]

        async def take(db: Any, limit: int) -> list[str]:
            rows = await timers.due(db, model, model.due_time, model.status == TaskStatus.READY, limit=limit)
            return [row.id for row in rows]

        database = pair.server.database
        async with database.acting("system:a") as first, database.acting("system:b") as second:
            assert await take(first, 2) == tasks[:2]
            async with asyncio.timeout(1):
                assert await take(second, 9) == tasks[2:]
        async with database.acting("system:c") as third:  # given back unchanged, so due again
            assert await take(third, 9) == tasks
    finally:
        for server in (pair.server, pair.twin):  # type: ignore[attr-defined]
            server.runtime.loops["complete"] = server.service.loops[0].start(server.runtime)


async def test_looking_for_what_is_due_reads_the_index_and_not_all_that_is_not(pair: Small) -> None:
    model = pair.models.Task
    async with pair.server.database.acting("system:plan") as db:
        await db.execute(text("CREATE INDEX task_due ON task (due_time)"))
        await db.execute(text("SET LOCAL enable_seqscan = off"))
        await db.execute(text("SET LOCAL enable_sort = off"))
        seen: list[Any] = []
        real = db.execute

        async def execute(statement: Any, *more: Any, **named: Any) -> Any:
            seen.append(statement)
            return await real(statement, *more, **named)

        db.execute = execute
        await timers.due(db, model, model.due_time)
        compiled = seen[0].compile(dialect=pair.server.database.engine.dialect, compile_kwargs={"literal_binds": True})
        plan = "\n".join(
            row[0] for row in (await real(text("EXPLAIN " + str(compiled).replace("::TIMESTAMP", "::TIMESTAMP")))).all()
        )
        await db.rollback()
    assert "Index Cond: (due_time <= " in plan, plan


async def test_a_loop_that_fails_is_tried_again_and_one_that_is_woken_does_not_wait(pair: Small) -> None:
    rounds: list[float] = []

    async def fail_first(_runtime: Any) -> int:
        rounds.append(time.perf_counter())
        if len(rounds) < 4:
            raise ConnectionError("Geheim")
        return 0

    running = Loop("failing", fail_first, every=0.05).start(pair.server.runtime)
    await until(lambda: len(rounds) >= 5)
    await running.stop()
    log = pair.harness.log_of("notifications")
    assert "Geheim" not in log
    assert log.count('"loop":"failing"') == 1  # not at each round of an outage
    rounds.append(0)
    slow = Loop("slow", fail_first, every=60).start(pair.server.runtime)
    await until(lambda: bool(rounds[-1]))
    before = len(rounds)
    pair.server.runtime.loops["slow"] = slow
    async with pair.server.database.acting("system:waker") as db:
        timers.wake_after_commit(db, "slow")
        await asyncio.sleep(0.1)
        assert len(rounds) == before  # only once it is committed
    await until(lambda: len(rounds) > before, 2)
    began = time.perf_counter()
    await slow.stop()
    assert time.perf_counter() - began < 1
    del pair.server.runtime.loops["slow"]


async def test_a_policy_of_the_visit_type_goes_before_the_clinics_and_the_tenants(pair: Small) -> None:
    tenant, clinic, kind = pair.harness.tenant_id, new_id(), new_id()
    shipped = {"hours": 72, "channel": "SMS"}

    async def put(scope: str, scope_id: str, version: int, hours: int, ago: str = "1 minute") -> None:
        await pair.sql(
            "INSERT INTO policy VALUES (:tenant, 'reminders', :scope, :id, :version,"
            " clock_timestamp() - CAST(:ago AS text)::interval, jsonb_build_object('hours', CAST(:hours AS int)))",
            tenant=tenant, scope=scope, id=scope_id, version=version, hours=hours, ago=ago,
        )  # fmt: skip

    async def now(**scopes: Any) -> tuple[int, int]:
        async with pair.server.database.acting("system:notifications") as db:
            found = await policies.current(db, tenant, "reminders", shipped, **scopes)
            assert found.settings["channel"] == "SMS"
            return found.version, found.settings["hours"]

    assert await now(clinic=clinic, visit_type=kind) == (policies.SHIPPED, 72)
    await put("tenant", tenant, 4, 48)
    assert await now(clinic=clinic, visit_type=kind) == (4, 48)
    await put("clinic", clinic, 2, 24)
    await put("clinic", clinic, 3, 20)
    await put("clinic", clinic, 9, 1, ago="-1 hour")  # not in force yet
    assert await now(clinic=clinic, visit_type=kind) == (3, 20)
    await put("visit_type", kind, 1, 12)
    assert await now(clinic=clinic, visit_type=kind) == (1, 12)
    assert await now(clinic=new_id(), visit_type=None) == (4, 48)
    assert await now(visit_type=kind) == (1, 12)
    assert await now() == (4, 48)
    async with pair.server.database.acting("system:notifications") as db:
        other = await policies.current(db, new_id(), "reminders", shipped, clinic=clinic)
    assert other == (policies.SHIPPED, shipped)


async def test_answers_and_marks_that_are_too_old_go_however_many(pair: Small) -> None:
    await pair.sql(
        "INSERT INTO idempotency_key (tenant_id, actor, method, request_id, body_hash, create_time)"
        " SELECT gen_random_uuid(), 'x', 'x', n::text, '', clock_timestamp() - interval '49 hours'"
        " FROM generate_series(1, 11000) n"
    )
    await pair.pool(request_id="kept")
    assert await pair.server._forget_old_keys() == 11000
    assert await pair.sql("SELECT count(*) FROM idempotency_key WHERE request_id = 'kept'") == [(1,)]


async def test_what_cannot_be_tidied_is_told_and_keeps_nothing_else_from_being_tidied(
    pair: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed = asyncio.Event()

    async def fails() -> int:
        raise ConnectionError("Geheim")

    async def trim(_: float) -> int:
        trimmed.set()
        return 0

    monkeypatch.setattr(pair.server, "_forget_old_keys", fails)
    monkeypatch.setattr(pair.server.bus, "trim", trim)
    tidying = asyncio.create_task(pair.server._tidy())
    async with asyncio.timeout(5):
        await trimmed.wait()
    tidying.cancel()
    log = pair.harness.log_of("notifications")
    assert "not tidied" in log and "Geheim" not in log


# -- what is heard of patients -----------------------------------------------------------------------------------------


@pytest.fixture
def far_west() -> Iterator[None]:
    """A machine that isn't set to UTC."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = "America/Los_Angeles"
    time.tzset()
    yield
    os.environ.pop("TZ")
    if before is not None:
        os.environ["TZ"] = before
    time.tzset()


async def test_a_heartbeat_keeps_its_time_on_a_machine_in_any_zone(pair: Small, far_west: None) -> None:
    await pair.sql("DELETE FROM access_heartbeat")
    told = datetime.now(UTC) - timedelta(seconds=7)
    await _beat(pair, told)
    async with asyncio.timeout(15):
        while len(await pair.sql("SELECT 1 FROM access_heartbeat")) < PARTITIONS:
            await asyncio.sleep(0.05)
    rows = await pair.sql("SELECT time FROM access_heartbeat")
    assert {abs((row.time - told).total_seconds()) < 0.001 for row in rows} == {True}
    await _beat(pair, told - timedelta(seconds=90))  # an older one, delivered late
    await asyncio.sleep(0.5)
    assert {row.time for row in await pair.sql("SELECT time FROM access_heartbeat")} == {rows[0].time}
    await until(lambda: 5 < pair.server.access.age < 60, 5)
    await _beat(pair, told + timedelta(days=1))  # a clock that is ahead
    await until(lambda: pair.server.access.age < 5, 5)
    assert pair.server.access.age > -1
    await pair.sql("UPDATE access_heartbeat SET time = clock_timestamp() + interval '1 day'")


async def _beat(pair: Small, told: datetime) -> None:
    events = []
    for partition in range(PARTITIONS):
        beat = access_pb2.Heartbeat(partition=partition)
        event = Event(
            id=new_id(), type="access.heartbeat", tenant_id=new_id(), aggregate_id=_key_of(partition),
            payload_type=beat.DESCRIPTOR.full_name, payload=beat.SerializeToString(),
        )  # fmt: skip
        event.time.FromDatetime(told)
        events.append(Message(event.aggregate_id, event.SerializeToString()))
    bus: Any = pair.harness.bus
    await bus.append("care.patients", events)


def _key_of(partition: int) -> str:
    while partition_of(key := new_id(), PARTITIONS) != partition:
        pass
    return key


# -- calling each other ------------------------------------------------------------------------------------------------


@pytest.fixture
async def clients(pair: Small) -> AsyncIterator[Clients]:
    """As the gateway has them, with both replicas as targets."""
    twin: Server = pair.twin  # type: ignore[attr-defined]
    telemetry = Telemetry.create("gateway", otlp_endpoint=None, environment="test", version="0")
    clients = Clients(
        {
            "notifications": f"ipv4:127.0.0.1:{pair.server.port},127.0.0.1:{twin.port}",
            "away": "ipv4:127.0.0.1:1",
        },
        Credential("feedback", pair.harness.key_files["feedback"]),
        telemetry,
    )
    yield clients
    await clients.close()


async def test_the_owner_is_asked_over_grpc_in_our_own_name(pair: Small, clients: Clients) -> None:
    patient = await pair.patient()
    owner = RemoteOwner(clients, "notifications")
    (found,) = await owner.subjects(pair.harness.tenant_id, [patient, new_id()])
    assert (found.subject_id, list(found.grantee_ids)) == (patient, [patient, pair.clinic])
    assert await owner.subjects(new_id(), [patient]) == []
    assert not (await owner.principal(pair.harness.tenant_id, "x", "y")).HasField("principal")


async def test_a_peer_that_is_away_or_unknown_is_unavailable_within_the_deadline(clients: Clients) -> None:
    for service, reason in (("away", "SERVICE_UNAVAILABLE"), ("nobody", "PEER_UNKNOWN")):
        began = time.perf_counter()
        with pytest.raises(Unavailable) as refused:
            await RemoteOwner(clients, service).subjects(new_id(), [new_id()])
        assert refused.value.reason == reason
        assert "127.0.0.1" not in refused.value.message
        assert time.perf_counter() - began < 3


async def test_a_problem_passes_between_services_as_it_was_told(pair: Small, clients: Clients) -> None:
    stub = staff_pb2_grpc.PoolsServiceStub(clients.channel("notifications"))
    with pytest.raises(Problem) as refused:
        await call(stub.GetPool, staff_pb2.GetPoolRequest(id="x"), pair.harness.as_user("ada"))
    assert refused.value.metadata == {"field": "id", "rule": "string.uuid"}
    assert refused.value.reason == "FIELD_INVALID"


async def test_what_a_service_calls_unavailable_is_tried_again(pair: Small, clients: Clients) -> None:
    tries = []

    async def fail_twice(*_: Any) -> None:
        tries.append(1)
        if len(tries) < 3:
            raise Unavailable("DATABASE_UNAVAILABLE", "The database does not answer; try again.")

    pool = await pair.pool()
    pair.hooks["GetPool"] = fail_twice
    stub = staff_pb2_grpc.PoolsServiceStub(clients.channel("notifications"))
    found = await call(stub.GetPool, staff_pb2.GetPoolRequest(id=pool.id), pair.harness.as_user("ada"), timeout=5)
    pair.hooks.clear()
    assert found.id == pool.id
    assert len(tries) == 3


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_a_stop_says_not_serving_first_and_no_client_that_retries_sees_it(pair: Small, clients: Clients) -> None:
    twin: Server = pair.twin  # type: ignore[attr-defined]
    pool = await pair.pool()

    async def slowly(*_: Any) -> None:
        await asyncio.sleep(0.05)

    pair.hooks.update(GetPool=slowly, CreatePool=slowly)
    stub = staff_pb2_grpc.PoolsServiceStub(clients.channel("notifications"))
    answered, stopping = 0, asyncio.Event()

    async def client(number: int) -> None:
        nonlocal answered
        while not stopping.is_set():
            metadata = pair.harness.as_user("ada")
            if number % 2:
                await call(stub.GetPool, staff_pb2.GetPoolRequest(id=pool.id), metadata, timeout=10)
            else:
                wanted = staff_pb2.CreatePoolRequest(pool={"name": f"under way {new_id()}"}, request_id=new_id())
                await call(stub.CreatePool, wanted, metadata, timeout=10)
            answered += 1

    at_refusal: list[int] = []
    server: Any = twin._servers[0]
    stop = server.stop

    async def watched(grace: Any) -> None:
        at_refusal.append(await health_of(twin.health_port))
        at_refusal.append(await health_of(twin.health_port, "notifications"))
        at_refusal.append(await health_of(twin.health_port, "live"))
        await stop(grace)

    twin._servers[0] = SimpleNamespace(stop=watched)  # type: ignore[call-overload]
    asking = [asyncio.create_task(client(number)) for number in range(8)]
    await until(lambda: answered >= 8)  # connected and busy, however slow this machine is now
    before = answered
    began = time.perf_counter()
    await twin.stop()
    took = time.perf_counter() - began
    await until(lambda: answered >= before + 16)
    stopping.set()
    failed = [one for one in await asyncio.gather(*asking, return_exceptions=True) if one]
    pair.hooks.clear()
    assert failed == []
    assert answered > before > 0
    assert took < 10
    assert at_refusal == [NOT_SERVING, NOT_SERVING, SERVING]
    pair.twin = _Gone()  # type: ignore[attr-defined]


class _Gone:
    async def stop(self) -> None: ...


async def test_a_collector_that_is_away_delays_the_end_by_two_seconds_at_most(pair: Small) -> None:
    with silence() as port:
        server = pair.harness.build(pair.service, pair.server.settings.database_url)
        await server.telemetry.shutdown(1)
        server = Server(
            pair.service,
            server.settings,
            server.bus,
            telemetry=Telemetry.create(
                "notifications",
                otlp_endpoint=f"http://127.0.0.1:{port}",
                environment="test",
                version="0",
                log_stream=open(os.devnull, "w"),
            ),
        )
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            stub = staff_pb2_grpc.PoolsServiceStub(channel)
            for _ in range(20):
                await stub.ListPools(staff_pb2.ListPoolsRequest(), metadata=pair.harness.as_user("ada"))
        await asyncio.sleep(0.6)
        began = time.perf_counter()
        await server.stop()
        assert time.perf_counter() - began < 8

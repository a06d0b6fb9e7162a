"""Services come and go under load: who leaves says so first, nobody's request fails, and leaving takes no longer than it may."""

import asyncio
import contextlib
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from system import topology
from system.processes import is_serving
from system.run import System
from tests.integration.looking import connect, log_lines, metric, select_one
from tests.integration.practice import Practice, open_practice

pytestmark = [pytest.mark.integration, pytest.mark.postgres, pytest.mark.kafka, pytest.mark.slow]

AT_ONCE = 6
BOOKED = {"rpc_method": "care.scheduling.v1.AppointmentsService/CreateAppointment", "rpc_response_status_code": "OK"}
POLITELY = 8.0
"""Seconds after which the supervisor sends SIGKILL: who ended earlier ended by itself."""


@pytest.fixture(scope="module")
async def nobody_answers() -> AsyncIterator[str]:
    """A collector that takes connections and never answers."""
    open_ones = []

    async def hold(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_ones.append(writer)
        await asyncio.sleep(3600)

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    for writer in open_ones:
        writer.close()


@pytest.fixture(scope="module")
async def practice(nobody_answers: str) -> AsyncIterator[Practice]:
    system = System(
        Path(tempfile.mkdtemp(prefix="care-lifecycle-")),
        0,
        kafka=True,
        empty=True,
        replicas={"scheduling": 2},
        # One kind of dead collector each: nobody listens, and nobody answers.
        overrides={"*": {"otlp_endpoint": "http://127.0.0.1:9"}, "scheduling": {"otlp_endpoint": nobody_answers}},
        durable=False,
    )
    async with system:
        yield await open_practice(system, size=8)


class Load:
    """Clients who book and read, and who try again with the same key where the answer is UNAVAILABLE.

    The gateway tries again by itself first; `retried` counts what came through all the same.
    """

    def __init__(self, practice: Practice) -> None:
        self.answers: Counter[int | str] = Counter()
        self.slowest = 0.0
        self.retried = 0
        self._practice = practice
        self._slots = practice.slots()
        self._stopping = False

    @contextlib.asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._work()) for _ in range(AT_ONCE)]
        try:
            yield
        finally:
            self._stopping = True
            await asyncio.gather(*tasks)

    async def _work(self) -> None:
        headers = {"authorization": f"Bearer {self._practice.token}"}
        async with httpx2.AsyncClient(
            base_url=self._practice.system.url, headers=headers, timeout=15, trust_env=False
        ) as http:
            while not self._stopping:
                booked = await self._ask(http, "POST", "/v1/appointments", self._practice.booking(next(self._slots)))
                if booked is not None:
                    await self._ask(http, "GET", f"/v1/appointments/{booked['id']}")

    async def _ask(
        self, http: httpx2.AsyncClient, method: str, path: str, body: dict[str, object] | None = None
    ) -> dict[str, str] | None:
        began = time.monotonic()
        key = {"idempotency-key": str(uuid.uuid4())}
        try:
            answer = await http.request(method, path, json=body, headers=key)
            while answer.status_code == 503 and time.monotonic() - began < 10:
                self.retried += 1
                await asyncio.sleep(0.2)
                answer = await http.request(method, path, json=body, headers=key)
        except httpx2.TransportError as error:
            self.answers[type(error).__name__] += 1
            return None
        self.slowest = max(self.slowest, time.monotonic() - began)
        self.answers[answer.status_code] += 1
        found: dict[str, str] | None = answer.json() if answer.status_code == 200 else None
        return found


async def _watch(address: str, seen: list[str]) -> None:
    """Keep what a service says of itself until it is gone, without repetitions."""
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        while True:
            try:
                answer = await check(health_pb2.HealthCheckRequest(), timeout=2)
                status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
            except grpc.aio.AioRpcError:
                status = "GONE"
            if not seen or seen[-1] != status:
                seen.append(status)
            if status == "GONE":
                return
            await asyncio.sleep(0.01)


async def test_no_request_fails_while_replicas_are_restarted_one_after_the_other(practice: Practice) -> None:
    system, load = practice.system, Load(practice)
    async with load.going_on():
        await asyncio.sleep(1)
        for replica in ("scheduling", "scheduling-2"):
            instance = system.plan.instances[replica]
            seen: list[str] = []
            watching = asyncio.create_task(_watch(f"127.0.0.1:{instance.health_port}", seen))
            while not seen:
                await asyncio.sleep(0.01)
            began = time.monotonic()
            await system.stop_service(replica)
            assert time.monotonic() - began < POLITELY
            await watching
            assert seen == ["SERVING", "NOT_SERVING", "GONE"]
            await system.start_service(replica)
            async with asyncio.timeout(15):  # until the gateway has found it again
                while not await metric(system, replica, "rpc_server_call_duration_seconds_count", **BOOKED):
                    await asyncio.sleep(0.1)
    assert load.answers.keys() == {200}, load.answers
    assert load.retried <= load.answers[200] / 100, load.retried
    assert load.answers[200] > 100 and load.slowest < 10
    booked = await select_one(system, "scheduling", "SELECT count(*) FROM appointment")
    assert booked[0] * 2 == load.answers[200]


async def test_a_collector_that_is_away_delays_no_exit(practice: Practice) -> None:
    system = practice.system
    async with httpx2.AsyncClient(base_url=system.url, trust_env=False) as http:
        assert (await http.get("/openapi.json")).status_code == 200  # so that the gateway has spans to be rid of

    async def leave(name: str) -> float:
        began = time.monotonic()
        await system.stop_service(name)
        return time.monotonic() - began

    took = dict(zip(topology.NODES, await asyncio.gather(*map(leave, topology.NODES)), strict=True))
    await asyncio.gather(*map(system.start_service, topology.NODES))
    assert max(took.values()) < POLITELY, took


async def test_a_service_is_not_ready_on_a_schema_older_than_it_needs(practice: Practice) -> None:
    system = practice.system
    health = f"127.0.0.1:{system.plan.instances['feedback'].health_port}"
    await system.stop_service("feedback")
    database = await connect(system, "feedback")
    try:
        (needed,) = await database.fetchrow("SELECT version_num FROM alembic_version")
        await database.execute("UPDATE alembic_version SET version_num = '0000'")
        starting = asyncio.create_task(system.start_service("feedback"))
        async with asyncio.timeout(30):
            while log_lines(system, "feedback")[-1]["event"] != "waiting for the schema":
                await asyncio.sleep(0.1)
        await asyncio.sleep(2)
        assert not await is_serving(health) and not starting.done()
        # One that a newer build has brought is taken: pods of the old one live beside it.
        await database.execute("UPDATE alembic_version SET version_num = '9999'")
        await starting
        assert await is_serving(health)
        await database.execute("UPDATE alembic_version SET version_num = $1", needed)
    finally:
        await database.close()

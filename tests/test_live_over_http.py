"""A live view over HTTP, from the gateway to the service's database and back."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import httpx2
import pytest_asyncio

from chassis.auth import Credential, Verifier
from chassis.clients import Clients
from chassis.ids import new_id
from chassis.settings import Issuer
from chassis.telemetry import Telemetry
from chassis.testing.harness import ISSUER
from gateway.app import create_app
from gateway.serving import GatewayServer
from gateway.settings import GatewaySettings
from services.patients.roles import PERMISSIONS
from services.scheduling.appointment import Appointment, Status
from tests.planting import plant
from tests.world import World

_START = datetime.now(UTC).replace(hour=18, minute=0, second=0, microsecond=0) + timedelta(days=3)
_DAY = _START.date().isoformat()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def http(world: World) -> AsyncIterator[httpx2.AsyncClient]:
    """The gateway in front of the five services."""
    harness = world.harness
    telemetry = Telemetry.create("gateway", otlp_endpoint=None, environment="test", version="1")
    peers = {name: f"ipv4:127.0.0.1:{server.port}" for name, server in harness.servers.items()}
    clients = Clients(peers, Credential("gateway", harness.key_files["gateway"]), telemetry)
    verifier = Verifier([Issuer(issuer=ISSUER, jwks_file=harness.jwks_file, tenants={"test": harness.tenant_id})])
    settings = GatewaySettings(port=0, access_log=False)
    gateway = GatewayServer(create_app(settings, verifier, clients, telemetry))
    await gateway.start()
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}", timeout=15) as http:
        yield http
    await gateway.stop()
    await clients.close()


async def test_a_visit_that_is_cancelled_is_told_to_an_open_screen(world: World, http: httpx2.AsyncClient) -> None:
    clinic, visit = new_id(), new_id()
    await world.harness.staff("noor", sorted(PERMISSIONS), clinics=[clinic])
    patient = await world.harness.subject(clinic)
    async with world.harness.servers["scheduling"].database.engine.begin() as connection:
        await plant(
            connection,
            Appointment,
            tenant_id=world.harness.tenant_id,
            row_id=visit,
            subject_id=patient,
            status=Status.BOOKED,
            clinic_id=clinic,
            time_zone="America/New_York",
            start_time=_START,
            end_time=_START + timedelta(minutes=30),
        )
    http.headers["authorization"] = f"Bearer {world.harness.token('noor')}"
    async with http.stream("GET", f"/v1/clinics/{clinic}/dayBoard:watch?date={_DAY}") as screen:
        assert screen.status_code == 200
        lines = screen.aiter_lines()
        assert await _data(lines) == {"kind": "RESET"}
        cancelled = await http.post(f"/v1/appointments/{visit}:cancel", json={"reason": {"code": "pat"}})
        assert cancelled.status_code == 200
        told = await _data(lines)
        assert (told["resource"], told["eventType"]) == ({"type": "Appointment", "id": visit}, "appointment.cancelled")
        assert patient not in json.dumps(told)


async def test_a_clinic_of_others_is_none_and_both_are_ordinary_errors(world: World, http: httpx2.AsyncClient) -> None:
    http.headers["authorization"] = f"Bearer {world.harness.token('everybody')}"
    answers = []
    for clinic in (world.far_clinic, new_id()):
        answer = await http.get(f"/v1/clinics/{clinic}/dayBoard:watch", params={"date": _DAY})
        answers.append((answer.status_code, answer.json()))
    assert answers[0] == answers[1] and answers[0][0] == 404


async def _data(lines: AsyncIterator[str]) -> dict[str, object]:
    async with asyncio.timeout(15):
        async for line in lines:
            if line.startswith("data: "):
                found: dict[str, object] = json.loads(line.removeprefix("data: "))
                return found
    raise AssertionError("the stream ended")

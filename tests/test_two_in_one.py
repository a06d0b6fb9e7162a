"""Several services in one process and on one loop: each has what is its own, none what is another's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import prometheus_client
import pytest
import pytest_asyncio
from opentelemetry import trace

from chassis.service import Server
from chassis.testing.harness import Harness
from tests.surface import SERVICES

PAIR = ("patients", "feedback")


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def servers(database: Any) -> AsyncIterator[list[Server]]:
    harness = Harness(database)
    await harness.start(*(SERVICES[name] for name in PAIR))
    yield [harness.servers[name] for name in PAIR]
    await harness.stop()


@pytest.mark.parametrize(
    "part",
    [
        "service", "settings", "telemetry", "telemetry.registry", "telemetry.tracer", "database", "database.engine",
        "database.sessions", "database.audit", "clients", "access", "access.tables.subject", "runtime",
        "runtime.verifier", "runtime.tables.policy", "runtime.page_signer", "runtime.loops", "runtime.loop_metrics",
        "pipeline", "relay", "consumer", "sealer", "runtime.live", "health", "service.base.metadata", "service.reactions",
    ],
)  # fmt: skip
async def test_two_services_share_no(part: str, servers: list[Server]) -> None:
    first, second = (_part(server, part) for server in servers)
    assert first is not None
    assert first is not second


async def test_nothing_is_left_in_global_places(servers: list[Server]) -> None:
    own = {metric.name for metric in prometheus_client.REGISTRY.collect()}
    assert not [name for name in own if name.startswith(("care_", "rpc_"))]
    assert isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)


async def test_each_registry_tells_of_its_own_service_only(servers: list[Server]) -> None:
    for server, other in (servers, servers[::-1]):
        shown = prometheus_client.generate_latest(server.telemetry.registry).decode()
        assert f"care.{server.service.name}.v1" in shown or "care_" in shown
        assert f"care.{other.service.name}.v1" not in shown


async def test_a_change_in_one_services_session_is_not_heard_by_another(servers: list[Server]) -> None:
    sync = [server.database.sessions.kw["sync_session_class"] for server in servers]
    assert sync[0] is not sync[1]


def _part(server: Server, path: str) -> Any:
    found: Any = server
    for name in path.split("."):
        found = getattr(found, name)
    return found

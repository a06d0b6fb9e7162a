"""The furnished world, started once for all tests that only ask it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest_asyncio

from chassis.testing.harness import Harness
from tests.surface import SERVICES
from tests.world import World


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def world(database: Any) -> AsyncIterator[World]:
    """All five services with their rows; `database` makes it a test that needs a server."""
    harness = Harness(database)
    await harness.start(*SERVICES.values(), concurrency=1000, token_cache=600.0)
    world = World(harness)
    await world.furnish()
    yield world
    await harness.stop()

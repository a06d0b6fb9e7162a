"""One small service for all tests of what services get from the chassis."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from chassis.testing.harness import Harness
from chassis.tests.small import Small


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def running(database: Any) -> AsyncIterator[Small]:
    small = await Small(Harness(database)).open()
    yield small
    await small.harness.stop()


@pytest.fixture
def small(running: Small) -> Small:
    """The service, without hooks of a former test."""
    running.hooks.clear()
    return running

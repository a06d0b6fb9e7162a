"""One patients service for all tests of its work."""

import pytest_asyncio

from chassis.testing.harness import Harness
from services.patients.service import SERVICE
from services.patients.tests.desk import Desk


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def desk(database):
    harness = Harness(database)
    await harness.start(SERVICE)
    desk = Desk(harness)
    await desk.open()
    yield desk
    await harness.stop()

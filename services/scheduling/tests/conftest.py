"""A scheduling service at work and a desk before it."""

import pytest

from chassis.bus.postgres import PostgresBus
from chassis.testing.harness import Harness
from services.scheduling.service import SERVICE
from services.scheduling.tests.desk import Desk


@pytest.fixture(scope="module")
async def desk(database):
    bus_url = await database("bus")
    harness = Harness(database, PostgresBus(bus_url))
    # Visits of other days may be arrived at: tests book ahead.
    await harness.start(
        SERVICE, no_show_grace=60.0, arrival_early=20 * 366 * 86400.0, principal_cache=60.0, max_connection_age=3600.0
    )
    yield await Desk(harness, bus_url).open()
    await harness.stop()

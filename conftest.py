"""Servers that tests share: a real PostgreSQL and a real Kafka per run, started when the first test asks for them."""

import asyncio
import contextlib
import itertools
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from system.kafka import Kafka
from system.postgres import Postgres
from system.process import FolderInUse, OwnedServer

MakeDatabase = Callable[[str], Awaitable[str]]

_STILL_STARTING_SECONDS = 60


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by the servers that they ask for, so that `-m "not postgres"` needs no care."""
    for item in items:
        for fixture, marker in (("postgres_server", "postgres"), ("kafka_server", "kafka")):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)


async def _scratch_folder(kind: type[OwnedServer]) -> Path:
    """A new folder for a server, short and open to its account; those of runs that were killed are removed, with their servers.

    Not pytest's tmp_path: that one is closed to other accounts, and PostgreSQL doesn't run as root.
    """
    parent = Path(tempfile.gettempdir()) / f"care-tests-{os.getuid()}"
    parent.mkdir(exist_ok=True)
    prefix = kind.__name__.lower() + "-"
    for old in parent.glob(f"{prefix}*"):
        # OSError: another run removes it at the same moment.
        with contextlib.suppress(FolderInUse, OSError):
            if time.time() - old.stat().st_mtime > _STILL_STARTING_SECONDS:
                await kind(old).remove()
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


@contextlib.asynccontextmanager
async def _running(server: OwnedServer) -> AsyncIterator[None]:
    await server.start()
    supervision = asyncio.create_task(server.supervise())
    try:
        yield
    finally:
        await server.stop()
        await supervision
        await server.remove()


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def postgres_server() -> AsyncIterator[Postgres]:
    """The run's embedded PostgreSQL, supervised."""
    server = Postgres(await _scratch_folder(Postgres), durable=False)
    async with _running(server):
        yield server


@pytest.fixture(scope="session")
def database(postgres_server: Postgres) -> MakeDatabase:
    """`await database("patients")`: the URL (postgresql+asyncpg://) of a new, empty database with a role of its own."""
    numbers = itertools.count(1)

    async def make(name: str) -> str:
        unique = f"{name}_{next(numbers)}"
        return await postgres_server.create_database(unique, unique)

    return make


@pytest.fixture(scope="session")
def postgres_url(database: MakeDatabase) -> MakeDatabase:
    """The same as `database`."""
    return database


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def kafka_server() -> AsyncIterator[str]:
    """`host:port` of a real Kafka: KAFKA_BOOTSTRAP's, else one for this run. Tests take topics and groups with names of their own."""
    # It tells each failed connection attempt at ERROR.
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
    if given := os.environ.get("KAFKA_BOOTSTRAP"):
        yield given
        return
    server = Kafka(await _scratch_folder(Kafka))
    async with _running(server):
        yield server.bootstrap


@pytest.fixture
async def postgres_folder() -> AsyncIterator[Path]:
    """A folder for a test's own PostgreSQL; whatever still runs in it is stopped and it is removed."""
    folder = await _scratch_folder(Postgres)
    yield folder
    await Postgres(folder).remove()


@pytest.fixture
async def kafka_folder() -> AsyncIterator[Path]:
    """A folder for a test's own Kafka; whatever still runs in it is stopped and it is removed."""
    folder = await _scratch_folder(Kafka)
    yield folder
    await Kafka(folder).remove()

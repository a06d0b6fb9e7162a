"""Schemas by Alembic, one folder of revisions per service; a service isn't ready on an older schema than it needs."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine


def config(folder: Path) -> Config:
    """Alembic's configuration of one service. The scripts' environment is the chassis' own."""
    built = Config()
    built.set_main_option("script_location", str(Path(__file__).parent / "alembic"))
    built.set_main_option("version_locations", str(folder))
    built.set_main_option("path_separator", "os")
    return built


def needed(folder: Path) -> str:
    """The revision that this build needs. Revisions are numbers of four digits: a larger one is newer."""
    head = ScriptDirectory.from_config(config(folder)).get_current_head()
    assert head is not None, f"{folder} holds no revision"
    return head


async def upgrade(url: str, folder: Path, metadata: MetaData | None = None) -> None:
    """Bring a database to the newest revision. Waits at most 5 s for a lock, so that no queue builds up behind it."""
    engine = create_async_engine(url, hide_parameters=True, connect_args={"server_settings": {"lock_timeout": "5000"}})
    try:
        async with engine.begin() as connection:
            # Two migrators at once take turns.
            await connection.execute(text("SELECT pg_advisory_xact_lock(7305)"))
            await connection.run_sync(_upgrade, folder, metadata)
    finally:
        await engine.dispose()


def _upgrade(connection: Connection, folder: Path, metadata: MetaData | None) -> None:
    built = config(folder)
    built.attributes.update(connection=connection, metadata=metadata)
    command.upgrade(built, "head")


async def present(engine: AsyncEngine) -> str:
    """The revision that a database has, "" for none."""
    async with engine.connect() as connection:
        return await connection.run_sync(lambda each: MigrationContext.configure(each).get_current_revision() or "")


async def wait_for_schema(engine: AsyncEngine, folder: Path, log: Any, *, every: float = 1.0) -> None:
    """Return once the database has the revision that this build needs, or a newer one (pods of N-1 accept schema N)."""
    wanted, told = needed(folder), False
    while True:
        try:
            found = await present(engine)
            if found >= wanted:
                return
            state = f"schema {found or 'none'}"
        except Exception as error:  # not there yet, or away: both mean waiting
            state = type(error).__name__
        if not told:
            log.warning("waiting for the schema", needed=wanted, found=state)
            told = True
        await asyncio.sleep(every)


def revisions(folder: Path) -> Sequence[str]:
    """All revisions of a service, oldest first."""
    script = ScriptDirectory.from_config(config(folder))
    return [each.revision for each in reversed(list(script.walk_revisions()))]


def chassis_schema(number: str) -> Sequence[str]:
    """Statements of one frozen version of the chassis' own tables, for a service's revision to execute in order."""
    return (Path(__file__).parent / "alembic" / f"chassis_{number}.sql").read_text().rstrip().rstrip(";").split(";\n\n")

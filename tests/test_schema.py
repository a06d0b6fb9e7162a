"""Schemas: what the migrations make is what the models say, to the last predicate of an index."""

from __future__ import annotations

from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import create_async_engine

from chassis import migrations
from tests.surface import SERVICES

# What the catalogue says of everything in the schema, in its own words.
_CATALOGUE = {
    "column": "SELECT table_name || '.' || column_name, concat_ws(' ', data_type, udt_name, is_nullable, column_default,"
    " is_identity) FROM information_schema.columns WHERE table_schema = 'public'",
    "index": "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'",
    "constraint": "SELECT conrelid::regclass || '.' || conname, pg_get_constraintdef(oid) FROM pg_constraint"
    " WHERE connamespace = 'public'::regnamespace",
    "storage": "SELECT relname, array_to_string(reloptions, ',') FROM pg_class"
    " WHERE relnamespace = 'public'::regnamespace AND reloptions IS NOT NULL",
    "trigger": "SELECT tgrelid::regclass || '.' || tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal",
    "function": "SELECT proname, prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace",
}


@pytest.mark.parametrize("name", SERVICES)
async def test_the_migrated_schema_is_the_models_own(name: str, database: Any) -> None:
    service = SERVICES[name]
    migrated, made = await database(name), await database(f"{name}_models")
    await migrations.upgrade(migrated, service.migrations, service.base.metadata)
    found = await _look(migrated, lambda connection: _differences(connection, service.base.metadata))
    assert found == []

    def make(connection: Connection) -> None:
        service.base.metadata.create_all(connection)
        # The audit's triggers are no part of the metadata: they stand in the migrations alone.
        for statement in migrations.chassis_schema("0002"):
            if statement.startswith(("CREATE FUNCTION", "CREATE TRIGGER")):
                connection.exec_driver_sql(statement)

    await _look(made, make)
    by_migrations, by_models = await _look(migrated, _catalogue), await _look(made, _catalogue)
    by_migrations = {key: value for key, value in by_migrations.items() if "alembic_version" not in key[1]}
    assert by_migrations == by_models


@pytest.mark.parametrize("name", SERVICES)
def test_revisions_are_numbered_without_a_gap(name: str) -> None:
    found = migrations.revisions(SERVICES[name].migrations)
    assert list(found) == [f"{number:04d}" for number in range(1, len(found) + 1)]


async def _look(url: str, work: Any) -> Any:
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


def _differences(connection: Connection, metadata: Any) -> list[Any]:
    context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": False})
    return list(compare_metadata(context, metadata))


def _catalogue(connection: Connection) -> dict[tuple[str, str], str]:
    return {
        (kind, name): definition
        for kind, query in _CATALOGUE.items()
        for name, definition in connection.execute(text(query)).all()
    }

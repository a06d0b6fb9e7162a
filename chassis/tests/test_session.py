"""Textual statements go to the driver, in the transaction and with the errors of the session that they are executed in."""

import asyncio
from typing import Any

import pytest
from sqlalchemy import ARRAY, Text, Uuid, bindparam, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.exc import DBAPIError, IntegrityError, NoResultFound, PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from chassis.consumer import is_away
from chassis.database import engine
from chassis.ids import new_id
from chassis.session import Session
from chassis.tests.small import Small

_TYPED = text("SELECT CAST(:id AS uuid) AS id, :ids AS ids, CAST(:note AS jsonb) AS note, :name AS name").bindparams(
    bindparam("ids", type_=ARRAY(Uuid(as_uuid=False))), bindparam("name", type_=Text)
)
_ASIDE = text("INSERT INTO outbox_aside (topic, key, reason, outbox_id) VALUES (:topic, :key, 'x', 1)")


async def both_ways(small: Small, statement: Any, values: dict[str, Any]) -> list[Any]:
    """Rows by the driver and by SQLAlchemy, which must be the same."""
    answers = []
    for execute in (Session.execute, AsyncSession.execute):
        async with small.server.database.sessions() as db:
            answers.append((await execute(db, statement, values)).all())
    assert answers[0] == answers[1]
    assert [row._fields for row in answers[0]] == [row._fields for row in answers[1]]
    return list(answers[0])


async def test_both_ways_answer_alike(small: Small) -> None:
    values = {"id": new_id(), "ids": [new_id(), new_id()], "note": '{"é": [1]}', "name": "x"}
    (row,) = await both_ways(small, _TYPED, values)
    assert (row.name, row.note) == ("x", {"é": [1]})
    named = _TYPED.columns(id=Uuid(as_uuid=False), ids=ARRAY(Uuid(as_uuid=False)), note=JSONB, name=Text)
    (row,) = await both_ways(small, named, values)
    assert (row.id, row.ids) == (values["id"], values["ids"])
    assert await both_ways(small, text("SELECT 1 AS one WHERE false"), {}) == []
    among = text("SELECT n FROM generate_series(1, 5) AS n WHERE n IN :ns").bindparams(bindparam("ns", expanding=True))
    assert [row.n for row in await both_ways(small, among, {"ns": [2, 4]})] == [2, 4]
    bound = text("SELECT CAST(:name AS text) AS name").bindparams(name="x")
    assert [row.name for row in await both_ways(small, bound, {})] == ["x"]


async def test_results_are_asked_as_sqlalchemys_are(small: Small) -> None:
    async with small.server.database.sessions() as db:
        assert isinstance(db, Session)
        assert (await db.execute(text("SELECT 7 AS n"))).scalar_one() == 7
        assert list((await db.execute(text("SELECT n FROM generate_series(1, 3) AS n"))).scalars()) == [1, 2, 3]
        nothing = text("SELECT 1 AS one WHERE false")
        assert (await db.execute(nothing)).first() is None
        assert (await db.execute(nothing)).scalar_one_or_none() is None
        with pytest.raises(NoResultFound):
            (await db.execute(nothing)).one()
        key = new_id()
        assert (await db.execute(_ASIDE, {"topic": "t", "key": key})).rowcount == 1
        assert (await db.execute(text("DELETE FROM outbox_aside WHERE key = :key"), {"key": key})).rowcount == 1
        assert (await db.execute(text("DELETE FROM outbox_aside WHERE key = :key"), {"key": key})).rowcount == 0


async def test_it_is_one_transaction_with_what_sqlalchemy_sends(small: Small) -> None:
    database, key = small.server.database, new_id()
    counted = text("SELECT count(*) FROM outbox_aside WHERE key = :key")
    aside = small.server.runtime.tables.outbox.aside
    async with database.sessions() as db:
        await db.execute(_ASIDE, {"topic": "t", "key": key})
        assert len((await db.execute(select(aside.c.key).where(aside.c.key == key))).all()) == 1
        await db.rollback()
        assert (await db.execute(counted, {"key": key})).scalar_one() == 0
        await db.execute(_ASIDE, {"topic": "t", "key": key})
        await db.commit()
        await db.execute(text("DELETE FROM outbox_aside WHERE key = :key"), {"key": key})
    async with database.sessions() as db:  # what was not committed is gone with the session
        assert (await db.execute(counted, {"key": key})).scalar_one() == 1


async def test_what_fails_in_a_savepoint_fails_alone(small: Small) -> None:
    key = new_id()
    async with small.server.database.sessions() as db:
        await db.execute(_ASIDE, {"topic": "t", "key": key})
        with pytest.raises(IntegrityError):
            async with db.begin_nested():
                await db.execute(_ASIDE, {"topic": "t", "key": key})
        async with db.begin_nested():
            await db.execute(_ASIDE, {"topic": "u", "key": key})
        assert (await db.execute(text("DELETE FROM outbox_aside WHERE key = :key"), {"key": key})).rowcount == 2


async def test_nothing_goes_on_behind_a_flush_that_failed(small: Small) -> None:
    async with small.server.database.sessions() as db:
        await db.execute(text("SELECT 1"))
        name = new_id()
        db.add_all(small.models.Pool(id=new_id(), tenant_id=small.harness.tenant_id, name=name) for _ in range(2))
        with pytest.raises(IntegrityError):
            await db.flush()
        with pytest.raises(PendingRollbackError):
            await db.execute(text("SELECT 1"))
        await db.rollback()
        assert (await db.execute(text("SELECT 1"))).scalar_one() == 1


async def test_errors_are_sqlalchemys_with_state_and_constraint(small: Small) -> None:
    async with small.server.database.sessions() as db:
        await db.execute(_ASIDE, {"topic": "t", "key": "planted-value"})
        with pytest.raises(IntegrityError) as twice:
            await db.execute(_ASIDE, {"topic": "t", "key": "planted-value"})
        assert twice.value.orig is not None
        assert getattr(twice.value.orig, "sqlstate", "") == "23505"
        assert getattr(twice.value.orig.__cause__, "constraint_name", "") == "outbox_aside_pkey"
        assert twice.value.hide_parameters
        await db.rollback()
        assert (await db.execute(text("SELECT 1"))).scalar_one() == 1


async def test_a_connection_that_was_cut_is_told_as_lost_and_not_used_again(small: Small) -> None:
    database = small.server.database
    async with database.sessions() as db:
        pid = (await db.execute(text("SELECT pg_backend_pid()"))).scalar_one()
        async with database.sessions() as other:
            await other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        with pytest.raises(DBAPIError) as cut:
            await db.execute(text("SELECT 1"))
        assert cut.value.connection_invalidated
    async with database.sessions() as db:
        assert (await db.execute(text("SELECT pg_backend_pid()"))).scalar_one() != pid


async def test_where_the_server_went_away_one_statement_fails_and_not_one_a_connection(small: Small) -> None:
    own = engine(small.server.settings, application="cut")
    sessions: Any = async_sessionmaker(own, class_=Session)
    try:
        async with sessions() as one, sessions() as two, sessions() as three:
            for db in (one, two, three):
                await db.execute(text("SELECT 1"))
        cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'care-cut'"
        assert len(await small.sql(f"{cut} AND datname = current_database()")) == 3
        await asyncio.sleep(0.1)
        async with sessions() as db:
            with pytest.raises(DBAPIError):
                await db.execute(text("SELECT 1"))
        for _ in range(3):
            async with sessions() as db:
                assert (await db.execute(text("SELECT 1"))).scalar_one() == 1
    finally:
        await own.dispose()


@pytest.mark.parametrize("execute", [Session.execute, AsyncSession.execute])
async def test_a_statement_prepared_before_a_migration_is_begun_anew_like_a_lost_connections(
    small: Small, execute: Any
) -> None:
    own = engine(small.server.settings, application="migrated")
    sessions: Any = async_sessionmaker(own, class_=Session)
    looking = text("SELECT reason FROM migrated")
    await small.sql("CREATE TABLE migrated (reason text)")
    try:
        async with sessions() as one, sessions() as two:
            for db in (one, two):
                await execute(db, looking)
        await small.sql("ALTER TABLE migrated ALTER reason TYPE integer USING 1")
        async with sessions() as db:
            with pytest.raises(DBAPIError) as outdated:
                await execute(db, looking)
            assert is_away(outdated.value)  # an event is tried again, not parked; a caller is told UNAVAILABLE
        for _ in range(2):
            async with sessions() as db:
                assert (await execute(db, looking)).all() == []
    finally:
        await own.dispose()
        await small.sql("DROP TABLE migrated")


async def test_a_statement_that_took_too_long_is_not_its_own_cause(small: Small) -> None:
    own = create_async_engine(small.server.settings.database_url, connect_args={"command_timeout": 0.2})
    sessions: Any = async_sessionmaker(own, class_=Session)
    try:
        async with sessions() as db:
            with pytest.raises(TimeoutError) as late:
                await db.execute(text("SELECT pg_sleep(3)"))
            assert late.value.__cause__ is not late.value
    finally:
        await own.dispose()


async def test_a_call_that_is_given_up_leaves_no_lock_behind(small: Small) -> None:
    database, key = small.server.database, new_id()
    async with database.sessions() as db:
        await db.execute(_ASIDE, {"topic": "t", "key": key})
        await db.commit()

    async def stuck() -> None:
        async with database.sessions() as db:
            await db.execute(text("UPDATE outbox_aside SET reason = 'y' WHERE key = :key"), {"key": key})
            await db.execute(text("SELECT pg_sleep(20)"))

    task = asyncio.create_task(stuck())
    await asyncio.sleep(0.3)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with asyncio.timeout(3), database.sessions() as db:
        await db.execute(text("UPDATE outbox_aside SET reason = 'z' WHERE key = :key"), {"key": key})
        await db.commit()

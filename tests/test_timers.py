"""What falls due is found by an index, however many rows there are that don't."""

from typing import Any

import pytest
from sqlalchemy import event, text

from chassis.testing.harness import Harness
from tests.surface import SERVICES

_TIMED = sorted(name for name, service in SERVICES.items() if service.loops)


@pytest.mark.parametrize("name", _TIMED)
async def test_no_timer_reads_a_whole_table(name: str, database: Any) -> None:
    harness = Harness(database)
    await harness.start(SERVICES[name])
    server = harness.servers[name]
    looks: dict[str, Any] = {}

    def hear(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "SKIP LOCKED" in statement and "outbox" not in statement:
            looks[statement] = parameters

    event.listen(server.database.engine.sync_engine, "before_cursor_execute", hear)
    try:
        for loop in server.runtime.loops.values():
            await loop._work(server.runtime)
        async with server.database.engine.begin() as connection:
            await connection.execute(text("SET LOCAL enable_seqscan = off"))
            for statement, parameters in dict(looks).items():
                found = await connection.exec_driver_sql(f"EXPLAIN {statement}", tuple(parameters))
                plan = "\n".join(found.scalars())
                assert "Seq Scan" not in plan, plan
                assert "Index Cond" in plan, plan
    finally:
        await harness.stop()
    # Those that look for due rows at all.
    assert looks or name == "patients"

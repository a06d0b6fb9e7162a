"""The loop that deletes what was taken or freed long ago: nobody asks for it any more, and the tables grow with each visit."""

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import Interval, Text, bindparam, text

from services.scheduling.occupancy import CHANGES_KEPT_SECONDS

if TYPE_CHECKING:
    from chassis.pipeline import Runtime

PAGES = 128
EVERY_SECONDS = 3600.0
CHANGES_EVERY_SECONDS = 60.0
_REST_SECONDS = 0.05
# The packed range ends in its lane's seconds: 32 bits, of which the last second itself is free. The table is walked once,
# some pages at a time: an index would cost each booking, and looking from the start for each batch would be quadratic.
# SKIP LOCKED waits for nobody: other replicas' rows and those of a visit that is being moved are left to them. What is
# locked here lies in the past, where nobody books.
_DELETE = text(
    "DELETE FROM occupancy WHERE ctid = ANY(ARRAY("
    "SELECT ctid FROM occupancy WHERE ctid >= CAST(:first AS tid) AND ctid < CAST(:end AS tid)"
    " AND ((upper(during) - 1) & 4294967295) < extract(epoch FROM transaction_timestamp() - :kept)::bigint"
    " FOR UPDATE SKIP LOCKED))"
).bindparams(bindparam("kept", type_=Interval), bindparam("first", type_=Text), bindparam("end", type_=Text))
_DELETE_SLOTS = text(
    "DELETE FROM freed_slot WHERE ctid = ANY(ARRAY("
    "SELECT ctid FROM freed_slot WHERE create_time < transaction_timestamp() - :kept AND status NOT IN ('OPEN', 'OFFERED')"
    " LIMIT 1000 FOR UPDATE SKIP LOCKED))"
).bindparams(bindparam("kept", type_=Interval))
_DELETE_CHANGES = text(
    "DELETE FROM occupancy_change WHERE ctid = ANY(ARRAY("
    "SELECT ctid FROM occupancy_change WHERE time < transaction_timestamp() - :kept ORDER BY time LIMIT 20000"
    " FOR UPDATE SKIP LOCKED))"
).bindparams(bindparam("kept", type_=Interval))
_SIZE = text("SELECT pg_relation_size('occupancy') / current_setting('block_size')::int")


async def delete_old_occupancy(runtime: "Runtime") -> int:
    """Delete the rows that ended longer ago than `occupancy_kept`, then old freed slots; answers how many."""
    kept = timedelta(seconds=runtime.settings.occupancy_kept)  # type: ignore[attr-defined]
    done = 0
    async with runtime.database.reading() as db:
        pages = (await db.execute(_SIZE)).scalar_one()
    for first in range(0, pages, PAGES):
        async with runtime.database.acting("system:scheduling") as db:
            deleted = await db.execute(_DELETE, {"kept": kept, "first": f"({first},0)", "end": f"({first + PAGES},0)"})
            done += deleted.rowcount  # type: ignore[attr-defined]
        await asyncio.sleep(_REST_SECONDS)
    return done + await _delete_freed_slots(runtime)


async def forget_changes(runtime: "Runtime") -> int:
    """Delete what was noted of changes that every copy of the calendar has seen, or has given up for."""
    async with runtime.database.acting("system:scheduling") as db:
        deleted = await db.execute(_DELETE_CHANGES, {"kept": timedelta(seconds=CHANGES_KEPT_SECONDS)})
        return int(deleted.rowcount)  # type: ignore[attr-defined]


async def _delete_freed_slots(runtime: "Runtime") -> int:
    """Delete those that were freed longer ago than `freed_slots_kept` and are settled: some a round, the rest in the next."""
    kept = timedelta(seconds=runtime.settings.freed_slots_kept)  # type: ignore[attr-defined]
    async with runtime.database.acting("system:scheduling") as db:
        deleted = await db.execute(_DELETE_SLOTS, {"kept": kept})
        return int(deleted.rowcount)  # type: ignore[attr-defined]

"""The loop that deletes what was taken long ago: nobody asks for it any more, and the table grows with each visit."""

from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import Interval, bindparam, text

if TYPE_CHECKING:
    from chassis.pipeline import Runtime

BATCH = 500
EVERY_SECONDS = 3600.0
# The packed range ends in its lane's seconds: 32 bits, of which the last second itself is free. Rows are found by one
# sequential read an hour: what stays is bounded by what lies ahead, and an index would cost each booking.
# SKIP LOCKED waits for nobody: other replicas' rows and those of a visit that is being moved are left to them. What is
# locked here lies in the past, where nobody books.
_DELETE = text(
    "DELETE FROM occupancy WHERE ctid = ANY(ARRAY("
    "SELECT ctid FROM occupancy"
    " WHERE ((upper(during) - 1) & 4294967295) < extract(epoch FROM transaction_timestamp() - :kept)::bigint"
    " LIMIT :most FOR UPDATE SKIP LOCKED))"
).bindparams(bindparam("kept", type_=Interval))


async def delete_old_occupancy(runtime: "Runtime") -> int:
    """Delete a batch of rows that ended longer ago than `occupancy_kept`; answers how many."""
    kept = timedelta(seconds=runtime.settings.occupancy_kept)  # type: ignore[attr-defined]
    async with runtime.database.acting("system:scheduling") as db:
        deleted = await db.execute(_DELETE, {"kept": kept, "most": BATCH})
    return deleted.rowcount  # type: ignore[attr-defined, no-any-return]

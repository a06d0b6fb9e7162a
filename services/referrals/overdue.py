"""The loop that says which referrals are past due."""

from chassis.pipeline import Runtime
from chassis.timers import due
from services.referrals.referral import Referral

LOOP = "overdue referrals"


async def tell_overdue(runtime: Runtime) -> int:
    """Tell `referral.overdue` once per due time of an open referral; closed ones have none."""
    async with runtime.database.acting("system:referrals") as db:
        rows = await due(db, Referral, Referral.due_time, Referral.overdue_told.is_(False))
        for referral in rows:
            referral.tell_overdue()
    return len(rows)

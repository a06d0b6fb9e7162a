"""On what terms time that came free is filled by itself: the policy `waitlist`, and the visit type's own lock-out."""

from collections.abc import Mapping
from datetime import datetime, time, timedelta
from typing import Any, NamedTuple

from sqlalchemy.ext.asyncio import AsyncSession

from chassis import policies
from chassis.model import Act
from services.scheduling import matching
from services.scheduling.directory import VisitType
from services.scheduling.matching import Rules


class Terms(NamedTuple):
    """What holds for a slot: when and for how long it may be offered, by which weights, by which policy."""

    rules: Rules
    weights: Mapping[str, Any]
    version: int


async def terms(
    db: AsyncSession, tenant_id: str, visit_type_id: str, clinic_id: str | None, now: datetime | None = None
) -> Terms:
    """The policy `waitlist` in force, and the visit type's own lock-out where it has one; a read says the time."""
    settings = db.info["runtime"].settings
    if now is not None:
        db.info["act"] = Act("", now)
    shipped = {
        **matching.SHIPPED,
        "lockout_hours": settings.backfill_lockout / 3600,
        "offer_seconds": settings.offer_standing,
        "offer_seconds_at_least": settings.offer_standing_at_least,
        "offers_from": settings.offers_from,
        "offers_until": settings.offers_until,
    }
    policy = await policies.current(
        db, tenant_id, "waitlist", shipped, clinic=clinic_id or None, visit_type=visit_type_id
    )
    kind = await db.get(VisitType, (tenant_id, visit_type_id))
    own = kind.lock_out_minutes if kind is not None else 0
    found = policy.settings
    rules = Rules(
        timedelta(minutes=own) if own else timedelta(hours=found["lockout_hours"]),
        timedelta(seconds=found["offer_seconds"]),
        timedelta(seconds=found["offer_seconds_at_least"]),
        time.fromisoformat(found["offers_from"]),
        time.fromisoformat(found["offers_until"]),
    )
    return Terms(rules, found, policy.version)

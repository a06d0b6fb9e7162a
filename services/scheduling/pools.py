"""The teams that work can fall to, as patients last told them."""

from sqlalchemy.ext.asyncio import AsyncSession

from chassis.errors import FailedPrecondition
from chassis.projections import Team
from services.scheduling.directory import Base

PURPOSES = ("scheduling", "coordination")
"""Purposes of the pools that make visits, the better one first."""


class Pool(Team, Base):
    """A team."""


async def pool_for(db: AsyncSession, tenant_id: str, clinic_id: str) -> str:
    """The pool that makes a clinic's visits: one for scheduling, of the clinic, before others.

    Raises FailedPrecondition `NO_POOL`.
    """
    pools = await db.execute(Pool.in_use(tenant_id, PURPOSES))
    fitting = [pool for pool in pools.scalars() if pool.serves(clinic_id)]
    if not fitting:
        raise FailedPrecondition("NO_POOL", "No pool makes visits; make one for scheduling or name an owner.")
    return min(fitting, key=lambda pool: (PURPOSES.index(pool.purpose), not pool.clinic_ids, pool.id)).id

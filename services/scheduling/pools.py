"""The teams that work can fall to, as patients last told them."""

from sqlalchemy import BigInteger, Text, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from chassis.errors import FailedPrecondition
from chassis.model import Id, Ids
from services.scheduling.directory import Base

PURPOSES = ("scheduling", "coordination")
"""Purposes of the pools that make visits, the better one first."""


class Pool(Base):
    """A team."""

    __tablename__ = "pool"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    purpose: Mapped[str] = mapped_column(Text)
    clinic_ids: Mapped[list[str]] = mapped_column(Ids)
    active: Mapped[bool]


async def pool_for(db: AsyncSession, tenant_id: str, clinic_id: str) -> str:
    """The pool that makes a clinic's visits: one for scheduling, of the clinic, before others.

    Raises FailedPrecondition `NO_POOL`.
    """
    pools = await db.execute(
        select(Pool).where(Pool.tenant_id == tenant_id, Pool.purpose.in_(PURPOSES), Pool.active).order_by(Pool.id)
    )
    fitting = [pool for pool in pools.scalars() if not pool.clinic_ids or clinic_id in pool.clinic_ids]
    if not fitting:
        raise FailedPrecondition("NO_POOL", "No pool makes visits; make one for scheduling or name an owner.")
    return min(fitting, key=lambda pool: (PURPOSES.index(pool.purpose), not pool.clinic_ids, pool.id)).id

"""What referrals keeps of other services' directories: pools that take referrals, and the clinics' calendars."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date

from sqlalchemy import BigInteger, Text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from chassis.calendar import is_holiday
from chassis.errors import FailedPrecondition
from chassis.model import Id, base
from chassis.projections import Team

Base = base()
PURPOSE = "referrals"


class Clinic(Base):
    """A clinic's calendar and labels, as scheduling last told them."""

    __tablename__ = "clinic"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    time_zone: Mapped[str] = mapped_column(Text)
    holiday_region: Mapped[str] = mapped_column(Text)
    closed_dates: Mapped[list[str]] = mapped_column(ARRAY(Text))
    security_labels: Mapped[list[str]] = mapped_column(ARRAY(Text))


class Pool(Team, Base):
    """A team, with the specialties whose referrals it takes."""

    specialty_codes: Mapped[list[str]] = mapped_column(ARRAY(Text))


@dataclass(frozen=True, slots=True)
class Calendar:
    """The days and the zone by which a clinic's clocks run."""

    zone: str
    region: str
    closed: frozenset[date]


async def clinic_of(db: AsyncSession, tenant_id: str, clinic_id: str) -> Clinic:
    """A clinic whose calendar a referral can run by.

    Raises FailedPrecondition `CLINIC_UNKNOWN`, also where scheduling's event is still on its way, and
    `CLINIC_WITHOUT_ZONE`.
    """
    clinic = await db.get(Clinic, (tenant_id, clinic_id))
    if clinic is None:
        raise FailedPrecondition("CLINIC_UNKNOWN", "This clinic isn't known here.")
    if not clinic.time_zone:
        raise FailedPrecondition("CLINIC_WITHOUT_ZONE", "This clinic has no time zone yet: its clocks can't run.")
    return clinic


async def calendar_of(db: AsyncSession, tenant_id: str, clinic_id: str) -> Calendar:
    """The calendar of an open referral's clinic; UTC and the country's days where the clinic has lost its own."""
    clinic = await db.get(Clinic, (tenant_id, clinic_id))
    if clinic is None:
        return Calendar("UTC", "US", frozenset())
    return Calendar(
        clinic.time_zone or "UTC",
        _known_region(clinic.holiday_region),
        frozenset(date.fromisoformat(day) for day in clinic.closed_dates),
    )


def _known_region(region: str) -> str:
    """The region, its country, or "US": a clock by an approximate calendar is better than none."""
    for known in (region, region.partition("-")[0]):
        try:
            if known:
                is_holiday(date(2026, 1, 1), known)
                return known
        except ValueError:
            continue
    return "US"


async def pool_for(db: AsyncSession, tenant_id: str, clinic_id: str, specialty_code: str) -> Pool:
    """The pool that a specialty's referrals fall to. Raises FailedPrecondition `NO_POOL`."""
    pools = await db.execute(Pool.in_use(tenant_id, [PURPOSE]))
    chosen = best_pool(pools.scalars(), clinic_id, specialty_code)
    if chosen is None:
        raise FailedPrecondition("NO_POOL", "No pool takes referrals to this specialty; make one or name one.")
    return chosen


def best_pool(pools: Iterable[Pool], clinic_id: str, specialty_code: str) -> Pool | None:
    """One for this specialty before one for all, then one for this clinic before one for all, then the oldest."""
    fitting = [
        pool
        for pool in pools
        if (not pool.specialty_codes or specialty_code in pool.specialty_codes) and pool.serves(clinic_id)
    ]
    return min(fitting, key=lambda pool: (not pool.specialty_codes, not pool.clinic_ids, pool.id), default=None)


async def pool_of(db: AsyncSession, tenant_id: str, pool_id: str) -> Pool | None:
    """A pool in use, or None."""
    pool = await db.get(Pool, (tenant_id, pool_id))
    return pool if pool is not None and pool.active else None

"""When tasks made by events are due: the tenant's policy on the clinic's business calendar."""

from collections.abc import Mapping
from datetime import date, datetime, timedelta
from typing import Any, NamedTuple
from zoneinfo import available_timezones

from sqlalchemy import BigInteger, Text, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from chassis.calendar import add_business_days, is_business_day
from chassis.model import Id
from chassis.policies import current
from chassis.projections import keep_newer
from services.patients.patient import Base

POLICY = "task-due"
SHIPPED: Mapping[str, Any] = {
    "rebook-no-show": {"business_days": 1},
    "stranded-visit": {"business_days": 1},
    "low-score": {"business_days": 2},
    "undelivered-message": {"business_days": 1},
    "deceased-review": {"business_days": 1},
    "referral-overdue": {"business_days": 1},
    "visit-without-referral": {"business_days": 1},
    "request-overdue": {"business_days": 1},
    "visit-must-move": {"business_days": 1},
    "critical-answer": {"minutes": 15},
}
"""Code of a task to business days of the clinic or minutes after the event."""


class ClinicCalendar(Base):
    """Which days a clinic works and how it is labelled, as scheduling last told it."""

    __tablename__ = "clinic_calendar"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    time_zone: Mapped[str] = mapped_column(Text)
    holiday_region: Mapped[str] = mapped_column(Text)
    closed_dates: Mapped[list[str]] = mapped_column(ARRAY(Text))
    security_labels: Mapped[list[str]] = mapped_column(ARRAY(Text), server_default=text("'{}'"))


async def keep_clinic(
    db: AsyncSession,
    tenant_id: str,
    clinic_id: str,
    version: int,
    *,
    zone: str,
    region: str,
    closed: list[str],
    labels: list[str],
) -> None:
    """Merge a clinic's full state; an older version changes nothing."""
    values = {
        "tenant_id": tenant_id,
        "id": clinic_id,
        "version": version,
        "time_zone": zone if zone in available_timezones() else "UTC",
        "holiday_region": _known_region(region),
        "closed_dates": sorted(closed),
        "security_labels": sorted(labels),
    }
    await keep_newer(db, ClinicCalendar, values)


def _known_region(region: str) -> str:
    """The region, its country, or "US": a task with an approximate calendar is better than none."""
    for known in (region, region.partition("-")[0]):
        try:
            if known:
                is_business_day(date(2026, 1, 2), known)
                return known
        except ValueError:
            continue
    return "US"


class Due(NamedTuple):
    """A due time and the rule that set it."""

    time: datetime
    basis: str


async def due(db: AsyncSession, tenant_id: str, code: str, clinic_id: str | None, start: datetime) -> Due:
    """When a task of this code, made at `start`, must be done."""
    version, settings = await current(db, tenant_id, POLICY, SHIPPED, clinic=clinic_id)
    rule = settings[code]
    if "minutes" in rule:
        minutes = int(rule["minutes"])
        return Due(start + timedelta(minutes=minutes), f"{minutes} minutes ({POLICY} policy {version})")
    days = int(rule["business_days"])
    calendar = await _calendar(db, tenant_id, clinic_id)
    closed = frozenset(date.fromisoformat(one) for one in calendar.closed_dates) if calendar else frozenset()
    until = add_business_days(
        start,
        days,
        calendar.time_zone if calendar else "UTC",
        calendar.holiday_region if calendar else "US",
        closed,
    )
    whose = "of the clinic" if calendar else "in UTC, the clinic's calendar is not known"
    return Due(until, f"{days} business {'day' if days == 1 else 'days'} {whose} ({POLICY} policy {version})")


async def _calendar(db: AsyncSession, tenant_id: str, clinic_id: str | None) -> ClinicCalendar | None:
    if not clinic_id:
        return None
    query = select(ClinicCalendar).where(ClinicCalendar.tenant_id == tenant_id, ClinicCalendar.id == clinic_id)
    return (await db.execute(query)).scalar_one_or_none()


__all__ = ["POLICY", "SHIPPED", "ClinicCalendar", "Due", "due", "keep_clinic"]

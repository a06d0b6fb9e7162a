"""Reads what the measures are made of: each by an index, for one clinic and a bounded time."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Select, and_, case, exists, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from services.scheduling import measures
from services.scheduling.appointment import Appointment, Status
from services.scheduling.availability import Interval, open_intervals
from services.scheduling.directory import Clinic, Practitioner, Schedule, VisitType
from services.scheduling.finding import DAYS_AT_MOST, Search, free_slots
from services.scheduling.measures import Figure, Wait
from services.scheduling.waitlist import FreedSlot, SlotStatus

_CAME = (Status.ARRIVED, Status.CHECKED_IN, Status.FULFILLED)
_TOOK_TIME = (Status.BOOKED, Status.NOSHOW, *_CAME)
_DAY = 86_400


class Used(NamedTuple):
    """A practitioner's minutes."""

    practitioner_id: str
    open: int
    booked: int


class Rates(NamedTuple):
    """What became of visits; None where it would be made of too few."""

    lead_time: Figure | None
    no_show_rate: Figure | None
    late_cancel_rate: Figure | None
    fill_rate: Figure | None
    waitlist_fill_rate: Figure | None


async def staffing(db: AsyncSession, clinic: Clinic) -> list[tuple[Schedule, Practitioner]]:
    """Who has hours at the clinic."""
    query = (
        select(Schedule, Practitioner)
        .join(
            Practitioner,
            and_(Practitioner.tenant_id == Schedule.tenant_id, Practitioner.id == Schedule.practitioner_id),
        )
        .where(Schedule.tenant_id == clinic.tenant_id, Schedule.clinic_id == clinic.id, Practitioner.active)
        .order_by(Practitioner.id)
    )
    return [(schedule, practitioner) for schedule, practitioner in (await db.execute(query)).tuples()]


async def waits(db: AsyncSession, clinic: Clinic, visit_type_ids: Sequence[str] = ()) -> dict[str, Wait]:
    """Third next available by visit type; those that nobody at the clinic sees are left out."""
    query = select(VisitType).where(VisitType.tenant_id == clinic.tenant_id, VisitType.active).order_by(VisitType.id)
    if visit_type_ids:
        query = query.where(VisitType.id.in_(visit_type_ids))
    staff = await staffing(db, clinic)
    # As far ahead as a search may look.
    horizon = int(datetime.now(UTC).timestamp()) + DAYS_AT_MOST * _DAY
    found = {}
    for visit_type in (await db.execute(query)).scalars():
        thirds, now = [], 0
        for schedule, practitioner in staff:
            if not _sees(schedule, practitioner, clinic.id, visit_type):
                continue
            # Their own search: a colleague's free times must not fill the page.
            search = Search(clinic.tenant_id, visit_type.id, [clinic.id], [practitioner.id], end=horizon)
            free = await free_slots(db, search, measures.starts_to_look_at(visit_type.asks))
            now = free.now
            thirds.append(measures.third((slot.start for slot in free.slots), visit_type.asks))
        if thirds:
            found[visit_type.id] = measures.wait(now, thirds, clinic.zone)
    return found


def _sees(schedule: Schedule, practitioner: Practitioner, clinic_id: str, visit_type: VisitType) -> bool:
    """Whether a practitioner sees such visits there at all: by specialty, and by some block of their hours."""
    specialty = (visit_type.specialty or {}).get("code")
    if specialty and not practitioner.in_force(clinic_id, [specialty]):
        return False
    blocks = [block.visit_type_ids for block in schedule.weekly()]
    extra = any(one.kind == "extra" for one in schedule.exceptions_())
    return extra or any(not allowed or visit_type.id in allowed for allowed in blocks)


async def utilization(
    db: AsyncSession, base: Select[tuple[Appointment]], clinic: Clinic, begin: datetime, end: datetime
) -> list[Used]:
    """Minutes by practitioner. `base` are the tenant's appointments."""
    query = (
        base.where(
            Appointment.clinic_id == clinic.id,
            # A visit is no longer than a day; who began before may still be there.
            Appointment.start_time >= begin - timedelta(days=1),
            Appointment.start_time < end,
            Appointment.end_time > begin,
            Appointment.status.in_(_TOOK_TIME),
        )
        .with_only_columns(Appointment.practitioner_id, Appointment.start_time, Appointment.end_time)
    )  # fmt: skip
    visits: dict[str, list[Interval]] = {}
    for practitioner_id, start, stop in (await db.execute(query)).all():
        visits.setdefault(practitioner_id, []).append((int(start.timestamp()), int(stop.timestamp())))
    first, last = int(begin.timestamp()), int(end.timestamp())
    closed = clinic.closed_days(begin.date() - timedelta(days=1), end.date() + timedelta(days=1))
    used = []
    for schedule, practitioner in await staffing(db, clinic):
        opened = open_intervals(schedule.weekly(), schedule.exceptions_(), closed, clinic.zone, first, last)
        used.append(Used(practitioner.id, *measures.minutes(opened, visits.get(practitioner.id, ()))))
    return used


async def rates(
    db: AsyncSession,
    base: Select[tuple[Appointment]],
    clinic_id: str,
    begin: datetime,
    end: datetime,
    *,
    tenant_id: str,
    visit_type_id: str = "",
    practitioner_id: str = "",
) -> Rates:
    """What became of the visits that were to begin in the window, and of freed times. `base` are the tenant's appointments."""
    one, last, again = Appointment, Appointment.history[-1], aliased(Appointment)
    cancelled = and_(
        one.status == Status.CANCELLED, last["action"].astext == "cancel", last["from_status"].astext != "PENDING"
    )
    promised = one.status.in_(_TOOK_TIME) | cancelled
    due = one.status.in_((Status.NOSHOW, *_CAME))
    freed = and_(cancelled, one.update_time < one.start_time, one.overbooking == 0)
    refilled = exists(
        select(again.id).where(
            again.tenant_id == one.tenant_id,
            again.practitioner_id == one.practitioner_id,
            again.start_time > one.start_time - timedelta(hours=12),
            again.start_time < one.end_time,
            again.end_time > one.start_time,
            again.status.in_(_TOOK_TIME),
            again.overbooking == 0,
        )
    )
    # When one that was imported had been promised isn't known.
    agreed = and_(promised, one.source_system == "")
    lead = case((agreed, func.extract("epoch", one.start_time - one.create_time)))
    query = base.where(one.clinic_id == clinic_id, one.start_time >= begin, one.start_time < end)
    if visit_type_id:
        query = query.where(one.visit_type_id == visit_type_id)
    if practitioner_id:
        query = query.where(one.practitioner_id == practitioner_id)
    row: Any = (
        await db.execute(
            query.with_only_columns(
                func.count().filter(promised).label("promised"),
                func.count().filter(agreed).label("agreed"),
                func.count().filter(due).label("due"),
                func.count().filter(one.status == Status.NOSHOW).label("missed"),
                func.count().filter(and_(cancelled, one.late_cancel)).label("late"),
                func.count().filter(freed).label("freed"),
                func.count().filter(and_(freed, refilled)).label("refilled"),
                func.percentile_cont(0.5).within_group(lead).label("lead"),
            )
        )
    ).one()
    enough = row.agreed >= measures.FEWEST
    return Rates(
        Figure(round(float(row.lead) / _DAY, 2), row.agreed) if enough else None,
        measures.share(row.missed, row.due),
        measures.share(row.late, row.promised),
        measures.share(row.refilled, row.freed),
        await _filled_from_waitlist(db, tenant_id, clinic_id, begin, end, visit_type_id, practitioner_id),
    )


async def _filled_from_waitlist(
    db: AsyncSession,
    tenant_id: str,
    clinic_id: str,
    begin: datetime,
    end: datetime,
    visit_type_id: str,
    practitioner_id: str,
) -> Figure | None:
    settled = select(
        func.count().label("settled"),
        func.count().filter(FreedSlot.status == SlotStatus.FILLED).label("filled"),
    ).where(
        FreedSlot.tenant_id == tenant_id,
        FreedSlot.clinic_id == clinic_id,
        FreedSlot.start_time >= begin,
        FreedSlot.start_time < end,
        FreedSlot.status.not_in([SlotStatus.OPEN, SlotStatus.OFFERED]),
    )
    if visit_type_id:
        settled = settled.where(FreedSlot.visit_type_id == visit_type_id)
    if practitioner_id:
        settled = settled.where(FreedSlot.practitioner_id == practitioner_id)
    row: Any = (await db.execute(settled)).one()
    return measures.share(row.filled, row.settled)

"""The loop that measures each clinic once in its own night and tells the figures."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.ids import new_id
from chassis.timers import due
from services.scheduling import measures, measuring
from services.scheduling.appointment import Appointment
from services.scheduling.directory import Clinic
from services.scheduling.measures import NIGHTLY_DAYS, Figure, Kind, Measure, MeasureRun

if TYPE_CHECKING:
    from chassis.pipeline import Runtime

EVERY_SECONDS = 60.0
_NEW_AT_MOST = 100


async def take_measures(runtime: "Runtime") -> int:
    """Measure one clinic that is due, in the transaction that plans its next night: told once, whatever is killed."""
    async with runtime.database.acting("system:scheduling") as db:
        await _plan_new(db)
        runs = await due(db, MeasureRun, MeasureRun.due_time, limit=1)  # type: ignore[type-var]
        for run in runs:
            clinic = await db.get(Clinic, (run.tenant_id, run.id))
            now = db.info["act"].now
            if clinic is None or not clinic.bookable:  # it is planned anew once it is
                await db.delete(run)
                continue
            await _measure(db, clinic, run.due_time)
            run.due_time = measures.next_night(now, clinic.zone)
    return len(runs)


async def _plan_new(db: AsyncSession) -> None:
    unplanned = (
        select(Clinic)
        .outerjoin(MeasureRun, and_(MeasureRun.tenant_id == Clinic.tenant_id, MeasureRun.id == Clinic.id))
        .where(MeasureRun.id.is_(None), Clinic.status == "ACTIVE", Clinic.time_zone != "")
        .limit(_NEW_AT_MOST)
    )
    clinics = list((await db.execute(unplanned)).scalars())
    if clinics:
        now = datetime.now(UTC)
        rows = [
            {"tenant_id": one.tenant_id, "id": one.id, "due_time": measures.next_night(now, one.zone)}
            for one in clinics
        ]
        await db.execute(insert(MeasureRun).values(rows).on_conflict_do_nothing())


async def _measure(db: AsyncSession, clinic: Clinic, night: datetime) -> None:
    """About the day that ended before the planned night, however late it is measured; nothing twice about one day."""
    day = night.astimezone(clinic.zone).date() - timedelta(days=1)
    known = select(Measure.id).where(
        Measure.tenant_id == clinic.tenant_id, Measure.clinic_id == clinic.id, Measure.date == day.isoformat()
    )
    if (await db.execute(known.limit(1))).first() is not None:
        return
    first = day - timedelta(days=NIGHTLY_DAYS - 1)
    begin, end = measures.days(first.isoformat(), day.isoformat(), clinic.zone, NIGHTLY_DAYS)
    base = select(Appointment).where(Appointment.tenant_id == clinic.tenant_id)
    used = await measuring.utilization(db, base, clinic, begin, end)
    found = await measuring.rates(db, base, clinic.id, begin, end, tenant_id=clinic.tenant_id)
    waits = await measuring.waits(db, clinic)

    def figures() -> Iterator[tuple[Kind, str | None, Figure | None]]:
        for visit_type_id, wait in waits.items():
            if wait.days is not None:
                yield Kind.THIRD_NEXT_AVAILABLE, visit_type_id, Figure(wait.days, wait.practitioners)
        opened = sum(one.open for one in used)
        if opened:
            yield Kind.UTILIZATION, None, Figure(sum(one.booked for one in used) / opened, opened)
        for name, figure in found._asdict().items():
            yield Kind[name.upper()], None, figure

    for kind, visit_type_id, figure in figures():
        if figure is not None:
            values: dict[str, Any] = figure._asdict()
            row = Measure(
                tenant_id=clinic.tenant_id,
                id=new_id(),
                clinic_id=clinic.id,
                visit_type_id=visit_type_id,
                kind=kind,
                date=day.isoformat(),
                **values,
            )
            row.tell("taken")
            db.add(row)

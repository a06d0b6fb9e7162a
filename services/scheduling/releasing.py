"""The loop that notices when blocks that were held back are released, so that who waits is offered what has opened."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.model import by_id
from chassis.timers import due
from services.scheduling.availability import DAY, Interval, WeeklyHours, intersect, occurrences, open_intervals
from services.scheduling.directory import Clinic, Practitioner, Schedule
from services.scheduling.waitlist import OPEN, OpenedHours, WaitlistEntry

if TYPE_CHECKING:
    from chassis.pipeline import Runtime

EVERY_SECONDS = 30.0
_AT_A_TIME = 20


async def notice_releases(runtime: "Runtime") -> int:
    """Note what was released at the schedules whose next release is past; answers how many those were."""
    async with runtime.database.acting("system:scheduling") as db:
        now: datetime = db.info["act"].now
        schedules = await due(db, Schedule, Schedule.release_time, limit=_AT_A_TIME)
        for schedule in schedules:
            clinic = await db.get_one(Clinic, (schedule.tenant_id, schedule.clinic_id))
            practitioner = await db.get_one(Practitioner, (schedule.tenant_id, schedule.practitioner_id))
            following = now + timedelta(days=1)
            if clinic.bookable and practitioner.active:
                assert schedule.release_time is not None
                await _note(db, schedule, clinic, released(schedule, clinic, schedule.release_time, now))
                following = next_release(schedule, clinic, now)
            # Not by the row's own change: the schedule is the same, and so is its etag.
            await db.execute(
                update(Schedule)
                .where(by_id(Schedule, schedule.tenant_id, schedule.id))
                .values(release_time=following, update_time=Schedule.update_time)
                .execution_options(synchronize_session=False)
            )
    return len(schedules)


def released(
    schedule: Schedule, clinic: Clinic, since: datetime, until: datetime
) -> list[tuple[WeeklyHours, list[Interval]]]:
    """What was released from `since` to `until`, block by block; closed days and leave are taken off."""
    first, last = int(until.timestamp()), int(until.timestamp())
    found = []
    for block in _held_back(schedule):
        before = 3600 * block.release_hours
        fresh = [
            occurrence
            for occurrence in occurrences(block, clinic.zone, first, last + before + 2 * DAY)
            if since.timestamp() <= occurrence[0] - before <= until.timestamp()
        ]
        if not fresh:
            continue
        begin, end = fresh[0][0], fresh[-1][1]
        days = [datetime.fromtimestamp(at, UTC).date() for at in (begin - 2 * DAY, end + 2 * DAY)]
        opened = open_intervals([block], schedule.exceptions_(), clinic.closed_days(*days), clinic.zone, begin, end)
        if windows := intersect(fresh, opened):
            found.append((block, windows))
    return found


def next_release(schedule: Schedule, clinic: Clinic, now: datetime) -> datetime:
    """When a block is released next; looked at anew after a day at the latest, since weeks may lie before the first."""
    at, soonest = now.timestamp(), now.timestamp() + DAY
    for block in _held_back(schedule):
        before = 3600 * block.release_hours
        for begin, _ in occurrences(block, clinic.zone, int(at), int(soonest) + before):
            if at < begin - before < soonest:
                soonest = begin - before
    return datetime.fromtimestamp(soonest, UTC)


def _held_back(schedule: Schedule) -> Iterable[WeeklyHours]:
    return [block for block in schedule.weekly() if block.release_hours]


async def _note(
    db: AsyncSession, schedule: Schedule, clinic: Clinic, found: list[tuple[WeeklyHours, list[Interval]]]
) -> None:
    if not found:
        return
    waiting = select(WaitlistEntry.visit_type_id).where(
        WaitlistEntry.tenant_id == schedule.tenant_id, WaitlistEntry.status.in_(OPEN)
    )
    for kind in (await db.execute(waiting.distinct())).scalars():
        windows = sorted(one for block, opened in found if block.takes(kind) for one in opened)
        if windows:
            db.add(
                OpenedHours(
                    tenant_id=schedule.tenant_id,
                    visit_type_id=kind,
                    clinic_id=clinic.id,
                    practitioner_id=schedule.practitioner_id,
                    windows=[list(one) for one in windows],
                )
            )

"""Which bookings ahead the hours of a schedule don't hold: found when hours change, told, and left where they are."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.scheduling.appointment import Appointment, Status
from services.scheduling.availability import DAY, Interval, open_intervals
from services.scheduling.directory import Clinic, Schedule


class Booked(Protocol):
    """What is asked of a booking."""

    id: Any
    practitioner_id: Any
    visit_type_id: Any
    start_time: Any
    end_time: Any


B = TypeVar("B", bound=Booked)


def outside(schedule: Schedule, clinic: Clinic, bookings: Iterable[B]) -> list[B]:
    """Those of a schedule's bookings that its hours don't hold, as they will be when all that is held back is released."""
    bookings = list(bookings)
    if not bookings or not clinic.time_zone:
        return bookings
    first = int(min(one.start_time for one in bookings).timestamp()) - DAY
    last = int(max(one.end_time for one in bookings).timestamp()) + DAY
    days = [datetime.fromtimestamp(at, UTC).date() for at in (first, last)]
    closed = clinic.closed_days(days[0] - timedelta(days=2), days[1] + timedelta(days=2))
    opened: dict[str, list[Interval]] = {
        kind: open_intervals(
            schedule.weekly(), schedule.exceptions_(), closed, clinic.zone, first, last, visit_type_id=kind
        )
        for kind in {str(one.visit_type_id) for one in bookings}
    }
    return [
        one
        for one in bookings
        if not any(
            begin <= one.start_time.timestamp() and one.end_time.timestamp() <= end
            for begin, end in opened[str(one.visit_type_id)]
        )
    ]


class Stranding:
    """Around a change of hours: what they held before and don't hold after is told as `appointment.stranded`.

    A booking that is under way while the hours change is not told, but listed like all others from then on.
    """

    def __init__(self, db: AsyncSession, now: datetime) -> None:
        self._db = db
        self._now = now
        self._bookings: dict[tuple[str, str], list[Any]] = {}
        self._before: set[str] = set()

    async def before(self, clinic: Clinic, schedules: Sequence[Schedule]) -> None:
        """Look at the bookings ahead with the hours as they still are."""
        columns = (
            Appointment.id,
            Appointment.practitioner_id,
            Appointment.visit_type_id,
            Appointment.start_time,
            Appointment.end_time,
        )
        rows = await self._db.execute(
            select(*columns).where(
                Appointment.tenant_id == clinic.tenant_id,
                Appointment.clinic_id == clinic.id,
                Appointment.practitioner_id.in_([one.practitioner_id for one in schedules]),
                Appointment.status == Status.BOOKED,
                Appointment.start_time > self._now,
            )
        )
        for row in rows:
            self._bookings.setdefault((clinic.id, row.practitioner_id), []).append(row)
        self._before = set(self._outside(clinic, schedules))

    async def after(self, clinic: Clinic, schedules: Sequence[Schedule]) -> list[Appointment]:
        """Tell each booking that is outside now and wasn't; answers them. Locked by id, as all who lock several do."""
        fresh = set(self._outside(clinic, schedules)) - self._before
        if not fresh:
            return []
        rows = await self._db.execute(
            select(Appointment)
            .where(
                Appointment.tenant_id == clinic.tenant_id,
                Appointment.id.in_(fresh),
                Appointment.status == Status.BOOKED,
                Appointment.start_time > self._now,
            )
            .order_by(Appointment.id)
            .with_for_update(of=Appointment, key_share=True)
        )
        left = list(rows.scalars())
        for one in left:
            one.tell("stranded")
        return left

    def _outside(self, clinic: Clinic, schedules: Sequence[Schedule]) -> list[str]:
        return [
            one.id
            for schedule in schedules
            for one in outside(schedule, clinic, self._bookings.get((clinic.id, schedule.practitioner_id), ()))
        ]

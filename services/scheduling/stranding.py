"""What a change of the directory leaves outside and what it opens: bookings are told and left where they are, times that
are open now and weren't are noted for who waits."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from services.scheduling.appointment import Appointment, Status
from services.scheduling.availability import DAY, Interval, intersect, open_intervals, subtract
from services.scheduling.directory import Clinic, Practitioner, Resource, Schedule, exceptions
from services.scheduling.finding import DAYS_AT_MOST
from services.scheduling.waitlist import OPEN, OpenedHours, WaitlistEntry

_NO_TYPE = "00000000-0000-0000-0000-000000000000"
_GAP = timedelta(days=31)
Seat = tuple[str, str]
"""A practitioner at a clinic."""


class Booked(Protocol):
    """What is asked of a booking."""

    id: Any
    clinic_id: Any
    practitioner_id: Any
    visit_type_id: Any
    start_time: Any
    end_time: Any
    participants: Any


B = TypeVar("B", bound=Booked)
COLUMNS = (
    Appointment.id,
    Appointment.clinic_id,
    Appointment.practitioner_id,
    Appointment.visit_type_id,
    Appointment.start_time,
    Appointment.end_time,
    Appointment.participants,
)
"""Those of a `Booked`."""


@dataclass(slots=True)
class Hours:
    """All that says when visits can take place, of some bookings and seats."""

    clinics: Mapping[str, Clinic] = field(default_factory=dict)
    practitioners: Mapping[str, Practitioner] = field(default_factory=dict)
    schedules: dict[Seat, Schedule] = field(default_factory=dict)
    resources: Mapping[str, Resource] = field(default_factory=dict)

    def opened(self, seat: Seat, first: int, last: int, visit_type_id: str) -> list[Interval]:
        """When a seat sees such visits, as it will be once all that is held back is released."""
        practitioner, clinic = self.practitioners.get(seat[0]), self.clinics.get(seat[1])
        schedule = self.schedules.get(seat)
        if schedule is None or clinic is None or not clinic.bookable or practitioner is None or not practitioner.active:
            return []
        opened = open_intervals(
            schedule.weekly(), schedule.exceptions_(), _closed(clinic, first, last), clinic.zone, first, last, visit_type_id
        )  # fmt: skip
        return intersect(opened, practitioner.in_force(seat[1]))

    def outside(self, bookings: Iterable[B]) -> list[B]:
        """Those that can't take place: hours, leave, closed days, a clinic that is suspended, a role that is over, a
        practitioner, room, device or interpreter who or that is no longer there."""
        by_seat: dict[tuple[Seat, str], list[B]] = {}
        for one in bookings:
            seat = (str(one.practitioner_id), str(one.clinic_id))
            by_seat.setdefault((seat, str(one.visit_type_id)), []).append(one)
        left: list[B] = []
        for (seat, visit_type_id), group in by_seat.items():
            for near in _near(group):
                first, last = _reach(near)
                opened = self.opened(seat, first, last, visit_type_id)
                left += [one for one in near if not (_holds(opened, one) and self._resources_hold(one))]
        return left

    def _resources_hold(self, one: Booked) -> bool:
        clinic = self.clinics[str(one.clinic_id)]
        for resource_id in _resources(one):
            resource = self.resources.get(resource_id)
            if resource is None or not resource.active:
                return False
            if not (resource.weekly_hours or resource.exceptions):
                continue
            first, last = _reach([one])
            opened = open_intervals(
                resource.hours,
                exceptions(resource.exceptions, "resource"),
                _closed(clinic, first, last),
                clinic.zone,
                first,
                last,
                str(one.visit_type_id),
            )
            if not _holds(opened, one):
                return False
        return True


async def hours_of(
    db: AsyncSession, tenant_id: str, bookings: Sequence[Booked], schedules: Sequence[Schedule] = (), **more: str
) -> Hours:
    """The hours around some bookings and schedules; `clinic_id` and `practitioner_id` may name one more each."""
    seats = {(str(one.practitioner_id), str(one.clinic_id)) for one in bookings}
    found = {(one.practitioner_id, one.clinic_id): one for one in schedules}
    seats |= set(found)
    practitioners = {who for who, _ in seats} | {more.get("practitioner_id", "")}
    clinics = {where for _, where in seats} | {more.get("clinic_id", "")}

    async def known(model: Any, wanted: Iterable[str]) -> dict[str, Any]:
        ids = sorted({*wanted} - {""})
        if not ids:
            return {}
        rows = await db.execute(select(model).where(model.tenant_id == tenant_id, model.id.in_(ids)))
        return {one.id: one for one in rows.scalars()}

    if missing := seats - set(found):
        rows = await db.execute(
            select(Schedule).where(
                Schedule.tenant_id == tenant_id,
                Schedule.practitioner_id.in_(sorted({who for who, _ in missing})),
                Schedule.clinic_id.in_(sorted({where for _, where in missing})),
            )
        )
        found.update({(one.practitioner_id, one.clinic_id): one for one in rows.scalars()})
    return Hours(
        await known(Clinic, clinics),
        await known(Practitioner, practitioners),
        found,
        await known(Resource, (each for one in bookings for each in _resources(one))),
    )


class Stranding:
    """Around a change of the directory: what held before and doesn't hold after is told as `appointment.stranded`, what
    opens while somebody waits for it goes to the waitlist.

    A booking that is under way while the hours change is not told, but listed like all others from then on.
    """

    def __init__(self, db: AsyncSession, tenant_id: str, now: datetime) -> None:
        self._db, self._tenant_id, self._now = db, tenant_id, now
        self._bookings: list[Any] = []
        self._hours = Hours()
        self._before: set[str] = set()
        self._waiting: list[str] = []
        self._opened: dict[tuple[Seat, str], list[Interval]] = {}

    async def before(self, *, clinic_id: str = "", practitioner_id: str = "", resource_id: str = "") -> None:
        """Look at the bookings ahead of this clinic, practitioner (or one at the other) or resource as it still is."""
        query = select(*COLUMNS).where(
            Appointment.tenant_id == self._tenant_id,
            Appointment.status == Status.BOOKED,
            Appointment.start_time > self._now,
        )
        hours = select(Schedule).where(Schedule.tenant_id == self._tenant_id)
        if clinic_id:
            query, hours = query.where(Appointment.clinic_id == clinic_id), hours.where(Schedule.clinic_id == clinic_id)
        if practitioner_id:
            query = query.where(Appointment.practitioner_id == practitioner_id)
            hours = hours.where(Schedule.practitioner_id == practitioner_id)
        schedules: list[Schedule] = []
        if resource_id:
            query = query.where(Appointment.participants.contains([{"actor": {"type": "Resource", "id": resource_id}}]))
        else:
            schedules = list((await self._db.execute(hours)).scalars())
            waiting = select(WaitlistEntry.visit_type_id).where(
                WaitlistEntry.tenant_id == self._tenant_id, WaitlistEntry.status.in_(OPEN)
            )
            self._waiting = list((await self._db.execute(waiting.distinct())).scalars())
        self._bookings = list((await self._db.execute(query)).all())
        self._hours = await hours_of(
            self._db,
            self._tenant_id,
            self._bookings,
            schedules,
            clinic_id=clinic_id,
            practitioner_id=practitioner_id,
        )
        self._before = {one.id for one in self._hours.outside(self._bookings)}
        self._opened = self._open_now()

    async def after(self, added: Schedule | None = None) -> list[Appointment]:
        """Tell each booking that is outside now and wasn't; answers them. `added` are hours that there were none of.

        Locked by id, as all who lock several do.
        """
        if added is not None:
            self._hours.schedules[added.practitioner_id, added.clinic_id] = added
        self._note_opened()
        fresh = {one.id for one in self._hours.outside(self._bookings)} - self._before
        if not fresh:
            return []
        rows = await self._db.execute(
            select(Appointment)
            .where(
                Appointment.tenant_id == self._tenant_id,
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

    def _open_now(self) -> dict[tuple[Seat, str], list[Interval]]:
        """What is open as far ahead as a search may look, by seat and waited-for visit type."""
        if not self._waiting:
            return {}
        first = int(self._now.timestamp())
        last = first + DAYS_AT_MOST * DAY
        opened = {}
        for seat, schedule in self._hours.schedules.items():
            # Types that no block names are let in by the same blocks: one look for all of them.
            named = {one for block in schedule.weekly() for one in block.visit_type_ids}
            others = self._hours.opened(seat, first, last, _NO_TYPE)
            for kind in self._waiting:
                opened[seat, kind] = self._hours.opened(seat, first, last, kind) if kind in named else others
        return opened

    def _note_opened(self) -> None:
        for (seat, kind), now in self._open_now().items():
            fresh = subtract(now, self._opened.get((seat, kind), []))
            if fresh:
                practitioner_id, clinic_id = seat
                self._db.add(
                    OpenedHours(
                        tenant_id=self._tenant_id,
                        visit_type_id=kind,
                        clinic_id=clinic_id,
                        practitioner_id=practitioner_id,
                        windows=[list(one) for one in fresh],
                    )
                )


def _resources(one: Booked) -> list[str]:
    return [str(each["actor"]["id"]) for each in one.participants or () if each["actor"]["type"] == "Resource"]


def _near(bookings: Sequence[B]) -> list[list[B]]:
    """In runs without a gap of more than a month: between a visit of next week and one of 2099 nobody needs the hours."""
    runs: list[list[B]] = []
    for one in sorted(bookings, key=lambda each: each.start_time):
        if not runs or one.start_time - runs[-1][-1].start_time > _GAP:
            runs.append([])
        runs[-1].append(one)
    return runs


def _reach(bookings: Sequence[Booked]) -> Interval:
    """A window that holds some bookings, with a day to each side."""
    first, last = min(one.start_time for one in bookings), max(one.end_time for one in bookings)
    return int(first.timestamp()) - DAY, int(last.timestamp()) + DAY


def _closed(clinic: Clinic, first: int, last: int) -> frozenset[Any]:
    days = [datetime.fromtimestamp(at, UTC).date() for at in (first, last)]
    return clinic.closed_days(days[0] - timedelta(days=2), days[1] + timedelta(days=2))


def _holds(opened: Sequence[Interval], one: Booked) -> bool:
    begin, end = one.start_time.timestamp(), one.end_time.timestamp()
    return any(first <= begin and end <= last for first, last in opened)

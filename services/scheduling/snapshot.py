"""A tenant's directory as a search needs it: read once, kept in the process, and read again when anything in it changed.

Whether it did, the look that brings the calendar up to date says, too: the sum of all versions. A version only rises and
no entry is ever deleted, so that each change makes the sum greater, and two states of one server with one sum are the
same state.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary
from zoneinfo import ZoneInfo

from sqlalchemy import BigInteger, Uuid, bindparam, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.errors import Invalid
from services.scheduling.availability import DateException, Interval, WeeklyHours
from services.scheduling.directory import Clinic, Practitioner, Resource, Schedule, VisitType, exceptions, weekly
from services.scheduling.mirror import VERSION, Fetch, Mirror, Starts

_SCHEDULES_AT_MOST, _RESOURCES_AT_MOST, _TENANTS_AT_MOST = 20_000, 50_000, 64
_ROWS_AT_MOST = 1_000_000  # of all calendars that are kept: some 150 MB
_ROWS_OF_STARTS = 50  # somebody's starts for a visit type take as much room as so many


@dataclass(frozen=True, slots=True)
class Seat:
    """A practitioner at a clinic, with the hours there."""

    practitioner_id: str
    clinic_id: str
    weekly: tuple[WeeklyHours, ...]
    public: tuple[WeeklyHours, ...]
    """Those of them that patients may see."""
    exceptions: tuple[DateException, ...]
    practitioner: Practitioner
    limited: bool
    """Some block has quotas."""
    held_back: bool
    """Some block is held back until some time."""


@dataclass(frozen=True, slots=True)
class Room:
    """A room, device or interpreter of a clinic."""

    id: str
    kind: str
    languages: tuple[str, ...]
    hours: tuple[WeeklyHours, ...] | None
    exceptions: tuple[DateException, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """A clinic where visits can be booked."""

    id: str
    zone: ZoneInfo
    time_zone: str
    position: tuple[float, float] | None
    closed_days: Callable[[date, date], frozenset[date]]


@dataclass(slots=True)
class Directory:
    """Who sees patients where, and with what."""

    visit_types: dict[str, VisitType]
    clinics: dict[str, Place]
    seats: Sequence[Seat]
    """By clinic and practitioner."""
    rooms: Mapping[str, Sequence[Room]]
    """By clinic."""
    version: tuple[int, int] = (0, 0)
    ranges: dict[Any, list[Interval]] = field(default_factory=dict)
    """When roles are in force, worked out once."""
    fitting: dict[Any, list[Seat]] = field(default_factory=dict)
    """Who comes into question for searches without wishes."""
    days: dict[Any, tuple[list[Starts], list[tuple[int, int, int, int]]]] = field(default_factory=dict)
    """The same counted by clinic and day."""
    starts: dict[Any, Starts] = field(default_factory=dict)
    """All starts of visits, worked out once for each change of the calendar."""

    def visit_type(self, visit_type_id: str) -> VisitType:
        """Raises Invalid `VISIT_TYPE_UNKNOWN`."""
        found = self.visit_types.get(visit_type_id)
        if found is None:
            raise Invalid("VISIT_TYPE_UNKNOWN", "There is no such visit type.", field="visit_type_id")
        return found

    def in_force(self, seat: Seat, specialties: frozenset[str]) -> list[Interval]:
        """When a practitioner's roles at the clinic are in force, as `Practitioner.in_force` says."""
        key = (seat.practitioner_id, seat.clinic_id, specialties)
        found = self.ranges.get(key)
        if found is None:
            if len(self.ranges) > 4 * len(self.seats) + 1000:  # wishes are many
                self.ranges.clear()
            found = self.ranges[key] = seat.practitioner.in_force(seat.clinic_id, specialties)
        return found


@dataclass(slots=True)
class _Kept:
    """What is kept of a tenant."""

    mirror: Mirror = field(default_factory=Mirror)
    directory: Directory | None = None
    reading: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def rows(self) -> int:
        """What it takes, counted in rows of the calendar."""
        return self.mirror.rows + _ROWS_OF_STARTS * len(self.directory.starts if self.directory else ())


class Directories:
    """The directories and calendars that were read, by database and tenant; those asked for last are kept."""

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[Any, OrderedDict[str, _Kept]] = WeakKeyDictionary()

    async def current(
        self, database: Any, tenant_id: str, fetch: Fetch, session: Callable[[], AsyncSession]
    ) -> tuple[Directory, Mirror]:
        """The directory as it is now, and the calendar with the database's clock. One statement where nothing changed,
        for all who ask at the same time.
        """
        tenants = self._kept.setdefault(database, OrderedDict())
        kept = tenants.setdefault(tenant_id, _Kept())
        tenants.move_to_end(tenant_id)
        while len(tenants) > _TENANTS_AT_MOST or (
            len(tenants) > 1 and sum(one.rows for one in tenants.values()) > _ROWS_AT_MOST
        ):
            tenants.popitem(last=False)
        await kept.mirror.look(fetch, tenant_id)
        found = kept.directory
        if found is None or found.version != kept.mirror.version:
            # One for all: each keeps a place at the database until its call ends, and all of them, waiting for the calendar,
            # would leave none to whoever looks at it.
            async with kept.reading:
                version, found = kept.mirror.version, kept.directory
                if found is None or found.version != version:
                    found = kept.directory = await read(session(), tenant_id)
                    # What was read may be newer already; then the next one sees another sum and reads again.
                    found.version = version
        return found, kept.mirror


async def look(fetch: Fetch, tenant_id: str) -> tuple[int, int]:
    """The database's clock in epoch seconds, and the version of the whole directory."""
    ((now, version),) = await fetch(_VERSION, {"tenant": tenant_id})
    return int(now), int(version)


async def read(db: AsyncSession, tenant_id: str, clinic_ids: Collection[str] = ()) -> Directory:
    """All that can be booked, or all at some clinics. Five statements."""
    kinds = await db.execute(select(*VisitType.__table__.columns).where(VisitType.tenant_id == tenant_id))
    visit_types = {row["id"]: VisitType(**row) for row in kinds.mappings()}
    clinics = {row.id: _place(row) for row in await db.execute(_of(Clinic, tenant_id)) if row.status == "ACTIVE"}
    clinics = {clinic_id: place for clinic_id, place in clinics.items() if place is not None}
    people = {
        row.id: Practitioner(
            id=row.id,
            roles=row.roles,
            languages=row.languages,
            licensed_states=row.licensed_states,
            gender=row.gender,
        )
        for row in await db.execute(_of(Practitioner, tenant_id))
        if row.active
    }
    hours, things = _of(Schedule, tenant_id), _of(Resource, tenant_id)
    if clinic_ids:
        hours, things = (
            hours.where(Schedule.clinic_id.in_(clinic_ids)),
            things.where(Resource.clinic_id.in_(clinic_ids)),
        )
    hours = hours.order_by(Schedule.clinic_id, Schedule.practitioner_id).limit(_SCHEDULES_AT_MOST)
    seats = [
        _seat(row, people[row.practitioner_id])
        for row in await db.execute(hours)
        if row.clinic_id in clinics and row.practitioner_id in people
    ]
    rooms: dict[str, list[Room]] = {}
    for row in await db.execute(things.order_by(Resource.id).limit(_RESOURCES_AT_MOST)):
        if row.active:
            rooms.setdefault(row.clinic_id, []).append(
                Room(
                    row.id,
                    row.kind,
                    tuple(row.languages or ()),
                    weekly(row.weekly_hours, "resource") or None,
                    exceptions(row.exceptions, "resource"),
                )
            )
    return Directory(visit_types, clinics, seats, rooms)


def _of(model: Any, tenant_id: str) -> Any:
    return select(*model.__table__.columns).where(model.tenant_id == tenant_id)


def _place(row: Any) -> Place | None:
    clinic = Clinic(time_zone=row.time_zone, holiday_region=row.holiday_region, closed_dates=row.closed_dates)
    if not row.time_zone:
        return None
    position = (row.position.get("latitude", 0.0), row.position.get("longitude", 0.0)) if row.position else None
    return Place(row.id, clinic.zone, row.time_zone, position, lru_cache(64)(clinic.closed_days))


def _seat(row: Any, practitioner: Practitioner) -> Seat:
    blocks = weekly(row.weekly_hours, "schedule")
    return Seat(
        row.practitioner_id,
        row.clinic_id,
        blocks,
        tuple(block for block in blocks if not block.staff_only),
        exceptions(row.exceptions, "schedule"),
        practitioner,
        any(block.quotas for block in blocks),
        any(block.release_hours for block in blocks),
    )


_VERSION = text(
    f"SELECT floor(extract(epoch FROM clock_timestamp()))::bigint AS now, {VERSION} AS version"
).bindparams(bindparam("tenant", type_=Uuid(as_uuid=False))).columns(now=BigInteger, version=BigInteger)  # fmt: skip

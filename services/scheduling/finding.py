"""Free slots: what the directory and the calendar say about a window, read in bounded statements, worked out lazily."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, time, timedelta
from itertools import islice

from sqlalchemy import BigInteger, Uuid, and_, bindparam, func, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import load_only

from chassis.errors import Invalid
from services.scheduling import availability
from services.scheduling.availability import DAY, Interval, Slot, WeeklyHours, earliest_first, free_starts
from services.scheduling.directory import Clinic, Practitioner, Resource, Schedule, VisitType
from services.scheduling.occupancy import LANES, PACKED

_SCHEDULES_AT_MOST, _RESOURCES_AT_MOST, _ROWS_AT_MOST = 2_000, 5_000, 100_000
DAYS, DAYS_AT_MOST = 14, 62
_FIRST_LOOK = 3 * DAY


@dataclass(frozen=True, slots=True)
class Search:
    """What is looked for. Instants in epoch seconds; 0 is not said."""

    tenant_id: str
    visit_type_id: str
    clinic_ids: Sequence[str] = ()
    practitioner_ids: Sequence[str] = ()
    start: int = 0
    end: int = 0
    patient_id: str = ""
    wanted: Sequence[WeeklyHours] = ()


@dataclass(slots=True)
class Free:
    """Free slots, earliest first, and what is known around them."""

    now: int
    end: int
    slots: list[Slot] = field(default_factory=list)
    zones: dict[str, str] = field(default_factory=dict)


def wishes(weekdays: Sequence[int], earliest: str, latest: str) -> tuple[WeeklyHours, ...]:
    """Weekly windows in which the whole visit must lie; 1 is Monday. None where nothing is wished."""
    if not (weekdays or earliest or latest):
        return ()
    begin = time.fromisoformat(earliest) if earliest else time(0)
    end = time.fromisoformat(latest) if latest else time(0)
    return tuple(WeeklyHours(day - 1, begin, end) for day in sorted(set(weekdays)) or range(1, 8))


async def free_slots(db: AsyncSession, search: Search, count: int, after: Slot | None = None) -> Free:
    """The first `count` free slots of a search, those up to `after` left out. Five statements at the most.

    Raises Invalid `VISIT_TYPE_UNKNOWN`.
    """
    row = (
        await db.execute(
            select(VisitType, func.clock_timestamp()).where(
                VisitType.tenant_id == search.tenant_id, VisitType.id == search.visit_type_id
            )
        )
    ).one_or_none()
    if row is None:
        raise Invalid("VISIT_TYPE_UNKNOWN", "There is no such visit type.", field="visit_type_id")
    visit_type: VisitType = row[0]
    now = int(row[1].timestamp())
    start = max(search.start or now, now)
    end = min(search.end or start + DAYS * DAY, start + DAYS_AT_MOST * DAY)
    free = Free(now, end)
    if not visit_type.active or end <= start:
        return free
    seen = await _seen(db, search, visit_type)
    if not seen:
        return free
    clinics = {clinic.id: clinic for _, clinic, _ in seen}
    free.zones = {clinic.id: clinic.time_zone for clinic in clinics.values()}
    resources = await _resources(db, search, visit_type, list(clinics))
    who = [*{practitioner.id for _, _, practitioner in seen}, *(one.id for one in resources)]
    if search.patient_id:
        who.append(search.patient_id)
    reach = 60 * (visit_type.duration_minutes + visit_type.buffer_before_minutes + visit_type.buffer_after_minutes)
    # Most pages are full within the first days; what stands in the others is then never read.
    middle = min(start + _FIRST_LOOK, end)
    for window in ((start, middle), (middle, end)):
        if window[0] >= window[1] or len(free.slots) >= count:
            break
        taken = await _taken(db, search, who, window[0] - reach, window[1] + reach)
        at = [_at(clinic, seen, resources, visit_type, search, taken, (*window, now)) for clinic in clinics.values()]
        fresh = (slot for slot in earliest_first(*at) if after is None or slot > after)
        free.slots += islice(fresh, count - len(free.slots))
    return free


def _at(
    clinic: Clinic,
    seen: Sequence[tuple[Schedule, Clinic, Practitioner]],
    resources: Sequence[Resource],
    visit_type: VisitType,
    search: Search,
    taken: dict[str, list[Interval]],
    window: tuple[int, int, int],
) -> Iterator[Slot]:
    """The free slots of one clinic in a window (start, end, now), worked out as they are asked for."""
    start, end, now = window
    first, last = (datetime.fromtimestamp(at, UTC).date() for at in (start, end))
    return free_starts(
        [
            availability.Resource(
                practitioner.id, schedule.weekly(), schedule.exceptions_(), taken.get(practitioner.id, ())
            )
            for schedule, where, practitioner in seen
            if where.id == clinic.id
        ],
        [
            [
                availability.Resource(one.id, occupied=taken.get(one.id, ()))
                for one in resources
                if one.clinic_id == clinic.id and one.kind == kind
            ]
            for kind in visit_type.resource_kinds
        ],
        visit_type.asks,
        zone=clinic.zone,
        window_start=start,
        window_end=end,
        now=now,
        closed_days=clinic.closed_days(first - timedelta(days=2), last + timedelta(days=2)),
        clinic_id=clinic.id,
        wanted=search.wanted,
        patient_occupied=taken.get(search.patient_id, ()),
    )


async def _seen(db: AsyncSession, search: Search, visit_type: VisitType) -> list[tuple[Schedule, Clinic, Practitioner]]:
    """Who sees patients where: active practitioners with hours at active clinics, and with the specialty."""
    query = (
        select(Schedule, Clinic, Practitioner)
        .join(Clinic, and_(Clinic.tenant_id == Schedule.tenant_id, Clinic.id == Schedule.clinic_id))
        .join(
            Practitioner,
            and_(Practitioner.tenant_id == Schedule.tenant_id, Practitioner.id == Schedule.practitioner_id),
        )
        .where(
            Schedule.tenant_id == search.tenant_id,
            Clinic.status == "ACTIVE",
            Clinic.time_zone != "",
            Practitioner.active,
        )
        .options(
            load_only(Clinic.time_zone, Clinic.holiday_region, Clinic.closed_dates, Clinic.status),
            load_only(Practitioner.roles),
        )
        .order_by(Schedule.clinic_id, Schedule.practitioner_id)
        .limit(_SCHEDULES_AT_MOST)
    )
    if search.clinic_ids:
        query = query.where(Schedule.clinic_id.in_(search.clinic_ids))
    if search.practitioner_ids:
        query = query.where(Schedule.practitioner_id.in_(search.practitioner_ids))
    specialty = (visit_type.specialty or {}).get("code")
    return [
        (schedule, clinic, practitioner)
        for schedule, clinic, practitioner in (await db.execute(query)).tuples()
        if not specialty or practitioner.has_specialty(clinic.id, specialty)
    ]


async def _resources(
    db: AsyncSession, search: Search, visit_type: VisitType, clinic_ids: Sequence[str]
) -> list[Resource]:
    if not visit_type.resource_kinds:
        return []
    query = (
        select(Resource)
        .where(
            Resource.tenant_id == search.tenant_id,
            Resource.clinic_id.in_(clinic_ids),
            Resource.kind.in_(visit_type.resource_kinds),
        )
        .order_by(Resource.id)
        .limit(_RESOURCES_AT_MOST)
    )
    return list((await db.execute(query)).scalars())


async def _taken(
    db: AsyncSession, search: Search, ref_ids: Sequence[str], first: int, last: int
) -> dict[str, list[Interval]]:
    """What stands in the window, by whom, in any lane. An expired hold doesn't: whoever books takes it over."""
    rows = await db.execute(
        _TAKEN, {"tenant": search.tenant_id, "refs": list(ref_ids), "first": max(first, 0), "last": last}
    )
    taken: dict[str, list[Interval]] = {}
    for row in rows:
        taken.setdefault(row.ref_id, []).append((row.first, row.last))
    return taken


_BEGIN = PACKED.format(no="b.no", lane="lane.n")
_TAKEN = text(
    f"SELECT b.ref_id, lower(o.during) - {_BEGIN} AS first, upper(o.during) - {_BEGIN} AS last"
    f" FROM bookable b CROSS JOIN generate_series(0, {LANES - 1}) AS lane(n)"
    # OFFSET 0 keeps it a look into the index for each lane: joined freely, it read the whole table 240 times (85 s).
    " CROSS JOIN LATERAL (SELECT during FROM occupancy"
    f" WHERE during && int8range({_BEGIN} + :first, {_BEGIN} + :last)"
    " AND (expire_time IS NULL OR expire_time > clock_timestamp()) OFFSET 0) o"
    f" WHERE b.tenant_id = :tenant AND b.ref_id = ANY(:refs) LIMIT {_ROWS_AT_MOST}"
).bindparams(
    bindparam("tenant", type_=Uuid(as_uuid=False)),
    bindparam("refs", type_=ARRAY(Uuid(as_uuid=False))),
    bindparam("first", type_=BigInteger),
    bindparam("last", type_=BigInteger),
).columns(ref_id=Uuid(as_uuid=False), first=BigInteger, last=BigInteger)  # fmt: skip

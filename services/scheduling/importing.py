"""Visits of another system: which times a row means, what may be said of a visit, and what is taken for it here.

The rules, each said once here:

* **What was promised elsewhere stands.** Hours, notice, quotas, eligibility and the directory's "active" aren't asked;
  what lies outside of hours is imported and said to.
* **Nobody is in two places.** What lies ahead takes practitioner, patient and one room of each kind needed, all free. It
  takes its own time without buffers: back to back it stood there, too.
* **What is over, or was cancelled, is history**: it takes nothing, and starts nothing.
* **Local times** are the clinic's. Skipped ones move forward by the gap, repeated ones mean the first (`chassis.calendar`).
"""

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, Boolean, Text, Uuid, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.calendar import at_local
from chassis.errors import FailedPrecondition, Invalid, LostRace
from chassis.model import Ids
from services.scheduling import booking, occupancy
from services.scheduling.appointment import Status
from services.scheduling.booking import Candidate, Chosen, Found, Terms
from services.scheduling.directory import Clinic, Practitioner, Schedule, VisitType, weekly
from services.scheduling.occupancy import LANES, PACKED
from services.scheduling.offers import Place

_DAY_MINUTES = 24 * 60
_FIRST_YEAR, _LAST_YEAR = 1001, 2999  # by any clock an instant that the API takes


def start_of(instant: datetime | None, local: str, zone: str) -> datetime:
    """When a visit begins (UTC). Raises Invalid `START_INVALID`."""
    if (instant is None) == (not local):
        raise Invalid("START_INVALID", "Give start_time or local_start_time.", field="start_time")
    field = "start_time" if instant is not None else "local_start_time"
    start = instant if instant is not None else _by_clock(local, zone, "START_INVALID", field)
    return occupancy.startable(start, field)


def minutes_of(start: datetime, end: datetime | None, local_end: str, minutes: int, usual: int, zone: str) -> int:
    """How long a visit takes; as `usual` where the row doesn't say. Raises Invalid `END_INVALID`."""
    if (end is not None) + bool(local_end) + bool(minutes) > 1:
        raise Invalid(
            "END_INVALID", "Give end_time, local_end_time or duration_minutes, not two of them.", field="end_time"
        )
    if end is None and local_end:
        end = _by_clock(local_end, zone, "END_INVALID", "local_end_time")
    if end is None:
        return minutes or usual
    whole, rest = divmod(end - start, timedelta(minutes=1))
    if rest or not 0 < whole <= _DAY_MINUTES:
        raise Invalid("END_INVALID", "A visit ends whole minutes after its start, within a day.", field="end_time")
    return whole


def status_of(status: str, end: datetime, now: datetime) -> Status:
    """What is known of a visit. Raises Invalid `STATUS_UNFIT`."""
    wanted = Status.BOOKED if status == "STATUS_UNSPECIFIED" else Status(status)
    if wanted is Status.BOOKED and end <= now:
        raise Invalid("STATUS_UNFIT", "The visit is over: say what became of it.", field="status")
    if wanted in (Status.FULFILLED, Status.NOSHOW) and end > now:
        raise Invalid("STATUS_UNFIT", "The visit isn't over: nothing has become of it yet.", field="status")
    return wanted


def _by_clock(local: str, zone: str, reason: str, field: str) -> datetime:
    try:
        wall = datetime.fromisoformat(local)
        if not _FIRST_YEAR <= wall.year <= _LAST_YEAR:
            raise ValueError
    except ValueError:
        raise Invalid(reason, "There is no such day or time of day.", field=field) from None
    return at_local(wall.date(), wall.time(), zone)


async def look(
    db: AsyncSession,
    tenant_id: str,
    patient_id: str,
    visit_type: VisitType,
    clinic: Clinic,
    practitioner: Practitioner,
    start: datetime,
    minutes: int,
) -> Found:
    """The calendar around the visit's time, in one statement; who has no number yet stands nowhere."""
    place = Place(visit_type.id, clinic.id, practitioner.id, int(start.timestamp()))
    values = {
        "tenant": tenant_id,
        "patient": patient_id,
        "clinic": clinic.id,
        "practitioner": practitioner.id,
        "kinds": [*visit_type.resource_kinds, *(visit_type.needed_kinds or ())],
        "ids": list(visit_type.needed_ids or ()),
        "start": place.start,
        "end": place.start + 60 * minutes,
        "specialty": (visit_type.specialty or {}).get("code"),
    }
    row = (await db.execute(_LOOK, values)).one()
    return Found(
        place,
        VisitType(
            id=visit_type.id,
            active=True,
            duration_minutes=minutes,
            buffer_before_minutes=0,
            buffer_after_minutes=0,
            modality=visit_type.modality,
            resource_kinds=visit_type.resource_kinds,
            requirements=visit_type.requirements,
            specialty=visit_type.specialty,
            late_cancel_hours=visit_type.late_cancel_hours,
            overbooking_cap=0,
            security_labels=visit_type.security_labels,
        ),
        clinic,
        practitioner,
        Schedule(weekly_hours=row.weekly_hours, exceptions=row.exceptions) if row.schedule_known else None,
        [
            Candidate(kind, ref_id, no or 0, frozenset(live or ()), bool(stale), tuple(languages or ()))
            for kind, ref_id, no, live, stale, languages in row.candidates
        ],
        row.established,
        weekly(row.weekly_hours or (), "schedule"),
    )


def outside_hours(found: Found, now: datetime) -> bool:
    """Whether a booking of this visit would have been refused for its hours."""
    second = int(now.timestamp())
    try:
        found.check(second, second - 86_400, Terms(held_back=True))
    except FailedPrecondition:
        return True
    return False


def as_history(found: Found) -> Chosen:
    """What a visit says of itself that takes nothing."""
    people = {one: 0 for one in found.candidates if one.kind in ("patient", "practitioner")}
    return Chosen(found, people)


async def choose(db: AsyncSession, tenant_id: str, found: Found, *, lock: bool) -> Chosen:
    """Who and what is taken for a visit that lies ahead. Expired holds in the way are ended where `lock` says so.

    Raises AlreadyExists `SLOT_TAKEN`, `PATIENT_BUSY`; FailedPrecondition `OUTSIDE_HOURS` where there is no such room.
    """
    chosen = Chosen(found, found.choose(None))
    if not lock:
        return chosen
    if any(not one.no for one in chosen.lanes):  # somebody else has just given out the number
        raise LostRace(booking.taken())
    if not chosen.stale:
        return chosen
    await occupancy.lock(db, sorted(one.no for one in chosen.lanes))
    return Chosen(found, chosen.lanes, await booking.end_expired(db, tenant_id, chosen.stale))


def differs(stored: Any, wanted: dict[str, Any], status: Status) -> bool:
    """Whether a visit that is there isn't as it was sent. One that lay ahead has a life of its own here since."""
    ended = status is not Status.BOOKED and stored.status is not status
    return ended or any(getattr(stored, name) != value for name, value in wanted.items())


def end_of(start: datetime, minutes: int) -> datetime:
    """When a visit ends."""
    return (start + timedelta(minutes=minutes)).astimezone(UTC)


_UUID = Uuid(as_uuid=False)
_LANE = PACKED.format(no="b.no", lane="lane.n")
_LOOK = text(f"""
WITH candidate AS (
  SELECT 'patient' AS kind, :patient AS ref_id, NULL::text[] AS languages
  UNION ALL
  SELECT 'practitioner', :practitioner, NULL
  UNION ALL
  (SELECT r.kind, r.id, r.languages FROM resource r
    WHERE r.tenant_id = :tenant AND r.clinic_id = :clinic AND r.active
      AND (r.kind = ANY(:kinds) OR r.id = ANY(:ids)) LIMIT 200)
)
SELECT s.id IS NOT NULL AS schedule_known, s.weekly_hours, s.exceptions,
       {booking.ESTABLISHED.format(specialty=":specialty")} AS established,
       (SELECT jsonb_agg(jsonb_build_array(c.kind, c.ref_id, b.no, o.live, o.stale, c.languages))
          FROM candidate c
          LEFT JOIN bookable b ON b.tenant_id = :tenant AND b.ref_id = c.ref_id
          CROSS JOIN LATERAL (
            SELECT array_agg(DISTINCT o.lane) FILTER (WHERE o.expire_time IS NULL OR o.expire_time > clock_timestamp())
                     AS live,
                   bool_or(o.expire_time <= clock_timestamp()) AS stale
              FROM generate_series(0, {LANES - 1}) AS lane(n)
              JOIN occupancy o ON b.no IS NOT NULL
               AND o.during && int8range({_LANE} + :start, {_LANE} + :end)) o) AS candidates
  FROM (SELECT) one
  LEFT JOIN schedule s ON s.tenant_id = :tenant AND s.practitioner_id = :practitioner AND s.clinic_id = :clinic
""").bindparams(
    *(bindparam(name, type_=_UUID) for name in ("tenant", "patient", "clinic", "practitioner")),
    bindparam("kinds", type_=ARRAY(Text)),
    bindparam("ids", type_=Ids),
    bindparam("start", type_=BigInteger),
    bindparam("end", type_=BigInteger),
    bindparam("specialty", type_=Text),
).columns(
    schedule_known=Boolean,
    established=Boolean,
    **dict.fromkeys(("weekly_hours", "exceptions", "candidates"), JSONB()),
)  # fmt: skip

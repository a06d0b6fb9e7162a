"""Booking: what is wanted is checked against the directory as it is now, resources are chosen, and all are taken at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import BigInteger, Boolean, Text, Uuid, bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.errors import AlreadyExists, FailedPrecondition, Invalid, LostRace, PermissionDenied
from services.scheduling import occupancy
from services.scheduling.appointment import Appointment, Status
from services.scheduling.availability import DAY, open_intervals
from services.scheduling.directory import Clinic, Practitioner, Schedule, VisitType
from services.scheduling.occupancy import LANES, PACKED, Span
from services.scheduling.offers import Place

_PATIENT, _PRACTITIONER = "patient", "practitioner"
NOBODY = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class Overbooking:
    """The explicit choice to book over what stands. `permitted` says whether the caller may."""

    reason: str
    patient_overlap: bool
    permitted: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """Somebody or something that can be taken, and how it stands in the wanted time."""

    kind: str
    ref_id: str
    no: int
    live: frozenset[int]
    """Lanes in which something stands."""
    stale: bool
    """Holds stand in the way whose time is over."""

    def lane(self, cap: int) -> int | None:
        """The first lane up to `cap` in which nothing stands; where nothing is permitted, nothing may stand in any."""
        if self.live and not cap:
            return None
        return next((lane for lane in range(min(cap, LANES - 1) + 1) if lane not in self.live), None)


@dataclass(frozen=True, slots=True)
class Found:
    """The directory and the calendar around one wanted place, as one statement saw them."""

    place: Place
    visit_type: VisitType
    clinic: Clinic
    practitioner: Practitioner
    schedule: Schedule | None
    candidates: Sequence[Candidate]

    @property
    def end(self) -> int:
        """Epoch second at which the visit ends."""
        return self.place.start + 60 * self.visit_type.duration_minutes

    def check(self, earliest: int) -> None:
        """Raises FailedPrecondition `OUTSIDE_HOURS` where this can't be booked at all, taken or not."""
        visit_type, start = self.visit_type, self.place.start
        specialty = (visit_type.specialty or {}).get("code")
        if not visit_type.active:
            raise _outside("This visit type is no longer booked.")
        if not self.clinic.bookable or not self.practitioner.active or self.schedule is None:
            raise _outside("This practitioner sees no patients at this clinic now.")
        if specialty and not self.practitioner.has_specialty(self.place.clinic_id, specialty):
            raise _outside("This practitioner doesn't have the specialty that the visit type asks for.")
        if start < earliest:
            raise _outside("The start is past, or sooner than the visit type's notice allows.")
        zone = self.clinic.zone
        first = datetime.fromtimestamp(start, zone).date()
        closed = self.clinic.closed_days(first - timedelta(days=1), first + timedelta(days=2))
        opened = open_intervals(
            self.schedule.weekly(),
            self.schedule.exceptions_(),
            closed,
            zone,
            start - DAY,
            self.end + DAY,
            visit_type.id,
        )
        if not any(begin <= start and self.end <= end for begin, end in opened):
            raise _outside("The practitioner's hours at this clinic don't hold this visit.")

    def choose(self, overbooking: Overbooking | None) -> dict[Candidate, int]:
        """Who and what is taken, in which lane.

        Raises AlreadyExists `SLOT_TAKEN`, `PATIENT_BUSY`, `OVERBOOKING_CAP_REACHED`; PermissionDenied or
        FailedPrecondition `OVERBOOKING_NOT_ALLOWED`.
        """
        practitioner = self._of(_PRACTITIONER)[0]
        groups = [[practitioner], *(self._rooms(kind, practitioner.no) for kind in self.visit_type.resource_kinds)]
        if any(not group for group in groups):
            raise _outside("This clinic has no room or device that the visit type needs.")
        cap = self._cap(overbooking, groups)
        chosen: dict[Candidate, int] = {}
        for group in groups:
            best = min(group, key=lambda one: (one.lane(cap) is None, bool(one.live), one.stale))
            chosen[best] = self._lane(best, cap)
        overlaps = overbooking is not None and overbooking.patient_overlap
        for patient in self._of(_PATIENT):  # none for a session
            lane = patient.lane(LANES - 1 if overlaps else 0)
            if lane is None:
                raise busy()
            chosen[patient] = lane
        return chosen

    def _cap(self, overbooking: Overbooking | None, groups: Sequence[Sequence[Candidate]]) -> int:
        """How many overbookings are permitted to this call; asked for where nothing stands in the way it is none."""
        if overbooking is None:
            return 0
        if not overbooking.permitted:
            raise PermissionDenied("OVERBOOKING_NOT_ALLOWED", "Your roles don't include appointments.overbook.")
        if all(any(not one.live for one in group) for group in groups):
            return 0
        if not self.visit_type.overbooking_cap:
            raise FailedPrecondition("OVERBOOKING_NOT_ALLOWED", "This visit type is never overbooked.")
        return int(self.visit_type.overbooking_cap)

    def _lane(self, one: Candidate, cap: int) -> int:
        lane = one.lane(cap)
        if lane is None and cap:
            raise AlreadyExists(
                "OVERBOOKING_CAP_REACHED", "As many visits as the visit type permits share this time already."
            )
        if lane is None:
            raise taken()
        return lane

    def _of(self, kind: str) -> list[Candidate]:
        return [one for one in self.candidates if one.kind == kind]

    def _rooms(self, kind: str, turn: int) -> list[Candidate]:
        """Candidates of a kind: the offered one first, then from another one for each practitioner, so that they spread."""
        rooms = sorted(self._of(kind), key=lambda one: one.no)
        turn = turn % len(rooms) if rooms else 0
        rooms = rooms[turn:] + rooms[:turn]
        return sorted(rooms, key=lambda one: one.ref_id not in self.place.resource_ids)

    def span(self, candidate: Candidate, lane: int) -> Span:
        """The time for which a candidate is taken: buffers don't apply to the patient."""
        before, after = 60 * self.visit_type.buffer_before_minutes, 60 * self.visit_type.buffer_after_minutes
        if candidate.kind == _PATIENT:
            before = after = 0
        return Span(candidate.no, lane, self.place.start - before, self.end + after)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A place that is to be had, as far as anybody can know before taking it."""

    found: Found
    lanes: dict[Candidate, int]
    freed: Sequence[str] = ()
    """Whose rows go: the appointment that moves, expired holds that were ended for it."""
    overbooks: bool = False
    """Another lane would do, if this one is lost."""

    @property
    def overbooking(self) -> int:
        """Which overbooking of the practitioner's time it is."""
        return next(lane for one, lane in self.lanes.items() if one.kind == _PRACTITIONER)

    @property
    def spans(self) -> list[Span]:
        """All that is taken."""
        return [self.found.span(one, lane) for one, lane in self.lanes.items()]

    @property
    def stale(self) -> list[Span]:
        """Where expired holds stand in the way."""
        return [self.found.span(one, lane) for one, lane in self.lanes.items() if one.stale]

    def values(self) -> dict[str, Any]:
        """What an appointment says about it."""
        found = self.found
        return {
            "visit_type_id": found.place.visit_type_id,
            "clinic_id": found.place.clinic_id,
            "practitioner_id": found.place.practitioner_id,
            "start_time": datetime.fromtimestamp(found.place.start, UTC),
            "end_time": datetime.fromtimestamp(found.end, UTC),
            "time_zone": found.clinic.time_zone,
            "modality": found.visit_type.modality,
            "late_cancel_hours": found.visit_type.late_hours,
            "security_labels": [*found.clinic.security_labels, *found.visit_type.security_labels],
            "overbooking": self.overbooking,
            "participants": [self._participant(one, lane) for one, lane in self.lanes.items()],
        }

    def _participant(self, one: Candidate, lane: int) -> dict[str, Any]:
        span = self.found.span(one, lane)
        types = {_PATIENT: "Patient", _PRACTITIONER: "Practitioner"}
        role = one.kind if one.kind in types else "room" if one.kind.endswith("room") else "device"
        return {
            "actor": {"type": types.get(one.kind, "Resource"), "id": one.ref_id},
            "role": role,
            "status": "ACCEPTED",
            "period": {
                "start_time": datetime.fromtimestamp(span.start, UTC).isoformat(),
                "end_time": datetime.fromtimestamp(span.end, UTC).isoformat(),
            },
        }

    async def take(self, db: AsyncSession, appointment: Appointment) -> None:
        """Take it all or nothing. Raises AlreadyExists `SLOT_TAKEN`, `PATIENT_BUSY`, or LostRace to try once more."""
        missing = await occupancy.take(
            db,
            appointment.tenant_id,
            appointment.id,
            self.spans,
            patient_id=appointment.patient_id,
            expire_time=appointment.hold_expire_time if appointment.status is Status.PENDING else None,
            freed=self.freed,
        )
        if not missing:
            return
        lost = {one.kind for one in self.lanes if one.no in missing}
        if lost == {_PATIENT}:
            raise LostRace(busy()) if self.overbooks else busy()
        # Another room, or the next lane, may do; and all at once are gone for somebody who has just died.
        again = _PRACTITIONER not in lost or self.overbooks or len(missing) == len(self.lanes)
        raise LostRace(taken()) if again else taken()


async def numbers(db: AsyncSession, tenant_id: str, patient_id: str | None, place: Place) -> set[int]:
    """The numbers of all that a booking of this kind may take, whenever it is. Raises what `look` raises of the place."""
    return {one.no for one in (await _find(db, tenant_id, patient_id, place, NOBODY)).candidates}


async def look(
    db: AsyncSession,
    tenant_id: str,
    patient_id: str | None,
    place: Place,
    now: datetime,
    *,
    walk_in: float = 0,
    overbooking: Overbooking | None = None,
    moving: str = "",
) -> Chosen:
    """Check what is wanted and choose the resources; nothing is changed, nobody is locked.

    `moving` is a holder whose own rows don't count; without a patient it is for a session. Raises as `choose` does.
    """
    found = await _find(db, tenant_id, patient_id, place, moving or NOBODY)
    notice = 60 * found.visit_type.minimum_notice_minutes
    found.check(int(now.timestamp()) + (notice or -int(walk_in)))
    return Chosen(found, found.choose(overbooking))


async def choose(
    db: AsyncSession,
    tenant_id: str,
    patient_id: str,
    place: Place,
    now: datetime,
    *,
    walk_in: float = 0,
    overbooking: Overbooking | None = None,
    moving: Appointment | None = None,
) -> Chosen:
    """Check what is wanted and choose the resources. `moving` is an appointment whose own rows don't count.

    `walk_in` is by how many seconds the start may be past where no notice is asked for. Expired holds in the way are
    ended in this very transaction. Raises Invalid `VISIT_TYPE_UNKNOWN`, `CLINIC_UNKNOWN`, `PRACTITIONER_UNKNOWN`;
    FailedPrecondition `OUTSIDE_HOURS`, `PATIENT_DECEASED`; what `Found.choose` raises.
    """
    own = moving.id if moving is not None else ""
    locked: set[int] = set()
    if overbooking is not None and overbooking.permitted:
        # Those who overbook go one after the other, so that each sees the lanes of those before it.
        locked = {one.no for one in (await _find(db, tenant_id, patient_id, place, own or NOBODY)).candidates}
        locked |= set(await occupancy.numbers(db, tenant_id, own)) if own else set()
        await occupancy.lock(db, sorted(locked))
    chosen = await look(db, tenant_id, patient_id, place, now, walk_in=walk_in, overbooking=overbooking, moving=own)
    freed = [own] if own else []
    stale = chosen.stale
    if stale or own:
        numbers = {one.no for one in chosen.lanes}
        if own:
            numbers |= set(await occupancy.numbers(db, tenant_id, own))
        if not locked:
            await occupancy.lock(db, sorted(numbers))
        elif not numbers <= locked:  # a room that has just been added: a second lock would be out of order
            raise LostRace(taken())
    if stale:
        freed += await end_expired(db, tenant_id, stale)
    return Chosen(chosen.found, chosen.lanes, freed, overbooks=bool(locked))


async def _find(db: AsyncSession, tenant_id: str, patient_id: str | None, place: Place, own: str) -> Found:
    """All that a booking must know, in one statement; whoever has no number yet gets one."""
    values = {
        "tenant": tenant_id,
        "patient": patient_id,
        "own": own,
        "visit_type": place.visit_type_id,
        "clinic": place.clinic_id,
        "practitioner": place.practitioner_id,
        "start": place.start,
    }
    row = (await db.execute(_FIND, values)).one()
    for what in ("visit_type", "clinic", "practitioner"):
        if not getattr(row, f"{what}_known"):
            raise Invalid(f"{what.upper()}_UNKNOWN", f"There is no such {what.replace('_', ' ')}.", field=f"{what}_id")
    if row.deceased:
        raise FailedPrecondition("PATIENT_DECEASED", "Nothing is booked for somebody who has died.")
    candidates = [
        Candidate(kind, ref_id, no, frozenset(live or ()), bool(stale))
        for kind, ref_id, no, live, stale in row.candidates
        if no is not None
    ]
    if len(candidates) < len(row.candidates):  # somebody else has just given out the number
        raise LostRace(taken())
    return Found(
        place,
        VisitType(
            id=place.visit_type_id,
            active=row.visit_type_active,
            duration_minutes=row.duration_minutes,
            buffer_before_minutes=row.buffer_before_minutes or 0,
            buffer_after_minutes=row.buffer_after_minutes or 0,
            modality=row.modality,
            resource_kinds=row.resource_kinds,
            specialty=row.specialty,
            minimum_notice_minutes=row.minimum_notice_minutes or 0,
            late_cancel_hours=row.late_cancel_hours or 0,
            overbooking_cap=row.overbooking_cap or 0,
            security_labels=row.visit_type_labels,
        ),
        Clinic(
            status=row.status,
            time_zone=row.time_zone,
            holiday_region=row.holiday_region,
            closed_dates=row.closed_dates,
            security_labels=row.clinic_labels,
        ),
        Practitioner(active=row.practitioner_active, roles=row.roles),
        Schedule(weekly_hours=row.weekly_hours, exceptions=row.exceptions) if row.schedule_known else None,
        candidates,
    )


async def end_expired(db: AsyncSession, tenant_id: str, spans: Sequence[Span]) -> list[str]:
    """End the expired holds that stand in these spans; those that another has in hand are left to it."""
    holders = [
        row.holder_id
        for row in await db.execute(
            _STALE,
            {
                "tenant": tenant_id,
                "nos": [span.no for span in spans],
                "starts": [span.start for span in spans],
                "ends": [span.end for span in spans],
            },
        )
    ]
    if not holders:
        return []
    held = (
        select(Appointment)
        .where(
            Appointment.tenant_id == tenant_id,
            Appointment.id.in_(holders),
            Appointment.status == Status.PENDING,
            Appointment.hold_expire_time <= text("clock_timestamp()"),
        )
        .with_for_update(skip_locked=True, of=Appointment, key_share=True)
    )
    ended = list((await db.execute(held)).scalars())
    for one in ended:
        one.expire()
    return [one.id for one in ended]


def taken() -> AlreadyExists:
    """Somebody else has the time."""
    return AlreadyExists("SLOT_TAKEN", "This time is taken; search for another one.")


def busy() -> AlreadyExists:
    """The patient is elsewhere."""
    return AlreadyExists("PATIENT_BUSY", "The patient has another visit at this time.")


def _outside(message: str) -> FailedPrecondition:
    return FailedPrecondition("OUTSIDE_HOURS", message)


_UUID = Uuid(as_uuid=False)
_LANE = PACKED.format(no="q.no", lane="lane.n")
_FIND = text(f"""
WITH kind AS (
  SELECT * FROM visit_type WHERE tenant_id = :tenant AND id = :visit_type
), seen AS (
  SELECT * FROM practitioner WHERE tenant_id = :tenant AND id = :practitioner
), candidate AS (
  SELECT '{_PATIENT}' AS kind, :patient AS ref_id, 0 AS before, 0 AS after FROM kind, seen WHERE :patient IS NOT NULL
  UNION ALL
  SELECT '{_PRACTITIONER}', seen.id, buffer_before_minutes, buffer_after_minutes FROM kind, seen
  UNION ALL
  (SELECT r.kind, r.id, buffer_before_minutes, buffer_after_minutes FROM kind, seen, resource r
    WHERE r.tenant_id = :tenant AND r.clinic_id = :clinic AND r.kind = ANY(kind.resource_kinds) LIMIT 200)
), made AS (
  -- In the order of the key, so that two who make the same rows don't wait for each other.
  INSERT INTO bookable (tenant_id, ref_id, kind)
  SELECT :tenant, c.ref_id, c.kind FROM candidate c
   WHERE NOT EXISTS (SELECT FROM bookable b WHERE b.tenant_id = :tenant AND b.ref_id = c.ref_id)
   ORDER BY c.ref_id
  ON CONFLICT DO NOTHING RETURNING ref_id, no
)
SELECT k.id IS NOT NULL AS visit_type_known, k.active AS visit_type_active, k.duration_minutes,
       k.buffer_before_minutes, k.buffer_after_minutes, k.modality, k.resource_kinds, k.specialty,
       k.minimum_notice_minutes, k.late_cancel_hours, k.overbooking_cap, k.security_labels AS visit_type_labels,
       c.id IS NOT NULL AS clinic_known, c.status, c.time_zone, c.holiday_region, c.closed_dates,
       c.security_labels AS clinic_labels,
       p.id IS NOT NULL AS practitioner_known, p.active AS practitioner_active, p.roles,
       s.id IS NOT NULL AS schedule_known, s.weekly_hours, s.exceptions,
       EXISTS (SELECT FROM deceased_patient d WHERE d.tenant_id = :tenant AND d.patient_id = :patient) AS deceased,
       (SELECT coalesce(jsonb_agg(jsonb_build_array(q.kind, q.ref_id, q.no, o.live, o.stale)), '[]')
          FROM (SELECT n.*, coalesce(b.no, m.no) AS no
                  FROM candidate n
                  LEFT JOIN bookable b ON b.tenant_id = :tenant AND b.ref_id = n.ref_id
                  LEFT JOIN made m ON m.ref_id = n.ref_id) q
          CROSS JOIN LATERAL (
            SELECT array_agg(DISTINCT o.lane) FILTER (WHERE o.expire_time IS NULL OR o.expire_time > clock_timestamp())
                     AS live,
                   bool_or(o.expire_time <= clock_timestamp()) AS stale
              FROM generate_series(0, {LANES - 1}) AS lane(n)
              JOIN occupancy o ON o.during && int8range(
                {_LANE} + :start - 60 * q.before, {_LANE} + :start + 60 * (k.duration_minutes + q.after))
             WHERE o.holder_id <> :own) o) AS candidates
  FROM (SELECT) one
  LEFT JOIN kind k ON true
  LEFT JOIN clinic c ON c.tenant_id = :tenant AND c.id = :clinic
  LEFT JOIN seen p ON true
  LEFT JOIN schedule s ON s.tenant_id = :tenant AND s.practitioner_id = :practitioner AND s.clinic_id = :clinic
""").bindparams(
    *(bindparam(n, type_=_UUID) for n in ("tenant", "patient", "own", "visit_type", "clinic", "practitioner")),
    bindparam("start", type_=BigInteger),
).columns(
    **{f"{what}_known": Boolean() for what in ("visit_type", "clinic", "practitioner", "schedule")},
    visit_type_active=Boolean, practitioner_active=Boolean, deceased=Boolean,
    **dict.fromkeys(
        ("duration_minutes", "buffer_before_minutes", "buffer_after_minutes", "minimum_notice_minutes",
         "late_cancel_hours", "overbooking_cap"), BigInteger()),
    **dict.fromkeys(("modality", "status", "time_zone", "holiday_region"), Text()),
    **dict.fromkeys(("resource_kinds", "visit_type_labels", "clinic_labels", "closed_dates"), ARRAY(Text)),
    **dict.fromkeys(("specialty", "roles", "weekly_hours", "exceptions", "candidates"), JSONB()),
)  # fmt: skip
_FIRST = PACKED.format(no="s.no", lane="0")
_STALE = text(
    "SELECT DISTINCT o.holder_id FROM unnest(:nos, :starts, :ends) AS s(no, first, last)"
    " CROSS JOIN LATERAL (SELECT * FROM occupancy"
    f" WHERE during && int8range({_FIRST} + s.first, {_FIRST} + s.last) OFFSET 0) o"
    " WHERE o.tenant_id = :tenant AND o.expire_time <= clock_timestamp()"
).bindparams(
    bindparam("tenant", type_=_UUID),
    *(bindparam(name, type_=ARRAY(BigInteger)) for name in ("nos", "starts", "ends")),
).columns(holder_id=_UUID)  # fmt: skip

"""The loop that clears a practitioner's days: visits are found, and each gets its outcome in a transaction of its own.

All that it knows stands in rows: whoever is killed leaves a visit either as it was or with its outcome. A visit in hand is
locked, and so is its appointment, so that two workers never have the same one.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import and_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.errors import FailedPrecondition, Invalid, LostRace, Problem
from chassis.ids import new_id
from chassis.timers import due
from services.scheduling import booking, moving, occupancy
from services.scheduling.appointment import Appointment, Status
from services.scheduling.clearing import Clearing, ClearingVisit, Outcome
from services.scheduling.directory import Practitioner
from services.scheduling.finding import Search, free_slots
from services.scheduling.moving import Limits, Place, Wishes
from services.scheduling.offers import Place as Wanted
from services.scheduling.scheduling_request import SchedulingPreferences

if TYPE_CHECKING:
    from chassis.pipeline import Runtime

CLEARINGS = "clearings"
"""Name of the loop."""
_ACTOR = "system:scheduling"
_DAYS_AHEAD = 60
_OWN, _OTHERS, _KEPT = 150, 150, 3
_CLINICS = 5
_TRIES = 6
_PAUSE = timedelta(seconds=1)
_PROMISED = (
    "visit_type_id", "clinic_id", "practitioner_id", "start_time", "end_time", "time_zone", "modality",
    "late_cancel_hours", "security_labels", "overbooking", "interpreter_language", "new_patient",
)  # fmt: skip
"""What a hold says of the time that it takes."""

Windows = Sequence[tuple[str, int, int]]
"""Clinic, first and last instant of what is being cleared."""


class Plan(NamedTuple):
    """What is to become of a visit, and the other times that were found, best first."""

    outcome: Outcome
    places: list[Place]
    offers: list[dict[str, Any]]


class _Lost(Exception):
    """A time that looked free was not to be had."""

    def __init__(self, visit_id: str, place: Place) -> None:
        super().__init__("a time was lost")
        self.lost = (visit_id, place)


def affected(tenant_id: str, practitioner_id: str, windows: Windows) -> Any:
    """The condition of an appointment that can't take place."""
    instants = [(clinic, datetime.fromtimestamp(a, UTC), datetime.fromtimestamp(b, UTC)) for clinic, a, b in windows]
    return and_(
        Appointment.tenant_id == tenant_id,
        Appointment.practitioner_id == practitioner_id,
        Appointment.status.in_([Status.PENDING, Status.BOOKED]),
        Appointment.session_id.is_(None),  # a seat moves with its session only
        # For the index; then by each clinic's own clock.
        Appointment.start_time >= min(begin for _, begin, _ in instants),
        Appointment.start_time < max(end for _, _, end in instants),
        or_(
            *(
                and_(Appointment.clinic_id == clinic, Appointment.start_time >= begin, Appointment.start_time < end)
                for clinic, begin, end in instants
            )
        ),
    )


async def clear_days(runtime: "Runtime") -> int:
    """Look for visits where a look is due, then see to one; answers how much was done."""
    return await _look(runtime) + await _see_to_one(runtime)


async def _look(runtime: "Runtime") -> int:
    settle = timedelta(seconds=runtime.settings.clearing_settle)  # type: ignore[attr-defined]
    async with runtime.database.acting(_ACTOR) as db:
        now = db.info["act"].now
        found = 0
        for clearing in await due(db, Clearing, Clearing.look_time, limit=1):
            fresh = await _find(db, clearing, now)
            found += fresh
            if fresh or now < clearing.create_time + settle:
                clearing.look_time = max(now + _PAUSE, clearing.create_time + settle)
            elif await _is_pending(db, clearing):
                clearing.look_time = now + _PAUSE
            else:
                clearing.finish()
    return found


async def _find(db: AsyncSession, clearing: Clearing, now: datetime) -> int:
    known = select(ClearingVisit.appointment_id).where(
        ClearingVisit.tenant_id == clearing.tenant_id,
        ClearingVisit.appointment_id == Appointment.id,
        # Offered by another one, it waits for its answer there.
        or_(
            ClearingVisit.clearing_id == clearing.id,
            ClearingVisit.status.in_([Outcome.PENDING, Outcome.OFFERED]),
        ),
    )
    query = select(Appointment).where(
        affected(clearing.tenant_id, clearing.practitioner_id, clearing.windows), ~known.exists()
    )
    rows = list((await db.execute(query.order_by(Appointment.start_time, Appointment.id))).scalars())
    for place, visit in enumerate(rows):
        row = ClearingVisit(
            tenant_id=clearing.tenant_id,
            id=new_id(),
            clearing_id=clearing.id,
            patient_id=visit.patient_id,
            appointment_id=visit.id,
            clinic_id=visit.clinic_id,
            practitioner_id=visit.practitioner_id,
            visit_type_id=visit.visit_type_id,
            start_time=visit.start_time,
            security_labels=visit.security_labels,
        )
        # In their order: who comes first has the first choice.
        row.find(now + timedelta(microseconds=place))
        db.add(row)
    return len(rows)


async def _is_pending(db: AsyncSession, clearing: Clearing) -> bool:
    query = select(ClearingVisit.id).where(
        ClearingVisit.tenant_id == clearing.tenant_id,
        ClearingVisit.clearing_id == clearing.id,
        ClearingVisit.status == Outcome.PENDING,
    )
    return (await db.execute(query.limit(1))).first() is not None


async def _see_to_one(runtime: "Runtime") -> int:
    lost: set[tuple[str, Place]] = set()
    while True:
        try:
            async with runtime.database.acting(_ACTOR) as db:
                return await _decide(runtime, db, lost)
        except _Lost as race:  # rolled back as a whole; the next one is tried
            lost.add(race.lost)


async def _decide(runtime: "Runtime", db: AsyncSession, lost: set[tuple[str, Place]]) -> int:
    rows = await due(db, ClearingVisit, ClearingVisit.due_time, limit=1)
    if not rows:
        return 0
    (row,) = rows
    now = db.info["act"].now
    mine = select(Appointment).where(Appointment.tenant_id == row.tenant_id, Appointment.id == row.appointment_id)
    locked = mine.with_for_update(of=Appointment, key_share=True, skip_locked=True)
    visit = (await db.execute(locked)).scalar_one_or_none()
    if visit is None:  # somebody has it in hand
        row.due_time = now + _PAUSE
        return 1
    clearing = await db.get_one(Clearing, (row.tenant_id, row.clearing_id))
    version = visit.version
    if visit.status is Status.PENDING:
        # A hold isn't promised; booked, it would stand in a closed day.
        visit.release()
        await occupancy.free(db, (visit.tenant_id, visit.id))
        row.decide("miss", appointment_version=version, offers=[], reason_code="hold")
        return 1
    if visit.status is not Status.BOOKED or not _within(visit, clearing):
        row.decide("miss", appointment_version=version, offers=[], reason_code=visit.status.name.lower())
        return 1
    taken = {place for visit_id, place in lost if visit_id == row.id}
    plan = await plan_for(db, visit, clearing.windows, now, without=taken)
    if plan.outcome is Outcome.LEFT or len(taken) >= _TRIES:
        row.decide("leave", appointment_version=version, offers=plan.offers, reason_code="nothing-free")
        return 1
    place = plan.places[0]
    try:
        if plan.outcome is Outcome.MOVED:
            chosen = await booking.choose(
                db, visit.tenant_id, visit.patient_id, _wanted(visit, place), now, moving=visit
            )
            visit.reschedule(**chosen.values())
            await chosen.take(db, visit)
            row.decide("move_visit", appointment_version=version, offers=plan.offers)
        else:
            hold = await _hold(runtime, db, visit, place, now)
            row.hold_id, row.hold_expire_time = hold.id, hold.hold_expire_time
            row.decide("offer", appointment_version=version, offers=plan.offers)
    except (Problem, LostRace) as problem:
        raise _Lost(row.id, place) from problem
    return 1


async def _hold(runtime: "Runtime", db: AsyncSession, visit: Appointment, place: Place, now: datetime) -> Appointment:
    terms = booking.Terms(referral=booking.has_referral(visit.based_on))
    chosen = await booking.choose(db, visit.tenant_id, visit.patient_id, _wanted(visit, place), now, terms=terms)
    hold = Appointment(
        tenant_id=visit.tenant_id,
        id=new_id(),
        patient_id=visit.patient_id,
        based_on=[{"type": "Appointment", "id": visit.id}],
    )
    hold.place(**chosen.values())
    hold.hold(now + timedelta(seconds=runtime.settings.clearing_offer))  # type: ignore[attr-defined]
    db.add(hold)
    await db.flush()
    await chosen.take(db, hold)
    return hold


async def accept(db: AsyncSession, row: ClearingVisit, visit: Appointment, hold: Appointment, now: datetime) -> None:
    """Move a visit to the time that is held for it; both appointments' rows are locked.

    The time was promised: as where any hold is booked, nothing is chosen anew, and who was overbooked over it since stays
    beside it. Raises FailedPrecondition `HOLD_EXPIRED`.
    """
    numbers = await occupancy.numbers(db, visit.tenant_id, visit.id, hold.id)
    await occupancy.lock(db, sorted(set(numbers)))
    held = {name: getattr(hold, name) for name in _PROMISED}
    held["participants"] = [{**one, "status": "ACCEPTED"} for one in hold.participants]
    version = visit.version
    hold.release()
    visit.reschedule(**held)
    await db.flush()
    if await occupancy.hand_over(db, visit.tenant_id, hold.id, visit.id) < len(hold.participants):
        raise FailedPrecondition("HOLD_EXPIRED", "The time is no longer held; search again.")
    row.decide("accept", appointment_version=version, offers=row.offers)


async def plan_for(
    db: AsyncSession,
    visit: Appointment,
    windows: Windows,
    now: datetime,
    *,
    without: set[Place] = frozenset(),  # type: ignore[assignment]
) -> Plan:
    """What is to become of a visit; nothing is written. `without` are times that were not to be had.

    The same practitioner later, and those of the same clinic who share a specialty; both also at other clinics that the
    patient has named in the stored wishes. Whether the visit type is done there the search knows.
    """
    was, wishes = place_of(visit), await _wishes(db, visit)
    start = max(int(now.timestamp()), was.start - was.start % 86_400)
    end = was.start + _DAYS_AHEAD * 86_400
    places: list[Place] = []
    own, others = [visit.practitioner_id], await _colleagues(db, visit, visit.clinic_id)
    looks = [(own, [visit.clinic_id], _OWN), (others, [visit.clinic_id], _OTHERS)]
    for clinic_id in sorted(wishes.clinic_ids - {visit.clinic_id})[:_CLINICS]:
        there = await _colleagues(db, visit, clinic_id)
        looks.append(([*own, *there], [clinic_id], _OTHERS))
    for who, where, count in looks:
        if who:
            search = Search(visit.tenant_id, visit.visit_type_id, where, who, _after(start, who, windows, visit), end)
            try:
                free = await free_slots(db, search, count)
            except Invalid:  # the visit type is no longer there
                continue
            places += [
                Place(slot.start, slot.end, slot.clinic_id, slot.practitioner_id, free.zones[slot.clinic_id],
                      tuple(slot.resource_ids))
                for slot in free.slots
            ]  # fmt: skip
    places = [
        one
        for one in places
        if not _cleared(one, visit.practitioner_id, windows) and not any(_clash(one, other) for other in without)
    ]
    best = moving.ranked(was, places, wishes)
    movable = [one for one in best if moving.may_move(was, one, wishes)]
    if movable:
        best = [*movable, *(one for one in best if one not in movable)]
        return Plan(Outcome.MOVED, best, _offers(was, best, wishes))
    # A hold is the patient's too: it can't be at the time of the visit that still stands.
    held = [one for one in best if one.end <= was.start or was.end <= one.start]
    return Plan(Outcome.OFFERED if held else Outcome.LEFT, held, _offers(was, held, wishes))


def place_of(visit: Appointment) -> Place:
    """Where and when a visit is."""
    rooms = tuple(one["actor"]["id"] for one in visit.participants if one["actor"]["type"] == "Resource")
    return Place(
        int(visit.start_time.timestamp()),
        int(visit.end_time.timestamp()),
        visit.clinic_id,
        visit.practitioner_id,
        visit.time_zone,
        rooms,
    )


def _wanted(visit: Appointment, place: Place) -> Wanted:
    return Wanted(visit.visit_type_id, place.clinic_id, place.practitioner_id, place.start, place.resource_ids)


def _within(visit: Appointment, clearing: Clearing) -> bool:
    return visit.practitioner_id == clearing.practitioner_id and _cleared(
        place_of(visit), clearing.practitioner_id, clearing.windows
    )


def _cleared(place: Place, practitioner_id: str, windows: Windows) -> bool:
    return place.practitioner_id == practitioner_id and any(
        place.clinic_id == clinic and begin <= place.start < end for clinic, begin, end in windows
    )


def _clash(one: Place, other: Place) -> bool:
    return one.practitioner_id == other.practitioner_id and one.start < other.end and other.start < one.end


def _after(start: int, who: Sequence[str], windows: Windows, visit: Appointment) -> int:
    """From when to look: the absent one's first times of a search must not be those that are being cleared."""
    if list(who) != [visit.practitioner_id]:
        return start
    return max([start, *(end for clinic, _, end in windows if clinic == visit.clinic_id)])


def _offers(was: Place, places: Sequence[Place], wishes: Wishes) -> list[dict[str, Any]]:
    return [
        {
            "clinic_id": one.clinic_id,
            "practitioner_id": one.practitioner_id,
            "start_time": datetime.fromtimestamp(one.start, UTC).isoformat(),
            "end_time": datetime.fromtimestamp(one.end, UTC).isoformat(),
            "cost": moving.cost(was, one, wishes)._asdict(),
        }
        for one in places[:_KEPT]
    ]


async def _colleagues(db: AsyncSession, visit: Appointment, clinic_id: str) -> list[str]:
    """Who works at a clinic and shares a specialty there with the visit's practitioner.

    Where that one has none, anybody of the visit's own clinic does, and nobody elsewhere.
    """
    query = select(Practitioner).where(
        Practitioner.tenant_id == visit.tenant_id,
        or_(
            and_(Practitioner.active, Practitioner.clinic_ids.overlap([clinic_id])),
            Practitioner.id == visit.practitioner_id,
        ),
    )
    everybody = {one.id: one for one in (await db.execute(query)).scalars()}
    away = everybody.pop(visit.practitioner_id, None)
    own = _specialties(away, visit.clinic_id) if away is not None else set()
    anybody = not own and clinic_id == visit.clinic_id
    return [one.id for one in everybody.values() if anybody or own & _specialties(one, clinic_id)][:100]


def _specialties(practitioner: Practitioner, clinic_id: str) -> set[str]:
    return {
        one["code"]
        for role in practitioner.roles or ()
        if role["clinic_id"] == clinic_id
        for one in role.get("specialties", ())
    }


async def _wishes(db: AsyncSession, visit: Appointment) -> Wishes:
    row = await db.get(SchedulingPreferences, (visit.tenant_id, visit.patient_id))
    if row is None:
        return moving.NONE
    limits = row.may_be_moved
    return Wishes(
        frozenset(row.clinic_ids),
        frozenset(row.practitioner_ids),
        frozenset(row.weekdays),
        row.earliest,
        row.latest,
        Limits(limits["within_days"], limits.get("same_practitioner", False), limits.get("same_clinic", False))
        if limits
        else None,
    )

"""Several visits as one: all are looked at, then all are taken in one transaction, or none is and one knows why."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy.ext.asyncio import AsyncSession

from chassis.errors import AlreadyExists, FailedPrecondition, LostRace
from services.scheduling import booking, occupancy
from services.scheduling.appointment import Appointment
from services.scheduling.availability import DAY, Slot
from services.scheduling.booking import Chosen
from services.scheduling.finding import Search, free_slots
from services.scheduling.occupancy import Taking
from services.scheduling.offers import Place

_ALTERNATIVES, _DAYS_AROUND, _SLOTS_AT_MOST = 3, 3, 400
_WITH_ANOTHER = DAY  # what another practitioner counts against the patient's own one, in seconds of distance


@dataclass(frozen=True, slots=True)
class Wanted:
    """One visit of several: which one, where and when, and the appointment that would move there.

    `local` is the wall time that the rule names, of a visit that is to be booked.
    """

    number: int
    place: Place
    moving: Appointment | None = None
    local: datetime = datetime.min


@dataclass(frozen=True, slots=True)
class Looked:
    """A wanted visit, with what it would take or the reason for which it can't be had."""

    wanted: Wanted
    chosen: Chosen | None = None
    reason: str = ""


async def look_at_all(
    db: AsyncSession,
    tenant_id: str,
    patient_id: str,
    wanted: Sequence[Wanted],
    now: datetime,
    *,
    lock: bool,
    terms: booking.Terms = booking.STAFF,
) -> list[Looked]:
    """Look at each; with `lock` nobody that takes more than one time can come in between.

    A reason is one for which a single booking would be refused. Raises Invalid for a place that isn't there,
    FailedPrecondition `PATIENT_DECEASED`.
    """
    locked: set[int] = set()
    await occupancy.number_all(
        db,
        tenant_id,
        patient_id,
        sorted({one.place.practitioner_id for one in wanted}),
        sorted({one.place.clinic_id for one in wanted}),
    )
    moving = [one.moving.id for one in wanted if one.moving is not None]
    # Also where nothing is locked: what is wrong with the place as a whole is told once, not of each visit.
    for place in {one.place._replace(start=0, resource_ids=()): one.place for one in wanted}.values():
        locked |= await booking.numbers(db, tenant_id, patient_id, place)
    if lock:
        locked |= set(await occupancy.numbers(db, tenant_id, *moving)) if moving else set()
        await occupancy.lock(db, sorted(locked))
    found: list[Looked] = []
    for one in wanted:
        looked = await _look(db, tenant_id, patient_id, one, now, terms, found, moving)
        if lock and looked.chosen is not None and not {each.no for each in looked.chosen.spans} <= locked:
            raise LostRace(booking.taken())  # a room that has just been added: a second lock would be out of order
        found.append(looked)
    return found


async def take_all(
    db: AsyncSession, tenant_id: str, taken: Sequence[tuple[Appointment, Chosen]], *, moving: bool = False
) -> None:
    """Take what was chosen under the lock; those who move give back what they had. All new rows must be flushed.

    Raises LostRace where somebody who takes one time only came in between: what is left is then looked at anew.
    """
    freed = [one.id for one, _ in taken] if moving else []
    stale = [span for _, chosen in taken for span in chosen.stale]
    if stale:
        freed += await booking.end_expired(db, tenant_id, stale)
    takings = [Taking(one.id, one.patient_id, span) for one, chosen in taken for span in chosen.spans]
    if await occupancy.take_all(db, tenant_id, takings, freed=freed):
        raise LostRace(booking.taken())


async def near(
    db: AsyncSession,
    tenant_id: str,
    patient_id: str,
    place: Place,
    others: Iterable[int],
    terms: booking.Terms = booking.STAFF,
) -> list[Slot]:
    """What is free near a place at the same clinic, nearest first; with the same practitioner if there is anything.

    `others` are starts of visits that will stand beside it; `terms` those on which it would be booked.
    """
    beside = set(others)

    async def free(start: int, practitioner_ids: Sequence[str]) -> list[Slot]:
        search = Search(
            tenant_id,
            place.visit_type_id,
            [place.clinic_id],
            practitioner_ids,
            start=start,
            end=place.start + _DAYS_AROUND * DAY,
            patient_id=patient_id,
            referral=terms.referral,
            self_service=terms.self_service,
        )
        found = (await free_slots(db, search, _SLOTS_AT_MOST)).slots
        return [
            slot
            for slot in found
            if not any(slot.start < at + slot.end - slot.start and at < slot.end for at in beside)
        ]

    slots = await free(place.start - _DAYS_AROUND * DAY, [place.practitioner_id])
    if len(slots) < _ALTERNATIVES:
        slots += [slot for slot in await free(place.start, []) if slot.practitioner_id != place.practitioner_id]
    slots.sort(
        key=lambda slot: abs(slot.start - place.start) + _WITH_ANOTHER * (slot.practitioner_id != place.practitioner_id)
    )
    return slots[:_ALTERNATIVES]


async def _look(
    db: AsyncSession,
    tenant_id: str,
    patient_id: str,
    wanted: Wanted,
    now: datetime,
    terms: booking.Terms,
    before: Sequence[Looked],
    moving: Sequence[str],
) -> Looked:
    """One of several: what those `before` it take is taken for it, too, and counts against its quotas."""
    beside = [one.chosen for one in before if one.chosen is not None]
    try:
        own = wanted.moving.id if wanted.moving is not None else ""
        chosen = await booking.look(db, tenant_id, patient_id, wanted.place, now, moving=own, terms=terms)
        if _meets(chosen, beside):
            raise booking.busy()
        if quotas := chosen.found.quotas():
            found = [one.found for one in beside]
            await booking.keep_quotas(db, tenant_id, chosen.found, quotas, moving, found)
        return Looked(wanted, chosen)
    except (AlreadyExists, FailedPrecondition) as problem:
        if problem.reason == "PATIENT_DECEASED":
            raise
        return Looked(wanted, reason=problem.reason)


def _meets(chosen: Chosen, beside: Sequence[Chosen]) -> bool:
    """Whether a visit would stand in the way of another one of the same series."""
    spans = {span[:2]: span for span in chosen.spans}
    return any(
        span.start < mine.end and mine.start < span.end
        for other in beside
        for span in other.spans
        if (mine := spans.get(span[:2])) is not None
    )

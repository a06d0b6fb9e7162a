"""The loop that offers what was freed: one candidate at a time, on a held slot, until somebody takes it or nobody wants it.

Each step is one transaction, so a process that dies leaves nothing half done. **Locks.** A freed slot, entry or offer is
locked before the appointment that holds it only by who does not wait for the latter (SKIP LOCKED); who answers an offer
locks the appointment first, as `occupancy.py` says. So nobody who holds one of these waits for somebody who wants it.
"""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from prometheus_client import Counter, Histogram
from sqlalchemy import ColumnElement, and_, case, func, or_, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from chassis.errors import Aborted, FailedPrecondition, Invalid, LostRace, Problem
from chassis.ids import new_id
from chassis.model import Aggregate, by_id
from chassis.timers import Loop, RunningLoop, due
from services.scheduling import booking, matching, occupancy
from services.scheduling.appointment import Appointment, Status
from services.scheduling.availability import DAY
from services.scheduling.finding import DAYS_AT_MOST, Search, free_slots
from services.scheduling.matching import Ranked, Wish
from services.scheduling.offers import Place
from services.scheduling.scheduling_request import follow_visit
from services.scheduling.terms import Terms, terms
from services.scheduling.waitlist import (
    OPEN,
    EntryStatus,
    FreedSlot,
    OfferStatus,
    OpenedHours,
    SlotStatus,
    WaitlistEntry,
    WaitlistNotice,
    WaitlistOffer,
)

if TYPE_CHECKING:
    from chassis.pipeline import Runtime

A = TypeVar("A", bound=Aggregate)

LOOP = "backfill"
SWAPPED = {"code": "pat-swl"}
"""Why the later visit is cancelled: FHIR's "Patient: Scheduled from Wait List"."""
_CANDIDATES_AT_MOST = 2000
_AT_A_TIME = 50
_STARTS_AT_MOST, _WISHES_AT_MOST = 1000, 100  # all of the one are compared with all of the other
_WISHED = (
    WaitlistEntry.id, WaitlistEntry.visit_type_id, WaitlistEntry.priority, WaitlistEntry.create_time,
    WaitlistEntry.expire_time, WaitlistEntry.clinic_ids, WaitlistEntry.practitioner_ids, WaitlistEntry.weekdays,
    WaitlistEntry.earliest_time, WaitlistEntry.latest_time, WaitlistEntry.earliest_date, WaitlistEntry.latest_date,
    WaitlistEntry.skips,
)  # fmt: skip
"""The columns of a `Wish`, but for its last one."""
_STANDING = (Status.BOOKED, Status.ARRIVED, Status.CHECKED_IN, Status.FULFILLED)
# Refusals that concern one candidate, as a quota of new patients does; any other one concerns the slot.
_OF_THE_PATIENT = ("PATIENT_BUSY", "PATIENT_DECEASED", "NOT_ELIGIBLE", "NOT_LICENSED")


class BackfillMetrics:
    """What the loop shows at /metrics; nothing of it says who."""

    def __init__(self, registry: Any) -> None:
        self.slots = Counter(
            "care_waitlist_slots", "Freed slots by what became of them.", ("outcome",), registry=registry
        )
        self.offers = Counter(
            "care_waitlist_offers",
            "Steps of offers: offered, accepted, declined, expired, unavailable.",
            ("outcome",),
            registry=registry,
        )
        self.filled = Histogram(
            "care_waitlist_fill_seconds",
            "From a slot's being freed until it was filled from the waitlist.",
            buckets=(60, 300, 900, 1800, 3600, 7200, 14400, 43200, 86400, 172800, 604800),
            registry=registry,
        )


class BackfillLoop(Loop):
    """Starts the matching of a service, with its counters."""

    def __init__(self) -> None:
        super().__init__(LOOP, backfill, every=lambda settings: settings.backfill_every)

    def start(self, runtime: "Runtime") -> "RunningBackfill":
        """Begin to match."""
        return RunningBackfill(runtime)


class RunningBackfill(RunningLoop):
    """Matching at work."""

    def __init__(self, runtime: "Runtime") -> None:
        self.metrics = BackfillMetrics(runtime.telemetry.registry)
        every: float = runtime.settings.backfill_every  # type: ignore[attr-defined]
        super().__init__(LOOP, backfill, every, runtime)


async def backfill(runtime: "Runtime") -> int:
    """One round: what was heard, what is over, then what can be offered. Answers how many things were done."""
    async with runtime.database.acting("system:scheduling") as db:
        done = await _hear(db) + await _end_offers(db) + await _end_entries(db)
    return done + await _look_into_opened(runtime) + await _offer_slots(runtime)


# -- what was opened ---------------------------------------------------------------------------------------------------


async def _look_into_opened(runtime: "Runtime") -> int:
    """Make of hours that were opened the slots that somebody who waits could use, as if they had come free."""
    query = select(OpenedHours).where(OpenedHours.no > 0).order_by(OpenedHours.no).limit(1)
    for done in range(_AT_A_TIME):
        async with runtime.database.acting("system:scheduling") as db:
            opened = (await db.execute(query.with_for_update(skip_locked=True))).scalar_one_or_none()
            if opened is None:
                return done
            await _divide(db, opened)
            await db.delete(opened)
    return _AT_A_TIME


async def _divide(db: AsyncSession, opened: OpenedHours) -> None:
    """One slot after the other, none over another, as many as people who wait could use: who declines one of them is not
    asked about each that follows. To whom they go is for the offering to say."""
    now: datetime = db.info["act"].now
    wishes = await _wishes(db, opened, now)
    ahead = [(first, last) for first, last in opened.windows if last > now.timestamp()]
    if not wishes or not ahead:
        return
    first, last = int(max(ahead[0][0] - DAY / 2, now.timestamp())), ahead[-1][1] + DAY // 2
    search = Search(
        opened.tenant_id, opened.visit_type_id, [opened.clinic_id], [opened.practitioner_id],
        start=first, end=min(last, first + DAYS_AT_MOST * DAY),
    )  # fmt: skip
    try:
        free = await free_slots(db, search, _STARTS_AT_MOST)
    except Invalid:  # there is no such visit type any more
        return
    zone, until = free.zones.get(opened.clinic_id, ""), 0
    for start, end in sorted({(slot.start, slot.end) for slot in free.slots}):
        # What only touches the new hours was to be had before.
        if start < until or not any(a < end and start < b for a, b in ahead):
            continue
        times = (datetime.fromtimestamp(start, UTC), datetime.fromtimestamp(end, UTC))
        slot = matching.Slot(opened.visit_type_id, opened.clinic_id, opened.practitioner_id, *times, zone)
        best = next((wish for wish in wishes if not matching.misfits(wish, slot, now)), None)
        if best is None:
            continue
        wishes.remove(best)
        until = end
        row = FreedSlot(
            tenant_id=opened.tenant_id, id=new_id(), visit_type_id=slot.visit_type_id, clinic_id=slot.clinic_id,
            practitioner_id=slot.practitioner_id, start_time=slot.start, end_time=slot.end, time_zone=zone, cause="OPENED",
        )  # fmt: skip
        row.wait(now)
        db.add(row)


def _gives_up(older: Any) -> ColumnElement[bool]:
    """The condition that `older` is the booked visit that an entry gives up."""
    return and_(
        older.tenant_id == WaitlistEntry.tenant_id,
        older.id == WaitlistEntry.appointment_id,
        older.status == Status.BOOKED,
    )


async def _wishes(db: AsyncSession, opened: OpenedHours, now: datetime) -> list[Wish]:
    older = aliased(Appointment)
    query = (
        select(*_WISHED, older.start_time)
        .outerjoin(older, _gives_up(older))
        .where(
            WaitlistEntry.tenant_id == opened.tenant_id,
            WaitlistEntry.visit_type_id == opened.visit_type_id,
            WaitlistEntry.status.in_(OPEN),
            WaitlistEntry.expire_time > now,
        )
        .order_by(case(matching.BANDS, value=WaitlistEntry.priority, else_=0).desc(), WaitlistEntry.create_time)
        .limit(_WISHES_AT_MOST)
    )
    return [Wish(*row) for row in (await db.execute(query)).tuples()]


# -- offering ----------------------------------------------------------------------------------------------------------


async def _offer_slots(runtime: "Runtime") -> int:
    """Offer what is due, each slot in a transaction of its own: what goes wrong with one holds up no other."""
    for done in range(_AT_A_TIME):
        slot: FreedSlot | None = None
        try:
            async with runtime.database.acting("system:scheduling") as db:
                slot = await _due_slot(db)
                if slot is None:
                    return done
                await _offer(db, slot)
        except (Problem, LostRace, DBAPIError) as error:
            # Somebody was faster, between the look and the taking: the next look will see it.
            assert slot is not None or isinstance(error, DBAPIError)
            if slot is None:
                raise
            runtime.telemetry.log.info("freed slot waits, trying again", error=type(error).__name__)
            await _postpone(runtime, slot)
    return _AT_A_TIME


async def _due_slot(db: AsyncSession) -> FreedSlot | None:
    found = await due(db, FreedSlot, FreedSlot.due_time, FreedSlot.status == SlotStatus.OPEN, limit=1)
    return found[0] if found else None


async def _postpone(runtime: "Runtime", slot: FreedSlot) -> None:
    pause = timedelta(seconds=runtime.settings.backfill_retry)  # type: ignore[attr-defined]
    async with runtime.database.acting("system:scheduling") as db:
        await db.execute(
            update(FreedSlot)
            .where(by_id(FreedSlot, slot.tenant_id, slot.id), FreedSlot.status == SlotStatus.OPEN)
            .values(due_time=db.info["act"].now + pause)
        )


async def _offer(db: AsyncSession, slot: FreedSlot) -> None:
    """Hold the slot for the best candidate who can take it, or say why nobody gets it."""
    now: datetime = db.info["act"].now
    _count(db, "slots", "freed", once=slot.version == 1)
    held = await terms(db, slot.tenant_id, slot.visit_type_id, slot.clinic_id)
    until = matching.answer_by(slot.slot, now, held.rules)
    if until is None:
        return _close(db, slot, SlotStatus.LATE)
    opening = matching.offered_from(now, slot.time_zone, held.rules)
    if opening > now:
        if matching.answer_by(slot.slot, opening, held.rules) is None:
            return _close(db, slot, SlotStatus.LATE)
        return slot.wait(opening)
    best, busy = await candidates(db, slot, held)
    for candidate in best:
        entry = await _lock(db, WaitlistEntry, slot.tenant_id, candidate.wish.entry_id)
        if entry is None or entry.status is not EntryStatus.WAITING:
            continue  # somebody has it in hand, or it got another slot meanwhile
        based_on = await _based_on(db, entry)
        try:
            async with db.begin_nested():  # who can't have it has locked nothing for the next one
                chosen = await _choose(db, slot, entry, based_on, now)
        except Problem as problem:
            if problem.reason in _OF_THE_PATIENT or problem.metadata.get("new_patients") == "true":
                continue
            return await _give_up(db, slot, problem)
        return await _hold(db, slot, entry, based_on, candidate, chosen, until, held.version)
    if busy:
        # Somebody who would want it has another offer in hand, which may yet be declined.
        slot.wait(now + timedelta(seconds=db.info["runtime"].settings.backfill_retry))
    else:
        _close(db, slot, SlotStatus.FREE)


async def candidates(db: AsyncSession, slot: FreedSlot, held: Terms) -> tuple[list[Ranked], bool]:
    """Who may be offered a slot, the best first, and whether others who may have an offer in hand.

    Left out: whoever was offered this very time before, and whoever has a visit of this type ahead already.
    """
    now: datetime = db.info["act"].now
    older, ahead = aliased(Appointment), aliased(Appointment)
    offered = select(WaitlistOffer.id).where(
        WaitlistOffer.tenant_id == WaitlistEntry.tenant_id,
        WaitlistOffer.entry_id == WaitlistEntry.id,
        WaitlistOffer.practitioner_id == slot.practitioner_id,
        WaitlistOffer.start_time == slot.start_time,
    )
    booked = select(ahead.id).where(
        ahead.tenant_id == WaitlistEntry.tenant_id,
        ahead.patient_id == WaitlistEntry.patient_id,
        ahead.start_time > now,
        ahead.visit_type_id == WaitlistEntry.visit_type_id,
        ahead.status == Status.BOOKED,
        or_(WaitlistEntry.appointment_id.is_(None), ahead.id != WaitlistEntry.appointment_id),
        # One that was there before was known to whoever put the patient on the list.
        ahead.create_time > WaitlistEntry.create_time,
    )
    query = (
        select(WaitlistEntry.status, *_WISHED, older.start_time)
        .outerjoin(older, _gives_up(older))
        .where(
            WaitlistEntry.tenant_id == slot.tenant_id,
            WaitlistEntry.visit_type_id == slot.visit_type_id,
            WaitlistEntry.status.in_(OPEN),
            WaitlistEntry.expire_time > now,
            or_(WaitlistEntry.clinic_ids == [], WaitlistEntry.clinic_ids.contains([slot.clinic_id])),
            or_(WaitlistEntry.practitioner_ids == [], WaitlistEntry.practitioner_ids.contains([slot.practitioner_id])),
            ~offered.exists(),
            ~booked.exists(),
        )
        .order_by(case(matching.BANDS, value=WaitlistEntry.priority, else_=0).desc(), WaitlistEntry.create_time)
        .limit(_CANDIDATES_AT_MOST)
    )
    waiting, busy = [], []
    # Not as rows of the session: there may be hundreds of them, of whom one is offered something.
    for status, *wished in (await db.execute(query)).tuples():
        (waiting if status is EntryStatus.WAITING else busy).append(Wish(*wished))
    best = matching.ranked(waiting, slot.slot, now, held.weights)
    return best, any(not matching.misfits(wish, slot.slot, now) for wish in busy)


async def _choose(
    db: AsyncSession, slot: FreedSlot, entry: WaitlistEntry, based_on: Sequence[Any], now: datetime
) -> booking.Chosen:
    place = Place(slot.visit_type_id, slot.clinic_id, slot.practitioner_id, int(slot.start_time.timestamp()))
    terms = booking.Terms(referral=booking.has_referral(based_on))
    return await booking.choose(db, slot.tenant_id, entry.patient_id, place, now, terms=terms)


async def _hold(
    db: AsyncSession,
    slot: FreedSlot,
    entry: WaitlistEntry,
    based_on: Sequence[Any],
    candidate: Ranked,
    chosen: booking.Chosen,
    until: datetime,
    policy_version: int,
) -> None:
    """Hold the time as any other hold, and tell the patient."""
    hold = Appointment(tenant_id=slot.tenant_id, id=new_id(), patient_id=entry.patient_id, based_on=list(based_on))
    hold.place(**chosen.values())
    hold.hold(until)
    offer = WaitlistOffer(
        tenant_id=slot.tenant_id,
        id=hold.id,
        patient_id=entry.patient_id,
        entry_id=entry.id,
        slot_id=slot.id,
        expire_time=until,
        policy_version=policy_version,
        security_labels=sorted({*(hold.security_labels or ()), *(entry.security_labels or ())}),
        **{
            name: getattr(hold, name)
            for name in ("visit_type_id", "clinic_id", "practitioner_id", "start_time", "end_time", "time_zone")
        },
    )
    offer.make(candidate.score)
    entry.offer(offer)
    slot.status, slot.offers = SlotStatus.OFFERED, slot.offers + 1
    db.add_all([hold, offer])
    await db.flush()
    await chosen.take(db, hold)
    _count(db, "offers", "offered")


async def _based_on(db: AsyncSession, entry: WaitlistEntry) -> list[Any]:
    """The referral of the visit that is given up is that of the new one."""
    if entry.appointment_id is None:
        return []
    found = await db.execute(
        select(Appointment.based_on).where(by_id(Appointment, entry.tenant_id, entry.appointment_id))
    )
    return list(found.scalar_one_or_none() or ())


async def _give_up(db: AsyncSession, slot: FreedSlot, problem: Problem) -> None:
    """The slot can't be had. Where only a hold stands in its way it may yet come back."""
    now: datetime = db.info["act"].now
    if problem.reason == "SLOT_TAKEN":
        held = (
            select(func.min(Appointment.hold_expire_time))
            .where(
                Appointment.tenant_id == slot.tenant_id,
                Appointment.practitioner_id == slot.practitioner_id,
                Appointment.start_time < slot.end_time,
                Appointment.end_time > slot.start_time,
                Appointment.status == Status.PENDING,
                Appointment.hold_expire_time > now,
            )
        )  # fmt: skip
        if (await db.execute(held)).scalar_one() is not None:
            return slot.wait(now + timedelta(seconds=db.info["runtime"].settings.backfill_retry))
    return _close(db, slot, SlotStatus.GONE)


def _close(db: AsyncSession, slot: FreedSlot, status: SlotStatus) -> None:
    slot.close(status, db.info["act"].now)
    _count(db, "slots", status.value.lower())


# -- answers -----------------------------------------------------------------------------------------------------------


async def accept(db: AsyncSession, hold: Appointment, offer: WaitlistOffer, entry: WaitlistEntry) -> None:
    """Book the held slot and cancel the later visit, whose time is then offered in turn. All rows locked, `hold` first.

    Raises FailedPrecondition `OFFER_EXPIRED`, LostRace.
    """
    if hold.status is Status.PENDING:
        hold.book()
        if not await booking.keep(db, hold, db.info["act"].now):
            raise over()
    elif hold.status not in _STANDING:  # booked by somebody at the desk is as good
        raise over()
    now: datetime = db.info["act"].now
    offer.answer("accept", now)
    entry.accept(offer)
    slot = await db.get(FreedSlot, (offer.tenant_id, offer.slot_id), with_for_update=True)
    if slot is not None:
        slot.close(SlotStatus.FILLED, now)
        _count(db, "slots", "filled", seconds=(now - slot.create_time).total_seconds())
    _count(db, "offers", "accepted")
    older = None
    if entry.appointment_id is not None:
        older = await _lock(db, Appointment, entry.tenant_id, entry.appointment_id)
        if older is None:
            raise LostRace(in_hand())
    if older is not None and older.status is Status.BOOKED and older.start_time > hold.start_time:
        older.cancel(SWAPPED, now)
        hold.follow(older)
        await occupancy.free(db, (older.tenant_id, older.id))
        if older.based_on:
            await follow_visit(db, older, now)
            await db.flush()  # two versions of the request for two steps
    if hold.based_on:
        await follow_visit(db, hold, now)


async def let_go(
    db: AsyncSession, hold: Appointment, offer: WaitlistOffer, status: OfferStatus, reason_code: str = ""
) -> None:
    """End an offer that isn't accepted: its hold is given back and the slot goes to the next. The entry is the caller's."""
    now: datetime = db.info["act"].now
    if hold.status is Status.PENDING:
        if status is OfferStatus.EXPIRED:
            hold.expire()
        else:
            hold.release()
        await occupancy.free(db, (hold.tenant_id, hold.id))
    if status is OfferStatus.DECLINED:
        offer.answer("decline", now)
    elif status is OfferStatus.EXPIRED:
        offer.expire()
    else:
        offer.end(reason_code)
    await db.execute(
        update(FreedSlot)
        .where(by_id(FreedSlot, offer.tenant_id, offer.slot_id), FreedSlot.status == SlotStatus.OFFERED)
        .values(status=SlotStatus.OPEN, due_time=now)
        .execution_options(synchronize_session=False)
    )
    _count(db, "offers", status.value.lower())


def over() -> FailedPrecondition:
    """Too late to answer."""
    return FailedPrecondition("OFFER_EXPIRED", "The time to answer this offer is over; the patient still waits.")


def in_hand() -> Aborted:
    """Somebody else is at work on it."""
    return Aborted("WAITLIST_BUSY", "Somebody else has this in hand at the moment; try again.")


# -- what happens by itself --------------------------------------------------------------------------------------------


async def _hear(db: AsyncSession) -> int:
    """Visits that concern open entries: booked in another way, or an offered hold that was ended or booked at the desk."""
    query = (
        select(WaitlistNotice)
        .where(WaitlistNotice.no > 0)
        .order_by(WaitlistNotice.no)
        .limit(_AT_A_TIME)
        .with_for_update(skip_locked=True)
    )
    done = 0
    for notice in list((await db.execute(query)).scalars()):
        if await _heed(db, notice):
            await db.delete(notice)
            done += 1
    return done


async def _heed(db: AsyncSession, notice: WaitlistNotice) -> bool:
    """Whether nothing is left to do for it."""
    visit = await _lock(db, Appointment, notice.tenant_id, notice.appointment_id)
    entry = await _lock(db, WaitlistEntry, notice.tenant_id, notice.entry_id)
    if visit is None or entry is None:
        return False  # in somebody's hands: later
    if await db.get(WaitlistOffer, (entry.tenant_id, visit.id)) is not None:
        offer = await _lock(db, WaitlistOffer, entry.tenant_id, visit.id)
        if offer is None:
            return False
        if offer.status is OfferStatus.OPEN and visit.status is not Status.PENDING:
            return await _settle(db, visit, offer, entry)
        return True
    if entry.status not in OPEN:
        return True
    if visit.status not in _STANDING:
        return True  # cancelled again meanwhile
    if entry.status is EntryStatus.OFFERED and not await withdraw_offer(db, entry, "booked-elsewhere"):
        return False
    entry.fulfill(visit.id)
    return True


async def _settle(db: AsyncSession, hold: Appointment, offer: WaitlistOffer, entry: WaitlistEntry) -> bool:
    """Something became of an offered hold without the offer's being answered; whether that is written down now."""
    theirs = entry.status is EntryStatus.OFFERED and entry.offer_id == offer.id
    if hold.status in _STANDING and theirs:
        if entry.appointment_id is not None:
            older = await _lock(db, Appointment, entry.tenant_id, entry.appointment_id)
            if older is None:
                return False
        await accept(db, hold, offer, entry)
    elif hold.expired or offer.expire_time <= db.info["act"].now:
        await let_go(db, hold, offer, OfferStatus.EXPIRED)
        if theirs:
            entry.lapse(offer)
    else:
        await let_go(db, hold, offer, OfferStatus.UNAVAILABLE, "hold-ended")
        if theirs:
            entry.miss(offer)
    return True


async def withdraw_offer(db: AsyncSession, entry: WaitlistEntry, reason_code: str) -> bool:
    """End the offer of an entry that no longer waits for it; False where somebody has its hold in hand."""
    if entry.offer_id is None:
        return True
    hold = await _lock(db, Appointment, entry.tenant_id, entry.offer_id)
    offer = await _lock(db, WaitlistOffer, entry.tenant_id, entry.offer_id)
    if hold is None or offer is None:
        return False
    if offer.status is OfferStatus.OPEN:
        await let_go(db, hold, offer, OfferStatus.UNAVAILABLE, reason_code)
    return True


async def _end_offers(db: AsyncSession) -> int:
    """Offers whose time is over: the patient goes on waiting, the slot goes to the next."""
    ended = 0
    open_ = WaitlistOffer.status == OfferStatus.OPEN
    for offer in await due(db, WaitlistOffer, WaitlistOffer.expire_time, open_, limit=_AT_A_TIME):
        hold = await _lock(db, Appointment, offer.tenant_id, offer.id)
        entry = await _lock(db, WaitlistEntry, offer.tenant_id, offer.entry_id)
        if hold is not None and entry is not None:
            ended += await _settle(db, hold, offer, entry)
    return ended


async def _end_entries(db: AsyncSession) -> int:
    """Entries that have waited until their end."""
    ended = await due(db, WaitlistEntry, WaitlistEntry.expire_time, WaitlistEntry.status == EntryStatus.WAITING)
    for entry in ended:
        entry.expire()
    return len(ended)


async def _lock(db: AsyncSession, model: type[A], tenant_id: str, row_id: str) -> A | None:
    """A row as it is now, locked; None where it isn't there or somebody else has it."""
    query = (
        select(model)
        .where(by_id(model, tenant_id, row_id))
        .with_for_update(skip_locked=True, of=model, key_share=True)
        .execution_options(populate_existing=True)
    )
    return (await db.execute(query)).scalar_one_or_none()


def _count(db: AsyncSession, what: str, outcome: str, *, once: bool = True, seconds: float | None = None) -> None:
    """Count a step once it is committed."""
    running = db.info["runtime"].loops.get(LOOP)
    if not isinstance(running, RunningBackfill) or not once:
        return
    metrics = running.metrics
    counter: Counter = getattr(metrics, what)

    def counted() -> None:
        counter.labels(outcome).inc()
        if seconds is not None:
            metrics.filled.observe(seconds)

    wakes: dict[object, Callable[[], None]] = db.info.setdefault("wakes", {})
    wakes[object()] = counted


# -- shown -------------------------------------------------------------------------------------------------------------


class Preview(NamedTuple):
    """What would be done with a slot now."""

    slot: FreedSlot
    best: Sequence[Ranked]
    status: str


async def preview(runtime: "Runtime", count: int = 3) -> list[Preview]:
    """For every slot that is still in play: the candidates in order, as of now; nothing is changed."""
    found = []
    async with runtime.database.acting("system:scheduling") as db:
        in_play = FreedSlot.status.in_([SlotStatus.OPEN, SlotStatus.OFFERED])
        query = select(FreedSlot).where(in_play).order_by(FreedSlot.due_time).limit(200)
        for slot in list((await db.execute(query)).scalars()):
            held = await terms(db, slot.tenant_id, slot.visit_type_id, slot.clinic_id)
            if matching.answer_by(slot.slot, db.info["act"].now, held.rules) is None:
                found.append(Preview(slot, (), "too late"))
                continue
            best, busy = await candidates(db, slot, held)
            state = "offered" if slot.status is SlotStatus.OFFERED else "others are deciding" if busy else "open"
            found.append(Preview(slot, best[:count], state))
    return found

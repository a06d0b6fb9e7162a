"""Booking: what is wanted is checked against the directory as it is now, resources are chosen, and all are taken at once."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, Boolean, DateTime, Text, TextClause, Uuid, bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.selectable import TextualSelect

from chassis.asking import Sight, fact
from chassis.errors import AlreadyExists, FailedPrecondition, Invalid, LostRace, PermissionDenied
from services.scheduling import days, eligibility, occupancy, policies
from services.scheduling.appointment import Appointment, Status
from services.scheduling.availability import DAY, Interval, Quota, WeeklyHours, occurrences, one_of_each, open_intervals
from services.scheduling.directory import (
    INTERPRETER,
    Clinic,
    Need,
    Practitioner,
    Schedule,
    VisitType,
    exceptions,
    weekly,
)
from services.scheduling.occupancy import LANES, PACKED, Span
from services.scheduling.offers import Place

_PATIENT, _PRACTITIONER = "patient", "practitioner"
_NEARLY_OVER = timedelta(minutes=2)  # longer than any transaction lasts
NOBODY = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True, slots=True)
class Overbooking:
    """The explicit choice to book over what stands. `permitted` says whether the caller may."""

    reason: str
    patient_overlap: bool
    permitted: bool


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms somebody books. What is the default holds for staff and for the system itself."""

    self_service: bool = False
    """A patient, or somebody who acts for one, books without staff."""
    held_back: bool = False
    """Times that are held back may be taken."""
    referral: bool = False
    """There is a referral."""
    payer: str = ""
    """Code of the payer, where one was named."""


STAFF = Terms()


def has_referral(based_on: Sequence[Any] | None) -> bool:
    """Whether a referral is among what a visit is based on."""
    return any(one["type"] == "Referral" for one in based_on or ())


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
    languages: tuple[str, ...] = ()

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
    established: bool = False
    """The patient had a visit of this specialty in the last years."""
    weekly: tuple[WeeklyHours, ...] = ()

    @property
    def end(self) -> int:
        """Epoch second at which the visit ends."""
        return self.place.start + 60 * self.visit_type.duration_minutes

    def check(self, now: int, earliest: int, terms: Terms) -> None:
        """Raises FailedPrecondition where this can't be booked at all, taken or not: `OUTSIDE_HOURS`, `HELD_BACK`."""
        visit_type, start = self.visit_type, self.place.start
        specialty = (visit_type.specialty or {}).get("code")
        if not visit_type.active:
            raise _outside("This visit type is no longer booked.")
        if not self.clinic.bookable or not self.practitioner.active or self.schedule is None:
            raise _outside("This practitioner sees no patients at this clinic now.")
        in_force = self.practitioner.in_force(self.place.clinic_id, [specialty] if specialty else ())
        if not any(begin <= start < end for begin, end in in_force):
            raise _outside(
                "This practitioner has no role at this clinic then, or not the specialty that the visit type asks for."
            )
        if start < earliest:
            raise _outside("The start is past, or sooner than the visit type's notice allows.")
        shown = [block for block in self.weekly if not (terms.self_service and block.staff_only)]
        if not self._holds(shown, None if terms.held_back else now):
            if not terms.self_service and self._holds(shown, None):
                raise FailedPrecondition("HELD_BACK", "This time is held back for now.")
            raise _outside("The practitioner's hours at this clinic don't hold this visit.")

    def _holds(self, hours: Sequence[WeeklyHours], now: int | None) -> bool:
        """Whether the practitioner's hours hold the visit, as they are released at a time, or as they will be."""
        assert self.schedule is not None
        start, zone = self.place.start, self.clinic.zone
        first = datetime.fromtimestamp(start, zone).date()
        opened = open_intervals(
            hours,
            self.schedule.exceptions_(),
            self.clinic.closed_days(first - timedelta(days=1), first + timedelta(days=2)),
            zone,
            start - DAY,
            self.end + DAY,
            self.visit_type.id,
            *(() if now is None else (now,)),
        )
        return any(begin <= start and self.end <= end for begin, end in opened)

    def admit(self, terms: Terms, known: eligibility.Facts) -> None:
        """Raises FailedPrecondition `NOT_ELIGIBLE`, `NOT_LICENSED` where this patient can't have such a visit."""
        day = datetime.fromtimestamp(self.place.start, self.clinic.zone).date()
        against = eligibility.refusals(
            self.visit_type.eligibility,
            known,
            new_patient=not self.established,
            referral=terms.referral,
            payer=terms.payer,
            day=day,
        )
        if against:
            raise not_eligible(against)
        if self.licence_asked and known.state and known.state not in (self.practitioner.licensed_states or ()):
            raise FailedPrecondition(
                "NOT_LICENSED", "This practitioner has no licence for the state in which the patient lives."
            )

    @property
    def licence_asked(self) -> bool:
        """Whether the practitioner must be licensed where the patient lives."""
        return bool(self.visit_type.licence_required and self.visit_type.remote)

    @property
    def needs_facts(self) -> bool:
        """Whether something is asked of the patient that only patients knows."""
        return eligibility.needs_facts(self.visit_type.eligibility) or self.licence_asked

    def quotas(self) -> list[tuple[Quota, Interval]]:
        """Limits that this visit would count against, each with the occurrence of its block."""
        start, zone = self.place.start, self.clinic.zone
        return [
            (quota, occurrence)
            for block in self.weekly
            if block.quotas and block.takes(self.visit_type.id)
            for quota in block.quotas
            if quota.counts(self.visit_type.id, not self.established)
            for occurrence in occurrences(block, zone, start, start + 1)
        ]

    def choose(self, overbooking: Overbooking | None) -> dict[Candidate, int]:
        """Who and what is taken, in which lane.

        Raises AlreadyExists `SLOT_TAKEN`, `PATIENT_BUSY`, `OVERBOOKING_CAP_REACHED`; PermissionDenied or
        FailedPrecondition `OVERBOOKING_NOT_ALLOWED`.
        """
        practitioner = self._of(_PRACTITIONER)[0]
        needs = self.visit_type.needs(self.place.interpreter_language)
        groups = [[practitioner], *(self._rooms(need, practitioner.no) for need in needs)]
        if any(not group for group in groups):
            raise _outside("This clinic has no room, device or interpreter then that the visit needs.")
        cap = self._cap(overbooking, groups)
        chosen = {one: self._lane(one, cap) for one in _one_of_each(groups, cap)}
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

    def _rooms(self, need: Need, turn: int) -> list[Candidate]:
        """Candidates for a need: the offered one first, then from another one for each practitioner, so that they spread."""
        rooms = sorted(
            (
                one
                for one in self.candidates
                if one.kind not in (_PATIENT, _PRACTITIONER) and need.met_by(one.ref_id, one.kind, one.languages)
            ),
            key=lambda one: one.no,
        )
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
        """Which overbooking it is, of whoever or whatever is shared most; the patient is nobody's slot."""
        return max(lane for one, lane in self.lanes.items() if one.kind != _PATIENT)

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
            "interpreter_language": found.place.interpreter_language,
            "new_patient": not found.established,
            "participants": [self._participant(one, lane) for one, lane in self.lanes.items()],
        }

    def _participant(self, one: Candidate, lane: int) -> dict[str, Any]:
        span = self.found.span(one, lane)
        types = {_PATIENT: "Patient", _PRACTITIONER: "Practitioner"}
        named = one.kind in types or one.kind == INTERPRETER
        role = one.kind if named else "room" if one.kind.endswith("room") else "device"
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
    found = await _find(db, tenant_id, patient_id, place, NOBODY, at_any_hour=True)
    return {one.no for one in found.candidates}


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
    terms: Terms = STAFF,
    sight: Sight | None = None,
) -> Chosen:
    """Check what is wanted and choose the resources; nothing is changed, nobody is locked.

    `moving` is a holder whose own rows don't count; without a patient it is for a session. Raises as `choose` does.
    """
    found = await _find(db, tenant_id, patient_id, place, moving or NOBODY, sight=sight)
    notice = 60 * found.visit_type.minimum_notice_minutes
    second = int(now.timestamp())
    found.check(second, second + (notice or -int(walk_in)), terms)
    if not moving and patient_id:
        if terms.self_service:
            policies.check("book", found.visit_type.self_booking, place.start, second)
            await keep_day(db, tenant_id, patient_id, place, found.visit_type.self_booking, found.clinic)
        found.admit(terms, _known(db, patient_id) if found.needs_facts else eligibility.NOTHING)
    return Chosen(found, found.choose(overbooking))


async def admit(db: AsyncSession, tenant_id: str, patient_id: str, place: Place, terms: Terms = STAFF) -> bool:
    """Whether somebody new comes to a place that is taken for several; nothing is taken.

    Raises FailedPrecondition `PATIENT_DECEASED`, `NOT_ELIGIBLE`, `NOT_LICENSED`; NeedFact where patients must be asked first.
    """
    found = await _find(db, tenant_id, patient_id, place, NOBODY, at_any_hour=True)
    found.admit(terms, _known(db, patient_id) if found.needs_facts else eligibility.NOTHING)
    return not found.established


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
    terms: Terms = STAFF,
    sight: Sight | None = None,
) -> Chosen:
    """Check what is wanted and choose the resources. `moving` is an appointment whose own rows don't count.

    `sight` is checked first: whether a patient is busy or dead is nobody's to learn who may not see the record.

    `walk_in` is by how many seconds the start may be past where no notice is asked for. Expired holds in the way are
    ended in this very transaction. Who was eligible when the time was promised may move it. Raises Invalid
    `VISIT_TYPE_UNKNOWN`, `CLINIC_UNKNOWN`, `PRACTITIONER_UNKNOWN`; FailedPrecondition `OUTSIDE_HOURS`, `HELD_BACK`,
    `PATIENT_DECEASED`, `NOT_ELIGIBLE`, `NOT_LICENSED`, `QUOTA_REACHED`, of self-service what `policies` says; what
    `Found.choose` raises; NeedFact where the patients service must be asked first.
    """
    own = moving.id if moving is not None else ""
    locked: set[int] = set()
    if overbooking is not None and overbooking.permitted:
        # Those who overbook go one after the other, so that each sees the lanes of those before it.
        found = await _find(db, tenant_id, patient_id, place, own or NOBODY, sight=sight)
        locked = {one.no for one in found.candidates}
        locked |= set(await occupancy.numbers(db, tenant_id, own)) if own else set()
        await occupancy.lock(db, sorted(locked))
    chosen = await look(
        db,
        tenant_id,
        patient_id,
        place,
        now,
        walk_in=walk_in,
        overbooking=overbooking,
        moving=own,
        terms=terms,
        sight=sight,
    )
    freed = [own] if own else []
    stale, quotas = chosen.stale, chosen.found.quotas()
    policy = chosen.found.visit_type.self_booking
    by_day = not own and terms.self_service and bool((policy or {}).get("at_most_per_day"))
    if stale or own or quotas or by_day:
        # Two who each take the last place of a quota at other times meet at the practitioner's number, two who each
        # take the patient's last one of a day at the patient's.
        meet = {*((_PRACTITIONER,) if quotas else ()), *((_PATIENT,) if by_day else ())}
        numbers = {one.no for one in chosen.lanes if stale or own or one.kind in meet}
        if own:
            numbers |= set(await occupancy.numbers(db, tenant_id, own))
        if not locked:
            await occupancy.lock(db, sorted(numbers))
        elif not numbers <= locked:  # a room that has just been added: a second lock would be out of order
            raise LostRace(taken())
    if quotas:
        await keep_quotas(db, tenant_id, chosen.found, quotas, [own])
    if by_day:
        await keep_day(db, tenant_id, patient_id, place, policy, chosen.found.clinic)
    if stale:
        freed += await end_expired(db, tenant_id, stale)
    return Chosen(chosen.found, chosen.lanes, freed, overbooks=bool(locked))


def _known(db: AsyncSession, patient_id: str) -> eligibility.Facts:
    """What patients knows. A loop's or a reaction's transaction has nobody who asks: nothing is known, nobody excluded."""
    asked = db.info.get("known")
    if asked is None:
        return eligibility.NOTHING
    facts: eligibility.Facts = fact(asked, ("facts", patient_id))
    return facts


async def _find(
    db: AsyncSession,
    tenant_id: str,
    patient_id: str | None,
    place: Place,
    own: str,
    *,
    at_any_hour: bool = False,
    sight: Sight | None = None,
) -> Found:
    """All that a booking must know, in one statement; whoever has no number yet gets one."""
    values = {
        "tenant": tenant_id,
        "patient": patient_id,
        "own": own,
        "visit_type": place.visit_type_id,
        "clinic": place.clinic_id,
        "practitioner": place.practitioner_id,
        "start": place.start,
        "language": place.interpreter_language,
    }
    if sight is not None:
        values |= sight.values
    row = (await db.execute(_finding(sight.condition if sight is not None else None), values)).one()
    if sight is not None:
        sight.check(row.in_sight)
    for what in ("visit_type", "clinic", "practitioner"):
        if not getattr(row, f"{what}_known"):
            raise Invalid(f"{what.upper()}_UNKNOWN", f"There is no such {what.replace('_', ' ')}.", field=f"{what}_id")
    if row.deceased:
        raise FailedPrecondition("PATIENT_DECEASED", "Nothing is booked for somebody who has died.")
    if any(no is None for _, _, no, *_ in row.candidates):  # somebody else has just given out the number
        raise LostRace(taken())
    blocks = weekly(row.weekly_hours, "schedule")
    clinic = Clinic(
        status=row.status,
        time_zone=row.time_zone,
        holiday_region=row.holiday_region,
        closed_dates=row.closed_dates,
        security_labels=row.clinic_labels,
    )
    ends = place.start + 60 * (row.duration_minutes or 0)
    candidates = [
        Candidate(kind, ref_id, no, frozenset(live or ()), bool(stale), tuple(languages or ()))
        for kind, ref_id, no, live, stale, hours, changes, languages in row.candidates
        if at_any_hour or not (hours or changes) or _is_there(hours, changes, clinic, place, ends)
    ]
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
            requirements=row.requirements,
            self_booking=row.self_booking,
            eligibility=row.eligibility,
            licence_required=row.licence_required,
        ),
        clinic,
        Practitioner(active=row.practitioner_active, roles=row.roles, licensed_states=row.licensed_states),
        Schedule(weekly_hours=row.weekly_hours, exceptions=row.exceptions) if row.schedule_known else None,
        candidates,
        row.established,
        blocks,
    )


def _is_there(hours: Any, changes: Any, clinic: Clinic, place: Place, ends: int) -> bool:
    """Whether a room, device or interpreter with hours of its own is there for the whole visit."""
    if not clinic.time_zone:
        return False
    zone = clinic.zone
    first = datetime.fromtimestamp(place.start, zone).date()
    opened = open_intervals(
        weekly(hours, "resource") or None,
        exceptions(changes, "resource"),
        clinic.closed_days(first - timedelta(days=1), first + timedelta(days=2)),
        zone,
        place.start - DAY,
        ends + DAY,
        place.visit_type_id,
    )
    return any(begin <= place.start and ends <= end for begin, end in opened)


def _one_of_each(groups: Sequence[Sequence[Candidate]], cap: int) -> list[Candidate]:
    """Of each group the best, none twice; where there is no such choice, the best of each, which then can't be had."""
    ranked = [sorted(group, key=lambda one: (one.lane(cap) is None, bool(one.live), one.stale)) for group in groups]
    by_id = {one.ref_id: one for group in groups for one in group}
    picked = one_of_each([[one.ref_id for one in group if one.lane(cap) is not None] for group in ranked])
    if picked is None:
        for group in ranked:
            if group[0].lane(cap) is None:
                return [group[0]]
        raise taken()
    return [by_id[ref_id] for ref_id in picked]


async def keep_quotas(
    db: AsyncSession,
    tenant_id: str,
    found: Found,
    quotas: Sequence[tuple[Quota, Interval]],
    own: Collection[str],
    beside: Sequence[Found] = (),
) -> None:
    """Raises FailedPrecondition `QUOTA_REACHED`. The practitioner's number is locked: what others took is seen.

    `own` are visits that move in the same act and don't count where they are, `beside` those that it takes besides.
    The error's `new_patients` says whether only new patients are too many.
    """
    place = found.place
    rows = await db.execute(
        STARTED,
        {
            "tenant": tenant_id,
            "practitioners": [place.practitioner_id],
            "first": datetime.fromtimestamp(min(begin for _, (begin, _) in quotas), UTC),
            "last": datetime.fromtimestamp(max(end for _, (_, end) in quotas), UTC),
        },
    )
    where = (place.clinic_id, place.practitioner_id)
    started = [
        (row.start_time.timestamp(), row.visit_type_id, row.new_patient)
        for row in rows
        if row.clinic_id == place.clinic_id and row.id not in own
    ]
    started += [
        (one.place.start, one.place.visit_type_id, not one.established)
        for one in beside
        if (one.place.clinic_id, one.place.practitioner_id) == where
    ]
    reached = [
        quota
        for quota, (begin, end) in quotas
        if sum(begin <= at < end and quota.counts(kind, new) for at, kind, new in started) >= quota.at_most
    ]
    if reached:
        raise FailedPrecondition(
            "QUOTA_REACHED",
            "As many such visits as the hours permit start there already.",
            new_patients=str(all(quota.new_patients for quota in reached)).lower(),
        )


async def keep(db: AsyncSession, hold: Appointment, now: datetime) -> bool:
    """Make a hold's time stay for good; whether all of it was still there. The hold's row is locked.

    Shortly before its end the numbers are locked, too: whoever looks after the end would no longer count the hold against a
    quota, though it is about to be a booking.
    """
    if hold.hold_expire_time is not None and hold.hold_expire_time - now < _NEARLY_OVER:
        await occupancy.lock(db, sorted(await occupancy.numbers(db, hold.tenant_id, hold.id)))
    return await occupancy.keep(db, hold.tenant_id, hold.id) >= len(hold.participants)


async def keep_day(
    db: AsyncSession, tenant_id: str, patient_id: str, place: Place, policy: Mapping[str, Any] | None, clinic: Clinic
) -> None:
    """Raises FailedPrecondition `SELF_SERVICE_LIMIT` where a patient has all the visits of a day that they may book."""
    at_most = (policy or {}).get("at_most_per_day", 0)
    if not at_most:
        return
    first, last = days.window(datetime.fromtimestamp(place.start, clinic.zone).date(), clinic.time_zone)
    values = {
        "tenant": tenant_id,
        "patient": patient_id,
        "visit_type": place.visit_type_id,
        "first": first,
        "last": last,
    }
    if (await db.execute(_OF_DAY, values)).scalar_one() >= at_most:
        raise FailedPrecondition(
            "SELF_SERVICE_LIMIT",
            "As many such visits as one books for a day without staff are booked already; please call.",
            at_most=str(at_most),
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


def not_eligible(rules: Sequence[str]) -> FailedPrecondition:
    """Rules of the visit type speak against it."""
    return FailedPrecondition(
        "NOT_ELIGIBLE", "The visit type isn't for this patient by its rules.", rules=",".join(rules)
    )


def busy() -> AlreadyExists:
    """The patient is elsewhere."""
    return AlreadyExists("PATIENT_BUSY", "The patient has another visit at this time.")


def _outside(message: str) -> FailedPrecondition:
    return FailedPrecondition("OUTSIDE_HOURS", message)


_UUID = Uuid(as_uuid=False)
_LANE = PACKED.format(no="q.no", lane="lane.n")
ESTABLISHED = (
    "EXISTS (SELECT FROM appointment a JOIN visit_type v ON v.tenant_id = a.tenant_id AND v.id = a.visit_type_id"
    " WHERE a.tenant_id = :tenant AND a.patient_id = :patient AND a.status IN ('ARRIVED', 'CHECKED_IN', 'FULFILLED')"
    f" AND a.start_time > clock_timestamp() - interval '{eligibility.NEW_WITHIN_YEARS} years'"
    " AND ({specialty} IS NULL OR v.specialty->>'code' = {specialty}))"
)
"""SQL: whether a patient is established for a specialty, or at all where it is null."""
_STANDS = (
    "status NOT IN ('CANCELLED', 'ENTERED_IN_ERROR', 'PROPOSED', 'WAITLIST')"
    " AND (status <> 'PENDING' OR hold_expire_time > clock_timestamp())"
)
STARTED_WHERE = (
    "tenant_id = :tenant AND practitioner_id = ANY(:practitioners) AND start_time >= :first AND start_time < :last"
    f" AND {_STANDS}"
)
"""SQL: what counts against quotas."""
STARTED = text(
    "SELECT id, clinic_id, practitioner_id, visit_type_id, new_patient, start_time FROM appointment"
    f" WHERE {STARTED_WHERE}"
).bindparams(
    bindparam("tenant", type_=_UUID),
    bindparam("practitioners", type_=ARRAY(_UUID)),
    *(bindparam(name, type_=DateTime(timezone=True)) for name in ("first", "last")),
).columns(
    **dict.fromkeys(("id", "clinic_id", "practitioner_id", "visit_type_id"), _UUID),
    new_patient=Boolean, start_time=DateTime(timezone=True),
)  # fmt: skip
"""Visits that start in a window: what counts against quotas."""
_FIND = f"""
WITH sight AS (
  SELECT {{sight}} AS whole
), kind AS (
  SELECT * FROM visit_type WHERE tenant_id = :tenant AND id = :visit_type
), seen AS (
  SELECT * FROM practitioner WHERE tenant_id = :tenant AND id = :practitioner
), candidate AS (
  SELECT '{_PATIENT}' AS kind, :patient AS ref_id, 0 AS before, 0 AS after,
         NULL::jsonb AS weekly_hours, NULL::jsonb AS exceptions, NULL::text[] AS languages FROM kind, seen, sight
   WHERE :patient IS NOT NULL AND whole
  UNION ALL
  SELECT '{_PRACTITIONER}', seen.id, buffer_before_minutes, buffer_after_minutes, NULL, NULL, NULL FROM kind, seen
  UNION ALL
  (SELECT r.kind, r.id, buffer_before_minutes, buffer_after_minutes,
          nullif(r.weekly_hours, '[]'), nullif(r.exceptions, '[]'), r.languages
     FROM kind, seen, resource r
    WHERE r.tenant_id = :tenant AND r.clinic_id = :clinic AND r.active
      AND (r.kind = ANY(kind.resource_kinds || kind.needed_kinds) OR r.id = ANY(kind.needed_ids)
           OR (r.kind = '{INTERPRETER}' AND :language <> '')) LIMIT 200)
), made AS (
  -- In the order of the key, so that two who make the same rows don't wait for each other.
  INSERT INTO bookable (tenant_id, ref_id, kind)
  SELECT :tenant, c.ref_id, c.kind FROM candidate c
   WHERE NOT EXISTS (SELECT FROM bookable b WHERE b.tenant_id = :tenant AND b.ref_id = c.ref_id)
   ORDER BY c.ref_id
  ON CONFLICT DO NOTHING RETURNING ref_id, no
)
SELECT (SELECT whole FROM sight) AS in_sight, k.id IS NOT NULL AS visit_type_known, k.active AS visit_type_active, k.duration_minutes,
       k.buffer_before_minutes, k.buffer_after_minutes, k.modality, k.resource_kinds, k.specialty,
       k.minimum_notice_minutes, k.late_cancel_hours, k.overbooking_cap, k.security_labels AS visit_type_labels,
       k.requirements, k.self_booking, k.eligibility, k.licence_required,
       c.id IS NOT NULL AS clinic_known, c.status, c.time_zone, c.holiday_region, c.closed_dates,
       c.security_labels AS clinic_labels,
       p.id IS NOT NULL AS practitioner_known, p.active AS practitioner_active, p.roles,
       p.licensed_states, {ESTABLISHED.format(specialty="k.specialty->>'code'")} AS established,
       s.id IS NOT NULL AS schedule_known, s.weekly_hours, s.exceptions,
       EXISTS (SELECT FROM deceased_patient d WHERE d.tenant_id = :tenant AND d.patient_id = :patient) AS deceased,
       (SELECT coalesce(jsonb_agg(jsonb_build_array(
                 q.kind, q.ref_id, q.no, o.live, o.stale, q.weekly_hours, q.exceptions, q.languages)), '[]')
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
"""
_FIND_VALUES = (
    *(bindparam(n, type_=_UUID) for n in ("tenant", "patient", "own", "visit_type", "clinic", "practitioner")),
    bindparam("start", type_=BigInteger),
    bindparam("language", type_=Text),
)
_FIND_COLUMNS: dict[str, Any] = {
    **{f"{what}_known": Boolean() for what in ("visit_type", "clinic", "practitioner", "schedule")},
    **dict.fromkeys(("in_sight", "visit_type_active", "practitioner_active", "deceased", "established",
                     "licence_required"), Boolean()),
    **dict.fromkeys(
        ("duration_minutes", "buffer_before_minutes", "buffer_after_minutes", "minimum_notice_minutes",
         "late_cancel_hours", "overbooking_cap"), BigInteger()),
    **dict.fromkeys(("modality", "status", "time_zone", "holiday_region"), Text()),
    **dict.fromkeys(("resource_kinds", "visit_type_labels", "clinic_labels", "closed_dates", "licensed_states"),
                    ARRAY(Text)),
    **dict.fromkeys(("specialty", "roles", "weekly_hours", "exceptions", "candidates", "requirements", "self_booking",
                     "eligibility"), JSONB()),
}  # fmt: skip


@cache
def _finding(sight: TextClause | None) -> TextualSelect:
    """The statement of `_find`, under a condition on whether the patient may be seen."""
    statement = text(_FIND.replace("{sight}", sight.text if sight is not None else "true"))
    more = sight._bindparams.values() if sight is not None else ()
    return statement.bindparams(*more).bindparams(*_FIND_VALUES).columns(**_FIND_COLUMNS)


_OF_DAY = text(
    "SELECT count(*) FROM appointment WHERE tenant_id = :tenant AND patient_id = :patient AND visit_type_id = :visit_type"
    f" AND start_time >= :first AND start_time < :last AND {_STANDS}"
).bindparams(
    *(bindparam(name, type_=_UUID) for name in ("tenant", "patient", "visit_type")),
    *(bindparam(name, type_=DateTime(timezone=True)) for name in ("first", "last")),
)
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

"""Free slots: what the directory and the calendar say about a window, read in bounded statements, worked out lazily."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from heapq import heapify, heappop, heapreplace
from itertools import islice
from math import asin, cos, radians, sin, sqrt
from typing import Any, NamedTuple

import orjson
from sqlalchemy import BigInteger, Boolean, DateTime, TextClause, Uuid, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.asking import Sight
from chassis.calendar import at_local
from chassis.errors import Invalid
from services.scheduling import availability, eligibility
from services.scheduling.availability import (
    DAY,
    Interval,
    Slot,
    WeeklyHours,
    all_starts,
    count_by_day,
    earliest_first,
    free_starts,
    intersect,
    occurrences,
    subtract,
)
from services.scheduling.booking import ESTABLISHED, STARTED, STARTED_WHERE
from services.scheduling.directory import VisitType, speaks
from services.scheduling.eligibility import Facts
from services.scheduling.mirror import Entry, Fetch, Mirror, Starts, by_day
from services.scheduling.occupancy import LANES, PACKED, STARTS_BEFORE
from services.scheduling.snapshot import Directory, Place, Room, Seat, look, read

_ROWS_AT_MOST = 200_000
_FITTING_AT_MOST, _STARTS_AT_MOST = 500, 10_000
DAYS, DAYS_AT_MOST = 14, 62
_MANY = 40  # of so many practitioners a page is full within a day
_EARTH_KM = 6371.0088  # mean radius, IUGG
_ALWAYS = (-(1 << 40), 1 << 40)


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
    languages: Sequence[str] = ()
    genders: Sequence[str] = ()
    specialties: Sequence[str] = ()
    modalities: Sequence[str] = ()
    near: tuple[float, float, float] | None = None
    """Degrees north, degrees east, kilometres."""
    interpreter_language: str = ""
    own_practitioner_id: str = ""
    team_practitioner_ids: Sequence[str] = ()
    licensed_state: str = ""
    referral: bool = False
    payer: str = ""
    held_back: bool = False
    self_service: bool = False
    facts: Facts = eligibility.NOTHING
    """What patients knows; asked for only where the visit type has a rule on it."""


class Found(NamedTuple):
    """A free slot in the order of preference: `rank` 0 is the patient's own clinician, 1 the team, 2 everybody else."""

    rank: int
    slot: Slot


@dataclass(slots=True)
class Free:
    """Free slots in order, and what is known around them."""

    now: int
    start: int
    end: int
    found: list[Found] = field(default_factory=list)
    zones: dict[str, str] = field(default_factory=dict)
    distances: dict[str, float] = field(default_factory=dict)
    held: set[Slot] = field(default_factory=set)
    """Those that are held back."""
    ineligible: list[str] = field(default_factory=list)

    @property
    def slots(self) -> list[Slot]:
        """The slots alone."""
        return [one.slot for one in self.found]


def wishes(weekdays: Sequence[int], earliest: str, latest: str) -> tuple[WeeklyHours, ...]:
    """Weekly windows in which the whole visit must lie; 1 is Monday. None where nothing is wished."""
    if not (weekdays or earliest or latest):
        return ()
    begin = time.fromisoformat(earliest) if earliest else time(0)
    end = time.fromisoformat(latest) if latest else time(0)
    return tuple(WeeklyHours(day - 1, begin, end) for day in sorted(set(weekdays)) or range(1, 8))


def kilometres(one: tuple[float, float], other: tuple[float, float]) -> float:
    """How far two points (degrees north, degrees east) are apart on the globe, by the haversine formula."""
    north, east, north_, east_ = map(radians, (*one, *other))
    half = sin((north_ - north) / 2) ** 2 + cos(north) * cos(north_) * sin((east_ - east) / 2) ** 2
    return 2 * _EARTH_KM * asin(min(1.0, sqrt(half)))


def window(start: int, end: int, now: int, days: int = DAYS_AT_MOST) -> Interval:
    """The window to look in; empty where nothing can be booked any more.

    Raises Invalid `WINDOW_TOO_LONG`, also where it begins that far away, `PERIOD_INVALID`.
    """
    if start and end and end < start:
        raise Invalid("PERIOD_INVALID", "The end lies before the beginning.", field="end_time")
    begin = max(start or now, now)
    end = end or begin + DAYS * DAY
    if end - (start or now) > days * DAY + 3600:  # an hour more where clocks are turned back
        raise Invalid("WINDOW_TOO_LONG", f"A search spans {days} days at the most.", field="end_time")
    # Somebody's seconds end there: what is looked for later would be found where somebody else's begin.
    return min(begin, STARTS_BEFORE), min(end, STARTS_BEFORE)


async def free_slots(db: AsyncSession, search: Search, count: int, after: Found | None = None) -> Free:
    """As `find`, in a transaction that keeps no directory: for what asks seldom."""
    fetch = fetching(db)
    now, _ = await look(fetch, search.tenant_id)
    return await find(fetch, await read(db, search.tenant_id, search.clinic_ids), search, now, count, after)


def fetching(db: AsyncSession) -> Fetch:
    """Rows by way of a session."""

    async def fetch(statement: object, values: object) -> Sequence[Sequence[object]]:
        return (await db.execute(statement, values)).all()  # type: ignore[call-overload, no-any-return]

    return fetch


async def find(
    fetch: Fetch,
    directory: Directory,
    search: Search,
    now: int,
    count: int,
    after: Found | None = None,
    *,
    mirror: Mirror | None = None,
    about: "About | None" = None,
) -> Free:
    """The first `count` free slots of a search in order of preference, those up to `after` left out.

    With a `mirror` no statement for what it holds, and beyond it one, or two where `about` is none. Raises Invalid
    `VISIT_TYPE_UNKNOWN`, `WINDOW_TOO_LONG`.
    """
    start, end = window(search.start, search.end, now)
    looking = Looking(fetch, directory, search, now, Free(now, start, end), mirror, about)
    free = looking.free
    if not await looking.begin() or end <= start:
        return free
    edge = await looking.kept(start, end)
    for rank, seats in looking.tiers():
        if after is not None and rank < after.rank:
            continue
        passed = after.slot if after is not None and rank == after.rank else None
        begin = max(start, passed.start) if passed is not None else start
        for first, last in looking.looks(begin, edge, end):
            if len(free.found) >= count:
                return free
            found = await looking.free_starts(seats, first, last, edge)
            fresh = (slot for slot in found if passed is None or slot > passed)
            for slot in islice(fresh, count - len(free.found)):
                free.found.append(Found(rank, slot))
                if search.held_back and looking.is_held(slot):
                    free.held.add(slot)
    return free


async def counts(
    fetch: Fetch,
    directory: Directory,
    search: Search,
    now: int,
    *,
    mirror: Mirror | None = None,
    about: "About | None" = None,
) -> tuple[Free, list[tuple[str, int, int, int]]]:
    """(clinic, ordinal of the local day, how many slots are free, the first) in any order. Raises as `find` does."""
    start, end = window(search.start, search.end, now)
    looking = Looking(fetch, directory, search, now, Free(now, start, end), mirror, about)
    if not await looking.begin() or end <= start:
        return looking.free, []
    edge = await looking.kept(start, end)
    near = await looking.counted(looking.seats, start, edge, edge) if start < edge else []
    if edge >= end:
        return looking.free, near
    days: dict[tuple[str, int], tuple[int, int]] = {}
    for clinic_id, day, count, at in [*near, *await looking.counted(looking.seats, edge, end, edge)]:
        before = days.get((clinic_id, day))  # a local day that lies on both sides of the edge
        days[clinic_id, day] = (count, at) if before is None else (before[0] + count, min(before[1], at))
    return looking.free, [(*key, *counted) for key, counted in days.items()]


class About(NamedTuple):
    """What a search must know beside the calendar of those who may be seen."""

    established: bool = False
    """The patient had a visit of the visit type's specialty in the last years."""
    busy: Sequence[Interval] = ()
    """When the patient is elsewhere."""
    started: Sequence[Sequence[Any]] = ()
    """Visits that may count against quotas: as `booking.STARTED` has them, without the id."""


async def about(
    fetch: Fetch,
    directory: Directory,
    tenant_id: str,
    visit_type_id: str,
    window: Interval,
    sight: Sight | None,
    clinic_ids: Sequence[str],
) -> About | None:
    """In one statement; None, and no statement, where there is no patient and nothing is limited. Raises what `sight` does."""
    limited = sorted(
        {
            one.practitioner_id
            for one in directory.seats
            if one.limited and (not clinic_ids or one.clinic_id in clinic_ids)
        }
    )
    if sight is None and not limited:
        return None
    first, last = window
    values = {
        "tenant": tenant_id,
        "patient": None,
        **(sight.values if sight is not None else {}),
        "visit_type": visit_type_id,
        "practitioners": limited,
        "first_time": datetime.fromtimestamp(first - 2 * DAY, UTC),
        "last_time": datetime.fromtimestamp(last + 2 * DAY, UTC),
        "first": max(first - DAY, 0),
        "last": max(last, first) + DAY,  # a window that is over ends before it begins
    }
    ((seen, established, busy, started),) = await fetch(_about(sight.condition if sight is not None else None), values)
    if sight is not None:
        sight.check(seen)
    return About(established, [(one, other) for one, other in orjson.loads(busy)], orjson.loads(started))


class Looking:
    """One search under way: who comes into question, and what limits when their visits may start."""

    def __init__(
        self,
        fetch: Fetch,
        directory: Directory,
        search: Search,
        now: int,
        free: Free,
        mirror: Mirror | None = None,
        about: About | None = None,
    ) -> None:
        self._fetch, self._directory, self.search, self._now, self.free = fetch, directory, search, now, free
        self._mirror, self._about = mirror, about
        self._entries: dict[str, Entry] = {}
        self._taken: dict[Interval, dict[str, list[Interval]]] = {}
        self.visit_type: VisitType = directory.visit_type(search.visit_type_id)
        self.seats: list[Seat] = []
        self._new_patient: bool | None = None
        self._full: dict[tuple[str, str], list[Interval]] = {}
        self._needs = self.visit_type.needs(search.interpreter_language)
        self._rooms: dict[str, list[list[availability.Resource]]] = {}

    async def begin(self) -> bool:
        """Who comes into question; whether anybody does for this patient."""
        search, visit_type = self.search, self.visit_type
        if not visit_type.active or (search.modalities and visit_type.modality not in search.modalities):
            return False
        self.seats = self._who_fits()
        places = self._directory.clinics
        self.free.zones = {
            clinic_id: places[clinic_id].time_zone for clinic_id in {one.clinic_id for one in self.seats}
        }
        if search.patient_id and (
            (visit_type.eligibility or {}).get("patients") or any(one.limited for one in self.seats)
        ):
            specialty = (visit_type.specialty or {}).get("code")
            values = {"tenant": search.tenant_id, "patient": search.patient_id, "specialty": specialty}
            if self._about is not None:
                established = self._about.established
            else:
                ((established,),) = await self._fetch(_ESTABLISHED, values)
            self._new_patient = not established
        if search.patient_id:
            self.free.ineligible = self._refusals()
        if search.self_service and (visit_type.self_booking or {}).get("staff_only"):
            self.free.ineligible.append("SELF_SERVICE")
        return bool(self.seats) and not self.free.ineligible

    def _refusals(self) -> list[str]:
        rule = self.visit_type.eligibility or {}
        if self._new_patient is None:
            rule = {name: value for name, value in rule.items() if name != "patients"}
        search = self.search
        against = eligibility.refusals(
            rule,
            search.facts,
            new_patient=bool(self._new_patient),
            referral=search.referral,
            payer=search.payer,
        )
        first, last = eligibility.age_days(rule, search.facts.birth_date)
        begin, end = (datetime.fromtimestamp(at, UTC).date() for at in (self.free.start, self.free.end))
        if first > end + timedelta(days=1) or last < begin - timedelta(days=1):
            against.append("AGE")
        return against

    def _who_fits(self) -> list[Seat]:
        search = self.search
        wished = (search.languages, search.genders, search.specialties, search.licensed_state, search.near)
        if any(wished) or (self.visit_type.licence_required and search.facts.state):
            return [seat for seat in self._directory.seats if self._fits(seat)]
        # Whoever asks for the same clinics and people finds the same ones, while the directory stays.
        key = (search.visit_type_id, frozenset(search.clinic_ids), frozenset(search.practitioner_ids))
        found = self._directory.fitting.get(key)
        if found is None:
            if len(self._directory.fitting) > _FITTING_AT_MOST:
                self._directory.fitting.clear()
            found = self._directory.fitting[key] = [seat for seat in self._directory.seats if self._fits(seat)]
        return found

    def _fits(self, seat: Seat) -> bool:
        search, who = self.search, seat.practitioner
        if search.clinic_ids and seat.clinic_id not in search.clinic_ids:
            return False
        if search.practitioner_ids and seat.practitioner_id not in search.practitioner_ids:
            return False
        if search.languages and not any(speaks(who.languages or (), one) for one in search.languages):
            return False
        if search.genders and who.gender not in search.genders:
            return False
        states = {search.licensed_state} - {""}
        if self.visit_type.licence_required and self.visit_type.remote and search.facts.state:
            states.add(search.facts.state)
        if not states <= set(who.licensed_states or ()):
            return False
        return self._is_near(self._directory.clinics[seat.clinic_id]) and bool(self._in_force(seat))

    def _in_force(self, seat: Seat) -> list[Interval]:
        """When the roles are in force that the visit type asks for, and one of those that are wished for."""
        asked = (self.visit_type.specialty or {}).get("code")
        ranges = self._directory.in_force(seat, frozenset({asked} if asked else ()))
        if self.search.specialties:
            ranges = intersect(ranges, self._directory.in_force(seat, frozenset(self.search.specialties)))
        return ranges

    def _is_near(self, clinic: Place) -> bool:
        if self.search.near is None:
            return True
        if clinic.position is None:
            return False
        if clinic.id not in self.free.distances:
            self.free.distances[clinic.id] = kilometres(clinic.position, self.search.near[:2])
        return self.free.distances[clinic.id] <= self.search.near[2]

    def tiers(self) -> list[tuple[int, list[Seat]]]:
        """Who is preferred first. Pages go on by rank and slot."""
        own, team = self.search.own_practitioner_id, set(self.search.team_practitioner_ids)
        tiers: tuple[list[Seat], ...] = ([], [], [])
        for seat in self.seats:
            tiers[0 if seat.practitioner_id == own else 1 if seat.practitioner_id in team else 2].append(seat)
        return [(rank, seats) for rank, seats in enumerate(tiers) if seats]

    async def kept(self, start: int, end: int) -> int:
        """Up to where in a window the mirror answers; `start` where it doesn't at all."""
        mirror = self._mirror
        if mirror is None or start >= mirror.edge or self._reach > DAY:
            return start
        who = self.who(self.seats) - {self.search.patient_id}
        if not await mirror.keep(self._fetch, self.search.tenant_id, who):
            return start
        # As they are from now on, whatever the mirror puts in their place while this waits for something.
        self._entries = {one: mirror[one] for one in who}
        return min(mirror.edge, end)

    def looks(self, begin: int, edge: int, end: int) -> Iterator[Interval]:
        """Windows to look at one after the other."""
        if begin < edge:
            yield begin, edge
            if edge < end:
                yield edge, end
        elif begin < end:  # each is a statement
            many = 2 if self._mirror is None else 1 if self._about is None else 0
            yield from _looks(begin, end, len(self.seats), many)

    async def free_starts(self, seats: Sequence[Seat], first: int, last: int, edge: int) -> Iterable[Slot]:
        """Free starts of a window that lies on one side of the edge, earliest first."""
        if last <= edge and self._plain(seats):
            return self._earliest([(seat, self._all_starts(seat)) for seat in seats], first, last)
        await self.limit(seats, first, last)
        busy = await self._busy(seats, first, last, edge)
        return earliest_first(
            *(
                free_starts(*one, clinic_id=clinic_id, **how)  # type: ignore[arg-type]
                for clinic_id, one, how in self.at(seats, busy, first, last)
            )
        )

    async def counted(self, seats: Sequence[Seat], first: int, last: int, edge: int) -> list[tuple[str, int, int, int]]:
        """(clinic, ordinal of the local day, how many, the first) of such a window, a day once or several times."""
        if last <= edge and self._plain(seats) and not self._elsewhere:
            return self._counted(seats, self._earliest_start(first), last)
        await self.limit(seats, first, last)
        busy = await self._busy(seats, first, last, edge)
        return [
            (clinic_id, day, count, at)
            for clinic_id, one, how in self.at(seats, busy, first, last)
            for day, (count, at) in count_by_day(*one, **how).items()  # type: ignore[arg-type]
        ]

    def _counted(self, seats: Sequence[Seat], first: int, last: int) -> list[tuple[str, int, int, int]]:
        by_clinic: dict[str, list[Starts]] = {}
        for seat in seats:
            by_clinic.setdefault(seat.clinic_id, []).append(self._all_starts(seat))
        kept, found = self._directory.days, []
        for clinic_id, here in by_clinic.items():
            key = (clinic_id, self.visit_type.id)
            known = kept.get(key)
            if known is None or known[0] != here:  # the very same lists, or somebody's calendar has changed
                if len(kept) > _STARTS_AT_MOST:
                    kept.clear()
                known = kept[key] = here, by_day(here)
            for day, count, begin, end in known[1]:
                if begin >= first and end < last:
                    found.append((clinic_id, day, count, begin))
                elif begin < last and end >= first:  # the window begins or ends within it
                    parts = [one.of_day(day, first, last) for one in here]
                    if any(count for count, _ in parts):
                        at = min(at for count, at in parts if count)
                        found.append((clinic_id, day, sum(count for count, _ in parts), at))
        return found

    def _plain(self, seats: Sequence[Seat]) -> bool:
        """Whether what is free of each is the same for all who search: nothing else takes part, no wish, no rule."""
        search = self.search
        plain = not (self._needs or search.wanted or search.specialties or search.self_service)
        plain = plain and not (search.patient_id and self.visit_type.eligibility)
        return plain and not any(seat.limited or seat.held_back for seat in seats)

    def _earliest_start(self, first: int) -> int:
        return max(first, self._now + 60 * self.visit_type.asks.minimum_notice)

    def _all_starts(self, seat: Seat) -> Starts:
        """All starts of a seat that the mirror knows, worked out when they are first asked for after a change."""
        assert self._mirror is not None
        mirror, entry = self._mirror, self._entries[seat.practitioner_id]
        key = (seat.practitioner_id, seat.clinic_id, self.visit_type.id)
        found = self._directory.starts.get(key)
        if found is not None and found.holds(entry, mirror.now):
            return found
        if len(self._directory.starts) > _STARTS_AT_MOST:
            self._directory.starts.clear()
        clinic = self._directory.clinics[seat.clinic_id]
        first, last = entry.first + DAY // 2, entry.last - DAY
        begin, end = (datetime.fromtimestamp(at, UTC).date() for at in (first, last))
        at, days = all_starts(
            availability.Resource(
                seat.practitioner_id,
                seat.weekly,
                seat.exceptions,
                entry.busy(mirror.now, entry.first, entry.last),
                self._starts(seat, clinic),
            ),
            self.visit_type.asks,
            zone=clinic.zone,
            window_start=first,
            window_end=last,
            closed_days=clinic.closed_days(begin - timedelta(days=2), end + timedelta(days=2)),
        )
        found = self._directory.starts[key] = Starts(entry, mirror.now, at, days)
        return found

    def _earliest(self, found: Sequence[tuple[Seat, Starts]], first: int, last: int) -> Iterator[Slot]:
        first, duration, elsewhere = self._earliest_start(first), 60 * self.visit_type.asks.duration, self._elsewhere
        heads = []
        for seat, starts in found:
            all_ = starts.at
            place = bisect_left(all_, first)
            if place < len(all_) and all_[place] < last:
                heads.append((all_[place], seat.clinic_id, seat.practitioner_id, place, all_))
        heapify(heads)
        while heads:
            at, clinic_id, practitioner_id, place, all_ = heads[0]
            place += 1
            if place < len(all_) and all_[place] < last:
                heapreplace(heads, (all_[place], clinic_id, practitioner_id, place, all_))
            else:
                heappop(heads)
            if not any(begin < at + duration and at < end for begin, end in elsewhere):
                yield Slot(at, clinic_id, practitioner_id, at + duration, ())

    @property
    def _elsewhere(self) -> Sequence[Interval]:
        return self._about.busy if self._about is not None else ()

    async def _busy(self, seats: Sequence[Seat], first: int, last: int, edge: int) -> Mapping[str, Sequence[Interval]]:
        """What stands in a window, by whom."""
        if last > edge or self._mirror is None:
            if (first, last) not in self._taken:  # one statement, whoever is preferred
                self._taken[first, last] = await self.taken(self.seats, first, last)
            return self._taken[first, last]
        reach, mirror = self._reach, self._mirror
        found: dict[str, Sequence[Interval]] = {
            one: self._entries[one].busy(mirror.now, first - reach, last + reach)
            for one in self.who(seats) - {self.search.patient_id}
        }
        if self.search.patient_id:
            found[self.search.patient_id] = self._elsewhere
        return found

    async def limit(self, seats: Sequence[Seat], first: int, last: int) -> None:
        """Find the occurrences of blocks whose quotas are reached."""
        limited = [seat for seat in seats if seat.limited]
        if not limited:
            return
        rows = self._about.started if self._about is not None else await self._started(limited, first, last)
        started: dict[tuple[str, str], list[tuple[int, str, bool]]] = {}
        for clinic_id, practitioner_id, visit_type_id, new_patient, start in rows:
            started.setdefault((practitioner_id, clinic_id), []).append((int(start), visit_type_id, bool(new_patient)))
        for seat in limited:
            key = (seat.practitioner_id, seat.clinic_id)
            zone = self._directory.clinics[seat.clinic_id].zone
            self._full[key] = [
                (begin, end)
                for block in seat.weekly
                if block.quotas and block.takes(self.visit_type.id)
                for begin, end in occurrences(block, zone, first, last)
                if any(
                    quota.counts(self.visit_type.id, bool(self._new_patient))
                    and quota.at_most
                    <= sum(begin <= at < end and quota.counts(kind, new) for at, kind, new in started.get(key, ()))
                    for quota in block.quotas
                )
            ]

    async def _started(self, limited: Sequence[Seat], first: int, last: int) -> list[Sequence[Any]]:
        rows = await self._fetch(
            STARTED,
            {
                "tenant": self.search.tenant_id,
                "practitioners": sorted({seat.practitioner_id for seat in limited}),
                "first": datetime.fromtimestamp(first - 2 * DAY, UTC),
                "last": datetime.fromtimestamp(last + 2 * DAY, UTC),
            },
        )
        return [
            (str(clinic_id), str(practitioner_id), str(visit_type_id), new_patient, start_time.timestamp())
            for _, clinic_id, practitioner_id, visit_type_id, new_patient, start_time in rows
        ]

    @property
    def _reach(self) -> int:
        kind = self.visit_type
        return 60 * (kind.duration_minutes + (kind.buffer_before_minutes or 0) + (kind.buffer_after_minutes or 0))

    async def taken(self, seats: Sequence[Seat], first: int, last: int) -> dict[str, list[Interval]]:
        """What stands in a window, by whom, in any lane. An expired hold doesn't: whoever books takes it over."""
        reach = self._reach
        return await taken(self._fetch, self.search.tenant_id, self.who(seats), first - reach, last + reach)

    def who(self, seats: Sequence[Seat]) -> set[str]:
        """Who and what may take part, the patient too."""
        who = {seat.practitioner_id for seat in seats}
        for clinic_id in {seat.clinic_id for seat in seats}:
            who.update(room.id for room in self._directory.rooms.get(clinic_id, ()) if self._serves(room))
        if self.search.patient_id:
            who.add(self.search.patient_id)
        return who

    def _serves(self, room: Room) -> bool:
        return any(need.met_by(room.id, room.kind, room.languages) for need in self._needs)

    def at(
        self, seats: Sequence[Seat], busy: Mapping[str, Sequence[Interval]], first: int, last: int
    ) -> Iterator[tuple[str, tuple[object, ...], dict[str, object]]]:
        """For each clinic what `free_starts` and `count_by_day` are asked with in a window."""
        search = self.search
        days = [datetime.fromtimestamp(at, UTC).date() for at in (first, last)]
        by_clinic: dict[str, list[Seat]] = {}
        for seat in seats:
            by_clinic.setdefault(seat.clinic_id, []).append(seat)
        for clinic_id, here in by_clinic.items():
            clinic = self._directory.clinics[clinic_id]
            who = [
                availability.Resource(
                    seat.practitioner_id,
                    seat.public if search.self_service else seat.weekly,
                    seat.exceptions,
                    busy.get(seat.practitioner_id, ()),
                    self._starts(seat, clinic),
                )
                for seat in here
            ]
            rooms = {
                room.id: availability.Resource(room.id, room.hours, room.exceptions, busy.get(room.id, ()))
                for room in self._directory.rooms.get(clinic_id, ())
                if self._needs and self._serves(room)
            }
            pools = [
                [
                    rooms[room.id]
                    for room in self._directory.rooms.get(clinic_id, ())
                    if need.met_by(room.id, room.kind, room.languages)
                ]
                for need in self._needs
            ]
            how = {
                "zone": clinic.zone,
                "window_start": first,
                "window_end": last,
                "now": self._now,
                "closed_days": clinic.closed_days(days[0] - timedelta(days=2), days[1] + timedelta(days=2)),
                "wanted": search.wanted,
                "patient_occupied": busy.get(search.patient_id, ()),
                "held_back": search.held_back,
            }
            yield clinic_id, (who, pools, self.visit_type.asks), how

    def _starts(self, seat: Seat, clinic: Place) -> list[Interval] | None:
        """When visits may start: while the role is in force and the patient of the age, save where quotas are reached."""
        starts = self._in_force(seat)
        if self.search.patient_id and self.visit_type.eligibility:
            first, last = eligibility.age_days(self.visit_type.eligibility, self.search.facts.birth_date)
            ages = (
                _ALWAYS[0] if first == date.min else int(at_local(first, time(0), clinic.time_zone).timestamp()),
                _ALWAYS[1]
                if last == date.max
                else int(at_local(last + timedelta(days=1), time(0), clinic.time_zone).timestamp()),
            )
            starts = intersect(starts, [ages])
        if self.search.self_service:
            until = (self.visit_type.self_booking or {}).get("until_minutes", 0)
            starts = intersect(starts, [(self._now + 60 * until, _ALWAYS[1])])
        full = self._full.get((seat.practitioner_id, seat.clinic_id))
        if full:
            starts = subtract(starts, full)
        return None if starts == [_ALWAYS] else starts

    def is_held(self, slot: Slot) -> bool:
        """Whether a slot lies in a block that is held back now."""
        zone = self._directory.clinics[slot.clinic_id].zone
        return any(
            begin - 3600 * block.release_hours > self._now
            for seat in self.seats
            if (seat.practitioner_id, seat.clinic_id) == (slot.practitioner_id, slot.clinic_id)
            for block in seat.weekly
            if block.release_hours and block.takes(self.visit_type.id)
            for begin, _ in occurrences(block, zone, slot.start, slot.end)
        )


def _looks(start: int, end: int, people: int, at_most: int) -> Iterator[Interval]:
    """Windows to look at one after the other, so many and the rest: most pages are full within the first, and the others
    are never read.
    """
    first = start
    for days in ((1, 4) if people >= _MANY else (3,))[:at_most]:
        last = min(start + days * DAY, end)
        if first < last:
            yield first, last
        first = max(first, last)
    if first < end:
        yield first, end


async def taken(fetch: Fetch, tenant_id: str, ref_ids: set[str], first: int, last: int) -> dict[str, list[Interval]]:
    """What stands between two instants, by whom, in any lane; expired holds don't stand.

    Raises Invalid `SEARCH_TOO_WIDE`: what isn't read must not look free.
    """
    values = {"tenant": tenant_id, "refs": sorted(ref_ids), "first": max(first, 0), "last": last}
    found: dict[object, list[Interval]] = {}
    rows = await fetch(_TAKEN, values)
    if len(rows) >= _ROWS_AT_MOST:
        raise Invalid(
            "SEARCH_TOO_WIDE", "Too much stands in this window; name fewer clinics or days.", field="end_time"
        )
    for ref_id, begin, end in rows:
        found.setdefault(ref_id, []).append((begin, end))
    return {str(ref_id): rows for ref_id, rows in found.items()}


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
_ABOUT = f"""
SELECT {{sight}} AS in_sight,
       {ESTABLISHED.format(specialty="kind.code")} AS established,
       (SELECT coalesce(jsonb_agg(jsonb_build_array(lower(o.during) - {_BEGIN}, upper(o.during) - {_BEGIN})), '[]')
          FROM bookable b CROSS JOIN generate_series(0, {LANES - 1}) AS lane(n)
          CROSS JOIN LATERAL (
            SELECT during FROM occupancy WHERE during && int8range({_BEGIN} + :first, {_BEGIN} + :last)
               AND (expire_time IS NULL OR expire_time > clock_timestamp()) OFFSET 0) o
         WHERE b.tenant_id = :tenant AND b.ref_id = :patient)::text AS busy,
       (SELECT coalesce(jsonb_agg(jsonb_build_array(
                 clinic_id, practitioner_id, visit_type_id, new_patient, extract(epoch FROM start_time))), '[]')
          FROM appointment WHERE {STARTED_WHERE.replace(":first", ":first_time").replace(":last", ":last_time")}
       )::text AS started
  FROM (SELECT (SELECT specialty->>'code' FROM visit_type WHERE tenant_id = :tenant AND id = :visit_type) AS code) kind
"""


@cache
def _about(sight: TextClause | None) -> TextClause:
    """The statement of `about`, under a condition on whether the patient may be seen."""
    statement = text(_ABOUT.replace("{sight}", sight.text if sight is not None else "true"))
    return statement.bindparams(*(sight._bindparams.values() if sight is not None else ())).bindparams(
        *(bindparam(name, type_=Uuid(as_uuid=False)) for name in ("tenant", "patient", "visit_type")),
        bindparam("practitioners", type_=ARRAY(Uuid(as_uuid=False))),
        *(bindparam(name, type_=DateTime(timezone=True)) for name in ("first_time", "last_time")),
        *(bindparam(name, type_=BigInteger) for name in ("first", "last")),
    )


_ESTABLISHED = text(f"SELECT {ESTABLISHED.format(specialty='(:specialty)::text')} AS established").bindparams(
    bindparam("tenant", type_=Uuid(as_uuid=False)), bindparam("patient", type_=Uuid(as_uuid=False))
).columns(established=Boolean)  # fmt: skip

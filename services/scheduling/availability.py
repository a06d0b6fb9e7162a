"""Free starts by interval algebra over local weekly hours, exceptions and occupancy, in whole epoch seconds.

Intervals are half-open `(start, end)` pairs of UTC epoch seconds. The rules, each said once here:

* **Wall time.** Hours and exceptions are local wall time and each end is converted by itself. A local time that a clock
  change skips moves forward by the gap (02:30 is 03:30 that day); one that occurs twice means the first.
* **What is open.** (weekly hours - the clinic's closed days, midnight to midnight) + `extra` exceptions - `closed`
  exceptions: extra hours open even a closed day, and leave wins over everything. Blocks that touch are one.
* **Starts** are the instants at which the local clock shows a multiple of the visit type's grid since local midnight,
  so that starts line up across practitioners and stay on the grid when hours change. In a repeated hour only the first
  showing counts: nobody can tell two 01:30s apart.
* **Hours bind the visit, occupancy binds its buffers too**: `[start, end)` lies within the open hours of the practitioner
  and of every resource taken; `[start - before, end + after)` meets no occupancy of theirs. Rows of occupancy hold
  their own buffers. For the patient only `[start, end)` counts.
* **Held-back blocks** open so many hours before the block begins, all of the block at once.
"""

import heapq
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time
from functools import lru_cache
from itertools import pairwise
from typing import Literal, NamedTuple
from zoneinfo import ZoneInfo

Interval = tuple[int, int]

DAY = 86_400
_EPOCH = date(1970, 1, 1).toordinal()
_FOREVER = 1 << 62
_PROBE = 6 * 3600


class Quota(NamedTuple):
    """At most so many visits may start in one occurrence of a block: of these types (empty: all), or of new patients."""

    at_most: int
    visit_type_ids: frozenset[str] = frozenset()
    new_patients: bool = False

    def counts(self, visit_type_id: str, new_patient: bool) -> bool:
        """Whether a visit is one of those that it limits."""
        return (new_patient or not self.new_patients) and (
            not self.visit_type_ids or visit_type_id in self.visit_type_ids
        )


@dataclass(frozen=True, slots=True)
class WeeklyHours:
    """One block of each week in local wall time.

    `weekday` is 0 for Monday to 6 for Sunday and names the day on which the block begins; `end <= start` ends on the next
    day (00:00 to 00:00 is the whole day). `visit_type_ids` empty allows every visit type. The validity bounds are
    both inclusive and judged on the day on which the block begins. `release_hours` is how long before it begins a block
    that is held back opens; 0 for one that isn't.
    """

    weekday: int
    start: time
    end: time
    visit_type_ids: frozenset[str] = frozenset()
    valid_from: date | None = None
    valid_until: date | None = None
    release_hours: int = 0
    staff_only: bool = False
    quotas: tuple[Quota, ...] = ()

    def takes(self, visit_type_id: str | None) -> bool:
        """Whether such visits may be in it."""
        return visit_type_id is None or not self.visit_type_ids or visit_type_id in self.visit_type_ids


@dataclass(frozen=True, slots=True)
class DateException:
    """A change to one local date: `closed` takes time away, `extra` adds some.

    Without start and end it is the whole local day; `end <= start` ends on the next day.
    """

    date: date
    kind: Literal["closed", "extra"]
    start: time | None = None
    end: time | None = None


@dataclass(frozen=True, slots=True)
class VisitType:
    """What a visit asks of the calendar; all figures in minutes."""

    id: str
    duration: int
    buffer_before: int = 0
    buffer_after: int = 0
    grid: int = 15
    minimum_notice: int = 0

    def __post_init__(self) -> None:
        if self.duration < 1 or not 1 <= self.grid <= 1440:
            raise ValueError("duration must be at least one minute, the grid between 1 and 1440 minutes")
        if min(self.buffer_before, self.buffer_after, self.minimum_notice) < 0:
            raise ValueError("buffers and minimum notice must not be negative")


@dataclass(frozen=True, slots=True)
class Resource:
    """A practitioner, room or device: its hours, exceptions and taken ranges (all lanes, in any order).

    `hours` None means always open, save for its own `closed` exceptions; the clinic's closed days do not touch it.
    `starts` are the ranges in which a visit may start at all, ascending and disjoint; None for any time.
    """

    id: str
    hours: Sequence[WeeklyHours] | None = None
    exceptions: Sequence[DateException] = ()
    occupied: Sequence[Interval] = ()
    starts: Sequence[Interval] | None = None


class Slot(NamedTuple):
    """A free start; compares by (start, clinic, practitioner), the key by which pages go on."""

    start: int
    clinic_id: str
    practitioner_id: str
    end: int
    resource_ids: tuple[str, ...]


# --- algebra ---------------------------------------------------------------------------------------------------------


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Sorted, disjoint, not touching; empty ones dropped."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def subtract(intervals: Iterable[Interval], taken: Iterable[Interval]) -> list[Interval]:
    """What of `intervals` is not in `taken`, merged."""
    rest: list[Interval] = []
    cuts = merge(taken)
    first = 0
    for start, end in merge(intervals):
        while first < len(cuts) and cuts[first][1] <= start:
            first += 1
        at = first
        while at < len(cuts) and cuts[at][0] < end:
            if cuts[at][0] > start:
                rest.append((start, cuts[at][0]))
            start = cuts[at][1]
            at += 1
        if start < end:
            rest.append((start, end))
    return rest


def intersect(one: Iterable[Interval], other: Iterable[Interval]) -> list[Interval]:
    """What lies in both, merged."""
    return list(_both(iter(merge(one)), iter(merge(other))))


def _both(one: Iterator[Interval], other: Iterator[Interval]) -> Iterator[Interval]:
    """Intersection of two ascending disjoint streams, as lazily as they come."""
    a, b = next(one, None), next(other, None)
    while a and b:
        start, end = max(a[0], b[0]), min(a[1], b[1])
        if start < end:
            yield start, end
        if a[1] <= b[1]:
            a = next(one, None)
        else:
            b = next(other, None)


# --- local time ------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=2048)
def _offsets(zone: ZoneInfo, year: int) -> tuple[Interval, ...]:
    """(instant, UTC offset from then on in seconds) for one UTC year, the year's first second first."""

    def offset(at: int) -> int:
        delta = datetime.fromtimestamp(at, zone).utcoffset()
        return 0 if delta is None else round(delta.total_seconds())

    begin = round(datetime(year, 1, 1, tzinfo=UTC).timestamp())
    end = round(datetime(year + 1, 1, 1, tzinfo=UTC).timestamp())
    changes = [(begin, offset(begin))]
    for low, high in pairwise([*range(begin, end, _PROBE), end]):
        if offset(high) == changes[-1][1]:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            if offset(middle) == changes[-1][1]:
                low = middle
            else:
                high = middle
        changes.append((high, offset(high)))
    return tuple(changes)


class LocalClock:
    """One zone's wall clock over a window, in integers; right for instants within two days of the window."""

    __slots__ = ("_changes", "_grid_spans")

    def __init__(self, zone: ZoneInfo, window_start: int, window_end: int) -> None:
        first, last = window_start - 4 * DAY, window_end + 4 * DAY
        years = range(datetime.fromtimestamp(first, UTC).year, datetime.fromtimestamp(last, UTC).year + 1)
        changes = [change for year in years for change in _offsets(zone, year) if change[0] <= last]
        while len(changes) > 1 and changes[1][0] <= first:
            del changes[0]
        self._changes = [changes[0], *(after for before, after in pairwise(changes) if before[1] != after[1])]
        spans: list[tuple[int, int, int]] = []
        for number, (at, offset) in enumerate(self._changes):
            end = self._changes[number + 1][0] if number + 1 < len(self._changes) else _FOREVER
            repeated = max(0, self._changes[number - 1][1] - offset) if number else 0
            spans.append((at + repeated if number else -_FOREVER, end, offset))
        self._grid_spans = spans

    def day(self, at: int) -> int:
        """The proleptic ordinal of the local date at an instant."""
        offset = self._changes[max(0, bisect_right(self._changes, (at, _FOREVER)) - 1)][1]
        return (at + offset) // DAY + _EPOCH

    def instant(self, day: int, seconds: int) -> int:
        """The instant of a wall time, given as date ordinal and seconds since midnight (a day or more is a later date)."""
        local = (day - _EPOCH) * DAY + seconds
        at = local - self._changes[0][1]
        for change, offset in self._changes[1:]:
            if at < change:
                break
            later = local - offset
            if later < change:  # skipped by the clock: the offset before the change moves it forward by the gap
                break
            at = later
        return at

    def grid(self, start: int, end: int, step: int) -> Iterator[int]:
        """The instants in `[start, end)` at which the clock shows, for the first time, a multiple of `step` seconds."""
        for span_start, span_end, offset in self._grid_spans:
            if span_end <= start:
                continue
            if span_start >= end:
                return
            stop = min(end, span_end)
            at = _round_up(max(start, span_start) + offset, step) - offset
            while at < stop:
                yield at
                at = at + step if DAY % step == 0 else _round_up(at + offset + 1, step) - offset

    def days(self, start: int, end: int, step: int) -> Iterator[tuple[int, int, int]]:
        """What `grid` shows, counted: (ordinal of the local date, how many, the first) for each day, one or several times."""
        for span_start, span_end, offset in self._grid_spans:
            if span_end <= start:
                continue
            if span_start >= end:
                return
            stop = min(end, span_end)
            at = _round_up(max(start, span_start) + offset, step) - offset
            while at < stop:
                day = (at + offset) // DAY
                midnight = (day + 1) * DAY - offset
                yield day + _EPOCH, -((at - min(stop, midnight)) // step), at
                at = midnight


def _round_up(local: int, step: int) -> int:
    midnight = local - local % DAY
    return midnight + min(DAY, -((midnight - local) // step) * step)


# --- opening hours ---------------------------------------------------------------------------------------------------


def _seconds(start: time | None, end: time | None) -> Interval:
    """Seconds since midnight of both ends; more than a day when the block passes midnight."""
    first = 0 if start is None else start.hour * 3600 + start.minute * 60 + start.second
    last = DAY if end is None else end.hour * 3600 + end.minute * 60 + end.second
    return (first, last) if last > first else (first, last + DAY)


def _open(
    hours: Sequence[WeeklyHours] | None,
    exceptions: Sequence[DateException],
    closed_days: frozenset[date],
    clock: LocalClock,
    start: int,
    end: int,
    visit_type_id: str | None,
    now: int = _FOREVER,
) -> Iterator[Interval]:
    """The merged open intervals of `[start, end)`, computed a local day at a time as they are asked for."""
    if hours is None and not exceptions:
        if start < end:
            yield start, end
        return
    week: list[list[tuple[int, int, int, int, int]]] = [[] for _ in range(7)]
    for block in hours or ():
        if block.takes(visit_type_id):
            opens, closes, since, until = _bounds(block)
            held = now + 3600 * block.release_hours if block.release_hours else _FOREVER
            week[block.weekday].append((opens, closes, since, until, held))
    closed: dict[int, list[Interval]] = {}
    extra: dict[int, list[Interval]] = {}
    for exception in exceptions:
        by_day = closed if exception.kind == "closed" else extra
        by_day.setdefault(exception.date.toordinal(), []).append(_seconds(exception.start, exception.end))
    shut = {day.toordinal() for day in closed_days}

    carried: Interval | None = None
    first_day = clock.day(start)
    midnight = clock.instant(first_day, 0)
    # One more: a change that turns the clock back over midnight leaves `end` on a date that has begun before.
    for day in range(first_day, clock.day(end) + 2):
        next_midnight = clock.instant(day + 1, 0)
        low, high = max(start, midnight), min(end, next_midnight)
        parts: list[Interval] = []
        if hours is None:
            parts.append((low, high))
        elif day not in shut:
            for opens, closes, since, until, held in week[(day - 2) % 7]:  # yesterday's blocks that pass midnight
                if closes > DAY and since <= day - 1 <= until:
                    begins = clock.instant(day - 1, opens)
                    if begins <= held:
                        parts.append((begins, clock.instant(day - 1, closes)))
            for opens, closes, since, until, held in week[(day - 1) % 7]:
                if since <= day <= until:
                    begins = clock.instant(day, opens)
                    if begins <= held:
                        parts.append((begins, clock.instant(day, closes)))
        if extra:
            parts += _on(extra, day, clock)
        cut = _on(closed, day, clock) if closed else []
        parts = subtract(parts, cut) if cut else parts if len(parts) < 2 else merge(parts)
        for opened, shuts in parts:
            opened, shuts = max(opened, low), min(shuts, high)
            if shuts <= opened:
                continue
            if carried and opened <= carried[1]:
                carried = (carried[0], max(shuts, carried[1]))
            else:
                if carried:
                    yield carried
                carried = (opened, shuts)
        # An interval that ends before midnight can't grow any more: hand it out before the next day is computed.
        if carried and carried[1] < next_midnight:
            yield carried
            carried = None
        midnight = next_midnight
    if carried:
        yield carried


def _bounds(block: WeeklyHours) -> tuple[int, int, int, int]:
    """Seconds since midnight of both ends, and the ordinals of the first and last day on which it may begin."""
    since = block.valid_from.toordinal() if block.valid_from else 0
    until = block.valid_until.toordinal() if block.valid_until else _FOREVER
    return *_seconds(block.start, block.end), since, until


def _on(by_day: dict[int, list[Interval]], day: int, clock: LocalClock) -> list[Interval]:
    return [
        (clock.instant(begin, first), clock.instant(begin, last))
        for begin in (day - 1, day)
        for first, last in by_day.get(begin, ())
    ]


def open_intervals(
    hours: Sequence[WeeklyHours] | None,
    exceptions: Sequence[DateException],
    closed_days: frozenset[date],
    zone: ZoneInfo,
    window_start: int,
    window_end: int,
    visit_type_id: str | None = None,
    now: int = _FOREVER,
) -> list[Interval]:
    """What is open within the window, merged and clipped to it; only blocks that allow the visit type, if one is named.

    With `now`, blocks that are held back then are left out.
    """
    if window_end <= window_start:
        return []
    clock = LocalClock(zone, window_start, window_end)
    return list(_open(hours, exceptions, closed_days, clock, window_start, window_end, visit_type_id, now))


def occurrences(block: WeeklyHours, zone: ZoneInfo, window_start: int, window_end: int) -> list[Interval]:
    """Each time that a block comes round and touches the window, whole: not clipped, closed days and leave not taken off."""
    clock = LocalClock(zone, window_start, window_end)
    opens, closes, since, until = _bounds(block)
    found = []
    for day in range(clock.day(window_start) - 1, clock.day(window_end) + 2):
        if (day - 1) % 7 == block.weekday and since <= day <= until:
            begins, ends = clock.instant(day, opens), clock.instant(day, closes)
            if begins < window_end and ends > window_start and begins < ends:
                found.append((begins, ends))
    return found


# --- free starts -----------------------------------------------------------------------------------------------------


def _start_ranges(
    openings: Iterator[Interval], occupied: Sequence[Interval], duration: int, before: int, after: int
) -> Iterator[Interval]:
    """Half-open ranges of starts at which a visit lies within an opening and its buffered range meets no occupancy."""
    busy = sorted(occupied)
    first = 0
    for opened, shuts in openings:
        low, high = opened, shuts - duration + 1
        while first < len(busy) and busy[first][1] + before <= low:
            first += 1
        at = first
        while low < high and at < len(busy):
            taken_from, taken_until = busy[at]
            blocked_from, blocked_until = taken_from - duration - after + 1, taken_until + before
            if blocked_from >= high:
                break
            if blocked_until > low and taken_from < taken_until:
                if blocked_from > low:
                    yield low, blocked_from
                low = blocked_until
            at += 1
        if low < high:
            yield low, high


class _Ranges:
    """Ascending ranges pulled from their stream only as far as asked, and kept: rooms are shared by practitioners."""

    __slots__ = ("_found", "_starts", "_stream")

    def __init__(self, stream: Iterator[Interval]) -> None:
        self._stream = stream
        self._found: list[Interval] = []
        self._starts: list[int] = []

    def _pull(self) -> bool:
        item = next(self._stream, None)
        if item is None:
            return False
        self._found.append(item)
        self._starts.append(item[0])
        return True

    def __contains__(self, at: int) -> bool:
        while not self._found or self._found[-1][1] <= at:
            if not self._pull():
                break
        number = bisect_right(self._starts, at) - 1
        return number >= 0 and at < self._found[number][1]

    def __iter__(self) -> Iterator[Interval]:
        number = 0
        while number < len(self._found) or self._pull():
            yield self._found[number]
            number += 1


_Pools = Sequence[Sequence[tuple[str, _Ranges]]]


def _choose(pools: _Pools, at: int, practitioner_id: str) -> tuple[str, ...] | None:
    """One free resource of each pool, none twice, the pool's order preferred; None if there is no such choice."""
    if not pools:
        return ()
    if len(pools) == 1:
        for resource_id, ranges in pools[0]:
            if at in ranges and resource_id != practitioner_id:
                return (resource_id,)
        return None
    free = [[name for name, ranges in pool if at in ranges and name != practitioner_id] for pool in pools]
    return one_of_each(free)


def one_of_each(pools: Sequence[Sequence[str]]) -> tuple[str, ...] | None:
    """One of each pool, none twice, what stands first in a pool preferred; None where there is no such choice.

    By augmenting paths: tried one after the other, pools that share their members would take exponential time.
    """
    holder: dict[str, int] = {}

    def give(number: int, seen: set[str]) -> bool:
        for name in pools[number]:
            if name not in seen and name not in holder:
                holder[name] = number
                return True
        for name in pools[number]:
            if name not in seen:
                seen.add(name)
                if give(holder[name], seen):
                    holder[name] = number
                    return True
        return False

    if not all(give(number, set()) for number in range(len(pools))):
        return None
    chosen = {number: name for name, number in holder.items()}
    return tuple(chosen[number] for number in range(len(pools)))


def free_starts(
    practitioners: Sequence[Resource],
    requirements: Sequence[Sequence[Resource]],
    visit_type: VisitType,
    *,
    zone: ZoneInfo,
    window_start: int,
    window_end: int,
    now: int,
    closed_days: frozenset[date] = frozenset(),
    clinic_id: str = "",
    wanted: Sequence[WeeklyHours] = (),
    patient_occupied: Sequence[Interval] = (),
    held_back: bool = False,
) -> Iterator[Slot]:
    """Free starts at one clinic, earliest first, computed only as far as they are consumed.

    `requirements` is all-of, each a pool of candidates that is any-of; a resource serves one requirement at a time.
    `window_start <= slot.start < window_end`, and not before `now` + minimum notice. `wanted` are the patient's wishes
    as weekly local windows in which the whole visit must lie (empty: any time). `held_back` shows blocks that are held
    back as if they were open. To go on after a slot, pass its start as
    `window_start` and drop what is `<=` it.
    """
    found = _possible(
        practitioners,
        requirements,
        visit_type,
        zone=zone,
        window=(window_start, window_end),
        now=now,
        closed_days=closed_days,
        wanted=wanted,
        patient_occupied=patient_occupied,
        held_back=held_back,
    )
    if found is None:
        return iter(())
    clock, pools, possible = found
    duration, step = 60 * visit_type.duration, 60 * visit_type.grid

    def starts(practitioner_id: str, ranges: Iterator[Interval]) -> Iterator[Slot]:
        for low, high in ranges:
            for at in clock.grid(low, high, step):
                chosen = _choose(pools, at, practitioner_id)
                if chosen is not None:
                    yield Slot(at, clinic_id, practitioner_id, at + duration, chosen)

    return earliest_first(*(starts(practitioner_id, ranges) for practitioner_id, ranges in possible))


def count_by_day(
    practitioners: Sequence[Resource],
    requirements: Sequence[Sequence[Resource]],
    visit_type: VisitType,
    *,
    zone: ZoneInfo,
    window_start: int,
    window_end: int,
    now: int,
    closed_days: frozenset[date] = frozenset(),
    wanted: Sequence[WeeklyHours] = (),
    patient_occupied: Sequence[Interval] = (),
    held_back: bool = False,
) -> dict[int, tuple[int, int]]:
    """How many slots `free_starts` has on each local date, and the first of them, by the date's ordinal."""
    found = _possible(
        practitioners,
        requirements,
        visit_type,
        zone=zone,
        window=(window_start, window_end),
        now=now,
        closed_days=closed_days,
        wanted=wanted,
        patient_occupied=patient_occupied,
        held_back=held_back,
    )
    days: dict[int, tuple[int, int]] = {}
    if found is None:
        return days
    clock, pools, possible = found
    step = 60 * visit_type.grid
    for practitioner_id, ranges in possible:
        for low, high in ranges:
            if pools:
                grid = clock.grid(low, high, step)
                counted = [(clock.day(at), 1, at) for at in grid if _choose(pools, at, practitioner_id) is not None]
            else:
                counted = list(clock.days(low, high, step))
            for day, count, first in counted:
                before = days.get(day)
                days[day] = (count, first) if before is None else (before[0] + count, min(before[1], first))
    return days


def all_starts(
    practitioner: Resource,
    visit_type: VisitType,
    *,
    zone: ZoneInfo,
    window_start: int,
    window_end: int,
    closed_days: frozenset[date] = frozenset(),
) -> tuple[list[int], list[tuple[int, int]]]:
    """What `free_starts` has of one practitioner for a visit that needs nothing else, without regard to what time it is now.

    Answers the starts, and (ordinal of the local date, place of its first start) of each date that has some. Not for
    hours with blocks that are held back.
    """
    found = _possible(
        [practitioner],
        (),
        visit_type,
        zone=zone,
        window=(window_start, window_end),
        now=window_start - 60 * visit_type.minimum_notice,
        closed_days=closed_days,
        wanted=(),
        patient_occupied=(),
        held_back=False,
    )
    if found is None:
        return [], []
    clock, _, ((_, ranges),) = found
    step = 60 * visit_type.grid
    starts: list[int] = []
    days: list[tuple[int, int]] = []
    for low, high in ranges:
        for day, count, first in clock.days(low, high, step):
            if not days or days[-1][0] != day:
                days.append((day, len(starts)))
            starts.extend(range(first, first + count * step, step))
    return starts, days


_Possible = tuple[LocalClock, _Pools, list[tuple[str, Iterator[Interval]]]]


def _possible(
    practitioners: Sequence[Resource],
    requirements: Sequence[Sequence[Resource]],
    visit_type: VisitType,
    *,
    zone: ZoneInfo,
    window: Interval,
    now: int,
    closed_days: frozenset[date],
    wanted: Sequence[WeeklyHours],
    patient_occupied: Sequence[Interval],
    held_back: bool,
) -> _Possible | None:
    """The clock, what the pools offer, and each practitioner's ranges of starts; None where the window is over."""
    duration, before, after = (60 * m for m in (visit_type.duration, visit_type.buffer_before, visit_type.buffer_after))
    first = max(window[0], now + 60 * visit_type.minimum_notice)
    if first >= window[1]:
        return None
    last = window[1] + duration - 1  # a visit may end after the window, not start there
    clock = LocalClock(zone, first, last)

    def ranges(resource: Resource) -> Iterator[Interval]:
        opened = _open(
            resource.hours,
            resource.exceptions,
            closed_days,
            clock,
            first,
            last,
            visit_type.id,
            _FOREVER if held_back else now,
        )
        found = _start_ranges(opened, resource.occupied, duration, before, after)
        return found if resource.starts is None else _both(found, iter(resource.starts))

    rooms = {resource.id: _Ranges(ranges(resource)) for pool in requirements for resource in pool}
    pools = [[(resource.id, rooms[resource.id]) for resource in pool] for pool in requirements]
    limits: list[_Ranges] = []
    if wanted:
        wishes = _open(wanted, (), frozenset(), clock, first, last, None)
        limits.append(_Ranges(_start_ranges(wishes, (), duration, 0, 0)))
    if patient_occupied:
        limits.append(_Ranges(_start_ranges(iter([(first, last)]), patient_occupied, duration, 0, 0)))

    def limited(practitioner: Resource) -> Iterator[Interval]:
        found = ranges(practitioner)
        for limit in limits:
            found = _both(found, iter(limit))
        return found

    return clock, pools, [(practitioner.id, limited(practitioner)) for practitioner in practitioners]


def earliest_first(*iterators: Iterable[Slot]) -> Iterator[Slot]:
    """One ascending stream out of many (clinics, practitioners); each is consumed only one slot ahead."""
    return heapq.merge(*iterators)

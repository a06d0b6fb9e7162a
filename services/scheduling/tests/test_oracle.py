"""Availability against an oracle that walks minute by minute: it imports nothing of the service, and knows no rule of
time but how a clock in the zone reads at an instant.

Reported elsewhere, DST and zone of whom: hours are the clinic's wall time, on both days on which its clocks change, over
midnight, and where they never do. Reported elsewhere, buffers: before and after, each once, taken from what stands and never
shown. Reported elsewhere, multi-resource: one free of each pool, none twice.
"""

from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from itertools import product
from zoneinfo import ZoneInfo

from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduling.availability import (
    DateException,
    Resource,
    VisitType,
    WeeklyHours,
    count_by_day,
    free_starts,
    occurrences,
)

ZONES = (
    "America/New_York", "America/Phoenix", "Pacific/Honolulu", "Australia/Lord_Howe", "America/Sao_Paulo", "Europe/London",
)  # fmt: skip
CHANGING = ("America/New_York", "Australia/Lord_Howe", "Europe/London", "America/Santiago")
"""By an hour at two, by half an hour at two, by an hour at one, and by an hour at midnight, which there is not that day."""
MARGIN = 3 * 1440


def reads(zone: ZoneInfo, minute: int) -> datetime:
    """What a clock in the zone shows at a minute since 1970."""
    return datetime.fromtimestamp(60 * minute, UTC).astimezone(zone).replace(tzinfo=None, fold=0)


@cache
def change_days(name: str) -> list[date]:
    """Days from 2026 to 2030 that are shorter or longer than others; where there are none, some of all."""
    zone, found = ZoneInfo(name), []
    for day in range(round(datetime(2026, 1, 1, tzinfo=UTC).timestamp()) // 86400, 22279):
        before, after = reads(zone, day * 1440), reads(zone, day * 1440 + 1440)
        if after - before != timedelta(days=1):
            found.append(before.date())
    return found or [date(2026, 3, 8), date(2028, 2, 28), date(2030, 11, 3)]


class Oracle:
    """A walk over some days: which minute first shows what, and what is open and free in each."""

    def __init__(self, zone: ZoneInfo, day: date, days: int) -> None:
        around = round(datetime(day.year, day.month, day.day, tzinfo=UTC).timestamp()) // 60
        self.shows, self.first, self.at = [], {}, {}
        last = None
        for minute in range(around - 2 * MARGIN, around + 1440 * days + 2 * MARGIN):
            wall = reads(zone, minute)
            self.shows.append((minute, wall))
            self.at[minute] = wall
            if last is not None:
                skipped = last + timedelta(minutes=1)
                while skipped < wall:  # never shown: as far after the jump as it is after what was shown last
                    self.first.setdefault(skipped, minute + round((skipped - last).total_seconds()) // 60 - 1)
                    skipped += timedelta(minutes=1)
            self.first.setdefault(wall, minute)
            last = wall if last is None else max(last, wall)
        self.begin, self.end = (
            self.first[datetime.combine(day, time(0))],
            self.first[datetime.combine(day + timedelta(days), time(0))],
        )

    def between(self, day: date, start: time | None, end: time | None) -> range:
        opens = datetime.combine(day, start or time(0))
        shuts = datetime.combine(day, end or time(0))
        shuts += timedelta(days=1) if shuts <= opens else timedelta(0)
        return range(self.first[opens], self.first[shuts])

    def open(self, hours, exceptions, closed, days, now=None):
        minutes: set[int] = set()
        if hours is None:
            minutes.update(range(self.begin - MARGIN, self.end + MARGIN))
        for day in days:
            for block in hours or ():
                if block["weekday"] == day.weekday() and block["since"] <= day <= block["until"] and block["fits"]:
                    span = self.between(day, block["start"], block["end"])
                    if now is None or not block["held"] or (span and span[0] - 60 * block["held"] <= now):
                        minutes.update(span)
        if hours is not None:
            for day in closed:
                minutes.difference_update(self.between(day, None, None))
        for kind, change in (("extra", minutes.update), ("closed", minutes.difference_update)):
            for one in exceptions:
                if one["kind"] == kind:
                    change(self.between(one["date"], one["start"], one["end"]))
        return minutes


quarters = st.one_of(
    st.integers(0, 95),
    st.integers(0, 16),  # where clocks change
).map(lambda quarter: time(quarter // 4, quarter % 4 * 15))
nights = st.integers(0, 16).map(lambda quarter: time(quarter // 4, quarter % 4 * 15))


@st.composite
def blocks(draw: st.DrawFn, day: date, *, held: bool) -> dict:
    return {
        "weekday": (day.weekday() + draw(st.integers(-1, 2))) % 7, "start": draw(quarters), "end": draw(quarters),
        "since": draw(st.sampled_from([date.min, date.min, day + timedelta(1)])), "until": draw(st.sampled_from([date.max, date.max, day])),
        "fits": draw(st.sampled_from([True, True, False])), "held": draw(st.sampled_from([0, 0, 5, 30])) if held else 0,
    }  # fmt: skip


@st.composite
def changes(draw: st.DrawFn, day: date) -> dict:
    whole = draw(st.booleans())
    return {
        "date": day + timedelta(draw(st.integers(-1, 2))), "kind": draw(st.sampled_from(["closed", "extra"])),
        "start": None if whole else draw(quarters), "end": None if whole else draw(quarters),
    }  # fmt: skip


@st.composite
def members(draw: st.DrawFn, day: date, begin: int, *, held: bool) -> dict:
    return {
        "hours": draw(st.lists(blocks(day, held=held), min_size=1, max_size=4))
        if held or draw(st.booleans())
        else None,
        "exceptions": draw(st.lists(changes(day), max_size=2)),
        "taken": [
            (begin + start, begin + start + length)
            for start, length in draw(st.lists(st.tuples(st.integers(-60, 2900), st.integers(0, 300)), max_size=4))
        ],
    }


def resource(number: int, member: dict) -> Resource:
    hours = member["hours"] and [
        WeeklyHours(
            one["weekday"], one["start"], one["end"], frozenset() if one["fits"] else frozenset({"other"}),
            None if one["since"] == date.min else one["since"], None if one["until"] == date.max else one["until"], one["held"],
        )
        for one in member["hours"]
    ]  # fmt: skip
    exceptions = [DateException(one["date"], one["kind"], one["start"], one["end"]) for one in member["exceptions"]]
    return Resource(f"r{number}", hours, exceptions, [(60 * a, 60 * b) for a, b in member["taken"]])


@cache
def oracle(name: str, day: date) -> Oracle:
    return Oracle(ZoneInfo(name), day, 2)


@settings(max_examples=70, deadline=None)
@given(st.data())
def test_availability_equals_an_oracle_that_only_reads_the_clock_minute_by_minute(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(ZONES))
    day = data.draw(
        st.one_of(st.sampled_from(change_days(name)), st.sampled_from([date(2026, 7, 1), date(2029, 12, 31)]))
    )
    day -= timedelta(data.draw(st.integers(0, 1)))
    begin = oracle(name, day).begin
    doctors = data.draw(st.lists(members(day, begin, held=True), min_size=1, max_size=2))
    compare(data, name, day, doctors, begin + data.draw(st.integers(-2000, 600)))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_hours_that_begin_or_end_where_the_clock_changes_are_as_the_oracle_sees_them(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(CHANGING))
    changed = data.draw(st.sampled_from(change_days(name)))
    block = {
        "weekday": changed.weekday(), "start": data.draw(nights), "end": data.draw(st.one_of(nights, st.just(time(9)))),
        "since": date.min, "until": date.max, "fits": True, "held": 0,
    }  # fmt: skip
    doctor = {"hours": [block], "exceptions": data.draw(st.lists(changes(changed), max_size=1)), "taken": []}
    day = changed - timedelta(data.draw(st.integers(0, 1)))
    compare(data, name, day, [doctor], oracle(name, day).begin - 1440, plain=True)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_held_back_blocks_open_in_the_minute_in_which_the_oracle_releases_them(data: st.DataObject) -> None:
    """Now is right at, before or after the release of one of them; it begins by the clock, on change days too."""
    name = data.draw(st.sampled_from(CHANGING))
    changed = data.draw(st.sampled_from(change_days(name)))
    day = changed - timedelta(data.draw(st.integers(0, 1)))
    walk = oracle(name, day)
    held = data.draw(st.sampled_from([1, 5, 30]))
    # On the days of the window and on the one before, whose block may go on over midnight.
    on = day + timedelta(data.draw(st.integers(-1, 1)))
    block = {
        "weekday": on.weekday(), "start": data.draw(quarters), "end": data.draw(quarters),
        "since": date.min, "until": date.max, "fits": True, "held": held,
    }  # fmt: skip
    doctor = {
        "hours": [block, *data.draw(st.lists(blocks(day, held=True), max_size=1))], "exceptions": [], "taken": [],
    }  # fmt: skip
    released = walk.first[datetime.combine(on, block["start"])] - 60 * held
    compare(data, name, day, [doctor], released + data.draw(st.sampled_from([-61, -1, 0, 1, 59])), plain=True)


def compare(data: st.DataObject, name: str, day: date, doctors: list[dict], now: int, *, plain: bool = False) -> None:
    """What is found in two days from `day` on, against the oracle; `plain` for one who works without rooms or notice."""
    walk = oracle(name, day)
    begin, end = walk.begin, walk.end
    length, before, after = (
        data.draw(st.integers(5, 30 if plain else 90)),
        *data.draw(st.tuples(st.integers(0, 20), st.integers(0, 20))),
    )
    grid = data.draw(st.sampled_from([5, 15, 20, 50, 60]))
    notice, closed, rooms = 0, [], []
    if not plain:
        notice = data.draw(st.sampled_from([0, 45, 600]))
        closed = data.draw(st.sampled_from([[], [day], [day + timedelta(1)]]))
        rooms = data.draw(st.lists(members(day, begin, held=False), max_size=3))
    pools = (
        data.draw(st.lists(st.lists(st.integers(0, max(len(rooms) - 1, 0)), unique=True), max_size=2)) if rooms else []
    )
    everybody = [resource(number, one) for number, one in enumerate([*doctors, *rooms])]
    practitioners, things = everybody[: len(doctors)], everybody[len(doctors) :]
    asked = {
        "zone": ZoneInfo(name), "window_start": 60 * begin, "window_end": 60 * end, "now": 60 * now,
        "closed_days": frozenset(closed),
    }  # fmt: skip
    requirements = [[things[number] for number in pool] for pool in pools]
    visit = VisitType("v", length, before, after, grid, notice)
    shown = [
        (slot.start // 60, slot.practitioner_id) for slot in free_starts(practitioners, requirements, visit, **asked)
    ]

    days = [day + timedelta(n) for n in range(-3, 6)]
    opened = [walk.open(one["hours"], one["exceptions"], closed, days, now) for one in [*doctors, *rooms]]
    taken = [{minute for a, b in one["taken"] for minute in range(a, b)} for one in [*doctors, *rooms]]

    def free(who: int, minute: int) -> bool:
        visit_at, around = range(minute, minute + length), range(minute - before, minute + length + after)
        return all(one in opened[who] for one in visit_at) and not any(one in taken[who] for one in around)

    expected = []
    for minute in range(max(begin, now + notice), end):
        wall = walk.at[minute]
        if walk.first[wall] == minute and (60 * wall.hour + wall.minute) % grid == 0:
            choices = product(
                *([len(doctors) + number for number in pool if free(len(doctors) + number, minute)] for pool in pools)
            )
            if any(len(set(choice)) == len(pools) for choice in choices):
                expected += [(minute, f"r{number}") for number in range(len(doctors)) if free(number, minute)]
    assert shown == expected
    counted = count_by_day(practitioners, requirements, visit, **asked)
    by_day: dict[int, list[int]] = {}
    for minute, _ in expected:
        by_day.setdefault(walk.at[minute].toordinal(), []).append(60 * minute)
    assert counted == {ordinal: (len(starts), min(starts)) for ordinal, starts in by_day.items()}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_block_comes_round_as_the_oracle_sees_it(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(CHANGING))
    day = data.draw(st.sampled_from(change_days(name))) - timedelta(data.draw(st.integers(0, 1)))
    walk = oracle(name, day)
    one = data.draw(blocks(day, held=False))
    block = WeeklyHours(
        one["weekday"], one["start"], one["end"], frozenset(),
        None if one["since"] == date.min else one["since"], None if one["until"] == date.max else one["until"],
    )  # fmt: skip
    spans = [
        walk.between(each, one["start"], one["end"])
        for each in (day + timedelta(n) for n in range(-2, 4))
        if each.weekday() == one["weekday"] and one["since"] <= each <= one["until"]
    ]
    expected = [
        (60 * span.start, 60 * span.stop) for span in spans if span and span.start < walk.end and span.stop > walk.begin
    ]
    assert occurrences(block, ZoneInfo(name), 60 * walk.begin, 60 * walk.end) == expected

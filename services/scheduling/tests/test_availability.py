"""Availability against a minute-by-minute simulation, on the days on which clocks change, and within its price."""

from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta
from itertools import islice, product
from time import perf_counter
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduling.availability import (
    DAY,
    DateException,
    Interval,
    LocalClock,
    Resource,
    Slot,
    VisitType,
    WeeklyHours,
    earliest_first,
    free_starts,
    intersect,
    merge,
    open_intervals,
    subtract,
)

NEW_YORK = ZoneInfo("America/New_York")
ALWAYS = tuple(WeeklyHours(day, time(0), time(0)) for day in range(7))


def at(zone: ZoneInfo, *fields: int, fold: int = 0) -> int:
    return round(datetime(*fields, tzinfo=zone, fold=fold).timestamp())  # type: ignore[misc, arg-type]


def wall(zone: ZoneInfo, instant: int) -> str:
    return datetime.fromtimestamp(instant, zone).strftime("%d %H:%M")


def daily(start: time, end: time) -> tuple[WeeklyHours, ...]:
    return tuple(WeeklyHours(day, start, end) for day in range(7))


def opened(zone: ZoneInfo, day: date, start: time, end: time) -> list[tuple[str, str, int]]:
    """Wall times and minutes of what one block opens on one local date."""
    begin = round(datetime.combine(day, time(0), zone).timestamp())
    block = WeeklyHours(day.weekday(), start, end, valid_from=day, valid_until=day)
    return [
        (wall(zone, a), wall(zone, b), (b - a) // 60)
        for a, b in open_intervals([block], [], frozenset(), zone, begin - DAY, begin + 3 * DAY)
    ]


def starts_on(zone: ZoneInfo, day: date, hours: Sequence[WeeklyHours], grid: int = 30, duration: int = 30) -> list[str]:
    begin = round(datetime.combine(day, time(0), zone).timestamp())
    end = round(datetime.combine(day + timedelta(days=1), time(0), zone).timestamp())
    found = free_starts(
        [Resource("p", hours)], [], VisitType("v", duration, grid=grid),
        zone=zone, window_start=begin, window_end=end, now=0,
    )  # fmt: skip
    return [wall(zone, slot.start)[3:] for slot in found]


# --- clock changes ---------------------------------------------------------------------------------------------------


def test_an_ordinary_block_is_what_the_wall_clock_says_on_both_us_change_days() -> None:
    """DST: YosemiteCrew#3140 took the offset of 1970, CSCfi/exam#936 a wrong one too."""
    assert opened(NEW_YORK, date(2026, 3, 8), time(9), time(17)) == [("08 09:00", "08 17:00", 480)]
    assert opened(NEW_YORK, date(2026, 11, 1), time(9), time(17)) == [("01 09:00", "01 17:00", 480)]


def test_a_block_over_the_change_is_an_hour_shorter_in_spring_and_longer_in_autumn() -> None:
    assert opened(NEW_YORK, date(2026, 3, 7), time(22), time(6)) == [("07 22:00", "08 06:00", 420)]
    assert opened(NEW_YORK, date(2026, 10, 31), time(22), time(6)) == [("31 22:00", "01 06:00", 540)]


def test_a_skipped_time_moves_forward_by_the_gap() -> None:
    assert opened(NEW_YORK, date(2026, 3, 8), time(2, 30), time(5)) == [("08 03:30", "08 05:00", 90)]
    assert opened(NEW_YORK, date(2026, 3, 8), time(1), time(2, 30)) == [("08 01:00", "08 03:30", 90)]
    assert opened(NEW_YORK, date(2026, 3, 8), time(2), time(3)) == []


def test_a_repeated_time_means_the_first() -> None:
    assert opened(NEW_YORK, date(2026, 11, 1), time(1, 30), time(3)) == [("01 01:30", "01 03:00", 150)]
    assert opened(NEW_YORK, date(2026, 11, 1), time(0), time(1, 30)) == [("01 00:00", "01 01:30", 90)]


def test_starts_on_change_days_show_no_time_twice_and_none_that_does_not_exist() -> None:
    hours = daily(time(0), time(4))
    assert starts_on(NEW_YORK, date(2026, 3, 8), hours) == ["00:00", "00:30", "01:00", "01:30", "03:00", "03:30"]
    autumn = ["00:00", "00:30", "01:00", "01:30", "02:00", "02:30", "03:00", "03:30"]
    assert starts_on(NEW_YORK, date(2026, 11, 1), hours) == autumn


def test_lord_howe_changes_by_half_an_hour() -> None:
    howe = ZoneInfo("Australia/Lord_Howe")
    assert opened(howe, date(2026, 10, 4), time(1), time(4)) == [("04 01:00", "04 04:00", 150)]
    assert opened(howe, date(2026, 4, 5), time(1), time(4)) == [("05 01:00", "05 04:00", 210)]
    assert starts_on(howe, date(2026, 10, 4), daily(time(1), time(4))) == ["01:00", "01:30", "02:30", "03:00", "03:30"]
    assert starts_on(howe, date(2026, 4, 5), daily(time(1), time(3))) == ["01:00", "01:30", "02:00", "02:30"]


def test_sao_paulos_day_that_begins_at_one() -> None:
    sao_paulo = ZoneInfo("America/Sao_Paulo")
    assert opened(sao_paulo, date(2018, 11, 4), time(0), time(4)) == [("04 01:00", "04 04:00", 180)]
    assert opened(sao_paulo, date(2018, 11, 3), time(20), time(0)) == [("03 20:00", "04 01:00", 240)]
    assert opened(sao_paulo, date(2018, 2, 17), time(22), time(2)) == [("17 22:00", "18 02:00", 300)]
    assert starts_on(sao_paulo, date(2018, 2, 17), daily(time(22), time(0))) == ["22:00", "22:30", "23:00", "23:30"]


@pytest.mark.parametrize("zone", ["America/Phoenix", "Pacific/Honolulu"])
@pytest.mark.parametrize("day", [date(2026, 3, 8), date(2026, 11, 1)])
def test_zones_without_a_change_keep_every_hour(zone: str, day: date) -> None:
    assert opened(ZoneInfo(zone), day, time(0), time(0)) == [
        (f"{day:%d} 00:00", f"{day + timedelta(1):%d} 00:00", 1440)
    ]


@pytest.mark.parametrize("zone", ["America/Los_Angeles", "Pacific/Honolulu", "America/New_York"])
def test_evening_hours_belong_to_the_local_date_though_it_is_tomorrow_in_utc(zone: str) -> None:
    """DST: medplum#8417, on a server in UTC an evening was asked for on the wrong day and had no hours."""
    day = date(2026, 7, 7)
    assert starts_on(ZoneInfo(zone), day, [WeeklyHours(day.weekday(), time(20), time(22))]) == [
        "20:00", "20:30", "21:00", "21:30",
    ]  # fmt: skip


def test_a_change_of_years_within_the_window_is_no_change_of_hours() -> None:
    window = at(NEW_YORK, 2026, 12, 30), at(NEW_YORK, 2027, 1, 3)
    found = open_intervals(daily(time(9), time(17)), [], frozenset(), NEW_YORK, *window)
    assert [wall(NEW_YORK, a) for a, _ in found] == ["30 09:00", "31 09:00", "01 09:00", "02 09:00"]


ZONES = ["America/New_York", "America/Sao_Paulo", "Australia/Lord_Howe", "America/Phoenix", "Pacific/Honolulu",
         "America/St_Johns", "Pacific/Apia", "Europe/Dublin", "Africa/Casablanca", "America/Havana"]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(ZONES),
    st.datetimes(datetime(2005, 1, 1), datetime(2040, 1, 1)),
    st.integers(-6 * DAY, 6 * DAY),
    st.integers(0, 2 * DAY),
)
def test_the_integer_clock_agrees_with_zoneinfo(name: str, moment: datetime, away: int, seconds: int) -> None:
    zone = ZoneInfo(name)
    instant = round(moment.replace(tzinfo=UTC).timestamp())
    clock = LocalClock(zone, instant, instant + DAY)
    local = datetime.fromtimestamp(instant, zone)
    assert clock.day(instant) == local.date().toordinal()
    near = local.date().toordinal() + away // (3 * DAY)
    naive = datetime.combine(date.fromordinal(near), time(0)) + timedelta(seconds=seconds)
    assert clock.instant(near, seconds) == round(naive.replace(tzinfo=zone).timestamp())


# --- what is open ----------------------------------------------------------------------------------------------------


def week_of(hours: Sequence[WeeklyHours], exceptions: Sequence[DateException] = (), **options: object) -> list[str]:
    """Monday 6 to Sunday 12 July 2026 in New York."""
    closed: frozenset[date] = options.pop("closed", frozenset())  # type: ignore[assignment]
    window = at(NEW_YORK, 2026, 7, 6), at(NEW_YORK, 2026, 7, 13)
    found = open_intervals(hours, exceptions, closed, NEW_YORK, *window, **options)  # type: ignore[arg-type]
    return [f"{wall(NEW_YORK, a)}-{wall(NEW_YORK, b)}" for a, b in found]


MONDAY, TUESDAY = WeeklyHours(0, time(9), time(12)), WeeklyHours(1, time(9), time(12))


def test_a_closed_day_is_closed_from_midnight_to_midnight_even_for_last_nights_block() -> None:
    night = WeeklyHours(0, time(22), time(4))
    assert week_of([night], closed=frozenset({date(2026, 7, 7)})) == ["06 22:00-07 00:00"]
    assert week_of([night], closed=frozenset({date(2026, 7, 6)})) == ["07 00:00-07 04:00"]


def test_extra_hours_open_a_closed_day_and_leave_wins_over_them() -> None:
    extra = DateException(date(2026, 7, 6), "extra", time(10), time(14))
    leave = DateException(date(2026, 7, 6), "closed", time(11), time(12))
    assert week_of([MONDAY], [extra], closed=frozenset({date(2026, 7, 6)})) == ["06 10:00-06 14:00"]
    assert week_of([MONDAY], [extra, leave]) == ["06 09:00-06 11:00", "06 12:00-06 14:00"]
    assert week_of([MONDAY, TUESDAY], [DateException(date(2026, 7, 6), "closed")]) == ["07 09:00-07 12:00"]


def test_leave_over_midnight_cuts_both_days() -> None:
    assert week_of(
        [WeeklyHours(0, time(20), time(6))], [DateException(date(2026, 7, 6), "closed", time(23), time(2))]
    ) == ["06 20:00-06 23:00", "07 02:00-07 06:00"]


def test_blocks_that_touch_are_one_also_at_midnight() -> None:
    assert week_of([WeeklyHours(0, time(9), time(12)), WeeklyHours(0, time(12), time(17))]) == ["06 09:00-06 17:00"]
    assert week_of([WeeklyHours(0, time(20), time(0)), WeeklyHours(1, time(0), time(3))]) == ["06 20:00-07 03:00"]
    assert len(week_of(ALWAYS)) == 1


def test_validity_and_visit_types_limit_a_block() -> None:
    later = WeeklyHours(0, time(9), time(12), frozenset({"v"}), valid_from=date(2026, 7, 7))
    ended = WeeklyHours(1, time(9), time(12), valid_until=date(2026, 7, 6))
    only_v = WeeklyHours(2, time(9), time(12), frozenset({"v"}))
    assert week_of([later, ended]) == []
    assert week_of([only_v], visit_type_id="v") == ["08 09:00-08 12:00"]
    assert week_of([only_v], visit_type_id="w") == []


def test_hours_are_clipped_to_the_window() -> None:
    window = at(NEW_YORK, 2026, 7, 6, 10), at(NEW_YORK, 2026, 7, 6, 11)
    assert open_intervals([MONDAY], [], frozenset(), NEW_YORK, *window) == [window]
    assert open_intervals([MONDAY], [], frozenset(), NEW_YORK, window[1], window[0]) == []


# --- free starts -----------------------------------------------------------------------------------------------------

DAY_START = at(NEW_YORK, 2026, 7, 6)


def minutes(*pairs: tuple[int, int]) -> list[Interval]:
    """Ranges in minutes after nine on Monday 6 July 2026."""
    nine = DAY_START + 9 * 3600
    return [(nine + 60 * a, nine + 60 * b) for a, b in pairs]


def on_monday(visit: VisitType, practitioner: Resource, *pools: Sequence[Resource], **options: object) -> list[Slot]:
    arguments: dict[str, object] = {"window_start": DAY_START, "window_end": DAY_START + DAY, "now": 0} | options
    return list(free_starts([practitioner], pools, visit, zone=NEW_YORK, **arguments))  # type: ignore[arg-type]


def shown(slots: Sequence[Slot]) -> list[str]:
    return [wall(NEW_YORK, slot.start)[3:] for slot in slots]


def test_buffers_keep_off_occupancy_but_may_reach_outside_the_hours() -> None:
    visit = VisitType("v", 30, buffer_before=10, buffer_after=5, grid=15)
    free = on_monday(visit, Resource("p", [MONDAY], occupied=minutes((60, 90))))
    assert shown(free) == ["09:00", "09:15", "10:45", "11:00", "11:15", "11:30"]


def test_buffers_do_not_apply_to_the_patient() -> None:
    visit = VisitType("v", 30, buffer_before=10, buffer_after=5, grid=15)
    free = on_monday(visit, Resource("p", [MONDAY]), patient_occupied=minutes((60, 90)))
    assert shown(free) == ["09:00", "09:15", "09:30", "10:30", "10:45", "11:00", "11:15", "11:30"]


def test_the_grid_counts_from_local_midnight() -> None:
    late = Resource("p", [WeeklyHours(0, time(9, 10), time(12))])
    assert shown(on_monday(VisitType("v", 60, grid=45), late)) == ["09:45", "10:30"]
    assert shown(on_monday(VisitType("v", 60, grid=50), late)) == ["09:10", "10:00", "10:50"]
    night = Resource("p", [WeeklyHours(6, time(23), time(1))])
    window = {"window_start": DAY_START - 3600, "window_end": DAY_START + 3600}
    assert shown(on_monday(VisitType("v", 5, grid=50), night, **window)) == ["23:20", "00:00", "00:50"]


def test_minimum_notice_and_window_bound_the_start_alone() -> None:
    visit = VisitType("v", 60, grid=30, minimum_notice=60)
    slots = on_monday(visit, Resource("p", [MONDAY]), now=DAY_START + 9 * 3600, window_end=DAY_START + 11 * 3600)
    assert shown(slots) == ["10:00", "10:30"]


@pytest.mark.parametrize("change", [date(2026, 3, 8), date(2026, 11, 1)])
def test_notice_that_ends_on_a_day_of_change_shifts_no_hours(change: date) -> None:
    """DST: in cal.diy#12137 all hours were off while the notice ended on the day on which the clocks change."""
    hours = [WeeklyHours(change.weekday(), time(9), time(12))]
    midnight = at(NEW_YORK, change.year, change.month, change.day)
    for ends, shown in ((at(NEW_YORK, change.year, change.month, change.day, 10), ["10:00", "10:30", "11:00", "11:30"]),
                        (midnight, ["09:00", "09:30", "10:00", "10:30", "11:00", "11:30"])):  # fmt: skip
        found = free_starts(
            [Resource("p", hours)], [], VisitType("v", 30, grid=30, minimum_notice=7 * 24 * 60),
            zone=NEW_YORK, window_start=midnight, window_end=midnight + 26 * 3600, now=ends - 7 * DAY,
        )  # fmt: skip
        assert [wall(NEW_YORK, slot.start)[3:] for slot in found] == shown


def test_every_requirement_takes_a_resource_of_its_own() -> None:
    visit = VisitType("v", 60, grid=60)
    first, second = Resource("r1", occupied=minutes((0, 60))), Resource("r2", occupied=minutes((60, 120)))
    slots = on_monday(visit, Resource("p", [MONDAY]), [first, second], [second, first])
    assert [(wall(NEW_YORK, slot.start)[3:], slot.resource_ids) for slot in slots] == [("11:00", ("r1", "r2"))]
    slots = on_monday(visit, Resource("p", [MONDAY]), [first, second])
    assert [slot.resource_ids for slot in slots] == [("r2",), ("r1",), ("r1",)]
    assert on_monday(visit, Resource("p", [MONDAY]), []) == []


def test_a_practitioner_does_not_assist_himself() -> None:
    doctor = Resource("p", [MONDAY])
    assert on_monday(VisitType("v", 60), doctor, [doctor]) == []


def test_wishes_hold_the_whole_visit() -> None:
    wish = [WeeklyHours(0, time(10), time(11, 30))]
    assert shown(on_monday(VisitType("v", 60, grid=30), Resource("p", [MONDAY]), wanted=wish)) == ["10:00", "10:30"]


def test_an_always_open_room_serves_extra_hours_on_a_closed_day() -> None:
    doctor = Resource("p", [MONDAY], [DateException(date(2026, 7, 6), "extra", time(13), time(14))])
    room = Resource("r", exceptions=[DateException(date(2026, 7, 6), "closed", time(13), time(13, 30))])
    slots = on_monday(VisitType("v", 30, grid=30), doctor, [room], closed_days=frozenset({date(2026, 7, 6)}))
    assert shown(slots) == ["13:30"]


def test_an_impossible_visit_type_is_refused() -> None:
    for wrong in ({"duration": 0}, {"duration": 10, "grid": 0}, {"duration": 10, "buffer_before": -1}):
        with pytest.raises(ValueError, match="must"):
            VisitType("v", **wrong)


def test_the_first_slots_over_all_clinics_come_earliest_first_and_lazily() -> None:
    def endless(clinic: str, every: int) -> Iterator[Slot]:
        start = 0
        while True:
            yield Slot(start, clinic, "p", start + 1, ())
            start += every

    first = islice(earliest_first(endless("b", 2), endless("a", 3)), 5)
    assert [(slot.start, slot.clinic_id) for slot in first] == [(0, "a"), (0, "b"), (2, "b"), (3, "a"), (4, "b")]


# --- properties ------------------------------------------------------------------------------------------------------

intervals = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=8)


def points(rows: Sequence[Interval]) -> set[int]:
    return {point for start, end in rows for point in range(start, end)}


@settings(max_examples=200, deadline=None)
@given(intervals, intervals)
def test_the_algebra_is_that_of_sets(one: list[Interval], other: list[Interval]) -> None:
    assert points(merge(one)) == points(one)
    assert merge(merge(one)) == merge(one)
    assert all(a[1] < b[0] for a, b in zip(merge(one), merge(one)[1:], strict=False))
    assert points(subtract(one, other)) == points(one) - points(other)
    assert points(intersect(one, other)) == points(one) & points(other)
    assert merge(subtract(one, other)) == subtract(one, other)


# A window of two days around a change of the clock, in each case of interest.
WINDOWS = [
    ("America/New_York", date(2026, 3, 7)), ("America/New_York", date(2026, 10, 31)), ("America/Phoenix", date(2026, 3, 8)),
    ("Pacific/Honolulu", date(2026, 7, 1)), ("Australia/Lord_Howe", date(2026, 10, 3)), ("Australia/Lord_Howe", date(2026, 4, 4)),
    ("America/Sao_Paulo", date(2018, 11, 3)), ("America/Sao_Paulo", date(2018, 2, 17)), ("America/St_Johns", date(2009, 10, 31)),
]  # fmt: skip

quarter_hours = st.integers(0, 95).map(lambda quarter: time(quarter // 4, quarter % 4 * 15))


def hours_near(day: date) -> st.SearchStrategy[list[WeeklyHours]]:
    weekdays = st.sampled_from([(day.weekday() + shift) % 7 for shift in (-1, 0, 1, 2)])
    blocks = st.builds(
        WeeklyHours, weekdays, quarter_hours, quarter_hours, st.sampled_from([frozenset(), frozenset({"v"}), frozenset({"w"})]),
        st.sampled_from([None, day, day + timedelta(1)]), st.sampled_from([None, None, day, day + timedelta(1)]),
    )  # fmt: skip
    return st.lists(blocks, max_size=4)


@st.composite
def exceptions_near(draw: st.DrawFn, day: date) -> DateException:
    whole = draw(st.booleans())
    return DateException(
        day + timedelta(draw(st.integers(-1, 2))), draw(st.sampled_from(["closed", "extra"])),
        None if whole else draw(quarter_hours), None if whole else draw(quarter_hours),
    )  # fmt: skip


@st.composite
def occupancies(draw: st.DrawFn, begin: int) -> list[Interval]:
    rows = draw(st.lists(st.tuples(st.integers(-60, 2900), st.integers(0, 300)), max_size=5))
    return [(begin + 60 * start, begin + 60 * (start + length)) for start, length in rows]


def open_minutes(
    hours: Sequence[WeeklyHours] | None, exceptions: Sequence[DateException], closed: frozenset[date],
    zone: ZoneInfo, day: date, visit_type_id: str | None,
) -> set[int]:  # fmt: skip
    """Epoch minutes that are open around `day`, block by block with nothing but datetime."""

    def block(begin: date, start: time | None, end: time | None) -> set[int]:
        first, last = start or time(0), end or time(0)
        finish = begin if last > first else begin + timedelta(1)
        return set(
            range(
                round(datetime.combine(begin, first, zone).timestamp()) // 60,
                round(datetime.combine(finish, last, zone).timestamp()) // 60,
            )
        )

    days = [day + timedelta(shift) for shift in range(-3, 6)]
    minutes_open: set[int] = set()
    if hours is None:
        minutes_open.update(*(block(each, None, None) for each in days))
    for each in days:
        for one in hours or ():
            if (
                one.weekday == each.weekday()
                and (visit_type_id is None or not one.visit_type_ids or visit_type_id in one.visit_type_ids)
                and (one.valid_from is None or one.valid_from <= each)
                and (one.valid_until is None or each <= one.valid_until)
            ):
                minutes_open |= block(each, one.start, one.end)
    for shut in closed if hours is not None else ():
        minutes_open -= block(shut, None, None)
    for exception in exceptions:
        if exception.kind == "extra":
            minutes_open |= block(exception.date, exception.start, exception.end)
    for exception in exceptions:
        if exception.kind == "closed":
            minutes_open -= block(exception.date, exception.start, exception.end)
    return minutes_open


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_free_starts_equal_a_simulation_minute_by_minute(data: st.DataObject) -> None:
    name, day = data.draw(st.sampled_from(WINDOWS))
    zone = ZoneInfo(name)
    begin = round(datetime.combine(day, time(0), zone).timestamp())
    end = round(datetime.combine(day + timedelta(2), time(0), zone).timestamp())
    now = begin + 60 * data.draw(st.integers(-2000, 400))
    closed = data.draw(st.sampled_from([frozenset(), frozenset({day}), frozenset({day + timedelta(1)})]))
    visit = VisitType(
        "v", data.draw(st.integers(1, 90)), data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20)),
        data.draw(st.sampled_from([5, 15, 20, 30, 50, 60])), data.draw(st.sampled_from([0, 30, 600])),
    )  # fmt: skip

    def resource(number: int, *, always: bool) -> Resource:
        return Resource(
            f"r{number}",
            None if always else data.draw(hours_near(day)),
            [data.draw(exceptions_near(day)) for _ in range(data.draw(st.integers(0, 2)))],
            data.draw(occupancies(begin)),
        )

    practitioners = [resource(number, always=False) for number in range(2)]
    rooms = [resource(2 + number, always=data.draw(st.booleans())) for number in range(3)]
    pools = data.draw(st.lists(st.lists(st.sampled_from(rooms), max_size=3, unique_by=lambda r: r.id), max_size=2))
    wanted = data.draw(st.one_of(st.just([]), hours_near(day)))
    patient = data.draw(st.one_of(st.just([]), occupancies(begin)))
    slots = list(
        free_starts(
            practitioners, pools, visit, zone=zone, window_start=begin, window_end=end, now=now, closed_days=closed,
            clinic_id="c", wanted=wanted, patient_occupied=patient,
        )
    )  # fmt: skip

    opens = {r.id: open_minutes(r.hours, r.exceptions, closed, zone, day, "v") for r in practitioners + rooms}
    busy = {r.id: points([(a // 60, b // 60) for a, b in r.occupied]) for r in practitioners + rooms}
    wishes = open_minutes(wanted, (), frozenset(), zone, day, None)
    patient_busy = points([(a // 60, b // 60) for a, b in patient])

    def is_free(who: str, minute: int) -> bool:
        return opens[who].issuperset(range(minute, minute + visit.duration)) and busy[who].isdisjoint(
            range(minute - visit.buffer_before, minute + visit.duration + visit.buffer_after)
        )

    expected = []
    for minute in range(begin // 60, end // 60):
        local = datetime.fromtimestamp(60 * minute, zone)
        visit_minutes = range(minute, minute + visit.duration)
        if (
            local.fold == 0
            and (local.hour * 60 + local.minute) % visit.grid == 0
            and 60 * minute >= now + 60 * visit.minimum_notice
            and patient_busy.isdisjoint(visit_minutes)
            and (not wanted or wishes.issuperset(visit_minutes))
        ):
            expected += [
                (60 * minute, p.id)
                for p in practitioners
                if is_free(p.id, minute)
                and any(
                    len(set(choice)) == len(choice) and all(is_free(room, minute) for room in choice)
                    for choice in product(*([room.id for room in pool] for pool in pools))
                )
            ]
    assert [(slot.start, slot.practitioner_id) for slot in slots] == expected
    for slot in slots:
        assert slot.end - slot.start == 60 * visit.duration and len(set(slot.resource_ids)) == len(pools)
        assert all(is_free(room, slot.start // 60) for room in slot.resource_ids)
        assert all(room in {each.id for each in pool} for room, pool in zip(slot.resource_ids, pools, strict=True))

    for one in practitioners:
        found = open_intervals(one.hours, one.exceptions, closed, zone, begin, end, "v")
        assert found == merge(found)
        assert {m for a, b in found for m in range(a // 60, b // 60)} == opens[one.id] & set(
            range(begin // 60, end // 60)
        )


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(4)))
def test_the_order_of_practitioners_and_rows_does_not_matter(order: list[int]) -> None:
    doctors = [Resource(f"p{n}", [MONDAY], occupied=minutes((30 * n, 60 * n), (0, 15))) for n in range(4)]
    window = {"zone": NEW_YORK, "window_start": DAY_START, "window_end": DAY_START + DAY, "now": 0}
    expected = list(free_starts(doctors, [], VisitType("v", 30), **window))  # type: ignore[arg-type]
    shuffled = [Resource(doctors[n].id, [MONDAY], occupied=doctors[n].occupied[::-1]) for n in order]
    assert list(free_starts(shuffled, [], VisitType("v", 30), **window)) == expected  # type: ignore[arg-type]
    assert expected == sorted(expected)


def busy_clinic() -> list[Resource]:
    """Fifty practitioners with thirty days of fourteen visits a day, four fifths of the time taken."""
    week = [WeeklyHours(day, *ends) for day in range(5) for ends in ((time(8), time(12)), (time(13), time(17)))]
    taken = [
        (DAY_START + day * DAY + 8 * 3600 + 2100 * number, DAY_START + day * DAY + 8 * 3600 + 2100 * number + 1800)
        for day in range(30)
        for number in range(14)
    ]
    return [Resource(f"p{n}", week, occupied=[row for at, row in enumerate(taken) if (at + n) % 5]) for n in range(50)]


def test_the_first_hundred_of_fifty_practitioners_over_thirty_days_take_a_few_milliseconds() -> None:
    """Slow availability: cal.diy#5277 (10 to 25 s), #4007 (40 s), #23482 (over a minute)."""
    practitioners = busy_clinic()
    rooms = [Resource(f"r{n}", occupied=practitioners[n].occupied) for n in range(10)]
    visit = VisitType("v", 30, grid=15)
    took = []
    for _ in range(5):
        begin = perf_counter()
        found = free_starts(
            practitioners, [rooms], visit, zone=NEW_YORK, window_start=DAY_START, window_end=DAY_START + 30 * DAY, now=0
        )
        assert len(list(islice(found, 100))) == 100
        took.append(perf_counter() - begin)
    print(f"\nfirst 100: {1000 * min(took):.2f} ms")
    assert min(took) < 0.03

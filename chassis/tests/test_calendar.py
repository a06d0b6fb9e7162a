"""Business days and local windows, on holidays, weekends and the days on which clocks change."""

import subprocess
import sys
from datetime import UTC, date, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.calendar import (
    add_business_days,
    add_days,
    at_local,
    is_business_day,
    is_in_local_window,
    next_local_time_in_window,
)

ROOT = Path(__file__).parents[2]
ZONES = [
    "America/New_York",
    "America/Phoenix",
    "Pacific/Honolulu",
    "Australia/Lord_Howe",
    "Asia/Tokyo",
    "Europe/London",
]
EAST = "America/New_York"
instants = st.datetimes(datetime(2025, 1, 1), datetime(2029, 1, 1), timezones=st.just(UTC)).map(
    lambda moment: moment.replace(microsecond=0)
)


def east(*fields: int) -> datetime:
    return datetime(*fields, tzinfo=ZoneInfo(EAST))  # type: ignore[misc, arg-type]


def test_weekends_holidays_and_closed_days_are_no_business_days() -> None:
    assert is_business_day(date(2026, 7, 2))
    assert not is_business_day(date(2026, 7, 3))  # Independence Day, observed on Friday
    assert not is_business_day(date(2026, 7, 5))
    assert not is_business_day(date(2027, 12, 31))  # New Year's Day of 2028, observed in the year before
    assert not is_business_day(date(2026, 7, 2), closed=frozenset({date(2026, 7, 2)}))


def test_a_state_has_holidays_of_its_own() -> None:
    patriots_day = date(2026, 4, 20)
    assert is_business_day(patriots_day, "US") and not is_business_day(patriots_day, "US-MA")


def test_business_days_keep_the_wall_time_over_weekends_holidays_and_a_clock_change() -> None:
    assert add_business_days(east(2026, 7, 2, 10), 1, EAST, "US") == east(2026, 7, 6, 10)
    assert add_business_days(east(2026, 4, 17, 10), 1, EAST, "US-MA") == east(2026, 4, 21, 10)
    assert add_business_days(east(2026, 3, 6, 10), 3, EAST) == east(2026, 3, 11, 10)
    closed = frozenset({date(2026, 3, 9)})
    assert add_business_days(east(2026, 3, 6, 10), 1, EAST, closed=closed) == east(2026, 3, 10, 10)


def test_the_local_date_counts_not_the_one_in_utc() -> None:
    friday_evening = datetime(2026, 3, 14, 2, tzinfo=UTC)  # Friday 22:00 in New York
    assert add_business_days(friday_evening, 1, EAST) == east(2026, 3, 16, 22)
    assert add_business_days(friday_evening, 1, "UTC") == datetime(2026, 3, 16, 23, 59, 59, tzinfo=UTC)


def test_what_comes_in_on_a_weekend_has_until_the_end_of_the_day() -> None:
    assert add_business_days(east(2026, 3, 14, 10), 1, EAST) == east(2026, 3, 16, 23, 59, 59)
    assert add_business_days(east(2026, 3, 14, 10), 5, EAST) == east(2026, 3, 20, 23, 59, 59)


def test_wrong_arguments_are_refused() -> None:
    for wrong in ("XX", "US-XX"):
        with pytest.raises(ValueError, match="unknown holiday region"):
            is_business_day(date(2026, 7, 2), wrong)
    with pytest.raises(ValueError, match="aware"):
        add_business_days(datetime(2026, 7, 2), 1, EAST)
    with pytest.raises(ValueError, match="negative"):
        add_business_days(east(2026, 7, 2), -1, EAST)
    for start, end, zones in ((time(9), time(9), [EAST]), (time(20), time(9), [EAST]), (time(9), time(20), [])):
        with pytest.raises(ValueError, match="window"):
            next_local_time_in_window(east(2026, 7, 2), zones, start, end)


@settings(max_examples=200, deadline=None)
@given(instants, st.integers(0, 30), st.sampled_from(ZONES), st.sampled_from(["US", "US-MA", "JP"]))
def test_exactly_so_many_business_days_lie_between(start: datetime, days: int, zone: str, region: str) -> None:
    due = add_business_days(start, days, zone, region)
    first, last = start.astimezone(ZoneInfo(zone)).date(), due.astimezone(ZoneInfo(zone)).date()
    between = [first + timedelta(day) for day in range(1, (last - first).days + 1)]
    assert sum(is_business_day(day, region) for day in between) == days
    assert due == start or is_business_day(last, region)


@settings(max_examples=200, deadline=None)
@given(instants, st.integers(0, 400_000), st.integers(0, 10), st.sampled_from(["America/Phoenix", "Asia/Tokyo"]))
def test_what_begins_later_is_never_due_earlier(start: datetime, seconds: int, days: int, zone: str) -> None:
    later = start + timedelta(seconds=seconds)
    assert add_business_days(start, days, zone) <= add_business_days(later, days, zone)
    assert add_business_days(start, days, zone) <= add_business_days(start, days + 1, zone)


def test_skipped_and_repeated_wall_times_have_one_instant() -> None:
    assert at_local(date(2026, 3, 8), time(2, 30), EAST) == datetime(2026, 3, 8, 7, 30, tzinfo=UTC)
    assert at_local(date(2026, 11, 1), time(1, 30, fold=1), EAST) == datetime(2026, 11, 1, 5, 30, tzinfo=UTC)
    assert add_days(east(2026, 3, 9, 9), -3, EAST) == east(2026, 3, 6, 9)


@settings(max_examples=60, deadline=None)
@given(
    instants,
    st.sets(st.sampled_from(ZONES), min_size=1, max_size=3),
    st.integers(0, 40),
    st.integers(1, 40),
)
def test_the_next_open_instant_is_the_first_of_all_minutes(
    moment: datetime, zones: set[str], begin: int, length: int
) -> None:
    candidates, moment = sorted(zones), moment.replace(second=0)
    start, end = time(begin // 2, begin % 2 * 30), time(min(begin + length, 47) // 2, min(begin + length, 47) % 2 * 30)
    found = next_local_time_in_window(moment, candidates, start, end, timedelta(days=2))
    steps = (moment + timedelta(minutes=5 * n) for n in range(2 * 24 * 12 + 1))
    # Windows and offsets are multiples of five minutes, so only the first step may be off that raster.
    raster = (step if step == moment else step - timedelta(minutes=step.minute % 5) for step in steps)
    expected = next((step for step in raster if is_in_local_window(step, candidates, start, end)), None)
    assert found == expected


def test_in_a_repeated_hour_the_second_opening_counts_once_the_first_is_over() -> None:
    second_ten_past_one = datetime(2026, 11, 1, 6, 10, tzinfo=UTC)
    assert next_local_time_in_window(second_ten_past_one, [EAST], time(1, 30), time(1, 45)) == datetime(
        2026, 11, 1, 6, 30, tzinfo=UTC
    )


def test_warming_pays_for_the_first_look_at_any_region() -> None:
    # A process of its own, since here somebody has looked already; CPU time, since the machine may be busy.
    code = """if True:
        from datetime import date
        from time import process_time
        from chassis import calendar
        began = process_time()
        calendar.warm()
        warmed = process_time()
        calendar.is_business_day(date(2026, 7, 2), "US-MA")
        calendar.is_holiday(date(2027, 7, 5), "US-CA")
        print(warmed - began, process_time() - warmed)
    """
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    warming, later = map(float, answer.stdout.split())
    assert later < warming / 4, answer.stdout


def test_zones_without_a_common_hour_have_no_next_instant() -> None:
    zones = ["America/Halifax", "Asia/Singapore"]
    assert next_local_time_in_window(east(2026, 7, 2), zones, time(9), time(20)) is None

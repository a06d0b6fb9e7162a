"""Quiet hours in every candidate zone of the recipient."""

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.notifications.quiet_hours import NeverOpen, is_open, next_allowed

EAST, WEST, HAWAII = "America/New_York", "America/Los_Angeles", "Pacific/Honolulu"
US_ZONES = [EAST, "America/Chicago", "America/Denver", "America/Phoenix", WEST, "America/Anchorage", HAWAII]
instants = st.datetimes(datetime(2026, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC))


def local(zone: str, *fields: int) -> datetime:
    return datetime(*fields, tzinfo=ZoneInfo(zone))  # type: ignore[misc, arg-type]


def test_an_open_hour_is_now() -> None:
    noon = local(EAST, 2026, 7, 7, 12)
    assert next_allowed(noon, [EAST]) == noon
    assert next_allowed(local(EAST, 2026, 7, 7, 9), [EAST]) == local(EAST, 2026, 7, 7, 9)


def test_the_evening_waits_for_the_recipients_morning() -> None:
    assert next_allowed(local(EAST, 2026, 7, 7, 20), [EAST]) == local(EAST, 2026, 7, 8, 9)
    assert next_allowed(local(EAST, 2026, 7, 7, 4, 40), [EAST]) == local(EAST, 2026, 7, 7, 9)


def test_every_candidate_zone_must_be_open() -> None:
    morning_in_new_york = local(EAST, 2026, 7, 7, 9)
    assert not is_open(morning_in_new_york, [EAST, HAWAII])
    assert next_allowed(morning_in_new_york, [EAST, HAWAII]) == local(HAWAII, 2026, 7, 7, 9)
    assert next_allowed(local(EAST, 2026, 7, 7, 20), [EAST, WEST]) == local(WEST, 2026, 7, 8, 9)


def test_no_policy_opens_the_night() -> None:
    early, late = local(EAST, 2026, 7, 7, 7, 59), local(EAST, 2026, 7, 7, 21)
    assert next_allowed(early, [EAST], time(0), time(23)) == local(EAST, 2026, 7, 7, 8)
    assert next_allowed(late, [EAST], time(0), time(23)) == local(EAST, 2026, 7, 8, 8)
    with pytest.raises(ValueError, match="between 08:00 and 21:00"):
        next_allowed(early, [EAST], time(5), time(7))


def test_nine_is_nine_on_both_days_of_the_change() -> None:
    for day in ((2026, 3, 8), (2026, 11, 1)):
        assert next_allowed(local(EAST, *day, 0), [EAST]) == local(EAST, *day, 9)


def test_an_answer_to_the_recipients_own_action_is_exempt_for_ten_minutes() -> None:
    night = local(EAST, 2026, 7, 7, 3)
    assert next_allowed(night, [EAST], own_action=night - timedelta(minutes=10)) == night
    assert not is_open(night, [EAST], own_action=night - timedelta(minutes=11))
    assert not is_open(night, [EAST], own_action=night + timedelta(minutes=1))


def test_zones_that_are_never_open_together_are_for_a_person() -> None:
    with pytest.raises(NeverOpen):
        next_allowed(local(EAST, 2026, 7, 7, 3), ["America/Halifax", "Asia/Singapore"])
    with pytest.raises(ValueError, match="zone"):
        is_open(local(EAST, 2026, 7, 7, 12), [])


@settings(max_examples=100, deadline=None)
@given(instants, st.sets(st.sampled_from(US_ZONES), min_size=1), st.integers(0, 10), st.integers(17, 23))
def test_what_is_allowed_is_open_everywhere_and_nothing_earlier_is(
    now: datetime, zones: set[str], start: int, end: int
) -> None:
    hours = (time(start), time(end))
    allowed = next_allowed(now, sorted(zones), *hours)
    assert now <= allowed <= now + timedelta(days=2)
    assert is_open(allowed, sorted(zones), *hours)
    for zone in zones:
        assert max(time(8), time(start)) <= allowed.astimezone(ZoneInfo(zone)).time() < min(time(21), time(end))
    assert next_allowed(allowed, sorted(zones), *hours) == allowed
    step = now
    while step < allowed:
        assert not is_open(step, sorted(zones), *hours)
        step += timedelta(minutes=37)
    assert allowed == now or not is_open(allowed - timedelta(microseconds=1), sorted(zones), *hours)

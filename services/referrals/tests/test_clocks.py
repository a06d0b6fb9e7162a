"""The clocks of a referral: none is missing, and each is due when the table says."""

from datetime import UTC, date, datetime, timedelta
from itertools import product
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.referrals.clocks import DEFAULT_CLOCKS, OPEN_STATES, PRIORITIES, Clock, due

EAST = "America/New_York"


def east(*fields: int) -> datetime:
    return datetime(*fields, tzinfo=ZoneInfo(EAST))  # type: ignore[misc, arg-type]


FRIDAY = east(2026, 7, 10, 10)


def test_every_open_state_has_a_clock_for_every_priority_and_no_other_has_one() -> None:
    assert set(DEFAULT_CLOCKS) == set(product(OPEN_STATES, PRIORITIES))
    for (state, priority), clock in DEFAULT_CLOCKS.items():
        time, basis = due(state, priority, FRIDAY, EAST)
        assert time > FRIDAY and time.tzinfo is not None
        assert basis.startswith(clock.next_action) and priority in basis


@pytest.mark.parametrize(
    ("state", "priority", "expected", "basis"),
    [
        ("SUBMITTED", "stat", east(2026, 7, 10, 11), "accept or decline within 1 hour (stat)"),
        ("SUBMITTED", "asap", east(2026, 7, 10, 14), "accept or decline within 4 hours (asap)"),
        ("SUBMITTED", "urgent", east(2026, 7, 13, 10), "accept or decline within 1 business day (urgent), business days of US"),
        ("SUBMITTED", "routine", east(2026, 7, 15, 10), "accept or decline within 3 business days (routine), business days of US"),
        ("ACCEPTED", "stat", east(2026, 7, 10, 23, 59, 59), "schedule the visit on the same day (stat)"),
        ("ACCEPTED", "asap", east(2026, 7, 11, 10), "schedule the visit within 1 day (asap)"),
        ("ACCEPTED", "urgent", east(2026, 7, 15, 10), "schedule the visit within 3 business days (urgent), business days of US"),
        ("ACCEPTED", "routine", east(2026, 7, 24, 10), "schedule the visit within 10 business days (routine), business days of US"),
        ("SCHEDULED", "urgent", east(2026, 7, 24, 10), "see the patient within 14 days (urgent)"),
        ("SCHEDULED", "routine", east(2026, 8, 7, 10), "see the patient within 28 days (routine)"),
        ("SEEN", "routine", east(2026, 7, 17, 10), "receive the report within 7 days (routine)"),
        ("REPORT_RECEIVED", "stat", east(2026, 7, 15, 10), "acknowledge the report within 3 business days (stat), business days of US"),
    ],
)  # fmt: skip
def test_the_default_clocks_are_those_of_the_domain(state: str, priority: str, expected: datetime, basis: str) -> None:
    assert due(state, priority, FRIDAY, EAST) == (expected, basis)


def test_the_clinics_holidays_and_closed_days_move_a_clock() -> None:
    friday = east(2026, 4, 17, 10)
    assert due("SUBMITTED", "urgent", friday, EAST, "US")[0] == east(2026, 4, 20, 10)
    assert due("SUBMITTED", "urgent", friday, EAST, "US-MA")[0] == east(2026, 4, 21, 10)
    closed = frozenset({date(2026, 4, 21)})
    assert due("SUBMITTED", "urgent", friday, EAST, "US-MA", closed=closed)[0] == east(2026, 4, 22, 10)


def test_state_and_priority_are_taken_in_any_spelling() -> None:
    assert due("report-received", "STAT", FRIDAY, EAST) == due("REPORT_RECEIVED", "stat", FRIDAY, EAST)


def test_a_closed_state_or_an_unknown_priority_has_no_clock() -> None:
    for state, priority in (("CLOSED", "stat"), ("DECLINED", "stat"), ("SEEN", "soon")):
        with pytest.raises(ValueError, match="no clock"):
            due(state, priority, FRIDAY, EAST)


def test_a_tenant_may_bring_its_own_table() -> None:
    table = {**DEFAULT_CLOCKS, ("SEEN", "stat"): Clock("receive the report", "hours", 2)}
    assert due("SEEN", "stat", FRIDAY, EAST, table=table)[0] == FRIDAY + timedelta(hours=2)


@settings(max_examples=100, deadline=None)
@given(
    st.datetimes(datetime(2026, 1, 1), datetime(2028, 1, 1), timezones=st.just(UTC)),
    st.sampled_from(OPEN_STATES),
    st.sampled_from([EAST, "America/Phoenix", "Pacific/Honolulu"]),
)
def test_the_more_urgent_is_never_due_later_and_nothing_before_it_began(since: datetime, state: str, zone: str) -> None:
    dues = [due(state, priority, since, zone)[0] for priority in PRIORITIES]
    assert all(since <= each for each in dues)
    if state in ("DRAFT", "SUBMITTED", "INFORMATION_REQUESTED", "SCHEDULED"):
        assert dues == sorted(dues)

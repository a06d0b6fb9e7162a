"""Which reminders a visit gets."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.notifications.planning import DEFAULT_POLICY, TWO_HOURS, Offset, plan

EAST = "America/New_York"


def east(*fields: int) -> datetime:
    return datetime(*fields, tzinfo=ZoneInfo(EAST))  # type: ignore[misc, arg-type]


def planned(booked: datetime, start: datetime, now: datetime | None = None) -> list[tuple[str, datetime]]:
    rows = plan((*DEFAULT_POLICY, TWO_HOURS), booked, start, now or booked, EAST)
    return [(row.offset_name, row.due_time) for row in rows]


def test_a_visit_next_week_gets_every_message_of_the_policy() -> None:
    booked, start = east(2026, 7, 1, 10), east(2026, 7, 8, 9)
    assert planned(booked, start) == [
        ("booked", booked),
        ("3d", east(2026, 7, 5, 9)),
        ("1d", east(2026, 7, 7, 9)),
        ("2h", east(2026, 7, 8, 7)),
    ]
    assert {row.latest_time for row in plan(DEFAULT_POLICY, booked, start, booked, EAST)} == {start}


def test_a_visit_booked_a_day_ahead_gets_no_three_day_reminder() -> None:
    booked = east(2026, 7, 7, 8)
    assert [name for name, _ in planned(booked, east(2026, 7, 8, 9))] == ["booked", "1d", "2h"]
    assert [name for name, _ in planned(booked, east(2026, 7, 8, 8))] == ["booked", "2h"]
    assert [name for name, _ in planned(booked, east(2026, 7, 7, 9))] == ["booked"]


def test_days_before_keep_the_visits_wall_time_over_a_clock_change() -> None:
    spring = dict(planned(east(2026, 3, 1, 9), east(2026, 3, 9, 9)))
    assert spring["3d"] == east(2026, 3, 6, 9) and spring["1d"] == east(2026, 3, 8, 9)
    assert spring["3d"].astimezone(UTC).hour != spring["1d"].astimezone(UTC).hour
    autumn = dict(planned(east(2026, 10, 20, 9), east(2026, 11, 2, 9)))
    assert autumn["3d"] == east(2026, 10, 30, 9)


def test_nothing_is_planned_once_the_visit_has_begun() -> None:
    start = east(2026, 7, 8, 9)
    assert planned(east(2026, 7, 1, 10), start, now=start) == []
    assert planned(start + timedelta(hours=1), start) == []


def test_after_an_outage_only_the_last_missed_reminder_is_caught_up() -> None:
    start = east(2026, 7, 8, 9)
    names = [name for name, _ in planned(east(2026, 7, 1, 10), start, now=east(2026, 7, 7, 12))]
    assert names == ["booked", "1d", "2h"]


def test_a_replay_plans_the_same_rows() -> None:
    booked, start = east(2026, 7, 1, 10), east(2026, 7, 8, 9)
    assert planned(booked, start, now=booked + timedelta(hours=5)) == planned(booked, start)


def test_an_offset_without_sense_is_refused() -> None:
    for kind, amount in (("at_booking", 1), ("days_before", 0), ("minutes_before", -5)):
        with pytest.raises(ValueError, match="amount"):
            Offset("x", kind, amount)  # type: ignore[arg-type]


instants = st.datetimes(datetime(2026, 1, 1), datetime(2026, 12, 31), timezones=st.just(UTC))


@settings(max_examples=200, deadline=None)
@given(
    instants,
    st.timedeltas(timedelta(0), timedelta(days=10)),
    st.timedeltas(timedelta(0), timedelta(days=10)),
    st.sampled_from([EAST, "America/Phoenix", "Australia/Lord_Howe"]),
)
def test_messages_are_due_in_order_after_the_booking_and_before_the_start(
    booked: datetime, ahead: timedelta, late: timedelta, zone: str
) -> None:
    start, now = booked + ahead, booked + late
    rows = plan((TWO_HOURS, *reversed(DEFAULT_POLICY)), booked, start, now, zone)
    dues = [row.due_time for row in rows]
    assert dues == sorted(dues) and len({row.offset_name for row in rows}) == len(rows)
    assert all(booked <= row.due_time < row.latest_time == start for row in rows)
    assert sum(row.due_time <= now and row.offset_name != "booked" for row in rows) <= 1
    assert (now >= start) == (not rows)
    for row in rows:
        if row.offset_name in ("3d", "1d"):
            before, at = (moment.astimezone(ZoneInfo(zone)) for moment in (row.due_time, start))
            skipped = before.replace(tzinfo=None) != datetime.combine(before.date(), at.time())
            assert not skipped or abs(row.due_time - start) < timedelta(days=4)
            assert (at.date() - before.date()).days in (1, 3)

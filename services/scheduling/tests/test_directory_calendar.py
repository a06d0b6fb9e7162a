"""What the directory's rows say to the calendar's arithmetic: weekdays, days that differ, holidays, zones."""

from datetime import date, time

import pytest

from chassis.errors import FailedPrecondition
from services.scheduling.availability import DateException, WeeklyHours
from services.scheduling.directory import Clinic, Schedule, VisitType


def test_monday_is_one_in_the_contract_and_zero_in_the_arithmetic():
    schedule = Schedule(
        weekly_hours=[
            {"weekday": 1, "start": "09:00", "end": "12:30", "valid_from": "2026-05-01", "visit_type_ids": ["a"]},
            {"weekday": 7, "start": "22:00", "end": "06:00"},
        ],
        exceptions=[
            {"date": "2026-12-24", "kind": "CLOSED"},
            {"date": "2026-12-27", "kind": "EXTRA", "start": "09:00", "end": "11:00"},
        ],
    )
    assert schedule.weekly() == (
        WeeklyHours(0, time(9), time(12, 30), frozenset({"a"}), date(2026, 5, 1)),
        WeeklyHours(6, time(22), time(6)),
    )
    assert schedule.exceptions_() == (
        DateException(date(2026, 12, 24), "closed"),
        DateException(date(2026, 12, 27), "extra", time(9), time(11)),
    )


def test_a_clinic_is_closed_on_its_own_days_and_on_the_holidays_of_its_region():
    clinic = Clinic(time_zone="America/New_York", holiday_region="US-MA", closed_dates=["2026-04-22", "2027-01-04"])
    assert clinic.closed_days(date(2026, 4, 1), date(2026, 4, 30)) == {date(2026, 4, 20), date(2026, 4, 22)}
    clinic.holiday_region = ""
    assert clinic.closed_days(date(2026, 4, 1), date(2026, 4, 30)) == {date(2026, 4, 22)}


def test_a_clinic_without_a_zone_has_no_calendar():
    clinic = Clinic(status="ACTIVE", time_zone="")
    assert not clinic.bookable
    with pytest.raises(FailedPrecondition) as problem:
        clinic.zone  # noqa: B018
    assert problem.value.reason == "CLINIC_WITHOUT_ZONE"


def test_the_grid_is_a_quarter_of_an_hour_unless_it_is_said():
    assert VisitType(id="v", duration_minutes=20).asks.grid == 15
    assert VisitType(id="v", duration_minutes=20, start_grid_minutes=20).asks.grid == 20

"""What is next for a request, worked out by hand."""

from datetime import UTC, date, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduling.next_call import ATTEMPTS, Calendar, failed_in_a_row, is_letter_due, next_step, rank

BOSTON = Calendar("America/New_York", "US-MA")
FRIDAY = datetime(2026, 11, 20, 15, tzinfo=UTC)  # 10:00 in Boston; Thanksgiving is the next Thursday


@pytest.mark.parametrize(
    ("status", "priority", "tries", "due"),
    [
        ("OPEN", "ROUTINE", 0, datetime(2026, 11, 25, 15, tzinfo=UTC)),
        ("OPEN", "ROUTINE", 1, datetime(2026, 11, 24, 15, tzinfo=UTC)),
        ("OPEN", "URGENT", 0, datetime(2026, 11, 23, 15, tzinfo=UTC)),
        ("OPEN", "STAT", 2, FRIDAY + timedelta(hours=1)),
        ("LETTER_DUE", "ROUTINE", 3, datetime(2026, 11, 23, 15, tzinfo=UTC)),
        # Ten business days without Thanksgiving.
        ("LETTER_SENT", "ROUTINE", 3, datetime(2026, 12, 7, 15, tzinfo=UTC)),
    ],
)
def test_a_step_is_due_by_the_clinics_business_days(status, priority, tries, due):
    assert next_step(status, priority, tries, FRIDAY, BOSTON).due == due


def test_what_is_not_wanted_before_a_day_rests_until_two_weeks_before_it():
    step = next_step("OPEN", "ROUTINE", 0, FRIDAY, BOSTON, earliest=date(2027, 3, 1))
    # Two weeks before is Monday, 15 February, a holiday: the first day that counts is Tuesday.
    assert step.due == datetime(2027, 2, 19, 4, 59, 59, tzinfo=UTC)
    assert "two weeks before" in step.basis


def test_a_call_that_the_patient_asked_for_is_due_when_they_asked_for_it():
    at = FRIDAY + timedelta(days=5)
    assert next_step("OPEN", "STAT", 1, FRIDAY, BOSTON, call_back=at) == ("call again", at, "as the patient asked")


def test_nothing_is_due_after_the_latest_day_wished():
    step = next_step("OPEN", "ROUTINE", 0, FRIDAY, BOSTON, latest=date(2026, 11, 21))
    assert step.due == datetime(2026, 11, 22, 4, 59, 59, tzinfo=UTC)
    assert next_step("OPEN", "ROUTINE", 0, FRIDAY, BOSTON, latest=date(2026, 1, 1)).due == FRIDAY


def test_a_patient_who_was_reached_is_called_three_times_more_before_a_letter():
    assert not is_letter_due(["NO_ANSWER", "VOICEMAIL", "REACHED", "NO_ANSWER", "WRONG_NUMBER"])
    assert is_letter_due(["REACHED", "NO_ANSWER", "WRONG_NUMBER", "VOICEMAIL"])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["REACHED", "VOICEMAIL", "NO_ANSWER", "WRONG_NUMBER"]), max_size=9))
def test_a_letter_is_due_exactly_where_the_last_three_tries_failed(outcomes):
    assert is_letter_due(outcomes) == (len(outcomes) >= ATTEMPTS and "REACHED" not in outcomes[-ATTEMPTS:])
    assert failed_in_a_row(outcomes) <= len(outcomes)


def test_what_is_more_urgent_comes_first():
    assert sorted(["ROUTINE", "STAT", "URGENT", "ASAP"], key=rank) == ["STAT", "ASAP", "URGENT", "ROUTINE"]

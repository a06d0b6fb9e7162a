"""Rules on who can have a visit, by what is known of a patient."""

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduling.eligibility import NOTHING, Facts, age_days, needs_facts, refusals


def against(rule, facts=NOTHING, *, new=True, referral=False, payer="", day=date(2027, 6, 15)):
    return refusals(rule, facts, new_patient=new, referral=referral, payer=payer, day=day)


def test_each_rule_refuses_for_its_own_reason():
    assert against({"patients": "NEW"}, new=False) == ["NEW_ONLY"]
    assert against({"patients": "ESTABLISHED"}) == ["ESTABLISHED_ONLY"]
    assert against({"referral_required": True}) == ["REFERRAL"]
    assert against({"sex": "female"}, Facts(sex="male")) == ["SEX"]
    assert against({"payers": ["medicare"]}, payer="acme") == ["PAYER"]
    assert against({"minimum_age": 65}, Facts("1970-01-01")) == ["AGE"]
    assert against({"patients": "ESTABLISHED", "minimum_age": 3, "sex": "male"}, Facts("2026", "female")) == [
        "ESTABLISHED_ONLY", "AGE", "SEX",
    ]  # fmt: skip


def test_what_is_not_known_excludes_nobody_save_a_missing_referral():
    rule = {"minimum_age": 18, "maximum_age": 20, "sex": "male", "payers": ["x"], "referral_required": True}
    assert against(rule) == ["REFERRAL"]
    assert against(rule, Facts("", "unknown"), referral=True) == []
    assert against({"sex": "male"}, Facts(sex="other")) == []
    assert against(None) == [] and against({}) == []


def test_the_birthday_itself_counts_and_a_year_alone_may_be_any_day_of_it():
    assert age_days({"minimum_age": 18}, "2009-06-15")[0] == date(2027, 6, 15)
    assert age_days({"maximum_age": 17}, "2009-06-15")[1] == date(2027, 6, 14)
    assert age_days({"maximum_age": 0}, "2026-02-28")[1] == date(2027, 2, 27)
    assert age_days({"minimum_age": 18, "maximum_age": 18}, "2009") == (date(2027, 1, 1), date(2028, 12, 30))
    assert age_days({"minimum_age": 18}, "2009-06")[0] == date(2027, 6, 1)


def test_who_was_born_on_the_29th_of_february_comes_of_age_on_the_1st_of_march():
    assert age_days({"minimum_age": 18}, "2008-02-29")[0] == date(2026, 3, 1)
    assert age_days({"minimum_age": 20}, "2008-02-29")[0] == date(2028, 2, 29)


def test_patients_is_asked_only_where_a_rule_needs_it():
    assert not needs_facts(None) and not needs_facts({"patients": "NEW", "referral_required": True, "payers": ["x"]})
    assert needs_facts({"minimum_age": 1}) and needs_facts({"maximum_age": 0}) and needs_facts({"sex": "male"})


@settings(max_examples=60, deadline=None)
@given(st.dates(date(1930, 1, 1), date(2026, 1, 1)), st.integers(1, 90), st.dates(date(2026, 1, 1), date(2031, 1, 1)))
def test_the_days_are_those_on_which_somebody_is_so_old(born, age, day):
    years = day.year - born.year - ((day.month, day.day) < (born.month, born.day))
    first, last = age_days({"minimum_age": age, "maximum_age": age}, born.isoformat())
    assert (first <= day <= last) == (years == age)


@pytest.mark.parametrize("written", ["9999-12-31", "0001", "1900-02"])
def test_odd_birth_dates_break_nothing(written):
    age_days({"minimum_age": 150, "maximum_age": 150}, written)

"""Which other time suits a visit best, and when it may be taken without asking."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduling.moving import NONE, Limits, Place, Wishes, cost, fits, may_move, ranked

HOUR, DAY = 3600, 86_400
MONDAY = 1_799_676_000  # 2027-01-11 09:00 in Boston
VISIT = Place(MONDAY, MONDAY + HOUR // 2, "c1", "dr", "America/New_York")


def at(days=0, hours=0.0, practitioner="dr", clinic="c1"):
    start = MONDAY + days * DAY + int(hours * HOUR)
    return Place(start, start + HOUR // 2, clinic, practitioner, "America/New_York")


def test_nobody_is_moved_without_having_allowed_it():
    assert not may_move(VISIT, at(1), NONE)


def test_the_limits_of_what_a_patient_allows_hold_to_the_day():
    wishes = Wishes(may_be_moved=Limits(7))
    assert may_move(VISIT, at(7, 5), wishes) and not may_move(VISIT, at(8), wishes)
    strict = Wishes(may_be_moved=Limits(7, same_practitioner=True, same_clinic=True))
    assert may_move(VISIT, at(1), strict)
    assert not may_move(VISIT, at(1, practitioner="other"), strict) and not may_move(VISIT, at(1, clinic="c2"), strict)


def test_who_can_only_come_on_fridays_is_not_moved_to_a_tuesday():
    wishes = Wishes(weekdays=frozenset({5}), earliest="09:00", latest="10:00", may_be_moved=Limits(30))
    assert not may_move(VISIT, at(1), wishes)
    assert may_move(VISIT, at(4), wishes) and not may_move(VISIT, at(4, 1), wishes)


def test_one_waits_a_week_for_the_own_practitioner_rather_than_see_another():
    assert ranked(VISIT, [at(0, 1, "other"), at(7)], NONE) == [at(7), at(0, 1, "other")]
    # But not where the other one is as welcome.
    welcome = Wishes(practitioner_ids=frozenset({"other"}))
    assert ranked(VISIT, [at(0, 1, "other"), at(7)], welcome)[0] == at(0, 1, "other")


places = st.builds(
    at,
    st.integers(0, 40),
    st.sampled_from([0, 1, 4.5, -1]),
    st.sampled_from(["dr", "other"]),
    st.sampled_from(["c1", "c2"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(places, max_size=8), st.sets(st.integers(1, 7)), st.booleans())
def test_the_parts_of_a_cost_sum_up_and_the_order_is_theirs(options, weekdays, welcome):
    wishes = Wishes(weekdays=frozenset(weekdays), practitioner_ids=frozenset({"other"} if welcome else ()))
    order = ranked(VISIT, options, wishes)
    sums = [sum(cost(VISIT, one, wishes)) for one in order]
    assert sums == sorted(sums) and set(order) == set(options)
    assert all(part >= 0 for one in order for part in cost(VISIT, one, wishes))
    assert all((cost(VISIT, one, wishes).wishes == 0) == fits(one, wishes) for one in order)
    assert ranked(VISIT, reversed(options), wishes) == order
    assert not any(may_move(VISIT, one, replace(wishes, may_be_moved=None)) for one in order)

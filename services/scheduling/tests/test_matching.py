"""Who is offered a freed slot, worked out without a database."""

from datetime import UTC, datetime, time, timedelta
from zoneinfo import ZoneInfo

from hypothesis import given, settings
from hypothesis import strategies as st

from services.scheduling.matching import (
    BANDS,
    SHIPPED,
    Rules,
    Slot,
    Wish,
    answer_by,
    misfits,
    offered_from,
    ranked,
    score,
)

NOW = datetime(2027, 3, 10, 15, 0, tzinfo=UTC)
START = datetime(2027, 3, 16, 14, 0, tzinfo=UTC)  # a Tuesday, 10:00 in New York
SLOT = Slot("visit", "clinic", "doctor", START, START + timedelta(minutes=30), "America/New_York")
RULES = Rules(timedelta(hours=4), timedelta(hours=2), timedelta(minutes=15), time(9), time(19))


def wish(entry="a", waited=10, **more):
    values = {"visit_type_id": "visit", "priority": "ROUTINE", "until": NOW + timedelta(days=90), **more}
    return Wish(entry, since=NOW - timedelta(days=waited), **values)


wishes = st.builds(
    wish,
    st.sampled_from("abcdef"),
    st.integers(0, 400),
    visit_type_id=st.sampled_from(["visit", "other"]),
    priority=st.sampled_from(list(BANDS)),
    clinic_ids=st.lists(st.sampled_from(["clinic", "elsewhere"]), unique=True),
    practitioner_ids=st.lists(st.sampled_from(["doctor", "other"]), unique=True),
    weekdays=st.lists(st.integers(1, 7), unique=True),
    skips=st.integers(0, 12),
)
weights = st.fixed_dictionaries(
    {
        **{name: st.integers(0, 2000) for name in ("weight_priority", "weight_wait", "weight_fit", "weight_skip")},
        "full_wait_days": st.integers(0, 365),
        "skips_at_most": st.integers(0, 10),
    }
)


@settings(max_examples=80, deadline=None)
@given(wishes, weights)
def test_the_parts_of_a_score_sum_up_to_it(one, weighed):
    found = score(one, SLOT, NOW, weighed)
    assert set(found.parts) == {"priority", "wait", "fit", "skips"}
    assert found.total == sum(found.parts.values())
    assert all(isinstance(points, int) for points in found.parts.values())
    assert found.parts["skips"] <= 0 <= min(found.parts[name] for name in ("priority", "wait", "fit"))


@settings(max_examples=80, deadline=None)
@given(st.lists(wishes, max_size=12))
def test_a_slot_is_never_offered_for_another_visit_type_and_the_best_come_first(them):
    """cal.diy#10616, canvas#446: a waitlist that fills a slot with whatever waits is no waitlist."""
    best = ranked(them, SLOT, NOW)
    assert all(one.wish.visit_type_id == "visit" and not misfits(one.wish, SLOT, NOW) for one in best)
    assert [one.score.total for one in best] == sorted((one.score.total for one in best), reverse=True)
    assert len(best) == sum(not misfits(one, SLOT, NOW) for one in them)


@settings(max_examples=80, deadline=None)
@given(wishes, wishes)
def test_with_the_shipped_weights_no_wait_outweighs_a_higher_band(one, other):
    """canvas#446: priority band first, then the oldest."""
    if BANDS[one.priority] > BANDS[other.priority]:
        assert score(one, SLOT, NOW).total > score(other, SLOT, NOW).total


def test_who_waited_longer_comes_first_within_a_band():
    best = ranked([wish("new", 2), wish("old", 20), wish("older", 60)], SLOT, NOW)
    assert [one.wish.entry_id for one in best] == ["older", "old", "new"]


def test_changed_weights_change_the_order():
    them = [
        wish("patient", 80, skips=3),
        wish("fitting", 5, practitioner_ids=["doctor"]),
        wish("urgent", 1, priority="URGENT"),
    ]
    orders = {
        name: [one.wish.entry_id for one in ranked(them, SLOT, NOW, {**SHIPPED, **changed})]
        for name, changed in {
            "shipped": {},
            "wait": {"weight_priority": 0},
            "skips": {"weight_priority": 0, "weight_skip": 500},
        }.items()
    }
    assert orders["shipped"] == ["urgent", "patient", "fitting"]
    assert orders["wait"] == ["patient", "fitting", "urgent"]
    assert orders["skips"] == ["fitting", "urgent", "patient"]


def test_the_clinic_named_first_fits_better():
    first = score(wish(clinic_ids=["clinic", "elsewhere"]), SLOT, NOW).parts["fit"]
    second = score(wish(clinic_ids=["elsewhere", "clinic"]), SLOT, NOW).parts["fit"]
    assert first == 300 and second == 150


def test_each_wish_rules_out_what_it_says():
    ruled_out = {
        "visit_type": {"visit_type_id": "other"},
        "clinic": {"clinic_ids": ["elsewhere"]},
        "practitioner": {"practitioner_ids": ["other"]},
        "weekday": {"weekdays": [1, 3]},
        "time_of_day": {"latest_time": "10:29"},
        "date": {"earliest_date": "2027-03-17"},
        "not_earlier": {"before": START},
        "expired": {"until": NOW},
    }
    assert misfits(wish(), SLOT, NOW) == ()
    for name, values in ruled_out.items():
        assert misfits(wish(**values), SLOT, NOW) == (name,)
    fitting = {"weekdays": [2], "earliest_time": "10:00", "latest_time": "10:30", "latest_date": "2027-03-16"}
    assert misfits(wish(**fitting, before=START + timedelta(days=1)), SLOT, NOW) == ()


def test_wishes_are_by_the_clinics_clock():
    """Late on Monday in Honolulu is Tuesday in UTC."""
    start = datetime(2027, 3, 16, 3, 0, tzinfo=UTC)
    evening = SLOT._replace(start=start, end=start + timedelta(minutes=30), zone="Pacific/Honolulu")
    assert misfits(wish(weekdays=[1], latest_date="2027-03-15", earliest_time="17:00"), evening, NOW) == ()
    assert misfits(wish(weekdays=[2]), evening, NOW) == ("weekday",)


@settings(max_examples=100, deadline=None)
@given(st.integers(-600, 6000), st.integers(0, 1440), st.integers(1, 600), st.integers(1, 120))
def test_no_offer_can_be_accepted_within_the_lock_out(ahead, lockout, standing, shortest):
    """MGMA: no slot of a complex visit is filled at the last minute."""
    minute = timedelta(minutes=1)
    slot = SLOT._replace(start=NOW + ahead * minute, end=NOW + (ahead + 30) * minute)
    rules = RULES._replace(lockout=lockout * minute, standing=standing * minute, shortest=shortest * minute)
    until = answer_by(slot, NOW, rules)
    if until is None:
        assert ahead - lockout < min(shortest, standing)
    else:
        assert NOW < until <= slot.start - rules.lockout and until - NOW <= rules.standing


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 60 * 24 * 200), st.sampled_from(["America/New_York", "Pacific/Honolulu", "Australia/Lord_Howe"]))
def test_offers_are_made_by_day_in_the_clinics_zone(minutes, zone):
    now = datetime(2027, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)
    at = offered_from(now, zone, RULES)
    assert time(9) <= at.astimezone(ZoneInfo(zone)).time() <= time(19)
    assert now <= at <= now + timedelta(hours=15)
    assert offered_from(now, zone, RULES._replace(opens=time(0), closes=time(0))) == now

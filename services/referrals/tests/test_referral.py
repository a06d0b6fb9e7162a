"""What follows from a referral's state and visits alone."""

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from care.referrals.v1 import referrals_pb2 as pb

from chassis.ids import new_id
from services.referrals import clocks
from services.referrals.projections import Pool, best_pool
from services.referrals.referral import (
    CLOSED_STATES,
    FHIR_STATUS,
    FOLLOWING,
    OPEN_STATES,
    Referral,
    ReferralVisit,
    State,
    standing,
)

START = datetime(2026, 5, 4, 14, tzinfo=UTC)


def test_fhirs_status_is_a_function_of_every_state():
    assert set(FHIR_STATUS) == set(State)
    assert {state.name for state in State} == set(pb.Referral.BusinessStatus.Code.keys()) - {"CODE_UNSPECIFIED"}
    assert set(FHIR_STATUS.values()) <= set(pb.Referral.Status.keys())
    for state in State:
        assert Referral(business_status=state).status == FHIR_STATUS[state]
    assert {FHIR_STATUS[state] for state in CLOSED_STATES} == {"REVOKED", "COMPLETED"}
    assert {FHIR_STATUS[state] for state in OPEN_STATES} == {"DRAFT", "ACTIVE"}


def test_every_open_state_has_a_clock_and_a_way_out_and_no_closed_one_has():
    for state in OPEN_STATES:
        assert {key[0] for key in clocks.DEFAULT_CLOCKS} >= {state.name}
        assert any(state in arrow.sources for arrow in Referral.lifecycle)
    for state in CLOSED_STATES:
        assert not any(state in arrow.sources for arrow in Referral.lifecycle)
        assert state.name not in {key[0] for key in clocks.DEFAULT_CLOCKS}


def test_from_each_state_that_follows_visits_there_is_a_way_to_each_other():
    to = {arrow.target: set() for arrow in Referral.lifecycle}
    for arrow in Referral.lifecycle:
        to[arrow.target].update(arrow.sources)
    for one, other in itertools.permutations(FOLLOWING, 2):
        assert one in to[other], (one, other)


def visit(status, hours=0):
    return ReferralVisit(
        id=new_id(),
        status=status,
        start_time=START + timedelta(hours=hours),
        end_time=START + timedelta(hours=hours + 1),
    )


@pytest.mark.parametrize(
    ("statuses", "state", "attempts"),
    [
        ([], State.ACCEPTED, 0),
        (["ENTERED_IN_ERROR"], State.ACCEPTED, 0),
        (["RELEASED"], State.ACCEPTED, 0),
        (["PENDING"], State.ACCEPTED, 0),
        (["BOOKED"], State.SCHEDULED, 0),
        (["CHECKED_IN"], State.SCHEDULED, 0),
        (["NOSHOW"], State.UNATTENDED, 1),
        (["CANCELLED", "NOSHOW"], State.UNATTENDED, 2),
        (["NOSHOW", "ARRIVED"], State.SCHEDULED, 1),
        (["CANCELLED", "FULFILLED", "BOOKED"], State.SEEN, 1),
    ],
)
def test_the_visits_say_where_the_loop_stands_in_any_order(statuses, state, attempts):
    for order in itertools.permutations(statuses):
        found = standing([visit(status, number) for number, status in enumerate(order)])
        assert (found.state, found.attempts) == (state, attempts)


def test_of_several_visits_the_next_one_counts():
    near, far = visit("BOOKED", 1), visit("BOOKED", 9)
    assert standing([far, near]).visit is near


def test_the_specialtys_pool_comes_before_the_clinics_and_that_before_one_for_all():
    def pool(specialties=(), clinics=()):
        return Pool(id=new_id(), specialty_codes=list(specialties), clinic_ids=list(clinics))

    everyone, here = pool(), pool(clinics=["here"])
    heart, heart_here = pool(["heart"]), pool(["heart"], ["here"])
    skin, elsewhere = pool(["skin"]), pool(["heart"], ["elsewhere"])
    pools = [everyone, here, heart, heart_here, skin, elsewhere]
    assert best_pool(pools, "here", "heart") is heart_here
    assert best_pool([everyone, here, heart], "here", "heart") is heart
    assert best_pool([everyone, here], "here", "heart") is here
    assert best_pool([everyone, skin], "here", "heart") is everyone
    assert best_pool([skin, elsewhere], "here", "heart") is None

"""Scores, bands and critical answers of the shipped instruments."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.feedback.instruments import CSAT, GAD_7, INSTRUMENTS, NPS, PHQ_2, PHQ_9
from services.feedback.scoring import Score, check, net_promoter_score, score, top_box


def filled(prefix: str, *values: Any) -> dict[str, Any]:
    return {f"{prefix}-{number}": value for number, value in enumerate(values, 1)}


def test_every_shipped_instrument_can_be_scored() -> None:
    for definition in INSTRUMENTS.values():
        check(definition)
        assert score(definition, {}) == Score(None, None, False, [], len(definition["scoring"]["items"]))


@pytest.mark.parametrize(
    ("total", "band"),
    [(0, "minimal"), (4, "minimal"), (5, "mild"), (9, "mild"), (10, "moderate"), (14, "moderate"),
     (15, "moderately-severe"), (19, "moderately-severe"), (20, "severe"), (24, "severe")],
)  # fmt: skip
def test_phq_9_bands(total: int, band: str) -> None:
    answers = filled("phq9", *(min(3, max(0, total - 3 * item)) for item in range(8)), 0)
    assert score(PHQ_9, answers) == Score(total, band, total >= 10, [])


@pytest.mark.parametrize(
    ("total", "band"), [(4, "minimal"), (5, "mild"), (10, "moderate"), (15, "severe"), (21, "severe")]
)
def test_gad_7_bands(total: int, band: str) -> None:
    answers = filled("gad7", *(min(3, max(0, total - 3 * item)) for item in range(7)))
    assert score(GAD_7, answers) == Score(total, band, total >= 10, [])


def test_phq_2_is_positive_from_three_and_not_prorated() -> None:
    assert score(PHQ_2, filled("phq2", 1, 1)).band == "negative"
    assert score(PHQ_2, filled("phq2", 1, 2)) == Score(3, "positive", True, [])
    assert score(PHQ_2, filled("phq2", 1)) == Score(None, None, False, [], 1)


def test_any_thought_of_self_harm_is_critical_whatever_else_was_answered() -> None:
    assert score(PHQ_9, filled("phq9", 0, 0, 0, 0, 0, 0, 0, 0, 1)) == Score(1, "minimal", False, ["phq9-9"])
    assert score(PHQ_9, {"phq9-9": 1}).critical == ["phq9-9"]
    assert score(PHQ_9, {"phq9-9": "several-days"}).critical == ["phq9-9"]
    assert score(PHQ_9, filled("phq9", 3, 3, 3, 3, 3, 3, 3, 3, 0)).critical == []


def test_up_to_two_missing_answers_are_prorated_and_three_are_not() -> None:
    two_missing = score(PHQ_9, filled("phq9", 1, 1, 1, 1, 1, 1, 2))
    assert two_missing == Score(10, "moderate", True, [], 2)  # 8 * 9 / 7 = 10.3
    assert score(GAD_7, filled("gad7", 1, 1, 1, None, 1, 1, None)).total == 7
    assert score(PHQ_9, filled("phq9", 1, 1, 1, 1, 1, 1)).total is None


def test_a_sum_that_no_missing_answer_could_mend_is_bad() -> None:
    assert score(PHQ_9, filled("phq9", 3, 3, 3, 1)) == Score(None, None, True, [], 5)
    assert not score(PHQ_9, filled("phq9", 3, 3, 3)).bad


@pytest.mark.parametrize(("rating", "band", "bad"), [(0, "detractor", True), (6, "detractor", True), (7, "passive", False),
                                                     (8, "passive", False), (9, "promoter", False), (10, "promoter", False)])  # fmt: skip
def test_recommendation(rating: int, band: str, bad: bool) -> None:
    assert score(NPS, {"nps": rating, "comment": "words"}) == Score(rating, band, bad, [])


@pytest.mark.parametrize(("rating", "band", "bad"), [(1, "dissatisfied", True), (2, "dissatisfied", True),
                                                     (3, "neutral", False), (4, "satisfied", False)])  # fmt: skip
def test_satisfaction(rating: int, band: str, bad: bool) -> None:
    assert score(CSAT, {"csat": rating}) == Score(rating, band, bad, [])


def test_a_wrong_answer_is_named_by_its_question_and_never_repeated() -> None:
    for wrong in (4, -1, "surely-not", True, float("nan"), [77]):
        with pytest.raises(ValueError, match="phq9-9") as refusal:
            score(PHQ_9, {"phq9-9": wrong})
        assert str(wrong) not in str(refusal.value).replace("from 0 to 3", "")


def test_a_questionnaire_without_scoring_has_no_score() -> None:
    assert score({"items": []}, {"a": 1}) == Score(None, None, False, [])


@pytest.mark.parametrize(
    "change",
    [{"items": []}, {"items": ["gone"]}, {"method": "median"}, {"minimum": 3}, {"bad": {"over": 1}},
     {"bands": [{"name": "a", "from": 5}, {"name": "b", "from": 1}]}, {"critical": [{"link_id": "gone", "above": 0}]}],
)  # fmt: skip
def test_scoring_that_could_not_work_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="scoring|bands"):
        check({**PHQ_9, "scoring": {**PHQ_9["scoring"], **change}})


def test_shares_over_many_answers() -> None:
    assert net_promoter_score([10, 9, 8, 0]) == 25
    assert top_box([5, 4, 3, 1]) == 50
    assert net_promoter_score([]) is None and top_box([]) is None


answers_9 = st.lists(st.one_of(st.none(), st.integers(0, 3)), min_size=9, max_size=9)


@settings(max_examples=150, deadline=None)
@given(answers_9, st.integers(0, 8))
def test_a_total_lies_in_range_and_never_falls_when_an_answer_rises(values: list[int | None], item: int) -> None:
    before = score(PHQ_9, filled("phq9", *values))
    missing = values.count(None)
    assert before.missing == missing and (before.total is None) == (missing > 2)
    assert before.total is None or (0 <= before.total <= 27 and before.band is not None)
    assert (before.critical == ["phq9-9"]) == bool(values[8])
    given_answer = values[item]
    if given_answer is not None and given_answer < 3:
        after = score(PHQ_9, filled("phq9", *(v if n != item else given_answer + 1 for n, v in enumerate(values))))
        assert (after.total or 0) >= (before.total or 0) and after.bad >= before.bad

"""Questionnaires as content: what can't be asked or graded is refused, shipped instruments fit."""

from typing import Any

import pytest
from care.feedback.v1 import feedback_pb2 as pb

from chassis.errors import Invalid
from chassis.wire import given
from services.feedback.grading import Grade
from services.feedback.instruments import INSTRUMENTS, as_questionnaire
from services.feedback.questionnaire import Questionnaire


def written(code: str = "csat", **more: Any) -> Questionnaire:
    message = pb.Questionnaire(**{**as_questionnaire(code), **more})
    values = {"title": {}, "scoring": {}, "crisis_help": {}, **given(message)}
    values.pop("status", None)
    return Questionnaire(**values)


@pytest.mark.parametrize("code", sorted(INSTRUMENTS))
def test_every_shipped_instrument_is_a_questionnaire(code: str) -> None:
    written(code, crisis_help={"en": "Help"}).check()


def choice(link_id: str, *values: int, **more: Any) -> pb.Questionnaire.Item:
    return pb.Questionnaire.Item(link_id=link_id, kind="CHOICE", options=[{"value": value} for value in values], **more)


def scale(*values: int) -> pb.Questionnaire.Item:
    return pb.Questionnaire.Item(link_id="a", kind="SCALE", options=[{"value": value} for value in values])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"items": [choice("a", 1, 2), choice("a", 1, 2)]}, "questionnaire.items[1].link_id"),
        ({"items": [choice("a", 1)]}, "questionnaire.items[0].options"),
        ({"items": [choice("a", 1, 1)]}, "questionnaire.items[0].options"),
        ({"items": [scale(5, 1)]}, "questionnaire.items[0].options"),
        ({"items": [scale(0, 101)]}, "questionnaire.items[0].options"),
        ({"items": [pb.Questionnaire.Item(link_id="a", kind="TEXT", options=[{}])]}, "questionnaire.items[0]"),
        ({"scoring": {"method": "csat", "link_ids": ["nowhere"]}}, "questionnaire.scoring"),
        ({"scoring": {"method": "csat", "link_ids": ["csat", "csat"]}}, "questionnaire.scoring"),
        ({"scoring": {"method": "phq-2"}}, "questionnaire.scoring"),
        ({"scoring": {"method": "nps"}}, "questionnaire.scoring"),
        ({"items": [pb.Questionnaire.Item(link_id="a", kind="TEXT")], "scoring": {"method": "sum"}}, "questionnaire.scoring"),
    ],
)  # fmt: skip
def test_a_questionnaire_that_could_not_be_asked_is_refused(change: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as refused:
        written(**change).check()
    assert (refused.value.reason, refused.value.metadata["field"]) == ("QUESTIONNAIRE_INVALID", field)


def test_self_harm_is_critical_even_where_the_author_forgot_it() -> None:
    forgetful = written("phq-9")
    for item in forgetful.items:
        item.pop("critical_from", None)
    with pytest.raises(Invalid, match="CRITICAL_WITHOUT_COVER"):
        forgetful.check()
    assert forgetful.grade([{"link_id": "phq9-9", "value": 1}]).critical_link_ids == ["phq9-9"]


def test_a_critical_answer_counts_without_any_scoring() -> None:
    unscored = written(items=[choice("safe", 0, 1, critical_from=1)], scoring={}, crisis_help={"en": "Help"})
    unscored.check()
    assert unscored.grade([{"link_id": "safe", "value": 1}]) == Grade(None, "", False, ["safe"])
    assert unscored.grade([{"link_id": "safe", "value": 0}]) == Grade(None, "", False, [])


def test_low_is_bad_for_satisfaction_and_high_for_sums() -> None:
    assert written("csat").grade([{"link_id": "csat", "value": 2}]) == Grade(2, "dissatisfied", True, [])
    assert written("csat").grade([{"link_id": "csat", "value": 3}]) == Grade(3, "neutral", False, [])
    assert written("nps").grade([{"link_id": "nps", "value": 6}]) == Grade(6, "detractor", True, [])
    total = written(items=[choice("a", 0, 2), choice("b", 0, 2)], scoring={"method": "sum", "bad_at": 3})
    assert total.grade([{"link_id": "a", "value": 2}, {"link_id": "b", "value": 2}]) == Grade(4, "", True, [])
    assert total.grade([{"link_id": "a", "value": 2}]) == Grade(None, "", False, [])


def test_a_required_question_may_not_be_left_out_or_blank() -> None:
    asked = written(items=[pb.Questionnaire.Item(link_id="why", kind="TEXT", required=True)], scoring={})
    for answers in ([], [{"link_id": "why", "text": "  "}]):
        with pytest.raises(Invalid) as refused:
            asked.taken(answers)
        assert refused.value.metadata == {"link_id": "why"}
    assert asked.taken([{"link_id": "why", "text": " well "}]) == [{"link_id": "why", "text": "well"}]


@pytest.mark.parametrize(
    ("wished", "found"),
    [(["es-MX"], "es"), (["de", "zh-Hant"], "zh-Hant"), (["de"], "en"), ([], "en"), ([""], "en")],
)
def test_the_page_is_in_the_first_wished_language_that_there_is(wished: list[str], found: str) -> None:
    asked = written(title={"en": "A", "es": "B", "zh-Hant": "C"})
    assert asked.language_for(wished) == found
    assert written(title={"es": "B"}).language_for(["de"]) == "es"

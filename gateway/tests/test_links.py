"""Survey pages: readable without JavaScript, in two languages, and quick with help."""

import html
import re
from typing import Any

import pytest
from care.feedback.v1 import feedback_pb2

from chassis.errors import Aborted, FailedPrecondition, Invalid, NotFound, Problem, Unavailable
from gateway.links import TEXTS, accepted_languages, in_language
from gateway.tests.conftest import World

TOKEN = "s-Zm9vYmFyYmF6cXV4MTIzNA"
LOOK = "care.feedback.v1.SurveyLinksService/GetSurveyByLink"
ANSWER = "care.feedback.v1.SurveyLinksService/AnswerSurveyByLink"
Item = feedback_pb2.Questionnaire.Item


def survey(language: str = "en", **more: Any) -> feedback_pb2.SurveyByLink:
    page = feedback_pb2.SurveyByLink(language=language, **more)
    asked = page.questionnaire
    asked.title["en"], asked.title["es"] = "Your <visit>", "Su visita"
    asked.crisis_help["en"] = "You are not alone."
    mood = asked.items.add(link_id="mood", kind=Item.CHOICE, required=True)
    mood.text["en"], mood.text["es"] = "How do you feel?", "¿Cómo se siente?"
    for value, word in ((0, "Well"), (3, "Badly")):
        mood.options.add(value=value).text["en"] = word
    score = asked.items.add(link_id="nps", kind=Item.SCALE)
    score.text["en"] = "Would you recommend us?"
    for value, word in ((0, "No"), (10, "Yes")):
        score.options.add(value=value).text["en"] = word
    asked.items.add(link_id="why", kind=Item.TEXT).text["en"] = "Why?"
    return page


@pytest.fixture
def asked(world: World) -> list[Any]:
    """Requests that feedback got; it shows the survey and takes every answer."""
    requests: list[Any] = []

    async def look(request: Any, metadata: dict[str, str]) -> Any:
        assert metadata["authorization"].startswith("Bearer ")
        requests.append(request)
        return survey("es" if "es" in request.languages else "en")

    async def answer(request: Any, metadata: dict[str, str]) -> Any:
        requests.append(request)
        return survey(request.language, answered=True, critical=any(each.value == 3 for each in request.answers))

    world.services["feedback"].answers |= {LOOK: look, ANSWER: answer}
    del world.http.headers["authorization"]
    return requests


async def test_a_survey_is_a_form_that_works_without_javascript(world: World, asked: list[Any]) -> None:
    page = await world.http.get(f"/p/{TOKEN}")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["cache-control"] == "no-store"
    assert "frame-ancestors 'none'" in page.headers["content-security-policy"]
    assert "script" not in page.text
    assert '<html lang="en">' in page.text
    assert "Your &lt;visit&gt;" in page.text
    assert page.text.count("<fieldset") == page.text.count("<legend>") == 2
    assert len(re.findall(r'type="radio" name="answer.nps.value"', page.text)) == 11
    assert re.search(
        r'<label class="label" for="text-3">.*<textarea id="text-3" name="answer.why.text"', page.text, re.S
    )
    assert 'role="alert"' not in page.text
    assert [type(each).__name__ for each in asked] == ["GetSurveyByLinkRequest"]


async def test_the_page_speaks_the_visitors_language(world: World, asked: list[Any]) -> None:
    page = await world.http.get(f"/p/{TOKEN}", headers={"accept-language": "es-MX,es;q=0.9,en;q=0.5"})
    assert list(asked[0].languages) == ["es-MX", "es", "en"]
    assert '<html lang="es">' in page.text
    assert TEXTS["es"]["send"] in page.text
    assert "¿Cómo se siente?" in page.text


async def test_answers_are_taken_from_a_plain_form(world: World, asked: list[Any]) -> None:
    form = {
        "language": "en",
        "answer.mood.value": "0",
        "answer.nps.value": "",
        "answer.why.text": "Quick\r\nand kind",
        "other": "x",
    }
    page = await world.http.post(f"/p/{TOKEN}", data=form)
    assert page.status_code == 200
    assert TEXTS["en"]["answered"] in page.text
    assert 'role="alert"' not in page.text
    (request,) = asked
    assert [(each.link_id, each.HasField("value"), each.value, each.text) for each in request.answers] == [
        ("mood", True, 0, ""),
        ("why", False, 0, "Quick\nand kind"),
    ]


async def test_a_critical_answer_shows_help_on_the_very_page(world: World, asked: list[Any]) -> None:
    page = await world.http.post(f"/p/{TOKEN}", data={"language": "en", "answer.mood.value": "3"})
    assert page.text.index('role="alert"') < page.text.index("<h1>")
    for word in ("You are not alone.", "988", "911", 'href="tel:988"'):
        assert word in page.text


async def test_answers_that_cannot_be_taken_come_back_with_what_was_typed(world: World, asked: list[Any]) -> None:
    async def refuse(request: Any, metadata: dict[str, str]) -> Any:
        raise Invalid("ANSWER_INVALID", "x", link_id="mood")

    world.services["feedback"].answers[ANSWER] = refuse
    page = await world.http.post(f"/p/{TOKEN}", data={"language": "en", "answer.why.text": "<b>hm</b>"})
    assert page.status_code == 400
    assert "&lt;b&gt;hm&lt;/b&gt;</textarea>" in page.text
    assert html.escape(TEXTS["en"]["check"]) in page.text
    assert 'class="wrong" aria-describedby="why-1"' in page.text


@pytest.mark.parametrize(
    ("problem", "status", "words"),
    [
        (NotFound("LINK_UNKNOWN", "x"), 404, "unknown"),
        (FailedPrecondition("LINK_EXPIRED", "x"), 410, "expired"),
        (Aborted("ALREADY_ANSWERED", "x"), 409, "taken"),
        (Unavailable("DATABASE_UNAVAILABLE", "x"), 503, "away"),
    ],
)
async def test_whatever_goes_wrong_is_a_friendly_page(
    world: World, asked: list[Any], problem: Problem, status: int, words: str
) -> None:
    async def refuse(request: Any, metadata: dict[str, str]) -> Any:
        raise problem

    world.services["feedback"].answers |= {LOOK: refuse, ANSWER: refuse}
    for answer in (
        await world.http.get(f"/p/{TOKEN}", headers={"accept-language": "es"}),
        await world.http.post(f"/p/{TOKEN}", data={"language": "es"}, headers={"accept-language": "es"}),
    ):
        assert answer.status_code == status
        assert html.escape(TEXTS["es"][f"{words}_text"]) in answer.text
        assert '<html lang="es">' in answer.text


@pytest.mark.parametrize("token", ["x", "s-", "x-Zm9vYmFyYmF6cXV4MTIzNA", "s-" + "a" * 200, "s-abc%20defghij", "s-a/b"])
async def test_tokens_of_nobody_ask_no_service(world: World, asked: list[Any], token: str) -> None:
    assert (await world.http.get(f"/p/{token}")).status_code == 404
    assert asked == []


async def test_a_link_is_nowhere_in_logs_and_spans(world: World, asked: list[Any]) -> None:
    await world.http.get(f"/p/{TOKEN}")
    await world.http.post(f"/p/{TOKEN}", data={"answer.why.text": "secret words"})
    said = world.log.getvalue() + "".join(span.to_json() for span in world.spans.get_finished_spans())
    assert TOKEN not in said
    assert "secret" not in said
    assert {line["route"] for line in world.lines() if line["event"] == "request"} == {"/p/{token}"}


async def test_only_forms_are_taken(world: World, asked: list[Any]) -> None:
    assert (await world.http.post(f"/p/{TOKEN}", json={})).status_code == 415
    assert (await world.http.delete(f"/p/{TOKEN}")).headers["allow"] == "GET, HEAD, POST"
    assert asked == []
    shouted = {"content-type": "Application/X-WWW-Form-URLencoded; charset=UTF-8"}
    assert (await world.http.post(f"/p/{TOKEN}", content=b"language=en", headers=shouted)).status_code != 415


def test_languages_are_read_by_preference() -> None:
    assert accepted_languages({"accept-language": "en;q=0.3, es-US, *;q=0.1, fr;q=0, de;q=0.7, <x>"}) == [
        "es-US",
        "de",
        "en",
    ]


def test_a_text_is_found_in_the_nearest_language() -> None:
    texts = {"en": "Hello", "es": "Hola"}
    assert [in_language(texts, each) for each in ("es-MX", "fr", "en")] == ["Hola", "Hello", "Hello"]
    assert in_language({"zh": "你好"}, "fr") == "你好"
    assert in_language({}, "en") == ""


def test_every_language_has_every_word() -> None:
    assert TEXTS["es"].keys() == TEXTS["en"].keys()

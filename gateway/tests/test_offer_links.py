"""Pages of offered times: time and place, two buttons, and plain words once it is over."""

import html
from typing import Any

import pytest
from care.scheduling.v1 import waitlist_pb2 as pb

from chassis.errors import AlreadyExists, FailedPrecondition, Invalid, NotFound, Problem
from gateway.links import TEXTS
from gateway.tests.conftest import World

TOKEN = "w-Zm9vYmFyYmF6cXV4MTIzNA"
LOOK = "care.scheduling.v1.WaitlistLinksService/GetWaitlistOfferByLink"
ANSWER = "care.scheduling.v1.WaitlistLinksService/AnswerWaitlistOfferByLink"
_FORM = {"content-type": "application/x-www-form-urlencoded"}


def offer(status: str = "OPEN") -> pb.WaitlistOfferByLink:
    shown = pb.WaitlistOfferByLink(
        status=status,
        time_zone="America/Chicago",
        clinic="Lakefield <1>",
        phone="+12175550100",
    )
    shown.start_time.FromJsonString("2027-03-16T15:00:00Z")
    shown.expire_time.FromJsonString("2027-03-12T20:30:00Z")
    return shown


@pytest.fixture
def asked(world: World) -> list[Any]:
    """Requests that scheduling got; it shows the offer and takes every answer."""
    requests: list[Any] = []

    async def look(request: Any, _metadata: dict[str, str]) -> Any:
        requests.append(request)
        return offer()

    async def answer(request: Any, _metadata: dict[str, str]) -> Any:
        requests.append(request)
        return offer("ACCEPTED" if request.accept else "DECLINED")

    world.services["scheduling"].answers |= {LOOK: look, ANSWER: answer}
    del world.http.headers["authorization"]
    return requests


async def test_an_offer_shows_time_and_place_and_looking_answers_nothing(world: World, asked: list[Any]) -> None:
    for _ in range(2):
        page = await world.http.get(f"/p/{TOKEN}")
        assert page.status_code == 200 and page.headers["referrer-policy"] == "no-referrer"
        assert page.headers["cache-control"] == "no-store" and "script" not in page.text
        assert "Tuesday, March 16, 2027, 10:00 AM CDT" in page.text and "Lakefield &lt;1&gt;" in page.text
        assert "March 12, 2027, 2:30 PM CST" in page.text
        assert page.text.count('<button type="submit" name="answer"') == 2
    assert {type(each).__name__ for each in asked} == {"GetWaitlistOfferByLinkRequest"}


async def test_an_answer_is_given_by_a_plain_form(world: World, asked: list[Any]) -> None:
    yes = await world.http.post(f"/p/{TOKEN}", content="answer=accept", headers={**_FORM, "accept-language": "es"})
    no = await world.http.post(f"/p/{TOKEN}", content="answer=decline", headers=_FORM)
    assert TEXTS["es"]["offer_ACCEPTED"] in yes.text and "<form" not in yes.text and "16 de marzo de 2027" in yes.text
    assert TEXTS["en"]["offer_DECLINED"] in no.text
    assert [each.accept for each in asked] == [True, False]
    assert (await world.http.post(f"/p/{TOKEN}", content="answer=maybe", headers=_FORM)).status_code == 400
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("problem", "status", "words"),
    [
        (FailedPrecondition("LINK_EXPIRED", "Over.", kind="waitlist"), 410, "offer_over"),
        (AlreadyExists("OFFER_ANSWERED", "Before."), 409, "offer_taken"),
        (NotFound("LINK_UNKNOWN", "None."), 404, "unknown"),
        (Invalid("FIELD_INVALID", "No."), 400, "unknown"),
    ],
)
async def test_what_is_over_is_said_in_plain_words(
    world: World, asked: list[Any], problem: Problem, status: int, words: str
) -> None:
    async def refuse(_request: Any, _metadata: dict[str, str]) -> Any:
        raise problem

    world.services["scheduling"].answers |= {LOOK: refuse, ANSWER: refuse}
    for page in (
        await world.http.get(f"/p/{TOKEN}"),
        await world.http.post(f"/p/{TOKEN}", content="answer=accept", headers=_FORM),
    ):
        assert page.status_code == status and TEXTS["en"][words] in html.unescape(page.text)

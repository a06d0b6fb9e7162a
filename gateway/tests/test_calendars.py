"""Calendar feeds over HTTP: a file for calendar programs, without a login, and the same answer for every link that isn't."""

from typing import Any

import pytest
from care.scheduling.v1 import feeds_pb2

from chassis.errors import NotFound, Unavailable
from gateway.tests.conftest import World

VISIT = "0198c5a2-6f00-7b3d-8a51-3f4c2d9e7a10"
TOKEN = "c-Zm9vYmFyYmF6cXV4MTIzNA"
READ = "care.scheduling.v1.CalendarLinksService/GetCalendarByLink"


@pytest.fixture
def asked(world: World) -> list[Any]:
    """Requests that scheduling got; it has one calendar of etag "seven"."""
    requests: list[Any] = []

    async def read(request: Any, metadata: dict[str, str]) -> Any:
        assert metadata["authorization"].startswith("Bearer ")
        requests.append(request)
        if request.token != TOKEN:
            raise NotFound("LINK_UNKNOWN", "There is no such link.")
        if "seven" in request.etags:
            return feeds_pb2.CalendarByLink(etag="seven", unchanged=True)
        return feeds_pb2.CalendarByLink(etag="seven", calendar="BEGIN:VCALENDAR\r\nEND:VCALENDAR\r\n")

    world.services["scheduling"].answers[READ] = read
    del world.http.headers["authorization"]
    return requests


async def test_a_feed_is_a_file_that_only_its_reader_keeps(world: World, asked: list[Any]) -> None:
    answer = await world.http.get(f"/calendars/{TOKEN}.ics")
    assert answer.status_code == 200
    assert answer.content == b"BEGIN:VCALENDAR\r\nEND:VCALENDAR\r\n"
    assert answer.headers["content-type"] == "text/calendar; charset=utf-8"
    assert answer.headers["cache-control"] == "private, no-cache"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["etag"] == '"seven"'
    head = await world.http.head(f"/calendars/{TOKEN}.ics")
    assert head.status_code == 200 and head.content == b"" and head.headers["etag"] == '"seven"'


@pytest.mark.parametrize("known", ['"seven"', 'W/"seven"', '"six", W/"seven"'])
async def test_who_has_the_feed_gets_nothing_more(world: World, asked: list[Any], known: str) -> None:
    answer = await world.http.get(f"/calendars/{TOKEN}.ics", headers={"if-none-match": known})
    assert answer.status_code == 304 and answer.content == b""
    assert answer.headers["etag"] == '"seven"' and answer.headers["cache-control"] == "private, no-cache"


async def test_an_older_one_gets_the_whole(world: World, asked: list[Any]) -> None:
    answer = await world.http.get(f"/calendars/{TOKEN}.ics", headers={"if-none-match": '"six"'})
    assert answer.status_code == 200 and list(asked[0].etags) == ["six"]


async def test_links_that_are_none_answer_all_alike(world: World, asked: list[Any]) -> None:
    files = (f"c-{'A' * 22}.ics", f"s-{'A' * 22}.ics", TOKEN, ".ics", f"{TOKEN}.ics/x", "c-%00.ics")
    answers = [await world.http.get(f"/calendars/{file}") for file in files]
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.content for answer in answers}) == 1
    assert len(asked) == 1, "what can't be a link isn't asked about"


async def test_neither_log_nor_trace_holds_a_token(world: World, asked: list[Any]) -> None:
    await world.http.get(f"/calendars/{TOKEN}.ics")
    assert TOKEN not in world.log.getvalue()
    assert not [
        span for span in world.spans.get_finished_spans() if TOKEN in f"{span.name} {dict(span.attributes or {})}"
    ]
    assert {line["route"] for line in world.lines() if line["event"] == "request"} == {"/calendars/{token}.ics"}


async def test_a_feed_is_only_read_and_a_service_that_is_away_is_told_so(world: World, asked: list[Any]) -> None:
    assert (await world.http.post(f"/calendars/{TOKEN}.ics")).headers["allow"] == "GET, HEAD"

    async def away(request: Any, metadata: dict[str, str]) -> Any:
        raise Unavailable("ACCESS_STALE", "x")

    world.services["scheduling"].answers[READ] = away
    answer = await world.http.get(f"/calendars/{TOKEN}.ics")
    assert answer.status_code == 503 and "retry-after" in answer.headers


async def test_one_visit_to_take_along_is_a_file_too(world: World) -> None:
    async def read(request: Any, metadata: dict[str, str]) -> Any:
        if request.id != VISIT:
            raise NotFound
        return feeds_pb2.AppointmentCalendar(file_name="visit.ics", calendar="BEGIN:VCALENDAR\r\nMETHOD:PUBLISH\r\n")

    world.services["scheduling"].answers["care.scheduling.v1.CalendarFeedsService/GetAppointmentCalendar"] = read
    answer = await world.http.get(f"/v1/appointments/{VISIT}/calendar")
    assert answer.content == b"BEGIN:VCALENDAR\r\nMETHOD:PUBLISH\r\n"
    assert answer.headers["content-type"] == "text/calendar; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="visit.ics"'
    assert answer.headers["cache-control"] == "private, no-cache"
    missing = await world.http.get(f"/v1/appointments/{VISIT[:-1]}1/calendar")
    assert (missing.status_code, missing.headers["content-type"]) == (404, "application/json")

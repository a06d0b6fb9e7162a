"""Live views over HTTP: server-sent events as browsers and curl read them, and how they end."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest
from care.type.v1.live_pb2 import Change

from chassis.errors import NotFound, PermissionDenied, Problem, Unauthenticated
from gateway.tests.conftest import Start, World
from gateway.tests.test_gateway import reason_of

ID = "0198c5a2-6f00-7b3d-8a51-3f4c2d9e7a10"
WATCH = "care.scheduling.v1.ScheduleLiveService/WatchClinicDay"
PATH = f"/v1/clinics/{ID}/dayBoard:watch?date=2026-03-02"


def change(number: int) -> Change:
    told = Change(kind=Change.CHANGED, event_type="appointment.booked", event_id=f"e{number}")
    told.resource.type, told.resource.id = "Appointment", ID
    return told


class Day:
    """A service's view: begins with a reset, then tells what is put into `more`; a Problem ends it."""

    def __init__(self, world: World) -> None:
        self.more: asyncio.Queue[Change | Problem] = asyncio.Queue()
        self.open, self.left = 0, asyncio.Event()
        self.seen = world.services["scheduling"].seen
        world.services["scheduling"].streams[WATCH] = self.watch

    async def watch(self, request: Any) -> AsyncIterator[Change]:
        assert (request.clinic_id, request.date) == (ID, "2026-03-02")
        self.open += 1
        try:
            yield Change(kind=Change.RESET)
            while True:
                item = await self.more.get()
                if isinstance(item, Problem):
                    raise item
                yield item
        finally:
            self.open -= 1
            self.left.set()


class Events:
    """What a client reads, block by block."""

    def __init__(self, answer: httpx2.Response) -> None:
        self._chunks, self._text = answer.aiter_text(), ""

    async def block(self) -> str:
        async with asyncio.timeout(5):
            while "\n\n" not in self._text:
                self._text += await anext(self._chunks)
        block, _, self._text = self._text.partition("\n\n")
        return block

    async def rest(self) -> str:
        async with asyncio.timeout(5):
            async for chunk in self._chunks:
                self._text += chunk
        return self._text


async def test_changes_come_as_events_at_once(world: World) -> None:
    day = Day(world)
    # A client that comes back says what it had last: it is told to read everything, like any other.
    headers = {"last-event-id": "e7", "accept": "text/event-stream", "accept-encoding": "gzip"}
    async with world.http.stream("GET", PATH, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-store", "no")
        assert "content-encoding" not in answer.headers and "content-length" not in answer.headers
        events = Events(answer)
        assert (await events.block()).startswith("retry: ")
        assert await events.block() == 'event: reset\ndata: {"kind":"RESET"}'
        await day.more.put(change(8))
        identity, name, data = (await events.block()).split("\n")
        assert (identity, name) == ("id: e8", "event: change")
        assert json.loads(data.removeprefix("data: ")) == {
            "kind": "CHANGED",
            "resource": {"type": "Appointment", "id": ID},
            "eventType": "appointment.booked",
            "eventId": "e8",
        }
        await day.more.put(Change(kind=Change.HEARTBEAT))
        assert await events.block() == ": heartbeat"
    metadata = day.seen[-1][1]
    assert metadata["authorization"] == world.http.headers["authorization"] and "traceparent" in metadata


async def test_a_client_that_leaves_ends_the_services_stream_at_once(world: World) -> None:
    day = Day(world)
    async with world.http.stream("GET", PATH) as answer:
        events = Events(answer)
        await events.block()
        assert day.open == 1
    began = time.monotonic()
    await asyncio.wait_for(day.left.wait(), 2)
    assert time.monotonic() - began < 0.5
    assert _open(world) == 0


async def test_a_refusal_is_an_ordinary_error_before_the_stream_opens(world: World) -> None:
    for problem, status in (
        (NotFound(), 404),
        (PermissionDenied("PERMISSION_MISSING", "x"), 403),
        (Unauthenticated("LOGIN_UNKNOWN", "x"), 401),
    ):

        async def refuse(request: Any, problem: Problem = problem) -> AsyncIterator[Change]:
            raise problem
            yield

        world.services["scheduling"].streams[WATCH] = refuse
        answer = await world.http.get(PATH)
        assert (answer.status_code, reason_of(answer)) == (status, problem.reason)
        assert answer.headers["content-type"] == "application/json"
    stranger = await world.http.get(PATH, headers={"authorization": "Bearer x"})
    assert (stranger.status_code, reason_of(stranger)) == (401, "TOKEN_INVALID")
    unfit = await world.http.get(PATH, headers={"accept": "application/json, text/html;q=0.9"})
    assert (unfit.status_code, reason_of(unfit)) == (406, "NOT_ACCEPTABLE")
    head = await world.http.head(PATH)
    assert (head.status_code, head.headers["allow"]) == (405, "GET")
    assert _open(world) == 0


async def test_the_end_says_why_and_the_answer_is_whole(world: World) -> None:
    day = Day(world)
    async with world.http.stream("GET", PATH) as answer:
        events = Events(answer)
        for _ in range(2):
            await events.block()
        await day.more.put(Unauthenticated("TOKEN_EXPIRED", "The token has expired; sign in again."))
        name, data = (await events.rest()).strip().split("\n")
    assert name == "event: end"
    error = json.loads(data.removeprefix("data: "))["error"]
    assert (error["code"], error["details"][0]["reason"]) == (401, "TOKEN_EXPIRED")


async def test_one_login_opens_only_so_many_and_others_go_on(start: Start) -> None:
    world = await start(streams_per_login=2, streams=3)
    Day(world)
    other = {"authorization": f"Bearer {world.token('olga')}"}
    async with world.http.stream("GET", PATH) as first, world.http.stream("GET", PATH) as second:
        reading = [Events(answer) for answer in (first, second)]  # one that is dropped closes its connection
        for events in reading:
            await events.block()
        third = await world.http.get(PATH)
        assert (third.status_code, reason_of(third), third.headers["retry-after"]) == (429, "TOO_MANY_STREAMS", "5")
        async with world.http.stream("GET", PATH, headers=other) as theirs:
            reading.append(Events(theirs))
            await reading[-1].block()
            full = await world.http.get(PATH, headers={"authorization": f"Bearer {world.token('pia')}"})
            assert (full.status_code, reason_of(full)) == (429, "TOO_MANY_STREAMS")
    async with asyncio.timeout(2):
        while _open(world):
            await asyncio.sleep(0.01)
    async with world.http.stream("GET", PATH) as again:
        assert again.status_code == 200


async def test_a_gateway_that_is_stopped_ends_its_streams_within_a_second(start: Start) -> None:
    world = await start()
    day = Day(world)
    async with world.http.stream("GET", PATH) as answer, world.http.stream("GET", PATH) as unread:
        events = Events(answer)
        for _ in range(2):
            await events.block()
        # Whoever doesn't read stands still after some of these.
        for _ in range(40_000):
            day.more.put_nowait(change(1))
        assert unread.status_code == 200
        began = time.monotonic()
        stopping = asyncio.create_task(world.gateway.stop())
        told = await events.rest()
        assert "DRAINING" in told.rpartition("event: end\n")[2]
        await stopping
        assert time.monotonic() - began < 4
    await asyncio.wait_for(day.left.wait(), 2)


async def test_a_service_that_falls_silent_ends_the_stream(start: Start) -> None:
    world = await start(live_heartbeat=0.1)
    Day(world)
    async with world.http.stream("GET", PATH) as answer:
        assert "SERVICE_UNAVAILABLE" in (await Events(answer).rest()).rpartition("event: end\n")[2]


async def test_the_span_and_the_line_are_of_the_opening(world: World) -> None:
    Day(world)
    async with world.http.stream("GET", PATH) as answer:
        events = Events(answer)
        await events.block()
        spans = [span for span in world.spans.get_finished_spans() if span.name.startswith("GET")]
        assert [span.name for span in spans] == ["GET /v1/clinics/{clinicId}/dayBoard:watch"]
        assert [line["route"] for line in world.lines() if line["event"] == "request"] == [spans[0].name[4:]]
        assert _open(world) == 1


def _open(world: World) -> float | None:
    return world.gateway.app._telemetry.registry.get_sample_value("care_http_streams_open")


@pytest.mark.parametrize("accept", ["*/*", "text/*", "application/json, text/event-stream;q=0.5", ""])
async def test_who_accepts_anything_accepts_events(world: World, accept: str) -> None:
    Day(world)
    async with world.http.stream("GET", PATH, headers={"accept": accept} if accept else {}) as answer:
        assert answer.status_code == 200

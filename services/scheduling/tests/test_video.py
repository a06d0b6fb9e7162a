"""Video rooms: made, renewed and closed by a provider that fails, and shown to participants only."""

import asyncio
import socket
from datetime import UTC, datetime, timedelta

import pytest
import uvicorn
from care.scheduling.v1 import appointments_pb2, video_pb2
from care.scheduling.v1.video_pb2_grpc import VideoRoomsServiceStub
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from services.scheduling.appointment import Appointment, Status
from services.scheduling.settings import SchedulingSettings
from services.scheduling.tests.desk import WORK, refused, soon
from services.scheduling.video import RoomState, VideoRoom

_hours = iter(range(1000))
Room = video_pb2.VideoRoom.State


class Rooms:
    """A server that speaks Daily's REST interface, and fails when it is told to."""

    def __init__(self):
        self.rooms, self.asked, self.faults = {}, [], []
        routes = [
            Route("/v1/rooms", self.create, methods=["POST"]),
            Route("/v1/rooms/{name}", self.room, methods=["GET", "DELETE"]),
        ]
        self.app = Starlette(routes=routes)

    async def create(self, request):
        body = await request.json()
        self.asked.append(("POST", body["name"]))
        fault = self.faults.pop(0) if self.faults else None
        if request.headers["authorization"] != "Bearer secret-key":
            return JSONResponse({"error": "authentication-error"}, 401)
        if fault == 503:
            return JSONResponse({"error": "internal"}, 503)
        if body["name"] in self.rooms:
            return JSONResponse({"error": "invalid-request-error", "info": "a room of this name already exists"}, 400)
        self.rooms[body["name"]] = {**body, "url": f"https://clinic.daily.test/{body['name']}"}
        if fault == "slow":
            await asyncio.sleep(1.0)
        return JSONResponse(self.rooms[body["name"]])

    async def room(self, request):
        name = request.path_params["name"]
        self.asked.append((request.method, name))
        if name not in self.rooms:
            return JSONResponse({"error": "not-found"}, 404)
        if request.method == "DELETE":
            if self.faults and self.faults.pop(0) == 503:
                return JSONResponse({"error": "internal"}, 503)
            del self.rooms[name]
            return JSONResponse({"deleted": True, "name": name})
        return JSONResponse(self.rooms[name])


@pytest.fixture(scope="module")
async def daily(desk):
    rooms = Rooms()
    server = uvicorn.Server(uvicorn.Config(rooms.app, log_level="error", lifespan="off"))
    listening = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[listening]))
    settings = desk.harness.servers["scheduling"].settings
    settings.video_key, settings.video_timeout, settings.video_lease = "secret-key", 0.4, 1.0
    settings.video_url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    settings.video_provider = "daily"
    await desk.harness.staff("joins", [*WORK, "appointments.join"], clinics=[desk.clinic])
    desk.video = await desk.a_visit_type("by-video", modality="VIDEO")
    yield rooms
    settings.video_provider = "none"
    server.should_exit = True
    await serving


async def visit(desk):
    start = soon(days=40, hour=0) + timedelta(hours=next(_hours))
    return await desk.book(await desk.a_patient(), start, visit_type_id=desk.video)


async def look(desk, appointment, subject="joins"):
    request = video_pb2.GetVideoRoomRequest(id=appointment.id)
    return await desk.harness.call("scheduling", VideoRoomsServiceStub, "GetVideoRoom", request, subject)


async def until(desk, appointment, state):
    async with asyncio.timeout(15):
        while (room := await look(desk, appointment)).state != state:
            desk.harness.servers["scheduling"].runtime.loops["video rooms"].wake()
            await asyncio.sleep(0.05)
    return room


async def gone(rooms, name):
    async with asyncio.timeout(15):
        while name in rooms.rooms:
            await asyncio.sleep(0.05)


async def test_a_video_visit_gets_a_room_a_new_one_when_it_moves_and_none_when_it_is_cancelled(desk, daily):
    booked = await visit(desk)
    first = await until(desk, booked, Room.READY)
    name = first.join_url.rpartition("/")[2]
    made = daily.rooms[name]
    assert made["properties"]["nbf"] == booked.start_time.seconds - 900 == first.open_time.seconds
    assert made["properties"]["exp"] == booked.end_time.seconds + 1800 == first.close_time.seconds
    assert (await desk("GetAppointment", appointments_pb2.GetAppointmentRequest(id=booked.id))).etag == booked.etag
    confirmed = await desk.do("Confirm", booked)
    assert (await until(desk, booked, Room.READY)).join_url == first.join_url, "who confirms keeps the link"
    moved = await desk.move(confirmed, booked.start_time.ToDatetime(tzinfo=UTC) + timedelta(days=3))
    assert (await look(desk, moved)).join_url != first.join_url, "from the very commit on"
    second = await until(desk, moved, Room.READY)
    assert second.open_time.seconds == moved.start_time.seconds - 900
    await gone(daily, name)
    await desk.do("Cancel", moved, reason={"code": "pat"})
    ended = await look(desk, moved)
    assert ended.state == Room.ENDED and not ended.join_url
    await gone(daily, second.join_url.rpartition("/")[2])


async def test_a_provider_that_fails_or_is_slow_makes_one_room_in_the_end(desk, daily):
    """External calls only after the commit (CloudMeet#43), and none of them twice: the name is chosen before."""
    daily.faults += [503, "slow"]
    booked = await visit(desk)
    room = await until(desk, booked, Room.READY)
    name = room.join_url.rpartition("/")[2]
    assert [method for method, asked in daily.asked if asked == name] == ["POST", "POST", "POST", "GET"]
    assert len(await desk.sql("SELECT 1 FROM video_room WHERE appointment_id = :id", id=booked.id)) == 1
    daily.faults += [503]
    await desk.do("EnterInError", booked)
    await gone(daily, name)


async def test_only_who_takes_part_may_read_the_link(desk, daily):
    booked = await visit(desk)
    room = await until(desk, booked, Room.READY)
    patient, other = booked.patient_id, await desk.a_patient()
    for who in (patient, other):
        await desk.harness.staff(f"self-{who}", ["appointments.join"], kind="PATIENT", principal_id=who)
    assert await refused(look(desk, booked, "cora")) == "PERMISSION_MISSING"
    assert await refused(look(desk, booked, f"self-{other}")) == "NOT_FOUND"
    in_person = await desk.book(await desk.a_patient(), soon(days=50, hour=3))
    assert await refused(look(desk, in_person)) == "NOT_A_VIDEO_VISIT"
    key = room.join_url.rpartition("/")[2].encode()
    assert all(key not in payload.SerializeToString() for _, payload in await desk.told(booked, 1))
    assert key.decode() not in desk.harness.log_of("scheduling")


async def test_a_hold_has_no_room(desk, daily):
    (slot, *_) = (await desk.search(desk.video, start_time=soon(days=45, hour=0))).slots
    held = await desk.hold(await desk.a_patient(), slot)
    await asyncio.sleep(0.2)
    assert not await desk.sql("SELECT 1 FROM video_room WHERE appointment_id = :id", id=held.id)
    await desk.do("Book", held)
    await until(desk, held, Room.READY)


NOW = datetime(2031, 6, 2, tzinfo=UTC)


def wanted():
    visit = Appointment(
        id="v", tenant_id="t", patient_id="p", schedule_version=1, start_time=NOW, end_time=NOW + timedelta(minutes=30),
        status=Status.BOOKED, modality="VIDEO", security_labels=[],
    )  # fmt: skip
    room = VideoRoom.for_visit(visit, NOW)
    room.tries = 0
    return room


def test_a_room_that_is_being_made_while_it_ends_is_closed_after_that_call_must_be_over():
    room = wanted()
    room.claim(NOW, timedelta(seconds=60))
    token = room.lease_token
    room.end(NOW + timedelta(seconds=1))
    assert (room.state, room.next_time) == (RoomState.ENDING, NOW + timedelta(seconds=60))
    assert room.lease_token != token, "what comes of that call no longer counts"
    unasked = wanted()
    unasked.end(NOW)
    assert (unasked.state, unasked.next_time) == (RoomState.ENDED, None)


def test_a_provider_that_is_away_is_asked_less_often_and_not_for_a_visit_that_is_over():
    room = wanted()
    room.tries = 20
    room.again(NOW, "http-503")
    assert room.next_time == NOW + timedelta(seconds=300)
    room.again(NOW + timedelta(hours=2), "http-503")
    assert room.state is RoomState.ENDED


def test_made_up_rooms_are_refused_in_production():
    with pytest.raises(ValidationError):
        SchedulingSettings(environment="production", video_provider="development")
    assert SchedulingSettings(environment="development", video_provider="development").video_provider == "development"
    with pytest.raises(ValidationError):
        SchedulingSettings(environment="development", video_provider="daily")

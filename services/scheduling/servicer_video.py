"""Rooms of video visits over gRPC."""

from care.scheduling.v1 import video_pb2 as pb
from care.scheduling.v1.video_pb2_grpc import VideoRoomsServiceServicer

from chassis.call import Call
from chassis.errors import FailedPrecondition
from chassis.reading import Rows
from chassis.wire import to_proto
from services.scheduling.appointment import Appointment
from services.scheduling.video import RoomState, VideoRoom, wants_room


class VideoRoomsServicer(VideoRoomsServiceServicer):
    """Where a video visit takes place."""

    async def GetVideoRoom(self, request: pb.GetVideoRoomRequest, call: Call) -> pb.VideoRoom:
        visit = await call.get(Appointment, request.id)
        if visit.modality != "VIDEO":
            raise FailedPrecondition("NOT_A_VIDEO_VISIT", "This visit does not take place by video.")
        rooms = await call.all(
            Rows(VideoRoom)
            .equal(VideoRoom.appointment_id, visit.id)
            .equal(VideoRoom.schedule_version, visit.schedule_version)
            .among(VideoRoom.state, [RoomState.WANTED.name, RoomState.READY.name])
        )
        if not wants_room(visit) or not rooms:
            state = "WANTED" if wants_room(visit) else "ENDED"
            return pb.VideoRoom(appointment_id=visit.id, state=pb.VideoRoom.State.Value(state))
        return to_proto(rooms[0], pb.VideoRoom, join_url=rooms[0].url)

"""Live views of what is booked, over gRPC."""

from collections.abc import Callable
from datetime import date
from zoneinfo import ZoneInfo

from care.scheduling.v1 import events_pb2
from care.scheduling.v1 import live_pb2 as pb
from care.scheduling.v1.live_pb2_grpc import ScheduleLiveServiceServicer

from chassis.call import Call
from chassis.errors import Invalid
from chassis.live import View, Watch, of_group
from chassis.wire import to_time

# The clinic that an appointment has left has changed, too.
BOOKED = View(
    "Appointment", frozenset({"appointment", "hold"}), events_pb2.AppointmentEvent, ("clinic_id", "previous_clinic_id")
)


class ScheduleLiveServicer(ScheduleLiveServiceServicer):
    """Live views of what is booked."""

    async def WatchClinicDay(self, request: pb.WatchClinicDayRequest, call: Call) -> Watch:
        try:
            day = date.fromisoformat(request.date)
        except ValueError:
            raise Invalid("DATE_INVALID", "There is no such day in the calendar.", field="date") from None
        return BOOKED.watch(request.clinic_id, allowed=of_group(request.clinic_id), concerns=_on(day))


def _on(day: date) -> Callable[[events_pb2.AppointmentEvent], bool]:
    """Whether an event is about that day, by the appointment's own zone."""

    def concerns(told: events_pb2.AppointmentEvent) -> bool:
        zone = ZoneInfo(told.time_zone or "UTC")
        starts = [told.start_time]
        if told.HasField("previous_start_time"):
            starts.append(told.previous_start_time)
        return any(to_time(start).astimezone(zone).date() == day for start in starts)

    return concerns

"""Bookings that a change of hours has left outside, over gRPC."""

from care.scheduling.v1 import appointments_pb2
from care.scheduling.v1 import stranded_pb2 as pb
from care.scheduling.v1.stranded_pb2_grpc import StrandedAppointmentsServiceServicer
from sqlalchemy import func, select

from chassis.call import Call
from chassis.reading import Rows
from chassis.wire import to_proto
from services.scheduling.appointment import Appointment, Status
from services.scheduling.directory import Schedule
from services.scheduling.stranding import hours_of


class StrandedAppointmentsServicer(StrandedAppointmentsServiceServicer):
    """Worked out as the hours are now, so that it is right however it came about."""

    async def GetStrandedAppointments(
        self, request: pb.GetStrandedAppointmentsRequest, call: Call
    ) -> pb.GetStrandedAppointmentsResponse:
        schedule = await call.get(Schedule, request.schedule_id)
        now = (await call.db.execute(select(func.clock_timestamp()))).scalar_one()
        ahead = (
            Rows(Appointment)
            .equal(Appointment.clinic_id, schedule.clinic_id)
            .equal(Appointment.practitioner_id, schedule.practitioner_id)
            .equal(Appointment.status, Status.BOOKED.name)
            .since(Appointment.start_time, now)
        )
        bookings = await call.all(ahead)
        hours = await hours_of(call.db, call.tenant_id, bookings, [schedule])
        left = sorted(hours.outside(bookings), key=lambda one: (one.start_time, one.id))
        return pb.GetStrandedAppointmentsResponse(
            appointments=[to_proto(one, appointments_pb2.Appointment) for one in left]
        )

"""What other hours would leave outside, over gRPC: asked before they are set."""

from care.scheduling.v1 import hours_pb2 as pb
from care.scheduling.v1.hours_pb2_grpc import HoursServiceServicer
from sqlalchemy import func

from chassis.call import Call
from chassis.errors import Invalid
from chassis.wire import plain, to_proto
from services.scheduling.appointment import Appointment, Status
from services.scheduling.directory import Schedule
from services.scheduling.stranding import COLUMNS, hours_of

_SHOWN = 200


class HoursServicer(HoursServiceServicer):
    """Works out what `Stranding` would tell, and tells nobody."""

    async def GetHoursPreview(self, request: pb.GetHoursPreviewRequest, call: Call) -> pb.HoursPreview:
        proposed = Schedule(
            practitioner_id=request.practitioner_id,
            clinic_id=request.clinic_id,
            weekly_hours=[plain(one) for one in request.weekly_hours],
            exceptions=[],
        )
        proposed.check()
        ahead = call.tenant_wide(Appointment).where(
            Appointment.practitioner_id == request.practitioner_id,
            Appointment.clinic_id == request.clinic_id,
            Appointment.status == Status.BOOKED,
            Appointment.start_time > func.clock_timestamp(),
        )
        bookings = list((await call.db.execute(ahead.with_only_columns(*COLUMNS, Appointment.patient_id))).all())
        hours = await hours_of(
            call.db,
            call.tenant_id,
            bookings,  # type: ignore[arg-type]
            clinic_id=request.clinic_id,
            practitioner_id=request.practitioner_id,
        )
        if request.clinic_id not in hours.clinics:
            raise Invalid("CLINIC_UNKNOWN", "There is no such clinic.", field="clinic_id")
        if request.practitioner_id not in hours.practitioners:
            raise Invalid("PRACTITIONER_UNKNOWN", "There is no such practitioner.", field="practitioner_id")
        seat = (request.practitioner_id, request.clinic_id)
        before = {one.id for one in hours.outside(bookings)}
        if (now := hours.schedules.get(seat)) is not None:
            proposed.exceptions = now.exceptions
        hours.schedules[seat] = proposed
        left = [one for one in hours.outside(bookings) if one.id not in before]
        call.saw(*(one.patient_id for one in left))
        left.sort(key=lambda one: (one.start_time, one.id))
        return pb.HoursPreview(
            visits=[to_proto(one, pb.HoursPreview.Visit, appointment_id=one.id) for one in left[:_SHOWN]],
            total=len(left),
        )

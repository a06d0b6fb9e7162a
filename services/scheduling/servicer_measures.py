"""Measures over gRPC. Figures of whole clinics, for whoever leads or improves them: no row about a patient leaves."""

from care.scheduling.v1 import measures_pb2 as pb
from care.scheduling.v1.measures_pb2_grpc import MeasuresServiceServicer

from chassis.call import Call
from chassis.errors import Invalid
from chassis.reading import Rows
from chassis.wire import enum_names, to_proto
from services.scheduling import measures, measuring
from services.scheduling.appointment import Appointment
from services.scheduling.directory import Clinic
from services.scheduling.measures import Measure


class MeasuresServicer(MeasuresServiceServicer):
    """Each is about one clinic, over days of its own zone."""

    async def GetThirdNextAvailable(
        self, request: pb.GetThirdNextAvailableRequest, call: Call
    ) -> pb.GetThirdNextAvailableResponse:
        found = await measuring.waits(call.db, await _clinic(call, request.clinic_id), list(request.visit_type_ids))
        rows = [
            pb.GetThirdNextAvailableResponse.Row(
                visit_type_id=visit_type_id,
                days=wait.days,
                practitioners=wait.practitioners,
                practitioners_full=wait.full,
            )
            for visit_type_id, wait in found.items()
        ]
        return pb.GetThirdNextAvailableResponse(rows=rows)

    async def GetUtilization(self, request: pb.GetUtilizationRequest, call: Call) -> pb.GetUtilizationResponse:
        clinic = await _clinic(call, request.clinic_id)
        begin, end = measures.days(request.first_date, request.last_date, clinic.zone, 31)
        used = await measuring.utilization(call.db, call.tenant_wide(Appointment), clinic, begin, end)
        rows = [
            pb.GetUtilizationResponse.Row(
                practitioner_id=one.practitioner_id, open_minutes=one.open, booked_minutes=one.booked
            )
            for one in used
        ]
        return pb.GetUtilizationResponse(
            rows=rows, open_minutes=sum(one.open for one in used), booked_minutes=sum(one.booked for one in used)
        )

    async def GetVisitRates(self, request: pb.GetVisitRatesRequest, call: Call) -> pb.VisitRates:
        clinic = await _clinic(call, request.clinic_id)
        begin, end = measures.days(request.first_date, request.last_date, clinic.zone, 92)
        found = await measuring.rates(
            call.db,
            call.tenant_wide(Appointment),
            clinic.id,
            begin,
            end,
            tenant_id=call.tenant_id,
            visit_type_id=request.visit_type_id,
            practitioner_id=request.practitioner_id,
        )
        figures = {name: figure._asdict() for name, figure in found._asdict().items() if figure is not None}
        return to_proto(figures, pb.VisitRates)

    async def ListMeasures(self, request: pb.ListMeasuresRequest, call: Call) -> pb.ListMeasuresResponse:
        wanted = (
            Rows(Measure)
            .among(Measure.clinic_id, request.clinic_ids)
            .among(Measure.kind, enum_names(pb.Measure.Kind, request.kinds))
        )
        rows, following = await call.page(wanted, request, Measure.create_time, Measure.id, descending=True)
        return pb.ListMeasuresResponse(measures=[to_proto(row, pb.Measure) for row in rows], next_page_token=following)


async def _clinic(call: Call, clinic_id: str) -> Clinic:
    found = (await call.db.execute(call.select(Clinic).where(Clinic.id == clinic_id))).scalar_one_or_none()
    if found is None:
        raise Invalid("CLINIC_UNKNOWN", "There is no such clinic.", field="clinic_id")
    return found

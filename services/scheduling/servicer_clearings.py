"""Clearing days over gRPC."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

from care.scheduling.v1 import clearings_pb2 as pb
from care.scheduling.v1.clearings_pb2_grpc import ClearingsServiceServicer
from sqlalchemy import func, select

from chassis.calendar import at_local
from chassis.call import Call
from chassis.errors import FailedPrecondition, Invalid, NotFound
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.timers import wake_after_commit
from chassis.wire import enum_names, plain, to_proto
from services.scheduling import clearing_work
from services.scheduling.appointment import Appointment, Status
from services.scheduling.clearing import Clearing, ClearingVisit, days
from services.scheduling.clearing_work import CLEARINGS, plan_for
from services.scheduling.directory import Clinic, Practitioner, Schedule
from services.scheduling.moving import Place

_COUNTED = ("moved", "offered", "left", "gone", "pending")
_CLOSED = "CLOSED"


class ClearingsServicer(ClearingsServiceServicer):
    """Days that a practitioner can't see patients on."""

    async def ClearDay(self, request: pb.ClearDayRequest, call: Call) -> pb.ClearDayResponse:
        practitioner = await call.get(Practitioner, request.id)
        wanted = days(request.date, request.last_date)
        schedules = await _schedules(call, practitioner)
        windows = await _windows(call, request, practitioner, schedules, wanted)
        clearing = Clearing(
            tenant_id=call.tenant_id,
            id=new_id(),
            practitioner_id=practitioner.id,
            clinic_id=request.clinic_id or None,
            first_date=wanted[0].isoformat(),
            last_date=wanted[-1].isoformat(),
            windows=windows,
            clinic_ids=[clinic for clinic, _, _ in windows],
            reason=plain(request.reason) if request.HasField("reason") else None,
        )
        if request.preview:
            return await _preview(call, request, clearing)
        for schedule in schedules:
            if any(schedule.clinic_id == clinic for clinic, _, _ in windows):
                _close(schedule, wanted)
        clearing.start(call.now)
        call.db.add(clearing)
        await call.db.flush()
        wake_after_commit(call.db, CLEARINGS)
        return pb.ClearDayResponse(clearing=to_proto(clearing, pb.Clearing))

    async def GetClearing(self, request: pb.GetClearingRequest, call: Call) -> pb.Clearing:
        clearing = await call.get(Clearing, request.id)
        # Why somebody is away, and how many that concerns, is nothing for patients and other clinics.
        if not call.is_of(*(clinic for clinic, _, _ in clearing.windows)):
            raise NotFound
        (shown,) = await _shown(call, [clearing])
        return shown

    async def ListClearings(self, request: pb.ListClearingsRequest, call: Call) -> pb.ListClearingsResponse:
        mine = call.caller.group_ids if call.caller.kind == "staff" else ()
        if not mine:
            return pb.ListClearingsResponse()
        wanted = (
            Rows(Clearing)
            .overlap(Clearing.clinic_ids, sorted(mine))
            .overlap(Clearing.clinic_ids, request.clinic_ids)
            .among(Clearing.practitioner_id, request.practitioner_ids)
            .among(Clearing.status, enum_names(pb.Clearing.Status, request.statuses))
            .since(Clearing.last_date, request.date_from or None)
        )
        rows, following = await call.page(wanted, request, Clearing.create_time, Clearing.id, descending=True)
        return pb.ListClearingsResponse(clearings=await _shown(call, rows), next_page_token=following)

    async def ListClearingVisits(
        self, request: pb.ListClearingVisitsRequest, call: Call
    ) -> pb.ListClearingVisitsResponse:
        wanted = (
            Rows(ClearingVisit)
            .equal(ClearingVisit.clearing_id, request.clearing_id)
            .among(ClearingVisit.status, enum_names(pb.ClearingVisit.Status, request.statuses))
        )
        rows, following = await call.page(wanted, request, ClearingVisit.start_time, ClearingVisit.id)
        return pb.ListClearingVisitsResponse(
            clearing_visits=[to_proto(row, pb.ClearingVisit) for row in rows], next_page_token=following
        )

    async def AcceptClearingVisit(self, request: pb.AcceptClearingVisitRequest, call: Call) -> pb.ClearingVisit:
        row = await call.get(ClearingVisit, request.id)
        row.lifecycle.arrow("accept", row.status)
        visit = await call.get(Appointment, row.appointment_id)
        visit.lifecycle.arrow("reschedule", visit.status)
        query = select(Appointment).where(Appointment.tenant_id == call.tenant_id, Appointment.id == row.hold_id)
        locked = query.with_for_update(of=Appointment, key_share=True, skip_locked=True)
        hold = (await call.db.execute(locked)).scalar_one_or_none()
        if hold is None or hold.status is not Status.PENDING or hold.hold_expire_time <= call.now:  # type: ignore[operator]
            raise FailedPrecondition("HOLD_EXPIRED", "The time is no longer held; search again.")
        await clearing_work.accept(call.db, row, visit, hold, call.now)
        await call.db.flush()
        return to_proto(row, pb.ClearingVisit)


async def _shown(call: Call, clearings: Sequence[Clearing]) -> list[pb.Clearing]:
    """Clearings with how many of their visits have which outcome."""
    query = (
        select(ClearingVisit.clearing_id, ClearingVisit.status, func.count())
        .where(ClearingVisit.tenant_id == call.tenant_id, ClearingVisit.clearing_id.in_([one.id for one in clearings]))
        .group_by(ClearingVisit.clearing_id, ClearingVisit.status)
    )
    counts: dict[str, dict[str, int]] = {one.id: {} for one in clearings}
    for clearing_id, status, count in (await call.db.execute(query)).tuples() if clearings else ():
        counts[clearing_id][status.name.lower()] = count
    return [to_proto(one, pb.Clearing, affected=sum(counts[one.id].values()), **counts[one.id]) for one in clearings]


async def _schedules(call: Call, practitioner: Practitioner) -> list[Schedule]:
    """The practitioner's hours at all clinics, locked in one order."""
    query = (
        select(Schedule)
        .where(Schedule.tenant_id == call.tenant_id, Schedule.practitioner_id == practitioner.id)
        .order_by(Schedule.id)
    )
    return list((await call.db.execute(query.with_for_update(of=Schedule, key_share=True))).scalars())


async def _windows(
    call: Call,
    request: pb.ClearDayRequest,
    practitioner: Practitioner,
    schedules: list[Schedule],
    wanted: list[date],
) -> list[tuple[str, int, int]]:
    """What is cleared at which clinic: whole days by its clock."""
    places = {*(one.clinic_id for one in schedules), *practitioner.clinic_ids}
    places &= {request.clinic_id} if request.clinic_id else places
    # Others clear the days at theirs.
    places = {clinic for clinic in places if call.is_of(clinic)}
    query = select(Clinic.id, Clinic.time_zone).where(Clinic.tenant_id == call.tenant_id, Clinic.id.in_(places))
    zones = {clinic: zone for clinic, zone in (await call.db.execute(query)).tuples() if zone}
    if not places or (request.clinic_id and not zones and not await _exists(call, request.clinic_id)):
        raise Invalid("CLINIC_UNKNOWN", "The practitioner sees nobody at such a clinic of yours.", field="clinic_id")
    if not zones:
        raise FailedPrecondition("CLINIC_WITHOUT_ZONE", "The clinic has no time zone yet: nothing can be booked.")
    midnight = datetime.min.time()
    windows = [
        (
            clinic,
            int(at_local(wanted[0], midnight, zone).timestamp()),
            int(at_local(wanted[-1] + timedelta(days=1), midnight, zone).timestamp()),
        )
        for clinic, zone in sorted(zones.items())
    ]
    if all(end <= call.now.timestamp() for _, _, end in windows):
        raise Invalid("PERIOD_INVALID", "These days are over.", field="date")
    return windows


async def _exists(call: Call, clinic_id: str) -> bool:
    query = select(Clinic.id).where(Clinic.tenant_id == call.tenant_id, Clinic.id == clinic_id)
    return (await call.db.execute(query)).first() is not None


def _close(schedule: Schedule, wanted: list[date]) -> None:
    """Nothing new is booked on these days: leave wins over weekly and extra hours. Days that are closed already stay so."""
    closed = {one["date"] for one in schedule.exceptions if one["kind"] == _CLOSED and not one.get("start")}
    fresh = [{"date": day.isoformat(), "kind": _CLOSED} for day in wanted if day.isoformat() not in closed]
    if fresh:
        schedule.change(exceptions=[*schedule.exceptions, *fresh])


async def _preview(call: Call, request: pb.ClearDayRequest, clearing: Clearing) -> pb.ClearDayResponse:
    """What would become of a page of the visits, none is promised what one before it on the page would take."""
    begin = min(first for _, first, _ in clearing.windows)
    end = max(last for _, _, last in clearing.windows)
    rows, following = await call.page(
        Rows(Appointment)
        .equal(Appointment.practitioner_id, clearing.practitioner_id)
        .equal(Appointment.status, Status.BOOKED)
        .among(Appointment.clinic_id, [clinic for clinic, _, _ in clearing.windows])
        .since(Appointment.start_time, datetime.fromtimestamp(begin, UTC))
        .before(Appointment.start_time, datetime.fromtimestamp(end, UTC)),
        request,
        Appointment.start_time,
        Appointment.id,
        default=20,
        most=50,
    )
    answer = pb.ClearDayResponse(next_page_token=following)
    counts: dict[str, Any] = dict.fromkeys(_COUNTED, 0)
    given: set[Place] = set()
    for visit in rows:
        plan = await plan_for(call.db, visit, clearing.windows, call.now, without=given)
        if plan.places:
            given.add(plan.places[0])
        counts[plan.outcome.name.lower()] += 1
        answer.visits.append(
            to_proto(
                {
                    "patient_id": visit.patient_id,
                    "appointment_id": visit.id,
                    "status": plan.outcome,
                    "clinic_id": visit.clinic_id,
                    "practitioner_id": visit.practitioner_id,
                    "visit_type_id": visit.visit_type_id,
                    "start_time": visit.start_time,
                    "offers": plan.offers,
                    "security_labels": visit.security_labels,
                },
                pb.ClearingVisit,
            )
        )
    shown = {
        "practitioner_id": clearing.practitioner_id,
        "clinic_id": clearing.clinic_id,
        "first_date": clearing.first_date,
        "last_date": clearing.last_date,
        "reason": clearing.reason,
        "affected": len(rows),
        **counts,
    }
    answer.clearing.CopyFrom(to_proto(shown, pb.Clearing))
    return answer

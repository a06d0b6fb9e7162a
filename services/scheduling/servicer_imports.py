"""The import of another system's visits over gRPC, one at a time: each is a transaction of its own."""

import json
from typing import Any, TypeVar

from care.scheduling.v1 import appointments_pb2
from care.scheduling.v1 import imports_pb2 as pb
from care.scheduling.v1.imports_pb2_grpc import AppointmentImportsServiceServicer
from sqlalchemy import select
from sqlalchemy.dialects.postgresql import insert

from chassis.call import Call
from chassis.errors import FailedPrecondition, Invalid
from chassis.ids import new_id
from chassis.wire import given_time, plain, to_proto
from services.scheduling import importing, occupancy
from services.scheduling.appointment import Appointment, AppointmentIdentifier, DeceasedPatient, Status
from services.scheduling.booking import Chosen
from services.scheduling.directory import Clinic, DirectoryIdentifier, Practitioner, VisitType

Entry = TypeVar("Entry", Clinic, Practitioner)


class AppointmentImportsServicer(AppointmentImportsServiceServicer):
    """Looks at the whole tenant: whoever imports a calendar needn't be of the patients' clinics."""

    async def ImportAppointment(self, request: pb.ImportAppointmentRequest, call: Call) -> pb.ImportAppointmentResponse:
        patient_id = await _patient(request, call)
        clinic = await _entry(request, call, Clinic)
        practitioner = await _entry(request, call, Practitioner)
        visit_type = await _visit_type(request, call)
        if not clinic.time_zone:
            raise FailedPrecondition(
                "CLINIC_WITHOUT_ZONE", "The clinic has no time zone yet; set it first.", field="clinic_id"
            )
        start = importing.start_of(given_time(request, "start_time"), request.local_start_time, clinic.time_zone)
        minutes = importing.minutes_of(
            start,
            given_time(request, "end_time"),
            request.local_end_time,
            request.duration_minutes,
            visit_type.duration_minutes,
            clinic.time_zone,
        )
        end = importing.end_of(start, minutes)
        status = importing.status_of(appointments_pb2.Appointment.Status.Name(request.status), end, call.now)
        wanted = {
            "patient_id": patient_id,
            "clinic_id": clinic.id,
            "practitioner_id": practitioner.id,
            "visit_type_id": visit_type.id,
            "start_time": start,
            "end_time": end,
        }
        appointment_id = new_id()
        known = await _known(request, call, patient_id, appointment_id)
        if known is not None:
            call.saw(known.patient_id)
            return to_proto(
                known,
                pb.ImportAppointmentResponse,
                outcome="ALREADY_THERE",
                appointment_id=known.id,
                differs=importing.differs(known, wanted, status),
            )
        ahead = status is Status.BOOKED
        if ahead:
            await _refuse_deceased(call, patient_id)
            if not request.validate_only:
                await occupancy.number_all(call.db, call.tenant_id, patient_id, [practitioner.id], [clinic.id])
        found = await importing.look(
            call.db, call.tenant_id, patient_id, visit_type, clinic, practitioner, start, minutes
        )
        if ahead:
            chosen = await importing.choose(call.db, call.tenant_id, found, lock=not request.validate_only)
        else:
            chosen = importing.as_history(found)
        appointment = Appointment(
            tenant_id=call.tenant_id,
            id=appointment_id,
            patient_id=patient_id,
            comment=request.comment,
            source_system=request.source_system,
            identifiers=[{"system": request.source_system, "value": request.identifier}],
        )
        appointment.place(**chosen.values())
        appointment.take_over(
            status, plain(request.cancelation_reason) if request.HasField("cancelation_reason") else None
        )
        outside = ahead and importing.outside_hours(found, call.now)
        if request.validate_only:
            return _answer(appointment, "", outside)
        await _take(call, appointment, chosen, ahead=ahead)
        return _answer(appointment, appointment.id, outside)


def _answer(appointment: Appointment, appointment_id: str, outside: bool) -> pb.ImportAppointmentResponse:
    return to_proto(
        appointment,
        pb.ImportAppointmentResponse,
        outcome="IMPORTED",
        appointment_id=appointment_id,
        outside_hours=outside,
    )


async def _take(call: Call, appointment: Appointment, chosen: Chosen, *, ahead: bool) -> None:
    # First in, so that its foreign key waits for a death that is being recorded, and `take` then sees it.
    call.db.add(appointment)
    await call.db.flush()
    if ahead:
        await chosen.take(call.db, appointment)


async def _known(
    request: pb.ImportAppointmentRequest, call: Call, patient_id: str, appointment_id: str
) -> Appointment | None:
    """The appointment that has the identifier; None where it is this one's now.

    The claim is an insert, so that of two at once the second waits and then finds the first one's appointment. It comes
    before any other lock.
    """
    key = {"tenant_id": call.tenant_id, "system": request.source_system, "value": request.identifier}
    if not request.validate_only:
        claim = insert(AppointmentIdentifier).values(
            **key, id=new_id(), patient_id=patient_id, appointment_id=appointment_id
        )
        claimed = await call.db.execute(
            claim.on_conflict_do_nothing(constraint="appointment_identifier_key").returning(AppointmentIdentifier.id)
        )
        if claimed.scalar_one_or_none() is not None:
            return None
    owner = select(AppointmentIdentifier.appointment_id).filter_by(**key)
    query = call.tenant_wide(Appointment).where(Appointment.id == owner.scalar_subquery())
    return (await call.db.execute(query)).scalar_one_or_none()


async def _patient(request: pb.ImportAppointmentRequest, call: Call) -> str:
    """Raises Invalid `REFERENCE_MISSING`, `PATIENT_UNKNOWN`."""
    field = "patient_id"
    patient_id = request.patient_id
    if not patient_id:
        if not request.HasField("patient_identifier"):
            raise _missing("patient")
        field, key = "patient_identifier", request.patient_identifier
        patient_id = call.fact("patient_by_identifier", json.dumps([key.system, key.value]))
    if patient_id:
        call.saw(patient_id)
        # What patients has just told may not have come here yet: then it is fetched, once.
        if await _heard_of(call, patient_id):
            return str(patient_id)
        call.fact("heard_of", patient_id)
    raise Invalid("PATIENT_UNKNOWN", "There is no such patient.", field=field)


async def _heard_of(call: Call, patient_id: str) -> bool:
    subject = call.runtime.access.tables.subject
    query = select(subject.c.patient_id).where(
        subject.c.tenant_id == call.tenant_id, subject.c.patient_id == patient_id
    )
    return (await call.db.execute(query)).first() is not None


async def _entry(request: pb.ImportAppointmentRequest, call: Call, model: type[Entry]) -> Entry:
    """Raises Invalid `REFERENCE_MISSING`, `CLINIC_UNKNOWN`, `PRACTITIONER_UNKNOWN`."""
    what = model.aggregate
    wanted: Any = getattr(request, f"{what}_id")
    field = f"{what}_id"
    if not wanted:
        field = f"{what}_identifier"
        if not request.HasField(field):  # type: ignore[arg-type]
            raise _missing(what)
        key = getattr(request, field)
        wanted = (
            select(DirectoryIdentifier.owner_id)
            .filter_by(tenant_id=call.tenant_id, kind=what, system=key.system, value=key.value)
            .scalar_subquery()
        )
    query = select(model).where(model.tenant_id == call.tenant_id, model.id == wanted)
    found = (await call.db.execute(query)).scalar_one_or_none()
    if found is None:
        raise Invalid(f"{what.upper()}_UNKNOWN", f"There is no such {what}.", field=field)
    return found


async def _visit_type(request: pb.ImportAppointmentRequest, call: Call) -> VisitType:
    """Raises Invalid `REFERENCE_MISSING`, `VISIT_TYPE_UNKNOWN`."""
    query = select(VisitType).where(VisitType.tenant_id == call.tenant_id)
    if request.visit_type_id:
        field, query = "visit_type_id", query.where(VisitType.id == request.visit_type_id)
    elif request.visit_type_code:
        field, query = "visit_type_code", query.where(VisitType.code == request.visit_type_code)
    else:
        raise _missing("visit_type", "code")
    found = (await call.db.execute(query)).scalar_one_or_none()
    if found is None:
        raise Invalid("VISIT_TYPE_UNKNOWN", "There is no such visit type.", field=field)
    return found


async def _refuse_deceased(call: Call, patient_id: str) -> None:
    dead = select(DeceasedPatient.patient_id).filter_by(tenant_id=call.tenant_id, patient_id=patient_id)
    if (await call.db.execute(dead)).first() is not None:
        raise FailedPrecondition("PATIENT_DECEASED", "Nothing is booked for somebody who has died.")


def _missing(what: str, other: str = "identifier") -> Invalid:
    return Invalid("REFERENCE_MISSING", f"Give {what}_id or {what}_{other}.", field=f"{what}_id")

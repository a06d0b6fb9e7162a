"""Appointments over gRPC: each RPC is one verb of the lifecycle."""

import contextlib
from datetime import datetime, timedelta
from typing import Any, Protocol

from care.scheduling.v1 import appointments_pb2 as pb
from care.scheduling.v1.appointments_pb2_grpc import AppointmentsServiceServicer
from sqlalchemy import select

from chassis.call import Call
from chassis.errors import FailedPrecondition, Invalid, Problem
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.rivals import Contest
from chassis.signing import Signer
from chassis.wire import enum_names, given_time, plain, to_proto, to_time
from services.scheduling import booking, days, occupancy, offers, policies, session, walkins
from services.scheduling.appointment import Appointment, Status
from services.scheduling.directory import Clinic, VisitType
from services.scheduling.offers import Place
from services.scheduling.scheduling_request import follow_visit, follow_visits, is_referred


class Wanting(Protocol):
    """What requests for a place have in common."""

    offer_token: str
    clinic_id: str
    practitioner_id: str
    start_time: Any

    def HasField(self, name: Any) -> bool: ...


Competing = pb.CreateAppointmentRequest | pb.HoldAppointmentRequest


def _time(request: Competing, call: Call) -> Place | None:
    """What a request competes for: what is asked of the whole place is then the same for all rivals."""
    if isinstance(request, pb.CreateAppointmentRequest) and request.HasField("overbooking"):
        return None  # it may have what is taken
    with contextlib.suppress(Problem):  # the method will say what is wrong
        if isinstance(request, pb.HoldAppointmentRequest) or request.offer_token:
            place = offers.read(offer_signer(call).open(request.offer_token), call.tenant_id, 0)
        else:
            place = _named(request, request.visit_type_id)
        return place._replace(resource_ids=())
    return None


async def _look(request: Competing, call: Call, wanted: Place) -> None:
    """Raises NotFound, then AlreadyExists `SLOT_TAKEN`, in the order in which the methods do."""
    await call.subject(request.patient_id)
    asked = {"tenant": call.tenant_id, "ref": wanted.practitioner_id, "second": wanted.start}
    if await call.records(occupancy.TAKEN, asked):
        raise booking.taken()


# Who moves an appointment stays out: what stands there may be its own.
_the_time = Contest(_time, _look, booking.taken().reason)


class AppointmentsServicer(AppointmentsServiceServicer):
    """Appointments, from the hold to the end."""

    @_the_time
    async def CreateAppointment(self, request: pb.CreateAppointmentRequest, call: Call) -> pb.Appointment:
        place = _offered(request.offer_token, call) if request.offer_token else _named(request, request.visit_type_id)
        overbooking = _overbooking(request, call)
        chosen = await _choose(call, request.patient_id, place, overbooking, terms=await _terms(request, call))
        appointment = await _new(request, call, chosen)
        appointment.comment = request.comment
        appointment.book(_reason(chosen, overbooking))
        return await _taken(call, appointment, chosen)

    @_the_time
    async def HoldAppointment(self, request: pb.HoldAppointmentRequest, call: Call) -> pb.Appointment:
        place = _offered(request.offer_token, call)
        chosen = await _choose(call, request.patient_id, place, terms=await _terms(request, call))
        appointment = await _new(request, call, chosen)
        seconds = request.hold_seconds if request.HasField("hold_seconds") else call.runtime.settings.hold_default  # type: ignore[attr-defined]
        appointment.hold(call.now + timedelta(seconds=seconds))
        return await _taken(call, appointment, chosen)

    async def WalkInAppointment(self, request: pb.WalkInAppointmentRequest, call: Call) -> pb.Appointment:
        call.require("appointments.book")
        await call.subject(request.patient_id)
        # Locked: those who come together go one after the other, so that each sees what is left.
        zone = await _zone_of(request.clinic_id, call, "clinic_id", locked=True)
        now = call.now.replace(second=0, microsecond=0)
        wanted = Place(request.visit_type_id, request.clinic_id, request.practitioner_id, int(now.timestamp()))
        overbooking, terms = _overbooking(request, call), booking.Terms(referral=await has_referral(request, call))
        if overbooking is None:
            wanted = await walkins.soonest(
                call.db, call.tenant_id, request.patient_id, wanted, call.now, zone, referral=terms.referral
            )
        elif not request.practitioner_id:
            raise Invalid("PLACE_MISSING", "Whose time is to be overbooked?", field="practitioner_id")
        chosen = await _choose(call, request.patient_id, wanted, overbooking, terms=terms)
        appointment = await _new(request, call, chosen)
        appointment.walk_in, appointment.comment = True, request.comment
        appointment.book(_reason(chosen, overbooking))
        call.db.add(appointment)
        # Booked first, then there: each is an event with a version of its own.
        await call.db.flush()
        await walkins.take(call.db, chosen, appointment)
        appointment.arrive(call.now, timedelta(0))
        return await _answer(call, appointment)

    async def BookAppointment(self, request: pb.BookAppointmentRequest, call: Call) -> pb.Appointment:
        appointment = await call.get(Appointment, request.id, etag=request.etag)
        if appointment.expired:
            raise _hold_expired()
        if request.based_on:
            appointment.based_on = [plain(one) for one in request.based_on]
        appointment.comment = request.comment or appointment.comment
        appointment.book()
        # Who took the slot over has taken the rows away; one that is merely late finds them expired.
        if not await booking.keep(call.db, appointment, call.now):
            raise _hold_expired()
        return await _answer(call, appointment)

    async def ReleaseAppointment(self, request: pb.ReleaseAppointmentRequest, call: Call) -> pb.Appointment:
        appointment = await call.get(Appointment, request.id, etag=request.etag)
        appointment.release()
        return await _freed(call, appointment)

    async def RescheduleAppointment(self, request: pb.RescheduleAppointmentRequest, call: Call) -> pb.Appointment:
        appointment = await call.get(Appointment, request.id, etag=request.etag)
        # Before any resource is locked: one in another status holds up nobody.
        appointment.lifecycle.arrow("reschedule", appointment.status)
        appointment.check_alone()
        if request.offer_token:
            place = _offered(request.offer_token, call)
        else:
            place = _named(request, appointment.visit_type_id, appointment)
        if place.visit_type_id != appointment.visit_type_id:
            raise Invalid("OFFER_INVALID", "The offer is for another visit type.", field="offer_token")
        place = place._replace(interpreter_language=place.interpreter_language or appointment.interpreter_language)
        await check_self_service(call, "reschedule", appointment)
        overbooking = _overbooking(request, call)
        terms = booking.Terms(is_self_service(call), _held_back(request, call))
        chosen = await _choose(call, appointment.patient_id, place, overbooking, moving=appointment, terms=terms)
        appointment.reschedule(_reason(chosen, overbooking), **chosen.values())
        await chosen.take(call.db, appointment)
        return await _answer(call, appointment)

    async def ConfirmAppointment(self, request: pb.ConfirmAppointmentRequest, call: Call) -> pb.Appointment:
        appointment = await call.get(Appointment, request.id, etag=request.etag)
        appointment.confirm(call.now)
        return await _answer(call, appointment)

    async def ArriveAppointment(self, request: pb.ArriveAppointmentRequest, call: Call) -> pb.Appointment:
        appointment = await call.get(Appointment, request.id, etag=request.etag)
        if appointment.status is Status.NOSHOW:
            call.purpose = "late arrival"
            call.require("appointments.late_arrival")
        early = call.runtime.settings.arrival_early  # type: ignore[attr-defined]
        appointment.arrive(call.now, timedelta(seconds=early))
        return await _answer(call, appointment)

    async def CheckInAppointment(self, request: pb.CheckInAppointmentRequest, call: Call) -> pb.Appointment:
        appointment = await call.get(Appointment, request.id, etag=request.etag)
        appointment.check_in()
        return await _answer(call, appointment)

    async def FulfillAppointment(self, request: pb.FulfillAppointmentRequest, call: Call) -> pb.Appointment:
        appointment = await call.get(Appointment, request.id, etag=request.etag)
        appointment.fulfill()
        return await _answer(call, appointment)

    async def MarkNoShowAppointment(self, request: pb.MarkNoShowAppointmentRequest, call: Call) -> pb.Appointment:
        appointment = await call.get(Appointment, request.id, etag=request.etag)
        grace = call.runtime.settings.no_show_grace  # type: ignore[attr-defined]
        reason = plain(request.reason) if request.HasField("reason") else None
        appointment.mark_no_show(call.now, timedelta(seconds=grace), reason)
        return await _answer(call, appointment)

    async def CancelAppointment(self, request: pb.CancelAppointmentRequest, call: Call) -> pb.Appointment:
        appointment = await call.get(Appointment, request.id, etag=request.etag)
        await check_self_service(call, "cancel", appointment)
        appointment.cancel(plain(request.reason), call.now)
        return await _freed(call, appointment)

    async def RevertAppointment(self, request: pb.RevertAppointmentRequest, call: Call) -> pb.Appointment:
        appointment = await call.get(Appointment, request.id, etag=request.etag)
        appointment.revert(call.now)
        return await _answer(call, appointment)

    async def EnterInErrorAppointment(self, request: pb.EnterInErrorAppointmentRequest, call: Call) -> pb.Appointment:
        appointment = await call.get(Appointment, request.id, etag=request.etag)
        appointment.enter_in_error()
        return await _freed(call, appointment)

    async def GetAppointment(self, request: pb.GetAppointmentRequest, call: Call) -> pb.Appointment:
        return to_proto(await call.get(Appointment, request.id), pb.Appointment)

    async def ListAppointments(self, request: pb.ListAppointmentsRequest, call: Call) -> pb.ListAppointmentsResponse:
        wanted = (
            Rows(Appointment)
            .among(Appointment.patient_id, request.patient_ids)
            .among(Appointment.clinic_id, request.clinic_ids)
            .among(Appointment.practitioner_id, request.practitioner_ids)
            .among(Appointment.status, enum_names(pb.Appointment.Status, request.statuses))
            .among(Appointment.series_id, request.series_ids)
            .among(Appointment.session_id, request.session_ids)
            .since(Appointment.start_time, given_time(request, "start_time_from"))
            .before(Appointment.start_time, given_time(request, "start_time_before"))
        )
        if request.date:
            opens, ends = await _clinic_day(request, call)
            wanted.since(Appointment.start_time, opens).before(Appointment.start_time, ends)
        rows, following = await call.page(
            wanted, request, Appointment.start_time, Appointment.id, descending=request.descending
        )
        return pb.ListAppointmentsResponse(
            appointments=[to_proto(row, pb.Appointment) for row in rows], next_page_token=following
        )

    async def BatchGetAppointments(
        self, request: pb.BatchGetAppointmentsRequest, call: Call
    ) -> pb.BatchGetAppointmentsResponse:
        rows = await call.all(Rows(Appointment).among(Appointment.id, request.ids))
        return pb.BatchGetAppointmentsResponse(appointments=[to_proto(row, pb.Appointment) for row in rows])


def offer_signer(call: Call) -> Signer:
    """Signs and opens offers."""
    return Signer(call.runtime.settings.signing_secret, "offer")


def _offered(token: str, call: Call) -> Place:
    return offers.read(offer_signer(call).open(token), call.tenant_id, int(call.now.timestamp()))


def _named(request: Wanting, visit_type_id: str, now: Appointment | None = None) -> Place:
    """The place that the request's own fields name; what is absent is as the appointment has it."""
    place = {
        "visit_type_id": visit_type_id,
        "clinic_id": request.clinic_id or (now.clinic_id if now is not None else ""),
        "practitioner_id": request.practitioner_id or (now.practitioner_id if now is not None else ""),
    }
    for field, value in place.items():
        if not value:
            raise Invalid("PLACE_MISSING", f"Without offer_token, {field} is needed.", field=field)
    if request.HasField("start_time"):
        start = to_time(request.start_time)
    elif now is not None:
        start = now.start_time
    else:
        raise Invalid("PLACE_MISSING", "Without offer_token, start_time is needed.", field="start_time")
    return Place(
        **place,
        start=int(occupancy.startable(start).timestamp()),
        interpreter_language=getattr(request, "interpreter_language", ""),
    )


def _overbooking(request: Any, call: Call) -> booking.Overbooking | None:
    if not request.HasField("overbooking"):
        return None
    asked = request.overbooking
    return booking.Overbooking(asked.reason, asked.patient_overlap, call.allows("appointments.overbook"))


def is_self_service(call: Call) -> bool:
    """Whether a patient, or somebody who acts for one, calls without staff."""
    return call.caller.kind in ("patient", "related")


async def check_self_service(call: Call, verb: str, appointment: Appointment) -> None:
    """Raises what `policies.check` does where a patient may not do this without staff, or no longer."""
    if not is_self_service(call):
        return
    column = {"reschedule": VisitType.self_rescheduling, "cancel": VisitType.self_cancelling}[verb]
    where = (VisitType.tenant_id == call.tenant_id, VisitType.id == appointment.visit_type_id)
    policy = (await call.db.execute(select(column).where(*where))).scalar_one_or_none()
    policies.check(verb, policy, int(appointment.start_time.timestamp()), int(call.now.timestamp()))


async def _terms(request: Competing, call: Call) -> booking.Terms:
    return booking.Terms(
        is_self_service(call),
        _held_back(request, call),
        await has_referral(request, call),
        request.payer,
    )


async def has_referral(request: Any, call: Call) -> bool:
    """Whether a visit that is asked for is based on a referral; a patient's word alone doesn't say so."""
    if is_self_service(call):
        return await is_referred(call.db, call.tenant_id, request.patient_id, request.based_on)
    return any(one.type == "Referral" for one in request.based_on)


def _held_back(request: Any, call: Call) -> bool:
    if request.held_back:
        call.require("appointments.held_back")
    return bool(request.held_back)


def _reason(chosen: booking.Chosen, overbooking: booking.Overbooking | None) -> str:
    """Why it was overbooked, where it was."""
    return overbooking.reason if overbooking is not None and any(chosen.lanes.values()) else ""


async def _choose(
    call: Call,
    patient_id: str,
    place: Place,
    overbooking: booking.Overbooking | None = None,
    moving: Appointment | None = None,
    terms: booking.Terms = booking.STAFF,
) -> booking.Chosen:
    walk_in = call.runtime.settings.walk_in if call.caller.kind == "staff" else 0  # type: ignore[attr-defined]
    return await booking.choose(
        call.db,
        call.tenant_id,
        patient_id,
        place,
        call.now,
        walk_in=walk_in,
        overbooking=overbooking,
        moving=moving,
        terms=terms,
        sight=call.sight(patient_id) if moving is None else None,
    )


async def _new(request: Any, call: Call, chosen: booking.Chosen) -> Appointment:
    appointment = Appointment(
        tenant_id=call.tenant_id,
        id=new_id(),
        patient_id=request.patient_id,
        based_on=[plain(one) for one in request.based_on],
    )
    appointment.place(**chosen.values())
    if request.previous_appointment_id:
        # Only read: the rows of others are never waited for.
        theirs = call.select(Appointment).where(
            Appointment.id == request.previous_appointment_id, Appointment.patient_id == request.patient_id
        )
        previous = (await call.db.execute(theirs)).scalar_one_or_none()
        if previous is None:
            raise Invalid(
                "PREVIOUS_UNKNOWN", "This patient has no such earlier visit.", field="previous_appointment_id"
            )
        appointment.follow(previous)
    return appointment


async def _taken(call: Call, appointment: Appointment, chosen: booking.Chosen) -> pb.Appointment:
    """The appointment goes in first: its foreign key waits for a death that is being recorded, and `take` then sees it."""
    call.db.add(appointment)
    await call.db.flush()
    await chosen.take(call.db, appointment)
    return await _answer(call, appointment)


async def _answer(call: Call, appointment: Appointment) -> pb.Appointment:
    if appointment.based_on:
        await follow_visit(call.db, appointment, call.now)
    await call.db.flush()
    return to_proto(appointment, pb.Appointment)


async def _freed(call: Call, appointment: Appointment) -> pb.Appointment:
    seated: list[Appointment] = []
    if appointment.session_id is not None:
        await call.db.flush()  # the seat is given back before it is given away
        seated = await session.promote(call.db, appointment.tenant_id, [appointment.session_id], call.now)
    await occupancy.free(call.db, (appointment.tenant_id, appointment.id))
    if seated:
        await follow_visits(call.db, [appointment, *seated], call.now)
    return await _answer(call, appointment)


async def _clinic_day(request: pb.ListAppointmentsRequest, call: Call) -> tuple[datetime, datetime]:
    """The first instant of the day in the clinic's zone, and that of the next day."""
    if len(request.clinic_ids) != 1:
        raise Invalid("CLINIC_MISSING", "date needs exactly one clinic: days begin by its clock.", field="clinic_ids")
    day = days.day_named(request.date)
    return days.window(day, await _zone_of(request.clinic_ids[0], call, "clinic_ids"))


async def _zone_of(clinic_id: str, call: Call, field: str, *, locked: bool = False) -> str:
    """The clinic's zone. Raises Invalid `CLINIC_UNKNOWN`."""
    zones = select(Clinic.time_zone).where(Clinic.tenant_id == call.tenant_id, Clinic.id == clinic_id)
    if locked:
        zones = zones.with_for_update(key_share=True)
    zone = (await call.db.execute(zones)).scalar_one_or_none()
    if zone is None:
        raise Invalid("CLINIC_UNKNOWN", "There is no such clinic.", field=field)
    return str(zone)


def _hold_expired() -> FailedPrecondition:
    return FailedPrecondition("HOLD_EXPIRED", "The hold ended before it was booked; search again.")

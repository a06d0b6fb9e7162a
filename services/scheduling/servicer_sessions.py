"""Group sessions over gRPC."""

from collections.abc import Sequence

from care.scheduling.v1 import appointments_pb2
from care.scheduling.v1 import sessions_pb2 as pb
from care.scheduling.v1.sessions_pb2_grpc import SessionsServiceServicer
from sqlalchemy import select

from chassis.call import Call, require_etag
from chassis.errors import AlreadyExists, FailedPrecondition, Invalid, LostRace, NotFound
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.wire import OUTPUT_ONLY, enum_names, given, given_time, plain, to_proto, to_time
from services.scheduling import booking, occupancy, policies, session
from services.scheduling.appointment import Appointment, Status
from services.scheduling.directory import Clinic, VisitType
from services.scheduling.occupancy import Taking
from services.scheduling.offers import Place
from services.scheduling.scheduling_request import follow_visit, follow_visits
from services.scheduling.servicer_appointments import has_referral, is_self_service
from services.scheduling.session import Session

_CHANGED = ("name", "capacity", "waitlist_size")
_NOT_GIVEN = OUTPUT_ONLY | {"enrolled", "waiting", "security_labels", "history"}
_GONE = (Status.CANCELLED, Status.ENTERED_IN_ERROR)


class SessionsServicer(SessionsServiceServicer):
    """Classes and groups."""

    async def CreateSession(self, request: pb.CreateSessionRequest, call: Call) -> pb.Session:
        if not call.is_of(request.clinic_id):
            raise Invalid("CLINIC_UNKNOWN", "You work at no such clinic.", field="clinic_id")
        start = occupancy.startable(to_time(request.start_time))
        place = Place(request.visit_type_id, request.clinic_id, request.practitioner_id, int(start.timestamp()))
        made = Session(
            tenant_id=call.tenant_id, id=new_id(), name=request.name, capacity=request.capacity,
            waitlist_size=request.waitlist_size,
        )  # fmt: skip
        chosen = await booking.choose(call.db, call.tenant_id, None, place, call.now)  # type: ignore[arg-type]
        made.place(chosen.values())
        made.schedule()
        call.db.add(made)
        await call.db.flush()
        if await occupancy.take(
            call.db, call.tenant_id, made.id, chosen.spans, patient_id=booking.NOBODY, freed=chosen.freed
        ):
            raise LostRace(booking.taken())
        return await _shown(call, made)

    async def EnrollSession(self, request: pb.EnrollSessionRequest, call: Call) -> appointments_pb2.Appointment:
        await call.subject(request.patient_id)
        found = await call.get(Session, request.id, etag=request.etag)
        found.check_open(call.now)
        if is_self_service(call):
            kinds = select(VisitType.self_booking).where(
                VisitType.tenant_id == call.tenant_id, VisitType.id == found.visit_type_id
            )
            policy = (await call.db.execute(kinds)).scalar_one_or_none()
            policies.check("book", policy, int(found.start_time.timestamp()), int(call.now.timestamp()))
            clinic = await call.db.get_one(Clinic, (call.tenant_id, found.clinic_id))
            await booking.keep_day(call.db, call.tenant_id, request.patient_id, found.taken_at, policy, clinic)
        terms = booking.Terms(
            is_self_service(call),
            referral=await has_referral(request, call),
            payer=request.payer,
        )
        is_new = await booking.admit(call.db, call.tenant_id, request.patient_id, found.taken_at, terms)
        own = select(Appointment.id).where(
            Appointment.tenant_id == call.tenant_id,
            Appointment.session_id == found.id,
            Appointment.patient_id == request.patient_id,
            Appointment.status.not_in(_GONE),
        )
        if (await call.db.execute(own)).first() is not None:
            raise AlreadyExists("ALREADY_ENROLLED", "The patient has a place in this session.")
        appointment = Appointment(
            tenant_id=call.tenant_id, id=new_id(), patient_id=request.patient_id, session_id=found.id,
            based_on=[plain(one) for one in request.based_on], new_patient=is_new,
        )  # fmt: skip
        appointment.place(**found.values(request.patient_id))
        appointment.seat_no = await session.seat(call.db, found)
        if appointment.seat_no is None:
            _, waiting = (await session.counts(call.db, call.tenant_id, [found.id])).get(found.id, (0, 0))
            if not request.join_waitlist or waiting >= found.waitlist_size:
                raise session.full()
            appointment.wait()
        else:
            appointment.book()
        call.db.add(appointment)
        await call.db.flush()
        if appointment.seat_no is not None and not await session.take(call.db, found, appointment):
            raise booking.busy()
        if appointment.based_on:
            await follow_visit(call.db, appointment, call.now)
            await call.db.flush()
        return to_proto(appointment, appointments_pb2.Appointment)

    async def UpdateSession(self, request: pb.UpdateSessionRequest, call: Call) -> pb.Session:
        etag, values = require_etag(request.etag), given(request.session, request.update_mask, read_only=_NOT_GIVEN)
        # Its row is locked, under which seats are counted; nobody who has a seat in hand is waited for.
        found = await call.get(Session, request.session.id, etag=etag)
        if not call.is_of(found.clinic_id):
            raise NotFound
        found.check_open(call.now)
        if values.get("name") == (await _names(call, [found]))[found.id]:
            del values["name"]  # sent back as it was shown, which may be the discreet one
        for name, value in values.items():
            if name not in _CHANGED and value != getattr(found, name):
                raise Invalid("FIELD_FIXED", f"{name} isn't changed so.", field=f"session.{name}")
        enrolled, _ = (await session.counts(call.db, call.tenant_id, [found.id])).get(found.id, (0, 0))
        more = values.get("capacity", found.capacity) > found.capacity
        found.update(enrolled, **{name: values[name] for name in _CHANGED if name in values})
        await call.db.flush()
        if more:
            await follow_visits(call.db, await session.promote_all(call.db, found, call.now), call.now)
        return await _shown(call, found)

    async def RescheduleSession(self, request: pb.RescheduleSessionRequest, call: Call) -> pb.Session:
        found, there = await _whole_session(call, request.id, request.etag)
        start = occupancy.startable(to_time(request.start_time)) if request.HasField("start_time") else found.start_time
        place = Place(
            found.visit_type_id, found.clinic_id, request.practitioner_id or found.practitioner_id, int(start.timestamp())
        )  # fmt: skip
        seated = [one for one in there if one.status is not Status.WAITLIST]
        numbers = await booking.numbers(call.db, call.tenant_id, None, place)
        numbers |= set(await occupancy.numbers(call.db, call.tenant_id, found.id, *(one.id for one in seated)))
        of_patients = {one.id: await session.number(call.db, call.tenant_id, one.patient_id) for one in seated}
        await occupancy.lock(call.db, sorted(numbers | set(of_patients.values())))
        chosen = await booking.look(call.db, call.tenant_id, None, place, call.now, moving=found.id)
        found.reschedule(chosen.values())
        for one in there:
            values = found.values(one.patient_id)
            if one.status is Status.WAITLIST:
                one.place(**values)
            else:
                one.reschedule(**values)
        await call.db.flush()
        takings = [Taking(found.id, booking.NOBODY, span) for span in chosen.spans]
        takings += [Taking(one.id, one.patient_id, found.span(of_patients[one.id])) for one in seated]
        ended = await booking.end_expired(call.db, call.tenant_id, chosen.stale) if chosen.stale else []
        freed = [found.id, *(one.id for one in seated), *ended]
        missing = await occupancy.take_all(call.db, call.tenant_id, takings, freed=freed)
        if any(holder == found.id for holder, _ in missing):
            raise LostRace(booking.taken())
        if missing:
            raise AlreadyExists(
                "PATIENT_BUSY", "Participants have other visits at this time.", patients=str(len(missing))
            )
        return await _shown(call, found)

    async def CancelSession(self, request: pb.CancelSessionRequest, call: Call) -> pb.Session:
        found, there = await _whole_session(call, request.id, request.etag)
        for one in there:
            one.cancel(plain(request.reason), call.now)
        found.cancel(request.reason.code)
        await call.db.flush()
        await occupancy.free(call.db, *((call.tenant_id, one.id) for one in [found, *there]))
        await follow_visits(call.db, there, call.now)
        return await _shown(call, found)

    async def GetSession(self, request: pb.GetSessionRequest, call: Call) -> pb.Session:
        return await _shown(call, await call.get(Session, request.id))

    async def ListSessions(self, request: pb.ListSessionsRequest, call: Call) -> pb.ListSessionsResponse:
        wanted = (
            Rows(Session)
            .among(Session.clinic_id, request.clinic_ids)
            .among(Session.visit_type_id, request.visit_type_ids)
            .among(Session.status, enum_names(pb.Session.Status, request.statuses))
            .since(Session.start_time, given_time(request, "start_time_from"))
            .before(Session.start_time, given_time(request, "start_time_before"))
        )
        rows, following = await call.page(wanted, request, Session.start_time, Session.id)
        return pb.ListSessionsResponse(sessions=await _all_shown(call, rows), next_page_token=following)


async def _whole_session(call: Call, session_id: str, etag: str) -> tuple[Session, list[Appointment]]:
    """A session that is open, and all that stand in it: their rows locked first, by id, then the session's.

    Whoever came in between is not waited for while the session is locked: then all is tried once more.
    """
    # Everybody may find a session and join it; what becomes of all its participants is its own clinic's to decide. Where it
    # is never changes, so it is known before anything is locked.
    where = select(Session.clinic_id).where(Session.tenant_id == call.tenant_id, Session.id == session_id)
    clinic_id = (await call.db.execute(where)).scalar_one_or_none()
    if clinic_id is None or not call.is_of(clinic_id):
        raise NotFound
    there = await session.participants(call.db, call.tenant_id, session_id)
    found = await call.get(Session, session_id, etag=etag)
    found.check_open(call.now)
    enrolled, waiting = (await session.counts(call.db, call.tenant_id, [found.id])).get(found.id, (0, 0))
    past = [one for one in there if one.status is Status.WAITLIST or one.seat_no is not None]
    if len(past) != enrolled + waiting:
        raise LostRace(FailedPrecondition("SESSION_CLOSED", "Somebody is joining or leaving; try again."))
    call.saw(*(one.patient_id for one in there))
    return found, there


async def _shown(call: Call, found: Session) -> pb.Session:
    return (await _all_shown(call, [found]))[0]


async def _all_shown(call: Call, rows: Sequence[Session]) -> list[pb.Session]:
    if not rows:
        return []
    known = await session.counts(call.db, call.tenant_id, [one.id for one in rows])
    names = await _names(call, rows)
    shown = []
    for one in rows:
        enrolled, waiting = known.get(one.id, (0, 0))
        shown.append(to_proto(one, pb.Session, enrolled=enrolled, waiting=waiting, name=names[one.id]))
    return shown


async def _names(call: Call, rows: Sequence[Session]) -> dict[str, str]:
    """What each is called for this caller: "Moving on after miscarriage" is nothing for everybody who may look for times."""
    theirs: set[str | None] = set()
    if is_self_service(call):
        seats = Rows(Appointment).among(Appointment.session_id, [one.id for one in rows])
        seats.among(Appointment.status, [status.name for status in Status if status not in _GONE])
        theirs = {one.session_id for one in await call.all(seats)}
    knows = call.caller.kind == "staff" and call.allows("directory.read")
    named = {
        one.id: one.name
        for one in rows
        if one.id in theirs or (knows and set(one.security_labels or ()) <= set(call.caller.clearances))
    }
    hidden = {one.visit_type_id for one in rows if one.id not in named}
    kinds = select(VisitType.id, VisitType.discreet_name).where(
        VisitType.tenant_id == call.tenant_id, VisitType.id.in_(hidden)
    )
    discreet = dict((await call.db.execute(kinds)).tuples().all()) if hidden else {}
    return {one.id: named.get(one.id, discreet.get(one.visit_type_id, "")) for one in rows}

"""Series of visits over gRPC: booked, moved and cancelled as a whole."""

import re
from collections.abc import Sequence
from datetime import datetime, time
from typing import Any
from zoneinfo import ZoneInfo

from care.scheduling.v1 import appointments_pb2
from care.scheduling.v1 import series_pb2 as pb
from care.scheduling.v1.series_pb2_grpc import SeriesServiceServicer
from sqlalchemy import select

from chassis.call import Call
from chassis.errors import FailedPrecondition, Invalid
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.wire import enum_names, plain, to_proto
from services.scheduling import booking, occupancy, offers, recurrence
from services.scheduling.appointment import Appointment
from services.scheduling.directory import Clinic
from services.scheduling.offers import Place
from services.scheduling.placing import Looked, Wanted, look_at_all, near, take_all
from services.scheduling.scheduling_request import follow_visit, follow_visits
from services.scheduling.series import Scope, Series, anchor, following, local, touched
from services.scheduling.servicer_appointments import check_self_service, has_referral, is_self_service, offer_signer

_START = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}")
_WITH_ALTERNATIVES = 12
Request = pb.CreateSeriesRequest


class SeriesServicer(SeriesServiceServicer):
    """Visits that recur."""

    async def PreviewSeries(self, request: pb.PreviewSeriesRequest, call: Call) -> pb.SeriesOutcome:
        _, looked, skipped = await _looked_up(request.series, call, lock=False)
        return await _report(call, request.series.patient_id, await _terms(request.series, call), looked, skipped)

    async def CreateSeries(self, request: pb.CreateSeriesRequest, call: Call) -> pb.SeriesOutcome:
        series, looked, skipped = await _looked_up(request, call, lock=True)
        fits = [one for one in looked if one.chosen is not None]
        if not fits or (len(fits) < len(looked) and request.on_conflict != Request.BOOK_WHAT_FITS):
            return await _report(call, request.patient_id, await _terms(request, call), looked, skipped)
        taken = []
        for part, one in enumerate(fits, 1):
            assert one.chosen is not None
            visit = Appointment(
                tenant_id=call.tenant_id,
                id=new_id(),
                patient_id=request.patient_id,
                based_on=[plain(each) for each in request.based_on],
                comment=request.comment,
                series_id=series.id,
                series_number=one.wanted.number,
                series_start_time=recurrence.instant(one.wanted.local, series.time_zone),
            )
            visit.series_part = part if len(fits) > 1 else 0
            visit.place(**one.chosen.values())
            visit.book()
            taken.append((visit, one.chosen))
        series.security_labels = taken[0][0].security_labels
        series.book(len(taken))
        # Before anything is taken: the foreign key waits for a death that is being recorded.
        call.db.add_all([series, *(visit for visit, _ in taken)])
        await call.db.flush()
        await take_all(call.db, call.tenant_id, taken)
        if request.based_on:
            await follow_visit(call.db, taken[0][0], call.now)
            await call.db.flush()
        booked = {visit.series_number: visit.id for visit, _ in taken}
        return await _report(call, request.patient_id, await _terms(request, call), looked, skipped, booked, series)

    async def RescheduleSeries(self, request: pb.RescheduleSeriesRequest, call: Call) -> pb.SeriesOutcome:
        series = await call.get(Series, request.id, etag=request.etag)
        if not (request.time or request.weekday or request.clinic_id or request.practitioner_id):
            raise Invalid("CHANGE_MISSING", "Give a time, a weekday, a clinic or a practitioner.", field="time")
        scope = Scope(pb.SeriesScope.Code.Name(request.scope))
        visits = await _visits(call, series)
        begin = anchor(visits, scope, request.appointment_id, call.now)
        if scope is not Scope.THIS:
            series.lifecycle.arrow("reschedule", series.status)
        chosen = touched(series, visits, scope, begin, call.now, exceptions=request.include_exceptions)
        await _check_self_service(call, "reschedule", chosen)
        zone = await _zone(call, request.clinic_id) if request.clinic_id else series.time_zone
        move = _Move(request, series, zone, alone=scope is Scope.THIS)
        wanted = [Wanted(visit.series_number or 0, move.place(visit), visit) for visit in chosen]
        based_on = [one for visit in chosen for one in visit.based_on or ()]
        terms = booking.Terms(is_self_service(call), referral=booking.has_referral(based_on))
        looked = await look_at_all(
            call.db,
            call.tenant_id,
            series.patient_id,
            wanted,
            call.now,
            lock=not request.validate_only,
            terms=terms,
        )
        if request.validate_only or not looked or any(one.chosen is None for one in looked):
            return await _report(call, series.patient_id, terms, looked, [])
        taken = []
        for part, one in enumerate(looked, 1):
            assert one.wanted.moving is not None and one.chosen is not None
            visit = one.wanted.moving
            visit.series_part = part if len(looked) > 1 else 0
            visit.reschedule(**one.chosen.values())
            taken.append((visit, one.chosen))
        kept = series
        if scope is not Scope.THIS:
            kept = _changed(call, series, visits, begin, move, len(taken))
            kept.security_labels = sorted({*(kept.security_labels or ()), *taken[0][0].security_labels})
        await call.db.flush()
        await take_all(call.db, call.tenant_id, taken, moving=True)
        booked = {visit.series_number or 0: visit.id for visit, _ in taken}
        return await _report(call, series.patient_id, terms, looked, [], booked, kept)

    async def CancelSeries(self, request: pb.CancelSeriesRequest, call: Call) -> pb.SeriesOutcome:
        series = await call.get(Series, request.id, etag=request.etag)
        scope = Scope(pb.SeriesScope.Code.Name(request.scope))
        visits = await _visits(call, series)
        begin = anchor(visits, scope, request.appointment_id, call.now)
        chosen = touched(series, visits, scope, begin, call.now, exceptions=not request.keep_exceptions)
        await _check_self_service(call, "cancel", chosen)
        reason = plain(request.reason)
        for part, visit in enumerate(chosen, 1):
            visit.series_part = part if len(chosen) > 1 else 0
            visit.cancel(reason, call.now)
        if scope is Scope.ALL or (begin is not None and len(following(visits, begin)) == len(visits) > 1):
            series.cancel(request.reason.code, len(chosen))
        elif scope is Scope.THIS_AND_FOLLOWING:
            last = max(local(visit, series.time_zone) for visit in visits if visit not in following(visits, begin))
            series.shorten(str(series.read_rule.ending(last)), len(chosen))
        if chosen:
            await occupancy.free(call.db, *((visit.tenant_id, visit.id) for visit in chosen))
        await call.db.flush()
        await follow_visits(call.db, chosen, call.now)
        await call.db.flush()
        answer = pb.SeriesOutcome(booked=bool(chosen), series=to_proto(series, pb.Series))
        for visit in chosen:
            answer.occurrences.append(
                to_proto(visit, pb.Occurrence, number=visit.series_number or 0, appointment_id=visit.id)
            )
        return answer

    async def GetSeries(self, request: pb.GetSeriesRequest, call: Call) -> pb.Series:
        return to_proto(await call.get(Series, request.id), pb.Series)

    async def ListSeries(self, request: pb.ListSeriesRequest, call: Call) -> pb.ListSeriesResponse:
        wanted = (
            Rows(Series)
            .among(Series.patient_id, request.patient_ids)
            .among(Series.status, enum_names(pb.Series.Status, request.statuses))
        )
        rows, following_page = await call.page(wanted, request, Series.create_time, Series.id, descending=True)
        return pb.ListSeriesResponse(series=[to_proto(row, pb.Series) for row in rows], next_page_token=following_page)


class _Move:
    """What a change makes of each visit that it is about."""

    def __init__(self, request: pb.RescheduleSeriesRequest, series: Series, zone: str, *, alone: bool) -> None:
        self.request, self.series, self.zone, self.alone = request, series, zone, alone
        self.clock = time.fromisoformat(request.time) if request.time else None
        self.day = request.weekday - 1 if request.weekday else None
        self.week_start = 0
        self.rule: recurrence.Rule | None = None
        if not alone:
            self.clock = self.clock or series.first.time()
            if self.day is not None:
                rule = series.read_rule
                self.week_start = rule.week_start
                self.rule = rule.on(self.day, series.first)

    def local(self, visit: Appointment) -> datetime:
        """The wall time that a visit gets: one that moves alone goes from where it is, others from where the series has them."""
        if self.alone:
            now = visit.start_time.astimezone(ZoneInfo(visit.time_zone)).replace(tzinfo=None)
        else:
            now = local(visit, self.series.time_zone)
        return recurrence.moved(now, self.clock, self.day, self.week_start)

    def start(self, visit: Appointment) -> datetime:
        """The instant that a visit gets."""
        zone = self.zone if self.request.clinic_id or not self.alone else visit.time_zone
        return recurrence.instant(self.local(visit), zone)

    def place(self, visit: Appointment) -> Place:
        """Where a visit goes."""
        now = visit if self.alone else self.series
        return Place(
            visit.visit_type_id,
            self.request.clinic_id or now.clinic_id,
            self.request.practitioner_id or now.practitioner_id,
            int(self.start(visit).timestamp()),
        )


def _changed(
    call: Call, series: Series, visits: Sequence[Appointment], begin: Appointment | None, move: _Move, count: int
) -> Series:
    """The series as the change leaves it: itself, or split where earlier visits stay with the old one."""
    rest = [visit for visit in following(visits, begin) if visit.start_time > call.now or visit is begin]
    earlier = [visit for visit in visits if visit not in rest]
    whole = move.rule or series.read_rule
    times = [(visit, move.local(visit)) for visit in rest]
    values = {
        "clinic_id": move.request.clinic_id or series.clinic_id,
        "practitioner_id": move.request.practitioner_id or series.practitioner_id,
        "time_zone": move.zone,
        "start": min(at for _, at in times).isoformat(timespec="minutes"),
        "rule": str(whole.ending(max(at for _, at in times))),
    }
    kept = series
    if earlier and begin is not None:
        last = max(local(visit, series.time_zone) for visit in earlier)
        series.shorten(str(series.read_rule.ending(last)), count)
        kept = Series(
            tenant_id=call.tenant_id,
            id=new_id(),
            patient_id=series.patient_id,
            visit_type_id=series.visit_type_id,
            previous_series_id=series.id,
            security_labels=series.security_labels,
            **values,
        )
        kept.book(count)
        call.db.add(kept)
    else:
        series.reschedule(count, **values)
    # Also those that stay where they are: from now on they are exceptions of what the series has become.
    for visit, at in times:
        visit.series_id, visit.series_start_time = kept.id, recurrence.instant(at, move.zone)
    return kept


async def _looked_up(
    request: pb.CreateSeriesRequest, call: Call, *, lock: bool
) -> tuple[Series, list[Looked], list[Wanted]]:
    """The series that is asked for, how each of its visits fits, and those that are left out."""
    await call.subject(request.patient_id)
    zone = await _zone(call, request.clinic_id)
    local_now = call.now.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    try:
        if not _START.fullmatch(request.start):
            raise ValueError
        first = datetime.fromisoformat(request.start)
    except ValueError:
        raise Invalid("START_INVALID", "start is a local time, such as 2027-03-01T09:00.", field="start") from None
    if first < local_now:
        raise Invalid("START_PAST", "The first visit would be in the past.", field="start")
    rule = recurrence.read(request.rule, ZoneInfo(zone))
    times = recurrence.wall_times(rule, first, local_now.date())
    choices = {choice.number: choice.offer_token for choice in request.choices}
    if choices and max(choices) > len(times):
        raise Invalid("CHOICE_UNKNOWN", "The rule names fewer visits than a choice says.", field="choices.number")
    wanted, skipped = [], []
    for number, at in enumerate(times, 1):
        start = int(recurrence.instant(at, zone).timestamp())
        place = Place(request.visit_type_id, request.clinic_id, request.practitioner_id, start)
        if token := choices.get(number, ""):
            place = offers.read(offer_signer(call).open(token), call.tenant_id, int(call.now.timestamp()))
            if place.visit_type_id != request.visit_type_id:
                raise Invalid("OFFER_INVALID", "The offer is for another visit type.", field="choices.offer_token")
        (skipped if choices.get(number) == "" else wanted).append(Wanted(number, place, local=at))
    terms = await _terms(request, call)
    looked = await look_at_all(call.db, call.tenant_id, request.patient_id, wanted, call.now, lock=lock, terms=terms)
    series = Series(
        tenant_id=call.tenant_id,
        id=new_id(),
        patient_id=request.patient_id,
        visit_type_id=request.visit_type_id,
        clinic_id=request.clinic_id,
        practitioner_id=request.practitioner_id,
        rule=str(rule),
        start=first.isoformat(timespec="minutes"),
        time_zone=zone,
    )
    return series, looked, skipped


async def _terms(request: pb.CreateSeriesRequest, call: Call) -> booking.Terms:
    return booking.Terms(is_self_service(call), referral=await has_referral(request, call))


async def _check_self_service(call: Call, verb: str, visits: Sequence[Appointment]) -> None:
    """A patient may do with several visits what may be done with the first of them, which is the soonest."""
    if visits:
        await check_self_service(call, verb, min(visits, key=lambda visit: visit.start_time))


async def _visits(call: Call, series: Series) -> list[Appointment]:
    """All visits of a series, locked by id."""
    query = (
        call.select(Appointment)
        .where(Appointment.series_id == series.id)
        .order_by(Appointment.id)
        .with_for_update(of=Appointment, key_share=True)
    )
    return list((await call.db.execute(query)).scalars())


async def _zone(call: Call, clinic_id: str) -> str:
    zones = select(Clinic.time_zone).where(Clinic.tenant_id == call.tenant_id, Clinic.id == clinic_id)
    zone = (await call.db.execute(zones)).scalar_one_or_none()
    if zone is None:
        raise Invalid("CLINIC_UNKNOWN", "There is no such clinic.", field="clinic_id")
    if not zone:
        raise FailedPrecondition("CLINIC_WITHOUT_ZONE", "This clinic has no time zone yet: nothing can be booked.")
    return zone


async def _report(
    call: Call,
    patient_id: str,
    terms: booking.Terms,
    looked: Sequence[Looked],
    skipped: Sequence[Wanted],
    booked: dict[int, str] | None = None,
    series: Series | None = None,
) -> pb.SeriesOutcome:
    """What became of each visit; what is free near those that don't fit."""
    answer = pb.SeriesOutcome(booked=bool(booked), conflicts=sum(one.chosen is None for one in looked))
    if series is not None:
        answer.series.CopyFrom(to_proto(series, pb.Series))
    fitting = [one.wanted.place.start for one in looked if one.chosen is not None]
    left = _WITH_ALTERNATIVES
    rows: list[tuple[Wanted, dict[str, Any]]] = [(one, {"skipped": True}) for one in skipped]
    for one in looked:
        more: dict[str, Any] = {"reason": one.reason, "appointment_id": (booked or {}).get(one.wanted.number, "")}
        if one.chosen is None and left:
            left -= 1
            more["alternatives"] = await _alternatives(call, patient_id, one.wanted.place, fitting, terms)
        rows.append((one.wanted, more))
    for wanted, more in sorted(rows, key=lambda row: row[0].number):
        occurrence = pb.Occurrence(number=wanted.number, **more)
        occurrence.start_time.seconds = wanted.place.start
        answer.occurrences.append(occurrence)
    return answer


async def _alternatives(
    call: Call, patient_id: str, place: Place, others: Sequence[int], terms: booking.Terms
) -> list[appointments_pb2.Slot]:
    signer = offer_signer(call)
    expires = int(call.now.timestamp()) + int(call.runtime.settings.offer_lifetime)  # type: ignore[attr-defined]
    zone = await _zone(call, place.clinic_id)
    found = []
    for slot in await near(call.db, call.tenant_id, patient_id, place, others, terms):
        offered = Place(place.visit_type_id, slot.clinic_id, slot.practitioner_id, slot.start, slot.resource_ids)
        one = to_proto(
            slot,
            appointments_pb2.Slot,
            visit_type_id=place.visit_type_id,
            time_zone=zone,
            offer_token=signer.sign(offers.written(call.tenant_id, offered, expires)),
        )
        one.start_time.seconds, one.end_time.seconds = slot.start, slot.end
        found.append(one)
    return found

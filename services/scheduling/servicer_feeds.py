"""Calendar feeds over gRPC: made and ended by who may see the visits, read by whoever holds the link."""

import asyncio
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from importlib.metadata import version
from typing import Any

from care.scheduling.v1 import feeds_pb2 as pb
from care.scheduling.v1.feeds_pb2_grpc import CalendarFeedsServiceServicer, CalendarLinksServiceServicer
from sqlalchemy import Numeric, Select, Text, cast, func, literal, or_, select

from chassis.call import Call
from chassis.errors import FailedPrecondition, NotFound
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.wire import enum_names, to_proto
from services.scheduling import calendars
from services.scheduling.appointment import Appointment, Status
from services.scheduling.calendars import Named
from services.scheduling.directory import Clinic, DirectoryRow, Practitioner, VisitType
from services.scheduling.feed import AT_MOST, CalendarFeed, hash_of

VISITS_AT_MOST = 5_000
"""Earliest first; what a feed has no room for lies furthest ahead."""
BACK, AHEAD = timedelta(days=30), timedelta(days=180)
CANCELLED_KEPT = timedelta(days=30)
_ENDED = (Status.CANCELLED, Status.ENTERED_IN_ERROR)
# What the text is made of beside the rows: another build of it is another text.
_FORMAT = f"1 {version('tzdata')}"


class CalendarFeedsServicer(CalendarFeedsServiceServicer):
    """A feed belongs to who made it: nobody else finds it."""

    async def CreateCalendarFeed(
        self, request: pb.CreateCalendarFeedRequest, call: Call
    ) -> pb.CreateCalendarFeedResponse:
        if request.include_details:
            call.require("feeds.details")
        if request.patient_id:
            await call.subject(request.patient_id)
        issuer, subject = call.login
        feed = CalendarFeed(
            id=new_id(),
            practitioner_id=request.practitioner_id or None,
            clinic_id=request.clinic_id or None,
            patient_id=request.patient_id or None,
            include_details=request.include_details,
            maker_id=call.caller.id,
            maker_issuer=issuer,
            maker_subject=subject,
        )
        if not await _may_show(call, feed):
            raise NotFound
        # One after the other: two at once would each see the last place free.
        await call.db.execute(select(func.pg_advisory_xact_lock(func.hashtextextended(f"feeds {call.caller.id}", 0))))
        mine = call.select(CalendarFeed).where(CalendarFeed.maker_id == call.caller.id, CalendarFeed.status == "ACTIVE")
        counted = await call.db.execute(select(func.count()).select_from(mine.limit(AT_MOST).subquery()))
        if counted.scalar_one() >= AT_MOST:
            raise FailedPrecondition("FEED_LIMIT_REACHED", "You have as many feeds as one may have; revoke one first.")
        token = feed.make()
        await call.add(feed)
        await call.db.flush()
        return pb.CreateCalendarFeedResponse(
            calendar_feed=to_proto(feed, pb.CalendarFeed), token=token, path=f"/calendars/{token}.ics"
        )

    async def ListCalendarFeeds(self, request: pb.ListCalendarFeedsRequest, call: Call) -> pb.ListCalendarFeedsResponse:
        statuses = enum_names(pb.CalendarFeed.Status, request.statuses) or ["ACTIVE"]
        mine = Rows(CalendarFeed).equal(CalendarFeed.maker_id, call.caller.id).among(CalendarFeed.status, statuses)
        rows, following = await call.page(mine, request, CalendarFeed.id)
        return pb.ListCalendarFeedsResponse(
            calendar_feeds=[to_proto(row, pb.CalendarFeed) for row in rows], next_page_token=following
        )

    async def RevokeCalendarFeed(self, request: pb.RevokeCalendarFeedRequest, call: Call) -> pb.CalendarFeed:
        feed = await call.get(CalendarFeed, request.id)
        if feed.maker_id != call.caller.id:
            raise NotFound
        feed.revoke()
        await call.db.flush()
        return to_proto(feed, pb.CalendarFeed)

    async def GetAppointmentCalendar(
        self, request: pb.GetAppointmentCalendarRequest, call: Call
    ) -> pb.AppointmentCalendar:
        row = await call.get(Appointment, request.id)
        names = await _Names.of(call, [row])
        text = calendars.calendar([names.visit(row, whose="patient", details=False)], "Visit")
        return pb.AppointmentCalendar(file_name="visit.ics", calendar=text)


class CalendarLinksServicer(CalendarLinksServiceServicer):
    """The link is the credential, and shows what its maker may see now.

    A clinic's or practitioner's feed says of nobody who comes, so that its readings are noted without patients; a
    patient's own are noted as looks into the record.
    """

    async def GetCalendarByLink(self, request: pb.GetCalendarByLinkRequest, call: Call) -> pb.CalendarByLink:
        feed = await call.by_link(CalendarFeed, CalendarFeed.token_hash == hash_of(request.token))
        if (
            feed is None
            or not await call.see_as(feed.maker_issuer, feed.maker_subject)
            or not call.allows("feeds.write")
            or not await _may_show(call, feed)
        ):
            raise NotFound("LINK_UNKNOWN", "There is no such link.")
        details = feed.include_details and call.allows("feeds.details")
        wanted = _wanted(call, feed)
        etag = await _etag(call, wanted, details)
        if etag in request.etags:
            return pb.CalendarByLink(etag=etag, unchanged=True)
        rows = [
            row
            for row in (await call.db.execute(wanted.with_only_columns(*_COLUMNS))).all()
            if calendars.promised(row.status, row.last_step)
        ]
        names = await _Names.of(call, rows)
        whose = "patient" if feed.patient_id else "practitioner" if feed.practitioner_id else "clinic"
        # The longest takes a fifth of a second: others are served meanwhile.
        text = await asyncio.to_thread(_text, names, rows, whose, details)
        return pb.CalendarByLink(etag=etag, calendar=text)


def _text(names: "_Names", rows: Sequence[Any], whose: str, details: bool) -> str:
    return calendars.calendar([names.visit(row, whose=whose, details=details) for row in rows])


async def _may_show(call: Call, feed: CalendarFeed) -> bool:
    """Whether the caller may follow these visits: a patient whom they see, a clinic of theirs, a practitioner there."""
    if feed.patient_id:
        return await call.sees(feed.patient_id)
    mine = set(call.caller.group_ids) if call.caller.kind == "staff" else set()
    if feed.clinic_id:
        return feed.clinic_id in mine
    clinics = call.select(Practitioner).where(Practitioner.id == feed.practitioner_id)
    found = (await call.db.execute(clinics.with_only_columns(Practitioner.clinic_ids))).scalar_one_or_none()
    return bool(mine & set(found or ()))


def _wanted(call: Call, feed: CalendarFeed) -> Select[Any]:
    """The rows of a feed, by one of the indexes that end in the start. Whole days (UTC), so that it moves once a day."""
    today = func.date_trunc("day", func.now(), "UTC")
    query = call.select(Appointment).where(
        Appointment.start_time >= today - BACK,
        Appointment.start_time < today + AHEAD,
        or_(Appointment.status.not_in(_ENDED), Appointment.update_time >= today - CANCELLED_KEPT),
    )
    if feed.patient_id:
        query = query.where(Appointment.patient_id == feed.patient_id)
    elif feed.practitioner_id:
        query = query.where(Appointment.practitioner_id == feed.practitioner_id)
    else:
        query = query.where(Appointment.clinic_id == feed.clinic_id)
    return query.order_by(Appointment.start_time, Appointment.id).limit(VISITS_AT_MOST)


async def _etag(call: Call, wanted: Select[Any], details: bool) -> str:
    """One statement: which rows there are, in which version, and the versions of what they are named after."""
    shown = wanted.with_only_columns(
        Appointment.id,
        Appointment.version,
        Appointment.clinic_id,
        Appointment.visit_type_id,
        Appointment.practitioner_id,
    ).cte("shown")
    row = func.hashtextextended(cast(shown.c.id, Text) + literal(":") + cast(shown.c.version, Text), 0)
    columns = [select(func.count(), func.sum(cast(row, Numeric))).select_from(shown).subquery()]
    directory = [
        select(func.sum(model.version))
        .where(model.tenant_id == call.tenant_id, model.id.in_(select(shown.c[f"{model.__tablename__}_id"])))
        .scalar_subquery()
        for model in (Clinic, VisitType, Practitioner)
    ]
    found = (await call.db.execute(select(columns[0], *directory))).one()
    told = " ".join(map(str, (_FORMAT, details, *found)))
    return hashlib.sha256(told.encode()).hexdigest()[:32]


class _Names:
    """What a calendar may say of clinics, visit types and practitioners."""

    def __init__(self, found: Mapping[type[DirectoryRow], Mapping[str, Named]]) -> None:
        self._found = found

    @classmethod
    async def of(cls, call: Call, rows: Iterable[Any]) -> "_Names":
        found = {}
        for model, field in ((Clinic, "clinic_id"), (VisitType, "visit_type_id"), (Practitioner, "practitioner_id")):
            ids = {getattr(row, field) for row in rows}
            query = call.select(model).where(model.id.in_(ids))  # type: ignore[type-var]
            found[model] = {one.id: _named(one) for one in (await call.db.execute(query)).scalars()} if ids else {}
        return cls(found)

    def visit(self, row: Any, *, whose: str, details: bool) -> calendars.Visit:
        return calendars.visit(
            row,
            self._found[Clinic].get(row.clinic_id),
            self._found[VisitType].get(row.visit_type_id),
            self._found[Practitioner].get(row.practitioner_id),
            whose=whose,
            details=details,
        )


def _named(row: Any) -> Named:
    if isinstance(row, Practitioner):
        name = row.name or {}
        return Named(" ".join([*name.get("given_names", ()), name.get("family_name", "")]))
    return Named(row.name, row.discreet_name, row.security_labels, getattr(row, "address", None))


_COLUMNS = (
    Appointment.id,
    Appointment.status,
    Appointment.start_time,
    Appointment.end_time,
    Appointment.time_zone,
    Appointment.modality,
    Appointment.schedule_version,
    Appointment.security_labels,
    Appointment.create_time,
    Appointment.update_time,
    Appointment.clinic_id,
    Appointment.visit_type_id,
    Appointment.practitioner_id,
    Appointment.history[-1].label("last_step"),
)

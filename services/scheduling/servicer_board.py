"""The day board over gRPC."""

from collections import Counter
from collections.abc import Sequence
from datetime import date, datetime
from typing import NamedTuple

import orjson
from care.scheduling.v1 import board_pb2 as pb
from care.scheduling.v1.board_pb2_grpc import DayBoardServiceServicer
from sqlalchemy import Uuid, bindparam, text

from chassis.call import Call
from chassis.errors import Invalid
from chassis.reading import Rows
from chassis.wire import to_proto
from services.scheduling import board, days
from services.scheduling.appointment import Appointment, Status

_PAGE, _PAGE_AT_MOST = 500, 1000


class DayBoardServicer(DayBoardServiceServicer):
    """A clinic's day at a glance."""

    async def ListDayBoard(self, request: pb.ListDayBoardRequest, call: Call) -> pb.ListDayBoardResponse:
        day = days.day_named(request.date) if request.date else None
        found = await read(call, request.clinic_id, day, request)
        counts = [{"status": status, "visits": visits} for status, visits in found.counts]
        columns = [to_proto(one, pb.DayBoardColumn) for one in found.columns]
        return to_proto(found, pb.ListDayBoardResponse, columns=columns, counts=counts)


class Board(NamedTuple):
    """A clinic's day, as it was at `read_time`."""

    date: str
    time_zone: str
    read_time: datetime
    columns: Sequence[board.Column]
    counts: Sequence[tuple[Status, int]]
    next_page_token: str


async def read(call: Call, clinic_id: str, day: date | None, request: pb.ListDayBoardRequest) -> Board:
    """A page of the board; today's where no day is named.

    Two statements, however many practitioners and visits: the clinic with its people and the clock, and the visits that the
    caller may see, by start. Raises Invalid `CLINIC_UNKNOWN`.
    """
    found = await call.records(_CLINIC, {"tenant": call.tenant_id, "clinic": clinic_id})
    if not found:
        raise Invalid("CLINIC_UNKNOWN", "There is no such clinic.", field="clinic_id")
    ((zone, now, people),) = found
    day = day or days.today(now, zone)
    opens, ends = days.window(day, zone)
    wanted = (
        Rows(Appointment)
        .equal(Appointment.clinic_id, clinic_id)
        .since(Appointment.start_time, opens)
        .before(Appointment.start_time, ends)
        .outside(Appointment.status, [Status.ENTERED_IN_ERROR.name])
    )
    rows, following = await call.page(
        wanted, request, Appointment.start_time, Appointment.id, default=_PAGE, most=_PAGE_AT_MOST
    )
    visits = [row for row in rows if board.shown(row, now)]
    first = not request.page_token
    # Who else works there, and what they are called, is the directory's.
    named = orjson.loads(people) if call.allows("directory.read") else ()
    columns = board.arrange(visits, named, now, everybody=first)
    counts = Counter(Status[row.status.name] for row in visits)
    return Board(day.isoformat(), zone, now, columns, [(one, counts[one]) for one in Status if counts[one]], following)


_CLINIC = text(
    "SELECT c.time_zone, clock_timestamp(),"
    " (SELECT coalesce(json_agg(json_build_array(p.id, p.name) ORDER BY p.family_name, p.id), '[]') FROM"
    " (SELECT * FROM practitioner WHERE tenant_id = c.tenant_id AND active AND clinic_ids @> ARRAY[c.id] LIMIT 500) p"
    ")::text FROM clinic c WHERE c.tenant_id = :tenant AND c.id = :clinic"
).bindparams(bindparam("tenant", type_=Uuid(as_uuid=False)), bindparam("clinic", type_=Uuid(as_uuid=False)))

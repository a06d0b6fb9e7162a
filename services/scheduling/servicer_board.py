"""The day board over gRPC."""

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, date, datetime
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import orjson
from care.scheduling.v1 import board_pb2 as pb
from care.scheduling.v1.board_pb2_grpc import DayBoardServiceServicer
from sqlalchemy import BigInteger, DateTime, TextClause, Uuid, bindparam, text

from chassis.call import Call
from chassis.errors import Invalid
from chassis.wire import to_proto
from services.scheduling import board, days
from services.scheduling.appointment import Appointment, Status

_PAGE, _PAGE_AT_MOST = 500, 1000
_ZONES_AT_MOST = 20_000
_FIRST = (datetime(1, 1, 2, tzinfo=UTC), "00000000-0000-0000-0000-000000000000")


class DayBoardServicer(DayBoardServiceServicer):
    """A clinic's day at a glance."""

    def __init__(self) -> None:
        self._zones: WeakKeyDictionary[Any, dict[tuple[str, str], str]] = WeakKeyDictionary()

    async def ListDayBoard(self, request: pb.ListDayBoardRequest, call: Call) -> pb.ListDayBoardResponse:
        day = days.day_named(request.date) if request.date else None
        zones = self._zones.setdefault(call.runtime.database, {})
        found = await read(call, request.clinic_id, day, request, zones)
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


async def read(
    call: Call, clinic_id: str, day: date | None, request: pb.ListDayBoardRequest, zones: dict[tuple[str, str], str]
) -> Board:
    """A page of the board; today's where no day is named.

    One statement, however many practitioners and visits: the clinic with its people and the clock, and the visits that the
    caller may see, by start. Where the day begins is known by the zone that the clinic had the last time (`zones`); where it
    has another one, or the clock shows another day, it is read again. Raises Invalid `CLINIC_UNKNOWN`.
    """
    size, after = call.page_asked(request, datetime, str, default=_PAGE, most=_PAGE_AT_MOST)
    condition, values = call.scope(Appointment)
    key, now = (call.tenant_id, clinic_id), datetime.now(UTC)
    if len(zones) > _ZONES_AT_MOST:
        zones.clear()
    while True:
        zone = zones.get(key, "")
        shown = day or days.today(now, zone)
        opens, ends = days.window(shown, zone)
        start, last = after or _FIRST
        wanted = {
            "clinic": clinic_id,
            "opens": opens,
            "ends": ends,
            "after": start,
            "after_id": last,
            "count": size + 1,
        }
        head, *rows = await call.records(_board(condition), {**values, **wanted}) or [None]
        if head is None:
            raise Invalid("CLINIC_UNKNOWN", "There is no such clinic.", field="clinic_id")
        found, now, people = head[:3]
        zones[key] = found
        if found == zone and shown == (day or days.today(now, zone)):
            break
    visits = [board.Visit.of(row[3:]) for row in rows]
    following = ""
    if len(visits) > size:
        visits = visits[:size]
        following = call.page_after(request, visits[-1].start_time, visits[-1].id)
    call.saw(*(one.patient_id for one in visits))
    visits = [one for one in visits if board.shown(one, now)]
    # Who else works there, and what they are called, is the directory's.
    named = orjson.loads(people) if call.allows("directory.read") else ()
    columns = board.arrange(visits, named, now, everybody=after is None)
    counts = Counter(one.status for one in visits)
    return Board(
        shown.isoformat(), zone, now, columns, [(one, counts[one]) for one in Status if counts[one]], following
    )


# The clinic first, then the visits. When somebody came is the last step of that name; a hold that ended was one before.
_BOARD = """
SELECT c.time_zone, clock_timestamp() AS now,
       (SELECT coalesce(json_agg(json_build_array(p.id, p.name) ORDER BY p.family_name, p.id), '[]')
          FROM (SELECT * FROM practitioner WHERE tenant_id = c.tenant_id AND active AND clinic_ids @> ARRAY[c.id] LIMIT 500) p
       )::text AS people,
       NULL AS id, NULL::bigint AS version, NULL AS patient_id, NULL AS practitioner_id, NULL AS status, NULL AS visit_type_id,
       NULL::timestamptz AS start_time, NULL::timestamptz AS end_time, NULL AS modality, NULL::bigint AS overbooking,
       NULL::bool AS walk_in, NULL::timestamptz AS confirm_time, NULL::timestamptz AS hold_expire_time, NULL AS arrived,
       NULL AS came_from, NULL::text[] AS resource_ids
  FROM clinic c WHERE c.tenant_id = :tenant AND c.id = :clinic
UNION ALL
SELECT NULL, NULL, NULL, v.* FROM (
  SELECT appointment.id::text, version, appointment.patient_id::text, practitioner_id::text, status, visit_type_id::text,
         start_time, end_time, modality, overbooking, walk_in, confirm_time, hold_expire_time,
         CASE WHEN status IN ('ARRIVED', 'CHECKED_IN', 'FULFILLED') THEN (
           SELECT step->>'time' FROM jsonb_array_elements(history) WITH ORDINALITY AS s(step, place)
            WHERE step->>'action' = 'arrive' ORDER BY place DESC LIMIT 1) END,
         history->-1->>'from_status',
         CASE WHEN jsonb_array_length(participants) > 2 THEN ARRAY(
           SELECT one->'actor'->>'id' FROM jsonb_array_elements(participants) AS p(one)
            WHERE one->'actor'->>'type' = 'Resource') ELSE '{}' END
    FROM appointment JOIN record_subject ON record_subject.tenant_id = appointment.tenant_id
     AND record_subject.patient_id = appointment.patient_id
   WHERE appointment.tenant_id = :tenant AND clinic_id = :clinic AND start_time >= :opens AND start_time < :ends
     AND status <> 'ENTERED_IN_ERROR' AND (start_time, appointment.id) > (:after, :after_id) AND {scope}
   ORDER BY start_time, appointment.id LIMIT :count) v
"""


@cache
def _board(scope: TextClause) -> TextClause:
    """The statement, with the condition under which the caller sees a visit."""
    return text(_BOARD.replace("{scope}", scope.text)).bindparams(
        *scope._bindparams.values(),
        *(bindparam(name, type_=Uuid(as_uuid=False)) for name in ("tenant", "clinic", "after_id")),
        *(bindparam(name, type_=DateTime(timezone=True)) for name in ("opens", "ends", "after")),
        bindparam("count", type_=BigInteger),
    )

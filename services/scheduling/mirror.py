"""Who is taken when in the coming weeks, kept in the process and brought up to date before each search.

Every change of `occupancy` notes itself in `occupancy_change` in its own transaction (a trigger, so that no way of booking
can forget it). A look asks which changes became visible since the look before, by the snapshots of both, and reads the
calendar again there: nothing that commits late is passed over, and what is noted twice is read twice. A search waits for a
look that began after it came, one for all who wait; so it sees what was booked before it began, whatever replica booked it.
"""

import asyncio
import time
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from sqlalchemy import BigInteger, Text, Uuid, bindparam, text
from sqlalchemy.dialects.postgresql import ARRAY

from services.scheduling.availability import DAY, Interval
from services.scheduling.occupancy import CHANGES_KEPT_SECONDS, LANES, PACKED

Fetch = Callable[[Any, Mapping[str, Any]], Awaitable[Sequence[Sequence[Any]]]]
"""Rows of a textual statement; an id may be the driver's own kind of UUID."""
DAYS_AHEAD = 35
"""How far ahead it reaches; what lies beyond is read for each search."""
AT_MOST = 2000
"""So many people and rooms of a tenant are kept, those that were read last; a search for more reads for itself."""
_SLACK_DAYS = 3
_AT_ONCE = 100
_CHANGES_AT_MOST = 5000
_ROWS_AT_MOST = 400_000
_FORGOTTEN_AFTER = CHANGES_KEPT_SECONDS / 2
_NEVER = "1:1:"


class Entry:
    """What somebody or something is taken for, [first, last) of it."""

    __slots__ = ("change", "first", "last", "rows")

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.rows: list[tuple[int, int, float]] = []
        """(start, end, when that ends by itself or 0), ascending; in any lane."""
        self.change = 0

    def replace(self, first: int, last: int, rows: Sequence[tuple[int, int, float]]) -> None:
        """What overlaps [first, last) is this now."""
        self.rows = sorted([one for one in self.rows if one[1] <= first or one[0] >= last] + list(rows))
        self.change += 1

    def busy(self, now: float, first: int, last: int) -> list[Interval]:
        """What stands within a window."""
        return [
            (start, end)
            for start, end, expires in self.rows
            if end > first and start < last and (not expires or expires > now)
        ]

    def ends(self, now: float) -> float:
        """When the first of those that stand now ends by itself."""
        return min((expires for _, _, expires in self.rows if expires > now), default=float("inf"))


class Mirror:
    """The calendar of one tenant."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._begun = self._done = 0
        self._snapshot = _NEVER
        self._looked = float("-inf")
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self.rows = 0
        """How many are kept, as of what was read last."""
        self.now = 0.0
        """The database's clock at the last look, in seconds of the epoch."""
        self.version = (0, 0)
        """Of the directory, as the last look found it: since when its server runs, and the sum of all versions."""

    @property
    def edge(self) -> int:
        """The second up to which it says what stands."""
        return int(self.now) // DAY * DAY + DAYS_AHEAD * DAY

    def __getitem__(self, ref_id: str) -> Entry:
        return self._entries[ref_id]

    async def look(self, fetch: Fetch, tenant_id: str) -> None:
        """Returns after a look that began after this call. One statement, for all who wait."""
        wanted = self._begun + 1
        async with self._lock:
            if self._done < wanted:
                await self._look(fetch, tenant_id)

    async def _look(self, fetch: Fetch, tenant_id: str) -> None:
        self._begun += 1
        number, began = self._begun, time.monotonic()
        if began - self._looked > _FORGOTTEN_AFTER:  # what has changed meanwhile may be forgotten
            self._forget()
        since = self._snapshot
        values = {"tenant": tenant_id, "since": since, "oldest": _oldest(since), "entries": len(self._entries)}
        (_, many, version, server, _, now, snapshot), *rows = await fetch(_LOOK, values)
        ranges: dict[tuple[Any, int, int], list[tuple[int, int, float]]] = {}
        for ref_id, first, last, start, end, expires, _ in rows:
            found = ranges.setdefault((ref_id, first, last), [])
            if start is not None:
                found.append((start, end, expires or 0.0))
        # Another server may not have all that this one had, and numbers its transactions on from there. What has changed is
        # forgotten by the database's clock, which may have gone on while this process, and its own clock, stood still.
        lost = server != self.version[0] or _newest(snapshot) < _newest(since) or now - self.now > _FORGOTTEN_AFTER
        if many or lost:
            self._forget()
        else:
            for (ref_id, first, last), found in ranges.items():
                entry = self._entries.get(str(ref_id))
                if entry is not None:
                    entry.replace(first, last, found)
        self._snapshot, self._looked, self._done = snapshot, began, number
        self.now, self.version = float(now), (int(server), int(version))

    def _forget(self) -> None:
        self._entries.clear()
        self.rows = 0
        self._snapshot = _NEVER

    async def keep(self, fetch: Fetch, tenant_id: str, ref_ids: Collection[str]) -> bool:
        """See to it that these are kept up to `edge`; False where they are too many. No statement where they are."""
        if len(ref_ids) > AT_MOST:
            return False
        if not self._missing(ref_ids):
            return True
        async with self._lock:  # between a look and the next one: what changes from now on the next one will tell
            missing = sorted(self._missing(ref_ids))
            first, last = int(self.now) // DAY * DAY - DAY, self.edge + _SLACK_DAYS * DAY
            for number in range(0, len(missing), _AT_ONCE):
                refs = missing[number : number + _AT_ONCE]
                rows = await fetch(_LOAD, {"tenant": tenant_id, "refs": refs, "first": first, "last": last})
                if len(rows) >= _ROWS_AT_MOST:
                    return False
                found = {ref_id: Entry(first, last) for ref_id in refs}
                for ref_id, start, end, expires in rows:
                    found[str(ref_id)].rows.append((start, end, expires or 0.0))
                for ref_id, entry in found.items():
                    entry.rows.sort()
                    self._entries[ref_id] = entry
        while len(self._entries) > AT_MOST:
            self._entries.popitem(last=False)
        self.rows = sum(len(one.rows) for one in self._entries.values())
        return not self._missing(ref_ids)

    def _missing(self, ref_ids: Collection[str]) -> list[str]:
        last, entries = self.edge + DAY, self._entries
        return [one for one in ref_ids if (entry := entries.get(one)) is None or entry.last < last]


class Starts:
    """All starts of somebody's visits of one type, ascending, while nothing changes."""

    __slots__ = ("at", "change", "days", "entry", "until")

    def __init__(self, entry: Entry, now: float, at: list[int], days: list[tuple[int, int]]) -> None:
        self.entry, self.change, self.until = entry, entry.change, entry.ends(now)
        self.at = array("q", at)  # a fifth of a list's room
        self.days = days
        """(ordinal of the local date, place of its first start), ascending."""

    def holds(self, entry: Entry, now: float) -> bool:
        """Whether they are still right."""
        return self.entry is entry and self.change == entry.change and now < self.until

    def within(self, first: int, last: int) -> tuple[int, int]:
        """The places of those in [first, last)."""
        return bisect_left(self.at, first), bisect_left(self.at, last)

    def of_day(self, day: int, first: int, last: int) -> tuple[int, int]:
        """How many of a local date lie in [first, last), and the first of them."""
        count, at = 0, 0
        for (one, place), (_, following) in pairwise([*self.days, (0, len(self.at))]):
            if one == day:
                low, high = self.within(first, last)
                low, high = max(place, low), min(following, high)
                if low < high:
                    count, at = count + high - low, at or self.at[low]
        return count, at


def by_day(found: Iterable[Starts]) -> list[tuple[int, int, int, int]]:
    """(ordinal of the local date, how many of all, the first and the last of them), by date."""
    days: dict[int, tuple[int, int, int]] = {}
    for starts in found:
        at = starts.at
        for (day, place), (_, following) in pairwise([*starts.days, (0, len(at))]):
            count, first, last = days.get(day, (0, at[place], at[place]))
            days[day] = (count + following - place, min(first, at[place]), max(last, at[following - 1]))
    return [(day, *days[day]) for day in sorted(days)]


def _oldest(snapshot: str) -> int:
    return int(snapshot.split(":", 1)[0])


def _newest(snapshot: str) -> int:
    return int(snapshot.split(":", 2)[1])


_TABLES = ("clinic", "practitioner", "schedule", "resource", "visit_type")
VERSION = (
    "("
    + " + ".join(f"(SELECT coalesce(sum(version), 0) FROM {table} WHERE tenant_id = :tenant)" for table in _TABLES)
    + ")::bigint"
)
"""SQL: the version of the whole directory."""
_BEGIN = PACKED.format(no="b.no", lane="lane.n")
_STANDS = (
    # OFFSET 0 keeps it a look into the index for each lane.
    f"FROM generate_series(0, {LANES - 1}) AS lane(n) CROSS JOIN LATERAL (SELECT during, expire_time FROM occupancy"
    f" WHERE during && int8range({_BEGIN} + {{first}}, {_BEGIN} + {{last}})"
    " AND (expire_time IS NULL OR expire_time > clock_timestamp()) OFFSET 0) o"
)
_SPAN = (
    f"lower(o.during) - {_BEGIN} AS start, upper(o.during) - {_BEGIN} AS finish,"
    " extract(epoch FROM o.expire_time)::float8 AS expires"
)
_CHANGED = (
    "SELECT DISTINCT no, first, last FROM occupancy_change WHERE :entries > 0 AND tenant_id = :tenant AND xid >= :oldest"
    " AND NOT pg_visible_in_snapshot((xid::text)::xid8, (:since)::pg_snapshot)"
    f" LIMIT {_CHANGES_AT_MOST + 1}"
)
_LOOK = text(
    f"WITH changed AS MATERIALIZED ({_CHANGED})"
    " SELECT NULL::uuid AS ref_id,"
    f" (SELECT count(*) / {_CHANGES_AT_MOST + 1} FROM changed) AS first, {VERSION} AS last,"
    " (extract(epoch FROM pg_postmaster_start_time()) * 1000000)::bigint AS start, NULL::bigint AS finish,"
    " extract(epoch FROM clock_timestamp())::float8 AS expires,"
    " pg_current_snapshot()::text AS snapshot"
    " UNION ALL"
    " SELECT b.ref_id, c.first, c.last, o.start, o.finish, o.expires, NULL"
    " FROM changed c JOIN bookable b ON b.no = c.no AND b.kind <> 'patient'"
    f" LEFT JOIN LATERAL (SELECT {_SPAN} {_STANDS.format(first='c.first', last='c.last')}) o ON true"
).bindparams(
    bindparam("tenant", type_=Uuid(as_uuid=False)),
    bindparam("since", type_=Text),
    bindparam("oldest", type_=BigInteger),
    bindparam("entries", type_=BigInteger),
)
_LOAD = text(
    f"SELECT b.ref_id, {_SPAN} FROM bookable b CROSS JOIN {_STANDS.format(first=':first', last=':last')[5:]}"
    f" WHERE b.tenant_id = :tenant AND b.ref_id = ANY(:refs) LIMIT {_ROWS_AT_MOST}"
).bindparams(
    bindparam("tenant", type_=Uuid(as_uuid=False)),
    bindparam("refs", type_=ARRAY(Uuid(as_uuid=False))),
    bindparam("first", type_=BigInteger),
    bindparam("last", type_=BigInteger),
)

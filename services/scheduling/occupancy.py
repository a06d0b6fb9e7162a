"""Who and what is taken when: one row per resource and holder, and a constraint under which no two can overlap.

The constraint needs no extension because a range of one integer type says all: resource number, lane and seconds are
packed into an int8 (29 bits, 2 bits, 32 bits). Lane 0 is the normal one, 1 to 3 are permitted overbookings.

**Why nothing here deadlocks.** A transaction waits for locks in this order, and never for an earlier kind while it holds
a later one:

0. of a walk-in, its clinic's row;
1. appointment rows: its own one before anything else (a series' or session's own ones by id, after the series' row); others'
   with SKIP LOCKED or NOWAIT, so never waiting. Then the row of the session, of several by id.
   Then numbers are made for who has none, all that a transaction may want in one statement, in the order of the key;
2. `bookable` rows, by number, only by whatever releases *and* takes, or takes more than one time of a number: `lock`;
3. `occupancy`, by number: `take` inserts by number, and where it also releases, a number's old rows go right before its
   new ones come; rows of other numbers go last, since deleting waits for nobody.

Who only takes one time of each needs no lock of kind 2: by 3 it waits at a number while it holds lower ones only. Two that
release and take at the same number would each wait for the other's deletion, and two that take several times of it for
each other's second one; kind 2 is for them.
"""

from collections.abc import Sequence
from datetime import datetime
from functools import cache
from typing import NamedTuple

from sqlalchemy import (
    ARRAY,
    DDL,
    BigInteger,
    CheckConstraint,
    DateTime,
    Identity,
    Index,
    Text,
    Uuid,
    bindparam,
    column,
    event,
    text,
)
from sqlalchemy.dialects.postgresql import INT8RANGE, ExcludeConstraint
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column
from sqlalchemy.sql.elements import TextClause

from chassis.errors import Invalid
from chassis.model import Id
from chassis.tables import QUEUE_STORAGE
from services.scheduling.directory import Base

LANES = 4
"""Lane 0 and as many overbookings as any visit type may permit."""
_LAST_NO = (1 << 29) - 2
PACKED = "((({no}) << 34) + ((({lane})::bigint) << 32))"
"""SQL of the packed value at which a resource's lane begins: second 0 of 1970."""
_SECONDS = 1 << 32  # of a lane: until 2106
STARTS_BEFORE = _SECONDS - 3 * 86_400
"""What starts before this second is within its lane, whatever its length."""


def startable(start: datetime, field: str = "start_time") -> datetime:
    """A start that the calendar can hold, whatever its length. Raises Invalid `START_INVALID`."""
    # Within a second it would be another one to the calendar than to the reader.
    if start.microsecond:
        raise Invalid("START_INVALID", "A start is a whole second.", field=field)
    if start.timestamp() >= STARTS_BEFORE:
        raise Invalid("START_INVALID", "A start is before 2106.", field=field)
    return start


class Bookable(Base):
    """A practitioner, room, device or patient as a number; made when it is first asked for, never deleted."""

    __tablename__ = "bookable"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    ref_id: Mapped[str] = mapped_column(Id, primary_key=True)
    no: Mapped[int] = mapped_column(BigInteger, Identity(always=True), unique=True)
    kind: Mapped[str] = mapped_column(Text)  # "practitioner", "patient", or a resource's kind


class Occupancy(Base):
    """One resource is taken by one holder, buffers included. No foreign key to `bookable`: it would lock the hot rows."""

    __tablename__ = "occupancy"
    __table_args__ = (
        ExcludeConstraint((column("during"), "&&"), using="gist", name="occupancy_taken"),
        # Within its resource, its lane, and until 2106.
        CheckConstraint(
            f"no BETWEEN 1 AND {_LAST_NO} AND lane BETWEEN 0 AND {LANES - 1} AND NOT isempty(during)"
            " AND NOT lower_inf(during) AND NOT upper_inf(during)"
            f" AND lower(during) >= {PACKED.format(no='no', lane='lane')}"
            f" AND upper(during) <= {PACKED.format(no='no', lane='lane')} + {_SECONDS}",
            name="within",
        ),
    )

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    holder_id: Mapped[str] = mapped_column(Id, primary_key=True)  # an appointment or a session
    no: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    lane: Mapped[int] = mapped_column(BigInteger)
    during: Mapped[object] = mapped_column(INT8RANGE)
    # Of a hold; from then on whoever wants the slot may take it over.
    expire_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class OccupancyChange(Base):
    """Where the calendar changed: what keeps a copy of it reads again there. Kept for some time only."""

    __tablename__ = "occupancy_change"
    __table_args__ = (
        Index("occupancy_change_by_transaction", "tenant_id", "xid"),
        Index("occupancy_change_by_time", "time"),
    )

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    id: Mapped[int] = mapped_column(BigInteger, Identity(always=True), primary_key=True)
    # Of the transaction, in 64 bits: by it a snapshot tells what it has seen.
    xid: Mapped[int] = mapped_column(BigInteger, server_default=text("pg_current_xact_id()::text::bigint"))
    no: Mapped[int] = mapped_column(BigInteger)
    first: Mapped[int] = mapped_column(BigInteger)
    last: Mapped[int] = mapped_column(BigInteger)
    time: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=text("clock_timestamp()"))


CHANGES_KEPT_SECONDS = 1800.0
# By triggers: whatever takes or frees time, features to come too, can't forget it. Once a statement, and without a lock.
# What is long past is in nobody's copy: the loop that deletes it need not write it down.
_CHANGED = """
CREATE FUNCTION occupancy_changed() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  INSERT INTO occupancy_change (tenant_id, no, first, last)
  SELECT tenant_id, no, lower(during) & 4294967295, ((upper(during) - 1) & 4294967295) + 1 FROM changed
   WHERE ((upper(during) - 1) & 4294967295) > extract(epoch FROM clock_timestamp())::bigint - 172800;
  RETURN NULL;
END $$
"""
_CHANGED_BY = """
CREATE TRIGGER occupancy_{what} AFTER {what} ON occupancy REFERENCING {which} TABLE AS changed
FOR EACH STATEMENT EXECUTE FUNCTION occupancy_changed()
"""
TRIGGERS = (
    _CHANGED.strip(),
    *(
        _CHANGED_BY.strip().format(what=what, which=which)
        for what, which in (("insert", "NEW"), ("update", "NEW"), ("delete", "OLD"))
    ),
)
for _statement in TRIGGERS:
    event.listen(Occupancy.__table__, "after_create", DDL(_statement))
event.listen(OccupancyChange.__table__, "after_create", DDL(f"ALTER TABLE occupancy_change SET ({QUEUE_STORAGE})"))


class Span(NamedTuple):
    """A resource's number, a lane, and [start, end) in epoch seconds."""

    no: int
    lane: int
    start: int
    end: int


class Taking(NamedTuple):
    """What one of several holders takes."""

    holder_id: str
    patient_id: str
    span: Span


async def lock(db: AsyncSession, numbers: Sequence[int]) -> None:
    """Keep others that release and take away from these resources; before releasing anything."""
    await db.execute(_LOCK, {"nos": list(numbers)})


async def numbers(db: AsyncSession, tenant_id: str, *holder_ids: str) -> list[int]:
    """The numbers of all that these holders have."""
    return list((await db.execute(_NUMBERS, {"tenant": tenant_id, "holders": list(holder_ids)})).scalars())


async def number_all(
    db: AsyncSession, tenant_id: str, patient_id: str, practitioner_ids: Sequence[str], clinic_ids: Sequence[str]
) -> None:
    """Give a number to all who and that may be wanted at several places, in one order, before the first is looked at.

    Whoever makes them place by place holds some while it waits for others, as does who goes the other way round.
    """
    values = {
        "tenant": tenant_id,
        "patient": patient_id,
        "practitioners": list(practitioner_ids),
        "clinics": list(clinic_ids),
    }
    await db.execute(_NUMBER_ALL, values)


async def take(
    db: AsyncSession,
    tenant_id: str,
    holder_id: str,
    spans: Sequence[Span],
    *,
    patient_id: str,
    expire_time: datetime | None = None,
    freed: Sequence[str] = (),
) -> set[int]:
    """Take all spans in one statement, giving back all that the holders `freed` have (then `lock` first).

    Answers the numbers that were not to be had, all of them for a patient who has died; unless it is empty the
    transaction must be rolled back.
    """
    spans = sorted(spans)
    values = {
        "tenant": tenant_id,
        "holder": holder_id,
        "patient": patient_id,
        "expire": expire_time,
        "nos": [span.no for span in spans],
    }
    if freed:
        for number, span in enumerate(spans):
            values |= {f"{name}{number}": value for name, value in span._asdict().items()}
        rows = await db.execute(_swap(len(spans)), {**values, "freed": list(freed)})
    else:
        columns = {name: [getattr(span, name) for span in spans] for name in ("lane", "start", "end")}
        rows = await db.execute(_TAKE, {**values, **columns})
    return {span.no for span in spans} - {row.no for row in rows}


async def take_all(
    db: AsyncSession, tenant_id: str, takings: Sequence[Taking], *, freed: Sequence[str] = ()
) -> set[tuple[str, int]]:
    """Take for several holders, giving back all that the holders `freed` have. All numbers of both must be locked.

    Answers (holder, number) of what was not to be had; unless it is empty the transaction must be rolled back.
    """
    takings = sorted(takings, key=lambda one: one.span)
    taken: set[tuple[str, int]] = set()
    old = set(await numbers(db, tenant_id, *freed)) if freed else set()
    run: list[Taking] = []

    async def flush() -> None:
        if run:
            columns = {name: [getattr(one.span, name) for one in run] for name in ("lane", "start", "end")}
            values = {
                "tenant": tenant_id,
                "nos": [one.span.no for one in run],
                "holders": [one.holder_id for one in run],
                "patients": [one.patient_id for one in run],
            }
            taken.update((row.holder_id, row.no) for row in await db.execute(_TAKE_ALL, {**values, **columns}))
            run.clear()

    for one in takings:
        if one.span.no in old:
            await flush()
            await db.execute(_FREE_AT, {"tenant": tenant_id, "holders": list(freed), "no": one.span.no})
            old.remove(one.span.no)
        run.append(one)
    await flush()
    for no in sorted(old):
        await db.execute(_FREE_AT, {"tenant": tenant_id, "holders": list(freed), "no": no})
    return {(one.holder_id, one.span.no) for one in takings} - taken


async def keep(db: AsyncSession, tenant_id: str, holder_id: str) -> int:
    """Make a hold's rows stay for good; answers how many of them were still standing."""
    rows = await db.execute(_KEEP, {"tenant": tenant_id, "holder": holder_id})
    return len(rows.all())


async def hand_over(db: AsyncSession, tenant_id: str, hold_id: str, holder_id: str) -> int:
    """Give a holder what a hold has, for good, and nothing else: whatever was permitted to share its time since goes on
    sharing it. Answers how many rows were still standing. The numbers of both must be locked.
    """
    await free(db, (tenant_id, holder_id))
    rows = await db.execute(_HAND_OVER, {"tenant": tenant_id, "hold": hold_id, "holder": holder_id})
    return len(rows.all())


async def free(db: AsyncSession, *holders: tuple[str, str]) -> None:
    """Give back all that these (tenant, holder) have. Their own rows must be locked."""
    tenants, ids = [tenant for tenant, _ in holders], [holder for _, holder in holders]
    await db.execute(_FREE, {"tenants": tenants, "holders": ids})


_UUID, _UUIDS, _INTS = Uuid(as_uuid=False), ARRAY(Uuid(as_uuid=False)), ARRAY(BigInteger)
_WHOSE = (
    bindparam("tenant", type_=_UUID),
    bindparam("holder", type_=_UUID),
)
# Read after the appointment's own insert has locked the patient's row, so that no death comes in between.
_ALIVE = "NOT EXISTS (SELECT FROM deceased_patient d WHERE d.tenant_id = :tenant AND d.patient_id = :patient)"
_INSERT = "INSERT INTO occupancy (tenant_id, holder_id, no, lane, during, expire_time)"
_LOCK = text("SELECT no FROM bookable WHERE no = ANY(:nos) ORDER BY no FOR NO KEY UPDATE").bindparams(
    bindparam("nos", type_=_INTS)
)
_NUMBERS = text("SELECT DISTINCT no FROM occupancy WHERE tenant_id = :tenant AND holder_id = ANY(:holders)").bindparams(
    bindparam("tenant", type_=_UUID), bindparam("holders", type_=_UUIDS)
)
_NUMBER_ALL = text(
    "INSERT INTO bookable (tenant_id, ref_id, kind) SELECT :tenant, c.ref_id, c.kind FROM ("
    "SELECT s.patient_id AS ref_id, 'patient' AS kind FROM record_subject s"
    " WHERE s.tenant_id = :tenant AND s.patient_id = :patient"
    " UNION ALL SELECT p.id, 'practitioner' FROM practitioner p WHERE p.tenant_id = :tenant AND p.id = ANY(:practitioners)"
    " UNION ALL SELECT r.id, r.kind FROM resource r"
    " WHERE r.tenant_id = :tenant AND r.clinic_id = ANY(:clinics) AND r.active) c"
    " WHERE NOT EXISTS (SELECT FROM bookable b WHERE b.tenant_id = :tenant AND b.ref_id = c.ref_id)"
    " ORDER BY c.ref_id ON CONFLICT DO NOTHING"
).bindparams(
    bindparam("tenant", type_=_UUID),
    bindparam("patient", type_=_UUID),
    *(bindparam(name, type_=_UUIDS) for name in ("practitioners", "clinics")),
)
_TAKE = text(
    f"{_INSERT} SELECT :tenant, :holder, s.no, s.lane,"
    f" int8range({PACKED.format(no='s.no', lane='s.lane')} + s.first,"
    f" {PACKED.format(no='s.no', lane='s.lane')} + s.last), :expire"
    " FROM unnest(:nos, :lane, :start, :end) AS s(no, lane, first, last)"
    f" WHERE {_ALIVE} ORDER BY s.no ON CONFLICT DO NOTHING RETURNING no"
).bindparams(
    *_WHOSE,
    bindparam("patient", type_=_UUID),
    bindparam("expire", type_=DateTime(timezone=True)),
    *(bindparam(name, type_=_INTS) for name in ("nos", "lane", "start", "end")),
)
_TAKE_ALL = text(
    f"{_INSERT} SELECT :tenant, s.holder, s.no, s.lane,"
    f" int8range({PACKED.format(no='s.no', lane='s.lane')} + s.first,"
    f" {PACKED.format(no='s.no', lane='s.lane')} + s.last), NULL"
    " FROM unnest(:holders, :patients, :nos, :lane, :start, :end) AS s(holder, patient, no, lane, first, last)"
    f" WHERE {_ALIVE.replace(':patient', 's.patient')}"
    " ORDER BY s.no, s.lane, s.first ON CONFLICT DO NOTHING RETURNING holder_id, no"
).bindparams(
    bindparam("tenant", type_=_UUID),
    *(bindparam(name, type_=_UUIDS) for name in ("holders", "patients")),
    *(bindparam(name, type_=_INTS) for name in ("nos", "lane", "start", "end")),
).columns(holder_id=_UUID, no=BigInteger)  # fmt: skip
_FREE_AT = text(
    "DELETE FROM occupancy WHERE tenant_id = :tenant AND holder_id = ANY(:holders) AND no = :no"
).bindparams(
    bindparam("tenant", type_=_UUID), bindparam("holders", type_=_UUIDS), bindparam("no", type_=BigInteger)
)  # fmt: skip
# Whether somebody or something stands in the way of all that would begin in a second, unless it is overbooked.
TAKEN = text(
    "SELECT o.no FROM bookable b JOIN occupancy o"
    f" ON o.during @> ({PACKED.format(no='b.no', lane='0')} + :second)"
    " WHERE b.tenant_id = :tenant AND b.ref_id = :ref AND :second BETWEEN 0 AND 4294967295"
    " AND (o.expire_time IS NULL OR o.expire_time > clock_timestamp())"
).bindparams(bindparam("tenant", type_=_UUID), bindparam("ref", type_=_UUID), bindparam("second", type_=BigInteger))
_KEEP = text(
    "UPDATE occupancy SET expire_time = NULL WHERE tenant_id = :tenant AND holder_id = :holder"
    " AND (expire_time IS NULL OR expire_time > clock_timestamp()) RETURNING no"
).bindparams(*_WHOSE)
_HAND_OVER = text(
    "UPDATE occupancy SET holder_id = :holder, expire_time = NULL WHERE tenant_id = :tenant AND holder_id = :hold"
    " AND (expire_time IS NULL OR expire_time > clock_timestamp()) RETURNING no"
).bindparams(*_WHOSE, bindparam("hold", type_=_UUID))
_FREE = text(
    "DELETE FROM occupancy o USING unnest(:tenants, :holders) AS f(tenant_id, holder_id)"
    " WHERE o.tenant_id = f.tenant_id AND o.holder_id = f.holder_id"
).bindparams(bindparam("tenants", type_=_UUIDS), bindparam("holders", type_=_UUIDS))


@cache
def _swap(count: int) -> TextClause:
    """One statement that goes through `count` numbers in order: each step waits for the one before it."""
    theirs = "DELETE FROM occupancy WHERE tenant_id = :tenant AND holder_id = ANY(:freed)"
    steps, gate = [], "TRUE"
    for n in range(count):
        steps.append(f"gone{n} AS ({theirs} AND no = :no{n} AND {gate} RETURNING no)")
        packed = PACKED.format(no=f":no{n}", lane=f":lane{n}")
        steps.append(
            f"come{n} AS ({_INSERT} SELECT :tenant, :holder, :no{n}, :lane{n},"
            f" int8range({packed} + :start{n}, {packed} + :end{n}), :expire"
            f" WHERE (SELECT count(*) FROM gone{n}) >= 0 AND {_ALIVE} ON CONFLICT DO NOTHING RETURNING no)"
        )
        gate = f"(SELECT count(*) FROM come{n}) >= 0"
    steps.append(f"rest AS ({theirs} AND no <> ALL(:nos) AND {gate} RETURNING no)")
    taken = " UNION ALL ".join(f"SELECT no FROM come{n}" for n in range(count))
    return text(f"WITH {', '.join(steps)} {taken}").bindparams(
        *_WHOSE,
        bindparam("patient", type_=_UUID),
        bindparam("freed", type_=_UUIDS),
        bindparam("nos", type_=_INTS),
        bindparam("expire", type_=DateTime(timezone=True)),
        *(bindparam(f"{name}{n}", type_=BigInteger) for n in range(count) for name in Span._fields),
    )

"""What a service keeps of others' data: full states, each replaced by a newer one only."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from sqlalchemy import BigInteger, Select, Table, Text, TextClause, bindparam, select, text
from sqlalchemy.orm import Mapped, mapped_column

from chassis.model import Id, Ids

if TYPE_CHECKING:
    from care.events.v1.envelope_pb2 import Event


T = TypeVar("T", bound="Team")


class Team:
    """A pool as patients last told it; for a service's own table of those that its work falls to."""

    __tablename__ = "pool"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    id: Mapped[str] = mapped_column(Id, primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger)
    purpose: Mapped[str] = mapped_column(Text)
    clinic_ids: Mapped[list[str]] = mapped_column(Ids)
    active: Mapped[bool]

    @classmethod
    def in_use(cls: type[T], tenant_id: str, purposes: Sequence[str]) -> Select[tuple[T]]:
        """Those in use that have one of these purposes, the oldest first."""
        return select(cls).where(cls.tenant_id == tenant_id, cls.purpose.in_(purposes), cls.active).order_by(cls.id)

    def serves(self, clinic_id: str) -> bool:
        """Whether a clinic's work may fall to it: it names the clinic, or none."""
        return not self.clinic_ids or clinic_id in self.clinic_ids


async def keep_team(db: "_Executes", table: type[Team], event: "Event", pool: Any, **more: Any) -> bool:
    """`keep_state` of a pool, by `PoolState`."""
    return await keep_state(
        db, table, event, purpose=pool.purpose, clinic_ids=list(pool.clinic_ids), active=pool.active, **more
    )


class _Executes(Protocol):
    async def execute(self, statement: Any, parameters: Any = None, /) -> Any: ...


async def keep_newer(
    db: _Executes,
    table: Table | type,
    values: Mapping[str, Any],
    *,
    key: tuple[str, ...] = ("tenant_id", "id"),
    version: str = "version",
) -> bool:
    """Put a full state in place of an older one, by `version`, so that any order of events gives the same.

    `values` by column, all that have no default in the database. Answers whether it was newer than what was there.
    """
    where = table if isinstance(table, Table) else table.__table__  # type: ignore[attr-defined]
    kept = await db.execute(_statement(where, tuple(values), key, version), values)
    return kept.first() is not None


async def keep_state(db: _Executes, table: Table | type, event: "Event", **values: Any) -> bool:
    """`keep_newer` of what an event tells of its aggregate."""
    state = {"tenant_id": event.tenant_id, "id": event.aggregate_id, "version": event.version, **values}
    return await keep_newer(db, table, state)


@cache
def _statement(table: Table, names: tuple[str, ...], key: tuple[str, ...], version: str) -> TextClause:
    # Text, because SQLAlchemy compiles ON CONFLICT anew at each execution, which costs more than all the rest.
    changed = ", ".join(f"{name} = excluded.{name}" for name in names if name not in key)
    return text(
        f"INSERT INTO {table.name} AS mine ({', '.join(names)}) VALUES ({', '.join(':' + name for name in names)})"
        f" ON CONFLICT ({', '.join(key)}) DO UPDATE SET {changed} WHERE excluded.{version} > mine.{version} RETURNING 1"
    ).bindparams(*(bindparam(name, type_=table.c[name].type) for name in names))

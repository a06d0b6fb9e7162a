"""What a service keeps of others' data: full states, each replaced by a newer one only."""

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from sqlalchemy import Table, TextClause, bindparam, text

if TYPE_CHECKING:
    from care.events.v1.envelope_pb2 import Event


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

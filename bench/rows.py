"""Rows by COPY straight into a service's database: text lines whose constant half is worked out once."""

import json
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from datetime import datetime
from enum import Enum
from typing import Any

import asyncpg
from sqlalchemy import ARRAY, Boolean, DateTime, Integer, Numeric, Table
from sqlalchemy.dialects.postgresql import JSONB

_CHUNK = 20_000
_ESCAPED = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def text_of(value: Any, kind: Any = None) -> str:
    """A value as COPY's text format has it; `kind` is the column's type."""
    if value is None:
        return r"\N"
    if isinstance(kind, JSONB):
        return json.dumps(value, separators=(",", ":")).translate(_ESCAPED)
    if isinstance(value, bool):
        return "t" if value else "f"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Enum):
        return str(value.name)
    if isinstance(value, list):
        return "{" + ",".join(f'"{one}"' for one in value) + "}"
    return str(value).translate(_ESCAPED)


class Rows:
    """How rows of a table are written: the columns that vary, in order, and one value for each other column.

    Columns that are named nowhere get their default, or nothing where they may be null, or else the emptiest value of
    their type: the benchmark's rows go on fitting while a schema grows.
    """

    def __init__(self, table: Table, varying: Sequence[str], **same: Any) -> None:
        unknown = {*varying, *same} - {column.name for column in table.columns}
        if unknown:
            raise ValueError(f"{table.name} has no {', '.join(sorted(unknown))}")
        self.table = table
        self.columns = list(varying)
        tail = []
        for column in table.columns:
            if column.name in varying:
                continue
            if column.name in same:
                value = same[column.name]
            elif column.default is not None and not callable(getattr(column.default, "arg", None)):
                value = column.default.arg  # type: ignore[attr-defined]
            elif column.server_default is not None or column.nullable or column.identity is not None:
                continue
            else:
                value = _empty(column.type)
            self.columns.append(column.name)
            tail.append(text_of(value, column.type))
        self._tail = "".join("\t" + one for one in tail) + "\n"

    def lines(self, rows: Iterable[Sequence[str]]) -> Iterator[str]:
        """One line per row of texts in the order of `varying`."""
        tail = self._tail
        for row in rows:
            yield "\t".join(row) + tail


def _empty(kind: Any) -> Any:
    if isinstance(kind, JSONB):
        return []
    if isinstance(kind, ARRAY):
        return []
    if isinstance(kind, Boolean):
        return False
    if isinstance(kind, Integer | Numeric):
        return 0
    if isinstance(kind, DateTime):
        raise ValueError("a time must be given")
    return ""


async def _chunks(lines: Iterator[str]) -> AsyncIterator[bytes]:
    chunk: list[str] = []
    for line in lines:
        chunk.append(line)
        if len(chunk) == _CHUNK:
            yield "".join(chunk).encode()
            chunk.clear()
    yield "".join(chunk).encode()


async def load(url: str, tables: Sequence[tuple[Rows, Iterable[Sequence[str]]]]) -> dict[str, int]:
    """Replace what is in these tables of one database, in one transaction, and gather statistics. Answers rows by table.

    Needs the superuser: constraints between tables aren't checked row by row, indexes are built afterwards.
    """
    db = await asyncpg.connect(url.replace("+asyncpg", ""))
    counted: dict[str, int] = {}
    try:
        await db.execute("SET session_replication_role = replica; SET maintenance_work_mem = '512MB'")
        async with db.transaction():
            names = list(dict.fromkeys(rows.table.name for rows, _ in tables))
            await db.execute(f"TRUNCATE {', '.join(names)} CASCADE")
            again = [each for name in names for each in await _drop_indexes(db, name)]
            for rows, found in tables:
                status = await db.copy_to_table(
                    rows.table.name,
                    source=_chunks(rows.lines(found)),
                    columns=rows.columns,
                    format="text",
                    freeze=True,
                )
                counted[rows.table.name] = int(status.split()[-1])
            for statement in again:
                await db.execute(statement)
        for name in names:
            await db.execute(f"ANALYZE {name}")
        await db.execute("CHECKPOINT")
    finally:
        await db.close()
    return counted


async def _drop_indexes(db: Any, table: str) -> list[str]:
    """Drop what would be kept up row by row; answers the statements that make it again."""
    again = []
    for row in await db.fetch(
        "SELECT conname, pg_get_constraintdef(oid) AS definition FROM pg_constraint"
        " WHERE conrelid = $1::text::regclass AND contype = 'x'",
        table,
    ):
        await db.execute(f'ALTER TABLE {table} DROP CONSTRAINT "{row["conname"]}"')
        again.append(f'ALTER TABLE {table} ADD CONSTRAINT "{row["conname"]}" {row["definition"]}')
    for row in await db.fetch(
        "SELECT indexrelid::regclass::text AS name, pg_get_indexdef(indexrelid) AS definition FROM pg_index"
        " WHERE indrelid = $1::text::regclass"
        " AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)",
        table,
    ):
        await db.execute(f"DROP INDEX {row['name']}")
        again.append(row["definition"])
    return again

"""Sessions whose textual statements go straight to the driver: a third of the CPU that they cost through SQLAlchemy's layers."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sqlalchemy import ARRAY, TextClause, Uuid
from sqlalchemy.engine import Connection, Dialect, IteratorResult
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import SessionTransaction
from sqlalchemy.sql.selectable import TextualSelect

Process = Callable[[Any], Any]
_COUNTS = re.compile(r"^\s*(INSERT|UPDATE|DELETE)\b(?!.*\bRETURNING\b)", re.IGNORECASE | re.DOTALL)


class Session(AsyncSession):
    """An AsyncSession; what is no `text()` takes SQLAlchemy's own way, in the same transaction."""

    _driver: "_Driver | None" = None

    async def execute(self, statement: Any, params: Any = None, **more: Any) -> Any:
        if type(statement) not in (TextClause, TextualSelect) or more or not isinstance(params, Mapping | None):
            return await super().execute(statement, params, **more)
        driver = self._driver
        # A savepoint is made, and what a failed flush left behind is told, where SQLAlchemy is asked for the connection.
        if driver is None or driver.began is not self.sync_session._transaction or not driver.began.is_active:
            driver = self._driver = await self._connected()
        brief = _brief(statement, driver.connection.dialect)
        if brief.detours:
            return await super().execute(statement, params)
        return await driver.run(brief, params or {})

    async def _connected(self) -> "_Driver":
        connection = await self.connection()
        pooled = await connection.get_raw_connection()
        began = self.sync_session._transaction
        assert connection.sync_connection is not None and began is not None
        return _Driver(began, connection.sync_connection, pooled.dbapi_connection, pooled.driver_connection)


class _Driver(NamedTuple):
    """The connection of one transaction or savepoint, on its three levels."""

    began: SessionTransaction
    connection: Connection
    adapted: Any
    driver: Any

    async def run(self, brief: "_Brief", values: Mapping[str, Any]) -> Any:
        arguments = [values[name] if process is None else process(values[name]) for name, process in brief.slots]
        if self.connection._has_events or self.connection.engine._has_events:
            for hear in self.connection.dispatch.before_cursor_execute:
                hear(self.connection, None, brief.sql, arguments, None, False)
        try:
            if not self.adapted._started:
                await self.adapted._start_transaction()
            if brief.counts:
                return Done(await self.driver.execute(brief.sql, *arguments))
            records = await self.driver.fetch(brief.sql, *arguments)
        except Exception as error:
            if (told := self._translated(brief, error)) is error:
                raise
            raise told from error
        except BaseException as error:  # a call that was given up must not keep its locks until its statement ends
            self.connection.invalidate(error)
            raise
        return brief.result(records)

    def _translated(self, brief: "_Brief", error: Exception) -> BaseException:
        dialect = self.connection.dialect
        base = dialect.loaded_dbapi.Error
        try:
            self.adapted._handle_exception(error)
        except base as told:
            is_away = bool(dialect.is_disconnect(told, self.adapted, None))
            if is_away and (pooled := self.connection._dbapi_connection) is not None:
                # As SQLAlchemy does it: what ended this connection has ended those beside it, too.
                self.connection.engine.pool._invalidate(pooled, told)
                self.connection.invalidate(told)
            return DBAPIError.instance(
                brief.sql, None, told, base, hide_parameters=True, connection_invalidated=is_away, dialect=dialect
            )
        except Exception as other:
            return other
        return error


class Done:
    """What a statement without rows has done."""

    def __init__(self, status: str) -> None:
        self.rowcount = int(status.rpartition(" ")[2]) if status[-1:].isdigit() else -1


class _Brief:
    """A compiled textual statement."""

    def __init__(self, statement: Any, dialect: Dialect) -> None:
        compiled: Any = statement.compile(dialect=dialect)
        self.sql = str(compiled)
        self.slots: Sequence[tuple[str, Process | None]] = [
            (name, compiled._bind_processors.get(name)) for name in compiled.positiontup or ()
        ]
        # What SQLAlchemy renders anew for its values, or has values of its own, is left to it.
        self.detours = bool(
            compiled.literal_execute_params
            or compiled.post_compile_params
            or not all(compiled.binds[name].required for name, _ in self.slots)
        )
        self.counts = bool(_COUNTS.search(self.sql))
        types = statement.selected_columns if isinstance(statement, TextualSelect) else ()
        self._types = {column.key: column.type for column in types}
        self._dialect = dialect
        self._shape: tuple[SimpleResultMetaData, list[tuple[int, Process]]] | None = None

    def result(self, records: Sequence[Any]) -> IteratorResult[Any]:
        if not records:
            return IteratorResult(_NOTHING, iter(()))
        if self._shape is None:
            names = list(records[0].keys())
            found = [(place, self._processor(name)) for place, name in enumerate(names)]
            self._shape = SimpleResultMetaData(names), [(place, one) for place, one in found if one is not None]
        shape, processors = self._shape
        if not processors:
            return IteratorResult(shape, iter([tuple(record) for record in records]))
        rows = []
        for record in records:
            row = list(record)
            for place, process in processors:
                row[place] = process(row[place])
            rows.append(tuple(row))
        return IteratorResult(shape, iter(rows))

    def _processor(self, name: str) -> Process | None:
        kind = self._types.get(name)
        if kind is None:
            return None
        if isinstance(kind, Uuid) and not kind.as_uuid:
            return lambda value: None if value is None else str(value)
        if isinstance(kind, ARRAY) and isinstance(kind.item_type, Uuid) and not kind.item_type.as_uuid:
            return lambda value: None if value is None else [str(one) for one in value]
        found: Process | None = kind._cached_result_processor(self._dialect, None)
        return found


_NOTHING = SimpleResultMetaData(["_"])
_known: WeakKeyDictionary[Any, _Brief] = WeakKeyDictionary()


def _brief(statement: Any, dialect: Dialect) -> _Brief:
    found = _known.get(statement)
    if found is None:
        found = _known[statement] = _Brief(statement, dialect)
    return found

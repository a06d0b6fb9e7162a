"""Hot reads: SQLAlchemy compiles a query's shape once, the driver runs it, and plain objects come back.

A page of a list costs a quarter of the CPU that it costs through a session and the ORM. Whatever this module doesn't
know how to do raises `Unfit`, and the caller goes the long way.
"""

import asyncio
import operator
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from enum import Enum as PythonEnum
from typing import Any, Generic, NamedTuple, Self, TypeVar

import orjson
from sqlalchemy import (
    ARRAY,
    ClauseElement,
    ColumnElement,
    Float,
    Integer,
    Select,
    TextClause,
    Uuid,
    all_,
    any_,
    bindparam,
    func,
    or_,
    select,
)
from sqlalchemy import Enum as EnumType
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import QueryableAttribute
from sqlalchemy.orm.interfaces import ONETOMANY

_RECYCLE = 1800.0
_SHAPES_AT_MOST = 500
_NOT_OURS = ("_sa_", "__")

_TOGETHER = 64
_PARAMETER = re.compile(r"\$(\d+)(?:::(TIMESTAMP WITH TIME ZONE|DOUBLE PRECISION|\w+)(?:\(\d+\))?(\[\])?)?")
_QUOTED = re.compile(r'[",\\{}\s]|^$|^null$', re.IGNORECASE)

Process = Callable[[Any], Any]
Values = Sequence[Any]
"""A row, in the order of the statement's columns."""


M = TypeVar("M")
Column = QueryableAttribute[Any]
Compare = Callable[[Any, Any], Any]


class Unfit(Exception):
    """This query, or this moment, isn't for the short way."""


class Connections:
    """Driver's connections for reads; at most as many are in use as calls have a place at the database."""

    def __init__(self, connect: Callable[[], Any]) -> None:
        self._connect = connect
        self._free: list[tuple[float, Any]] = []
        self._closed = False

    async def take(self) -> tuple[float, Any]:
        """(since when, connection). Raises what the driver raises."""
        while self._free:
            since, connection = self._free.pop()
            if not connection.is_closed() and time.monotonic() - since < _RECYCLE:
                return since, connection
            connection.terminate()
        connection = await self._connect()
        await connection.set_type_codec(
            "jsonb", schema="pg_catalog", format="binary", encoder=_refuse, decoder=lambda raw: orjson.loads(raw[1:])
        )
        return time.monotonic(), connection

    def give_back(self, taken: tuple[float, Any], *, broken: bool) -> None:
        """Keep it for the next one, unless something went wrong on it."""
        if broken or self._closed or taken[1].is_closed():
            taken[1].terminate()
        else:
            self._free.append(taken)

    async def close(self) -> None:
        """Close them all."""
        self._closed = True
        free, self._free = self._free, []
        await asyncio.gather(*(connection.close(timeout=2) for _, connection in free), return_exceptions=True)


class Loader:
    """Runs reads on the driver's connections; those of one shape that are asked for together go in one statement.

    Each stands by itself in it, with its own caller's parameters. A read that comes alone leaves in the same turn of the loop.
    """

    def __init__(self, connections: Connections, at_once: int) -> None:
        self._connections = connections
        self._room = asyncio.Semaphore(at_once)
        self._lines: dict[str, list[_Asked]] = {}
        self._many: dict[str, _Joined | None] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def fetch(self, sql: str, arguments: Sequence[Any]) -> list[Values]:
        """Rows of a statement. Raises Unfit where it fails, whatever the reason: the long way will tell."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[list[Values]] = loop.create_future()
        line = self._lines.get(sql)
        if line is None:
            line = self._lines[sql] = []
            loop.call_soon(self._send, sql)
        line.append(_Asked(arguments, answer))
        return await answer

    async def execute(self, sql: str, arguments: Sequence[Any]) -> None:
        """Run a statement by itself. Raises Unfit where it fails."""
        try:
            await self._fetch(sql, [_Asked(arguments, None)])
        except Exception as error:
            raise Unfit from error

    def _send(self, sql: str) -> None:
        line = self._lines.pop(sql)
        size = _TOGETHER if len(line) > 1 and self._joined(sql, line[0]) is not None else 1
        for first in range(0, len(line), size):
            # A context of its own: whose request it was is nobody's business in here.
            work = self._run(sql, line[first : first + size])
            task = asyncio.get_running_loop().create_task(work, context=Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _run(self, sql: str, together: Sequence["_Asked"]) -> None:
        try:
            records = await self._fetch(sql, together)
        except Exception as error:
            for one in together:
                if one.answer is not None and not one.answer.done():
                    unfit = Unfit()
                    unfit.__cause__ = error
                    one.answer.set_exception(unfit)
            return
        if len(together) == 1:
            answers = [[tuple(record) for record in records]]
        else:
            answers = [[] for _ in together]
            for record in records:
                place, *values = record
                answers[place - 1].append(values)
        for one, answer in zip(together, answers, strict=True):
            if one.answer is not None and not one.answer.done():
                one.answer.set_result(answer)  # type: ignore[arg-type]

    async def _fetch(self, sql: str, together: Sequence["_Asked"]) -> Sequence[Any]:
        arguments: Sequence[Any] = together[0].arguments
        if len(together) > 1 and (joined := self._joined(sql, together[0])) is not None:
            sql, arguments = joined.sql, joined.columns([one.arguments for one in together])
        async with self._room:
            taken = await self._connections.take()
            done = False
            try:
                found: Sequence[Any] = await taken[1].fetch(sql, *arguments)
                done = True
                return found
            finally:
                self._connections.give_back(taken, broken=not done)

    def _joined(self, sql: str, one: "_Asked") -> "_Joined | None":
        if sql not in self._many:
            self._many[sql] = _Joined.of(sql, len(one.arguments))
        return self._many[sql]

    async def close(self) -> None:
        """Let what is under way end."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2)
        await self._connections.close()


class _Asked(NamedTuple):
    arguments: Sequence[Any]
    answer: "asyncio.Future[list[Values]] | None"


class _Joined(NamedTuple):
    """A statement run for several sets of parameters at once, one after the other, however many they are.

    A statement for each number of them (a UNION of its copies) costs PostgreSQL the same and the driver more: it is prepared
    for each number anew, on each connection.
    """

    sql: str
    is_list: Sequence[bool]
    """Which parameters are arrays: they travel as text, since arrays of arrays would be flattened."""

    @classmethod
    def of(cls, sql: str, parameters: int) -> Self | None:
        """None where a parameter's type doesn't stand in the statement."""
        types = {int(found[1]): (found[2], found[3]) for found in _PARAMETER.finditer(sql) if found[2]}
        if set(types) != set(range(1, parameters + 1)):
            return None
        numbers = range(1, parameters + 1)
        given = [f"${number}::{'text' if types[number][1] else types[number][0]}[]" for number in numbers]
        body = _PARAMETER.sub(
            lambda found: f"k.p{found[1]}" + (f"::{types[int(found[1])][0]}[]" if types[int(found[1])][1] else ""), sql
        )
        # OFFSET 0: each set of parameters by a plan of its own, never all of them joined and sorted as one.
        joined = (
            f"SELECT k.place, one.* FROM unnest({', '.join(given)}) WITH ORDINALITY"
            f" AS k({', '.join(f'p{number}' for number in numbers)}, place)"
            f" CROSS JOIN LATERAL (SELECT each.* FROM ({body}) AS each OFFSET 0) AS one"
        )
        return cls(joined, [bool(types[number][1]) for number in numbers])

    def columns(self, sets: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """The parameters by column."""
        columns = [list(column) for column in zip(*sets, strict=True)]
        return [
            [None if value is None else _array(value) for value in column] if is_list else column
            for column, is_list in zip(columns, self.is_list, strict=True)
        ]


def _array(values: Sequence[Any]) -> str:
    """An array as PostgreSQL writes it."""
    written = []
    for value in values:
        text = "NULL" if value is None else str(value)
        if value is not None and _QUOTED.search(text):
            text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
        written.append(text)
    return "{" + ",".join(written) + "}"


class Reading:
    """What one read works with: the loader and, for what needs one, a session, which is made when first asked for."""

    __slots__ = ("_make_session", "_session", "fetch")

    def __init__(self, loader: Loader, make_session: Callable[[], AsyncSession]) -> None:
        self.fetch = loader.fetch
        self._make_session = make_session
        self._session: AsyncSession | None = None

    @property
    def session(self) -> AsyncSession:
        """Statements stand alone in it."""
        if self._session is None:
            self._session = self._make_session()
        return self._session

    async def close(self) -> None:
        """Close the session, if there is one."""
        if self._session is not None:
            await self._session.close()


class _Statement(NamedTuple):
    sql: str
    slots: Sequence[tuple[int | str, Process | None]]
    """Where each argument comes from: a place in the clauses' values or a name, and what the driver wants of it."""
    names: Sequence[str]
    converters: Sequence[tuple[str, Process]]
    view: type
    children: Sequence["_Children"]

    def arguments(self, named: Mapping[str, Any], values: Sequence[Any]) -> list[Any]:
        found = []
        for source, process in self.slots:
            value = named[source] if isinstance(source, str) else values[source]
            found.append(value if process is None else process(value))
        return found

    def row(self, found: Values) -> Any:
        row = self.view.__new__(self.view)  # type: ignore[call-overload]
        values = row.__dict__
        values.update(zip(self.names, found, strict=True))
        for name, convert in self.converters:
            value = values[name]
            if value is not None:
                values[name] = convert(value)
        return row


class _Children(NamedTuple):
    """A list of rows that belong to a row."""

    name: str
    sql: str
    names: Sequence[str]
    converters: Sequence[tuple[str, Process]]
    view: type
    parent: str


class Rows(Generic[M]):
    """Rows of a model under a request's filters, kept as data: which query it is is known without building one.

    A filter whose value is absent (None, "", no values) filters nothing, like the field of a request that isn't set; only
    `equal` always does, for what a request must name.
    """

    __slots__ = ("model", "terms", "values")

    def __init__(self, model: type[M]) -> None:
        self.model = model
        self.terms: list[Any] = []
        self.values: list[Any] = []

    def equal(self, column: Column, value: Any) -> Self:
        """The column is the value, whatever that is."""
        return self._add(operator.eq, column, value)

    def given(self, column: Column, value: Any) -> Self:
        """The column is the value, where there is one."""
        return self._add(operator.eq, column, value) if value not in (None, "") else self

    def since(self, column: Column, value: Any) -> Self:
        """The column is the value or later."""
        return self._add(operator.ge, column, value) if value is not None else self

    def before(self, column: Column, value: Any) -> Self:
        """The column is less than the value."""
        return self._add(operator.lt, column, value) if value is not None else self

    def among(self, column: Column, values: Sequence[Any]) -> Self:
        """The column is one of the values."""
        return self._add(_among, column, list(values)) if values else self

    def outside(self, column: Column, values: Sequence[Any]) -> Self:
        """The column is none of the values."""
        return self._add(_outside, column, list(values)) if values else self

    def overlap(self, column: Column, values: Sequence[Any]) -> Self:
        """The column, a list, has one of the values."""
        return self._add(_overlap, column, list(values)) if values else self

    def overlap_or_none(self, column: Column, values: Sequence[Any]) -> Self:
        """The column, a list, has one of the values or nothing at all."""
        return self._add(_overlap_or_none, column, list(values)) if values else self

    def where(self, clause: ColumnElement[bool] | TextClause) -> Self:
        """A condition without values; made once at import, since it is known again by its identity."""
        self.terms.append(clause)
        return self

    def _add(self, compare: Compare, column: Column, value: Any) -> Self:
        self.terms += (compare, column)
        self.values.append(value)
        return self

    def narrow(self, query: Select[Any], names: Sequence[str] = ()) -> Select[Any]:
        """The query under these filters; with `names` instead of the values where they are given."""
        terms, given = iter(self.terms), iter(self.values if not names else names)
        for term in terms:
            if isinstance(term, ClauseElement):
                query = query.where(term)  # type: ignore[arg-type]
                continue
            column, value = next(terms), next(given)
            query = query.where(term(column, _parameter(term, column, value, named=bool(names))))
        return query


def _parameter(compare: Compare, column: Column, value: Any, *, named: bool) -> Any:
    kind = column.type
    if compare in (_among, _outside):
        kind = ARRAY(kind)
    return bindparam(value, type_=kind) if named else bindparam(None, value, type_=kind)


def _among(column: Any, values: Any) -> Any:
    return column == any_(values)


def _outside(column: Any, values: Any) -> Any:
    return column != all_(values)


def _overlap(column: Any, values: Any) -> Any:
    return column.overlap(values)


def _overlap_or_none(column: Any, values: Any) -> Any:
    return or_(func.cardinality(column) == 0, column.overlap(values))


class Statements:
    """Compiled shapes of queries of one service."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._dialect = engine.dialect
        self._known: dict[Any, _Statement | None] = {}
        self._views: dict[type, type] = {}
        self._joined: dict[type, Select[Any]] = {}
        self._texts: dict[Any, tuple[str, Sequence[tuple[int | str, Process | None]]]] = {}

    def once(self, model: type, make: Callable[[], Select[Any]]) -> Select[Any]:
        """A query of a model without values, made once."""
        found = self._joined.get(model)
        if found is None:
            found = self._joined[model] = make()
        return found

    async def fetch(
        self,
        reading: Reading,
        rows: Rows[M],
        base: Callable[[], Select[Any]],
        named: Mapping[str, Any],
        *,
        order: Sequence[Column] = (),
        descending: bool = False,
        limit: int = 0,
    ) -> list[M]:
        """Rows under `base` (whose parameters are among `named`) and their own filters. Raises Unfit."""
        key = (rows.model, "plain" in named, descending, bool(limit), *order, *rows.terms)
        statement = self._known.get(key)
        if statement is None:
            if key in self._known or len(self._known) >= _SHAPES_AT_MOST:
                raise Unfit
            self._known[key] = None  # stays so where it can't be compiled
            statement = self._known[key] = self._compile(rows, base(), order, descending, bool(limit))
        if limit:
            named = {**named, "care_limit": limit}
        found = await reading.fetch(statement.sql, statement.arguments(named, rows.values))
        answer = [statement.row(record) for record in found]
        if answer:
            for children in statement.children:
                await _add_children(reading, children, answer)
        return answer

    async def records(self, reading: Reading | Loader, statement: TextClause, named: Mapping[str, Any]) -> list[Values]:
        """Rows of a textual statement. Raises Unfit."""
        known = self._texts.get(statement)
        if known is None:
            compiled = statement.compile(dialect=self._dialect)
            known = self._texts[statement] = (str(compiled), self._slots(compiled, {}))
        sql, slots = known
        return await reading.fetch(
            sql,
            [named[source] if process is None else process(named[source]) for source, process in slots],  # type: ignore[index]
        )

    # -- once per shape ------------------------------------------------------------------------------------------------

    def _compile(
        self, rows: Rows[Any], query: Select[Any], order: Sequence[Column], descending: bool, limited: bool
    ) -> _Statement:
        mapper: Mapper[Any] = rows.model.__mapper__
        names = [f"care_{number}" for number in range(len(rows.values))]
        query = rows.narrow(query, names)
        if order:
            query = query.order_by(*(column.desc() if descending else column for column in order))
        if limited:
            query = query.limit(bindparam("care_limit", type_=Integer))
        compiled = query.compile(dialect=self._dialect)
        columns, converters = self._columns(mapper, [entry.keyname for entry in compiled._result_columns])  # type: ignore[attr-defined]
        places = {name: number for number, name in enumerate(names)}
        return _Statement(
            str(compiled),
            self._slots(compiled, places),
            columns,
            converters,
            self._view(rows.model),
            self._children(mapper),
        )

    def _slots(self, compiled: Any, places: Mapping[str, int]) -> list[tuple[int | str, Process | None]]:
        slots: list[tuple[int | str, Process | None]] = []
        for name in compiled.positiontup or ():
            bind = compiled.binds[name]
            if bind.unique:  # somebody's own value, which would be compiled in
                raise Unfit
            slots.append((places.get(bind.key, bind.key), compiled._bind_processors.get(name)))
        return slots

    def _columns(
        self, mapper: Mapper[Any], found: Sequence[str]
    ) -> tuple[Sequence[str], Sequence[tuple[str, Process]]]:
        attributes = {attribute.columns[0].name: attribute for attribute in mapper.column_attrs}
        names, converters = [], []
        for name in found:
            attribute = attributes[name]
            names.append(attribute.key)
            if (convert := self._converter(attribute.columns[0].type)) is not None:
                converters.append((attribute.key, convert))
        return names, converters

    def _converter(self, kind: Any) -> Process | None:
        if isinstance(kind, Uuid):
            return str
        if isinstance(kind, ARRAY) and isinstance(kind.item_type, Uuid):
            return lambda values: [str(value) for value in values]
        if isinstance(kind, EnumType) and isinstance(kind.enum_class, type) and issubclass(kind.enum_class, PythonEnum):
            return kind.enum_class.__members__.__getitem__
        if isinstance(kind, Float):
            return None  # the driver has it right already, and a processor would want to know of which kind it is
        convert: Process | None = kind._cached_result_processor(self._dialect, None)
        return convert

    def _view(self, model: type) -> type:
        """The model's own properties and methods on plain attributes."""
        view = self._views.get(model)
        if view is None:
            own: dict[str, Any] = {}
            for cls in reversed(model.__mro__[:-1]):
                for name, value in vars(cls).items():
                    if not name.startswith(_NOT_OURS) and not isinstance(value, QueryableAttribute):
                        own[name] = value
            for attribute in model.__mapper__.attrs:  # type: ignore[attr-defined]
                own.pop(attribute.key, None)
            view = self._views[model] = type(model.__name__, (), own)
        return view

    def _children(self, mapper: Mapper[Any]) -> Sequence[_Children]:
        found = []
        for relationship in mapper.relationships:
            pairs = {local.name: remote for local, remote in relationship.local_remote_pairs or ()}
            if (
                relationship.direction is not ONETOMANY
                or set(pairs) != {"tenant_id", "id"}
                or relationship.lazy != "selectin"
            ):
                raise Unfit
            child: Mapper[Any] = relationship.mapper
            if list(child.relationships):
                raise Unfit
            query = (
                select(child.class_)
                .where(pairs["tenant_id"] == bindparam("tenant", type_=pairs["tenant_id"].type))
                .where(pairs["id"] == any_(bindparam("parents", type_=ARRAY(pairs["id"].type))))
                .order_by(*(relationship.order_by or ()))
            )
            compiled = query.compile(dialect=self._dialect)
            if list(compiled.positiontup or ()) != ["tenant", "parents"]:  # type: ignore[attr-defined]
                raise Unfit
            names, converters = self._columns(child, [entry.keyname for entry in compiled._result_columns])  # type: ignore[attr-defined]
            parent = next(one.key for one in child.column_attrs if one.columns[0] is pairs["id"])
            found.append(
                _Children(relationship.key, str(compiled), names, converters, self._view(child.class_), parent)
            )
        return found


async def _add_children(reading: Reading, children: _Children, rows: Sequence[Any]) -> None:
    lists: dict[str, list[Any]] = {row.id: [] for row in rows}
    for row in rows:
        row.__dict__[children.name] = lists[row.id]
    plain = _Statement(children.sql, (), children.names, children.converters, children.view, ())
    for record in await reading.fetch(children.sql, [rows[0].tenant_id, list(lists)]):
        child = plain.row(record)
        lists[getattr(child, children.parent)].append(child)


def _refuse(value: Any) -> bytes:
    raise ValueError("JSON is no parameter of a read")

"""Hot reads: SQLAlchemy compiles a query's shape once, the driver runs it, and plain objects come back.

A page of a list costs a quarter of the CPU that it costs through a session and the ORM. Whatever this module doesn't
know how to do raises `Unfit`, and the caller goes the long way.
"""

import asyncio
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import Context
from enum import Enum as PythonEnum
from typing import Any, NamedTuple

import orjson
from sqlalchemy import ARRAY, ColumnElement, Integer, Select, Uuid, all_, any_, bindparam, select
from sqlalchemy import Enum as EnumType
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import QueryableAttribute
from sqlalchemy.orm.interfaces import ONETOMANY
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import BinaryExpression, BindParameter, BooleanClauseList

_RECYCLE = 1800.0
_SHAPES_AT_MOST = 500
_SIMPLE = frozenset((operators.eq, operators.ne, operators.lt, operators.le, operators.gt, operators.ge))
_LISTED: Mapping[Any, str] = {operators.in_op: "in", operators.not_in_op: "not in"}
_NOT_OURS = ("_sa_", "__")

_TOGETHER = (16, 8, 4, 2, 1)
_PARAMETER = re.compile(r"\$(\d+)")

Process = Callable[[Any], Any]
Values = Sequence[Any]
"""A row, in the order of the statement's columns."""


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
        self._many: dict[tuple[str, int], str] = {}
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
        for size in _TOGETHER:
            while len(line) >= size:
                together, line = line[:size], line[size:]
                # A context of its own: whose request it was is nobody's business in here.
                task = asyncio.get_running_loop().create_task(self._run(sql, together), context=Context())
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
                answers[place].append(values)
        for one, answer in zip(together, answers, strict=True):
            if one.answer is not None and not one.answer.done():
                one.answer.set_result(answer)  # type: ignore[arg-type]

    async def _fetch(self, sql: str, together: Sequence["_Asked"]) -> Sequence[Any]:
        arguments = [argument for one in together for argument in one.arguments]
        if len(together) > 1:
            sql = self._joined(sql, len(together), len(together[0].arguments))
        async with self._room:
            taken = await self._connections.take()
            done = False
            try:
                found: Sequence[Any] = await taken[1].fetch(sql, *arguments)
                done = True
                return found
            finally:
                self._connections.give_back(taken, broken=not done)

    def _joined(self, sql: str, count: int, parameters: int) -> str:
        joined = self._many.get((sql, count))
        if joined is None:
            parts = []
            for place in range(count):
                first = place * parameters
                own = _PARAMETER.sub(lambda found, first=first: f"${first + int(found[1])}", sql)  # type: ignore[misc]
                parts.append(f"(SELECT {place}, one.* FROM ({own}) one)")
            joined = self._many[sql, count] = " UNION ALL ".join(parts)
        return joined

    async def close(self) -> None:
        """Let what is under way end."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2)
        await self._connections.close()


class _Asked(NamedTuple):
    arguments: Sequence[Any]
    answer: "asyncio.Future[list[Values]] | None"


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

    @staticmethod
    def begin(model: type, query: Select[Any]) -> Select[Any]:
        """Mark what a query is when a servicer gets it, so that `since_begin` sees what the servicer added."""
        # SQLAlchemy's queries take their attributes along whenever something is added to them.
        query.__dict__["_care_begin"] = (model, {**query.__dict__})
        return query

    @staticmethod
    def since_begin(query: Select[Any]) -> tuple[type, Sequence[ColumnElement[bool]]]:
        """The model, and the conditions that were added. Raises Unfit where anything else was, or nothing is known."""
        now = query.__dict__
        begun = now.get("_care_begin")
        if begun is None:
            raise Unfit
        model, then = begun
        for name, value in now.items():
            if then.get(name) is not value and name not in ("_care_begin", "_where_criteria"):
                raise Unfit
        return model, now["_where_criteria"][len(then["_where_criteria"]) :]

    async def fetch(
        self,
        reading: Reading,
        model: type,
        base: Callable[[], Select[Any]],
        named: Mapping[str, Any],
        clauses: Sequence[ColumnElement[bool]],
        *,
        order: Sequence[QueryableAttribute[Any]] = (),
        descending: bool = False,
        limit: int = 0,
    ) -> list[Any]:
        """Rows of a model under `base` (whose parameters are among `named`) and further clauses. Raises Unfit."""
        mapper: Mapper[Any] = model.__mapper__  # type: ignore[attr-defined]
        keys: list[Any] = [model, "plain" in named, descending, bool(limit), *(column.key for column in order)]
        values: list[Any] = []
        clauses = list(_flat(clauses))
        for clause in clauses:
            _read(clause, mapper, keys, values)
        key = tuple(keys)
        statement = self._known.get(key)
        if statement is None:
            if key in self._known or len(self._known) >= _SHAPES_AT_MOST:
                raise Unfit
            self._known[key] = None  # stays so where it can't be compiled
            statement = self._known[key] = self._compile(model, base(), clauses, order, descending, bool(limit))
        if limit:
            named = {**named, "care_limit": limit}
        records = await reading.fetch(statement.sql, statement.arguments(named, values))
        rows = [statement.row(record) for record in records]
        if rows:
            for children in statement.children:
                await _add_children(reading, children, rows)
        return rows

    async def records(
        self, reading: Reading, name: str, base: Callable[[], Select[Any]], named: Mapping[str, Any]
    ) -> list[Values]:
        """Rows of a query whose parameters are all named. Raises Unfit."""
        known = self._texts.get(name)
        if known is None:
            compiled = base().compile(dialect=self._dialect)
            known = self._texts[name] = (str(compiled), self._slots(compiled, {}))
        sql, slots = known
        return await reading.fetch(
            sql,
            [named[source] if process is None else process(named[source]) for source, process in slots],  # type: ignore[index]
        )

    # -- once per shape ------------------------------------------------------------------------------------------------

    def _compile(
        self,
        model: type,
        query: Select[Any],
        clauses: Sequence[ColumnElement[bool]],
        order: Sequence[QueryableAttribute[Any]],
        descending: bool,
        limited: bool,
    ) -> _Statement:
        mapper: Mapper[Any] = model.__mapper__  # type: ignore[attr-defined]
        places: dict[str, int] = {}
        values = 0
        for clause in clauses:
            rebuilt, names = _rebuilt(clause, mapper, values)
            for name in names:
                places[name] = values
                values += 1
            query = query.where(rebuilt)
        if order:
            query = query.order_by(*(column.desc() if descending else column for column in order))
        if limited:
            query = query.limit(bindparam("care_limit", type_=Integer))
        compiled = query.compile(dialect=self._dialect)
        names, converters = self._columns(mapper, [entry.keyname for entry in compiled._result_columns])  # type: ignore[attr-defined,assignment]
        return _Statement(
            str(compiled), self._slots(compiled, places), names, converters, self._view(model), self._children(mapper)
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


def _flat(clauses: Sequence[Any]) -> Iterator[Any]:
    for clause in clauses:
        if type(clause) is BooleanClauseList and clause.operator is operators.and_:
            yield from _flat(clause.clauses)
        else:
            yield clause


def _own_column(clause: Any, mapper: Mapper[Any]) -> bool:
    return type(clause) is BinaryExpression and clause.left._annotations.get("parententity") is mapper


def _read(clause: Any, mapper: Mapper[Any], keys: list[Any], values: list[Any]) -> None:
    """Add a clause's shape to the key and its values to the values. Raises Unfit."""
    if _own_column(clause, mapper):
        right, operator = clause.right, clause.operator
        if type(right) is BindParameter and right.callable is None:
            listed = _LISTED.get(operator)
            if listed is not None and right.expanding:
                keys += (listed, clause.left.key)
                values.append(list(right.value))  # type: ignore[arg-type]
                return
            if operator in _SIMPLE and not right.expanding:
                keys += (operator, clause.left.key)
                values.append(right.value)
                return
    cached = clause._generate_cache_key()
    if cached is None or cached.bindparams:
        raise Unfit
    keys.append(cached.key)


def _rebuilt(clause: Any, mapper: Mapper[Any], number: int) -> tuple[Any, list[str]]:
    """The same clause with parameters of our own names."""
    if not _own_column(clause, mapper) or type(clause.right) is not BindParameter:
        return clause, []
    name, column = f"care_{number}", clause.left
    if clause.right.expanding:
        among = bindparam(name, type_=ARRAY(column.type))
        return (column == any_(among) if clause.operator is operators.in_op else column != all_(among)), [name]
    return clause.operator(column, bindparam(name, type_=clause.right.type)), [name]


def _refuse(value: Any) -> bytes:
    raise ValueError("JSON is no parameter of a read")

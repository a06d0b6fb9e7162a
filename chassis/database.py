"""One service's database: its engine, its sessions, and the statement that ends every write."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import asyncpg
import orjson
from care.events.v1.envelope_pb2 import Event
from google.protobuf.message import Message
from prometheus_client import Counter
from sqlalchemy import ARRAY, LargeBinary, Text, TextClause, Uuid, bindparam, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session as SyncSession
from sqlalchemy.pool import AsyncAdaptedQueuePool

from chassis.errors import Aborted
from chassis.ids import new_id
from chassis.model import Act, Told, listen
from chassis.reading import Connections, Loader, Reading, Statements, Unfit
from chassis.session import Session
from chassis.settings import Settings
from chassis.telemetry import Telemetry, current_traceparent
from chassis.wire import to_proto

_FLUSH_AUDIT_EVERY = 0.5
_AUDIT_BUFFER_AT_MOST = 5000


class Telling:
    """How a service's events look on the bus: the topic, and which payload goes with which event.

    `payloads` maps an event type (`patient.access_changed`) or an aggregate's name (`appointment`) to the message that
    is made of the row.
    """

    def __init__(self, service: str, payloads: Mapping[str, type[Message]]) -> None:
        self.topic = f"care.{service}"
        self._payloads = payloads
        self._actor = f"system:{service}"

    def envelope(self, told: Told) -> Event:
        """The event as it goes on the bus."""
        act = told.act
        kind = self._payloads.get(told.type) or self._payloads[told.type.partition(".")[0]]
        payload = to_proto(told.row, kind, **told.extra)
        built = Event(
            id=new_id(),
            type=told.type,
            tenant_id=told.row.tenant_id,
            aggregate_id=told.row.id,
            patient_id=told.row.subject_id or "",
            actor=act.actor if act is not None else self._actor,
            version=told.version,
            security_labels=told.labels,
            traceparent=told.traceparent,
            payload_type=payload.DESCRIPTOR.full_name,
            payload=payload.SerializeToString(),
        )
        if act is not None:
            built.time.FromDatetime(act.now)
        else:
            built.time.GetCurrentTime()
        return built


class _Twins:
    """Calls with one key: one at a time, and how many have ended."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.here = 0
        self.ended = 0


class Database:
    """Engine, pool and sessions. `wake` is called after each commit that told an event."""

    def __init__(self, settings: Settings, telemetry: Telemetry, telling: Telling) -> None:
        self.engine = engine(settings, application=telemetry.service)
        self._autocommit = self.engine.execution_options(isolation_level="AUTOCOMMIT")
        self.telling = telling
        self.wake: Callable[[], None] = lambda: None
        # SQLAlchemy's pool is unfair: a queue in front of it cut p99 to a third.
        self._room = asyncio.Semaphore(settings.pool_size)
        self._waited = telemetry.watch_pool(self.engine)
        self._twins: dict[tuple[str, ...], _Twins] = {}
        self._twin_patience = settings.lock_timeout
        self.deadlocks = Counter("care_deadlocks", "Deadlocks: each is a defect.", registry=telemetry.registry)
        self._loader = Loader(Connections(_connect(settings, self.engine, telemetry.service)), settings.pool_size)
        self.statements = Statements(self.engine)
        self.audit = AuditLog(self._autocommit, self._loader, telemetry)

        class ServiceSession(SyncSession):
            """Sessions of this service alone: listeners of one must not hear another's."""

        listen(ServiceSession)
        event.listen(ServiceSession, "before_commit", self._tell)
        event.listen(ServiceSession, "after_commit", self._told)
        self.sessions: async_sessionmaker[Any] = async_sessionmaker(
            self.engine, class_=Session, sync_session_class=ServiceSession, expire_on_commit=False
        )
        self._placed: async_sessionmaker[_Placed] = async_sessionmaker(
            self._autocommit, class_=_Placed, sync_session_class=ServiceSession, expire_on_commit=False
        )
        self._readers: async_sessionmaker[Session] = async_sessionmaker(
            self._autocommit, class_=Session, sync_session_class=ServiceSession, expire_on_commit=False
        )

    def share(self, **info: Any) -> None:
        """Put things into every session's `info`: reactions find the runtime there."""
        for maker in (self.sessions, self._readers, self._placed):
            maker.configure(info=info)

    @contextlib.asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncSession]:
        """A session in one transaction; rolled back unless committed inside."""
        async with self._place(), self.sessions() as db:
            yield db

    @contextlib.asynccontextmanager
    async def acting(self, actor: str) -> AsyncIterator[AsyncSession]:
        """A transaction of the service itself (timers, loops), with the database's clock; commits at the end."""
        async with self.writing() as db:
            now = (await db.execute(_CLOCK)).scalar_one()
            db.info["act"] = Act(actor, now)
            yield db
            await db.commit()

    @contextlib.asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """A session whose statements stand alone."""
        async with self._place(), self._readers() as db:
            yield db

    @contextlib.asynccontextmanager
    async def hot_reading(self) -> AsyncIterator[Reading]:
        """As `reading`, with the short way for whoever knows it; a place is taken only for the session."""
        reading = Reading(self._loader, self._placed_session)
        try:
            yield reading
        finally:
            await reading.close()

    async def fetch(self, statement: TextClause, named: Mapping[str, Any]) -> list[Sequence[Any]]:
        """Rows of a textual statement on the short way. Raises Unfit."""
        return await self.statements.records(self._loader, statement, named)

    def _placed_session(self) -> AsyncSession:
        session = self._placed()
        session.place = self._place()
        return session

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        started = time.perf_counter()
        async with self._room:
            self._waited(time.perf_counter() - started)
            yield

    @contextlib.asynccontextmanager
    async def twins(self, key: tuple[str, ...]) -> AsyncIterator[None]:
        """Twins of one request queue here, before they take a place: on the unique index they would pin a connection each.

        Raises Aborted `IN_PROGRESS` where none of them has ended for `lock_timeout`.
        """
        twins = self._twins.setdefault(key, _Twins())
        twins.here += 1
        try:
            while True:
                ended = twins.ended
                try:
                    async with asyncio.timeout(self._twin_patience):
                        await twins.lock.acquire()
                    break
                except TimeoutError:
                    if twins.ended == ended:
                        raise in_progress() from None
            try:
                yield
            finally:
                twins.ended += 1
                twins.lock.release()
        finally:
            twins.here -= 1
            if not twins.here:
                self._twins.pop(key, None)

    async def finish(self, db: AsyncSession, entry: Mapping[str, Any], answer: Mapping[str, Any]) -> None:
        """Outbox rows, the stored answer and the audit row, in one statement."""
        keys, values, traceparents = self._outbox(db.sync_session)
        await db.execute(
            _FINISH,
            {
                **{f"audit_{name}": value for name, value in entry.items()},
                **answer,
                "topic": self.telling.topic,
                "keys": keys,
                "values": values,
                "traceparents": traceparents,
            },
        )

    async def tell(self, db: AsyncSession, kind: str, key: str, tenant_id: str, payload: Message) -> None:
        """Tell an event that is no aggregate's, such as a heartbeat; the payload stands as it is."""
        act: Act | None = db.info.get("act")
        built = Event(
            id=new_id(),
            type=kind,
            tenant_id=tenant_id,
            aggregate_id=key,
            actor=act.actor if act is not None else "",
            traceparent=current_traceparent(),
            payload_type=payload.DESCRIPTOR.full_name,
            payload=payload.SerializeToString(),
        )
        if act is not None:
            built.time.FromDatetime(act.now)
        values = {"keys": [key], "values": [built.SerializeToString()], "traceparents": [built.traceparent]}
        await db.execute(_OUTBOX, {"topic": self.telling.topic, **values})
        db.info["woke"] = True

    def _outbox(self, session: SyncSession) -> tuple[list[str], list[bytes], list[str]]:
        told: Sequence[Told] = sorted(session.info.pop("told", []), key=lambda one: one.order)
        if told:
            session.info["woke"] = True
        events = [self.telling.envelope(one) for one in told]
        return (
            [one.aggregate_id for one in events],
            [one.SerializeToString() for one in events],
            [one.traceparent for one in events],
        )

    def _tell(self, session: SyncSession) -> None:
        session.flush()
        keys, values, traceparents = self._outbox(session)
        if keys:
            session.execute(
                _OUTBOX,
                {"topic": self.telling.topic, "keys": keys, "values": values, "traceparents": traceparents},
            )

    def _told(self, session: SyncSession) -> None:
        if session.info.pop("woke", False):
            self.wake()
        for wake in session.info.pop("wakes", {}).values():
            wake()

    async def start(self) -> None:
        """Begin to write buffered audit rows."""
        self.audit.start()

    async def stop(self) -> None:
        """Write what is buffered, close the pool."""
        await self.audit.stop()
        await self._loader.close()
        await self.engine.dispose()


class _Placed(Session):
    """A session that takes its place at the database with its first statement, and gives it back when it is closed."""

    place: contextlib.AbstractAsyncContextManager[None] | None = None
    _waiting: contextlib.AbstractAsyncContextManager[None] | None = None

    async def _enter(self) -> None:
        if self.place is not None:
            place, self.place = self.place, None
            await place.__aenter__()
            self._waiting = place

    async def execute(self, *arguments: Any, **more: Any) -> Any:
        await self._enter()
        return await super().execute(*arguments, **more)

    async def scalar(self, *arguments: Any, **more: Any) -> Any:
        await self._enter()
        return await super().scalar(*arguments, **more)

    async def scalars(self, *arguments: Any, **more: Any) -> Any:
        await self._enter()
        return await super().scalars(*arguments, **more)

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            if self._waiting is not None:
                place, self._waiting = self._waiting, None
                await place.__aexit__(None, None, None)


class AuditLog:
    """One row per call. Writes put theirs into their own transaction; lists within half a second."""

    def __init__(self, engine: AsyncEngine, loader: Loader, telemetry: Telemetry) -> None:
        self._engine = engine
        self._loader = loader
        self._log = telemetry.log
        self._buffer: list[dict[str, Any]] = []
        self._refusals: list[dict[str, Any]] = []
        self._one_at_a_time = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    async def read(self, entry: dict[str, Any], *, at_once: bool, db: AsyncSession | None = None) -> None:
        """Note a read: before the answer, in `db`'s transaction where there is one, or within half a second.

        While the database is away, what would wait beyond 5000 rows is an error instead.
        """
        if not at_once and len(self._buffer) < _AUDIT_BUFFER_AT_MOST:
            self._buffer.append(entry)
        elif db is None:
            await self.write([entry])
        else:
            await db.execute(_AUDIT, entry)

    async def write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows in one statement; one that is there already is left as it is."""
        try:
            await self._loader.execute(_AUDIT_MANY, _columns(rows))
        except Unfit:  # the long way tells what is wrong
            async with self._engine.connect() as connection:
                await connection.execute(_AUDIT_ONCE, [dict(row) for row in rows])

    async def refused(self, entry: dict[str, Any]) -> None:
        """Note a refusal before the answer; where that takes longer than two seconds, as soon as it can be."""
        self._refusals.append(entry)
        try:
            # Losers of a race come in crowds: whoever gets the turn writes for all that wait, on one connection.
            async with asyncio.timeout(2), self._one_at_a_time:
                if any(one is entry for one in self._refusals):
                    rows = list(self._refusals)
                    await self.write(rows)
                    written = {id(one) for one in rows}
                    self._refusals[:] = [one for one in self._refusals if id(one) not in written]
        except Exception as error:
            self._refusals[:] = [one for one in self._refusals if one is not entry]
            waits = len(self._buffer) < _AUDIT_BUFFER_AT_MOST
            if waits:  # who is refused is told so in time, and a row that was written after all is written once
                self._buffer.append(entry)
            self._log.error("refusal not audited yet" if waits else "refusal not audited",
                            method=entry["method"], error=type(error).__name__)  # fmt: skip

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="audit")

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._flush(), 3)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_AUDIT_EVERY)
            try:
                await self._flush()
            except Exception as error:  # kept, and tried again
                self._log.warning("audit rows wait", rows=len(self._buffer), error=type(error).__name__)

    async def _flush(self) -> None:
        if not self._buffer:
            return
        rows = list(self._buffer)
        try:
            await self.write(rows)
        except Exception as error:
            if not _is_refused(error):
                raise
            for row in rows:  # all but the one that no database takes: it would keep the others waiting for ever
                await self._write_alone(row)
        del self._buffer[: len(rows)]

    async def _write_alone(self, row: Mapping[str, Any]) -> None:
        try:
            await self.write([row])
        except Exception as error:
            if not _is_refused(error):
                raise
            self._log.error("audit row can't be written", method=row["method"], error=type(error).__name__)


def _is_refused(error: Exception) -> bool:
    """Whether it is the row's own fault: a value that is none, a constraint."""
    return (getattr(getattr(error, "orig", error), "sqlstate", None) or "")[:2] in ("22", "23")


def in_progress() -> Aborted:
    """What a twin is told that waited too long for its sibling."""
    return Aborted("IN_PROGRESS", "The same change is under way; try again in a moment.")


def engine(settings: Settings, *, application: str) -> AsyncEngine:
    """An engine whose errors hold no values and whose statements end."""
    url = make_url(settings.database_url)
    made = create_async_engine(
        url,
        hide_parameters=True,
        poolclass=AsyncAdaptedQueuePool,
        # Eight beyond the requests' own for relay, consumers and timers. Kept once they are made: overflow would be closed
        # each time that it is given back, and a new connection costs as much CPU as ten bookings.
        pool_size=settings.pool_size + 8,
        max_overflow=0,
        pool_timeout=5,
        pool_recycle=1800,
        json_deserializer=orjson.loads,
        connect_args=_connect_arguments(settings, application),
    )
    dialect: Any = made.dialect
    is_lost = dialect.is_disconnect

    def is_of_no_use(error: BaseException, *place: Any) -> bool:
        # Prepared before a migration: in a transaction it can only be begun anew, on a connection that is new, too.
        return isinstance(error.__cause__, asyncpg.InvalidCachedStatementError) or is_lost(error, *place)

    dialect.is_disconnect = is_of_no_use
    return made


def _connect_arguments(settings: Settings, application: str) -> dict[str, Any]:
    return {
        "timeout": 5,
        "command_timeout": settings.statement_timeout + 5,
        "server_settings": {
            "application_name": f"care-{application}",
            "lock_timeout": str(int(settings.lock_timeout * 1000)),
            "statement_timeout": str(int(settings.statement_timeout * 1000)),
            "idle_in_transaction_session_timeout": "15000",
            # A call whose deadline passed drops its connection: what it was running must not keep its locks until the end.
            "client_connection_check_interval": "500",
            "timezone": "UTC",
            "jit": "off",
        },
    }


def _connect(settings: Settings, engine: AsyncEngine, application: str) -> Callable[[], Any]:
    """How a driver's connection is made to where the engine's go."""
    _, found = engine.dialect.create_connect_args(engine.url)
    arguments = {**found, **_connect_arguments(settings, application)}
    # Planning for the very values takes three times as long as running the plan. Only here: what names a status by a
    # parameter, as the ORM does, would miss its partial index.
    arguments["server_settings"]["plan_cache_mode"] = "force_generic_plan"
    for name in ("prepared_statement_cache_size", "prepared_statement_name_func", "async_fallback"):
        arguments.pop(name, None)  # SQLAlchemy's own
    return lambda: asyncpg.connect(**arguments)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Rows as lists by column; lists of ids as text, since a list of lists would be flattened."""
    columns = {name: [row[name] for row in rows] for name in _ENTRY}
    columns["subject_ids"] = ["{" + ",".join(ids) + "}" for ids in columns["subject_ids"]]
    return list(columns.values())


_CLOCK = text("SELECT clock_timestamp()")
_UUID = Uuid(as_uuid=False)
_ENTRY = (
    "id",
    "tenant_id",
    "actor",
    "on_behalf_of",
    "method",
    "permission",
    "purpose",
    "subject_ids",
    "outcome",
    "trace_id",
)
_ENTRY_TYPES: dict[str, Any] = {"id": _UUID, "tenant_id": _UUID, "subject_ids": ARRAY(_UUID)}
_AUDIT = text(
    f"INSERT INTO audit ({', '.join(_ENTRY)}) VALUES ({', '.join(':' + name for name in _ENTRY)})"
).bindparams(*(bindparam(name, type_=_ENTRY_TYPES.get(name, Text)) for name in _ENTRY))
# What is written from a buffer may be written again: a connection can be lost after the commit, a task ended.
_AUDIT_ONCE = text(f"{_AUDIT.text} ON CONFLICT (id) DO NOTHING").bindparams(
    *(bindparam(name, type_=_ENTRY_TYPES.get(name, Text)) for name in _ENTRY)
)
_AUDIT_MANY = (
    f"INSERT INTO audit ({', '.join(_ENTRY)})"
    f" SELECT {', '.join(name + ('::uuid[]' if name == 'subject_ids' else '') for name in _ENTRY)} FROM unnest("
    + ", ".join(f"${n}::{'uuid' if name in ('id', 'tenant_id') else 'text'}[]" for n, name in enumerate(_ENTRY, 1))
    + f") AS e({', '.join(_ENTRY)}) ON CONFLICT (id) DO NOTHING"
)
_OUTBOX_TYPES = (
    bindparam("keys", type_=ARRAY(Text)),
    bindparam("values", type_=ARRAY(LargeBinary)),
    bindparam("traceparents", type_=ARRAY(Text)),
    bindparam("topic", type_=Text),
)
_OUTBOX_SQL = (
    "INSERT INTO outbox (topic, key, value, traceparent)"
    " SELECT :topic, o.key, o.value, o.traceparent"
    " FROM unnest(:keys, :values, :traceparents) WITH ORDINALITY AS o(key, value, traceparent, place) ORDER BY o.place"
)
_OUTBOX = text(_OUTBOX_SQL).bindparams(*_OUTBOX_TYPES)
_FINISH = text(
    f"WITH told AS ({_OUTBOX_SQL}), answered AS ("
    "UPDATE idempotency_key SET response = :response, subject_ids = :subjects"
    " WHERE tenant_id = :tenant AND actor = :actor AND method = :method AND request_id = :request_id)"
    f" INSERT INTO audit ({', '.join(_ENTRY)}) VALUES ({', '.join(':audit_' + name for name in _ENTRY)})"
).bindparams(
    *_OUTBOX_TYPES,
    bindparam("response", type_=LargeBinary),
    bindparam("subjects", type_=ARRAY(_UUID)),
    bindparam("tenant", type_=_UUID),
    bindparam("actor", type_=Text),
    bindparam("method", type_=Text),
    bindparam("request_id", type_=Text),
    *(bindparam(f"audit_{name}", type_=_ENTRY_TYPES.get(name, Text)) for name in _ENTRY),
)

"""A request's way through a service: one tuple of stages around every servicer's method."""

import asyncio
import contextlib
import hashlib
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any, cast

import grpc
import protovalidate
from asyncpg import exceptions as pg
from care.options.v1 import options_pb2
from care.type.v1 import type_pb2
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from google.rpc import status_pb2
from opentelemetry.trace import get_current_span
from sqlalchemy import ARRAY, LargeBinary, Text, Uuid, bindparam, text
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.exc import StaleDataError

from chassis.access import Access, Caller, NeedSubject
from chassis.asking import Ask, Known, NeedFact
from chassis.auth import Identity, Verifier
from chassis.call import Call, missing
from chassis.clients import Clients
from chassis.database import Database, in_progress
from chassis.errors import (
    Aborted,
    AlreadyExists,
    DeadlineExceeded,
    Internal,
    Invalid,
    LostRace,
    NotFound,
    PermissionDenied,
    Problem,
    ResourceExhausted,
    Unavailable,
    to_status,
)
from chassis.ids import new_id
from chassis.live import Live, Watch, Watcher
from chassis.rivals import Contest, Rivals
from chassis.settings import Settings
from chassis.signing import Signer
from chassis.tables import ChassisTables
from chassis.telemetry import RpcSpan, Telemetry
from chassis.timers import LoopMetrics, RunningLoop

_MAX_CONFLICTS = 3
_BATCH_READ = "care.batch.v1.BatchService/BatchRead"
_READ_THROUGHS = 3
_ACTOR = re.compile(r"(staff|patient|related):[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class Method:
    """One RPC, as its descriptor says it."""

    def __init__(self, descriptor: MethodDescriptor, run: Callable[[Any, Call], Awaitable[Any]]) -> None:

        self.name = f"{descriptor.containing_service.full_name}/{descriptor.name}"
        self.descriptor = descriptor
        self.rule: options_pb2.Rule = descriptor.GetOptions().Extensions[options_pb2.rule]
        self.request: type[Message] = message_factory.GetMessageClass(descriptor.input_type)
        self.response: type[Message] = message_factory.GetMessageClass(descriptor.output_type)
        level = descriptor.GetOptions().idempotency_level
        self.writes = level != descriptor.GetOptions().NO_SIDE_EFFECTS
        # A live view: the stages are gone through when it is opened, its servicer answers what is to be told.
        self.streams = descriptor.server_streaming
        # A page of a list is noted within a second, and that a view was opened; all else before the answer.
        self.listing = self.streams or (not self.writes and descriptor.name.startswith(("List", "BatchGet")))
        # Its items open sessions of their own: were it to hold a place meanwhile, a few of them would wait for ever.
        self.joins = self.name == _BATCH_READ
        self.has_request_id = "request_id" in descriptor.input_type.fields_by_name
        self.has_source = "source" in descriptor.input_type.fields_by_name
        self.has_tenant = "tenant_id" in descriptor.input_type.fields_by_name
        # An answer that is a right by itself is not kept for replays: asking again makes a new one.
        self.answers_secret = "token" in descriptor.output_type.fields_by_name
        self.run = run
        self.contest: Contest | None = getattr(run, "contest", None)


@dataclass
class Credentials:
    """What came with a request."""

    token: str = ""
    tenant_id: str = ""
    on_behalf_of: str = ""


@dataclass
class Runtime:
    """What every stage and call of one service works with."""

    service: str
    settings: Settings
    database: Database
    access: Access
    verifier: Verifier
    telemetry: Telemetry
    reasons: Mapping[str, tuple[type[Problem], str, str]]
    """Constraint name to (problem class, reason, message)."""
    tables: ChassisTables
    clients: Clients
    live: Live
    asks: Mapping[str, Ask] = field(default_factory=dict)
    """How to ask other services for what methods need to know."""
    loops: dict[str, RunningLoop] = field(default_factory=dict)
    page_signer: Signer = field(init=False)
    loop_metrics: LoopMetrics = field(init=False)
    rivals: Rivals = field(init=False)

    def __post_init__(self) -> None:
        self.page_signer = Signer(self.settings.signing_secret, "page")
        self.loop_metrics = LoopMetrics(self.telemetry.registry)
        self.rivals = Rivals(self.settings.lock_timeout)

    def refuse_stale(self) -> None:
        """Nothing was heard from patients for too long: rather no answer than a wrong one."""
        raise Unavailable("ACCESS_STALE", "Access can't be confirmed now; try again.")


@dataclass
class Exchange:
    """A request on its way: what the stages hand to each other."""

    runtime: Runtime
    method: Method
    request: Message
    credentials: Credentials
    deadline: float | None
    span: RpcSpan
    caller: Caller | None = None
    identity: Identity | None = None
    confirmed: list[str] = field(default_factory=list)
    looked: bool = False
    known: Known = field(default_factory=dict)
    call: Call | None = None
    db: AsyncSession | None = None
    key: dict[str, str] = field(default_factory=dict)
    replayed: bool = False
    notes: list[dict[str, Any]] | None = None
    """Of a read in a batch: where its audit row goes, instead of into the database."""


Proceed = Callable[[Exchange], Awaitable[Message]]
Stage = Callable[[Exchange, Proceed], Awaitable[Message]]


async def authenticate(exchange: Exchange, proceed: Proceed) -> Message:
    """Who calls. First, since nothing may be told to a stranger, not even what is wrong with the request."""
    runtime, rule = exchange.runtime, exchange.method.rule
    identity = exchange.identity = await runtime.verifier.verify(exchange.credentials.token)
    if identity.service is None:
        exchange.caller = await runtime.access.caller(identity)
    elif rule.link:
        exchange.caller = Caller("link", "", "")
    else:
        tenant = exchange.credentials.tenant_id
        if exchange.method.has_tenant:
            tenant = exchange.request.tenant_id  # type: ignore[attr-defined]
        exchange.caller = Caller("system", identity.service, tenant if _is_uuid(tenant) else "")
    return await proceed(exchange)


async def permit(exchange: Exchange, proceed: Proceed) -> Message:
    """The RPC's own rule. Before validation, so that a refused caller learns nothing of the request's shape."""
    caller, rule, identity = exchange.caller, exchange.method.rule, exchange.identity
    assert caller is not None and identity is not None
    on_behalf_of = exchange.credentials.on_behalf_of
    if on_behalf_of and (identity.service is None or not _ACTOR.fullmatch(on_behalf_of)):
        # It ends up in history and audit: only our own services may say so, and only by ids.
        raise PermissionDenied("ON_BEHALF_OF_REFUSED", "Only services may say on whose behalf they call.")
    if identity.service is not None:
        if identity.service not in rule.callers:
            raise PermissionDenied("CALLER_NOT_ALLOWED", "This service may not call this RPC.")
    elif not rule.permission:
        raise PermissionDenied("INTERNAL_ONLY", "This RPC is only for the system's own services.")
    elif rule.permission not in caller.permissions:
        raise missing(rule.permission)
    if caller.kind == "system" and not caller.tenant_id and rule.permission:
        raise Invalid("TENANT_MISSING", "A service must say for which tenant it calls (metadata care-tenant).")
    return await proceed(exchange)


async def validate(exchange: Exchange, proceed: Proceed) -> Message:
    """The rules beside the request's fields. The answer names the field and the rule, never the value."""
    violations = protovalidate.collect_violations(exchange.request)
    if violations:
        first = violations[0].proto
        path = _path(first.field)
        # In the rule's own words, which hold its limits and never the value.
        wrong = first.message.removeprefix("value ").rstrip(".") or f"breaks the rule {first.rule_id}"
        raise Invalid("FIELD_INVALID", f"{path or 'The request'} {wrong}.", field=path, rule=first.rule_id)
    return await proceed(exchange)


async def see(exchange: Exchange, proceed: Proceed) -> Message:
    """Outside the transaction, since an RPC inside one holds its connection: read through on a miss, once per subject."""
    access, caller = exchange.runtime.access, exchange.caller
    assert caller is not None
    asked = 0
    while True:
        try:
            answer = await proceed(exchange)
            if not exchange.looked:  # found in the end, so it was no deny
                access.granted(caller, asked)
            return answer
        except NeedFact as need:
            what, about = need.key
            exchange.known[need.key] = await exchange.runtime.asks[what](exchange.runtime, caller.tenant_id, about)
            continue
        except NeedSubject as need:
            exchange.looked = exchange.looked or need.optional
            fresh = [one for one in need.subject_ids if one not in exchange.confirmed]
            allowed = bool(fresh) and not access.is_owner and asked < _READ_THROUGHS
            if allowed and not access.may_read_through(caller):
                if need.stale:
                    exchange.runtime.refuse_stale()
                allowed = False
            if not allowed and not need.optional:
                raise NotFound from None
        if allowed:
            asked += 1
            exchange.confirmed = [*exchange.confirmed, *await access.read_through(caller.tenant_id, fresh)]


async def audit(exchange: Exchange, proceed: Proceed) -> Message:
    """A refusal leaves its row too, after the transaction is gone; successes are written inside it."""
    try:
        return await proceed(exchange)
    except Exception as error:
        # Here and not further out: beyond the deadline's own TimeoutError nothing tells it from a driver's.
        problem = translated(error, exchange.runtime)
        if exchange.identity is not None:
            await exchange.runtime.database.audit.refused(entry(exchange, problem.code.name))
        if problem is error:
            raise
        raise problem from error


async def transact(exchange: Exchange, proceed: Proceed) -> Message:
    """One transaction for a write; single statements for a read, which saves BEGIN and COMMIT."""
    runtime, method = exchange.runtime, exchange.method
    assert exchange.caller is not None
    for attempt in range(_MAX_CONFLICTS):
        call = exchange.call = Call(
            runtime, method, exchange.request, exchange.caller, exchange.confirmed, looked=exchange.looked
        )
        call.known = exchange.known
        call.on_behalf_of = exchange.credentials.on_behalf_of
        if exchange.identity is not None and exchange.identity.service is None:
            call.login = exchange.identity.issuer, exchange.identity.subject
        if method.has_source:
            call.source = _source(exchange.request.source)  # type: ignore[attr-defined]
        try:
            if method.joins:  # no place at the database: those that it joins need one each
                answer = await proceed(exchange)
                if call.notes:
                    await runtime.database.audit.write(call.notes)
                await runtime.database.audit.read(entry(exchange, "OK"), at_once=False)
                return answer
            if not method.writes:
                async with runtime.database.hot_reading() as reading:
                    call.begin_reading(reading)
                    answer = await proceed(exchange)
                    if exchange.notes is not None and not method.listing:
                        exchange.notes.append(entry(exchange, "OK"))  # whoever runs the batch writes them
                    else:
                        await runtime.database.audit.read(entry(exchange, "OK"), at_once=not method.listing)
                return answer
            key = exchange.key = _key(call)
            # Queue first, then take a place: 64 twins must not hold all of them.
            async with (
                runtime.database.twins(tuple(key.values())),
                _turn(exchange, call),
                runtime.database.writing() as db,
            ):
                exchange.db = db
                return await proceed(exchange)
        except StaleDataError as error:
            raise Aborted("CHANGED_MEANWHILE", "Somebody else has changed it; read it again.") from error
        except LostRace as lost:
            if attempt + 1 < _MAX_CONFLICTS:
                continue
            raise lost.problem from None
        except DBAPIError as error:
            if sqlstate(error) == "40001" and attempt + 1 < _MAX_CONFLICTS:
                continue
            raise translated(error, runtime) from error
    raise AssertionError


def _turn(exchange: Exchange, call: Call) -> contextlib.AbstractAsyncContextManager[None]:
    """A call's turn among its rivals, behind its twins: a twin of the winner is to find the winner's answer.

    Where several reasons to refuse it are true, a rival may hear another one than its method would have named first.
    """
    contest = exchange.method.contest
    wanted = contest.wanted(exchange.request, call) if contest is not None else None
    if contest is None or wanted is None:
        return contextlib.nullcontext()

    async def look() -> None:
        async with exchange.runtime.database.hot_reading() as reading:
            call.begin_reading(reading)
            try:
                await contest.look(exchange.request, call, wanted)
            except Problem as problem:
                # Whoever has its answer already, here or at another replica, will find it in its transaction. Asked for
                # afterwards: what is gone and the answer of who has it became visible at once.
                key = getattr(exchange.request, "request_id", "") and problem.reason == contest.gone
                if not key or not await call.records(_ANSWERED, exchange.key):
                    raise

    return exchange.runtime.rivals.turn((contest, call.tenant_id, wanted), look, contest.gone)


def _key(call: Call) -> dict[str, str]:
    actor = call.actor
    if call.caller.kind == "link":  # whoever holds a link is somebody of his own
        actor += ":" + hashlib.blake2b(getattr(call.request, "token", "").encode(), digest_size=16).hexdigest()
    return {
        "tenant": call.tenant_id or _NO_TENANT,
        "actor": actor,
        "method": call.method.name,
        "request_id": ("" if call.method.answers_secret else getattr(call.request, "request_id", "")) or new_id(),
    }


def _source(number: int) -> str:
    known = type_pb2.Source.Code.DESCRIPTOR.values_by_number.get(number)
    if known is None:
        raise Invalid(
            "FIELD_INVALID", "source must be one of the defined values.", field="source", rule="enum.defined_only"
        )
    return str(known.name)


async def deduplicate(exchange: Exchange, proceed: Proceed) -> Message:
    """A key is claimed before the work, in the transaction of its effect; a replay gets the first answer.

    Looking first and storing later gave three of ten twins a conflict with their own sibling.
    """
    runtime, method, call = exchange.runtime, exchange.method, exchange.call
    if not method.writes:
        return await proceed(exchange)
    db = exchange.db
    assert call is not None and db is not None
    key, digest = exchange.key, _body_hash(exchange.request)
    claimed = (await db.execute(_CLAIM, {**key, "hash": digest})).first()
    if claimed is None:
        return await _replay(exchange, call, db, key, digest)
    call.begin(db, claimed.create_time)
    answer = await proceed(exchange)
    await db.flush()
    # Refused work leaves by an exception, so only answers are stored.
    await runtime.database.finish(
        db,
        entry(exchange, "OK"),
        {
            **key,
            "response": b"" if method.answers_secret else answer.SerializeToString(),
            "subjects": list(call.subject_ids),
        },
    )
    # The twin that waits must find the claim: it gets its turn only after the commit.
    await db.commit()
    return answer


async def _replay(exchange: Exchange, call: Call, db: Any, key: dict[str, Any], digest: bytes) -> Message:
    stored = (await db.execute(_STORED, key)).one()
    if stored.body_hash != digest:
        raise AlreadyExists(
            "IDEMPOTENCY_KEY_REUSED", "This request_id (Idempotency-Key) was used with another request; take a new one."
        )
    call.begin(db)
    # A link's token is part of the request that is the same; what looks at the whole tenant asked for no relation.
    if call.caller.kind == "link" or exchange.method.rule.tenant_wide:
        call.saw(*stored.subject_ids)
    else:
        for subject in stored.subject_ids:  # access may have ended since
            await call.subject(subject)
    exchange.replayed = True
    await exchange.runtime.database.audit.read(entry(exchange, "OK"), at_once=True, db=db)
    await db.commit()
    return exchange.method.response.FromString(stored.response)


async def work(exchange: Exchange) -> Message:
    """The servicer's own method, at last."""
    assert exchange.call is not None
    answer = await exchange.method.run(exchange.request, exchange.call)
    if exchange.method.streams and not answer.allowed(exchange.call.caller):
        raise NotFound
    return answer  # type: ignore[no-any-return]


# From the outside in. See each stage for why it stands where it stands.
STAGES: tuple[Stage, ...] = (audit, authenticate, permit, validate, see, transact, deduplicate)


def _fold(stages: Sequence[Stage]) -> Proceed:
    def around(proceed: Proceed, stage: Stage) -> Proceed:
        async def run(exchange: Exchange) -> Message:
            return await stage(exchange, proceed)

        return run

    innermost: Proceed = work
    return reduce(around, reversed(stages), innermost)


class Pipeline:
    """All methods of one service behind the stages."""

    def __init__(self, runtime: Runtime, servicers: Mapping[ServiceDescriptor, object]) -> None:
        self.runtime = runtime
        self.methods: dict[str, Method] = {}
        for service, servicer in servicers.items():
            for descriptor in service.methods:
                method = Method(descriptor, getattr(servicer, descriptor.name))
                self.methods[method.name] = method
        self._run = _fold(STAGES)
        self._in_flight = 0

    async def invoke(
        self,
        method: Method,
        request: Message,
        credentials: Credentials,
        *,
        metadata: Any = (),
        time_remaining: Callable[[], float | None] | None = None,
        notes: list[dict[str, Any]] | None = None,
    ) -> Message:
        """Run one request. Raises Problem, nothing else (and CancelledError)."""
        answer = await self._invoke(method, request, credentials, metadata, time_remaining, notes)
        assert isinstance(answer, Message)
        return answer

    async def open(
        self,
        method: Method,
        request: Message,
        credentials: Credentials,
        *,
        metadata: Any = (),
        time_remaining: Callable[[], float | None] | None = None,
    ) -> Watcher:
        """Open a live view: what `invoke` does, with a watcher for its answer; the span and the audit row are of the opening."""
        answer = await self._invoke(method, request, credentials, metadata, time_remaining)
        assert isinstance(answer, Watcher)
        return answer

    async def _invoke(
        self,
        method: Method,
        request: Message,
        credentials: Credentials,
        metadata: Any,
        time_remaining: Callable[[], float | None] | None,
        notes: list[dict[str, Any]] | None = None,
    ) -> Message | Watcher:
        remaining = time_remaining() if time_remaining is not None else None
        deadline = time.monotonic() + remaining if remaining is not None else None
        with self.runtime.telemetry.server_span(method.name, metadata, time_remaining=time_remaining) as span:
            exchange = Exchange(self.runtime, method, request, credentials, deadline, span, notes=notes)
            if self._in_flight >= self.runtime.settings.concurrency:
                problem: Problem = ResourceExhausted("OVERLOADED", "Too many requests at once; try again in a second.")
                span.set_code(problem.code, reason=problem.reason)
                raise problem
            self._in_flight += 1
            try:
                async with asyncio.timeout(remaining):
                    answer: Message | Watcher = await self._run(exchange)
                    if method.streams:
                        answer = await self._watch(exchange, cast(Watch, answer))
                span.set_code(grpc.StatusCode.OK)
                return answer
            except Problem as error:
                cause = error.__cause__
                span.set_code(error.code, reason=error.reason, error=cause if isinstance(error, Internal) else None)
                self._note(exchange, error.code.name, error.reason, cause)
                raise
            except TimeoutError as error:
                span.set_code(grpc.StatusCode.DEADLINE_EXCEEDED, reason="DEADLINE_EXCEEDED")
                self._note(exchange, "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED")
                raise DeadlineExceeded("DEADLINE_EXCEEDED", "The answer did not come in time; try again.") from error
            except Exception as error:
                told = translated(error, self.runtime)
                span.set_code(told.code, reason=told.reason, error=error)
                self._note(exchange, told.code.name, told.reason, error)
                raise told from error
            finally:
                self._in_flight -= 1

    async def _watch(self, exchange: Exchange, watch: Watch) -> Watcher:
        assert exchange.caller is not None and exchange.identity is not None
        permission = exchange.method.rule.permission
        return await self.runtime.live.open(watch, exchange.caller, exchange.identity, permission)

    def _note(self, exchange: Exchange, code: str, reason: str, error: BaseException | None = None) -> None:
        log = self.runtime.telemetry.log
        if error is not None and code in ("INTERNAL", "UNKNOWN"):
            log.error("call failed", method=exchange.method.name, code=code, reason=reason, exc_info=error)
        else:
            log.info("call refused", method=exchange.method.name, code=code, reason=reason)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        """Handlers for a grpc.aio server, one per service."""
        services: dict[str, dict[str, grpc.RpcMethodHandler[Any, Any]]] = {}
        for method in self.methods.values():
            service = method.descriptor.containing_service.full_name
            handlers = services.setdefault(service, {})
            if method.streams:  # its items are made once for all who are told
                handlers[method.descriptor.name] = grpc.unary_stream_rpc_method_handler(
                    self._stream(method), request_deserializer=method.request.FromString
                )
                continue
            handlers[method.descriptor.name] = grpc.unary_unary_rpc_method_handler(
                self._handler(method),
                request_deserializer=method.request.FromString,
                response_serializer=method.response.SerializeToString,
            )
        return [grpc.method_handlers_generic_handler(name, each) for name, each in services.items()]

    def _handler(self, method: Method) -> Callable[[Message, Any], Awaitable[Message]]:
        async def serve(request: Message, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
            metadata = context.invocation_metadata() or ()
            try:
                return await self.invoke(
                    method,
                    request,
                    credentials_from(metadata),
                    metadata=metadata,
                    time_remaining=context.time_remaining,
                )
            except Problem as problem:
                await _refuse(context, problem)
                raise AssertionError from None  # abort() does not return

        return serve

    def _stream(self, method: Method) -> Callable[[Message, Any], Awaitable[None]]:
        async def serve(request: Message, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            metadata = context.invocation_metadata() or ()
            try:
                watcher = await self.open(
                    method,
                    request,
                    credentials_from(metadata),
                    metadata=metadata,
                    time_remaining=context.time_remaining,
                )
            except Problem as problem:
                await _refuse(context, problem)
                raise AssertionError from None  # abort() does not return

            try:
                await watcher.pass_on(context.write, lambda problem: _refuse(context, problem))
            except (
                grpc.aio.InternalError
            ):  # the reader has gone in the middle of a write: else grpc logs it as a defect
                raise asyncio.CancelledError from None

        return serve

    async def batched(
        self,
        name: str,
        body: bytes,
        credentials: Credentials,
        traceparent: str,
        notes: list[dict[str, Any]] | None = None,
    ) -> tuple[int, bytes]:
        """One read of a batch: (0, response) or (code, serialized google.rpc.Status).

        Its audit row is added to `notes`, for the caller to write before the answer; without `notes` it is written here.
        """
        method = self.methods.get(name)
        try:
            if method is None or method.writes or method.streams or not method.rule.permission:
                raise Invalid("NOT_BATCHABLE", "Only reads of this service can be batched.")
            metadata = (("traceparent", traceparent),) if traceparent else ()
            try:
                request = method.request.FromString(body)
            except DecodeError:
                raise Invalid("REQUEST_UNREADABLE", "The request is no message of this RPC.") from None
            answer = await self.invoke(method, request, credentials, metadata=metadata, notes=notes)
        except Problem as problem:
            return problem.code.value[0], to_status(problem).SerializeToString()
        return 0, answer.SerializeToString()


async def _refuse(context: Any, problem: Problem) -> None:
    status: status_pb2.Status = to_status(problem)
    # Not set_code and an empty answer: that commits the response, and the client's retry policy would never apply.
    await context.abort(problem.code, problem.message, (("grpc-status-details-bin", status.SerializeToString()),))


def credentials_from(metadata: Any) -> Credentials:
    """The caller's token and what a service says beside it."""
    found = Credentials()
    for key, value in metadata:
        if key == "authorization":
            scheme, _, token = value.partition(" ")
            found.token = token.strip() if scheme.lower() == "bearer" else ""
        elif key == "care-tenant":
            found.tenant_id = value
        elif key == "care-on-behalf-of":
            found.on_behalf_of = value
    return found


def entry(exchange: Exchange, outcome: str) -> dict[str, Any]:
    """The audit row of an exchange."""
    call, caller = exchange.call, exchange.caller
    identity = exchange.identity
    context = get_current_span().get_span_context()
    tenant = call.tenant_id if call is not None else (caller.tenant_id if caller is not None else "")
    subjects = list(call.subject_ids) if call is not None else []
    return {
        "id": new_id(),
        "tenant_id": tenant or (identity.tenant_id if identity is not None else "") or _NO_TENANT,
        "actor": caller.actor if caller is not None else "unknown",
        "on_behalf_of": call.on_behalf_of if call is not None else "",
        "method": exchange.method.name,
        "permission": exchange.method.rule.permission,
        # The caller's own words: with a NUL no row could be written, neither this refusal's nor those written with it.
        "purpose": call.purpose.replace("\0", "\ufffd") if call is not None else "",
        "subject_ids": subjects,
        "outcome": outcome,
        "trace_id": f"{context.trace_id:032x}" if context.is_valid else "",
    }


def sqlstate(error: BaseException) -> str:
    """SQLSTATE of a driver's error, or ""."""
    return getattr(getattr(error, "orig", error), "sqlstate", None) or ""


def translated(error: BaseException, runtime: Runtime) -> Problem:
    """What a caller is told of an error: by constraint or SQLSTATE, never in the driver's words, which hold values."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, DBAPIError | pg.PostgresError):  # the latter where no connection could be had
        cause = getattr(getattr(error, "orig", None), "__cause__", None)
        constraint = getattr(cause, "constraint_name", None) or ""
        if constraint in runtime.reasons:
            cls, reason, message = runtime.reasons[constraint]
            return cls(reason, message)
        state = sqlstate(error)
        if state == "23503" and constraint.endswith("_subject_fkey"):
            return NotFound()
        if state == "55P03":
            return in_progress()
        if state == "40001":
            return Aborted("CHANGED_MEANWHILE", "Somebody else has changed it; read it again.")
        if state == "40P01":
            runtime.database.deadlocks.inc()
        if state[:2] in ("08", "53", "57") or getattr(error, "connection_invalidated", False):
            return Unavailable("DATABASE_UNAVAILABLE", "The database does not answer; try again.")
        if isinstance(cause, pg.DataError):
            return Invalid("VALUE_REFUSED", "A value can't be stored.")
    elif isinstance(error, StatementError) and isinstance(error.orig, ValueError | LookupError | OverflowError):
        return Invalid("VALUE_REFUSED", "A value can't be stored.")  # refused on its way to the driver
    if isinstance(error, OSError | PoolTimeoutError):  # TimeoutError is an OSError
        return Unavailable("DATABASE_UNAVAILABLE", "The database does not answer; try again.")
    return Internal()


def _is_uuid(value: str) -> bool:
    try:
        return str(uuid.UUID(value)) == value.lower()
    except ValueError:
        return False


def _path(path: Any) -> str:
    parts: list[str] = []
    for element in path.elements:
        name = element.field_name
        subscript = element.subscript
        kind = getattr(subscript, "case", None) or getattr(subscript, "field", None)
        index = getattr(subscript, "value", None) if subscript is not None else None
        if kind == "index" or isinstance(index, int):
            name += f"[{index}]"
        parts.append(name)
    return ".".join(parts)


def _body_hash(request: Message) -> bytes:
    bare = type(request)()
    bare.CopyFrom(request)
    if "request_id" in bare.DESCRIPTOR.fields_by_name:
        bare.ClearField("request_id")
    return hashlib.sha256(bare.SerializeToString(deterministic=True)).digest()


_NO_TENANT = "00000000-0000-0000-0000-000000000000"
_KEY = [
    bindparam("tenant", type_=Uuid(as_uuid=False)),
    *(bindparam(n, type_=Text) for n in ("actor", "method", "request_id")),
]
_CLAIM = text(
    "INSERT INTO idempotency_key (tenant_id, actor, method, request_id, body_hash)"
    " VALUES (:tenant, :actor, :method, :request_id, :hash) ON CONFLICT DO NOTHING RETURNING create_time"
).bindparams(*_KEY, bindparam("hash", type_=LargeBinary))
_OF_KEY = (
    "FROM idempotency_key"
    " WHERE tenant_id = :tenant AND actor = :actor AND method = :method AND request_id = :request_id"
)
_ANSWERED = text(f"SELECT 1 AS answered {_OF_KEY}").bindparams(*_KEY)
_STORED = text(
    f"SELECT body_hash, response, subject_ids {_OF_KEY}"
).bindparams(*_KEY).columns(body_hash=LargeBinary, response=LargeBinary, subject_ids=ARRAY(Uuid(as_uuid=False)))  # fmt: skip

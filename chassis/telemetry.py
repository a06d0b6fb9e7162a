"""Spans, metrics and logs of one service: passed around, never global, and unable to carry a patient's values."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import lru_cache
from re import compile as pattern
from typing import Self, TextIO, TypeVar

import grpc
from grpc.aio import ClientCallDetails, Metadata, UnaryStreamCall, UnaryUnaryCall
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased
from opentelemetry.trace import Link, Span, SpanContext, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes, AttributeValue
from prometheus_client import CollectorRegistry, Counter
from sqlalchemy.ext.asyncio import AsyncEngine
from structlog.typing import FilteringBoundLogger

from chassis.logs import REASON, LogGuard, install_log_guard, json_logger, status_code_of, type_name
from chassis.metrics import CallMetrics, Metrics, MetricsServer, exemplar, serve_metrics

__all__ = [
    "HttpSpan",
    "LogGuard",
    "MetricsServer",
    "RpcSpan",
    "Telemetry",
    "context_from",
    "current_traceparent",
    "install_log_guard",
    "links_to",
    "serve_metrics",
]

# Fail closed: a name that is not here is dropped before export. Not here on purpose: `rpc.request.metadata.*` (tokens),
# `messaging.kafka.message.key`, `url.*` save the scheme, SQL text, `network.peer.address` and `client.address` (an IP identifies a person).
ALLOWED_ATTRIBUTES = frozenset(
    """
    rpc.system.name rpc.method rpc.response.status_code
    http.request.method http.route http.response.status_code url.scheme
    messaging.system messaging.operation.name messaging.operation.type messaging.destination.name
    messaging.destination.partition.id messaging.batch.message_count messaging.consumer.group.name messaging.client.id
    messaging.message.id messaging.message.body.size messaging.kafka.offset messaging.kafka.message.tombstone
    db.system.name db.operation.name db.operation.batch.size db.response.status_code
    server.address server.port network.protocol.name network.protocol.version network.transport network.type
    service.name service.namespace service.version service.instance.id
    error.type exception.type
    care.tenant_id care.actor.kind care.event.id care.event.type care.event.version care.reason care.service care.channel
    care.attempt care.outcome care.degraded care.replay care.lease.epoch care.count
    """.split()
)
_VALUE_LIMIT = 256
_ERROR_TYPE = pattern(r"[\w.<>:-]{1,128}")
_EVENT_NAME = pattern(r"[a-z][a-z0-9_.]{0,63}")
_RPC_METHOD = pattern(r"[A-Za-z_][\w.]{0,150}/[A-Za-z_]\w{0,80}")
_HTTP_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_OTHER = "_OTHER"

# RPC semantic conventions 1.45 (gRPC): the other codes are the caller's doing, so a server span leaves them unset.
_SERVER_ERRORS = frozenset(
    (
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DATA_LOSS,
    )
)
_W3C = TraceContextTextMapPropagator()
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


# -- what leaves the process ------------------------------------------------------------------------------------------


def _allowed(attributes: Attributes) -> dict[str, AttributeValue]:
    kept: dict[str, AttributeValue] = {}
    for name, value in (attributes or {}).items():
        if name not in ALLOWED_ATTRIBUTES:
            continue
        if isinstance(value, str):
            shape = (
                REASON if name == "care.reason" else _ERROR_TYPE if name in ("error.type", "exception.type") else None
            )
            if shape and not shape.fullmatch(value):
                continue
            kept[name] = value[:_VALUE_LIMIT]
        elif isinstance(value, bool | int | float):
            kept[name] = value
    return kept


def _bare(context: SpanContext | None) -> SpanContext | None:
    """Without `tracestate`, which a caller may fill as it likes."""
    if context is None or not context.trace_state:
        return context
    return SpanContext(context.trace_id, context.span_id, context.is_remote, context.trace_flags)


def scrubbed(span: ReadableSpan) -> ReadableSpan:
    """The span as it may leave: allowed attributes only, exceptions as their type, no status text, no tracestate."""
    return ReadableSpan(
        name=span.name[:_VALUE_LIMIT],
        context=_bare(span.get_span_context()),
        parent=_bare(span.parent),
        resource=span.resource,
        attributes=_allowed(span.attributes),
        events=[
            Event(event.name, _allowed(event.attributes), event.timestamp)
            for event in span.events
            if _EVENT_NAME.fullmatch(event.name)
        ],
        links=[Link(_bare(link.context) or link.context, _allowed(link.attributes)) for link in span.links],
        kind=span.kind,
        status=Status(span.status.status_code),
        start_time=span.start_time,
        end_time=span.end_time,
        instrumentation_scope=span.instrumentation_scope,
    )


class _Scrubbing(SpanExporter):
    """The only way out for spans."""

    def __init__(self, inner: SpanExporter, outcomes: Counter) -> None:
        self._inner = inner
        self._outcomes = outcomes
        self._abandoned = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        result = SpanExportResult.FAILURE
        if not self._abandoned:
            result = self._inner.export([scrubbed(span) for span in spans])
        self._outcomes.labels("sent" if result is SpanExportResult.SUCCESS else "failed").inc(len(spans))
        return result

    def shutdown(self) -> None:
        self._inner.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return self._inner.force_flush(timeout_millis)

    def abandon(self) -> None:
        self._abandoned = True


# -- trace context ----------------------------------------------------------------------------------------------------


def current_traceparent() -> str:
    """The current span as W3C `traceparent`, "" outside a span: for outbox rows and metadata."""
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return ""
    return f"00-{trace.format_trace_id(context.trace_id)}-{trace.format_span_id(context.span_id)}-{context.trace_flags & 1:02x}"


def context_from(traceparent: str | None) -> Context:
    """A context whose parent is that remote span; an empty one (a new trace) if it is missing or malformed."""
    # `tracestate` and `baggage` stay unread: they are a caller's free text.
    return _W3C.extract({"traceparent": traceparent}, Context()) if traceparent else Context()


def links_to(traceparent: str | None) -> list[Link]:
    """A link to that remote span, or none: what a consumer and the relay show beside their own parent."""
    context = trace.get_current_span(context_from(traceparent)).get_span_context()
    return [Link(context)] if context.is_valid else []


def _traceparent_in(metadata: Iterable[tuple[str, str | bytes]] | None) -> str | None:
    for name, value in metadata or ():
        if name.lower() == "traceparent":
            return value if isinstance(value, str) else value.decode("latin-1")
    return None


# -- spans of calls ---------------------------------------------------------------------------------------------------


def _mark_exception(span: Span, error: BaseException) -> None:
    span.add_event("exception", {"exception.type": type_name(error)})


class RpcSpan:
    """The span of one call; without `set_code` a call that ends quietly is OK and one that raises takes the exception's status."""

    __slots__ = ("_code", "_error", "_is_error", "span")

    def __init__(self, span: Span, is_error: Callable[[grpc.StatusCode], bool]) -> None:
        self.span = span
        self._is_error = is_error
        self._code: grpc.StatusCode | None = None
        self._error: BaseException | None = None

    @property
    def code(self) -> grpc.StatusCode | None:
        return self._code

    def set_code(self, code: grpc.StatusCode, *, reason: str | None = None, error: BaseException | None = None) -> None:
        """The call's outcome; `reason` is ours (UPPER_SNAKE), of `error` only the type is kept."""
        self._code, self._error = code, error
        if reason:
            self.span.set_attribute("care.reason", reason)

    def left(self) -> None:
        """Cancelled by us who had what we wanted, such as a stream that its reader leaves: no error."""
        self._code, self._is_error = grpc.StatusCode.CANCELLED, lambda _: False

    def set_attribute(self, name: str, value: AttributeValue) -> None:
        self.span.set_attribute(name, value)

    def _finish(self) -> grpc.StatusCode:
        code = self._code or grpc.StatusCode.OK
        self.span.set_attribute("rpc.response.status_code", code.name)
        if self._is_error(code):
            unmapped = self._error is not None and status_code_of(self._error) is None
            self.span.set_attribute("error.type", type_name(self._error) if unmapped else code.name)
            self.span.set_status(Status(StatusCode.ERROR))
            if self._error is not None:
                _mark_exception(self.span, self._error)
        return code


class HttpSpan:
    """The span of one HTTP request; a request that raises is a 500, one whose client went away a 499."""

    __slots__ = ("_method", "_route", "_status", "span")

    def __init__(self, span: Span, method: str, route: str) -> None:
        self.span = span
        self._method = method
        self._route = route
        self._status = 200

    def set_status(self, status: int, *, reason: str | None = None) -> None:
        self._status = status
        if reason:
            self.span.set_attribute("care.reason", reason)

    def set_route(self, route: str) -> None:
        """The route's template (`/v1/appointments/{id}`), never the path, once the router knows it."""
        self._route = route
        self.span.set_attribute("http.route", route)
        self.span.update_name(f"{self._method} {route}")

    def set_attribute(self, name: str, value: AttributeValue) -> None:
        self.span.set_attribute(name, value)


@lru_cache(maxsize=1024)
def _rpc_method(method: str | bytes) -> str:
    name = (method.decode("latin-1") if isinstance(method, bytes) else method).lstrip("/")
    return name if _RPC_METHOD.fullmatch(name) else _OTHER


def _raised_code(error: BaseException, time_remaining: Callable[[], float | None] | None) -> grpc.StatusCode:
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        # grpc.aio cancels a handler both when the caller leaves and when the deadline passes: only the clock tells which.
        left = time_remaining() if time_remaining else None
        return grpc.StatusCode.CANCELLED if left is None or left > 0 else grpc.StatusCode.DEADLINE_EXCEEDED
    return status_code_of(error) or grpc.StatusCode.UNKNOWN


# -- the service's telemetry ------------------------------------------------------------------------------------------


class Telemetry:
    """Tracer, metrics and logger of one service; several live in one process and share nothing.

    `tracer`: for spans beyond the helpers here. `registry`: the service's own Prometheus registry. `log`: JSON lines bound to the service.
    """

    def __init__(
        self,
        service: str,
        provider: TracerProvider,
        metrics: Metrics,
        log: FilteringBoundLogger,
        out: _Scrubbing | None,
    ) -> None:
        self.service = service
        self.metrics = metrics
        self.registry: CollectorRegistry = metrics.registry
        self.log = log
        self.tracer = provider.get_tracer("care")
        self._provider = provider
        self._out = out

    @classmethod
    def create(
        cls,
        service: str,
        *,
        otlp_endpoint: str | None,
        environment: str,
        version: str,
        log_stream: TextIO | None = None,
        log_level: str = "info",
        sample_ratio: float = 1.0,
        exporter: SpanExporter | None = None,
    ) -> Self:
        """Telemetry of `service`.

        `otlp_endpoint`: base URL of an OTLP/HTTP collector, None for no export (spans still have ids, so logs have trace ids).
        `log_stream`: stdout by default. `sample_ratio`: share of new traces kept, a caller's decision wins. `exporter`: takes scrubbed
        spans at once, instead of the collector (tests). OTEL_EXPORTER_OTLP_HEADERS, _CERTIFICATE and OTEL_RESOURCE_ATTRIBUTES apply.
        """
        metrics = Metrics(service, environment, version)
        resource = Resource.create(
            {
                "service.name": service,
                "service.namespace": "care",
                "service.version": version,
                "service.instance.id": str(uuid.uuid4()),
                "deployment.environment.name": environment,
            }
        )
        # Where nobody takes spans, none are recorded: that halves what a span costs. They have their ids all the same.
        kept = exporter is not None or otlp_endpoint is not None
        sampler = ParentBased(TraceIdRatioBased(sample_ratio)) if kept else ALWAYS_OFF
        # shutdown_on_exit would flush at exit without a bound and hang while the collector is away.
        provider = TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        out = None
        if exporter is not None:
            out = _Scrubbing(exporter, metrics.spans)
            provider.add_span_processor(SimpleSpanProcessor(out))
        elif otlp_endpoint is not None:
            out = _Scrubbing(OTLPSpanExporter(endpoint=_traces_url(otlp_endpoint), timeout=2), metrics.spans)
            provider.add_span_processor(
                BatchSpanProcessor(out, max_queue_size=8192, schedule_delay_millis=500, max_export_batch_size=512)
            )
        return cls(service, provider, metrics, json_logger(log_stream, log_level, service=service), out)

    # spans

    @contextmanager
    def span(
        self,
        name: str,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        parent: Context | None = None,
        links: Sequence[Link] = (),
        attributes: Mapping[str, AttributeValue] | None = None,
    ) -> Iterator[Span]:
        """A current span for anything that is no call (relay, consumer, send loop); what is raised marks it by type and passes on."""
        with self.tracer.start_as_current_span(
            name,
            context=parent,
            kind=kind,
            links=links,
            attributes=attributes,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield span
            except BaseException as error:
                span.set_attribute("error.type", type_name(error))
                if isinstance(error, Exception):  # a cancellation is no failure
                    span.set_status(Status(StatusCode.ERROR))
                    _mark_exception(span, error)
                raise

    def server_span(
        self,
        method: str,
        metadata: Iterable[tuple[str, str | bytes]] | None = None,
        *,
        time_remaining: Callable[[], float | None] | None = None,
    ) -> AbstractContextManager[RpcSpan]:
        """`with` it around serving `method` ("/care.x.v1.Service/Verb"; only methods that exist, each becomes a label).

        `metadata` is the call's, for `traceparent`. `time_remaining` is the servicer context's: tells a deadline from a cancel.
        """
        parent = context_from(_traceparent_in(metadata))
        return self._call(
            SpanKind.SERVER, method, parent, self.metrics.rpc_server, _SERVER_ERRORS.__contains__, time_remaining, {}
        )

    def client_span(self, method: str | bytes, *, server_address: str | None = None) -> AbstractContextManager[RpcSpan]:
        """`with` it around calling `method`; send `current_traceparent()` from inside. Any code but OK is an error, but for
        a stream that was `left`.
        """
        attributes = {"server.address": server_address} if server_address else {}
        return self._call(
            SpanKind.CLIENT,
            method,
            None,
            self.metrics.rpc_client,
            lambda code: code is not grpc.StatusCode.OK,
            None,
            attributes,
        )

    @contextmanager
    def _call(
        self,
        kind: SpanKind,
        method: str | bytes,
        parent: Context | None,
        metrics: CallMetrics,
        is_error: Callable[[grpc.StatusCode], bool],
        time_remaining: Callable[[], float | None] | None,
        attributes: dict[str, str],
    ) -> Iterator[RpcSpan]:
        name = _rpc_method(method)
        in_flight, started = metrics.in_flight.labels(name), time.perf_counter()
        attributes |= {"rpc.system.name": "grpc", "rpc.method": name}
        span = self.tracer.start_span(name, parent, kind, attributes)
        call = RpcSpan(span, is_error)
        in_flight.inc()
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield call
            except BaseException as error:
                if call.code is None:
                    cancelled = isinstance(error, asyncio.CancelledError | GeneratorExit)
                    call.set_code(_raised_code(error, time_remaining), error=None if cancelled else error)
                raise
            finally:
                in_flight.dec()
                code = call._finish()
                metrics.duration.labels(name, code.name).observe(time.perf_counter() - started, exemplar())

    @contextmanager
    def http_span(self, method: str, route: str, headers: Mapping[str, str]) -> Iterator[HttpSpan]:
        """Around one HTTP request; `route` is the template, "" until `set_route`; `headers` (lower case) for `traceparent`."""
        method = method if method in _HTTP_METHODS else _OTHER
        shown = "HTTP" if method == _OTHER else method
        metrics = self.metrics.http_server
        in_flight, started = metrics.in_flight.labels(method), time.perf_counter()
        attributes: dict[str, AttributeValue] = {"http.request.method": method}
        if route:
            attributes["http.route"] = route
        span = self.tracer.start_span(
            f"{shown} {route}".strip(), context_from(headers.get("traceparent")), SpanKind.SERVER, attributes
        )
        request = HttpSpan(span, shown, route)
        error_type = ""
        in_flight.inc()
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            try:
                yield request
            except BaseException as error:
                error_type = type_name(error)
                request.set_status(500 if isinstance(error, Exception) else 499)
                if isinstance(error, Exception):
                    _mark_exception(span, error)
                raise
            finally:
                in_flight.dec()
                status = request._status
                span.set_attribute("http.response.status_code", status)
                if status >= 500:
                    span.set_status(Status(StatusCode.ERROR))
                if status >= 500 or error_type:
                    span.set_attribute("error.type", error_type or str(status))
                metrics.duration.labels(method, request._route or _OTHER, status).observe(
                    time.perf_counter() - started, exemplar()
                )

    def client_interceptors(self, server_address: str | None = None) -> list[grpc.aio.ClientInterceptor]:
        """For `grpc.aio.insecure_channel(interceptors=…)`: client spans, metrics and `traceparent` on unary and server-streaming calls."""
        # Two objects: grpc.aio files an interceptor under the first kind it is an instance of and ignores the rest.
        return [_UnaryInterceptor(self, server_address), _StreamInterceptor(self, server_address)]

    # gauges

    def watch_loop(self, interval: float = 0.5) -> asyncio.Task[None]:
        """Samples the running loop's lag until the task is cancelled."""
        return self.metrics.watch_loop(interval)

    def watch_pool(self, engine: AsyncEngine, pool: str = "main") -> Callable[[float], None]:
        """Shows the engine's pool; returns the function that takes the seconds a checkout waited."""
        return self.metrics.watch_pool(engine, pool)

    # end

    async def flush(self, timeout: float = 3.0) -> bool:
        """Sends what is waiting; False if `timeout` seconds were not enough."""
        return await _bounded(self._provider.force_flush, timeout)

    async def shutdown(self, timeout: float = 3.0) -> bool:
        """Sends what is waiting and stops exporting, within `timeout` seconds whatever the collector does; False if spans were left."""
        done = await _bounded(self._provider.shutdown, timeout)
        if not done and self._out is not None:
            self._out.abandon()
            self.log.warning("spans left unsent at shutdown", reason="COLLECTOR_AWAY")
        return done


def _traces_url(endpoint: str) -> str:
    base = endpoint.rstrip("/")
    return base if base.endswith("/v1/traces") else f"{base}/v1/traces"


async def _bounded(work: Callable[[], object], timeout: float) -> bool:
    """Runs blocking `work` in a daemon thread, so that neither this wait nor the interpreter's exit outlasts the bound."""
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        try:
            work()
        finally:
            with suppress(RuntimeError):  # the loop may be gone by then
                loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="telemetry-flush", daemon=True).start()
    try:
        await asyncio.wait_for(done.wait(), timeout)
    except TimeoutError:
        return False
    return True


# -- client interceptors ----------------------------------------------------------------------------------------------


def _with_traceparent(details: ClientCallDetails) -> ClientCallDetails:
    # A copy: the caller may send the same object again.
    kept = (pair for pair in details.metadata or () if pair[0].lower() != "traceparent")
    metadata = Metadata(*kept, ("traceparent", current_traceparent()))
    return ClientCallDetails(details.method, details.timeout, metadata, details.credentials, details.wait_for_ready)


_LEFT = "Locally cancelled by application!"
"""What grpc.aio says of a call that this side has cancelled."""


class _UnaryInterceptor(grpc.aio.UnaryUnaryClientInterceptor):
    def __init__(self, telemetry: Telemetry, server_address: str | None) -> None:
        self._telemetry = telemetry
        self._address = server_address

    async def intercept_unary_unary(
        self,
        continuation: Callable[[ClientCallDetails, _Request], Awaitable[UnaryUnaryCall[_Request, _Response]]],
        client_call_details: ClientCallDetails,
        request: _Request,
    ) -> UnaryUnaryCall[_Request, _Response]:
        with self._telemetry.client_span(client_call_details.method, server_address=self._address) as span:
            call = await continuation(_with_traceparent(client_call_details), request)
            try:
                span.set_code(await call.code())
            except asyncio.CancelledError:
                call.cancel()  # waiting for the code is not the call: without this the server would go on
                raise
            return call


class _StreamInterceptor(grpc.aio.UnaryStreamClientInterceptor):
    def __init__(self, telemetry: Telemetry, server_address: str | None) -> None:
        self._telemetry = telemetry
        self._address = server_address
        self._open: set[asyncio.Task[None]] = set()

    async def intercept_unary_stream(
        self,
        continuation: Callable[[ClientCallDetails, _Request], Awaitable[UnaryStreamCall[_Request, _Response]]],
        client_call_details: ClientCallDetails,
        request: _Request,
    ) -> AsyncIterator[_Response] | UnaryStreamCall[_Request, _Response]:
        begun: asyncio.Future[UnaryStreamCall[_Request, _Response]] = asyncio.get_running_loop().create_future()

        async def follow() -> None:
            # The span lives as long as the stream, in a task of its own: the caller reads and leaves as it likes.
            with self._telemetry.client_span(client_call_details.method, server_address=self._address) as span:
                try:
                    call = await continuation(_with_traceparent(client_call_details), request)
                except BaseException as error:
                    if not begun.done():
                        begun.set_exception(error)
                    raise
                if begun.done():  # the caller left while the call was being made
                    call.cancel()
                else:
                    begun.set_result(call)
                code = await call.code()
                if code is grpc.StatusCode.CANCELLED and await call.details() == _LEFT:
                    span.left()
                else:
                    span.set_code(code)

        task = asyncio.get_running_loop().create_task(follow())
        self._open.add(task)
        task.add_done_callback(self._closed)
        try:
            return await begun
        except asyncio.CancelledError:
            task.cancel()
            raise

    def _closed(self, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        if not task.cancelled():
            task.exception()  # the caller has it already

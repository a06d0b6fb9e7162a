"""The gateway as an ASGI application: authentication, transcoding, errors, and what every response carries."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, cast

import grpc
import orjson
from prometheus_client.exposition import choose_encoder
from structlog.typing import FilteringBoundLogger

from chassis.auth import Identity, Verifier
from chassis.clients import Clients
from chassis.errors import (
    DeadlineExceeded,
    Internal,
    Invalid,
    Problem,
    ResourceExhausted,
    Unauthenticated,
    problem_from_rpc,
)
from chassis.ids import new_id
from chassis.telemetry import HttpSpan, Telemetry
from gateway import calendars, docs, links, openapi
from gateway.batching import BatchedReads, PlainReads
from gateway.codec import Codec, camel
from gateway.contract import rpcs
from gateway.events import EventStream, EventStreams, require_accept
from gateway.http_errors import error_body, error_headers, http_status
from gateway.settings import GatewaySettings
from gateway.summaries import SERVICES, Summaries
from gateway.transcoding import HttpRequest, MethodNotAllowed, Route, Routes

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Mapping[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Asgi = Callable[[Any, Any, Any], Awaitable[None]]
Header = tuple[bytes, bytes]

_JSON: Final = (b"content-type", b"application/json")
_ALWAYS: Final[tuple[Header, ...]] = (
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
)
_EXPOSED: Final = b"ETag, Retry-After, X-Request-Id, WWW-Authenticate"
_ALLOWED_HEADERS: Final = b"Authorization, Content-Type, Idempotency-Key, If-Match, Last-Event-ID, Traceparent"
_ALLOWED_METHODS: Final = b"GET, POST, PATCH, PUT, DELETE"
_UNKNOWN_ROUTE: Final = "unknown"


@dataclass(slots=True)
class Response:
    """What is sent back."""

    status: int
    headers: list[Header]
    body: bytes
    reason: str | None = None
    stream: EventStream | None = None
    """Instead of the body: what is still to come."""


@dataclass(frozen=True, slots=True)
class _Page:
    """Something that isn't an RPC."""

    template: str
    answer: Callable[[str, Mapping[str, str]], Awaitable[Response]]
    quiet: bool = False
    """Asked for every few seconds by machines: neither traced nor logged."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class Gateway:
    """The ASGI application. `start` and `stop` bracket its life; it runs on one event loop."""

    def __init__(
        self,
        settings: GatewaySettings,
        verifier: Verifier,
        clients: Clients,
        telemetry: Telemetry,
        *,
        version: str = "dev",
        mounts: Mapping[str, Asgi] | None = None,
    ) -> None:
        self.settings = settings
        self.draining = False
        self._verifier = verifier
        self._clients = clients
        self._telemetry = telemetry
        self._log: FilteringBoundLogger = telemetry.log
        self._version = version
        self._mounts = dict(mounts or {})
        self._codec = Codec()
        self.routes = Routes(self._codec, rpcs())
        reads = BatchedReads(clients, telemetry) if settings.batch_legs else PlainReads(clients)
        self._summaries = Summaries(reads, self._codec, timeout=settings.leg_timeout)
        self._links = links.Links(clients, timeout=settings.request_timeout)
        self._streams = EventStreams(settings, telemetry)
        self._calls: dict[str, Callable[..., Any]] = {}
        self._calendars = calendars.Calendars(clients, timeout=settings.request_timeout)
        self._pages = {
            "/healthz": _Page("/healthz", self._healthz, quiet=True),
            "/readyz": _Page("/readyz", self._readyz, quiet=True),
            "/metrics": _Page("/metrics", self._metrics, quiet=True),
            "/openapi.json": _Page("/openapi.json", self._openapi),
            "/docs": _Page("/docs", self._docs),
        }
        self._origins = frozenset(settings.allowed_origins)
        self._document: bytes | None = None
        self._started_at = time.monotonic()
        self._once_up: set[str] = set()

    # -- life --------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Opens the channels, so that the first request finds them up."""
        self._started_at = time.monotonic()
        for service in SERVICES:
            if service in self._clients.names:
                self._clients.channel(service).get_state(try_to_connect=True)

    def end_streams(self) -> None:
        """Ends the live views, so that clients open them elsewhere."""
        self._streams.drain()

    def not_ready(self) -> list[str]:
        """Why no traffic should come here now; empty when it may."""
        if self.draining:
            return ["draining"]
        up = set()
        for service in SERVICES:
            if service not in self._clients.names:
                continue
            if self._clients.channel(service).get_state(try_to_connect=True) is grpc.ChannelConnectivity.READY:
                up.add(service)
        self._once_up |= up
        # At first all must have been there once. Later one is enough: what is away is degraded, not the gateway.
        early = time.monotonic() - self._started_at < self.settings.ready_grace
        if not up or (early and len(self._once_up) < len(SERVICES)):
            return [service for service in SERVICES if service not in up]
        return []

    # -- ASGI --------------------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await _lifespan(receive, send)
            return
        path: str = scope["path"]
        for prefix, app in self._mounts.items():
            if path == prefix or path.startswith(prefix + "/"):
                await app(scope, receive, send)
                return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        method: str = scope["method"]
        page = self._pages.get(path)
        if page is not None and page.quiet:
            response = await self._page(page, method, headers)
            await _send(send, method, response, list(_ALWAYS))
            return
        await self._observed(scope, method, headers, page, receive, send)

    async def _observed(
        self,
        scope: Scope,
        method: str,
        headers: Mapping[str, str],
        page: _Page | None,
        receive: Receive,
        send: Send,
    ) -> None:
        """Answers within a span, the RED metrics and one log line, by route template and never by path."""
        began = time.perf_counter()
        request_id = new_id()
        route = _UNKNOWN_ROUTE
        with self._telemetry.http_span(method, "", headers) as span:
            try:
                if method == "OPTIONS" and "access-control-request-method" in headers and self._origins:
                    route, response = "preflight", Response(204, self._preflight(), b"")
                elif page is not None:
                    route, response = page.template, await self._page(page, method, headers)
                elif scope["path"].startswith(links.PREFIX):
                    route = links.TEMPLATE
                    response = await self._link(scope, method, headers, receive)
                elif scope["path"].startswith(calendars.PREFIX):
                    route = calendars.TEMPLATE
                    response = await self._calendar(scope, method, headers)
                else:
                    route, response = await self._rpc(scope, method, headers, receive, span)
            except ClientGone:
                span.set_route(route)
                span.set_status(499)
                return
            span.set_route(route)
            span.set_status(response.status, reason=response.reason)
            extra = [*_ALWAYS, (b"x-request-id", request_id.encode()), *self._cors(headers)]
            if self.settings.access_log:
                self._log.info(
                    "request",
                    method=method if method.isalpha() and len(method) < 10 else "other",
                    route=route,
                    status=response.status,
                    milliseconds=round((time.perf_counter() - began) * 1000, 1),
                    request_id=request_id,
                    **({"reason": response.reason} if response.reason else {}),
                )
            if response.stream is None:
                await _send(send, method, response, extra)
        if response.stream is not None:  # the span, the metrics and the line are of its opening
            await response.stream.send_to(send, receive, extra)

    # -- RPCs --------------------------------------------------------------------------------------------------------

    async def _rpc(
        self, scope: Scope, method: str, headers: Mapping[str, str], receive: Receive, span: HttpSpan
    ) -> tuple[str, Response]:
        template = _UNKNOWN_ROUTE
        try:
            route, values = self.routes.match(method, scope.get("raw_path") or scope["path"].encode())
            template = route.template
            span.set_route(template)
            deadline = time.monotonic() + self.settings.request_timeout
            token = _bearer(headers)
            identity = await self._verifier.verify(token)
            span.set_attribute("care.tenant_id", identity.tenant_id)
            body = await self._body(headers, receive) if route.body else b""
            message = route.bind(values, HttpRequest(scope["query_string"], headers, body))
            if route.streams:
                if method == "HEAD":
                    raise MethodNotAllowed(["GET"])
                require_accept(headers)
                return template, await self._stream(route, message, token, identity)
            return template, await self._answer(route, message, token, deadline)
        except Problem as problem:
            return template, self._refusal(problem, headers)
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception:
            self._log.exception("request failed", route=template)
            return template, self._refusal(Internal(), headers)

    async def _answer(self, route: Route, message: Any, token: str, deadline: float) -> Response:
        left = deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded("DEADLINE_EXCEEDED", "The answer did not come in time; try again.")
        own = self._summaries.rpcs.get(route.rpc.name)
        if own is not None:
            try:
                async with asyncio.timeout(left):
                    return Response(200, [_JSON], orjson.dumps(await own(message, token)))
            except TimeoutError:
                raise DeadlineExceeded("DEADLINE_EXCEEDED", "The answer did not come in time; try again.") from None
        try:
            answer = await self._call(route)(message, timeout=left, metadata=(("authorization", f"Bearer {token}"),))
        except grpc.RpcError as error:
            raise problem_from_rpc(error) from error
        if route.response.DESCRIPTOR.full_name == calendars.FILE:
            return Response(200, *calendars.as_file(answer))
        headers = [_JSON]
        if route.response_has_etag and answer.etag:
            etag: str = answer.etag
            headers.append((b"etag", (etag if etag.startswith('"') else f'"{etag}"').encode()))
        return Response(200, headers, orjson.dumps(route.encode(answer)))

    def _call(self, route: Route) -> Callable[..., Any]:
        call = self._calls.get(route.rpc.name)
        if call is None:
            channel = self._clients.channel(route.rpc.owner)
            call = self._calls[route.rpc.name] = cast(
                Callable[..., Any],
                (channel.unary_stream if route.streams else channel.unary_unary)(
                    f"/{route.rpc.name}",
                    request_serializer=route.request.SerializeToString,
                    response_deserializer=route.response.FromString,
                ),
            )
        return call

    async def _stream(self, route: Route, message: Any, token: str, identity: Identity) -> Response:
        call = self._call(route)(message, metadata=(("authorization", f"Bearer {token}"),))
        stream = await self._streams.open(call, route.encode, identity)
        return Response(200, [], b"", stream=stream)

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        limit = self.settings.body_limit
        too_large = ResourceExhausted("BODY_TOO_LARGE", f"The body may have at most {limit} bytes.")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self.settings.request_timeout):
                while True:
                    event = await receive()
                    if event["type"] == "http.disconnect":
                        raise ClientGone
                    parts.append(event.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise too_large
                    if not event.get("more_body"):
                        return parts[0] if len(parts) == 1 else b"".join(parts)
        except TimeoutError:
            raise DeadlineExceeded("BODY_TOO_SLOW", "The body did not come in time.") from None

    def _refusal(self, problem: Problem, headers: Mapping[str, str]) -> Response:
        status = http_status(problem, if_match="if-match" in headers)
        if "field" in problem.metadata:
            # Services name fields as the protos do, HTTP as JSON does.
            named = problem.metadata["field"]
            problem.metadata["field"] = ".".join(camel(step) for step in named.split("."))
            problem.message = problem.message.replace(named, problem.metadata["field"])
        sent = [_JSON, *error_headers(problem, status, token_sent="authorization" in headers)]
        if isinstance(problem, MethodNotAllowed):
            sent.append((b"allow", ", ".join(problem.allowed).encode()))
        return Response(status, sent, error_body(problem, status), problem.reason)

    # -- pages -------------------------------------------------------------------------------------------------------

    async def _page(self, page: _Page, method: str, headers: Mapping[str, str]) -> Response:
        if method not in ("GET", "HEAD"):
            return self._refusal(MethodNotAllowed(["GET", "HEAD"]), headers)
        return await page.answer(method, headers)

    async def _healthz(self, method: str, headers: Mapping[str, str]) -> Response:
        return Response(200, [_JSON], b'{"status":"ok"}')

    async def _readyz(self, method: str, headers: Mapping[str, str]) -> Response:
        missing = self.not_ready()
        body = {"status": "waiting", "for": missing} if missing else {"status": "ready"}
        return Response(503 if missing else 200, [_JSON], orjson.dumps(body))

    async def _metrics(self, method: str, headers: Mapping[str, str]) -> Response:
        encode, content_type = choose_encoder(headers.get("accept", ""))
        return Response(200, [(b"content-type", content_type.encode())], encode(self._telemetry.registry))

    async def _openapi(self, method: str, headers: Mapping[str, str]) -> Response:
        if self._document is None:
            self._document = orjson.dumps(openapi.document(self.routes.all, version=self._version))
        tag = b'"' + hashlib.sha256(self._document).hexdigest()[:16].encode() + b'"'
        if headers.get("if-none-match", "").encode() == tag:
            return Response(304, [(b"etag", tag)], b"")
        return Response(200, [_JSON, (b"etag", tag)], self._document)

    async def _docs(self, method: str, headers: Mapping[str, str]) -> Response:
        return Response(200, docs.HEADERS, docs.PAGE)

    async def _link(self, scope: Scope, method: str, headers: Mapping[str, str], receive: Receive) -> Response:
        token = scope["path"].removeprefix(links.PREFIX)
        try:
            if method == "POST":
                if headers.get("content-type", "").partition(";")[0].strip().lower() != links.FORM:
                    raise Invalid("CONTENT_TYPE_UNSUPPORTED", f"The body's content type must be {links.FORM}.")
                page = await self._links.post(token, headers, await self._body(headers, receive))
            elif method in ("GET", "HEAD"):
                page = await self._links.get(token, headers)
            else:
                raise MethodNotAllowed(["GET", "HEAD", "POST"])
        except Problem as problem:
            return self._refusal(problem, headers)
        except (ClientGone, asyncio.CancelledError):
            raise
        except Exception:
            self._log.exception("request failed", route=links.TEMPLATE)
            page = self._links.error(Internal(), headers)
        return Response(page.status, list(page.headers), page.body, page.reason)

    async def _calendar(self, scope: Scope, method: str, headers: Mapping[str, str]) -> Response:
        try:
            if method not in ("GET", "HEAD"):
                raise MethodNotAllowed(["GET", "HEAD"])
            feed = await self._calendars.get(scope["path"].removeprefix(calendars.PREFIX), headers)
        except Problem as problem:
            return self._refusal(problem, headers)
        except asyncio.CancelledError:
            raise
        except Exception:
            self._log.exception("request failed", route=calendars.TEMPLATE)
            return self._refusal(Internal(), headers)
        return Response(feed.status, feed.headers, feed.body)

    # -- other origins -----------------------------------------------------------------------------------------------

    def _cors(self, headers: Mapping[str, str]) -> Sequence[Header]:
        if not self._origins:
            return ()
        vary = (b"vary", b"Origin")
        origin = headers.get("origin")
        if origin not in self._origins:
            return (vary,)
        return (
            vary,
            (b"access-control-allow-origin", origin.encode()),
            (b"access-control-expose-headers", _EXPOSED),
        )

    def _preflight(self) -> list[Header]:
        return [
            (b"access-control-allow-methods", _ALLOWED_METHODS),
            (b"access-control-allow-headers", _ALLOWED_HEADERS),
            (b"access-control-max-age", b"600"),
        ]


def create_app(
    settings: GatewaySettings,
    verifier: Verifier,
    clients: Clients,
    telemetry: Telemetry,
    *,
    version: str = "dev",
    mounts: Mapping[str, Asgi] | None = None,
) -> Gateway:
    """The gateway's ASGI application.

    `clients` needs the five services as peers and, for batched legs and links, the credential of `gateway`. `mounts`: path prefix to
    another ASGI application (a development mailbox, an issuer), served as it is.
    """
    return Gateway(settings, verifier, clients, telemetry, version=version, mounts=mounts)


def _bearer(headers: Mapping[str, str]) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise Unauthenticated("TOKEN_MISSING", "Send a bearer token in the Authorization header.")
    token = token.strip()
    if not token.isascii() or not token.isprintable():  # gRPC metadata would refuse it with an exception of its own
        raise Unauthenticated("TOKEN_INVALID", "The token can't be verified.")
    return token


async def _send(send: Send, method: str, response: Response, extra: Sequence[Header]) -> None:
    own = {name for name, _ in response.headers}
    headers = [
        *response.headers,
        *(pair for pair in extra if pair[0] not in own),
        (b"content-length", str(len(response.body)).encode()),
    ]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if method == "HEAD" else response.body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        event = await receive()
        await send({"type": f"{event['type']}.complete"})
        if event["type"] == "lifespan.shutdown":
            return

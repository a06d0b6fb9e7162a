"""Live views over HTTP: a service's stream of changes as server-sent events, ended as soon as anybody goes."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter as Counts
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import grpc
import orjson
from care.type.v1.live_pb2 import Change
from prometheus_client import Gauge

from chassis.auth import Identity
from chassis.errors import Internal, Invalid, Problem, ResourceExhausted, Unavailable, problem_from_rpc
from chassis.telemetry import Telemetry
from gateway.http_errors import error_json, http_status
from gateway.settings import GatewaySettings

TYPE: Final = "text/event-stream"
_CONTENT: Final = ((b"content-type", b"text/event-stream; charset=utf-8"), (b"x-accel-buffering", b"no"))
_LEAVE_WITHIN: Final = 1.0
_STALLED: Final = 60.0
"""A client that has taken nothing for so long is gone, whatever its connection says."""
_SILENT_BEATS: Final = 3
_NAMES: Final = {Change.CHANGED: b"change", Change.RESET: b"reset"}
Read = Callable[[], Awaitable[Any]]


def require_accept(headers: Mapping[str, str]) -> None:
    """Raises Invalid `NOT_ACCEPTABLE` where the client takes no server-sent events."""
    accept = headers.get("accept", "*/*")
    ranges = {each.partition(";")[0].strip().lower() for each in accept.split(",")}
    if not ranges & {TYPE, "text/*", "*/*"}:
        raise Invalid("NOT_ACCEPTABLE", f"This answers {TYPE}; accept that.")


class EventStreams:
    """All streams of one gateway, counted by login and in all."""

    def __init__(self, settings: GatewaySettings, telemetry: Telemetry) -> None:
        self.heartbeat = settings.live_heartbeat
        self._settings = settings
        self._by_login: Counts[tuple[str, str, str]] = Counts()
        self._open: set[EventStream] = set()
        self._draining = False
        self._gauge = Gauge(
            "care_http_streams_open", "Streams of events that clients have open.", registry=telemetry.registry
        )

    async def open(self, call: Any, encode: Callable[[Any], Any], identity: Identity) -> EventStream:
        """A stream whose first item has come, so that a refusal is still an ordinary error. Raises Problem."""
        login = (identity.tenant_id, identity.issuer, identity.subject)
        if self._draining:
            raise _draining()
        if len(self._open) >= self._settings.streams or self._by_login[login] >= self._settings.streams_per_login:
            raise ResourceExhausted(
                "TOO_MANY_STREAMS", "Too many live views are open; close one, or try again later.", retry_after="5"
            )
        # From now on it counts: many may be waiting for their first item.
        stream = EventStream(self, call, encode, login)
        self._by_login[login] += 1
        self._open.add(stream)
        self._gauge.inc()
        try:
            await stream.begin(self._settings.request_timeout)
        except BaseException:
            stream.close()
            raise
        return stream

    def closed(self, stream: EventStream) -> None:
        """It counts no more."""
        if stream in self._open:
            self._open.discard(stream)
            self._by_login[stream.login] -= 1
            if not self._by_login[stream.login]:
                del self._by_login[stream.login]
            self._gauge.dec()

    def drain(self) -> None:
        """End all, so that clients open them elsewhere, and take no more."""
        self._draining = True
        for stream in list(self._open):
            stream.end(_draining())


class EventStream:
    """One client's stream: `send_to` until the service, the client or this gateway ends it."""

    def __init__(
        self, streams: EventStreams, call: Any, encode: Callable[[Any], Any], login: tuple[str, str, str]
    ) -> None:
        self.login = login
        self._streams = streams
        self._call = call
        self._encode = encode
        self._silent = _SILENT_BEATS * streams.heartbeat
        self._first: Any = None
        self._ending: Problem | None = None
        self._forwarding: asyncio.Task[None] | None = None

    async def begin(self, timeout: float) -> None:
        """Waits for the first item. Raises Problem."""
        try:
            async with asyncio.timeout(timeout):
                self._first = await self._read()
        except TimeoutError:
            raise _away() from None
        if self._ending is not None:
            raise self._ending
        if self._first is grpc.aio.EOF:
            raise Internal

    def end(self, problem: Problem) -> None:
        """End it from here, whatever its client does."""
        if self._ending is None:
            self._ending = problem
            self._call.cancel()
            if self._forwarding is not None:  # for a client that doesn't read
                asyncio.get_running_loop().call_later(_LEAVE_WITHIN, self._forwarding.cancel)

    def close(self) -> None:
        """The service stops telling at once."""
        self._call.cancel()
        self._streams.closed(self)

    async def send_to(self, send: Callable[[dict[str, Any]], Awaitable[None]], receive: Read, headers: Any) -> None:
        """Answer with the stream."""
        gone = asyncio.create_task(_disconnected(receive))
        forwarding = self._forwarding = asyncio.create_task(self._forward(send, headers))
        try:
            await asyncio.wait({gone, forwarding}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self.close()
            gone.cancel()
            if not forwarding.done():
                forwarding.cancel()
            await asyncio.gather(gone, forwarding, return_exceptions=True)

    async def _forward(self, send: Callable[[dict[str, Any]], Awaitable[None]], headers: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [*_CONTENT, *headers]})
        # Not all at the same moment, where a server that many had open is stopped.
        await _piece(send, b"retry: %d\n\n" % random.randrange(1000, 4000))
        item = self._first
        silent: asyncio.Timeout | None = None
        try:
            while item is not grpc.aio.EOF:
                # Waits for a slow client: then nothing is read, and in the end the service tells a reset instead.
                await _piece(send, self._event(item))
                async with asyncio.timeout(self._silent) as silent:
                    item = await self._read()
            problem: Problem = _away()
        except Problem as told:
            problem = told
        except TimeoutError:
            if silent is None or not silent.expired():  # it is the client that stalls
                raise
            problem = _away()
        body = orjson.dumps(error_json(problem, http_status(problem, if_match=False)))
        async with asyncio.timeout(_LEAVE_WITHIN):
            await _piece(send, b"event: end\ndata: %b\n\n" % body)
            await send({"type": "http.response.body", "body": b""})

    async def _read(self) -> Any:
        try:
            return await self._call.read()
        except grpc.RpcError as error:
            raise self._ending or problem_from_rpc(error) from error
        except asyncio.CancelledError:
            if self._ending is None:
                raise
            raise self._ending from None

    def _event(self, item: Any) -> bytes:
        name = _NAMES.get(item.kind)
        if name is None:
            return b": heartbeat\n\n"
        number = b"id: %b\n" % item.event_id.encode() if item.event_id else b""
        return b"%bevent: %b\ndata: %b\n\n" % (number, name, orjson.dumps(self._encode(item)))


async def _piece(send: Callable[[dict[str, Any]], Awaitable[None]], body: bytes) -> None:
    async with asyncio.timeout(_STALLED):
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _disconnected(receive: Read) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while (await receive())["type"] != "http.disconnect":
            pass


def _away() -> Unavailable:
    return Unavailable("SERVICE_UNAVAILABLE", "A service that is needed does not answer; try again.")


def _draining() -> Unavailable:
    return Unavailable("DRAINING", "This server is being stopped; open the view again.")

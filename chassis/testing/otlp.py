"""A real OTLP/HTTP receiver for tests: keeps every span that arrives, and the bytes it came in."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2


@dataclass(frozen=True)
class ReceivedEvent:
    name: str
    attributes: dict[str, Any]


@dataclass(frozen=True)
class ReceivedLink:
    trace_id: str
    span_id: str


@dataclass(frozen=True)
class ReceivedSpan:
    """One span as it arrived: ids in hex ("" for no parent), kind INTERNAL to CONSUMER, status UNSET, OK or ERROR, times in ns."""

    service: str
    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_span_id: str
    status: str
    status_message: str
    trace_state: str
    start_time: int
    end_time: int
    attributes: dict[str, Any]
    events: tuple[ReceivedEvent, ...]
    links: tuple[ReceivedLink, ...]
    resource: dict[str, Any]


def _value(value: AnyValue) -> Any:
    field = value.WhichOneof("value")
    if field is None:
        return None
    if field == "array_value":
        return [_value(each) for each in value.array_value.values]
    if field == "kvlist_value":
        return _attributes(value.kvlist_value.values)
    return getattr(value, field)


def _attributes(pairs: Iterable[KeyValue]) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _span(span: trace_pb2.Span, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        service=str(resource.get("service.name", "")),
        name=span.name,
        kind=trace_pb2.Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex(),
        status=trace_pb2.Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
        status_message=span.status.message,
        trace_state=span.trace_state,
        start_time=span.start_time_unix_nano,
        end_time=span.end_time_unix_nano,
        attributes=_attributes(span.attributes),
        events=tuple(ReceivedEvent(event.name, _attributes(event.attributes)) for event in span.events),
        links=tuple(ReceivedLink(link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        resource=resource,
    )


class OtlpReceiver:
    """`async with OtlpReceiver() as otlp:` listens on a free port; `otlp.endpoint` is what the services are told.

    `spans`: all that arrived, in order. `raw`: the uncompressed request bodies, to look for values that must not be there.
    `status`: the HTTP status to answer with (503 plays an overloaded collector; its spans are not kept).
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.status = 200
        self.spans: list[ReceivedSpan] = []
        self.raw: list[bytes] = []

    @property
    def endpoint(self) -> str:
        return f"http://{self._host}:{self._port}"

    async def start(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._host, self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.close()
            await self._server.wait_closed()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def clear(self) -> None:
        self.spans.clear()
        self.raw.clear()

    async def wait_for(
        self, wanted: int | Callable[[list[ReceivedSpan]], bool], timeout: float = 5.0
    ) -> list[ReceivedSpan]:
        """The spans once there are `wanted` of them, or once `wanted(spans)` holds; TimeoutError after `timeout` seconds."""
        enough = (lambda spans: len(spans) >= wanted) if isinstance(wanted, int) else wanted
        until = time.monotonic() + timeout
        while not enough(self.spans):
            if time.monotonic() > until:
                raise TimeoutError(
                    f"{len(self.spans)} spans after {timeout} s: {sorted({span.name for span in self.spans})}"
                )
            await asyncio.sleep(0.02)
        return self.spans

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with suppress(asyncio.IncompleteReadError, OSError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                request, *lines = head.split("\r\n")
                headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                if headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                status = self.status if request.startswith("POST /v1/traces ") else 404
                if status == 200:
                    self._keep(body)
                writer.write(
                    f"HTTP/1.1 {status} -\r\nContent-Type: application/x-protobuf\r\nContent-Length: 0\r\n\r\n".encode()
                )
                await writer.drain()
        self._writers.discard(writer)
        writer.close()

    def _keep(self, body: bytes) -> None:
        self.raw.append(body)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            resource = _attributes(group.resource.attributes)
            self.spans.extend(_span(span, resource) for scope in group.scope_spans for span in scope.spans)

"""One service's metrics in a registry of its own, and the small endpoint that serves them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from opentelemetry import trace
from prometheus_client import CollectorRegistry, Counter, Gauge, GCCollector, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder
from sqlalchemy.ext.asyncio import AsyncEngine

_CALL_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_LAG_WINDOW = 15.0
_HEADER_LIMIT = 8192
_READ_TIMEOUT = 5.0


def exemplar() -> dict[str, str] | None:
    """The current trace's id for a histogram's bucket, if that trace is kept."""
    context = trace.get_current_span().get_span_context()
    if not (context.is_valid and context.trace_flags.sampled):
        return None
    return {"trace_id": trace.format_trace_id(context.trace_id)}


class CallMetrics:
    """Duration in seconds and calls in flight of one kind of call; `labels` are the duration's, the first `early` also the gauge's."""

    def __init__(self, registry: CollectorRegistry, name: str, what: str, labels: tuple[str, ...], early: int) -> None:
        self.duration = Histogram(
            f"{name}_duration_seconds", f"Duration of {what}.", labels, buckets=_CALL_BUCKETS, registry=registry
        )
        self.in_flight = Gauge(f"{name}s_in_flight", f"Now open: {what}.", labels[:early], registry=registry)


class Metrics:
    """The metric families every service has."""

    def __init__(self, service: str, environment: str, version: str) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=True)
        Info("care_build", "What runs here.", registry=registry).info(
            {"service": service, "environment": environment, "version": version}
        )
        ProcessCollector(registry=registry)
        GCCollector(registry=registry)
        rpc = ("rpc_method", "rpc_response_status_code")
        self.rpc_server = CallMetrics(registry, "rpc_server_call", "calls served", rpc, 1)
        self.rpc_client = CallMetrics(registry, "rpc_client_call", "calls made to other services", rpc, 1)
        http = ("http_request_method", "http_route", "http_response_status_code")
        self.http_server = CallMetrics(registry, "http_server_request", "HTTP requests served", http, 1)
        self.spans = Counter("otel_spans_exported", "Spans handed to the collector.", ("outcome",), registry=registry)
        self._lag = Gauge("event_loop_lag_seconds", "Worst delay of the event loop in 15 s.", registry=registry)
        pool = ("pool",)
        self._pool_open = Gauge(
            "db_client_connection_count", "Connections of the pool.", ("pool", "state"), registry=registry
        )
        self._pool_max = Gauge("db_client_connection_max", "Connections the pool may hold.", pool, registry=registry)
        self._pool_wait = Histogram(
            "db_client_connection_wait_time_seconds",
            "Wait for a connection.",
            pool,
            buckets=_CALL_BUCKETS,
            registry=registry,
        )

    def watch_loop(self, interval: float = 0.5) -> asyncio.Task[None]:
        """Samples how late the running loop wakes a sleeper, every `interval` seconds; cancel the task to stop."""

        async def sample() -> None:
            loop = asyncio.get_running_loop()
            worst: deque[float] = deque(maxlen=max(1, round(_LAG_WINDOW / interval)))
            while True:
                due = loop.time() + interval
                await asyncio.sleep(interval)
                worst.append(max(0.0, loop.time() - due))
                self._lag.set(max(worst))

        return asyncio.get_running_loop().create_task(sample(), name="event-loop-lag")

    def watch_pool(self, engine: AsyncEngine, pool: str = "main") -> Callable[[float], None]:
        """Shows the engine's connections in use, idle and at most; returns the function that takes a checkout's wait in seconds."""

        def read(method: str) -> Callable[[], float]:
            def value() -> (
                float
            ):  # the pool is asked anew each time: dispose() replaces it, and NullPool counts nothing
                count = getattr(engine.pool, method, None)
                return float(count()) if callable(count) else 0.0

            return value

        size = read("size")

        def most() -> float:
            return size() + max(0, getattr(engine.pool, "_max_overflow", 0))

        self._pool_open.labels(pool, "used").set_function(read("checkedout"))
        self._pool_open.labels(pool, "idle").set_function(read("checkedin"))
        self._pool_max.labels(pool).set_function(most)
        wait = self._pool_wait.labels(pool)
        return lambda seconds: wait.observe(seconds, exemplar())


class MetricsServer:
    """The endpoint that `serve_metrics` opened."""

    def __init__(self, server: asyncio.Server) -> None:
        self._server = server
        self.port: int = server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        self._server.close()
        await self._server.wait_closed()


async def serve_metrics(registry: CollectorRegistry, host: str = "127.0.0.1", port: int = 0) -> MetricsServer:
    """Answers `GET /metrics` on this loop, OpenMetrics (with exemplars) or Prometheus text by Accept; port 0 takes a free one."""

    def answer(head: str) -> tuple[str, str, bytes]:
        request, *lines = head.split("\r\n")
        method, _, rest = request.partition(" ")
        if rest.split(" ")[0].partition("?")[0] != "/metrics":
            return "404 Not Found", "text/plain", b""
        if method not in ("GET", "HEAD"):
            return "405 Method Not Allowed", "text/plain", b""
        accept = [value for name, _, value in (line.partition(":") for line in lines) if name.lower() == "accept"]
        encode, content_type = choose_encoder(",".join(accept))
        return "200 OK", content_type, encode(registry) if method == "GET" else b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_READ_TIMEOUT):
                status, content_type, body = answer((await reader.readuntil(b"\r\n\r\n")).decode("latin-1"))
                head = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
                writer.write(head.encode() + body)
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # a scraper that went away, dawdles or sends no HTTP
        finally:
            writer.close()

    return MetricsServer(await asyncio.start_server(serve, host, port, limit=_HEADER_LIMIT))

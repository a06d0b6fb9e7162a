"""A real gateway on a socket, in front of real gRPC servers whose RPCs are written by hand."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx2
import pytest
import pytest_asyncio
from care.batch.v1 import batch_pb2
from google.protobuf.message import Message
from joserfc import jwt
from joserfc.jwk import KeySet, OKPKey
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from chassis.auth import Credential, Verifier
from chassis.clients import Clients
from chassis.errors import Problem, to_status
from chassis.settings import Issuer
from chassis.telemetry import Telemetry
from gateway.app import create_app
from gateway.codec import message_class
from gateway.contract import rpcs
from gateway.serving import GatewayServer
from gateway.settings import GatewaySettings

ISSUER = "https://login.test"
TENANT = "0198c5a2-0000-7000-8000-000000000001"
SERVICES = ("patients", "scheduling", "referrals", "notifications", "feedback")
Handler = Callable[[Any, dict[str, str]], Awaitable[Message]]
RPCS = {rpc.name: rpc for rpc in rpcs()}


@dataclass
class Backend:
    """One service: `answers` maps full method names to what serves them; a missing one answers empty."""

    answers: dict[str, Handler] = field(default_factory=dict)
    streams: dict[str, Callable[[Any], AsyncIterator[Message]]] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    server: grpc.aio.Server = None  # type: ignore[assignment]
    port: int = 0

    async def start(self) -> None:
        self.server = grpc.aio.server()
        self.server.add_generic_rpc_handlers((_Generic(self),))
        self.port = self.server.add_insecure_port(f"127.0.0.1:{self.port}")
        await self.server.start()

    async def serve(self, name: str, request: Message, metadata: dict[str, str]) -> Message:
        self.seen.append((name, metadata))
        if name == "care.batch.v1.BatchService/BatchRead":
            return await self._batch(request)
        handler = self.answers.get(name)
        if handler is None:
            return message_class(RPCS[name].method.output_type)()
        return await handler(request, metadata)

    async def _batch(self, request: Any) -> Message:
        return batch_pb2.BatchReadResponse(results=await asyncio.gather(*(self._item(item) for item in request.items)))

    async def _item(self, item: Any) -> batch_pb2.BatchReadResponse.Result:
        kind = message_class(RPCS[item.method].method.input_type)
        metadata = {"authorization": f"Bearer {item.token}", "traceparent": item.traceparent}
        try:
            answer = await self.serve(item.method, kind.FromString(item.request), metadata)
        except Problem as problem:
            status = to_status(problem)
            return batch_pb2.BatchReadResponse.Result(code=status.code, status=status.SerializeToString())
        return batch_pb2.BatchReadResponse.Result(response=answer.SerializeToString())


class _Generic(grpc.GenericRpcHandler):
    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        name = details.method.lstrip("/")
        if name not in RPCS:
            return None
        method = RPCS[name].method

        async def serve(request: Message, context: Any) -> Message:
            metadata = dict(context.invocation_metadata())
            try:
                return await self._backend.serve(name, request, metadata)
            except Problem as problem:
                status = to_status(problem)
                # Not set_code and an empty answer: an answer that has begun is never tried again.
                details = (("grpc-status-details-bin", status.SerializeToString()),)
                await context.abort(problem.code, problem.message, details)
                raise AssertionError("unreachable") from None

        async def stream(request: Message, context: Any) -> AsyncIterator[Message]:
            self._backend.seen.append((name, dict(context.invocation_metadata())))
            try:
                async for item in self._backend.streams[name](request):
                    yield item
            except Problem as problem:
                status = to_status(problem)
                details = (("grpc-status-details-bin", status.SerializeToString()),)
                await context.abort(problem.code, problem.message, details)

        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(
                stream,
                request_deserializer=message_class(method.input_type).FromString,
                response_serializer=message_class(method.output_type).SerializeToString,
            )
        return grpc.unary_unary_rpc_method_handler(
            serve,
            request_deserializer=message_class(method.input_type).FromString,
            response_serializer=message_class(method.output_type).SerializeToString,
        )


@dataclass
class World:
    """The gateway, what stands behind it, and what it says."""

    http: httpx2.AsyncClient
    services: dict[str, Backend]
    gateway: GatewayServer
    spans: InMemorySpanExporter
    log: io.StringIO
    key: OKPKey
    clients: Clients

    def token(self, subject: str = "nora", lives: float = 300) -> str:
        claims = {
            "iss": ISSUER,
            "sub": subject,
            "aud": "care",
            "tenant": "north",
            "exp": int(time.time() + lives),
        }
        return jwt.encode({"alg": "Ed25519", "kid": "k"}, claims, self.key, algorithms=["Ed25519"])

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.getvalue().splitlines()]


Start = Callable[..., Awaitable[World]]


@contextlib.asynccontextmanager
async def _worlds(folder: Path) -> AsyncIterator[Start]:
    ends: list[Callable[[], Awaitable[Any]]] = []

    async def begin(**more: Any) -> World:
        key = OKPKey.generate_key("Ed25519", {"kid": "k"})
        own = OKPKey.generate_key("Ed25519", {"kid": "gateway"})
        (folder / "jwks.json").write_text(json.dumps(KeySet([key]).as_dict(private=False)))
        (folder / "own.json").write_text(json.dumps(own.as_dict(private=True)))
        services = {name: Backend() for name in SERVICES}
        for backend in services.values():
            await backend.start()
            ends.append(lambda backend=backend: backend.server.stop(0))  # type: ignore[misc]
        spans, log = InMemorySpanExporter(), io.StringIO()
        telemetry = Telemetry.create(
            "gateway", otlp_endpoint=None, environment="test", version="1", log_stream=log, exporter=spans
        )
        verifier = Verifier([Issuer(issuer=ISSUER, jwks_file=folder / "jwks.json", tenants={"north": TENANT})])
        peers = {name: f"ipv4:127.0.0.1:{backend.port}" for name, backend in services.items()}
        clients = Clients(peers, Credential("gateway", folder / "own.json"), telemetry)
        settings = GatewaySettings(port=0, **more)
        gateway = GatewayServer(create_app(settings, verifier, clients, telemetry, version="1"))
        await gateway.start()
        http = httpx2.AsyncClient(base_url=f"http://127.0.0.1:{gateway.port}", timeout=15)
        world = World(http, services, gateway, spans, log, key, clients)
        http.headers["authorization"] = f"Bearer {world.token()}"
        ends.extend((clients.close, gateway.stop, http.aclose))
        return world

    yield begin
    for end in reversed(ends):
        await end()


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    """`await start(batch_legs=False, …)`: a world of this test's own, which it may break."""
    async with _worlds(tmp_path) as begin:
        yield begin


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def standing(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    async with _worlds(tmp_path_factory.mktemp("gateway")) as begin:
        yield await begin()


@pytest.fixture
def world(standing: World) -> World:
    """The world with the shipped settings that tests share; servers are not to be stopped."""
    for backend in standing.services.values():
        backend.answers.clear()
        backend.seen.clear()
    standing.spans.clear()
    standing.log.seek(0)
    standing.log.truncate()
    standing.http.headers["authorization"] = f"Bearer {standing.token()}"
    return standing

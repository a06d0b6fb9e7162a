"""Runs the gateway on uvicorn within somebody else's loop, and stops it without dropping a request."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version

import uvicorn

from chassis.auth import Credential, Verifier
from chassis.clients import Clients
from chassis.garbage import calm_collector
from chassis.telemetry import Telemetry
from gateway.app import Gateway, create_app
from gateway.settings import GatewaySettings


class _Server(uvicorn.Server):
    """Signals are the process's business, not the server's: five services and a gateway may share it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class GatewayServer:
    """A gateway that listens: `start`, then `stop` once."""

    def __init__(self, app: Gateway) -> None:
        self.app = app
        settings = app.settings
        self._socket = _listen(settings.host, settings.port)
        self.port: int = self._socket.getsockname()[1]
        self._drain_delay = settings.drain_delay
        self._drain_timeout = settings.drain_timeout
        config = uvicorn.Config(
            app,
            loop="none",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=max(1, round(settings.drain_timeout)),
            backlog=2048,
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns when connections are accepted."""
        await self.app.start()
        self._serving = asyncio.create_task(self._server.serve([self._socket]))
        while not self._server.started:
            if self._serving.done():
                await self._serving
                raise RuntimeError("the gateway's server did not start")
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        """Says not ready, waits `drain_delay`, then lets what is under way finish, `drain_timeout` seconds at most."""
        self.app.draining = True
        if self._drain_delay:
            await asyncio.sleep(self._drain_delay)
        self.app.end_streams()
        self._server.should_exit = True
        if self._serving is not None:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._serving, self._drain_timeout + 2)

    async def ended(self) -> None:
        """Returns when the server has ended, raises what ended it."""
        if self._serving is not None:
            await asyncio.shield(self._serving)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind((host, port))
    return listening


def package_version() -> str:
    """Version of this build."""
    try:
        return version("care-coordinator")
    except PackageNotFoundError:  # an image holds no metadata of the package
        return "0"


async def serve(settings: GatewaySettings) -> None:
    """A gateway by its settings, as a process of its own: until SIGTERM or SIGINT."""
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    telemetry = Telemetry.create(
        "gateway",
        otlp_endpoint=settings.otlp_endpoint,
        environment=settings.environment,
        version=package_version(),
    )
    verifier = Verifier(settings.issuers, service_keys_file=settings.service_keys_file, cache=settings.token_cache)
    clients = Clients(settings.peers, Credential("gateway", settings.service_key_file), telemetry)
    server = GatewayServer(create_app(settings, verifier, clients, telemetry, version=package_version()))
    lag = telemetry.watch_loop()
    try:
        await server.start()
        telemetry.log.info("serving", port=server.port)
        calm_collector()
        waiting, ended = asyncio.create_task(stopped.wait()), asyncio.create_task(server.ended())
        await asyncio.wait((waiting, ended), return_when=asyncio.FIRST_COMPLETED)
        await server.stop()
        await ended
        waiting.cancel()
    finally:
        lag.cancel()
        await clients.close()
        await telemetry.shutdown()

"""The five services as real gRPC servers and the gateway, all in this process and on this loop."""

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from chassis import migrations
from chassis.main import bus_of
from chassis.service import Server, package_version
from chassis.settings import Settings
from chassis.telemetry import LogGuard, Telemetry, install_log_guard
from gateway.settings import GatewaySettings
from system import topology
from system.gateway import DevelopmentGateway
from system.plan import Plan
from system.process import LOG_KEPT_BYTES
from system.topology import GATEWAY, SERVICES

_STOP_SECONDS = 4.0


async def migrate(databases: Mapping[str, str]) -> None:
    """Bring the databases of all services to the schema of this build.

    One after the other: Alembic's context is a global of the process, and two that take turns on one loop mix up their databases.
    """
    for name in SERVICES:
        service = topology.service(name)
        await migrations.upgrade(databases[name], service.migrations, service.base.metadata)


class Embedded:
    """`start` and `stop` all; `stop_service` and `start_service` one. Everything is logged to `folder/logs/care.log`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self.log_file = plan.folder / "logs" / "care.log"
        self._log: TextIO | None = None
        self._guard: LogGuard | None = None
        self.servers: dict[str, Server] = {}
        self.gateway: DevelopmentGateway | None = None

    async def start(self) -> None:
        """All at once. Raises what keeps one of them from starting, with the others stopped."""
        self._log = open_log(self.log_file)
        self._guard = install_log_guard(self._log, service="care")
        try:
            await asyncio.gather(*(self.start_service(name) for name in self._plan.instances))
        except BaseException:
            await self.stop()
            raise

    async def start_service(self, name: str) -> None:
        """Start one instance, on the ports that it had before."""
        if name == GATEWAY.name:
            self.gateway = DevelopmentGateway(
                GatewaySettings(**self._plan.values(name)),
                self._telemetry(name, GatewaySettings(**self._plan.values(name))),
                self._plan.mailbox.file,
            )
            await self.gateway.start()
            return
        service = topology.service(self._plan.instances[name].node.name)
        settings = service.settings(**self._plan.values(name))
        # A bus of its own each, as in processes of their own; appends still wake all readers of this process at once.
        server = Server(service, settings, bus_of(settings), telemetry=self._telemetry(service.name, settings))
        self.servers[name] = server
        await server.start()

    def _telemetry(self, name: str, settings: Settings) -> Telemetry:
        assert self._log is not None
        return Telemetry.create(
            name,
            otlp_endpoint=settings.otlp_endpoint,
            environment=settings.environment,
            version=package_version(),
            log_stream=self._log,
        )

    async def stop_service(self, name: str) -> None:
        """Stop one instance as SIGTERM would; it may be started again."""
        if name == GATEWAY.name:
            gateway, self.gateway = self.gateway, None
            if gateway is not None:
                await gateway.stop()
            return
        server = self.servers.pop(name, None)
        if server is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(server.stop(), _STOP_SECONDS)
            await server.bus.stop()

    async def stop(self) -> None:
        """The gateway first, so that nothing new comes in; then the services."""
        await self.stop_service(GATEWAY.name)
        await asyncio.gather(*(self.stop_service(name) for name in list(self.servers)), return_exceptions=True)
        if self._guard is not None:
            self._guard.remove()
            self._guard = None
        if self._log is not None:
            self._log.close()
            self._log = None

    async def kill(self, name: str) -> None:
        """Nothing to kill: they share our process."""
        raise ValueError(f"{name} has no process of its own in the embedded run; use kafka=True")

    def pid(self, name: str) -> int | None:
        """Our own: they share it."""
        return os.getpid() if name in self._plan.instances else None


def open_log(path: Path) -> TextIO:
    """A file for JSON lines, 0600, begun anew when it has become large."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if path.exists() and path.stat().st_size > LOG_KEPT_BYTES:
        os.replace(path, path.with_name(path.name + ".1"))
    return open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600), "a", buffering=1)

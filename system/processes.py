"""The six workloads as processes of their own, started again when they die: what runs in a cluster, on one machine."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import care
import grpc
import httpx2
import psutil  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc

from system.plan import Instance, Plan
from system.process import LOOPBACK, OwnedServer, ServerFailed, find_process, spawn, write_private
from system.topology import GATEWAY

_START_SECONDS = 60.0


class Process(OwnedServer):
    """One instance as a process; `folder` holds its pid and lock, `log` its JSON lines."""

    polite_signals: Sequence[tuple[signal.Signals, float]] = ((signal.SIGTERM, 8.0),)

    def __init__(self, folder: Path, log: Path, instance: Instance, environment: Mapping[str, str]) -> None:
        super().__init__(folder, instance.port)
        self.name = instance.name
        self.instance = instance
        self._log = log
        self._environment = environment
        self._module = "system.gateway" if instance.node is GATEWAY else instance.node.module

    @property
    def log_file(self) -> Path:
        """What the process prints."""
        return self._log

    async def _prepare(self) -> None:
        self._port = self.instance.port

    def _command(self) -> subprocess.Popen[bytes]:
        paths = [str(Path(__file__).resolve().parents[1]), str(Path(next(iter(care.__path__))).parent)]
        environment = {**os.environ, **self._environment, "PYTHONPATH": os.pathsep.join(paths)}
        # The folder is an argument nobody reads: by it a left-over is known as ours.
        process = spawn([sys.executable, "-X", f"care={self.folder}", "-m", self._module], self._log, env=environment)
        write_private(self.folder / "pid", str(process.pid))
        return process

    async def _answers(self) -> bool:
        await asyncio.sleep(0.05)
        if self.instance.node is GATEWAY:
            return await _answers_http(f"http://{self.instance.address}/healthz")
        return await is_serving(f"{LOOPBACK}:{self.instance.health_port}")

    def _left_over(self) -> psutil.Process | None:
        try:
            pid = int((self.folder / "pid").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return find_process(pid, lambda command_line: f"care={self.folder}" in command_line)


class Processes:
    """`start` and `stop` all, `stop_service`, `start_service` and `kill` one. Each logs to `folder/logs/<name>.log`."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._all: dict[str, Process] = {}
        self._supervisors: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """All at once; returns when each answers. Raises ServerFailed naming the log of the one that doesn't."""
        logs = self._plan.folder / "logs"
        logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name, instance in self._plan.instances.items():
            self._all[name] = Process(
                self._plan.folder / "processes" / name, logs / f"{name}.log", instance, self._plan.environment(name)
            )
        try:
            async with asyncio.TaskGroup() as group:
                for name in self._all:
                    group.create_task(self.start_service(name))
        except* ServerFailed as failed:
            await self.stop()
            raise failed.exceptions[0] from None

    async def start_service(self, name: str) -> None:
        """Start one, on the ports that it had before."""
        process = self._all[name]
        await process.start(_START_SECONDS)
        self._supervisors[name] = asyncio.create_task(process.supervise(), name=f"supervise {name}")

    async def stop_service(self, name: str) -> None:
        """SIGTERM to one; it stays away until it is started."""
        await self._all[name].stop()
        if (supervisor := self._supervisors.pop(name, None)) is not None:
            await supervisor

    async def stop(self) -> None:
        """The gateway first, so that nothing new comes in; then the services."""
        if GATEWAY.name in self._all:
            await self.stop_service(GATEWAY.name)
        await asyncio.gather(*(self.stop_service(name) for name in self._all), return_exceptions=True)

    async def kill(self, name: str) -> None:
        """kill -9; it is started again at once."""
        await self._all[name].kill()

    def pid(self, name: str) -> int | None:
        """The running process's id."""
        return self._all[name].pid if name in self._all else None

    def restarts(self, name: str) -> int:
        """How often it was started again."""
        return self._all[name].restarts


async def is_serving(address: str, service: str = "") -> bool:
    """Whether a gRPC server says that it serves."""
    host, _, port = address.rpartition(":")
    try:  # much cheaper than a channel while nobody listens yet
        _, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), 1)
        writer.close()
    except (OSError, TimeoutError):
        return False
    async with grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        try:
            check = health_pb2_grpc.HealthStub(channel).Check  # type: ignore[attr-defined]
            answer = await check(health_pb2.HealthCheckRequest(service=service), timeout=1)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _answers_http(url: str) -> bool:
    async with httpx2.AsyncClient(timeout=1, trust_env=False) as client:
        try:
            return (await client.get(url)).status_code == 200
        except httpx2.HTTPError:
            return False

"""The whole system on one machine, both ways: everything in this process, or six processes and a real Kafka."""

import asyncio
import contextlib
import importlib
import os
import signal
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import httpx2

from system.issuer import ISSUER, TENANT_ID, DevelopmentIssuer, forbid_production, staff_subject
from system.kafka import Kafka
from system.keys import Keys
from system.mailbox import Mailbox
from system.plan import Plan
from system.postgres import Postgres
from system.process import FolderLock, OwnedServer, ServerFailed, write_state
from system.topology import BUS_DATABASE, GATEWAY, SERVICES

if TYPE_CHECKING:
    from system.embedded import Embedded
    from system.processes import Processes

RUN_FILE = "run.json"
_READY_SECONDS = 30.0


class System:
    """`async with System(folder) as system:` or `start` and `stop`; serves one start and one stop after another.

    `port` of HTTP: None for 8080 or the one of last time, else a free one; 0 for any, all other ports too. `kafka`: six processes and a
    real broker instead of one process. `empty`: no sample tenant, only its roles. `replicas`: how many of a service. `overrides`: settings
    by name of a service, or "*". `durable=False`: without fsync, for tests. Raises FolderInUse, ServerFailed, NotInProduction.
    """

    def __init__(
        self,
        folder: Path,
        port: int | None = None,
        *,
        kafka: bool = False,
        empty: bool = False,
        replicas: Mapping[str, int] | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        durable: bool = True,
    ) -> None:
        self.folder = folder.resolve()
        self.keys = Keys(self.folder / "keys")
        self.mailbox = Mailbox(self.folder)
        self.postgres = Postgres(self.folder / "postgres", durable=durable)
        self.kafka = Kafka(self.folder / "kafka") if kafka else None
        self.plan = Plan(self.folder, self.keys, self.mailbox, port, replicas or {}, overrides or {})
        self.ready_time = 0.0
        """When the last start was done but for the sample, in seconds of the epoch."""
        self.empty = empty
        self._lock = FolderLock(self.folder)
        self._workloads: Embedded | Processes | None = None
        self._supervisors: list[asyncio.Task[None]] = []

    # -- life ----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Returns when a request would be answered and, unless empty, the sample is in."""
        forbid_production("`care up`")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock.take()
        try:
            await self._start()
            self.ready_time = time.time()
            self._write_run_file()
            if not self.empty:
                await self._load_sample()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        self.keys.ensure()
        (self.folder / "audit").mkdir(exist_ok=True, mode=0o700)
        self.plan.choose_ports()
        servers: list[OwnedServer] = [self.postgres, *([self.kafka] if self.kafka else [])]
        await asyncio.gather(
            *(server.start() for server in servers),
            self.mailbox.start(),
            # Meanwhile, since importing it all takes as long as PostgreSQL's start.
            asyncio.to_thread(_import),
        )
        self._supervisors = [asyncio.create_task(server.supervise()) for server in servers]
        names = [node.database or name for name, node in SERVICES.items()] + [BUS_DATABASE]
        urls = await asyncio.gather(*(self.postgres.create_database(name, name) for name in names))
        self.plan.databases = dict(zip(names, urls, strict=True))
        if self.kafka is not None:
            self.plan.kafka = self.kafka.bootstrap
        from system.embedded import Embedded, migrate
        from system.processes import Processes

        await migrate(self.plan.databases)
        await bootstrap(self.plan.databases["patients"], administrator=not self.empty)
        self._workloads = Processes(self.plan) if self.kafka else Embedded(self.plan)
        await self._workloads.start()
        await self.ready()

    async def _load_sample(self) -> None:
        """Once: what becomes of it later, down to what its roles may do, is its owners' and stops no start."""
        loaded = self.folder / "sample-loaded"
        if not loaded.exists():
            from system import sample

            await sample.load(self.url, self.token)
            loaded.touch(mode=0o600)

    async def stop(self) -> None:
        """The gateway, the services, the mailbox, then the servers below them."""
        (self.folder / RUN_FILE).unlink(missing_ok=True)
        try:
            if self._workloads is not None:
                await self._workloads.stop()
            await self.mailbox.stop()
        finally:
            servers: list[OwnedServer] = [*([self.kafka] if self.kafka else []), self.postgres]
            await asyncio.gather(*(server.stop() for server in servers))
            await asyncio.gather(*self._supervisors, return_exceptions=True)
            self._lock.give_back()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def ready(self, within: float = _READY_SECONDS) -> None:
        """Returns once the gateway says that it is ready. Raises ServerFailed naming who is missing."""
        until = time.monotonic() + within
        waits_for: object = GATEWAY.name
        async with httpx2.AsyncClient(timeout=2, trust_env=False) as client:
            while time.monotonic() < until:
                with contextlib.suppress(httpx2.HTTPError, ValueError):
                    answer = await client.get(f"{self.url}/readyz")
                    if answer.status_code == 200:
                        return
                    waits_for = ", ".join(answer.json().get("for", []))
                await asyncio.sleep(0.05)
        raise ServerFailed(f"not ready after {within:.0f} s, waiting for {waits_for}; see {self.folder / 'logs'}")

    def _write_run_file(self) -> None:
        """For the other commands, and readable by their owner only: the environment holds passwords."""
        write_state(
            self.folder / RUN_FILE,
            {
                "pid": os.getpid(),
                "url": self.url,
                "started": datetime.now(UTC).isoformat(timespec="seconds"),
                "kafka": self.plan.kafka,
                "empty": self.empty,
                "mailbox": {"smtp": self.mailbox.smtp_url, "sms": self.mailbox.sms_url},
                "environment": {name: self.plan.environment(name) for name in self.plan.instances},
            },
        )

    # -- what tests and commands ask -----------------------------------------------------------------------------------

    @property
    def workloads(self) -> "Embedded | Processes":
        """What runs the services and the gateway."""
        if self._workloads is None:
            raise RuntimeError("the system was not started")
        return self._workloads

    @property
    def url(self) -> str:
        """Where the gateway is."""
        return self.plan.url

    def token(self, role: str = "", *, patient_id: str = "", subject: str = "", seconds: float = 12 * 3600) -> str:
        """A token of the sample staff member who holds a role, of a patient's login, or of any subject."""
        return DevelopmentIssuer(self.keys).issue(role=role, patient_id=patient_id, subject=subject, seconds=seconds)

    def database_url(self, name: str) -> str:
        """The URL of a service's database, or of `bus`."""
        return self.plan.databases[name]

    async def stop_service(self, name: str) -> None:
        """Stop one workload politely, until `start_service`."""
        await self.workloads.stop_service(name)

    async def start_service(self, name: str) -> None:
        """Start a stopped workload again, on the same ports."""
        await self.workloads.start_service(name)

    async def kill(self, name: str) -> None:
        """kill -9 of "postgres", "kafka" or a workload's process; whatever is killed is started again."""
        owned = {"postgres": self.postgres, "kafka": self.kafka}.get(name)
        await (owned.kill() if owned is not None else self.workloads.kill(name))

    def pid(self, name: str) -> int | None:
        """Process id of "postgres", "kafka" or a workload."""
        owned = {"postgres": self.postgres, "kafka": self.kafka}.get(name)
        return owned.pid if owned is not None else self.workloads.pid(name)

    def suspend(self, name: str) -> None:
        """SIGSTOP."""
        self._signal(name, signal.SIGSTOP)

    def resume(self, name: str) -> None:
        """SIGCONT."""
        self._signal(name, signal.SIGCONT)

    def _signal(self, name: str, number: signal.Signals) -> None:
        pid = self.pid(name)
        if pid is None or pid == os.getpid():
            raise ValueError(f"{name} has no process of its own")
        os.kill(pid, number)


def _import() -> None:
    for module in ("system.embedded", "system.processes", *(f"services.{name}.service" for name in SERVICES)):
        importlib.import_module(module)


async def bootstrap(patients_url: str, *, administrator: bool) -> None:
    """The sample tenant's roles and, where wanted, its first administrator. Does nothing where they are there."""
    from services.patients import bootstrap as patients

    await patients.bootstrap(
        patients_url,
        tenant_id=TENANT_ID,
        issuer=ISSUER,
        subject=staff_subject("admin") if administrator else "",
        given_name="Robin",
        family_name="Ellery",
    )

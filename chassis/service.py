"""A service: what differs between the five, said once each, and the life that all share."""

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import grpc
from care.access.v1 import access_pb2
from care.audit.v1 import audit_pb2
from care.batch.v1 import batch_pb2
from care.events.v1.envelope_pb2 import Event
from care.options.v1 import options_pb2
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase

from chassis import access as accesses
from chassis import migrations
from chassis.access import Access
from chassis.asking import Ask
from chassis.auditing import AuditServicer, Sealer
from chassis.auth import Credential, Verifier
from chassis.batch import BatchServicer
from chassis.bus import Bus, BusUnavailable
from chassis.clients import Clients, RemoteOwner
from chassis.consumer import Consumer, trim_inbox
from chassis.database import Database, Telling
from chassis.errors import Problem
from chassis.live import Live
from chassis.pipeline import Pipeline, Runtime
from chassis.reactions import Reactions
from chassis.relay import Relay
from chassis.settings import Settings
from chassis.telemetry import MetricsServer, Telemetry, serve_metrics
from chassis.timers import Loop, RunningLoop
from chassis.wire import to_time

Reasons = Mapping[str, tuple[type[Problem], str, str]]


@dataclass(frozen=True)
class Service:
    """What one service is made of. Everything else about it is the same for all."""

    name: str
    base: type[DeclarativeBase]
    migrations: Path
    servicers: Mapping[ServiceDescriptor, object]
    payloads: Mapping[str, type[Message]]
    """Aggregate name or event type to the payload that its events carry."""
    reactions: Reactions = field(default_factory=Reactions)
    hears: Sequence[str] = ()
    """Services whose topics it reads. All but the owner of access read `patients`."""
    loops: Sequence[Loop] = ()
    reasons: Reasons = field(default_factory=dict)
    asks: Mapping[str, Ask] = field(default_factory=dict)
    """How to ask other services for what methods need to know before they can decide."""
    owns_access: bool = False
    settings: type[Settings] = Settings
    warm: Sequence[Callable[[], None]] = ()
    """What would be slow at its first use. Done in a thread before anything is heard or served."""

    def __post_init__(self) -> None:
        if not self.owns_access:
            _hear_access(self.reactions)

    @property
    def topic(self) -> str:
        """Where its events go."""
        return f"care.{self.name}"

    @property
    def topics(self) -> list[str]:
        """Topics that it reads."""
        heard = dict.fromkeys([*self.hears, *(() if self.owns_access else ("patients",))])
        return [f"care.{name}" for name in heard]


@cache
def event_types() -> frozenset[str]:
    """Types of the events that this build's contract knows, whoever tells them: each payload names its own."""
    # The descriptors themselves: an image has no other service's modules to import.
    path = Path(options_pb2.__file__).parents[3] / "descriptors.binpb"
    files = descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes()).file
    return frozenset(
        kind
        for file in files
        for message in file.message_type
        for kind in message.options.Extensions[options_pb2.event_types]
    )


def package_version() -> str:
    """Version of this build."""
    try:
        return version("care-coordinator")
    except PackageNotFoundError:  # an image holds no metadata of the package
        return "0"


class Server:
    """One service at work: gRPC, relay, consumer, timers. Embedded, five of them share a process and a loop."""

    def __init__(self, service: Service, settings: Settings, bus: Bus, *, telemetry: Telemetry | None = None) -> None:
        self.service, self.settings, self.bus = service, settings, bus
        self.telemetry = telemetry or Telemetry.create(
            service.name,
            otlp_endpoint=settings.otlp_endpoint,
            environment=settings.environment,
            version=package_version(),
        )
        telemetry = self.telemetry
        tables = service.base.metadata.info["chassis"]
        self.database = Database(settings, telemetry, Telling(service.name, service.payloads))
        self.clients = Clients(settings.peers, Credential(service.name, settings.service_key_file), telemetry)
        self.access = Access(
            tables.access,
            self.database.engine,
            None if service.owns_access else RemoteOwner(self.clients),
            is_owner=service.owns_access,
            stale_patient=settings.access_stale_patient,
            stale_staff=settings.access_stale_staff,
            principal_cache=settings.principal_cache,
            fetch=self.database.fetch,
        )
        self.runtime = Runtime(
            service=service.name,
            settings=settings,
            database=self.database,
            access=self.access,
            verifier=Verifier(
                settings.issuers, service_keys_file=settings.service_keys_file, cache=settings.token_cache
            ),
            telemetry=telemetry,
            reasons=service.reasons,
            asks=service.asks,
            tables=tables,
            clients=self.clients,
            live=Live(bus, service.topic, self.access, settings, telemetry),
        )
        self.database.share(runtime=self.runtime)
        batch = BatchServicer()
        self.pipeline = Pipeline(
            self.runtime,
            {
                **service.servicers,
                audit_pb2.DESCRIPTOR.services_by_name["AuditService"]: AuditServicer(),
                batch_pb2.DESCRIPTOR.services_by_name["BatchService"]: batch,
            },
        )
        batch.pipeline = self.pipeline
        self.relay = Relay(
            bus,
            self.database.engine,
            tracer=telemetry.tracer,
            registry=telemetry.registry,
            log=telemetry.log,
            ttl=settings.relay_lease,
        )
        self.database.wake = self.relay.wake
        self.consumer = Consumer(
            bus,
            service.name,
            service.topics,
            service.reactions,
            self.database.sessions,
            tracer=telemetry.tracer,
            registry=telemetry.registry,
            log=telemetry.log,
            recover=self._recover,
            applied=self._applied,
            known_types=event_types(),
            actor=f"system:{service.name}",
        )
        self.sealer = Sealer(self.database.engine, settings, telemetry)
        self.health = health.aio.HealthServicer()
        self._servers: list[grpc.aio.Server] = []
        self._metrics: MetricsServer | None = None
        self._tasks: list[asyncio.Task[Any]] = []
        self.port = self.health_port = self.metrics_port = 0

    async def start(self) -> None:
        """Wait for the schema, begin to work, then say so."""
        await migrations.wait_for_schema(self.database.engine, self.service.migrations, self.telemetry.log)
        await self._reach_bus()
        await self.database.start()
        for each in self.service.warm:
            await asyncio.to_thread(each)
        await self.relay.start()
        for loop in self.service.loops:
            self.runtime.loops[loop.name] = loop.start(self.runtime)
        await self.consumer.start()
        await self.sealer.start()
        self._tasks = [
            asyncio.create_task(self.access.watch(), name="access"),
            asyncio.create_task(self._tidy(), name="tidy"),
            self.telemetry.watch_loop(),
        ]
        await self._listen()
        await self._serving(health_pb2.HealthCheckResponse.SERVING)
        self.telemetry.log.info("serving", port=self.port)

    async def _reach_bus(self) -> None:
        """Until the bus is there and has the topics. A bus that goes away later stops nobody."""
        told = False
        while True:
            try:
                await self.bus.start()
                await self.bus.ensure_topics(
                    [self.service.topic, *self.service.topics, f"care.dlq.{self.service.name}"]
                )
                return
            except (BusUnavailable, OSError) as error:
                if not told:
                    self.telemetry.log.warning("waiting for the bus", error=type(error).__name__)
                    told = True
                await asyncio.sleep(1)

    async def _listen(self) -> None:
        settings = self.settings
        server = grpc.aio.server(
            options=[
                # New pods are seen because connections end.
                ("grpc.max_connection_age_ms", int(settings.max_connection_age * 1000)),
                # What is under way on a connection that ends may go on: a live view for its whole life.
                ("grpc.max_connection_age_grace_ms", int((15 + settings.live_longest) * 1000)),
                ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", 4 * 1024 * 1024),
            ]
        )
        server.add_generic_rpc_handlers(self.pipeline.handlers())
        names = [service.full_name for service in self._descriptors()]
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], server)
        self.port = _bind(server, f"{settings.host}:{settings.port}")
        # The kubelet's probe speaks plaintext only, whatever the main port speaks.
        probe = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        health_pb2_grpc.add_HealthServicer_to_server(self.health, probe)
        self.health_port = _bind(probe, f"{settings.host}:{settings.health_port}")
        self._servers = [server, probe]
        for each in self._servers:
            await each.start()
        self._metrics = await serve_metrics(self.telemetry.registry, settings.host, settings.metrics_port)
        self.metrics_port = self._metrics.port

    def _descriptors(self) -> Sequence[ServiceDescriptor]:
        found = {method.descriptor.containing_service.full_name: method for method in self.pipeline.methods.values()}
        return [method.descriptor.containing_service for method in found.values()]

    async def _serving(self, status: int) -> None:
        await self.health.set("live", health_pb2.HealthCheckResponse.SERVING)
        for name in ("", self.service.name, *(service.full_name for service in self._descriptors())):
            await self.health.set(name, status)

    async def stop(self) -> None:
        """Not serving first; then finish what is under way, stop telling and hearing, flush telemetry, each bounded."""
        await self._serving(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._servers:
            stopping = asyncio.create_task(self._servers[0].stop(self.settings.drain_timeout))
            await asyncio.sleep(0)  # first whoever is connected is told to go elsewhere, then the live views end
            self.runtime.live.drain()
            await stopping
        await self.runtime.live.stop()
        await asyncio.gather(
            self.consumer.stop(timeout=5),
            *(loop.stop(timeout=5) for loop in self.runtime.loops.values()),
            return_exceptions=True,
        )
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        with contextlib.suppress(Exception):
            await self.sealer.stop()
        await self.relay.stop(timeout=5)
        await self.clients.close()
        await self.database.stop()
        for server in self._servers[1:]:
            await server.stop(0)
        if self._metrics is not None:
            await self._metrics.close()
        await self.telemetry.shutdown(timeout=2)

    def _applied(self, event: Event, _record: Any) -> None:
        if event.type in ("staff.changed", "login.changed", "role.changed"):
            self.access.forget_callers()

    async def _recover(self, error: Exception, event: Event) -> bool:
        """An event about a patient whom this service doesn't know yet: read through, then the event goes on."""
        cause = getattr(getattr(error, "orig", None), "__cause__", None)
        constraint = getattr(cause, "constraint_name", None) or ""
        if isinstance(error, IntegrityError) and constraint.endswith("_subject_fkey") and event.patient_id:
            await self.access.read_through(event.tenant_id, [event.patient_id])
            return True
        return False

    async def _tidy(self) -> None:
        """Keep what grows with time bounded: answers for replays, marks of old events."""
        while True:
            for step in (self._forget_old_keys, self._forget_old_marks, self._trim_bus):
                try:
                    await step()
                except Exception as error:  # what is away is tidied later, the rest now
                    self.telemetry.log.warning(
                        "not tidied, trying again", step=step.__name__, error=type(error).__name__
                    )
            await asyncio.sleep(600)

    async def _forget_old_marks(self) -> None:
        async with self.database.acting(f"system:{self.service.name}") as db:
            await db.execute(_OLD_BEATS)
        # Longer than the bus keeps events: a redelivery must find its mark.
        while await trim_inbox(self.database.engine, 31 * _DAY, _TIDY) == _TIDY:
            pass

    async def _trim_bus(self) -> None:
        await self.bus.trim(30 * _DAY)

    async def _forget_old_keys(self) -> int:
        """In small transactions, until none is left: a busy day brings more than one batch in ten minutes."""
        gone, batch = 0, _TIDY
        while batch == _TIDY:
            async with self.database.acting(f"system:{self.service.name}") as db:
                deleted = await db.execute(_OLD_KEYS, {"hours": self.settings.idempotency_hours, "most": _TIDY})
                batch = deleted.rowcount  # type: ignore[attr-defined]
            gone += batch
        return gone


_TIDY = 5000
_OLD_KEYS = text(
    "DELETE FROM idempotency_key WHERE (tenant_id, actor, method, request_id) IN ("
    "SELECT tenant_id, actor, method, request_id FROM idempotency_key"
    " WHERE create_time < clock_timestamp() - :hours * interval '1 hour' ORDER BY create_time LIMIT :most)"
)
# Heartbeats are many and worth nothing once passed: hearing one twice does no harm.
_OLD_BEATS = text("DELETE FROM inbox WHERE type = 'access.heartbeat' AND time < clock_timestamp() - interval '1 hour'")
_DAY = 86_400.0


def _bind(server: grpc.aio.Server, address: str) -> int:
    try:
        return server.add_insecure_port(address)
    except RuntimeError as error:
        raise OSError(f"{address} is taken by another process: choose another port") from error


def _hear_access(reactions: Reactions) -> None:
    @reactions.on("patient.access_changed", payload=access_pb2.SubjectAccess, shares=True)
    async def _subject(state: access_pb2.SubjectAccess, _event: Event, db: AsyncSession) -> None:
        await accesses.store_subject(db, db.info["runtime"].tables.access, state)

    # It may drop another login's row, and that one's event this one's.
    @reactions.on("staff.changed", "login.changed", payload=access_pb2.PrincipalState)
    async def _principal(state: access_pb2.PrincipalState, _event: Event, db: AsyncSession) -> None:
        await accesses.hear_principal(db, db.info["runtime"].tables.access, state)

    # By name, which one role may have had before another.
    @reactions.on("role.changed", payload=access_pb2.RoleState)
    async def _role(state: access_pb2.RoleState, _event: Event, db: AsyncSession) -> None:
        await accesses.store_role(db, db.info["runtime"].tables.access, state)

    @reactions.on("access.heartbeat", payload=access_pb2.Heartbeat, shares=True)
    async def _heartbeat(beat: access_pb2.Heartbeat, event: Event, db: AsyncSession) -> None:
        await accesses.store_heartbeat(db, db.info["runtime"].tables.access, beat.partition, to_time(event.time))


__all__ = ["Loop", "RunningLoop", "Server", "Service", "package_version"]

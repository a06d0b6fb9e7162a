"""Services at work in a test: real PostgreSQL, the embedded bus, real gRPC over a socket, tokens of a test issuer."""

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc
from care.access.v1 import access_pb2
from joserfc import jwt
from joserfc.jwk import ECKey, KeySet, OKPKey
from sqlalchemy import text

from chassis import access, migrations
from chassis.auth import Credential
from chassis.bus import PARTITIONS, Bus
from chassis.bus.postgres import PostgresBus
from chassis.errors import problem_from_rpc
from chassis.ids import new_id
from chassis.service import Server, Service
from chassis.settings import Issuer
from chassis.telemetry import Telemetry

ISSUER = "https://issuer.test"
ALL = ("patients", "scheduling", "referrals", "notifications", "feedback", "gateway")


class Unheard:
    """In place of patients, which is asked before anybody is told that a record doesn't exist: it knows no more."""

    async def subjects(self, tenant_id: str, subject_ids: Sequence[str]) -> Sequence[access_pb2.SubjectAccess]:
        """Nobody."""
        return []

    async def principal(self, tenant_id: str, issuer: str, subject: str) -> access_pb2.ResolvePrincipalResponse:
        """Nobody."""
        return access_pb2.ResolvePrincipalResponse()


class Harness:
    """Starts services side by side in this process, each with a database of its own.

    `database(name)` makes a fresh database and answers its URL (the root conftest's fixture).
    """

    def __init__(self, database: Callable[[str], Awaitable[str]], bus: Bus | None = None) -> None:
        self._database = database
        self.bus = bus
        self.tenant_id = new_id()
        self.servers: dict[str, Server] = {}
        self._folder = Path(tempfile.mkdtemp(prefix="care-harness-"))
        self._key = ECKey.generate_key("P-256", {"kid": "test"}, private=True)
        self.jwks_file = self._write("jwks.json", KeySet([self._key]).as_dict(private=False))
        keys = {name: OKPKey.generate_key("Ed25519", {"kid": name}, private=True) for name in ALL}
        self.key_files = {name: self._write(f"{name}.json", key.as_dict(private=True)) for name, key in keys.items()}
        self.services_file = self._write("services.json", KeySet(list(keys.values())).as_dict(private=False))
        self._channels: dict[str, grpc.aio.Channel] = {}

    def _write(self, name: str, value: Any) -> Path:
        file = self._folder / name
        file.write_text(json.dumps(value))
        return file

    # -- services ------------------------------------------------------------------------------------------------------

    async def start(self, *services: Service, **settings: Any) -> None:
        """Start services; `settings` override theirs. A service may be started again on its database."""
        if self.bus is None:
            self.bus = PostgresBus(await self._database("bus"))
        for service in services:
            url = await self._database(service.name)
            await migrations.upgrade(url, service.migrations, service.base.metadata)
            server = self.build(service, url, **settings)
            self.servers[service.name] = server
            await self.hear_patients(server)
            await server.start()

    def build(self, service: Service, url: str, **settings: Any) -> Server:
        """A server that is not started, on a database that has its schema."""
        assert self.bus is not None
        values: dict[str, Any] = {
            "environment": "test",
            "database_url": url,
            "port": 0,
            "health_port": 0,
            "metrics_port": 0,
            "signing_secret": "test",
            "issuers": [Issuer(issuer=ISSUER, jwks_file=self.jwks_file, tenants={"test": self.tenant_id})],
            "service_key_file": self.key_files[service.name],
            "service_keys_file": self.services_file,
            "audit_checkpoint_file": self._folder / f"{service.name}.checkpoints",
            "peers": {name: f"ipv4:127.0.0.1:{server.port}" for name, server in self.servers.items()},
            "principal_cache": 0.0,
            "drain_timeout": 2.0,
            **settings,
        }
        telemetry = Telemetry.create(
            service.name,
            otlp_endpoint=None,
            environment="test",
            version="0",
            log_stream=(self._folder / f"{service.name}.log").open("a"),
        )
        return Server(service, service.settings(**values), self.bus, telemetry=telemetry)

    async def hear_patients(self, server: Server) -> None:
        """Where patients does not run: make its projection look as if it had just been heard, and answer for it."""
        if server.service.owns_access or "patients" in self.servers:
            return
        async with server.database.engine.begin() as connection:
            for partition in range(PARTITIONS):
                await connection.execute(
                    text(
                        "INSERT INTO access_heartbeat VALUES (:partition, clock_timestamp() + interval '1 day')"
                        " ON CONFLICT DO NOTHING"
                    ),
                    {"partition": partition},
                )
        server.access._heard_age = -86400.0
        server.access._owner = Unheard()

    async def stop(self) -> None:
        """Stop everything that was started."""
        for channel in self._channels.values():
            await channel.close()
        await asyncio.gather(*(server.stop() for server in self.servers.values()))
        if self.bus is not None:
            await self.bus.stop()

    def log_of(self, service: str) -> str:
        """What a service logged."""
        return (self._folder / f"{service}.log").read_text()

    # -- callers -------------------------------------------------------------------------------------------------------

    async def staff(
        self,
        subject: str,
        permissions: Sequence[str],
        *,
        clinics: Sequence[str] = (),
        clearances: Sequence[str] = (),
        tenant_id: str = "",
        kind: str = "STAFF",
        principal_id: str = "",
        services: Sequence[str] = (),
    ) -> str:
        """Put a principal with these permissions into the projections; answers its id. Token: `token(subject)`."""
        principal_id = principal_id or new_id()
        tenant_id = tenant_id or self.tenant_id
        role = f"role of {subject}"
        for name, server in self.servers.items():
            if services and name not in services:
                continue
            tables = server.runtime.tables.access
            async with server.database.engine.begin() as connection:
                await access.store_role(
                    connection,
                    tables,
                    access_pb2.RoleState(tenant_id=tenant_id, name=role, permissions=permissions, version=1),
                )
                await access.store_principal(
                    connection,
                    tables,
                    access_pb2.PrincipalState(
                        id=principal_id,
                        tenant_id=tenant_id,
                        issuer=ISSUER,
                        subject=subject,
                        kind=kind,
                        principal_id=principal_id,
                        roles=[role],
                        group_ids=clinics,
                        clearances=clearances,
                        active=True,
                        version=1,
                    ),
                )
        return principal_id

    async def subject(
        self, *grantees: str, patient_id: str = "", labels: Sequence[str] = (), version: int = 1, tenant_id: str = ""
    ) -> str:
        """Put a patient's access set into the projections; answers the patient's id."""
        patient_id = patient_id or new_id()
        state = access_pb2.SubjectAccess(
            subject_id=patient_id,
            tenant_id=tenant_id or self.tenant_id,
            access_version=version,
            grantee_ids=[patient_id, *grantees],
            security_labels=labels,
        )
        for server in self.servers.values():
            async with server.database.engine.begin() as connection:
                await access.store_subject(connection, server.runtime.tables.access, state)
        return patient_id

    def token(self, subject: str, *, tenant: str = "test", ends_in: float = 3600, **claims: Any) -> str:
        """A bearer token of the test issuer."""
        now = time.time()
        claims = {"iss": ISSUER, "sub": subject, "aud": "care", "tenant": tenant, "exp": int(now + ends_in), **claims}
        return jwt.encode({"alg": "ES256", "kid": "test"}, claims, self._key)

    # -- calls ---------------------------------------------------------------------------------------------------------

    def channel(self, service: str) -> grpc.aio.Channel:
        """A plain channel to a service."""
        if service not in self._channels:
            self._channels[service] = grpc.aio.insecure_channel(f"127.0.0.1:{self.servers[service].port}")
        return self._channels[service]

    def as_user(self, subject: str) -> tuple[tuple[str, str], ...]:
        """Metadata of a user's call."""
        return (("authorization", f"Bearer {self.token(subject)}"),)

    def as_service(self, service: str, tenant_id: str = "") -> tuple[tuple[str, str], ...]:
        """Metadata of a service's call."""
        token = Credential(service, self.key_files[service]).token()
        return (("authorization", f"Bearer {token}"), ("care-tenant", tenant_id or self.tenant_id))

    async def call(self, service: str, stub: Any, method: str, request: Any, subject: str) -> Any:
        """One call as a user. Raises Problem."""
        try:
            rpc = getattr(stub(self.channel(service)), method)
            return await rpc(request, metadata=self.as_user(subject), timeout=30)
        except grpc.RpcError as error:
            raise problem_from_rpc(error) from None

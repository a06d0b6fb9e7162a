"""Five services side by side, furnished so that every RPC can be asked about something."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.protobuf.message import Message

from chassis.errors import Problem, problem_from_rpc
from chassis.ids import new_id
from chassis.testing.harness import Harness
from gateway.contract import Rpc
from services.patients.roles import PERMISSIONS, SHIPPED
from tests.planting import plant
from tests.surface import SERVICES, aggregates

_KINDS = {"patient": "PATIENT", "proxy": "RELATED"}
# At once, so that the whole matrix takes seconds.
_AT_ONCE = 8


class World:
    """Five services; the same ids stand in every table: `near` is the caller's, `far` another clinic's, `foreign`
    another health system's, `nowhere` nobody's."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.clinic, self.far_clinic = new_id(), new_id()
        self.near, self.far, self.foreign, self.nowhere = new_id(), new_id(), new_id(), new_id()
        self.other_tenant = new_id()
        self._room = asyncio.Semaphore(_AT_ONCE)

    async def furnish(self) -> None:
        harness = self.harness
        for role, permissions in SHIPPED.items():
            await harness.staff(role, sorted(permissions), clinics=[self.clinic], kind=_KINDS.get(role, "STAFF"))
        await harness.staff("nobody", [], clinics=[self.clinic])
        await harness.staff("everybody", sorted(PERMISSIONS), clinics=[self.clinic])
        await harness.subject(self.clinic, patient_id=self.near)
        await harness.subject(self.far_clinic, patient_id=self.far)
        # Of another tenant, granted to this very clinic: the tenant alone must keep it out.
        await harness.subject(self.clinic, patient_id=self.foreign, tenant_id=self.other_tenant)
        for name in SERVICES:
            async with harness.servers[name].database.engine.begin() as connection:
                for model in aggregates(name):
                    owned = model.subject_field is not None
                    rows = {self.foreign: self.other_tenant}
                    if owned:
                        rows |= {self.near: harness.tenant_id, self.far: harness.tenant_id}
                    for row_id, tenant_id in rows.items():
                        await plant(connection, model, tenant_id=tenant_id, row_id=row_id, subject_id=row_id)

    def why(self, server: str) -> str:
        """The latest defect in a service's log."""
        lines = [line for line in self.harness.log_of(server).splitlines() if "call failed" in line]
        return lines[-1] if lines else "nothing is in the log"

    async def outcome(self, rpc: Rpc, server: str, request: Message, metadata: Any) -> Problem | None:
        """What one call led to; None for an answer."""
        channel = self.harness.channel(server)
        kind = channel.unary_stream if rpc.method.server_streaming else channel.unary_unary
        call: Any = kind(
            f"/{rpc.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=lambda body: body,
        )
        async with self._room:
            try:
                answering = call(request, metadata=metadata, timeout=20)
                if rpc.method.server_streaming:  # opened is answered
                    await answering.read()
                    answering.cancel()
                else:
                    await answering
            except grpc.RpcError as error:
                return problem_from_rpc(error)
        return None

"""Channels to other services: round robin, deadlines, retries where the contract allows them, our own credential."""

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from care.access.v1 import access_pb2, access_pb2_grpc

from chassis.auth import Credential
from chassis.errors import Unavailable, problem_from_rpc
from chassis.telemetry import Telemetry

_TIMEOUT = 2.0


class Clients:
    """One channel per peer, opened on first use and kept.

    `own_metadata` is this service's own credential; a user's call passes the user's token instead.
    """

    def __init__(self, peers: Mapping[str, str], credential: Credential, telemetry: Telemetry) -> None:
        self._peers = dict(peers)
        self._credential = credential
        self._telemetry = telemetry
        self._channels: dict[str, grpc.aio.Channel] = {}

    @property
    def names(self) -> Sequence[str]:
        """Services that can be reached."""
        return list(self._peers)

    def channel(self, service: str) -> grpc.aio.Channel:
        """The channel to a service. Raises Unavailable `PEER_UNKNOWN` where the settings don't name it."""
        channel = self._channels.get(service)
        if channel is None:
            target = self._peers.get(service)
            if target is None:
                raise Unavailable("PEER_UNKNOWN", f"The settings name no address of {service}.", service=service)
            channel = self._channels[service] = grpc.aio.insecure_channel(
                target,
                options=[
                    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
                    # A peer that was away for long must not be found late.
                    ("grpc.initial_reconnect_backoff_ms", 100),
                    ("grpc.min_reconnect_backoff_ms", 100),
                    ("grpc.max_reconnect_backoff_ms", 2000),
                    ("grpc.enable_http_proxy", 0),
                    # Five services in one process: each has its own connection to each.
                    ("grpc.use_local_subchannel_pool", 1),
                ],
                interceptors=self._telemetry.client_interceptors(service),
            )
        return channel

    def own_metadata(self, tenant_id: str = "", on_behalf_of: str = "") -> tuple[tuple[str, str], ...]:
        """Metadata of a call in this service's own name, for a tenant."""
        metadata = [("authorization", f"Bearer {self._credential.token()}")]
        if tenant_id:
            metadata.append(("care-tenant", tenant_id))
        if on_behalf_of:
            metadata.append(("care-on-behalf-of", on_behalf_of))
        return tuple(metadata)

    async def close(self) -> None:
        """Close all channels."""
        await asyncio.gather(*(channel.close() for channel in self._channels.values()), return_exceptions=True)
        self._channels.clear()


# Every RPC of the contract may be repeated: reads have no effect, writes carry a request_id (the gateway mints one).
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [{}],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.05s",
                "maxBackoff": "0.5s",
                "backoffMultiplier": 2,
                # A server that is being stopped resets what reaches it too late as CANCELLED.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    # The budget: at half its tokens retries stop until successes have filled it again.
    "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.2},
    "loadBalancingConfig": [{"round_robin": {}}],
}


class RemoteOwner:
    """The owner of access over gRPC (see `chassis.access.Owner`)."""

    def __init__(self, clients: Clients, service: str = "patients") -> None:
        self._clients = clients
        self._service = service

    async def subjects(self, tenant_id: str, subject_ids: Sequence[str]) -> Sequence[access_pb2.SubjectAccess]:
        """Access sets of the subjects that exist. Raises Problem."""
        request = access_pb2.BatchGetSubjectAccessRequest(tenant_id=tenant_id, subject_ids=subject_ids)
        stub = access_pb2_grpc.AccessServiceStub(self._clients.channel(self._service))
        answer = await call(stub.BatchGetSubjectAccess, request, self._clients.own_metadata(tenant_id))
        return list(answer.subjects)

    async def principal(self, tenant_id: str, issuer: str, subject: str) -> access_pb2.ResolvePrincipalResponse:
        """Who a login is. Raises Problem."""
        request = access_pb2.ResolvePrincipalRequest(tenant_id=tenant_id, issuer=issuer, subject=subject)
        stub = access_pb2_grpc.AccessServiceStub(self._clients.channel(self._service))
        answer = await call(stub.ResolvePrincipal, request, self._clients.own_metadata(tenant_id))
        assert isinstance(answer, access_pb2.ResolvePrincipalResponse)
        return answer


async def call(rpc: Any, request: Any, metadata: Sequence[tuple[str, str]], *, timeout: float = _TIMEOUT) -> Any:
    """Call another service with a deadline. Raises Problem as the other told it."""
    try:
        return await rpc(request, metadata=metadata, timeout=timeout)
    except grpc.RpcError as error:
        raise problem_from_rpc(error) from None

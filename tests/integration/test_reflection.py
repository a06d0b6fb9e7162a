"""A stock gRPC client, without our protos, finds what each service offers and how it is."""

import asyncio
import json
import sys
from typing import Any

import pytest

from gateway.contract import rpcs
from system import topology

pytestmark = [pytest.mark.integration, pytest.mark.postgres, pytest.mark.kafka]

# In a process of its own: here our protos are known already.
_CLIENT = """
import json, sys
import grpc
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

def status(channel, service):
    try:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
        return health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    except grpc.RpcError as error:
        return error.code().name

main, probe = grpc.insecure_channel(sys.argv[1]), grpc.insecure_channel(sys.argv[2])
database = ProtoReflectionDescriptorDatabase(main)
pool = DescriptorPool(database)
names = database.get_services()
methods = {}
for name in names:
    for method in pool.FindServiceByName(name).methods:
        fields = [field.name for field in method.input_type.fields]
        methods[f"{name}/{method.name}"] = fields
print(json.dumps({
    "services": sorted(names),
    "methods": methods,
    "health": {name: status(main, name) for name in ["", *names]},
    "probe": status(probe, ""),
    "unknown": status(main, "care.nobody.v1.NobodyService"),
}))
"""


async def _asked(address: str, health: str) -> dict[str, Any]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _CLIENT, address, health, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    printed, complained = await process.communicate()
    assert process.returncode == 0, complained.decode()
    found: dict[str, Any] = json.loads(printed)
    return found


@pytest.mark.parametrize("service", topology.SERVICES)
async def test_a_stock_client_finds_what_a_service_offers_and_how_it_is(service: str, systems: Any) -> None:
    system = await systems(kafka=True)
    instance = system.plan.instances[service]
    found = await _asked(instance.address, f"127.0.0.1:{instance.health_port}")
    own = {rpc.name: [field.name for field in rpc.method.input_type.fields] for rpc in rpcs() if rpc.owner == service}
    assert own.items() <= found["methods"].items()
    others = {rpc.name for rpc in rpcs()} - own.keys()
    # Beside its own: what all services have, and nothing of another's.
    shared = {name for name in others if name.startswith(("care.audit.", "care.batch.", "care.access."))}
    assert not found["methods"].keys() & (others - shared)
    assert {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= set(found["services"])
    care = [name for name in found["services"] if name.startswith("care.")]
    assert care and {found["health"][name] for name in ["", *care]} == {"SERVING"}
    assert found["probe"] == "SERVING"
    assert found["unknown"] == "NOT_FOUND"

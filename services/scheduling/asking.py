"""What only patients knows of somebody and a rule of a visit type asks for: read each time, kept nowhere."""

import json

from care.patients.v1 import facts_pb2
from care.patients.v1.facts_pb2_grpc import FactsServiceStub

from chassis import clients
from chassis.errors import NotFound
from chassis.pipeline import Runtime
from services.scheduling.eligibility import NOTHING, Facts

_TIMEOUT = 1.0


async def facts(runtime: Runtime, tenant_id: str, patient_id: str) -> Facts:
    """The facts of a patient. Raises Problem where patients can't be asked in time."""
    stub = FactsServiceStub(runtime.clients.channel("patients"))
    request = facts_pb2.GetPatientFactsRequest(patient_id=patient_id)
    metadata = runtime.clients.own_metadata(tenant_id)
    try:
        told = await clients.call(stub.GetPatientFacts, request, metadata, timeout=_TIMEOUT)
    except NotFound:
        return NOTHING
    return Facts(told.birth_date, told.sex, told.state)


async def patient_by_identifier(runtime: Runtime, tenant_id: str, key: str) -> str:
    """Who has an identifier, `key` being [system, value] as JSON; "" for nobody. Raises Problem as `facts` does."""
    system, value = json.loads(key)
    stub = FactsServiceStub(runtime.clients.channel("patients"))
    request = facts_pb2.GetPatientByIdentifierRequest(identifier={"system": system, "value": value})
    metadata = runtime.clients.own_metadata(tenant_id)
    try:
        found = await clients.call(stub.GetPatientByIdentifier, request, metadata, timeout=_TIMEOUT)
    except NotFound:
        return ""
    return str(found.patient_id)


async def heard_of(runtime: Runtime, tenant_id: str, patient_id: str) -> bool:
    """Has what patients knows of somebody's record brought here, where it wasn't heard of yet."""
    await runtime.access.read_through(tenant_id, [patient_id])
    return True

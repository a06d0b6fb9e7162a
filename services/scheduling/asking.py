"""What only patients knows of somebody and a rule of a visit type asks for: read each time, kept nowhere."""

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

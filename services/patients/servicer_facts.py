"""What other services must know of a patient, over gRPC."""

from care.patients.v1 import facts_pb2 as pb
from care.patients.v1.facts_pb2_grpc import FactsServiceServicer
from sqlalchemy import select

from chassis.call import Call
from chassis.errors import NotFound
from services.patients.facts import facts
from services.patients.patient import Patient, PatientIdentifier


class FactsServicer(FactsServiceServicer):
    """Read each time: who keeps it would have to follow its corrections."""

    async def GetPatientFacts(self, request: pb.GetPatientFactsRequest, call: Call) -> pb.PatientFacts:
        patient = await call.get(Patient, request.patient_id)
        return pb.PatientFacts(**facts(patient.gender, patient.birth_date, patient.addresses or ()))

    async def GetPatientByIdentifier(self, request: pb.GetPatientByIdentifierRequest, call: Call) -> pb.PatientFound:
        owner = select(PatientIdentifier.patient_id).where(
            PatientIdentifier.tenant_id == call.tenant_id,
            PatientIdentifier.system == request.identifier.system,
            PatientIdentifier.value == request.identifier.value,
        )
        patient_id = (await call.db.execute(owner)).scalar_one_or_none()
        if patient_id is None:
            raise NotFound
        call.saw(patient_id)
        return pb.PatientFound(patient_id=patient_id)

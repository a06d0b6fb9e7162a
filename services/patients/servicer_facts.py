"""What other services must know of a patient, over gRPC."""

from care.patients.v1 import facts_pb2 as pb
from care.patients.v1.facts_pb2_grpc import FactsServiceServicer

from chassis.call import Call
from services.patients.facts import facts
from services.patients.patient import Patient


class FactsServicer(FactsServiceServicer):
    """Read each time: who keeps it would have to follow its corrections."""

    async def GetPatientFacts(self, request: pb.GetPatientFactsRequest, call: Call) -> pb.PatientFacts:
        patient = await call.get(Patient, request.patient_id)
        return pb.PatientFacts(**facts(patient.gender, patient.birth_date, patient.addresses or ()))

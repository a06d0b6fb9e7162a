"""Consents over gRPC."""

from care.patients.v1 import consents_pb2 as pb
from care.patients.v1.consents_pb2_grpc import ConsentsServiceServicer
from sqlalchemy import select

from chassis.call import Call
from chassis.errors import Invalid
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.wire import OUTPUT_ONLY, enum_names, given, to_proto
from services.patients.consent import Consent, Status
from services.patients.names import contact_key, contact_values
from services.patients.patient import Patient, RelatedPerson

_READ_ONLY = OUTPUT_ONLY | {"status", "recorder", "end_time", "end_reason", "security_labels"}
_SYSTEMS = {"SMS": ("PHONE", "SMS"), "VOICE": ("PHONE",), "EMAIL": ("EMAIL",)}


class ConsentsServicer(ConsentsServiceServicer):
    """Who may be written to, at which number or address, for what."""

    async def CreateConsent(self, request: pb.CreateConsentRequest, call: Call) -> pb.Consent:
        values = given(request.consent, read_only=_READ_ONLY)
        # The patient's lock makes two consents for one thing follow each other.
        patient = await call.get(Patient, values["patient_id"])
        recipient = await _recipient(call, patient, values.pop("recipient", None))
        kinds = _SYSTEMS[values["channel"]]
        value = contact_key(values.pop("contact_value"))
        if value not in contact_values([one for one in recipient.telecom if one.get("system") in kinds]):
            raise Invalid(
                "CONTACT_UNKNOWN",
                "The recipient's record has no such number or address for this channel; add it there first.",
                field="consent.contact_value",
            )
        await _replace(call, patient.id, recipient.id, value, values["channel"], values["purpose"])
        consent = Consent(
            id=new_id(),
            recipient={"type": type(recipient).__name__, "id": recipient.id},
            recipient_id=recipient.id,
            contact_value=value,
            recorder=call.actor,
            security_labels=list(patient.security_labels),
            **values,
        )
        consent.move("record")
        await call.add(consent)
        await call.db.flush()
        return to_proto(consent, pb.Consent)

    async def GetConsent(self, request: pb.GetConsentRequest, call: Call) -> pb.Consent:
        return to_proto(await call.get(Consent, request.id), pb.Consent)

    async def ListConsents(self, request: pb.ListConsentsRequest, call: Call) -> pb.ListConsentsResponse:
        await call.subject(request.patient_id)
        wanted = (
            Rows(Consent)
            .equal(Consent.patient_id, request.patient_id)
            .among(Consent.status, enum_names(pb.Consent.Status, request.statuses))
        )
        rows, following = await call.page(wanted, request, Consent.create_time, Consent.id, descending=True)
        return pb.ListConsentsResponse(consents=[to_proto(row, pb.Consent) for row in rows], next_page_token=following)

    async def RevokeConsent(self, request: pb.RevokeConsentRequest, call: Call) -> pb.Consent:
        consent = await call.get(Consent, request.id)
        consent.end("revoked", call.now, request.evidence)
        await call.db.flush()
        return to_proto(consent, pb.Consent)


async def _recipient(call: Call, patient: Patient, wanted: dict | None) -> Patient | RelatedPerson:
    """Who is written to. Raises Invalid `RECIPIENT_UNKNOWN` for somebody who isn't around this patient."""
    if wanted is None or (wanted.get("type"), wanted.get("id")) == ("Patient", patient.id):
        return patient
    person = None
    if wanted.get("type") == "RelatedPerson":
        query = call.select(RelatedPerson).where(
            RelatedPerson.id == wanted.get("id"), RelatedPerson.patient_id == patient.id
        )
        person = (await call.db.execute(query)).scalar_one_or_none()
    if person is None:
        raise Invalid(
            "RECIPIENT_UNKNOWN",
            "The recipient must be the patient or a related person of this patient.",
            field="consent.recipient",
        )
    return person


async def _replace(call: Call, patient_id: str, recipient_id: str, value: str, channel: str, purpose: str) -> None:
    """End what is in force for the same thing."""
    in_force = await call.db.execute(
        select(Consent).where(
            Consent.tenant_id == call.tenant_id,
            Consent.patient_id == patient_id,
            Consent.recipient_id == recipient_id,
            Consent.contact_value == value,
            Consent.channel == channel,
            Consent.purpose == purpose,
            Consent.status == Status.ACTIVE,
        )
    )
    for old in in_force.scalars():
        old.end("replaced", call.now)
    # SQLAlchemy inserts before it updates; the unique index wants the old one ended first.
    await call.db.flush()

"""Consents: for whom, for which number, until when; and what the senders are told by them."""

import asyncio

import pytest
from care.patients.v1 import consents_pb2 as pb
from care.patients.v1 import patients_pb2
from care.patients.v1.patients_pb2_grpc import PatientsServiceStub

from chassis.errors import Problem
from chassis.ids import new_id

MOBILE = "+17205348110"


def a_consent(patient_id, **more):
    return {
        "patient_id": patient_id,
        "contact_value": "720-534-8110",
        "channel": "SMS",
        "purpose": "care",
        "basis": "EXPRESS",
        "text_version": "sms-3",
        "evidence": "intake form 17",
        **more,
    }


async def recipients(desk, patient_id, *, recipient=None, channel="SMS", purpose="appointment-reminder", tenant=""):
    """What notifications is told right before it sends."""
    stub = PatientsServiceStub(desk.harness.channel("patients"))
    request = patients_pb2.BatchGetRecipientsRequest(
        tenant_id=tenant or desk.harness.tenant_id,
        items=[
            {
                "patient_id": patient_id,
                "recipient": recipient or {"type": "Patient", "id": patient_id},
                "channel": channel,
                "purpose": purpose,
            }
        ],
    )
    answer = await stub.BatchGetRecipients(request, metadata=desk.harness.as_service("notifications"), timeout=10)
    return answer.recipients[0]


async def test_a_consent_is_the_patients_own_unless_said_otherwise_and_kept_in_one_spelling(desk):
    patient = await desk.patient()
    consent = await desk.rpc("CreateConsent", consent=a_consent(patient.id))
    assert (consent.recipient.type, consent.recipient.id) == ("Patient", patient.id)
    assert consent.contact_value == MOBILE
    assert consent.status == pb.Consent.ACTIVE and consent.recorder.startswith("staff:")
    read = await desk.rpc("GetConsent", id=consent.id)
    assert read == consent


@pytest.mark.parametrize(
    "wrong",
    [{"contact_value": "+1 720 534 9999"}, {"channel": "EMAIL"}, {"contact_value": "ada@example.org"}],
)
async def test_a_consent_needs_a_value_of_the_recipient_that_fits_the_channel(desk, wrong):
    patient = await desk.patient()
    with pytest.raises(Problem) as refused:
        await desk.rpc("CreateConsent", consent=a_consent(patient.id, **wrong))
    assert refused.value.reason == "CONTACT_UNKNOWN"
    assert "9999" not in str(refused.value.message) + str(refused.value.metadata)


async def test_a_newer_consent_for_the_same_thing_ends_the_older_one(desk):
    patient = await desk.patient()
    old = await desk.rpc("CreateConsent", consent=a_consent(patient.id))
    new = await desk.rpc("CreateConsent", consent=a_consent(patient.id, text_version="sms-4"))
    mail = await desk.rpc(
        "CreateConsent", consent=a_consent(patient.id, channel="EMAIL", contact_value="ada@example.org")
    )
    ended = await desk.rpc("GetConsent", id=old.id)
    assert (ended.status, ended.end_reason) == (pb.Consent.INACTIVE, "replaced") and ended.HasField("end_time")
    in_force = await desk.rpc("ListConsents", patient_id=patient.id, statuses=["ACTIVE"])
    assert [one.id for one in in_force.consents] == [mail.id, new.id]


async def test_of_many_consents_at_once_one_is_in_force(desk):
    patient = await desk.patient()
    made = await asyncio.gather(
        *(desk.rpc("CreateConsent", consent=a_consent(patient.id, text_version=f"v{n}")) for n in range(8))
    )
    assert len({one.id for one in made}) == 8
    listed = await desk.rpc("ListConsents", patient_id=patient.id)
    assert [one.status for one in listed.consents].count(pb.Consent.ACTIVE) == 1


async def test_a_revoked_consent_ends_once_and_no_message_leaves_by_it(desk):
    patient = await desk.patient()
    consent = await desk.rpc("CreateConsent", consent=a_consent(patient.id))
    told = await recipients(desk, patient.id)
    assert (told.refusal, told.contact_value, told.consent_id) == ("", MOBILE, consent.id)
    assert list(told.languages) == ["es", "en"] and list(told.time_zones) == ["America/Denver"]
    revoked = await desk.rpc("RevokeConsent", id=consent.id, source="PHONE", evidence="call of the patient")
    assert (revoked.status, revoked.end_reason) == (pb.Consent.INACTIVE, "revoked")
    assert (await recipients(desk, patient.id)).refusal == "no-consent"
    with pytest.raises(Problem) as again:
        await desk.rpc("RevokeConsent", id=consent.id)
    assert again.value.reason == "ILLEGAL_TRANSITION"


async def test_a_consent_of_another_clinics_patient_does_not_exist(desk):
    patient = await desk.patient()
    consent = await desk.rpc("CreateConsent", consent=a_consent(patient.id))
    for method, fields in (
        ("GetConsent", {"id": consent.id}),
        ("RevokeConsent", {"id": consent.id}),
        ("ListConsents", {"patient_id": patient.id}),
        ("CreateConsent", {"consent": a_consent(patient.id)}),
    ):
        with pytest.raises(Problem) as refused:
            await desk.rpc(method, "elias", **fields)
        assert refused.value.reason == "NOT_FOUND"


async def test_a_child_is_reached_through_the_parent_who_consented(desk):
    child = await desk.patient(family="Young", telecom=[])
    mother = await desk.rpc(
        "CreateRelatedPerson",
        related_person={
            "patient_id": child.id,
            "name": {"given_names": ["Mary"]},
            "telecom": [{"system": "PHONE", "value": "303-245-6000", "use": "MOBILE"}],
            "languages": ["fr"],
        },
    )
    reference = {"type": "RelatedPerson", "id": mother.id}
    assert (await recipients(desk, child.id)).refusal == "no-contact"
    assert (await recipients(desk, child.id, recipient=reference)).refusal == "no-consent"
    wanted = a_consent(child.id, recipient=reference, contact_value="3032456000", purpose="appointment-reminder")
    await desk.rpc("CreateConsent", consent=wanted)
    told = await recipients(desk, child.id, recipient=reference)
    assert (told.refusal, told.contact_value, told.given_name) == ("", "+13032456000", "Mary")
    assert list(told.languages) == ["fr"] and list(told.time_zones) == ["America/Denver"]
    assert (await recipients(desk, child.id, recipient=reference, purpose="survey")).refusal == "no-consent"


async def test_a_related_person_of_somebody_else_is_no_recipient(desk):
    patient, other = await desk.patient(), await desk.patient(family="Someone")
    person = await desk.rpc(
        "CreateRelatedPerson",
        related_person={
            "patient_id": other.id,
            "telecom": [{"system": "PHONE", "value": "720 534 8110", "use": "MOBILE"}],
        },
    )
    reference = {"type": "RelatedPerson", "id": person.id}
    with pytest.raises(Problem) as refused:
        await desk.rpc("CreateConsent", consent=a_consent(patient.id, recipient=reference))
    assert refused.value.reason == "RECIPIENT_UNKNOWN"
    await desk.rpc("CreateConsent", consent=a_consent(other.id, recipient=reference))
    assert (await recipients(desk, patient.id, recipient=reference)).refusal == "not-found"


async def test_nobody_unknown_deceased_or_without_contact_is_written_to(desk):
    assert (await recipients(desk, new_id())).refusal == "not-found"
    patient = await desk.patient()
    assert (await recipients(desk, patient.id, tenant=new_id())).refusal == "not-found"
    assert (await recipients(desk, patient.id)).refusal == "no-consent"
    assert (await recipients(desk, patient.id, channel="EMAIL")).refusal == "no-consent"
    consent = await desk.rpc("CreateConsent", consent=a_consent(patient.id))
    assert (await recipients(desk, patient.id)).consent_version == 1
    await desk.rpc(
        "UpdatePatient",
        patient={"id": patient.id, "deceased": True},
        update_mask={"paths": ["deceased"]},
        etag=patient.etag,
    )
    assert (await recipients(desk, patient.id)).refusal == "deceased"
    assert (await desk.rpc("GetConsent", id=consent.id)).status == pb.Consent.ACTIVE


async def test_a_number_taken_from_the_record_takes_its_consent_along(desk):
    patient = await desk.patient()
    consent = await desk.rpc("CreateConsent", consent=a_consent(patient.id))
    await desk.rpc(
        "UpdatePatient",
        patient={"id": patient.id, "telecom": [{"system": "EMAIL", "value": "ada@example.org"}]},
        update_mask={"paths": ["telecom"]},
        etag=patient.etag,
    )
    ended = await desk.rpc("GetConsent", id=consent.id)
    assert (ended.status, ended.end_reason) == (pb.Consent.INACTIVE, "contact-changed")

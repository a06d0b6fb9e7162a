"""Access that is given or taken away, as all five services see it at once."""

import asyncio
from typing import Any

import pytest
from care.feedback.v1 import feedback_pb2, feedback_pb2_grpc
from care.notifications.v1 import notifications_pb2, notifications_pb2_grpc
from care.patients.v1 import patients_pb2, patients_pb2_grpc, staff_pb2, staff_pb2_grpc
from care.referrals.v1 import referrals_pb2, referrals_pb2_grpc
from care.scheduling.v1 import appointments_pb2, appointments_pb2_grpc, directory_pb2, directory_pb2_grpc

from chassis.errors import Problem
from chassis.testing.harness import ISSUER, Harness
from services.patients.bootstrap import bootstrap
from system import topology

pytestmark = pytest.mark.postgres

STALE_PATIENT, STALE_STAFF = 2.0, 4.0


class Everywhere:
    """Five services, an administrator, two clinics with a coordinator each, and a patient with a referral."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness

    async def build(self) -> None:
        await self.harness.start(
            *(topology.service(name) for name in topology.SERVICES),
            access_stale_patient=STALE_PATIENT,
            access_stale_staff=STALE_STAFF,
            heartbeat_interval=0.2,
        )
        url = self.harness.servers["patients"].settings.database_url
        await bootstrap(url, tenant_id=self.harness.tenant_id, issuer=ISSUER, subject="root", family_name="Root")
        self.clinics = [
            (
                await self.call(
                    "scheduling",
                    directory_pb2_grpc.ClinicsServiceStub,
                    "CreateClinic",
                    directory_pb2.CreateClinicRequest(
                        clinic={"name": name, "time_zone": "America/Chicago", "holiday_region": "US"}
                    ),
                    "root",
                )
            ).id
            for name in ("North", "South")
        ]
        self.staff = {}
        for subject, clinic in (("nora", self.clinics[0]), ("sam", self.clinics[1])):
            self.staff[subject] = await self.call(
                "patients",
                staff_pb2_grpc.StaffServiceStub,
                "CreateStaff",
                staff_pb2.CreateStaffRequest(
                    staff={
                        "issuer": ISSUER,
                        "subject": subject,
                        "name": {"family_name": subject},
                        "roles": ["coordinator"],
                        "clinic_ids": [clinic],
                    }
                ),
                "root",
            )
        self.patient = await self.call(
            "patients",
            patients_pb2_grpc.PatientsServiceStub,
            "CreatePatient",
            patients_pb2.CreatePatientRequest(
                patient={"names": [{"family_name": "Held"}], "birth_date": "1970-01-01"}, clinic_id=self.clinics[0]
            ),
            "nora",
        )
        await self.until_known()
        self.referral = await self.call(
            "referrals",
            referrals_pb2_grpc.ReferralsServiceStub,
            "CreateReferral",
            referrals_pb2.CreateReferralRequest(
                referral={
                    "patient_id": self.patient.id,
                    "clinic_id": self.clinics[0],
                    "specialty": {"code": "394579002"},
                }
            ),
            "nora",
        )

    async def until_known(self) -> None:
        """Until the clinics have reached referrals."""
        async with asyncio.timeout(15):
            while True:
                async with self.harness.servers["referrals"].database.engine.connect() as connection:
                    from sqlalchemy import text

                    found = (await connection.execute(text("SELECT count(*) FROM clinic"))).scalar_one()
                if found >= 2:
                    return
                await asyncio.sleep(0.05)

    async def call(self, service: str, stub: Any, method: str, request: Any, subject: str) -> Any:
        return await self.harness.call(service, stub, method, request, subject)

    async def reads(self, subject: str) -> dict[str, str]:
        """What each service answers to a read of the patient: "OK" or the reason."""
        patient = self.patient.id
        reads = {
            "patients": (
                patients_pb2_grpc.PatientsServiceStub,
                "GetPatient",
                patients_pb2.GetPatientRequest(id=patient),
            ),
            "referrals": (
                referrals_pb2_grpc.ReferralsServiceStub,
                "GetReferral",
                referrals_pb2.GetReferralRequest(id=self.referral.id),
            ),
            "scheduling": (
                appointments_pb2_grpc.AppointmentsServiceStub,
                "ListAppointments",
                appointments_pb2.ListAppointmentsRequest(patient_ids=[patient]),
            ),
            "notifications": (
                notifications_pb2_grpc.MessagesServiceStub,
                "ListMessages",
                notifications_pb2.ListMessagesRequest(patient_ids=[patient]),
            ),
            "feedback": (
                feedback_pb2_grpc.SurveyInvitationsServiceStub,
                "ListSurveyInvitations",
                feedback_pb2.ListSurveyInvitationsRequest(patient_ids=[patient]),
            ),
        }
        found = {}
        for service, (stub, method, request) in reads.items():
            try:
                await self.call(service, stub, method, request, subject)
            except Problem as problem:
                found[service] = problem.reason
            else:
                found[service] = "OK"
        return found

    async def sees(self, service: str, subject: str) -> bool:
        """Whether a service's own projection lets a staff member see the patient."""
        staff = self.staff[subject].id
        table = self.harness.servers[service].runtime.tables.access.subject
        async with self.harness.servers[service].database.engine.connect() as connection:
            row = (
                (await connection.execute(table.select().where(table.c.patient_id == self.patient.id)))
                .mappings()
                .first()
            )
        return row is not None and any(grant["id"] == staff for grant in row["timed_grants"])


@pytest.fixture(scope="module")
async def everywhere(database: Any) -> Any:
    everywhere = Everywhere(Harness(database))
    await everywhere.build()
    yield everywhere
    await everywhere.harness.stop()


async def test_staff_of_another_clinic_get_the_answer_of_an_absent_record(everywhere: Everywhere) -> None:
    assert await everywhere.reads("nora") == dict.fromkeys(topology.SERVICES, "OK")
    hidden = await everywhere.reads("sam")
    assert hidden["patients"] == hidden["referrals"] == "NOT_FOUND"


async def test_broken_glass_is_seen_at_once_by_all_five_services(everywhere: Everywhere) -> None:
    consumers = [server.consumer for name, server in everywhere.harness.servers.items() if name != "patients"]
    # Nothing is heard meanwhile: what is seen is read through, not luck.
    for consumer in consumers:
        await consumer.stop()
    try:
        await everywhere.call(
            "patients",
            patients_pb2_grpc.PatientsServiceStub,
            "BreakGlass",
            patients_pb2.BreakGlassRequest(id=everywhere.patient.id, reason="found unconscious, no relative known"),
            "sam",
        )
        assert await everywhere.reads("sam") == dict.fromkeys(topology.SERVICES, "OK")
        for service in topology.SERVICES:
            assert await everywhere.sees(service, "sam"), service
    finally:
        for consumer in consumers:
            await consumer.start()


async def test_a_right_that_was_taken_away_ends_although_nothing_is_heard(everywhere: Everywhere) -> None:
    referrals = everywhere.harness.servers["referrals"]
    assert (await everywhere.reads("nora"))["referrals"] == "OK"
    await referrals.consumer.stop()
    try:
        staff = everywhere.staff["nora"]
        current = await everywhere.call(
            "patients",
            staff_pb2_grpc.StaffServiceStub,
            "GetStaff",
            staff_pb2.GetStaffRequest(id=staff.id),
            "root",
        )
        update = staff_pb2.UpdateStaffRequest(staff={"id": staff.id}, etag=current.etag)
        update.update_mask.paths.append("clinic_ids")
        await everywhere.call("patients", staff_pb2_grpc.StaffServiceStub, "UpdateStaff", update, "root")
        async with asyncio.timeout(STALE_STAFF + 10):
            while (await everywhere.reads("nora"))["referrals"] != "NOT_FOUND":
                await asyncio.sleep(0.2)
        update = staff_pb2.UpdateStaffRequest(staff={"id": staff.id, "clinic_ids": [everywhere.clinics[0]]})
        update.etag = (
            await everywhere.call(
                "patients",
                staff_pb2_grpc.StaffServiceStub,
                "GetStaff",
                staff_pb2.GetStaffRequest(id=staff.id),
                "root",
            )
        ).etag
        await everywhere.call("patients", staff_pb2_grpc.StaffServiceStub, "UpdateStaff", update, "root")
        async with asyncio.timeout(10):
            while (await everywhere.reads("nora"))["referrals"] != "OK":
                await asyncio.sleep(0.2)
    finally:
        await referrals.consumer.start()


async def test_a_proxys_right_ends_by_the_clock_in_every_service(everywhere: Everywhere) -> None:
    from datetime import UTC, datetime, timedelta

    expires = datetime.now(UTC) + timedelta(seconds=4)
    person = patients_pb2.RelatedPerson(
        patient_id=everywhere.patient.id,
        name={"family_name": "Held", "given_names": ["Io"]},
        proxy_permissions=["appointments.read", "patients.read"],
    )
    person.proxy_expire_time.FromDatetime(expires.replace(tzinfo=None))
    related = await everywhere.call(
        "patients",
        patients_pb2_grpc.PatientsServiceStub,
        "CreateRelatedPerson",
        patients_pb2.CreateRelatedPersonRequest(related_person=person),
        "nora",
    )
    await everywhere.call(
        "patients",
        staff_pb2_grpc.StaffServiceStub,
        "CreateLogin",
        staff_pb2.CreateLoginRequest(
            login={"issuer": ISSUER, "subject": "io", "person": {"type": "RelatedPerson", "id": related.id}}
        ),
        "root",
    )
    during = await everywhere.reads("io")
    assert during["patients"] == during["scheduling"] == "OK"
    # No permission for these, so no answer, whoever's the record is.
    assert during["referrals"] == during["notifications"] == during["feedback"] == "PERMISSION_MISSING"
    await asyncio.sleep((expires - datetime.now(UTC)).total_seconds() + 0.5)
    after = await everywhere.reads("io")
    assert after["patients"] == "NOT_FOUND"

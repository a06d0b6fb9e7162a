"""What scheduling tells patients and asks of it, at the real patients service."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from care.patients.v1 import patients_pb2, patients_pb2_grpc, staff_pb2, staff_pb2_grpc, tasks_pb2, tasks_pb2_grpc
from care.scheduling.v1 import appointments_pb2, appointments_pb2_grpc, directory_pb2, directory_pb2_grpc

from chassis.errors import Problem
from chassis.testing.harness import ISSUER, Harness
from services.patients.bootstrap import bootstrap
from system import topology

pytestmark = pytest.mark.postgres

ALWAYS = [{"weekday": day, "start": "00:00", "end": "00:00"} for day in range(1, 8)]


class Practice:
    """Patients and scheduling on one bus: a clinic, who works there, and whoever comes."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness

    async def open(self) -> None:
        await self.harness.start(*(topology.service(name) for name in ("patients", "scheduling")))
        url = self.harness.servers["patients"].settings.database_url
        await bootstrap(url, tenant_id=self.harness.tenant_id, issuer=ISSUER, subject="root", family_name="Root")
        self.clinic = await self.make("Clinic", clinic={"name": "North", "time_zone": "America/Chicago"})
        staff = {"issuer": ISSUER, "subject": "mia", "name": {"family_name": "Mia"}, "roles": ["manager"]}
        await self.harness.call(
            "patients",
            staff_pb2_grpc.StaffServiceStub,
            "CreateStaff",
            staff_pb2.CreateStaffRequest(staff={**staff, "clinic_ids": [self.clinic.id]}),
            "root",
        )
        who = {"name": {"family_name": "Abara"}, "roles": [{"clinic_id": self.clinic.id}]}
        self.doctor = await self.make("Practitioner", practitioner=who)
        hours = {"practitioner_id": self.doctor.id, "clinic_id": self.clinic.id, "weekly_hours": ALWAYS}
        await self.make("Schedule", schedule=hours)

    async def directory(self, method: str, entry: str, **values: Any) -> Any:
        """A change of the directory by the administrator."""
        stub = getattr(directory_pb2_grpc, f"{entry}sServiceStub")
        request = getattr(directory_pb2, f"{method}{entry}Request")(**values)
        return await self.harness.call("scheduling", stub, f"{method}{entry}", request, "root")

    async def make(self, entry: str, **values: Any) -> Any:
        return await self.directory("Create", entry, **values)

    async def a_patient(self, **facts: Any) -> str:
        request = patients_pb2.CreatePatientRequest(
            patient={"names": [{"family_name": "Held"}], **facts}, clinic_id=self.clinic.id, confirm_new=True
        )
        stub = patients_pb2_grpc.PatientsServiceStub
        found = await self.harness.call("patients", stub, "CreatePatient", request, "mia")
        return str(found.id)

    async def book(self, patient: str, visit_type: str, start: datetime) -> Any:
        request = appointments_pb2.CreateAppointmentRequest(
            patient_id=patient, visit_type_id=visit_type, clinic_id=self.clinic.id, practitioner_id=self.doctor.id,
            start_time=start,
        )  # fmt: skip
        stub = appointments_pb2_grpc.AppointmentsServiceStub
        return await self.harness.call("scheduling", stub, "CreateAppointment", request, "mia")

    async def refused(self, patient: str, visit_type: str, start: datetime) -> tuple[str, str]:
        with pytest.raises(Problem) as problem:
            await self.book(patient, visit_type, start)
        return problem.value.reason, problem.value.metadata.get("rules", "")

    async def tasks(self, patient: str, count: int) -> list[Any]:
        """The patient's tasks about stranded visits, once there are so many."""
        request = tasks_pb2.ListTasksRequest(patient_id=patient, codes=["stranded-visit"])
        async with asyncio.timeout(15):
            while True:
                answer = await self.harness.call(
                    "patients", tasks_pb2_grpc.TasksServiceStub, "ListTasks", request, "mia"
                )
                found = list(answer.tasks)
                if len(found) >= count:
                    return found
                await asyncio.sleep(0.05)


@pytest.fixture(scope="module")
async def practice(database: Any) -> Any:
    harness = Harness(database)
    practice = Practice(harness)
    await practice.open()
    yield practice
    await harness.stop()


def soon(days: int) -> datetime:
    return (datetime.now(UTC) + timedelta(days=days)).replace(hour=16, minute=0, second=0, microsecond=0)


async def test_a_visit_that_is_left_outside_is_on_somebodys_worklist(practice: Practice) -> None:
    visit_type = (
        await practice.make("VisitType", visit_type={"code": "any", "name": "Any", "duration_minutes": 30})
    ).id
    patient = await practice.a_patient()
    visit = await practice.book(patient, visit_type, soon(6))
    kept = practice.doctor
    await practice.directory(
        "Update", "Practitioner", practitioner={"id": kept.id, "active": False}, etag=kept.etag,
        update_mask={"paths": ["active"]},
    )  # fmt: skip
    (task,) = await practice.tasks(patient, 1)
    assert (task.source.type, task.source.id, task.clinic_id) == ("Appointment", visit.id, practice.clinic.id)
    assert task.owner.type == "Pool" and tasks_pb2.Task.Status.Name(task.status) == "READY"
    back = await practice.directory("Get", "Practitioner", id=kept.id)
    practice.doctor = await practice.directory(
        "Update", "Practitioner", practitioner={"id": kept.id, "active": True}, etag=back.etag,
        update_mask={"paths": ["active"]},
    )  # fmt: skip


async def test_age_and_sex_are_asked_where_they_are_known(practice: Practice) -> None:
    rules = {"minimum_age": 18, "sex": "female"}
    visit_type = (
        await practice.make(
            "VisitType", visit_type={"code": "some", "name": "Some", "duration_minutes": 30, "eligibility": rules}
        )
    ).id
    child = await practice.a_patient(birth_date=f"{datetime.now(UTC).year - 9}-01-01", gender="FEMALE")
    man = await practice.a_patient(birth_date="1980-01-01", gender="MALE")
    woman = await practice.a_patient(birth_date="1980-01-01", gender="FEMALE")
    assert await practice.refused(child, visit_type, soon(7)) == ("NOT_ELIGIBLE", "AGE")
    assert await practice.refused(man, visit_type, soon(7)) == ("NOT_ELIGIBLE", "SEX")
    assert (await practice.book(woman, visit_type, soon(7))).patient_id == woman

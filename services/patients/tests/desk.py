"""A coordinator's desk for tests: the patients service over gRPC, and other services' events as if they had come."""

import asyncio
from datetime import UTC, datetime
from typing import Any

from care.events.v1.envelope_pb2 import Event
from care.patients.v1 import consents_pb2, patients_pb2, staff_pb2, tasks_pb2, timeline_pb2
from care.patients.v1.consents_pb2_grpc import ConsentsServiceStub
from care.patients.v1.patients_pb2_grpc import PatientsServiceStub
from care.patients.v1.staff_pb2_grpc import PoolsServiceStub, StaffServiceStub
from care.patients.v1.tasks_pb2_grpc import TasksServiceStub
from care.patients.v1.timeline_pb2_grpc import ContactsServiceStub, TimelineServiceStub
from google.protobuf.message import Message as Payload
from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy import text

from chassis.bus import Message
from chassis.ids import new_id
from chassis.testing.harness import Harness

WORK = [
    "patients.read", "patients.write", "patients.match", "consents.read", "consents.write", "contacts.read",
    "contacts.write", "tasks.read", "tasks.write", "tasks.assign", "timeline.read", "pools.write", "staff.write",
]  # fmt: skip
_STUBS = {
    "Consent": (ConsentsServiceStub, consents_pb2),
    "Contact": (ContactsServiceStub, timeline_pb2),
    "Timeline": (TimelineServiceStub, timeline_pb2),
    "Task": (TasksServiceStub, tasks_pb2),
    "Pool": (PoolsServiceStub, staff_pb2),
    "Staff": (StaffServiceStub, staff_pb2),
    "Patient": (PatientsServiceStub, patients_pb2),
    "Related": (PatientsServiceStub, patients_pb2),
}


class Desk:
    """`rpc("ClaimTask", id=…)` calls as cora, a coordinator of `clinic`; `tell` puts an event on a topic and waits."""

    def __init__(self, harness: Harness) -> None:
        self.harness = harness
        self.clinic, self.elsewhere = new_id(), new_id()
        self.pools: dict[str, str] = {}

    async def open(self) -> None:
        """Sign people in and make the pools that work falls to."""
        await self.harness.staff("cora", WORK, clinics=[self.clinic])
        await self.harness.staff("carl", WORK, clinics=[self.clinic])
        await self.harness.staff("elias", WORK, clinics=[self.elsewhere])
        for purpose in ("coordination", "urgent", "privacy"):
            pool = await self.rpc("CreatePool", pool={"name": purpose, "purpose": purpose})
            self.pools[purpose] = pool.id

    async def rpc(self, method: str, who: str = "cora", **fields: Any) -> Any:
        """One call. Raises Problem."""
        stub, module = next(known for word, known in _STUBS.items() if word in method)
        request = getattr(module, f"{method}Request")(**fields)
        return await self.harness.call("patients", stub, method, request, who)

    async def patient(self, family: str = "Okonkwo", **more: Any) -> patients_pb2.Patient:
        """A patient of the clinic, reached by a mobile and by e-mail."""
        return await self.rpc(
            "CreatePatient",
            clinic_id=self.clinic,
            confirm_new=True,
            patient={
                "names": [{"family_name": family, "given_names": ["Ada"]}],
                "birth_date": "1980-02-29",
                "languages": ["es", "en"],
                "time_zone": "America/Denver",
                "telecom": [
                    {"system": "PHONE", "value": "(303) 555-0199", "use": "HOME"},
                    {"system": "PHONE", "value": "+1 720 534 8110", "use": "MOBILE", "rank": 1},
                    {"system": "EMAIL", "value": "Ada@Example.org"},
                ],
                **more,
            },
        )

    async def tasks(self, patient_id: str, **more: Any) -> list[Any]:
        """The patient's worklist."""
        return list((await self.rpc("ListTasks", patient_id=patient_id, **more)).tasks)

    def event(self, kind: str, patient_id: str, payload: Payload, *, version: int = 1, **more: Any) -> Event:
        """What another service might tell."""
        told = Event(
            id=new_id(),
            type=kind,
            tenant_id=self.harness.tenant_id,
            aggregate_id=payload.id,  # type: ignore[attr-defined]
            patient_id=patient_id,
            actor="system:test",
            version=version,
            payload_type=payload.DESCRIPTOR.full_name,
            payload=payload.SerializeToString(),
            **more,
        )
        if not told.HasField("time"):
            told.time.GetCurrentTime()
        return told

    async def tell(self, *events: Event, service: str = "scheduling") -> None:
        """Put events on a service's topic and wait until all of them were settled."""
        bus = self.harness.bus
        assert bus is not None
        await bus.append(f"care.{service}", [Message(one.aggregate_id, one.SerializeToString()) for one in events])
        # What follows under the same keys is marked after them, also where one of them was known before.
        ends = {one.aggregate_id: self._end(one) for one in events}
        await bus.append(f"care.{service}", [Message(key, end.SerializeToString()) for key, end in ends.items()])
        for end in ends.values():
            await self.until(self._marked, end.id)

    def _end(self, event: Event) -> Event:
        end = Event()
        end.CopyFrom(event)
        end.id, end.patient_id, end.type = new_id(), "", "consent.created"
        payload = patients_event(event.aggregate_id)
        end.payload_type, end.payload = payload.DESCRIPTOR.full_name, payload.SerializeToString()
        return end

    async def _marked(self, event_id: str) -> bool:
        async with self.harness.servers["patients"].database.engine.connect() as connection:
            found = await connection.execute(text("SELECT 1 FROM inbox WHERE event_id = :id"), {"id": event_id})
            return found.first() is not None

    async def until(self, asks: Any, *args: Any, seconds: float = 10.0) -> Any:
        """Ask until the answer is true."""
        async with asyncio.timeout(seconds):
            while not (answer := await asks(*args)):
                await asyncio.sleep(0.02)
        return answer


def patients_event(row_id: str) -> Payload:
    """A payload that leaves no trace without a patient."""
    from care.patients.v1 import events_pb2

    return events_pb2.ConsentEvent(id=row_id)


def stamp(at: datetime) -> Timestamp:
    """A time as messages hold it."""
    built = Timestamp()
    built.FromDatetime(at.astimezone(UTC).replace(tzinfo=None))
    return built

"""A referrals service at work, with a clinic, pools and staff that it has heard of."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from care.events.v1.envelope_pb2 import Event
from care.patients.v1 import events_pb2 as patients
from care.referrals.v1 import events_pb2 as told_pb
from care.referrals.v1 import referrals_pb2 as pb
from care.referrals.v1.referrals_pb2_grpc import ReferralsServiceStub
from care.scheduling.v1 import directory_pb2
from care.scheduling.v1 import events_pb2 as scheduling
from sqlalchemy import text

from chassis.bus import Message
from chassis.errors import Problem
from chassis.ids import new_id
from chassis.testing.harness import Harness
from services.referrals.service import SERVICE

WORK = ["referrals.read", "referrals.write", "referrals.triage", "referrals.acknowledge"]
State = pb.Referral.BusinessStatus


class Desk:
    """Coordinators at a clinic, and the other services' voices."""

    def __init__(self, harness):
        self.harness = harness

    async def open(self):
        self.clinic, self.other_clinic = new_id(), new_id()
        self.labelled_clinic, self.zoneless = new_id(), new_id()
        mine = [self.clinic, self.labelled_clinic, self.zoneless]
        self.cora = await self.harness.staff("cora", WORK, clinics=mine, clearances=["42CFRPart2"])
        self.elias = await self.harness.staff("elias", WORK, clinics=[self.other_clinic])
        self.general, self.cardiology, self.cardiology_here = new_id(), new_id(), new_id()
        clinics = [
            directory_pb2.Clinic(id=self.clinic, time_zone="America/New_York", holiday_region="US-MA"),
            directory_pb2.Clinic(id=self.other_clinic, time_zone="America/Chicago"),
            directory_pb2.Clinic(id=self.labelled_clinic, time_zone="America/New_York", security_labels=["42CFRPart2"]),
            directory_pb2.Clinic(id=self.zoneless),
        ]
        pools = [
            patients.PoolState(id=self.general, purpose="referrals", active=True),
            patients.PoolState(id=self.cardiology, purpose="referrals", specialty_codes=["cardiology"], active=True),
        ]
        await self.tell(*[self.event("clinic.changed", one) for one in clinics])
        await self.tell(*[self.event("pool.changed", one) for one in pools], service="patients")

    async def rpc(self, method, request, who="cora"):
        return await self.harness.call("referrals", ReferralsServiceStub, method, request, who)

    async def do(self, method, referral, who="cora", **fields):
        kinds = {"RecordPatientInformed": pb.RecordPatientInformedRequest}
        kind = kinds.get(method) or getattr(pb, f"{method}Request")
        return await self.rpc(method, kind(id=referral.id, **fields), who)

    async def read(self, referral, who="cora"):
        return await self.rpc("GetReferral", pb.GetReferralRequest(id=referral.id), who)

    async def patient(self):
        return await self.harness.subject(self.clinic, self.labelled_clinic)

    async def draft(self, who="cora", **fields):
        values = {"clinic_id": self.clinic, "specialty": {"code": "cardiology"}, "priority": 1, **fields}
        values["patient_id"] = values.get("patient_id") or await self.patient()
        return await self.rpc("CreateReferral", pb.CreateReferralRequest(referral=pb.Referral(**values)), who)

    async def accepted(self, **fields):
        referral = await self.draft(**fields)
        await self.do("SubmitReferral", referral)
        return await self.do("AcceptReferral", referral)

    # -- the others' voices --------------------------------------------------------------------------------------------

    def event(self, kind, payload, *, version=1, patient_id="", at=None, event_id=""):
        event = Event(
            id=event_id or new_id(),
            type=kind,
            tenant_id=self.harness.tenant_id,
            aggregate_id=payload.id,
            patient_id=patient_id,
            actor="system:test",
            version=version,
            payload_type=payload.DESCRIPTOR.full_name,
            payload=payload.SerializeToString(),
        )
        event.time.FromDatetime((at or datetime.now(UTC)).replace(tzinfo=None))
        return event

    def visit(self, kind, referral, *, version, visit_id, status, start=None, at=None, **fields):
        """An event of an appointment that is based on a referral."""
        start = start or datetime.now(UTC) + timedelta(days=3)
        payload = scheduling.AppointmentEvent(id=visit_id, referral_id=referral.id, status=status, **fields)
        payload.start_time.FromDatetime(start.replace(tzinfo=None))
        payload.end_time.FromDatetime((start + timedelta(minutes=30)).replace(tzinfo=None))
        return self.event(f"appointment.{kind}", payload, version=version, patient_id=referral.patient_id, at=at)

    async def tell(self, *events, service="scheduling"):
        """Put events on a service's topic, and wait until each was applied."""
        topic = f"care.{service}"
        await self.harness.bus.append(topic, [Message(one.aggregate_id, one.SerializeToString()) for one in events])
        await self.until(self._marked, {one.id for one in events})
        # Events of one key are applied in order: what follows the last one was seen after it.
        await asyncio.sleep(0.02)

    async def _marked(self, ids):
        async with self.harness.servers["referrals"].database.engine.connect() as connection:
            rows = await connection.execute(text("SELECT event_id::text FROM inbox"))
            return ids <= {row[0] for row in rows}

    async def until(self, asks, *args, seconds=10.0):
        async with asyncio.timeout(seconds):
            while not (answer := await asks(*args)):
                await asyncio.sleep(0.02)
            return answer

    async def told(self, referral):
        """The events of a referral in the outbox or on the topic, oldest first."""
        await self.until(self._outbox_empty)
        found = {}
        reader = self.harness.bus.reader(f"test-{new_id()}", ["care.referrals"])
        await reader.start()
        try:
            while batch := await reader.fetch(500, 0.2):
                for records in batch.values():
                    for record in records:
                        event = Event.FromString(record.value)
                        if event.aggregate_id == referral.id:
                            found[event.id] = event
        finally:
            await reader.stop()
        return [(event, told_pb.ReferralEvent.FromString(event.payload)) for event in found.values()]

    async def _outbox_empty(self):
        async with self.harness.servers["referrals"].database.engine.connect() as connection:
            return await connection.scalar(text("SELECT count(*) = 0 FROM outbox"))


@pytest.fixture(scope="package")
async def desk(database):
    harness = Harness(database)
    await harness.start(SERVICE)
    desk = Desk(harness)
    await desk.open()
    yield desk
    await harness.stop()


async def refused(awaitable):
    """The reason with which a call is refused."""
    with pytest.raises(Problem) as problem:
        await awaitable
    return problem.value.reason

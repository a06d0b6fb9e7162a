"""A made-up health system to book in: clinics, practitioners, rooms, visit types, patients, and a desk that calls."""

import asyncio
from datetime import UTC, datetime, timedelta

import asyncpg
from care.events.v1.envelope_pb2 import Event
from care.patients.v1 import events_pb2 as patients_pb2
from care.scheduling.v1 import appointments_pb2 as pb
from care.scheduling.v1 import availability_views_pb2 as views_pb2
from care.scheduling.v1 import directory_pb2, events_pb2
from care.scheduling.v1.appointments_pb2_grpc import AppointmentsServiceStub, AvailabilityServiceStub
from care.scheduling.v1.availability_views_pb2_grpc import AvailabilityViewsServiceStub
from care.scheduling.v1.directory_pb2_grpc import (
    ClinicsServiceStub,
    PractitionersServiceStub,
    ResourcesServiceStub,
    SchedulesServiceStub,
    VisitTypesServiceStub,
)
from sqlalchemy import event, text

from chassis.bus import Message
from chassis.errors import Problem
from chassis.ids import new_id

WORK = [
    "directory.read", "directory.write", "availability.search", "appointments.read", "appointments.book",
    "appointments.write", "appointments.check_in", "appointments.late_arrival", "appointments.void",
]  # fmt: skip
ALWAYS = [{"weekday": day, "start": "00:00", "end": "00:00"} for day in range(1, 8)]


def soon(days=2, hour=15):
    """A whole hour (UTC) some days ahead."""
    return (datetime.now(UTC) + timedelta(days=days)).replace(hour=hour, minute=0, second=0, microsecond=0)


class Desk:
    """Calls as staff of one clinic; `sam` may overbook too, `dora` may not undo a no-show by arriving."""

    def __init__(self, harness, bus_url=""):
        self.harness = harness
        self.bus_url = bus_url
        self._bus_url = bus_url.replace("+asyncpg", "")

    async def open(self, zone="America/New_York", **clinic):
        """The directory: a clinic open day and night, two practitioners, a visit of 30 minutes."""
        await self.harness.staff("ada", WORK)
        self.clinic = await self.a_clinic(zone, **clinic)
        await self.harness.staff("cora", WORK, clinics=[self.clinic])
        await self.harness.staff("sam", [*WORK, "appointments.overbook"], clinics=[self.clinic])
        await self.harness.staff("dora", sorted({*WORK} - {"appointments.late_arrival"}), clinics=[self.clinic])
        await self.harness.staff("elias", WORK, clinics=["01890000-0000-7000-8000-00000000dead"])
        self.doctor = await self.a_practitioner("Abara")
        self.other = await self.a_practitioner("Beck")
        self.visit = await self.a_visit_type("follow-up")
        return self

    # -- directory -----------------------------------------------------------------------------------------------------

    async def directory(self, stub, method, request):
        return (await self.harness.call("scheduling", stub, method, request, "ada")).id

    async def a_clinic(self, zone="America/New_York", **more):
        clinic = directory_pb2.Clinic(name="Riverside", time_zone=zone, **more)
        return await self.directory(
            ClinicsServiceStub, "CreateClinic", directory_pb2.CreateClinicRequest(clinic=clinic)
        )

    async def a_practitioner(self, family, hours=ALWAYS, clinic="", exceptions=(), **more):
        clinic = clinic or self.clinic
        practitioner = directory_pb2.Practitioner(
            name={"family_name": family}, roles=[{"clinic_id": clinic, **more.pop("role", {})}], **more
        )
        created = await self.directory(
            PractitionersServiceStub,
            "CreatePractitioner",
            directory_pb2.CreatePractitionerRequest(practitioner=practitioner),
        )
        if hours:
            await self.hours(created, hours, clinic, exceptions)
        return created

    async def hours(self, practitioner, hours=ALWAYS, clinic="", exceptions=()):
        schedule = directory_pb2.Schedule(
            practitioner_id=practitioner,
            clinic_id=clinic or self.clinic,
            weekly_hours=hours,
            exceptions=exceptions,
        )
        return await self.directory(
            SchedulesServiceStub, "CreateSchedule", directory_pb2.CreateScheduleRequest(schedule=schedule)
        )

    async def a_visit_type(self, code, duration_minutes=30, **more):
        visit_type = directory_pb2.VisitType(code=code, name=code, duration_minutes=duration_minutes, **more)
        return await self.directory(
            VisitTypesServiceStub, "CreateVisitType", directory_pb2.CreateVisitTypeRequest(visit_type=visit_type)
        )

    async def a_room(self, kind="exam-room", clinic="", **more):
        resource = directory_pb2.Resource(clinic_id=clinic or self.clinic, kind=kind, name="1", **more)
        return await self.directory(
            ResourcesServiceStub, "CreateResource", directory_pb2.CreateResourceRequest(resource=resource)
        )

    async def a_patient(self, **more):
        return await self.harness.subject(self.clinic, **more)

    # -- calls ---------------------------------------------------------------------------------------------------------

    async def __call__(self, method, request, subject="cora"):
        return await self.harness.call("scheduling", AppointmentsServiceStub, method, request, subject)

    async def do(self, verb, appointment, subject="cora", **more):
        """One verb, such as `do("CheckIn", appointment)`."""
        request = getattr(pb, f"{verb}AppointmentRequest")(id=getattr(appointment, "id", appointment), **more)
        return await self(f"{verb}Appointment", request, subject)

    async def search(self, visit_type="", subject="cora", **more):
        request = pb.SearchAvailabilityRequest(visit_type_id=visit_type or self.visit, **more)
        return await self.harness.call("scheduling", AvailabilityServiceStub, "SearchAvailability", request, subject)

    async def count(self, visit_type="", subject="cora", **more):
        search = pb.SearchAvailabilityRequest(visit_type_id=visit_type or self.visit, **more)
        request = views_pb2.SearchDayCountsRequest(search=search)
        return await self.harness.call("scheduling", AvailabilityViewsServiceStub, "SearchDayCounts", request, subject)

    async def panel(self, *steps, subject="cora", **more):
        request = views_pb2.SearchPanelRequest(steps=steps, **more)
        return await self.harness.call("scheduling", AvailabilityViewsServiceStub, "SearchPanel", request, subject)

    async def book(self, patient, start, practitioner="", subject="cora", **more):
        """A direct booking."""
        more = {"visit_type_id": self.visit, "clinic_id": self.clinic, **more}
        request = pb.CreateAppointmentRequest(
            patient_id=patient, practitioner_id=practitioner or self.doctor, start_time=start, **more
        )
        return await self("CreateAppointment", request, subject)

    async def hold(self, patient, slot, subject="cora", **more):
        request = pb.HoldAppointmentRequest(patient_id=patient, offer_token=slot.offer_token, **more)
        return await self("HoldAppointment", request, subject)

    async def move(self, appointment, start=None, subject="cora", **more):
        request = pb.RescheduleAppointmentRequest(id=appointment.id, **more)
        if start is not None:
            request.start_time.FromDatetime(start)
        return await self("RescheduleAppointment", request, subject)

    # -- the database --------------------------------------------------------------------------------------------------

    @property
    def database(self):
        return self.harness.servers["scheduling"].database

    async def sql(self, statement, **values):
        """Rows of one statement, straight from the database."""
        async with self.database.engine.begin() as connection:
            result = await connection.execute(text(statement), values)
            return result.all() if result.returns_rows else []

    async def shift(self, appointment, delta):
        """Make an appointment's own times look as if it had been made for another time."""
        await self.sql(
            "UPDATE appointment SET start_time = start_time + :delta, end_time = end_time + :delta WHERE id = :id",
            delta=delta,
            id=appointment.id,
        )

    async def overlaps(self):
        """Pairs of visits that stand at once, by appointments' own words: nothing of occupancy is looked at."""
        return await self.sql(OVERLAPS)

    async def told(self, appointment, count, payload=events_pb2.AppointmentEvent):
        """The events about one appointment in order, once there are `count`: (type, payload)."""
        connection = await asyncpg.connect(self._bus_url)
        try:
            for _ in range(100):
                rows = await connection.fetch(
                    """SELECT value FROM log WHERE key = $1 ORDER BY "offset" """,
                    getattr(appointment, "id", appointment),
                )
                if len(rows) >= count:
                    break
                await asyncio.sleep(0.05)
        finally:
            await connection.close()
        events = [Event.FromString(row["value"]) for row in rows]
        return [(one.type, payload.FromString(one.payload)) for one in events]

    async def hear(self, kind, patient_id, version=7, **state):
        """An event of patients, as the service hears it from the bus."""
        told = Event(
            id=new_id(),
            type=kind,
            tenant_id=self.harness.tenant_id,
            aggregate_id=patient_id,
            patient_id=patient_id,
            version=version,
            payload_type="care.patients.v1.PatientEvent",
            payload=patients_pb2.PatientEvent(id=patient_id, **state).SerializeToString(),
        )
        told.time.GetCurrentTime()
        await self.harness.bus.append("care.patients", [Message(patient_id, told.SerializeToString())])

    async def heard(self, patient_id, version):
        """Wait until a patient's state of this version was taken."""
        await self._until("SELECT 1 FROM patient_version WHERE patient_id = :id AND version >= :version",
                          True, id=patient_id, version=version)  # fmt: skip

    async def until_known_dead(self, patient_id, dead=True):
        """Wait until a patient is, or no longer is, known to have died."""
        await self._until("SELECT 1 FROM deceased_patient WHERE patient_id = :id", dead, id=patient_id)

    async def _until(self, statement, found, **values):
        async with asyncio.timeout(10):
            while bool(await self.sql(statement, **values)) is not found:
                await asyncio.sleep(0.02)


# Practitioner by time with buffers, room, and patient; what shares a time by permission is left out.
OVERLAPS = """
WITH taken AS (
  SELECT a.id, p.value->'actor'->>'id' AS who, p.value->>'role' AS role, a.overbooking,
         tstzrange((p.value->'period'->>'start_time')::timestamptz, (p.value->'period'->>'end_time')::timestamptz) AS at
    FROM appointment a, jsonb_array_elements(a.participants) AS p
   WHERE a.status IN ('BOOKED', 'ARRIVED', 'CHECKED_IN', 'FULFILLED', 'NOSHOW')
      OR (a.status = 'PENDING' AND a.hold_expire_time > clock_timestamp())
)
SELECT one.id, other.id, one.role FROM taken one JOIN taken other
    ON one.who = other.who AND one.id < other.id AND one.at && other.at
 WHERE one.overbooking = 0 AND other.overbooking = 0
"""


class Counted:
    """Counts what one write sends to the database while this is open, BEGIN and COMMIT too."""

    def __init__(self, engine):
        self._engine = engine.sync_engine
        self._sent = {}

    @property
    def statements(self):
        """Those of the write: loops at work beside it have connections of their own."""
        (sent,) = [one for one in self._sent.values() if any("INTO idempotency_key" in each for each in one)]
        return sent

    def _execute(self, connection, _cursor, statement, *_rest):
        self._sent.setdefault(connection, []).append(statement)

    def _begin(self, connection):
        self._sent.setdefault(connection, []).append("BEGIN")

    def _commit(self, connection):
        self._sent.setdefault(connection, []).append("COMMIT")

    def __enter__(self):
        for name, hear in self._listeners():
            event.listen(self._engine, name, hear)
        return self

    def __exit__(self, *_error):
        for name, hear in self._listeners():
            event.remove(self._engine, name, hear)

    def _listeners(self):
        return (("before_cursor_execute", self._execute), ("begin", self._begin), ("commit", self._commit))


async def refused(awaitable):
    """The reason for which a call is refused."""
    try:
        await awaitable
    except Problem as problem:
        return problem.reason
    raise AssertionError("it was not refused")

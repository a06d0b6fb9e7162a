"""Every public RPC leaves its audit row, answered or refused: who, which RPC, by which permission, about whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
import pytest_asyncio
from care.patients.v1 import staff_pb2
from care.patients.v1.staff_pb2_grpc import PoolsServiceStub
from care.scheduling.v1 import appointments_pb2, directory_pb2, sessions_pb2
from care.scheduling.v1.appointments_pb2_grpc import AppointmentsServiceStub, AvailabilityServiceStub
from care.scheduling.v1.directory_pb2_grpc import (
    ClinicsServiceStub,
    PractitionersServiceStub,
    SchedulesServiceStub,
    VisitTypesServiceStub,
)
from care.scheduling.v1.sessions_pb2_grpc import SessionsServiceStub
from google.protobuf.message import Message
from sqlalchemy import text

from chassis.errors import Problem
from chassis.ids import new_id
from chassis.model import Aggregate, Living
from gateway.contract import Rpc
from services.patients.roles import PERMISSIONS
from tests.minimal import minimal
from tests.planting import plant
from tests.surface import RPCS, aggregates, servers_of, short
from tests.world import World

_PUBLIC = [rpc for rpc in RPCS.values() if rpc.rule.permission and rpc.owner != "gateway"]
every_public_rpc = pytest.mark.parametrize("rpc", _PUBLIC, ids=[short(rpc.name) for rpc in _PUBLIC])
_ROW = text(
    "SELECT tenant_id::text, permission, subject_ids::text[] AS subjects FROM audit"
    " WHERE method = :method AND actor = :actor AND outcome = :outcome"
)


@dataclass
class Called:
    """What became of the calls of one RPC."""

    answered: bool = False
    subject_id: str = ""
    problem: Problem | None = None
    refused: Problem | None = None


class Walk:
    """Calls every public RPC as one who may all, and as one who may nothing."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.called: dict[str, Called] = {}
        self.auditor = self.outsider = self.clinic = self.doctor = self.practitioner = self.visit_type = self.pool = ""
        self.held = ""
        self.offers: list[str] = []
        self.booked: list[str] = []
        self.sessions: list[str] = []

    async def go(self) -> None:
        harness = self.world.harness
        await harness.staff("steward", sorted(PERMISSIONS))
        await self._open()
        self.auditor = await harness.staff("auditor", sorted(PERMISSIONS), clinics=[self.clinic])
        self.outsider = await harness.staff("outsider", [], clinics=[self.clinic])
        for rpc in _PUBLIC:
            self.called[rpc.name] = await self._call(rpc)
        await asyncio.sleep(1)  # pages of lists are noted within half a second

    async def _open(self) -> None:
        """A clinic with hours, pools, offers and two visits: what rows alone can't be."""
        clinic = directory_pb2.Clinic(name="Audited", time_zone="America/New_York")
        self.clinic = await self._make(
            ClinicsServiceStub, "CreateClinic", directory_pb2.CreateClinicRequest(clinic=clinic)
        )
        await self.world.harness.staff("booker", sorted(PERMISSIONS), clinics=[self.clinic])
        practitioner = directory_pb2.Practitioner(name={"family_name": "A"}, roles=[{"clinic_id": self.clinic}])
        request = directory_pb2.CreatePractitionerRequest(practitioner=practitioner)
        self.doctor = await self._make(PractitionersServiceStub, "CreatePractitioner", request)
        self.practitioner = await self._make(PractitionersServiceStub, "CreatePractitioner", request)
        visit_type = directory_pb2.VisitType(code="audited", name="Audited", duration_minutes=30, overbooking_cap=3)
        self.visit_type = await self._make(
            VisitTypesServiceStub, "CreateVisitType", directory_pb2.CreateVisitTypeRequest(visit_type=visit_type)
        )
        hours = [{"weekday": day, "start": "00:00", "end": "00:00"} for day in range(1, 8)]
        schedule = directory_pb2.Schedule(practitioner_id=self.doctor, clinic_id=self.clinic, weekly_hours=hours)
        await self._make(SchedulesServiceStub, "CreateSchedule", directory_pb2.CreateScheduleRequest(schedule=schedule))
        for purpose in ("privacy", "coordination", "referrals", "urgent"):
            pool = staff_pb2.Pool(name=f"audited {purpose}", purpose=purpose)
            self.pool = await self._make(PoolsServiceStub, "CreatePool", staff_pb2.CreatePoolRequest(pool=pool))
        search = appointments_pb2.SearchAvailabilityRequest(visit_type_id=self.visit_type, clinic_ids=[self.clinic])
        found = await self.world.harness.call(
            "scheduling", AvailabilityServiceStub, "SearchAvailability", search, "booker"
        )
        self.offers = [slot.offer_token for slot in found.slots][:20]
        patient_id = await self.world.harness.subject(self.clinic)
        book = appointments_pb2.CreateAppointmentRequest(patient_id=patient_id, offer_token=self.offers.pop())
        self.booked.append(await self._make(AppointmentsServiceStub, "CreateAppointment", book, "booker"))
        # Not the first of them: the walk-in is booked over whatever begins next.
        hold = appointments_pb2.HoldAppointmentRequest(
            patient_id=patient_id, offer_token=self.offers.pop(5), hold_seconds=3600
        )
        self.held = await self._make(AppointmentsServiceStub, "HoldAppointment", hold, "booker")
        session = sessions_pb2.CreateSessionRequest()
        _session(session, "", self)
        self.sessions.append(await self._make(SessionsServiceStub, "CreateSession", session, "booker"))
        # The directory reaches the other services by event.
        await asyncio.sleep(2)

    async def _make(self, stub: Any, method: str, request: Any, subject: str = "steward") -> str:
        server = "patients" if ".patients." in request.DESCRIPTOR.full_name else "scheduling"
        made = await self.world.harness.call(server, stub, method, request, subject)
        return str(made.id)

    async def _call(self, rpc: Rpc) -> Called:
        called, server = Called(), servers_of(rpc)[0]
        as_outsider, as_auditor = (self.world.harness.as_user(name) for name in ("outsider", "auditor"))
        async for request, subject_id in self._requests(rpc, server):
            if called.refused is None:
                called.refused = await self.world.outcome(rpc, server, request, as_outsider)
            called.subject_id = subject_id
            problem = await self.world.outcome(rpc, server, request, as_auditor)
            if problem is None:
                called.answered = True
                break
            if problem.reason != "ILLEGAL_TRANSITION":
                called.problem = problem
        return called

    async def _requests(self, rpc: Rpc, server: str) -> AsyncIterator[tuple[Message, str]]:
        """Requests to try: about a row in each status of its lifecycle, one after the other."""
        models = [model for model in aggregates(server) if model.__name__ == rpc.method.output_type.name]
        if not models or "id" not in rpc.method.input_type.fields_by_name:
            models = list(aggregates(server))[:1]
        for model in models:
            for status in _statuses(model):
                row_id = new_id()
                await self.world.harness.subject(self.clinic, patient_id=row_id)
                async with self.world.harness.servers[server].database.engine.begin() as connection:
                    for each in aggregates(server):
                        values = self._values(rpc, each, status if each is model else None)
                        await plant(
                            connection,
                            each,
                            tenant_id=self.world.harness.tenant_id,
                            row_id=row_id,
                            subject_id=row_id,
                            **values,
                        )
                yield self._request(rpc, row_id), row_id

    def _values(self, rpc: Rpc, model: type[Aggregate], status: Any) -> dict[str, Any]:
        values = {"clinic_id": self.clinic, "pool_id": self.pool, "telecom": [_PHONE], "time_zone": "America/New_York"}
        if rpc.method.name == "RevokeCalendarFeed":
            values["maker_id"] = self.auditor
        if status is not None and issubclass(model, Living):
            values[model.status_field] = status
            before = next(
                (arrow.sources[0] for arrow in model.lifecycle if arrow.target is status and arrow.sources), status
            )
            values["history"] = [  # type: ignore[assignment]
                {"action": "planted", "from_status": before.name, "to_status": status.name, "time": _ago(0).isoformat()}
            ]
        if rpc.method.name == "AcceptClearingVisit":
            values |= {"appointment_id": self.booked[-1], "hold_id": self.held}
        if rpc.method.name == "BookSchedulingRequest" and model.__name__ == "Appointment":
            values["status"] = "BOOKED"
        if rpc.method.name == "GetClearing" and model.__name__ == "Clearing":
            values |= {"windows": [[self.clinic, 0, 1]]}  # type: ignore[dict-item]
        if rpc.method.name == "GetVideoRoom":
            values |= {"modality": "VIDEO"}
        if rpc.method.name == "EnrollSession":
            values |= {"start_time": _ago(-24), "end_time": _ago(-25)}  # type: ignore[dict-item]
        if rpc.method.name == "EnrollSession" and model.__name__ == "Session":
            values |= {"visit_type_id": self.visit_type, "clinic_id": self.clinic, "practitioner_id": self.doctor}
        if rpc.method.name in ("ArriveAppointment", "MarkNoShowAppointment"):
            values |= {"start_time": _ago(2), "end_time": _ago(1)}  # type: ignore[dict-item]
        return values

    def _request(self, rpc: Rpc, row_id: str) -> Message:
        known = {"id": row_id, "etag": '"1"', "patient_id": row_id, "patient_ids": [row_id], "clinic_id": self.clinic}
        request = minimal(rpc.method.input_type, known)
        if more := BY_HAND.get(rpc.method.name):
            more(request, row_id, self)
        return request


_PHONE = {"system": "PHONE", "value": "+12125550123", "e164": "+12125550123", "line_type": "MOBILE"}


def _ago(hours: float) -> datetime:
    return datetime.now(UTC).replace(microsecond=0) - timedelta(hours=hours)


def _statuses(model: type[Aggregate]) -> list[Any]:
    if not issubclass(model, Living):
        return [None]
    table: Any = model.__table__
    return list(table.c[model.status_field].type.enum_class)


def _set(message: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(message, name, value)


def _identified(resource: Any, **values: Any) -> None:
    resource.identifiers.add(system="https://audited.test", value=new_id())
    _set(resource, **values)


def _reschedule(request: Any, _row_id: str, walk: Walk) -> None:
    request.id, request.etag, request.offer_token = walk.booked[-1], "", walk.offers.pop()


def _questionnaire(request: Any, _row_id: str, _walk: Walk) -> None:
    request.questionnaire.name = f"audited-{new_id()}"
    for value in (1, 2):
        request.questionnaire.items[0].options.add(value=value)


def _session(request: Any, _row_id: str, walk: Walk) -> None:
    _set(request, name="Audited", visit_type_id=walk.visit_type, clinic_id=walk.clinic, practitioner_id=walk.doctor)
    request.capacity = 2
    request.start_time.FromDatetime(_ago(-24 * (40 + 10 * len(walk.sessions))))


def _move_session(request: Any, _row_id: str, walk: Walk) -> None:
    _set(request, id=walk.sessions[0], etag="", practitioner_id="")
    request.start_time.FromDatetime(_ago(-24 * 70))


def _series(request: Any, _row_id: str, walk: Walk) -> None:
    day = (datetime.now(UTC) + timedelta(days=30)).date()
    _set(request, visit_type_id=walk.visit_type, practitioner_id=walk.practitioner)
    _set(request, start=f"{day}T10:00", rule="FREQ=WEEKLY;COUNT=2")


# What the descriptors alone can't know.
BY_HAND: dict[str, Callable[[Any, str, Walk], object]] = {
    "CreateQuestionnaire": _questionnaire,
    "UpsertPatient": lambda request, _id, _walk: _identified(request.patient),
    "UpsertClinic": lambda request, _id, _walk: _identified(request.clinic, name="A", time_zone="America/New_York"),
    "UpsertPractitioner": lambda request, _id, _walk: (
        _identified(request.practitioner) or _set(request.practitioner.name, family_name="A")
    ),
    "SearchPatients": lambda request, _id, _walk: request.MergeFrom(
        type(request)(family_name="Nobody", birth_date="1901-01-01")
    ),
    "CreateTask": lambda request, _id, _walk: request.task.due_time.FromDatetime(_ago(-24)),
    "SnoozeTask": lambda request, _id, _walk: request.snooze_time.FromDatetime(_ago(-24)),
    "CreateReferral": lambda request, _id, _walk: setattr(request.referral.specialty, "code", "394579002"),
    "CreateClinic": lambda request, _id, _walk: _set(request.clinic, name="A", time_zone="America/New_York"),
    "CreatePractitioner": lambda request, _id, _walk: _set(request.practitioner.name, family_name="A"),
    "CreateVisitType": lambda request, _id, _walk: _set(
        request.visit_type, code=f"v-{new_id()}", name="A", duration_minutes=30
    ),
    "CreateSchedule": lambda request, _id, walk: _set(request.schedule, practitioner_id=walk.practitioner),
    "SearchAvailability": lambda request, _id, walk: _set(request, visit_type_id=walk.visit_type),
    "SearchDayCounts": lambda request, _id, walk: _set(request.search, visit_type_id=walk.visit_type),
    "SearchPanel": lambda request, _id, walk: [_set(step, visit_type_id=walk.visit_type) for step in request.steps],
    "GetStrandedAppointments": lambda request, row_id, _walk: _set(request, schedule_id=row_id),
    "GetHoursPreview": lambda request, _id, walk: _set(request, practitioner_id=walk.practitioner),
    "CreateResource": lambda request, _id, _walk: _set(request.resource, kind="audited", name="A"),
    "CreateAppointment": lambda request, _id, walk: _set(request, clinic_id="", offer_token=walk.offers.pop()),
    "WalkInAppointment": lambda request, _id, walk: (
        _set(request, visit_type_id=walk.visit_type, practitioner_id=walk.doctor)
        or _set(request.overbooking, reason="audited")
    ),
    "HoldAppointment": lambda request, _id, walk: _set(request, offer_token=walk.offers.pop()),
    "ImportAppointment": lambda request, _id, walk: (
        _set(request, visit_type_id=walk.visit_type, practitioner_id=walk.practitioner, visit_type_code="")
        or request.start_time.FromDatetime(_ago(-24 * 60))
    ),
    "RescheduleAppointment": _reschedule,
    "CreateSeries": _series,
    "PreviewSeries": lambda request, row_id, walk: _series(request.series, row_id, walk),
    "RescheduleSeries": lambda request, _id, _walk: _set(request, scope=3, time="10:00"),
    "CancelSeries": lambda request, _id, _walk: _set(request, scope=3) or _set(request.reason, code="pat"),
    "CreateSession": _session,
    "RescheduleSession": _move_session,
    "CancelSession": lambda request, _id, _walk: _set(request.reason, code="prov"),
    "BookSchedulingRequest": lambda request, row_id, _walk: _set(request, appointment_id=row_id),
    "CreateWaitlistEntry": lambda request, _id, walk: _set(request, visit_type_id=walk.visit_type),
    "GetWaitlistScore": lambda request, _id, _walk: _set(request, clinic_id=""),
    "ClearDay": lambda request, _id, walk: _set(request, id=walk.practitioner, clinic_id="", date="2099-01-05"),
    "CancelAppointment": lambda request, _id, _walk: _set(request.reason, code="pat"),
    "CreateConsent": lambda request, _id, _walk: _set(request.consent, contact_value=_PHONE["value"]),
    "CreateLogin": lambda request, _id, _walk: _set(request.login.person, type="Patient"),
    "CreatePool": lambda request, _id, _walk: _set(request.pool, name=f"audited {new_id()}"),
}


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def walk(world: World) -> Walk:
    walk = Walk(world)
    await walk.go()
    return walk


@every_public_rpc
async def test_an_answered_call_leaves_its_row(walk: Walk, rpc: Rpc) -> None:
    called = walk.called[rpc.name]
    problem = called.problem
    assert called.answered, (problem, problem and problem.message, walk.world.why(servers_of(rpc)[0]))
    rows = await _rows(walk, rpc, walk.auditor, "OK")
    assert len(rows) == 1
    assert (rows[0].tenant_id, rows[0].permission) == (walk.world.harness.tenant_id, rpc.rule.permission)


@every_public_rpc
async def test_a_refused_call_leaves_its_row(walk: Walk, rpc: Rpc) -> None:
    refused = walk.called[rpc.name].refused
    assert refused is not None and refused.code is grpc.StatusCode.PERMISSION_DENIED
    rows = await _rows(walk, rpc, walk.outsider, "PERMISSION_DENIED")
    assert len(rows) == 1
    assert (rows[0].tenant_id, rows[0].permission) == (walk.world.harness.tenant_id, rpc.rule.permission)


async def _rows(walk: Walk, rpc: Rpc, principal_id: str, outcome: str) -> list[Any]:
    engine = walk.world.harness.servers[servers_of(rpc)[0]].database.engine
    async with engine.connect() as connection:
        found = await connection.execute(
            _ROW, {"method": rpc.name, "actor": f"staff:{principal_id}", "outcome": outcome}
        )
        return list(found.all())

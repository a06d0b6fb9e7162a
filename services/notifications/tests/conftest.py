"""Notifications among real neighbours: gRPC servers for patients, scheduling and feedback, SMTP and HTTP providers."""

import asyncio
import base64
import email
import email.policy
import socket
import time
from collections import deque
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs

import grpc
import pytest
import uvicorn
from aiosmtpd.smtp import SMTP
from care.events.v1.envelope_pb2 import Event
from care.feedback.v1 import feedback_pb2, feedback_pb2_grpc
from care.feedback.v1.events_pb2 import SurveyEvent
from care.patients.v1 import patients_pb2, patients_pb2_grpc
from care.scheduling.v1 import (
    appointments_pb2,
    appointments_pb2_grpc,
    directory_pb2,
    waitlist_pb2,
    waitlist_pb2_grpc,
)
from care.scheduling.v1.events_pb2 import AppointmentEvent
from care.scheduling.v1.waitlist_pb2 import WaitlistEvent
from care.type.v1 import type_pb2
from sqlalchemy import select, text
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from chassis.bus import Message as BusMessage
from chassis.ids import new_id
from chassis.testing.harness import Harness
from services.notifications.message import Message, Reminder
from services.notifications.service import SERVICE

Status = appointments_pb2.Appointment.Status


def zone_at(hour: int) -> str:
    """A zone whose clock shows about this hour right now."""
    ahead = (hour - datetime.now(UTC).hour + 12) % 24 - 12
    return f"Etc/GMT{-ahead:+d}" if ahead else "Etc/UTC"


class Neighbours(
    patients_pb2_grpc.PatientsServiceServicer,
    appointments_pb2_grpc.AppointmentsServiceServicer,
    feedback_pb2_grpc.SurveyInvitationsServiceServicer,
    waitlist_pb2_grpc.WaitlistServiceServicer,
):
    """What patients, scheduling and feedback answer, set by the test."""

    def __init__(self):
        self.people = {}
        self.visits = {}
        self.tokens = {}
        self.offers = {}
        self.away = set()
        self.delay = 0.0
        self.asked = []

    async def _answer(self, service, context):
        if self.delay:
            await asyncio.sleep(self.delay)
        if service in self.away:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "")

    async def BatchGetRecipients(self, request, context):
        await self._answer("patients", context)
        found = []
        for item in request.items:
            channel = type_pb2.Channel.Code.Name(item.channel)
            self.asked.append((item.patient_id, channel, item.purpose))
            known = self.people.get(item.patient_id, {"refusal": "not-found"})
            values = known.get(channel, {"refusal": "no-contact"}) if "refusal" not in known else known
            found.append(patients_pb2.BatchGetRecipientsResponse.Recipient(**values))
        return patients_pb2.BatchGetRecipientsResponse(recipients=found)

    async def BatchGetAppointments(self, request, context):
        found = [self.visits[one] for one in request.ids if one in self.visits]
        # What was true when the read began: a change that comes while the answer is under way isn't in it.
        copies = [appointments_pb2.Appointment.FromString(one.SerializeToString()) for one in found]
        await self._answer("scheduling", context)
        return appointments_pb2.BatchGetAppointmentsResponse(appointments=copies)

    async def IssueSurveyLink(self, request, context):
        await self._answer("feedback", context)
        return feedback_pb2.IssueSurveyLinkResponse(token=self.tokens.get(request.invitation_id, ""))

    async def IssueWaitlistOfferLink(self, request, context):
        await self._answer("scheduling", context)
        return self.offers.get(request.offer_id, waitlist_pb2.IssueWaitlistOfferLinkResponse())


class SmsProvider:
    """A provider of texts over HTTP; `faults` are statuses or ("slow", seconds) for the next calls."""

    def __init__(self):
        self.taken, self.calls, self.faults = [], [], deque()
        self.authorization = ""
        self._http = None

    async def start(self):
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        route = Route("/2010-04-01/Accounts/{account}/Messages.json", self._create, methods=["POST"])
        config = uvicorn.Config(
            Starlette(routes=[route]), log_config=None, access_log=False, lifespan="off", loop="none", ws="none"
        )
        self._http = uvicorn.Server(config)
        self._task = asyncio.create_task(self._http._serve([listening]))
        while not self._http.started:
            await asyncio.sleep(0.005)

    async def stop(self):
        self._http.should_exit = self._http.force_exit = True
        await self._task

    async def _create(self, request):
        at = time.monotonic()
        form = {name: values[-1] for name, values in parse_qs((await request.body()).decode()).items()}
        self.authorization = request.headers["authorization"]
        self.calls.append((at, form))
        fault = self.faults.popleft() if self.faults else None
        if isinstance(fault, int):
            code = 21211 if fault == 400 else 20000 + fault
            return JSONResponse({"code": code, "message": f"To {form['To']} is bad", "status": fault}, fault)
        self.taken.append(form)
        if fault is not None:
            await asyncio.sleep(fault[1])
        return JSONResponse({"sid": f"SM{len(self.taken):032x}"}, 201)

    def texts(self, number):
        return [form["Body"] for _, form in self.calls if form["To"] == number]


class MailServer:
    """A real SMTP server; `faults` are replies to the next messages."""

    def __init__(self):
        self.letters, self.faults = [], deque()

    async def start(self):
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: SMTP(self, hostname="mail.test"), "127.0.0.1", 0)
        self.url = f"smtp://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def stop(self):
        self._server.close()

    async def handle_RCPT(self, _server, _session, envelope, address, _options):
        if address.startswith("nobody"):
            return "550 5.1.1 No such user"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server, _session, envelope):
        if self.faults:
            return self.faults.popleft()
        letter = email.message_from_bytes(envelope.content, policy=email.policy.default)
        self.letters.append(letter)
        return "250 2.0.0 OK"

    def to(self, address):
        return [letter for letter in self.letters if letter["To"] == address]


class World:
    """One notifications service with its neighbours and providers; events come over the bus."""

    def __init__(self, database):
        self.urls = {}

        async def noted(name):
            self.urls[name] = await database(name)
            return self.urls[name]

        self.harness = Harness(noted)
        self.neighbours, self.sms, self.mail = Neighbours(), SmsProvider(), MailServer()
        self.numbers = iter(range(100, 1000000))

    async def start(self, **settings):
        self._grpc = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        port = self._grpc.add_insecure_port("127.0.0.1:0")
        patients_pb2_grpc.add_PatientsServiceServicer_to_server(self.neighbours, self._grpc)
        appointments_pb2_grpc.add_AppointmentsServiceServicer_to_server(self.neighbours, self._grpc)
        feedback_pb2_grpc.add_SurveyInvitationsServiceServicer_to_server(self.neighbours, self._grpc)
        waitlist_pb2_grpc.add_WaitlistServiceServicer_to_server(self.neighbours, self._grpc)
        await self._grpc.start()
        await self.sms.start()
        await self.mail.start()
        target = f"ipv4:127.0.0.1:{port}"
        self.settings = {
            "peers": {name: target for name in ("patients", "scheduling", "feedback")},
            "sms_url": self.sms.url,
            "sms_account": "ACtest",
            "sms_token": "secret",
            "sms_from": "+18005550199",
            "smtp_url": self.mail.url,
            "smtp_from": "care@clinic.test",
            "link_base_url": "http://care.test",
            "send_every": 0.1,
            "service_away_pause": 0.2,
            "retry_base": 0.1,
            **settings,
        }
        await self.harness.start(SERVICE, **self.settings)
        self.server = self.harness.servers["notifications"]

    async def stop(self):
        await self.harness.stop()
        await self.sms.stop()
        await self.mail.stop()
        await self._grpc.stop(0)

    @property
    def tenant_id(self):
        return self.harness.tenant_id

    # -- what others tell ----------------------------------------------------------------------------------------------

    async def tell(self, kind, payload, *, aggregate_id, patient_id="", version=1, labels=(), at=None, actor="staff:x"):
        event = Event(
            id=new_id(),
            type=kind,
            tenant_id=self.tenant_id,
            aggregate_id=aggregate_id,
            patient_id=patient_id,
            actor=actor,
            version=version,
            security_labels=labels,
            payload_type=payload.DESCRIPTOR.full_name,
            payload=payload.SerializeToString(),
            traceparent=getattr(self, "traceparent", ""),
        )
        event.time.FromDatetime(at or datetime.now(UTC))
        topic = "care.feedback" if kind.startswith("survey") else "care.scheduling"
        await self.harness.bus.append(topic, [BusMessage(aggregate_id, event.SerializeToString())])
        return event

    async def clinic(self, *, zone=None, version=1, **values):
        clinic = directory_pb2.Clinic(id=new_id(), name="Maple Street Clinic", time_zone=zone or zone_at(13), **values)
        clinic.telecom.add(system=type_pb2.ContactPoint.PHONE, value="(617) 555-0100", e164="+16175550100")
        clinic.address.lines.append("12 Maple Street")
        await self.tell("clinic.changed", clinic, aggregate_id=clinic.id, version=version)
        return clinic

    async def visit_type(self, **values):
        made = directory_pb2.VisitType(
            id=new_id(), **{"name": "Dermatology follow-up", "preparation": {"en": "Eat nothing."}, **values}
        )
        await self.tell("visit_type.changed", made, aggregate_id=made.id)
        return made

    async def patient(self, *, sms=True, mail=True, languages=("en",), zone=None, address=None):
        """A patient who agreed to texts and e-mail; answers id, number and address."""
        patient_id, number = await self.harness.subject(), f"+1617555{next(self.numbers):04d}"
        address = address or f"p{number[1:]}@mail.test"
        common = {
            "languages": list(languages), "time_zones": [zone or zone_at(13)], "given_name": "Ada",
            "consent_version": 3,
        }  # fmt: skip
        self.neighbours.people[patient_id] = {
            "SMS": {"contact_value": number, "consent_id": new_id(), **common} if sms else {"refusal": "no-consent"},
            "EMAIL": {"contact_value": address, "consent_id": new_id(), **common}
            if mail
            else {"refusal": "no-contact"},
        }
        return patient_id, number, address

    async def visit(
        self,
        patient_id,
        clinic,
        visit_type,
        *,
        ahead=timedelta(days=10),
        status="BOOKED",
        labels=(),
        part=0,
        imported=False,
    ):
        """A visit that scheduling has, told as booked."""
        visit = appointments_pb2.Appointment(
            id=new_id(), patient_id=patient_id, clinic_id=clinic.id, visit_type_id=visit_type.id, schedule_version=1,
            time_zone=clinic.time_zone, status=status,
        )  # fmt: skip
        visit.start_time.FromDatetime(datetime.now(UTC) + ahead)
        self.neighbours.visits[visit.id] = visit
        await self.tell_visit("booked", visit, version=1, labels=labels, part=part, imported=imported)
        return visit

    async def tell_visit(self, what, visit, *, version, previous="", labels=(), at=None, actor="staff:x", reason="",
                         part=0, imported=False):  # fmt: skip
        payload = AppointmentEvent(
            id=visit.id, clinic_id=visit.clinic_id, visit_type_id=visit.visit_type_id, status=Status.Name(visit.status),
            previous_status=previous, start_time=visit.start_time, schedule_version=visit.schedule_version,
            time_zone=visit.time_zone, reason_code=reason, series_part=part,
            imported=imported,
        )  # fmt: skip
        return await self.tell(
            f"appointment.{what}", payload, aggregate_id=visit.id, patient_id=visit.patient_id, version=version,
            labels=labels, at=at, actor=actor,
        )  # fmt: skip

    async def cancel(self, visit, *, version=2, reason="pat", part=0):
        visit.status = Status.Value("CANCELLED")
        return await self.tell_visit("cancelled", visit, version=version, previous="BOOKED", reason=reason, part=part)

    async def invite(self, patient_id, clinic, token="SECRETTOKEN"):
        survey = SurveyEvent(id=new_id(), clinic_id=clinic.id, status="INVITED")
        survey.recipient.type, survey.recipient.id = "Patient", patient_id
        self.neighbours.tokens[survey.id] = token
        await self.tell("survey.invited", survey, aggregate_id=survey.id, patient_id=patient_id)
        return survey

    async def offer(
        self, patient_id, clinic, *, token="w-SECRETTOKEN", ends_in=timedelta(hours=2), channel="", version=2
    ):
        """A slot that scheduling offers from its waitlist."""
        start = datetime(2027, 3, 16, 14, 0, tzinfo=UTC)
        event = WaitlistEvent(id=new_id(), offer_id=new_id(), clinic_id=clinic.id, status="OFFERED", channel=channel)
        event.start_time.FromDatetime(start)
        event.offer_expire_time.FromDatetime(datetime.now(UTC) + ends_in)
        self.neighbours.offers[event.offer_id] = waitlist_pb2.IssueWaitlistOfferLinkResponse(
            token=token, start_time=start, expire_time=event.offer_expire_time, clinic_id=clinic.id
        )
        await self.tell("waitlist.offered", event, aggregate_id=event.id, patient_id=patient_id, version=version)
        return event

    # -- what came of it -----------------------------------------------------------------------------------------------

    async def reminders(self, visit):
        async with self.server.database.reading() as db:
            query = select(Reminder).where(Reminder.appointment_id == visit.id)
            rows = await db.execute(query.order_by(Reminder.schedule_version, Reminder.due_time))
            return list(rows.scalars())

    async def messages(self, about_id):
        async with self.server.database.reading() as db:
            rows = await db.execute(select(Message).where(Message.about_id == about_id).order_by(Message.create_time))
            return list(rows.scalars())

    async def told(self, message_id, count=1, seconds=30.0):
        """The events about a message, in order, once there are so many on the bus."""
        reader = self.harness.bus.reader(f"test-{new_id()}", ["care.notifications"])
        await reader.start()
        found, until = [], time.monotonic() + seconds
        while len(found) < count and time.monotonic() < until:
            for records in (await reader.fetch(500, 0.2)).values():
                events = (Event.FromString(record.value) for record in records)
                found += [event for event in events if event.aggregate_id == message_id]
        await reader.stop()
        return found

    async def make_due(self, visit, offset):
        """Let a planned reminder fall due now."""
        async with self.server.database.engine.begin() as connection:
            await connection.execute(
                text(
                    "UPDATE reminder SET due_time = clock_timestamp()"
                    " WHERE appointment_id = :id AND \"offset\" = :offset AND status = 'ACTIVE'"
                ),
                {"id": visit.id, "offset": offset},
            )
        self.server.runtime.loops["send"].wake()

    async def message(self, about_id, *statuses, kind=None, seconds=60.0):
        """The message about something, once it has one of these statuses."""
        until = time.monotonic() + seconds
        while True:
            found = [one for one in await self.messages(about_id) if kind in (None, one.kind)]
            if found and found[-1].status.name in statuses:
                return found[-1]
            if time.monotonic() > until:
                raise AssertionError([(one.kind, one.status.name, one.status_reason) for one in found])
            await asyncio.sleep(0.03)

    async def planned(self, visit, count, seconds=30.0):
        """The ledger of a visit, once it has so many rows."""
        return await eventually(lambda: self.reminders(visit), lambda rows: len(rows) >= count, seconds)

    def metric(self, name, **labels):
        return self.server.telemetry.registry.get_sample_value(name, labels) or 0.0


async def eventually(read, holds, seconds=30.0):
    """What `read` answers, once `holds` is true of it."""
    until = time.monotonic() + seconds
    while True:
        found = await read()
        if holds(found):
            return found
        assert time.monotonic() < until, found
        await asyncio.sleep(0.03)


@pytest.fixture(scope="module")
async def world(database):
    world = World(database)
    await world.start()
    yield world
    await world.stop()


@pytest.fixture
async def a_world(database):
    """`await a_world(send_lease=1)`: a service of the test's own."""
    made = []

    async def make(**settings):
        made.append(World(database))
        await made[-1].start(**settings)
        return made[-1]

    yield make
    for world in made:
        await world.stop()


@pytest.fixture(scope="module")
async def clinic(world):
    return await world.clinic()


@pytest.fixture(scope="module")
async def visit_type(world):
    return await world.visit_type()


@pytest.fixture(autouse=True)
def healed(request):
    """No fault outlives its test."""
    yield
    if "world" in request.fixturenames:
        world = request.getfixturevalue("world")
        world.neighbours.away.clear()
        world.neighbours.delay = 0.0
        world.sms.faults.clear()
        world.mail.faults.clear()


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

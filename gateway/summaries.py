"""What the gateway joins from several services: legs side by side, each with its own deadline, the answer never whole or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, cast
from urllib.parse import quote

from care.audit.v1 import audit_pb2
from care.feedback.v1 import feedback_pb2
from care.gateway.v1 import gateway_pb2
from care.notifications.v1 import notifications_pb2
from care.patients.v1 import patients_pb2, tasks_pb2
from care.referrals.v1 import referrals_pb2
from care.scheduling.v1 import appointments_pb2, requests_pb2, waitlist_pb2
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from grpc import StatusCode

from chassis.errors import Problem, Unavailable
from gateway.batching import Reads
from gateway.codec import Codec, descriptor_of

Json = dict[str, Any]
Aggregate = Callable[[Any, str], Awaitable[Json]]

SERVICES: Final = ("patients", "scheduling", "referrals", "notifications", "feedback")
_SECTION: Final = 10
_ACCESSES: Final = 50
_MOST_ACCESSES: Final = 200
# Not asked for again later and not the service's fault: the whole request is refused alike.
_REFUSALS: Final = frozenset(
    (StatusCode.NOT_FOUND, StatusCode.PERMISSION_DENIED, StatusCode.INVALID_ARGUMENT, StatusCode.UNAUTHENTICATED)
)
_MISSED_WITHIN: Final = timedelta(days=365)
_STATUS = appointments_pb2.Appointment
_WAITS: Final = (waitlist_pb2.WaitlistEntry.WAITING, waitlist_pb2.WaitlistEntry.OFFERED)
# A visit may begin, and be over, before its time.
_UPCOMING: Final = (_STATUS.PENDING, _STATUS.BOOKED, _STATUS.ARRIVED, _STATUS.CHECKED_IN, _STATUS.FULFILLED)


@dataclass(frozen=True, slots=True)
class Away:
    """A leg without an answer: the service is away, or the caller may not ask it."""

    service: str
    problem: Problem

    @property
    def degraded(self) -> bool:
        """A missing permission leaves the section out too, but no service failed."""
        return self.problem.code is not StatusCode.PERMISSION_DENIED


@dataclass(frozen=True, slots=True)
class Ask:
    """One leg: which read of which service, and what it answers."""

    service: str
    method: str
    request: Message
    answer: type[Message]

    @classmethod
    def appointments(cls, **wanted: Any) -> Ask:
        """A section's worth of a patient's visits."""
        return cls(
            "scheduling",
            "care.scheduling.v1.AppointmentsService/ListAppointments",
            appointments_pb2.ListAppointmentsRequest(page_size=_SECTION, **wanted),
            appointments_pb2.ListAppointmentsResponse,
        )


class Summaries:
    """Serves `care.gateway.v1.SummariesService`; `timeout` is the seconds that a leg may take."""

    def __init__(self, reads: Reads, codec: Codec, *, timeout: float = 0.8) -> None:
        self._reads = reads
        self._codec = codec
        self._timeout = timeout
        self.rpcs: Mapping[str, Aggregate] = {
            "care.gateway.v1.SummariesService/GetPatientSummary": self.get_patient_summary,
            "care.gateway.v1.SummariesService/GetCallSheet": self.get_call_sheet,
            "care.gateway.v1.SummariesService/ListPatientAccesses": self.list_patient_accesses,
        }

    async def get_patient_summary(self, request: gateway_pb2.GetPatientSummaryRequest, token: str) -> Json:
        """PatientSummary as JSON. Raises what `GetPatient` raises; Unavailable `PATIENTS_UNAVAILABLE` without patients."""
        patient_id, now = request.id, _timestamp(datetime.now(UTC))
        sections, link = await self._about(
            patient_id,
            token,
            {
                "upcoming": _upcoming(patient_id, now),
                "past": Ask.appointments(patient_ids=[patient_id], start_time_before=now, descending=True),
                "referrals": _open_referrals(patient_id),
                "messages": Ask(
                    "notifications",
                    "care.notifications.v1.MessagesService/ListMessages",
                    notifications_pb2.ListMessagesRequest(patient_ids=[patient_id], page_size=_SECTION),
                    notifications_pb2.ListMessagesResponse,
                ),
                "invitations": Ask(
                    "feedback",
                    "care.feedback.v1.SurveyInvitationsService/ListSurveyInvitations",
                    feedback_pb2.ListSurveyInvitationsRequest(patient_ids=[patient_id], page_size=_SECTION),
                    feedback_pb2.ListSurveyInvitationsResponse,
                ),
                "responses": Ask(
                    "feedback",
                    "care.feedback.v1.QuestionnaireResponsesService/ListQuestionnaireResponses",
                    feedback_pb2.ListQuestionnaireResponsesRequest(patient_ids=[patient_id], page_size=_SECTION),
                    feedback_pb2.ListQuestionnaireResponsesResponse,
                ),
                "tasks": Ask(
                    "patients",
                    "care.patients.v1.TasksService/ListTasks",
                    tasks_pb2.ListTasksRequest(patient_id=patient_id, include_snoozed=True, page_size=_SECTION),
                    tasks_pb2.ListTasksResponse,
                ),
            },
        )
        sections.add(
            "appointments",
            f"/v1/appointments?patientIds={link}",
            {"upcoming": ("upcoming", "appointments"), "past": ("past", "appointments")},
        )
        sections.add("referrals", f"/v1/referrals?patientIds={link}&open=true", {"open": ("referrals", "referrals")})
        sections.add("messages", f"/v1/messages?patientIds={link}", {"latest": ("messages", "messages")})
        sections.add(
            "feedback",
            f"/v1/questionnaireResponses?patientIds={link}",
            {"invitations": ("invitations", "invitations"), "responses": ("responses", "responses")},
        )
        sections.add("tasks", f"/v1/tasks?patientId={link}&includeSnoozed=true", {"open": ("tasks", "tasks")})
        return sections.done()

    async def get_call_sheet(self, request: gateway_pb2.GetCallSheetRequest, token: str) -> Json:
        """CallSheet as JSON. Raises as the summary does."""
        patient_id, now = request.id, datetime.now(UTC)
        sections, link = await self._about(
            patient_id,
            token,
            {
                "upcoming": _upcoming(patient_id, _timestamp(now)),
                "missed": Ask.appointments(
                    patient_ids=[patient_id],
                    statuses=[_STATUS.NOSHOW],
                    start_time_from=_timestamp(now - _MISSED_WITHIN),
                    descending=True,
                ),
                "referrals": _open_referrals(patient_id),
                "requests": Ask(
                    "scheduling",
                    "care.scheduling.v1.SchedulingRequestsService/ListSchedulingRequests",
                    requests_pb2.ListSchedulingRequestsRequest(patient_ids=[patient_id], open=True, page_size=_SECTION),
                    requests_pb2.ListSchedulingRequestsResponse,
                ),
                "waits": Ask(
                    "scheduling",
                    "care.scheduling.v1.WaitlistService/ListWaitlistEntries",
                    waitlist_pb2.ListWaitlistEntriesRequest(
                        patient_ids=[patient_id], statuses=_WAITS, page_size=_SECTION
                    ),
                    waitlist_pb2.ListWaitlistEntriesResponse,
                ),
                "preferences": Ask(
                    "scheduling",
                    "care.scheduling.v1.SchedulingPreferencesService/GetSchedulingPreferences",
                    requests_pb2.GetSchedulingPreferencesRequest(patient_id=patient_id),
                    requests_pb2.SchedulingPreferences,
                ),
            },
        )
        sections.add(
            "appointments",
            f"/v1/appointments?patientIds={link}",
            {"upcoming": ("upcoming", "appointments"), "missed": ("missed", "appointments")},
        )
        sections.add("referrals", f"/v1/referrals?patientIds={link}&open=true", {"open": ("referrals", "referrals")})
        sections.add(
            "requests",
            f"/v1/schedulingRequests?patientIds={link}&open=true",
            {"open": ("requests", "scheduling_requests")},
        )
        sections.add("waitlist", f"/v1/waitlistEntries?patientIds={link}", {"open": ("waits", "waitlist_entries")})
        sections.put("preferences")
        return sections.done()

    async def _about(self, patient_id: str, token: str, asks: Mapping[str, Ask]) -> tuple[_Sections, str]:
        """The sections of an answer about a patient, begun with the patient, and the id as links have it.

        Raises what `GetPatient` raises; Unavailable `PATIENTS_UNAVAILABLE`.
        """
        who = Ask(
            "patients",
            "care.patients.v1.PatientsService/GetPatient",
            patients_pb2.GetPatientRequest(id=patient_id),
            patients_pb2.Patient,
        )
        legs = {name: asyncio.create_task(self._leg(ask, token)) for name, ask in {"patient": who, **asks}.items()}
        try:
            patient = await legs["patient"]
            if isinstance(patient, Away):
                raise _without_patients(patient.problem)
            await asyncio.gather(*legs.values())
        finally:
            for each in legs.values():
                each.cancel()
        sections = _Sections(self._codec, {name: each.result() for name, each in legs.items()})
        sections.put("patient")
        return sections, quote(patient_id)

    async def list_patient_accesses(self, request: gateway_pb2.ListPatientAccessesRequest, token: str) -> Json:
        """ListPatientAccessesResponse as JSON. Raises what patients answers; else what another service refuses with."""
        size = min(request.page_size if request.page_size > 0 else _ACCESSES, _MOST_ACCESSES)
        asked = audit_pb2.ListAccessesRequest(patient_id=request.id, page_size=size)
        answers = await asyncio.gather(
            *(
                self._leg(
                    Ask(service, "care.audit.v1.AuditService/ListAccesses", asked, audit_pb2.ListAccessesResponse),
                    token,
                )
                for service in SERVICES
            )
        )
        first = answers[0]
        if isinstance(first, Away):
            if first.problem.code in _REFUSALS:
                raise first.problem
            for each in answers:
                if isinstance(each, Away) and each.problem.code in _REFUSALS:
                    raise each.problem
        if all(isinstance(each, Away) for each in answers):
            raise Unavailable("SERVICE_UNAVAILABLE", "No service answers; try again.")
        accesses = [access for each in answers if not isinstance(each, Away) for access in cast(Any, each).accesses]
        accesses.sort(key=lambda access: (access.time.seconds, access.time.nanos), reverse=True)
        encode = self._codec.encoder(descriptor_of(audit_pb2.Access))
        answer: Json = {}
        if accesses:
            answer["accesses"] = [encode(access) for access in accesses]
        if degraded := [each.service for each in answers if isinstance(each, Away)]:
            answer["degraded"] = degraded
        return answer

    async def _leg(self, ask: Ask, token: str) -> Message | Away:
        try:
            answer = await self._reads.read(ask.service, ask.method, ask.request, token, self._timeout)
        except Problem as problem:
            return Away(ask.service, problem)
        except TimeoutError:
            return Away(ask.service, Unavailable("SERVICE_UNAVAILABLE", "A service did not answer in time."))
        return ask.answer.FromString(answer)


class _Sections:
    """An answer being put together: a section whose legs did not all answer is absent, never empty."""

    def __init__(self, codec: Codec, legs: Mapping[str, Message | Away]) -> None:
        self._codec = codec
        self._legs = legs
        self._degraded: dict[str, None] = {}
        self.answer: Json = {}

    def add(self, name: str, link: str, lists: Mapping[str, tuple[str, str]]) -> None:
        """A section of lists, by their key in it: the leg, and the repeated field of its answer."""
        if any([self._is_away(leg) for leg, _ in lists.values()]):
            return
        section: Json = {}
        for key, (leg, field) in lists.items():
            rows = getattr(self._legs[leg], field)
            if rows:
                encode = self._codec.encoder(rows[0].DESCRIPTOR)
                section[key] = [encode(row) for row in rows]
        section["next"] = link
        self.answer[name] = section

    def put(self, name: str) -> None:
        """A section that is the one message of the leg of its name."""
        if not self._is_away(name):
            message = cast(Message, self._legs[name])
            self.answer[name] = self._codec.encoder(descriptor_of(type(message)))(message)

    def _is_away(self, leg: str) -> bool:
        answer = self._legs[leg]
        if isinstance(answer, Away) and answer.degraded:
            self._degraded[answer.service] = None
        return isinstance(answer, Away)

    def done(self) -> Json:
        if self._degraded:
            self.answer["degraded"] = list(self._degraded)
        return self.answer


def _without_patients(problem: Problem) -> Problem:
    if problem.code in _REFUSALS:
        return problem
    return Unavailable("PATIENTS_UNAVAILABLE", "The service patients does not answer; try again.", service="patients")


def _timestamp(at: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(at)
    return stamp


def _upcoming(patient_id: str, now: Timestamp) -> Ask:
    return Ask.appointments(patient_ids=[patient_id], statuses=_UPCOMING, start_time_from=now)


def _open_referrals(patient_id: str) -> Ask:
    return Ask(
        "referrals",
        "care.referrals.v1.ReferralsService/ListReferrals",
        referrals_pb2.ListReferralsRequest(patient_ids=[patient_id], open=True, page_size=_SECTION),
        referrals_pb2.ListReferralsResponse,
    )

"""What the gateway joins from several services: legs side by side, each with its own deadline, the answer never whole or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar
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
M = TypeVar("M", bound=Message)

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
        patient_id = request.id
        now = Timestamp()
        now.FromDatetime(datetime.now(UTC))

        def leg(service: str, method: str, asked: Message, kind: type[M]) -> asyncio.Task[M | Away]:
            return asyncio.create_task(self._leg(service, method, asked, kind, token))

        patient = leg(
            "patients",
            "care.patients.v1.PatientsService/GetPatient",
            patients_pb2.GetPatientRequest(id=patient_id),
            patients_pb2.Patient,
        )
        tasks = leg(
            "patients",
            "care.patients.v1.TasksService/ListTasks",
            tasks_pb2.ListTasksRequest(patient_id=patient_id, include_snoozed=True, page_size=_SECTION),
            tasks_pb2.ListTasksResponse,
        )
        appointments = "care.scheduling.v1.AppointmentsService/ListAppointments"
        upcoming = leg(
            "scheduling",
            appointments,
            appointments_pb2.ListAppointmentsRequest(
                patient_ids=[patient_id], statuses=_UPCOMING, start_time_from=now, page_size=_SECTION
            ),
            appointments_pb2.ListAppointmentsResponse,
        )
        past = leg(
            "scheduling",
            appointments,
            appointments_pb2.ListAppointmentsRequest(
                patient_ids=[patient_id], start_time_before=now, descending=True, page_size=_SECTION
            ),
            appointments_pb2.ListAppointmentsResponse,
        )
        referrals = leg(
            "referrals",
            "care.referrals.v1.ReferralsService/ListReferrals",
            referrals_pb2.ListReferralsRequest(patient_ids=[patient_id], open=True, page_size=_SECTION),
            referrals_pb2.ListReferralsResponse,
        )
        messages = leg(
            "notifications",
            "care.notifications.v1.MessagesService/ListMessages",
            notifications_pb2.ListMessagesRequest(patient_ids=[patient_id], page_size=_SECTION),
            notifications_pb2.ListMessagesResponse,
        )
        invitations = leg(
            "feedback",
            "care.feedback.v1.SurveyInvitationsService/ListSurveyInvitations",
            feedback_pb2.ListSurveyInvitationsRequest(patient_ids=[patient_id], page_size=_SECTION),
            feedback_pb2.ListSurveyInvitationsResponse,
        )
        responses = leg(
            "feedback",
            "care.feedback.v1.QuestionnaireResponsesService/ListQuestionnaireResponses",
            feedback_pb2.ListQuestionnaireResponsesRequest(patient_ids=[patient_id], page_size=_SECTION),
            feedback_pb2.ListQuestionnaireResponsesResponse,
        )
        legs = (patient, tasks, upcoming, past, referrals, messages, invitations, responses)
        try:
            who = await patient
            if isinstance(who, Away):
                raise _without_patients(who.problem)
            await asyncio.gather(*legs)
        finally:
            for each in legs:
                each.cancel()

        sections = _Sections(self._codec)
        sections.answer["patient"] = sections.encode(who)
        link = quote(patient_id)
        sections.add(
            "appointments",
            f"/v1/appointments?patientIds={link}",
            {"upcoming": (upcoming.result(), "appointments"), "past": (past.result(), "appointments")},
        )
        sections.add(
            "referrals", f"/v1/referrals?patientIds={link}&open=true", {"open": (referrals.result(), "referrals")}
        )
        sections.add("messages", f"/v1/messages?patientIds={link}", {"latest": (messages.result(), "messages")})
        sections.add(
            "feedback",
            f"/v1/questionnaireResponses?patientIds={link}",
            {
                "invitations": (invitations.result(), "invitations"),
                "responses": (responses.result(), "responses"),
            },
        )
        sections.add("tasks", f"/v1/tasks?patientId={link}&includeSnoozed=true", {"open": (tasks.result(), "tasks")})
        return sections.done()

    async def get_call_sheet(self, request: gateway_pb2.GetCallSheetRequest, token: str) -> Json:
        """CallSheet as JSON. Raises as the summary does."""
        patient_id = request.id
        now, year = Timestamp(), Timestamp()
        now.FromDatetime(datetime.now(UTC))
        year.FromDatetime(datetime.now(UTC) - _MISSED_WITHIN)

        def leg(service: str, method: str, asked: Message, kind: type[M]) -> asyncio.Task[M | Away]:
            return asyncio.create_task(self._leg(service, method, asked, kind, token))

        appointments = "care.scheduling.v1.AppointmentsService/ListAppointments"
        patient = leg(
            "patients",
            "care.patients.v1.PatientsService/GetPatient",
            patients_pb2.GetPatientRequest(id=patient_id),
            patients_pb2.Patient,
        )
        upcoming = leg(
            "scheduling",
            appointments,
            appointments_pb2.ListAppointmentsRequest(
                patient_ids=[patient_id], statuses=_UPCOMING, start_time_from=now, page_size=_SECTION
            ),
            appointments_pb2.ListAppointmentsResponse,
        )
        missed = leg(
            "scheduling",
            appointments,
            appointments_pb2.ListAppointmentsRequest(
                patient_ids=[patient_id],
                statuses=[_STATUS.NOSHOW],
                start_time_from=year,
                descending=True,
                page_size=_SECTION,
            ),
            appointments_pb2.ListAppointmentsResponse,
        )
        referrals = leg(
            "referrals",
            "care.referrals.v1.ReferralsService/ListReferrals",
            referrals_pb2.ListReferralsRequest(patient_ids=[patient_id], open=True, page_size=_SECTION),
            referrals_pb2.ListReferralsResponse,
        )
        requests = leg(
            "scheduling",
            "care.scheduling.v1.SchedulingRequestsService/ListSchedulingRequests",
            requests_pb2.ListSchedulingRequestsRequest(patient_ids=[patient_id], open=True, page_size=_SECTION),
            requests_pb2.ListSchedulingRequestsResponse,
        )
        waits = leg(
            "scheduling",
            "care.scheduling.v1.WaitlistService/ListWaitlistEntries",
            waitlist_pb2.ListWaitlistEntriesRequest(patient_ids=[patient_id], statuses=_WAITS, page_size=_SECTION),
            waitlist_pb2.ListWaitlistEntriesResponse,
        )
        wishes = leg(
            "scheduling",
            "care.scheduling.v1.SchedulingPreferencesService/GetSchedulingPreferences",
            requests_pb2.GetSchedulingPreferencesRequest(patient_id=patient_id),
            requests_pb2.SchedulingPreferences,
        )
        legs = (patient, upcoming, missed, referrals, requests, waits, wishes)
        try:
            who = await patient
            if isinstance(who, Away):
                raise _without_patients(who.problem)
            await asyncio.gather(*legs)
        finally:
            for each in legs:
                each.cancel()

        sections = _Sections(self._codec)
        sections.answer["patient"] = sections.encode(who)
        link = quote(patient_id)
        sections.add(
            "appointments",
            f"/v1/appointments?patientIds={link}",
            {"upcoming": (upcoming.result(), "appointments"), "missed": (missed.result(), "appointments")},
        )
        sections.add(
            "referrals", f"/v1/referrals?patientIds={link}&open=true", {"open": (referrals.result(), "referrals")}
        )
        sections.add(
            "requests",
            f"/v1/schedulingRequests?patientIds={link}&open=true",
            {"open": (requests.result(), "scheduling_requests")},
        )
        sections.add(
            "waitlist", f"/v1/waitlistEntries?patientIds={link}", {"open": (waits.result(), "waitlist_entries")}
        )
        sections.put("preferences", wishes.result())
        return sections.done()

    async def list_patient_accesses(self, request: gateway_pb2.ListPatientAccessesRequest, token: str) -> Json:
        """ListPatientAccessesResponse as JSON. Raises what patients answers; else what another service refuses with."""
        size = min(request.page_size if request.page_size > 0 else _ACCESSES, _MOST_ACCESSES)
        asked = audit_pb2.ListAccessesRequest(patient_id=request.id, page_size=size)
        answers = await asyncio.gather(
            *(
                self._leg(
                    service, "care.audit.v1.AuditService/ListAccesses", asked, audit_pb2.ListAccessesResponse, token
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
        accesses = [access for each in answers if not isinstance(each, Away) for access in each.accesses]
        accesses.sort(key=lambda access: (access.time.seconds, access.time.nanos), reverse=True)
        encode = self._codec.encoder(descriptor_of(audit_pb2.Access))
        answer: Json = {}
        if accesses:
            answer["accesses"] = [encode(access) for access in accesses]
        if degraded := [each.service for each in answers if isinstance(each, Away)]:
            answer["degraded"] = degraded
        return answer

    async def _leg(self, service: str, method: str, asked: Message, kind: type[M], token: str) -> M | Away:
        try:
            answer = await self._reads.read(service, method, asked, token, self._timeout)
        except Problem as problem:
            return Away(service, problem)
        except TimeoutError:
            return Away(service, Unavailable("SERVICE_UNAVAILABLE", "A service did not answer in time."))
        return kind.FromString(answer)


class _Sections:
    """The summary being put together: a section whose legs did not all answer is absent, never empty."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._degraded: dict[str, None] = {}
        self.answer: Json = {}

    def encode(self, message: Message) -> Json:
        encoded: Json = self._codec.encoder(descriptor_of(type(message)))(message)
        return encoded

    def add(self, name: str, link: str, lists: Mapping[str, tuple[Message | Away, str]]) -> None:
        """`lists`: key in the section to (answer, the answer's repeated field)."""
        away = [answer for answer, _ in lists.values() if isinstance(answer, Away)]
        if away:
            self._degraded.update((each.service, None) for each in away if each.degraded)
            return
        section: Json = {}
        for key, (answer, field) in lists.items():
            rows = getattr(answer, field)
            if rows:
                encode = self._codec.encoder(rows[0].DESCRIPTOR)
                section[key] = [encode(row) for row in rows]
        section["next"] = link
        self.answer[name] = section

    def put(self, name: str, answer: Message | Away) -> None:
        """A section that is one message."""
        if not isinstance(answer, Away):
            self.answer[name] = self.encode(answer)
        elif answer.degraded:
            self._degraded[answer.service] = None

    def done(self) -> Json:
        if self._degraded:
            self.answer["degraded"] = list(self._degraded)
        return self.answer


def _without_patients(problem: Problem) -> Problem:
    if problem.code in _REFUSALS:
        return problem
    return Unavailable("PATIENTS_UNAVAILABLE", "The service patients does not answer; try again.", service="patients")

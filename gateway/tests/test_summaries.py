"""Aggregates: joined, batched, and honest about who did not answer."""

import asyncio
from typing import Any

import pytest
from care.audit.v1 import audit_pb2
from care.feedback.v1 import feedback_pb2
from care.patients.v1 import patients_pb2, tasks_pb2
from care.referrals.v1 import referrals_pb2
from care.scheduling.v1 import appointments_pb2, requests_pb2, waitlist_pb2

from chassis.errors import NotFound, PermissionDenied, Problem, Unavailable
from gateway.tests.conftest import SERVICES, Start, World

ID = "0198c5a2-6f00-7b3d-8a51-3f4c2d9e7a10"
BATCH = "care.batch.v1.BatchService/BatchRead"
PATH = f"/v1/patients/{ID}/summary"


def raising(problem: Problem) -> Any:
    async def handler(request: Any, metadata: dict[str, str]) -> Any:
        raise problem

    return handler


def furnish(world: World) -> None:
    async def patient(request: Any, metadata: dict[str, str]) -> Any:
        return patients_pb2.Patient(id=request.id, etag='"1"')

    async def tasks(request: Any, metadata: dict[str, str]) -> Any:
        return tasks_pb2.ListTasksResponse(tasks=[tasks_pb2.Task(id="t")])

    async def appointments(request: Any, metadata: dict[str, str]) -> Any:
        which = "past" if request.descending else "next"
        return appointments_pb2.ListAppointmentsResponse(appointments=[appointments_pb2.Appointment(id=which)])

    async def referrals(request: Any, metadata: dict[str, str]) -> Any:
        assert request.open
        return referrals_pb2.ListReferralsResponse(referrals=[referrals_pb2.Referral(id="r")])

    async def responses(request: Any, metadata: dict[str, str]) -> Any:
        return feedback_pb2.ListQuestionnaireResponsesResponse(responses=[feedback_pb2.QuestionnaireResponse(score=9)])

    world.services["patients"].answers |= {
        "care.patients.v1.PatientsService/GetPatient": patient,
        "care.patients.v1.TasksService/ListTasks": tasks,
    }
    world.services["scheduling"].answers["care.scheduling.v1.AppointmentsService/ListAppointments"] = appointments
    world.services["referrals"].answers["care.referrals.v1.ReferralsService/ListReferrals"] = referrals
    world.services["feedback"].answers["care.feedback.v1.QuestionnaireResponsesService/ListQuestionnaireResponses"] = (
        responses
    )


WHOLE = {
    "patient": {"id": ID, "etag": '"1"'},
    "appointments": {
        "upcoming": [{"id": "next"}],
        "past": [{"id": "past"}],
        "next": f"/v1/appointments?patientIds={ID}",
    },
    "referrals": {"open": [{"id": "r"}], "next": f"/v1/referrals?patientIds={ID}&open=true"},
    "messages": {"next": f"/v1/messages?patientIds={ID}"},
    "feedback": {"responses": [{"score": 9}], "next": f"/v1/questionnaireResponses?patientIds={ID}"},
    "tasks": {"open": [{"id": "t"}], "next": f"/v1/tasks?patientId={ID}&includeSnoozed=true"},
}


@pytest.mark.parametrize("batched", [True, False])
async def test_a_summary_joins_five_services_in_one_answer(start: Start, batched: bool) -> None:
    world = await start(batch_legs=batched)
    furnish(world)
    answer = await world.http.get(PATH)
    assert (answer.status_code, answer.json()) == (200, WHOLE)
    for name in SERVICES:
        calls = [method for method, _ in world.services[name].seen]
        assert (BATCH in calls) == batched
        assert calls.count(BATCH) == int(batched)


async def test_every_link_of_a_summary_leads_somewhere(world: World) -> None:
    furnish(world)
    for section in (await world.http.get(PATH)).json().values():
        if "next" in section:
            assert (await world.http.get(section["next"])).status_code == 200


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("stopped", ["scheduling", "referrals", "notifications", "feedback"])
async def test_a_service_that_is_away_costs_its_section_and_nothing_else(
    start: Start, stopped: str, batched: bool
) -> None:
    world = await start(batch_legs=batched)
    furnish(world)
    await world.services[stopped].server.stop(0)
    answer = (await world.http.get(PATH)).json()
    section = {"scheduling": "appointments", "notifications": "messages"}.get(stopped, stopped)
    assert answer == {**{key: value for key, value in WHOLE.items() if key != section}, "degraded": [stopped]}


async def test_a_slow_service_is_degraded_at_its_legs_deadline(start: Start) -> None:
    world = await start(leg_timeout=0.2)
    furnish(world)

    async def slow(request: Any, metadata: dict[str, str]) -> Any:
        await asyncio.sleep(5)

    world.services["referrals"].answers["care.referrals.v1.ReferralsService/ListReferrals"] = slow
    async with asyncio.timeout(2):
        answer = await world.http.get(PATH)
    assert answer.json()["degraded"] == ["referrals"]
    assert "referrals" not in answer.json()


async def test_half_of_a_section_is_no_section(world: World) -> None:
    furnish(world)
    world.services["feedback"].answers["care.feedback.v1.SurveyInvitationsService/ListSurveyInvitations"] = raising(
        Unavailable("DATABASE_UNAVAILABLE", "x")
    )
    answer = (await world.http.get(PATH)).json()
    assert "feedback" not in answer
    assert answer["degraded"] == ["feedback"]


async def test_a_section_that_the_caller_may_not_see_is_absent_but_nothing_is_degraded(world: World) -> None:
    furnish(world)
    world.services["referrals"].answers["care.referrals.v1.ReferralsService/ListReferrals"] = raising(
        PermissionDenied("PERMISSION_MISSING", "x")
    )
    answer = (await world.http.get(PATH)).json()
    assert "referrals" not in answer
    assert "degraded" not in answer


@pytest.mark.parametrize(
    ("problem", "status", "reason"),
    [
        (NotFound(), 404, "NOT_FOUND"),
        (PermissionDenied("PERMISSION_MISSING", "x"), 403, "PERMISSION_MISSING"),
        (Unavailable("DATABASE_UNAVAILABLE", "x"), 503, "PATIENTS_UNAVAILABLE"),
    ],
)
async def test_without_the_patient_there_is_no_summary(
    world: World, problem: Problem, status: int, reason: str
) -> None:
    furnish(world)
    world.services["patients"].answers["care.patients.v1.PatientsService/GetPatient"] = raising(problem)
    answer = await world.http.get(PATH)
    assert (answer.status_code, answer.json()["error"]["details"][0]["reason"]) == (status, reason)


async def test_without_patients_the_summary_is_503(start: Start) -> None:
    world = await start()
    furnish(world)
    await world.services["patients"].server.stop(0)
    assert (await world.http.get(PATH)).status_code == 503


async def test_many_callers_share_batches_and_each_keeps_token_and_trace(start: Start) -> None:
    world = await start(leg_timeout=10.0)  # 40 at once on a busy machine
    furnish(world)
    asked: dict[str, set[str]] = {}

    async def patient(request: Any, metadata: dict[str, str]) -> Any:
        asked.setdefault(request.id, set()).add(metadata["authorization"])
        assert metadata["traceparent"]
        return patients_pb2.Patient(id=request.id, time_zone=metadata["authorization"])

    world.services["patients"].answers["care.patients.v1.PatientsService/GetPatient"] = patient
    tokens = [world.token(f"staff-{number}") for number in range(40)]

    async def ask(number: int) -> None:
        one = f"0198c5a2-6f00-7b3d-8a51-{number:012d}"
        headers = {"authorization": f"Bearer {tokens[number]}"}
        answer = (await world.http.get(f"/v1/patients/{one}/summary", headers=headers)).json()
        assert answer["patient"] == {"id": one, "timeZone": f"Bearer {tokens[number]}"}

    await asyncio.gather(*(ask(number) for number in range(40)))
    batches = [metadata for method, metadata in world.services["patients"].seen if method == BATCH]
    assert len(batches) < 40
    assert all(metadata["authorization"] not in {f"Bearer {token}" for token in tokens} for metadata in batches)
    assert asked == {f"0198c5a2-6f00-7b3d-8a51-{n:012d}": {f"Bearer {tokens[n]}"} for n in range(40)}


async def test_one_refused_item_refuses_no_other(start: Start) -> None:
    world = await start(leg_timeout=10.0)
    furnish(world)
    hidden = "0198c5a2-6f00-7b3d-8a51-000000000404"

    async def patient(request: Any, metadata: dict[str, str]) -> Any:
        if request.id == hidden:
            raise NotFound
        return patients_pb2.Patient(id=request.id)

    world.services["patients"].answers["care.patients.v1.PatientsService/GetPatient"] = patient
    answers = await asyncio.gather(*(world.http.get(f"/v1/patients/{one}/summary") for one in (ID, hidden, ID)))
    assert [answer.status_code for answer in answers] == [200, 404, 200]


async def test_a_slow_batch_does_not_hold_up_the_next(start: Start) -> None:
    world = await start(leg_timeout=3)
    furnish(world)
    slow_id = "0198c5a2-6f00-7b3d-8a51-00000000510a"

    async def patient(request: Any, metadata: dict[str, str]) -> Any:
        if request.id == slow_id:
            await asyncio.sleep(1)
        return patients_pb2.Patient(id=request.id)

    world.services["patients"].answers["care.patients.v1.PatientsService/GetPatient"] = patient
    slow = [asyncio.create_task(world.http.get(f"/v1/patients/{slow_id}/summary")) for _ in range(3)]
    await asyncio.sleep(0.1)
    async with asyncio.timeout(0.8):
        assert (await world.http.get(PATH)).status_code == 200
    assert [(await each).status_code for each in slow] == [200, 200, 200]


async def test_accesses_of_all_services_come_latest_first_and_say_who_is_away(start: Start) -> None:
    world = await start()
    for number, name in enumerate(SERVICES):

        async def accesses(request: Any, metadata: dict[str, str], name: str = name, number: int = number) -> Any:
            assert (request.patient_id, request.page_size) == (ID, 200)
            answer = audit_pb2.ListAccessesResponse()
            for second in (number, number + 10):
                answer.accesses.add(service=name).time.seconds = second
            return answer

        world.services[name].answers["care.audit.v1.AuditService/ListAccesses"] = accesses
    await world.services["feedback"].server.stop(0)
    answer = (await world.http.get(f"/v1/patients/{ID}/accesses?pageSize=1000")).json()
    times = [each["time"] for each in answer["accesses"]]
    assert len(times) == 8
    assert times == sorted(times, reverse=True)
    assert answer["degraded"] == ["feedback"]


async def test_accesses_of_a_hidden_patient_are_not_found(start: Start) -> None:
    world = await start()
    for name in SERVICES:
        world.services[name].answers["care.audit.v1.AuditService/ListAccesses"] = raising(NotFound())
    assert (await world.http.get(f"/v1/patients/{ID}/accesses")).status_code == 404
    await world.services["patients"].server.stop(0)
    assert (await world.http.get(f"/v1/patients/{ID}/accesses")).status_code == 404


def furnish_calls(world: World) -> None:
    furnish(world)
    sheet = "care.scheduling.v1."

    async def appointments(request: Any, metadata: dict[str, str]) -> Any:
        missed = list(request.statuses) == [appointments_pb2.Appointment.NOSHOW]
        assert request.HasField("start_time_from") and missed == request.descending
        kind = "missed" if missed else "next"
        return appointments_pb2.ListAppointmentsResponse(appointments=[appointments_pb2.Appointment(id=kind)])

    async def requests(request: Any, metadata: dict[str, str]) -> Any:
        assert request.open
        asked = requests_pb2.SchedulingRequest(id="q", attempts=[{"outcome": "VOICEMAIL"}])
        return requests_pb2.ListSchedulingRequestsResponse(scheduling_requests=[asked])

    async def waits(request: Any, metadata: dict[str, str]) -> Any:
        return waitlist_pb2.ListWaitlistEntriesResponse(waitlist_entries=[waitlist_pb2.WaitlistEntry(id="w")])

    async def wishes(request: Any, metadata: dict[str, str]) -> Any:
        return requests_pb2.SchedulingPreferences(patient_id=request.patient_id, barriers=[{"code": "transport"}])

    world.services["scheduling"].answers |= {
        f"{sheet}AppointmentsService/ListAppointments": appointments,
        f"{sheet}SchedulingRequestsService/ListSchedulingRequests": requests,
        f"{sheet}WaitlistService/ListWaitlistEntries": waits,
        f"{sheet}SchedulingPreferencesService/GetSchedulingPreferences": wishes,
    }


CALL = f"/v1/patients/{ID}/callSheet"
SHEET = {
    "patient": {"id": ID, "etag": '"1"'},
    "appointments": {
        "upcoming": [{"id": "next"}],
        "missed": [{"id": "missed"}],
        "next": f"/v1/appointments?patientIds={ID}",
    },
    "referrals": {"open": [{"id": "r"}], "next": f"/v1/referrals?patientIds={ID}&open=true"},
    "requests": {
        "open": [{"id": "q", "attempts": [{"outcome": "VOICEMAIL"}]}],
        "next": f"/v1/schedulingRequests?patientIds={ID}&open=true",
    },
    "waitlist": {"open": [{"id": "w"}], "next": f"/v1/waitlistEntries?patientIds={ID}"},
    "preferences": {"patientId": ID, "barriers": [{"code": "transport"}]},
}


async def test_who_has_the_patient_on_the_phone_reads_all_in_one_call(start: Start) -> None:
    world = await start()
    furnish_calls(world)
    answer = await world.http.get(CALL)
    assert (answer.status_code, answer.json()) == (200, SHEET)


async def test_a_call_sheet_leaves_out_who_does_not_answer_and_is_none_without_the_patient(start: Start) -> None:
    world = await start()
    furnish_calls(world)
    world.services["referrals"].answers["care.referrals.v1.ReferralsService/ListReferrals"] = raising(
        Unavailable("SERVICE_UNAVAILABLE", "No.")
    )
    world.services["scheduling"].answers["care.scheduling.v1.WaitlistService/ListWaitlistEntries"] = raising(
        PermissionDenied("PERMISSION_MISSING", "No.", permission="waitlist.read")
    )
    answer = (await world.http.get(CALL)).json()
    assert answer == {
        **{key: SHEET[key] for key in SHEET.keys() - {"referrals", "waitlist"}},
        "degraded": ["referrals"],
    }
    world.services["patients"].answers["care.patients.v1.PatientsService/GetPatient"] = raising(NotFound("NOT_FOUND"))
    assert (await world.http.get(CALL)).status_code == 404

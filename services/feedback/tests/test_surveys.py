"""Surveys over gRPC and the bus: planned after a visit, sent when due, answered once by link, heard where it matters."""

import asyncio
import time
import uuid

import grpc
import pytest
from care.events.v1.envelope_pb2 import Event
from care.feedback.v1 import events_pb2
from care.feedback.v1 import feedback_pb2 as pb
from care.feedback.v1.feedback_pb2_grpc import (
    QuestionnaireResponsesServiceStub,
    QuestionnairesServiceStub,
    SurveyInvitationsServiceStub,
    SurveyLinksServiceStub,
)
from care.patients.v1 import events_pb2 as patient_events
from care.scheduling.v1 import events_pb2 as visit_events
from sqlalchemy import text

from chassis.bus import Message
from chassis.errors import Problem, problem_from_rpc
from chassis.ids import new_id
from chassis.testing.harness import Harness
from services.feedback.instruments import as_questionnaire
from services.feedback.sending import LOOP
from services.feedback.service import SERVICE

CLINIC = new_id()
SECRET = "the receptionist Zebulon was rude"


@pytest.fixture(scope="module")
async def harness(database):
    harness = Harness(database)
    await harness.start(SERVICE, survey_delay=0.1)
    await harness.staff(
        "quinn", ["questionnaires.read", "questionnaires.write", "surveys.read"], clinics=[CLINIC], clearances=["N"]
    )
    await harness.staff("eve", ["surveys.read"], clinics=[new_id()])
    yield harness
    await harness.stop()


@pytest.fixture(scope="module")
async def questionnaire(harness):
    return await made(harness, after_visit=True)


@pytest.fixture
async def patient_id(harness):
    return await harness.subject(CLINIC)


async def made(harness, *, code="phq-9", **more):
    numbers = {"name": f"after-{uuid.uuid4().hex}", "crisis_help": {"en": "You are not alone."}, **more}
    wanted = pb.Questionnaire(**{**as_questionnaire(code), **numbers})
    wanted.items.add(link_id="why", kind="TEXT").text["en"] = "Anything else?"
    return await user(
        harness, QuestionnairesServiceStub, "CreateQuestionnaire", pb.CreateQuestionnaireRequest(questionnaire=wanted)
    )


async def user(harness, stub, method, request, subject="quinn"):
    return await harness.call("feedback", stub, method, request, subject)


async def service(harness, stub, method, request, caller):
    try:
        rpc = getattr(stub(harness.channel("feedback")), method)
        return await rpc(request, metadata=harness.as_service(caller), timeout=10)
    except grpc.RpcError as error:
        raise problem_from_rpc(error) from None


async def issue(harness, invitation_id, request_id=""):
    request = pb.IssueSurveyLinkRequest(
        tenant_id=harness.tenant_id, invitation_id=invitation_id, request_id=request_id or new_id()
    )
    return await service(harness, SurveyInvitationsServiceStub, "IssueSurveyLink", request, "notifications")


async def look(harness, token, *languages):
    request = pb.GetSurveyByLinkRequest(token=token, languages=languages)
    return await service(harness, SurveyLinksServiceStub, "GetSurveyByLink", request, "gateway")


async def answer(harness, token, answers, language="en"):
    request = pb.AnswerSurveyByLinkRequest(token=token, answers=answers, language=language)
    return await service(harness, SurveyLinksServiceStub, "AnswerSurveyByLink", request, "gateway")


def scores(*values, why=""):
    found = [pb.Answer(link_id=f"phq9-{place}", value=value) for place, value in enumerate(values, 1)]
    return [*found, *([pb.Answer(link_id="why", text=why)] if why else [])]


async def tell(harness, kind, patient_id, *, visit="", version=1, labels=(), topic="care.scheduling"):
    """Put an event on the bus as another service would; answers the visit's id."""
    visit = visit or new_id()
    payload = visit_events.AppointmentEvent(id=visit, clinic_id=CLINIC, visit_type_id=new_id())
    if kind.startswith("patient."):
        payload = patient_events.PatientEvent(id=patient_id)
    event = Event(
        id=new_id(),
        type=kind,
        tenant_id=harness.tenant_id,
        aggregate_id=visit,
        patient_id=patient_id,
        actor="system:scheduling",
        version=version,
        security_labels=labels,
        payload_type=payload.DESCRIPTOR.full_name,
        payload=payload.SerializeToString(),
    )
    event.time.GetCurrentTime()
    assert await harness.bus.append(topic, [Message(visit, event.SerializeToString())]) == [None]
    return visit


async def until(condition, seconds=10.0):
    """What `condition` gives once that is true."""
    end = time.monotonic() + seconds
    while True:
        found = await condition()
        if found:
            return found
        assert time.monotonic() < end, "it did not come about in time"
        await asyncio.sleep(0.05)


async def invitations(harness, patient_id, subject="quinn"):
    request = pb.ListSurveyInvitationsRequest(patient_ids=[patient_id] if patient_id else [])
    return list(
        (await user(harness, SurveyInvitationsServiceStub, "ListSurveyInvitations", request, subject)).invitations
    )


async def invited(harness, patient_id, status="INVITED", *, woken=False):
    async def found():
        if woken:  # nobody waits for the next round of the loop
            harness.servers["feedback"].runtime.loops[LOOP].wake()
        return [
            one
            for one in await invitations(harness, patient_id)
            if pb.SurveyInvitation.Status.Name(one.status) == status
        ]

    return (await until(found))[0]


async def asked(harness, patient_id, **more):
    await tell(harness, "appointment.fulfilled", patient_id, **more)
    return await invited(harness, patient_id, woken=True)


async def told(harness, patient_id):
    """Events about a patient on feedback's topic."""
    reader = harness.bus.reader(f"test-{uuid.uuid4()}", ["care.feedback"])
    await reader.start()
    try:
        found = []
        for _ in range(8):
            for records in (await reader.fetch(1000, 0.1)).values():
                found += [Event.FromString(record.value) for record in records]
        return [event for event in found if event.patient_id == patient_id]
    finally:
        await reader.stop()


async def heard(harness):
    """Wait until everything on scheduling's topic so far has had its effect."""
    patient_id = await harness.subject(CLINIC)
    await asked(harness, patient_id)


async def test_a_visit_leads_to_one_survey_that_is_sent_after_the_delay(harness, questionnaire, patient_id):
    visit = await tell(harness, "appointment.fulfilled", patient_id)
    await tell(harness, "appointment.fulfilled", patient_id, visit=visit)
    found = await invited(harness, patient_id)
    assert len(await invitations(harness, patient_id)) == 1
    assert (found.appointment_id, found.questionnaire_id) == (visit, questionnaire.id)
    assert (found.recipient.type, found.recipient.id) == ("Patient", patient_id)
    assert found.expire_time.seconds - found.due_time.seconds == 14 * 86400
    (event,) = await told(harness, patient_id)
    payload = events_pb2.SurveyEvent.FromString(event.payload)
    assert (event.type, payload.status, payload.clinic_id) == ("survey.invited", "INVITED", CLINIC)
    assert payload.recipient.id == patient_id


async def test_nobody_is_asked_twice_within_the_pause(harness, questionnaire, patient_id):
    await asked(harness, patient_id)
    await tell(harness, "appointment.fulfilled", patient_id)
    await heard(harness)
    assert len(await invitations(harness, patient_id)) == 1


async def test_a_visit_taken_back_before_the_survey_left_is_not_asked_about(harness, questionnaire, patient_id):
    await policy(harness, delay=3600)
    try:
        visit = await tell(harness, "appointment.fulfilled", patient_id, version=5)
        planned = await invited(harness, patient_id, "PLANNED")
        assert planned.policy_version == 1
        await tell(harness, "appointment.reverted", patient_id, visit=visit, version=6)
        await invited(harness, patient_id, "REVOKED")
        await tell(harness, "appointment.fulfilled", patient_id, visit=visit, version=7)
        assert (await invited(harness, patient_id, "PLANNED")).id == planned.id
        await tell(harness, "appointment.entered_in_error", patient_id, visit=visit, version=8)
        await invited(harness, patient_id, "REVOKED")
    finally:
        await policy(harness, gone=True)


async def test_a_visit_heard_of_after_it_was_taken_back_is_not_asked_about(harness, questionnaire, patient_id):
    visit = await tell(harness, "appointment.entered_in_error", patient_id, version=6)
    await tell(harness, "appointment.fulfilled", patient_id, visit=visit, version=5)
    await heard(harness)
    assert await invitations(harness, patient_id) == []


async def test_a_survey_that_has_left_stands_when_the_visit_is_taken_back(harness, questionnaire, patient_id):
    sent = await asked(harness, patient_id, version=5)
    await tell(harness, "appointment.reverted", patient_id, visit=sent.appointment_id, version=6)
    await heard(harness)
    assert (await invitations(harness, patient_id))[0].status == pb.SurveyInvitation.Status.INVITED


async def test_nobody_deceased_is_asked_and_the_link_stops_working(harness, questionnaire, patient_id):
    sent = await asked(harness, patient_id)
    token = (await issue(harness, sent.id)).token
    await tell(harness, "patient.deceased", patient_id, topic="care.patients")
    await invited(harness, patient_id, "REVOKED")
    with pytest.raises(Problem, match="LINK_UNKNOWN"):
        await look(harness, token)
    assert (await issue(harness, sent.id)).token == ""


async def test_labels_of_the_visit_hide_its_survey_from_those_without_clearance(harness, questionnaire, patient_id):
    await harness.staff("norm", ["surveys.read"], clinics=[CLINIC])
    await asked(harness, patient_id, labels=["N"])
    # Unnamed, since for a named patient the service would ask patients, which doesn't run here.
    assert patient_id not in {one.patient_id for one in await invitations(harness, "", "norm")}
    assert patient_id in {one.patient_id for one in await invitations(harness, "")}
    assert await invitations(harness, "", "eve") == []


async def test_a_new_link_ends_the_former_and_no_token_is_kept(harness, questionnaire, patient_id):
    sent = await asked(harness, patient_id)
    first = await issue(harness, sent.id, "first")
    assert first.token.startswith("s-") and len(first.token) >= 24 and first.appointment_id == sent.appointment_id
    await look(harness, first.token)
    # Not even for a replay: an answer that is a right by itself is made anew.
    second = await issue(harness, sent.id, "first")
    with pytest.raises(Problem) as former:
        await look(harness, first.token)
    assert (former.value.code, former.value.reason) == (grpc.StatusCode.NOT_FOUND, "LINK_UNKNOWN")
    await look(harness, second.token)
    async with harness.servers["feedback"].database.engine.connect() as connection:
        rows = await connection.execute(text("SELECT i::text FROM survey_invitation i"))
        assert second.token not in "".join(rows.scalars())
        kept = await connection.execute(text("SELECT encode(response, 'escape') FROM idempotency_key"))
        assert second.token not in "".join(kept.scalars())


async def test_looking_uses_nothing_up_and_only_the_gateway_may(harness, questionnaire, patient_id):
    sent = await asked(harness, patient_id)
    token = (await issue(harness, sent.id)).token
    for _ in range(3):
        page = await look(harness, token, "de", "en-US")
        assert (page.language, page.answered, page.critical) == ("en", False, False)
        assert len(page.questionnaire.items) == 10
        assert patient_id not in str(page)
    with pytest.raises(Problem, match="CALLER_NOT_ALLOWED"):
        await service(
            harness, SurveyLinksServiceStub, "GetSurveyByLink", pb.GetSurveyByLinkRequest(token=token), "referrals"
        )
    with pytest.raises(Problem, match="INTERNAL_ONLY"):
        await user(harness, SurveyLinksServiceStub, "GetSurveyByLink", pb.GetSurveyByLinkRequest(token=token))


async def test_a_survey_is_answered_once(harness, questionnaire, patient_id):
    sent = await asked(harness, patient_id)
    token = (await issue(harness, sent.id)).token
    given = scores(1, 1, 0, 0, 0, 0, 0, 0, 0, why=SECRET)
    page = await answer(harness, token, given)
    assert (page.answered, page.critical) == (True, False)
    assert await answer(harness, token, list(reversed(given))) == page
    assert (await look(harness, token)).answered
    with pytest.raises(Problem) as other:
        await answer(harness, token, scores(3, 3))
    assert (other.value.code, other.value.reason) == (grpc.StatusCode.ALREADY_EXISTS, "ALREADY_ANSWERED")
    (kept,) = await responses(harness, patient_id)
    assert (kept.score, kept.band, kept.bad, list(kept.critical_link_ids)) == (2, "minimal", False, [])
    assert kept.answers[-1].text == SECRET and kept.invitation_id == sent.id
    assert (await invitations(harness, patient_id))[0].status == pb.SurveyInvitation.Status.COMPLETED
    assert [event.type for event in await told(harness, patient_id)] == ["survey.invited", "survey.completed"]
    assert (await issue(harness, sent.id)).token == ""


async def test_64_answers_at_once_are_one_response(harness, questionnaire, patient_id):
    token = (await issue(harness, (await asked(harness, patient_id)).id)).token

    async def one(number):
        try:
            return (await answer(harness, token, scores(number % 2))).answered
        except Problem as problem:
            return problem.reason

    outcomes = await asyncio.gather(*(one(number) for number in range(64)))
    assert set(outcomes) == {True, "ALREADY_ANSWERED"} and outcomes.count(True) == 32
    assert len(await responses(harness, patient_id)) == 1


async def test_a_critical_answer_is_told_at_once_and_shows_help(harness, questionnaire, patient_id):
    sent = await asked(harness, patient_id)
    token = (await issue(harness, sent.id)).token
    page = await answer(harness, token, scores(3, 3, 3, 3, 0, 0, 0, 0, 1, why=SECRET))
    assert page.critical and page.questionnaire.crisis_help["en"] == "You are not alone."
    (kept,) = await responses(harness, patient_id)
    assert (kept.score, kept.band, kept.bad, list(kept.critical_link_ids)) == (13, "moderate", True, ["phq9-9"])
    events = {event.type: event for event in await told(harness, patient_id)}
    assert set(events) == {"survey.invited", "survey.completed", "response.critical", "response.low_score"}
    critical = events_pb2.ResponseEvent.FromString(events["response.critical"].payload)
    assert (critical.id, critical.invitation_id, critical.band, critical.clinic_id) == (kept.id, sent.id, "", CLINIC)
    low = events_pb2.ResponseEvent.FromString(events["response.low_score"].payload)
    assert low.band == "moderate" and low.appointment_id == sent.appointment_id
    assert events["response.critical"].actor == "link"
    for event in events.values():
        assert b"Zebulon" not in event.SerializeToString()
    assert "Zebulon" not in harness.log_of("feedback")


@pytest.mark.parametrize(
    ("answers", "named"),
    [
        ([pb.Answer(link_id="phq9-1", value=4)], "phq9-1"),
        ([pb.Answer(link_id="phq9-1", text=SECRET)], "phq9-1"),
        ([pb.Answer(link_id="phq9-1", value=1), pb.Answer(link_id="phq9-1", value=1)], "phq9-1"),
        ([pb.Answer(link_id="why", value=1)], "why"),
        ([pb.Answer(link_id="why", text="\x00")], "why"),
        ([pb.Answer(link_id="elsewhere", value=1)], None),
    ],
)
async def test_an_answer_that_cannot_be_taken_is_named_and_not_repeated(harness, questionnaire, answers, named):
    patient_id = await harness.subject(CLINIC)
    token = (await issue(harness, (await asked(harness, patient_id)).id)).token
    with pytest.raises(Problem) as refused:
        await answer(harness, token, answers)
    assert (refused.value.code, refused.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, "ANSWER_INVALID")
    assert refused.value.metadata == ({"link_id": named} if named else {})
    assert SECRET not in refused.value.message and "elsewhere" not in refused.value.message
    assert await responses(harness, patient_id) == []


async def test_a_survey_ends_when_its_time_is_over(harness, questionnaire, patient_id):
    sent = await asked(harness, patient_id)
    token = (await issue(harness, sent.id)).token
    async with harness.servers["feedback"].database.engine.begin() as connection:
        await connection.execute(
            text("UPDATE survey_invitation SET expire_time = clock_timestamp() WHERE id = :id"),
            {"id": uuid.UUID(sent.id)},
        )
    for attempt in (look(harness, token), answer(harness, token, scores(1))):
        with pytest.raises(Problem) as over:
            await attempt
        assert (over.value.code, over.value.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "LINK_EXPIRED")
    await invited(harness, patient_id, "EXPIRED")
    with pytest.raises(Problem, match="LINK_EXPIRED"):
        await look(harness, token)


async def test_a_link_that_was_never_given_out_is_unknown(harness, questionnaire):
    with pytest.raises(Problem, match="LINK_UNKNOWN"):
        await look(harness, "s-" + "A" * 22)


async def test_a_version_stands_once(harness):
    first = await made(harness, code="csat", name="visit-satisfaction", crisis_help={})
    assert first.status == pb.Questionnaire.Status.ACTIVE
    with pytest.raises(Problem) as again:
        await made(harness, code="csat", name="visit-satisfaction", crisis_help={})
    assert (again.value.code, again.value.reason) == (grpc.StatusCode.ALREADY_EXISTS, "VERSION_EXISTS")
    await made(harness, code="csat", name="visit-satisfaction", number=2, crisis_help={})
    listed = await user(
        harness,
        QuestionnairesServiceStub,
        "ListQuestionnaires",
        pb.ListQuestionnairesRequest(name="visit-satisfaction"),
    )
    assert [one.number for one in listed.questionnaires] == [1, 2]
    read = await user(harness, QuestionnairesServiceStub, "GetQuestionnaire", pb.GetQuestionnaireRequest(id=first.id))
    assert read == first


async def test_critical_questions_need_help_in_every_language(harness):
    for help_texts in ({}, {"en": " "}, {"es": "Ayuda"}):
        with pytest.raises(Problem, match="CRITICAL_WITHOUT_COVER"):
            await made(harness, crisis_help=help_texts)
    with pytest.raises(Problem, match="CRITICAL_WITHOUT_COVER"):
        await made(harness, title={"en": "A", "es": "B"})


async def policy(harness, *, gone=False, **settings):
    """Set the tenant's policy, or take it away."""
    import json

    async with harness.servers["feedback"].database.engine.begin() as connection:
        await connection.execute(text("DELETE FROM policy WHERE key = 'survey'"))
        if not gone:
            await connection.execute(
                text(
                    "INSERT INTO policy (tenant_id, key, scope, scope_id, version, settings)"
                    " VALUES (:tenant, 'survey', 'tenant', :tenant, 1, CAST(:settings AS jsonb))"
                ),
                {"tenant": uuid.UUID(harness.tenant_id), "settings": json.dumps(settings)},
            )


async def responses(harness, patient_id):
    request = pb.ListQuestionnaireResponsesRequest(patient_ids=[patient_id])
    return list(
        (await user(harness, QuestionnaireResponsesServiceStub, "ListQuestionnaireResponses", request)).responses
    )

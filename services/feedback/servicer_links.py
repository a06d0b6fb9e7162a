"""What the holder of a survey's link may do: look as often as they like, answer once."""

from care.feedback.v1 import feedback_pb2 as pb
from care.feedback.v1.feedback_pb2_grpc import SurveyLinksServiceServicer
from sqlalchemy import func, select

from chassis.call import Call
from chassis.errors import AlreadyExists, FailedPrecondition, NotFound
from chassis.ids import new_id
from chassis.wire import plain, to_proto
from services.feedback.invitation import Status, SurveyInvitation, hash_of
from services.feedback.questionnaire import Questionnaire
from services.feedback.response import QuestionnaireResponse


class SurveyLinksServicer(SurveyLinksServiceServicer):
    """The link is the credential; nothing answered here says who the patient is."""

    async def GetSurveyByLink(self, request: pb.GetSurveyByLinkRequest, call: Call) -> pb.SurveyByLink:
        invitation = await _invitation(call, request.token)
        questionnaire = await _questionnaire(call, invitation)
        response = await _response(call, invitation)
        if response is None:
            await _refuse_ended(call, invitation)
        return _page(questionnaire, questionnaire.language_for(request.languages), response)

    async def AnswerSurveyByLink(self, request: pb.AnswerSurveyByLinkRequest, call: Call) -> pb.SurveyByLink:
        invitation = await _invitation(call, request.token)
        questionnaire = await _questionnaire(call, invitation)
        language = questionnaire.language_for([request.language])
        response = await _response(call, invitation)
        if response is None:
            await _refuse_ended(call, invitation)
        answers = questionnaire.taken(plain(answer) for answer in request.answers)
        if response is not None:
            if answers != response.answers:
                raise AlreadyExists("ALREADY_ANSWERED", "This survey was answered before; the first answers are kept.")
            return _page(questionnaire, language, response)
        response = QuestionnaireResponse(
            id=new_id(),
            patient_id=invitation.patient_id,
            invitation_id=invitation.id,
            questionnaire_id=invitation.questionnaire_id,
            appointment_id=invitation.appointment_id,
            clinic_id=invitation.clinic_id,
            security_labels=invitation.security_labels,
            language=language,
        )
        response.complete(answers, questionnaire.grade(answers))
        invitation.complete()
        await call.add(response)
        return _page(questionnaire, language, response)


async def _invitation(call: Call, token: str) -> SurveyInvitation:
    found = await call.by_link(SurveyInvitation, SurveyInvitation.token_hash == hash_of(token))
    if found is None:
        raise NotFound("LINK_UNKNOWN", "There is no such link.")
    return found


async def _refuse_ended(call: Call, invitation: SurveyInvitation) -> None:
    now = (await call.db.execute(select(func.clock_timestamp()))).scalar_one()
    if invitation.status is not Status.INVITED or invitation.expire_time <= now:
        raise FailedPrecondition("LINK_EXPIRED", "The time to answer this survey is over.")


async def _questionnaire(call: Call, invitation: SurveyInvitation) -> Questionnaire:
    query = call.select(Questionnaire).where(Questionnaire.id == invitation.questionnaire_id)
    return (await call.db.execute(query)).scalar_one()


async def _response(call: Call, invitation: SurveyInvitation) -> QuestionnaireResponse | None:
    return await call.by_link(
        QuestionnaireResponse,
        QuestionnaireResponse.tenant_id == invitation.tenant_id,
        QuestionnaireResponse.invitation_id == invitation.id,
    )


def _page(questionnaire: Questionnaire, language: str, response: QuestionnaireResponse | None) -> pb.SurveyByLink:
    return to_proto(
        {"questionnaire": to_proto(questionnaire, pb.Questionnaire), "language": language},
        pb.SurveyByLink,
        answered=response is not None,
        critical=bool(response is not None and response.critical_link_ids),
    )

"""Questionnaires, invitations and responses over gRPC."""

from care.feedback.v1 import feedback_pb2 as pb
from care.feedback.v1.feedback_pb2_grpc import (
    QuestionnaireResponsesServiceServicer,
    QuestionnairesServiceServicer,
    SurveyInvitationsServiceServicer,
)

from chassis.call import Call
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.wire import given, to_proto
from services.feedback.invitation import Status, SurveyInvitation
from services.feedback.questionnaire import Questionnaire
from services.feedback.questionnaire import Status as Publication
from services.feedback.response import QuestionnaireResponse


class QuestionnairesServicer(QuestionnairesServiceServicer):
    """What is asked."""

    async def CreateQuestionnaire(self, request: pb.CreateQuestionnaireRequest, call: Call) -> pb.Questionnaire:
        values = given(request.questionnaire)
        status = Publication[values.pop("status", Publication.ACTIVE)]
        texts = {name: values.pop(name, {}) for name in ("title", "scoring", "crisis_help")}
        questionnaire = Questionnaire(id=new_id(), status=status, **texts, **values)
        questionnaire.check()
        await call.add(questionnaire)
        await call.db.flush()
        return to_proto(questionnaire, pb.Questionnaire)

    async def GetQuestionnaire(self, request: pb.GetQuestionnaireRequest, call: Call) -> pb.Questionnaire:
        return to_proto(await call.get(Questionnaire, request.id), pb.Questionnaire)

    async def ListQuestionnaires(
        self, request: pb.ListQuestionnairesRequest, call: Call
    ) -> pb.ListQuestionnairesResponse:
        wanted = Rows(Questionnaire).given(Questionnaire.name, request.name)
        rows, following = await call.page(wanted, request, Questionnaire.name, Questionnaire.number, Questionnaire.id)
        return pb.ListQuestionnairesResponse(
            questionnaires=[to_proto(row, pb.Questionnaire) for row in rows], next_page_token=following
        )


class SurveyInvitationsServicer(SurveyInvitationsServiceServicer):
    """Who is asked."""

    async def ListSurveyInvitations(
        self, request: pb.ListSurveyInvitationsRequest, call: Call
    ) -> pb.ListSurveyInvitationsResponse:
        wanted = Rows(SurveyInvitation).among(SurveyInvitation.patient_id, request.patient_ids)
        rows, following = await call.page(
            wanted, request, SurveyInvitation.create_time, SurveyInvitation.id, descending=True
        )
        return pb.ListSurveyInvitationsResponse(
            invitations=[to_proto(row, pb.SurveyInvitation) for row in rows], next_page_token=following
        )

    async def IssueSurveyLink(self, request: pb.IssueSurveyLinkRequest, call: Call) -> pb.IssueSurveyLinkResponse:
        invitation = await call.get(SurveyInvitation, request.invitation_id)
        is_open = invitation.status is Status.INVITED and invitation.expire_time > call.now
        token = invitation.new_link() if is_open else ""
        return to_proto(invitation, pb.IssueSurveyLinkResponse, token=token)


class QuestionnaireResponsesServicer(QuestionnaireResponsesServiceServicer):
    """What was answered."""

    async def ListQuestionnaireResponses(
        self, request: pb.ListQuestionnaireResponsesRequest, call: Call
    ) -> pb.ListQuestionnaireResponsesResponse:
        wanted = Rows(QuestionnaireResponse).among(QuestionnaireResponse.patient_id, request.patient_ids)
        rows, following = await call.page(
            wanted, request, QuestionnaireResponse.create_time, QuestionnaireResponse.id, descending=True
        )
        return pb.ListQuestionnaireResponsesResponse(
            responses=[to_proto(row, pb.QuestionnaireResponse) for row in rows], next_page_token=following
        )

"""The feedback service, said in one place."""

from pathlib import Path

from care.feedback.v1 import events_pb2, feedback_pb2

from chassis.errors import AlreadyExists
from chassis.service import Service
from chassis.timers import Loop
from services.feedback.questionnaire import Base
from services.feedback.reactions import reactions
from services.feedback.sending import LOOP, send_due
from services.feedback.servicer_links import SurveyLinksServicer
from services.feedback.servicer_surveys import (
    QuestionnaireResponsesServicer,
    QuestionnairesServicer,
    SurveyInvitationsServicer,
)
from services.feedback.settings import SurveySettings

SERVICE = Service(
    name="feedback",
    base=Base,
    migrations=Path(__file__).parent / "migrations",
    servicers={
        feedback_pb2.DESCRIPTOR.services_by_name["QuestionnairesService"]: QuestionnairesServicer(),
        feedback_pb2.DESCRIPTOR.services_by_name["SurveyInvitationsService"]: SurveyInvitationsServicer(),
        feedback_pb2.DESCRIPTOR.services_by_name["QuestionnaireResponsesService"]: QuestionnaireResponsesServicer(),
        feedback_pb2.DESCRIPTOR.services_by_name["SurveyLinksService"]: SurveyLinksServicer(),
    },
    payloads={"survey": events_pb2.SurveyEvent, "response": events_pb2.ResponseEvent},
    reactions=reactions,
    hears=("scheduling",),
    loops=(Loop(LOOP, send_due),),
    reasons={
        "questionnaire_version_key": (
            AlreadyExists,
            "VERSION_EXISTS",
            "This version of the questionnaire exists; take the next number.",
        ),
        "questionnaire_response_invitation_key": (
            AlreadyExists,
            "ALREADY_ANSWERED",
            "This survey was answered before; the first answers are kept.",
        ),
    },
    settings=SurveySettings,
)

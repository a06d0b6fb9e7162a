"""Answers to a survey: one response per invitation."""

import enum
from typing import Any

from sqlalchemy import Index, Integer, Text, UniqueConstraint
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from chassis.lifecycle import Lifecycle
from chassis.model import Id, Living, about_subject, by_change, status_type
from services.feedback.grading import Grade
from services.feedback.questionnaire import Base


class Status(enum.StrEnum):
    """FHIR questionnaire-answers-status, as far as it is used."""

    COMPLETED = "COMPLETED"
    AMENDED = "AMENDED"
    ENTERED_IN_ERROR = "ENTERED_IN_ERROR"


class QuestionnaireResponse(Living, Base):
    """What was answered. `answers` never leave the record: no event and no log holds them."""

    __tablename__ = "questionnaire_response"
    __table_args__ = (
        about_subject("questionnaire_response"),
        UniqueConstraint("tenant_id", "invitation_id", name="questionnaire_response_invitation_key"),
        Index("questionnaire_response_by_patient", "tenant_id", "patient_id", "create_time", "id"),
        by_change("questionnaire_response"),
        Index("questionnaire_response_by_time", "tenant_id", "create_time", "id"),
    )
    aggregate = "response"
    lifecycle = Lifecycle(("complete", [], Status.COMPLETED, None))

    patient_id: Mapped[str] = mapped_column(Id)
    invitation_id: Mapped[str] = mapped_column(Id)
    questionnaire_id: Mapped[str] = mapped_column(Id)
    appointment_id: Mapped[str] = mapped_column(Id)
    clinic_id: Mapped[str] = mapped_column(Id)
    status: Mapped[Status] = mapped_column(status_type(Status))
    answers: Mapped[list[Any]] = mapped_column(JSONB)
    score: Mapped[int | None] = mapped_column(Integer)
    band: Mapped[str] = mapped_column(Text, default="")
    bad: Mapped[bool] = mapped_column(default=False)
    critical_link_ids: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    language: Mapped[str] = mapped_column(Text, default="")

    def complete(self, answers: list[dict[str, Any]], grade: Grade) -> None:
        """Keep the answers and tell what they call for; a critical one first."""
        self.move("complete")
        self.answers = answers
        self.score, self.band, self.bad, self.critical_link_ids = grade
        if self.critical_link_ids:
            self.tell("critical", band="")
        if self.bad:
            self.tell("low_score")

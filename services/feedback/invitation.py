"""Invitations to answer a survey: one per visit, one recipient, one link."""

import enum
import hashlib
import secrets
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, Index, LargeBinary, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column

from chassis.lifecycle import Lifecycle
from chassis.model import Id, Living, about_subject, status_type
from services.feedback.questionnaire import Base


class Status(enum.StrEnum):
    """Where an invitation stands."""

    PLANNED = "PLANNED"
    INVITED = "INVITED"
    COMPLETED = "COMPLETED"
    EXPIRED = "EXPIRED"
    REVOKED = "REVOKED"


_OPEN = [Status.PLANNED, Status.INVITED]


class SurveyInvitation(Living, Base):
    """An invitation of one recipient about one visit. Of its link only the hash is kept."""

    __tablename__ = "survey_invitation"
    __table_args__ = (
        about_subject("survey_invitation"),
        UniqueConstraint("tenant_id", "appointment_id", name="survey_invitation_visit_key"),
        UniqueConstraint("token_hash", name="survey_invitation_token_key"),
        Index("survey_invitation_by_patient", "tenant_id", "patient_id", "create_time", "id"),
        Index("survey_invitation_by_time", "tenant_id", "create_time", "id"),
        Index("survey_invitation_by_recipient", "tenant_id", "recipient_id", "due_time"),
        Index("survey_invitation_due", "due_time", postgresql_where=text("status = 'PLANNED'")),
        Index("survey_invitation_ending", "expire_time", postgresql_where=text("status = 'INVITED'")),
    )
    aggregate = "survey"
    lifecycle = Lifecycle(
        ("plan", [], Status.PLANNED, None),
        # The visit was taken back and has happened after all.
        ("plan", [Status.REVOKED], Status.PLANNED, None),
        ("invite", [Status.PLANNED], Status.INVITED, "invited"),
        ("complete", [Status.INVITED], Status.COMPLETED, "completed"),
        ("expire", [Status.INVITED], Status.EXPIRED, None),
        ("revoke", _OPEN, Status.REVOKED, None),
    )

    patient_id: Mapped[str] = mapped_column(Id)
    recipient: Mapped[dict[str, Any]] = mapped_column(JSONB)
    recipient_id: Mapped[str] = mapped_column(Id)
    questionnaire_id: Mapped[str] = mapped_column(Id)
    appointment_id: Mapped[str] = mapped_column(Id)
    clinic_id: Mapped[str] = mapped_column(Id)
    status: Mapped[Status] = mapped_column(status_type(Status))
    due_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    expire_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    policy_version: Mapped[int] = mapped_column(BigInteger, default=0)
    token_hash: Mapped[bytes | None] = mapped_column(LargeBinary)

    def plan(self, questionnaire_id: str, due_time: datetime, expire_time: datetime, policy_version: int) -> None:
        """Wait until `due_time`. Raises FailedPrecondition `ILLEGAL_TRANSITION` where it waits or has left already."""
        self.move("plan")
        self.questionnaire_id, self.policy_version = questionnaire_id, policy_version
        self.due_time, self.expire_time = due_time, expire_time

    def invite(self) -> None:
        """Send it on its way."""
        self.move("invite")

    def new_link(self) -> str:
        """A token of 128 random bits; a former one stops working."""
        token = f"s-{secrets.token_urlsafe(16)}"
        self.token_hash = hash_of(token)
        return token

    def complete(self) -> None:
        """It is answered."""
        self.move("complete")

    def expire(self) -> None:
        """The time to answer is over."""
        self.move("expire")

    def revoke(self, reason_code: str) -> None:
        """It isn't true any more; its link stops working."""
        self.move("revoke", reason_code=reason_code)
        self.token_hash = None


def hash_of(token: str) -> bytes:
    """How a link's token is kept and looked up. 128 random bits need no slow hash."""
    return hashlib.sha256(token.encode()).digest()

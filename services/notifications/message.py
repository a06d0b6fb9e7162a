"""Reminders as planned, messages as they leave, and each call of a provider."""

import enum
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    BigInteger,
    DateTime,
    ForeignKeyConstraint,
    Index,
    Integer,
    Text,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column, relationship

from chassis.lifecycle import Lifecycle
from chassis.model import Id, Living, about_subject, by_change, status_type
from services.notifications.projections import Base

TIME = DateTime(timezone=True)
REMINDER = "appointment-reminder"
CORRECTION = "appointment-correction"
SURVEY = "survey"
WAITLIST_OFFER = "waitlist-offer"
BY_LINK = (SURVEY, WAITLIST_OFFER)
"""Kinds whose message carries a link, which is made when it leaves."""


class ReminderStatus(enum.StrEnum):
    """FHIR request-status, as far as it is used."""

    ACTIVE = "ACTIVE"
    COMPLETED = "COMPLETED"
    REVOKED = "REVOKED"


class MessageStatus(enum.StrEnum):
    """FHIR event-status, and UNKNOWN for "handed over, and nobody knows whether it was taken"."""

    PREPARATION = "PREPARATION"
    IN_PROGRESS = "IN_PROGRESS"
    NOT_DONE = "NOT_DONE"
    ON_HOLD = "ON_HOLD"
    STOPPED = "STOPPED"
    COMPLETED = "COMPLETED"
    UNKNOWN = "UNKNOWN"


WAITING = [MessageStatus.PREPARATION, MessageStatus.ON_HOLD]


class Written:
    """What a reminder and its message share: to whom, about what, how, by which policy."""

    patient_id: Mapped[str] = mapped_column(Id)
    recipient: Mapped[dict[str, Any]] = mapped_column(JSONB)
    recipient_id: Mapped[str] = mapped_column(Id)
    clinic_id: Mapped[str | None] = mapped_column(Id)
    schedule_version: Mapped[int] = mapped_column(BigInteger, default=0)
    offset: Mapped[str] = mapped_column(Text, default="")
    kind: Mapped[str]
    """Which template."""
    purpose: Mapped[str]
    channel: Mapped[str]
    """The first of `channels`; of a message that left: the one that it took."""
    channels: Mapped[list[str]] = mapped_column(ARRAY(Text))
    """In the order of preference: the first one with consent is taken when it leaves."""
    due_time: Mapped[datetime] = mapped_column(TIME)
    expire_time: Mapped[datetime] = mapped_column(TIME)
    own_action_time: Mapped[datetime | None] = mapped_column(TIME)
    """When the recipient did what this answers: exempt from quiet hours for ten minutes."""
    open_from: Mapped[str]
    open_until: Mapped[str]
    policy_version: Mapped[int] = mapped_column(BigInteger, default=0)
    status_reason: Mapped[str] = mapped_column(Text, default="")
    traceparent: Mapped[str] = mapped_column(Text, default="")


_WRITTEN = (
    "patient_id", "recipient", "recipient_id", "clinic_id", "schedule_version", "offset", "kind", "purpose", "channel",
    "channels", "due_time", "expire_time", "own_action_time", "open_from", "open_until", "policy_version", "traceparent",
    "security_labels",
)  # fmt: skip


class Reminder(Written, Living, Base):
    """A message that a visit is to get, planned for one schedule version of it."""

    __tablename__ = "reminder"
    __table_args__ = (
        about_subject("reminder"),
        UniqueConstraint(
            "tenant_id",
            "appointment_id",
            "schedule_version",
            "offset",
            "channel",
            "recipient_id",
            name="reminder_ledger_key",
        ),
        Index("reminder_due", "due_time", postgresql_where=text("status = 'ACTIVE'")),
        Index("reminder_by_patient", "tenant_id", "patient_id", "due_time", "id"),
    )
    aggregate = "reminder"
    lifecycle = Lifecycle(
        ("plan", [], ReminderStatus.ACTIVE, None),
        ("make", [ReminderStatus.ACTIVE], ReminderStatus.COMPLETED, None),
        ("revoke", [ReminderStatus.ACTIVE], ReminderStatus.REVOKED, None),
        ("restore", [ReminderStatus.REVOKED], ReminderStatus.ACTIVE, None),
    )

    appointment_id: Mapped[str] = mapped_column(Id)
    status: Mapped[ReminderStatus] = mapped_column(status_type(ReminderStatus))
    message_id: Mapped[str | None] = mapped_column(Id)

    def revoke(self, reason: str) -> None:
        """It is no longer true."""
        self.move("revoke", reason_code=reason)
        self.status_reason = reason

    def restore(self) -> None:
        """What had revoked it was taken back."""
        self.move("restore")
        self.status_reason = ""

    def make(self, message_id: str) -> "Message":
        """Its message, now that it is due."""
        self.move("make")
        self.message_id = message_id
        message = Message(
            tenant_id=self.tenant_id,
            id=message_id,
            about={"type": "Appointment", "id": self.appointment_id},
            about_id=self.appointment_id,
            next_time=self.due_time,
            **{name: getattr(self, name) for name in _WRITTEN},
        )
        message.move("make")
        return message


class Message(Written, Living, Base):
    """A message on its way to one recipient, after FHIR Communication.

    `due_time` is when it should leave and `next_time` when it is looked at next. Whoever works on it holds its lease:
    `lease_token` fences what a holder writes that was stopped for longer than the lease.
    """

    __tablename__ = "message"
    __table_args__ = (
        about_subject("message"),
        UniqueConstraint(
            "tenant_id", "about_id", "kind", "schedule_version", "offset", "recipient_id", name="message_once_key"
        ),
        Index("message_waiting", "next_time", postgresql_where=text("status IN ('PREPARATION', 'ON_HOLD')")),
        Index("message_in_progress", "lease_time", postgresql_where=text("status = 'IN_PROGRESS'")),
        Index("message_by_patient", "tenant_id", "patient_id", "create_time", "id"),
        by_change("message"),
        Index("message_by_time", "tenant_id", "create_time", "id"),
    )
    aggregate = "message"
    lifecycle = Lifecycle(
        ("make", [], MessageStatus.PREPARATION, None),
        ("hold", WAITING, MessageStatus.ON_HOLD, None),
        ("suppress", WAITING, MessageStatus.NOT_DONE, "suppressed"),
        ("start", WAITING, MessageStatus.IN_PROGRESS, None),
        ("complete", [MessageStatus.IN_PROGRESS], MessageStatus.COMPLETED, "sent"),
        ("return", [MessageStatus.IN_PROGRESS], MessageStatus.PREPARATION, None),
        ("lose", [MessageStatus.IN_PROGRESS], MessageStatus.UNKNOWN, "unknown"),
        ("resolve", [MessageStatus.UNKNOWN], MessageStatus.COMPLETED, "sent"),
        ("fail", [*WAITING, MessageStatus.IN_PROGRESS], MessageStatus.STOPPED, "failed"),
    )

    about: Mapped[dict[str, Any]] = mapped_column(JSONB)
    about_id: Mapped[str] = mapped_column(Id)
    status: Mapped[MessageStatus] = mapped_column(status_type(MessageStatus))
    next_time: Mapped[datetime] = mapped_column(TIME)
    sent_time: Mapped[datetime | None] = mapped_column(TIME)
    spent: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    """Channels that were given up."""
    calls: Mapped[int] = mapped_column(Integer, default=0)
    """Calls so far: the number of the latest attempt."""
    tries: Mapped[int] = mapped_column(Integer, default=0)
    """Calls on the present channel that failed."""
    language: Mapped[str] = mapped_column(Text, default="")
    wished_language: Mapped[str] = mapped_column(Text, default="")
    template: Mapped[str] = mapped_column(Text, default="")
    consent_id: Mapped[str | None] = mapped_column(Id)
    consent_version: Mapped[int] = mapped_column(BigInteger, default=0)
    local_time: Mapped[str] = mapped_column(Text, default="")
    text: Mapped[str] = mapped_column(Text, default="")
    lease_token: Mapped[str | None] = mapped_column(Id)
    lease_time: Mapped[datetime | None] = mapped_column(TIME)
    attempts: Mapped[list["Attempt"]] = relationship(
        lazy="selectin", order_by="Attempt.number", cascade="all, delete-orphan"
    )

    def lease(self, token: str, until: datetime) -> None:
        """Whoever has the token works on it until then."""
        self.lease_token, self.lease_time = token, until

    def free(self) -> None:
        """Nobody works on it."""
        self.lease_token = self.lease_time = None

    def wait(self, until: datetime, reason: str) -> None:
        """Look at it later. The end of quiet hours becomes its due time; a service that is away leaves it as it was."""
        if self.status is not MessageStatus.ON_HOLD or self.status_reason != reason:
            self.move("hold", reason_code=reason)
        self.status_reason = reason
        self.next_time = until
        if reason == "quiet-hours":
            self.due_time = until
        self.free()

    def suppress(self, reason: str) -> None:
        """It does not leave; one that a provider had refused before has failed."""
        self.status_reason = reason
        self.move("fail" if self.spent else "suppress", reason_code=reason)
        self.free()

    def start(self, now: datetime, until: datetime, channel: str, **values: Any) -> "Attempt":
        """A call of the provider begins; answers its row. `values`: the text and what allowed it."""
        self.move("start")
        self.channel = channel
        self.status_reason = ""
        self.lease_time = until
        for name, value in values.items():
            setattr(self, name, value)
        self.calls += 1
        return Attempt(tenant_id=self.tenant_id, message_id=self.id, number=self.calls, channel=channel, start_time=now)

    def _end(self, now: datetime, outcome: str, error_code: str = "") -> "Attempt":
        attempt = self.attempts[-1]
        attempt.end_time, attempt.outcome, attempt.error_code = now, outcome, error_code
        return attempt

    def complete(self, now: datetime, provider_message_id: str) -> None:
        """The provider took it; also where nobody had known for a while."""
        self._end(now, "accepted").provider_message_id = provider_message_id
        self.sent_time = now
        self.status_reason = ""
        self.move("resolve" if self.status is MessageStatus.UNKNOWN else "complete")
        self.free()

    def lose(self, now: datetime, error_code: str) -> None:
        """Nobody knows whether it left: it is never sent again by itself."""
        self._end(now, "unknown", error_code)
        self.status_reason = "unknown"
        self.move("lose", reason_code=error_code)
        self.free()

    def give_back(self, now: datetime) -> None:
        """The call never began: the last check had become too old."""
        self._end(now, "failed", "check-too-old")
        self.move("return", reason_code="check-too-old")
        self.next_time = now
        self.free()

    def retry(self, now: datetime, error_code: str, after: timedelta, tries_at_most: int) -> None:
        """The provider didn't take it this time: later again, on the next channel once the tries are used up."""
        if self.tries + 1 >= tries_at_most:
            self.refuse(now, error_code, outcome="failed")
            return
        self._end(now, "failed", error_code)
        self.tries += 1
        self.move("return", reason_code="retry")
        self.next_time = now + after
        self.free()

    def refuse(self, now: datetime, error_code: str, *, outcome: str = "refused") -> None:
        """The provider won't take it: the next channel, or it has failed."""
        self._end(now, outcome, error_code)
        self.spent = [*self.spent, self.channel]
        self.tries = 0
        if set(self.channels) <= set(self.spent):
            self.status_reason = "refused" if outcome == "refused" else "provider-failed"
            self.move("fail", reason_code=self.status_reason)
        else:
            self.move("return", reason_code="next-channel")
            self.next_time = now
        self.free()


class Attempt(Base):
    """One call of a provider, written before it begins."""

    __tablename__ = "attempt"
    __table_args__ = (
        ForeignKeyConstraint(
            ["tenant_id", "message_id"], ["message.tenant_id", "message.id"], name="attempt_message_fkey"
        ),
    )

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    message_id: Mapped[str] = mapped_column(Id, primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    channel: Mapped[str]
    start_time: Mapped[datetime] = mapped_column(TIME)
    end_time: Mapped[datetime | None] = mapped_column(TIME)
    outcome: Mapped[str] = mapped_column(Text, default="")
    error_code: Mapped[str] = mapped_column(Text, default="")
    provider_message_id: Mapped[str] = mapped_column(Text, default="")

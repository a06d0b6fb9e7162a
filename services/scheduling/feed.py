"""Calendar feeds: whose visits a secret link shows, and which login made it. Of the link only the hash is kept."""

import enum
import hashlib
import secrets

from sqlalchemy import Index, LargeBinary, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from chassis.lifecycle import Lifecycle
from chassis.model import Id, Living, about_subject, status_type
from services.scheduling.directory import Base

AT_MOST = 20
"""Active feeds of one maker."""


class Status(enum.StrEnum):
    """Whether a feed's link works."""

    ACTIVE = "ACTIVE"
    REVOKED = "REVOKED"


class CalendarFeed(Living, Base):
    """A link by which calendar programs follow visits. It belongs to who made it, whosever visits it shows."""

    __tablename__ = "calendar_feed"
    __table_args__ = (
        about_subject("calendar_feed"),  # where it shows a patient's
        UniqueConstraint("token_hash", name="calendar_feed_token_key"),
        Index("calendar_feed_by_maker", "tenant_id", "maker_id", "id"),
    )
    aggregate = "calendar_feed"
    # It is its maker's own, like a setting: rows are found by their maker.
    subject_field = None
    lifecycle = Lifecycle(
        ("make", [], Status.ACTIVE, None),
        ("revoke", [Status.ACTIVE], Status.REVOKED, None),
    )

    status: Mapped[Status] = mapped_column(status_type(Status))
    practitioner_id: Mapped[str | None] = mapped_column(Id)
    clinic_id: Mapped[str | None] = mapped_column(Id)
    patient_id: Mapped[str | None] = mapped_column(Id)
    include_details: Mapped[bool] = mapped_column(default=False)
    maker_id: Mapped[str] = mapped_column(Id)
    # The login: what it may see is asked anew at each reading.
    maker_issuer: Mapped[str] = mapped_column(Text)
    maker_subject: Mapped[str] = mapped_column(Text)
    token_hash: Mapped[bytes | None] = mapped_column(LargeBinary)

    def make(self) -> str:
        """Begin; answers the link's token of 128 random bits."""
        self.move("make")
        token = f"c-{secrets.token_urlsafe(16)}"
        self.token_hash = hash_of(token)
        return token

    def revoke(self) -> None:
        """End it. Raises FailedPrecondition `ILLEGAL_TRANSITION`."""
        self.move("revoke")
        self.token_hash = None


def hash_of(token: str) -> bytes:
    """How a link's token is kept and looked up. 128 random bits need no slow hash."""
    return hashlib.sha256(token.encode()).digest()

"""Rooms of video visits: one for each time for which a visit is planned, made and closed by a provider later on."""

import enum
import secrets
from datetime import datetime, timedelta

from sqlalchemy import BigInteger, Index, Text, UniqueConstraint, text
from sqlalchemy.orm import Mapped, mapped_column

from chassis.ids import new_id
from chassis.model import Aggregate, Id, about_subject, status_type
from services.scheduling.appointment import Appointment, Status
from services.scheduling.directory import Base

OPENS_BEFORE, CLOSES_AFTER = timedelta(minutes=15), timedelta(minutes=30)
_LONGEST_PAUSE = 300


class RoomState(enum.StrEnum):
    """Where a room stands."""

    WANTED = "WANTED"
    READY = "READY"
    ENDING = "ENDING"
    ENDED = "ENDED"


class VideoRoom(Aggregate, Base):
    """A room, from the wish for it to its end. Its name is chosen before anybody is asked: asking twice makes one room."""

    __tablename__ = "video_room"
    __table_args__ = (
        about_subject("video_room"),
        UniqueConstraint("name", name="video_room_name_key"),
        Index("video_room_due", "next_time", postgresql_where=text("next_time IS NOT NULL")),
        Index("video_room_by_appointment", "tenant_id", "appointment_id"),
    )
    aggregate = "video_room"

    patient_id: Mapped[str] = mapped_column(Id)
    appointment_id: Mapped[str] = mapped_column(Id)
    schedule_version: Mapped[int] = mapped_column(BigInteger)
    name: Mapped[str]
    state: Mapped[RoomState] = mapped_column(status_type(RoomState))
    url: Mapped[str] = mapped_column(Text, default="")
    open_time: Mapped[datetime]
    close_time: Mapped[datetime]
    # When the provider is to be asked next; of one in hand, when its lease ends.
    next_time: Mapped[datetime | None]
    lease_token: Mapped[str | None] = mapped_column(Id)
    tries: Mapped[int] = mapped_column(BigInteger, default=0)
    error_code: Mapped[str] = mapped_column(Text, default="")

    @classmethod
    def for_visit(cls, visit: Appointment, now: datetime) -> "VideoRoom":
        """A room that is wanted for the time that a visit has now."""
        return cls(
            tenant_id=visit.tenant_id,
            patient_id=visit.patient_id,
            appointment_id=visit.id,
            schedule_version=visit.schedule_version,
            name=f"visit-{secrets.token_hex(16)}",
            state=RoomState.WANTED,
            open_time=visit.start_time - OPENS_BEFORE,
            close_time=visit.end_time + CLOSES_AFTER,
            next_time=now,
            security_labels=list(visit.security_labels),
        )

    def claim(self, now: datetime, lease: timedelta) -> None:
        """The provider is about to be asked; who else looks passes it over until the lease ends."""
        self.tries += 1
        self.lease_token, self.next_time = new_id(), now + lease

    def opened(self, url: str) -> None:
        """The provider has made it."""
        self.state, self.url, self.next_time, self.lease_token, self.tries = RoomState.READY, url, None, None, 0

    def end(self, now: datetime) -> None:
        """It is no longer wanted. One that is being made at this moment is closed once that must be over."""
        if self.state is RoomState.WANTED and not self.tries:
            self.closed()
            return
        self.next_time = max(now, self.next_time or now) if self.lease_token else now
        self.state, self.url, self.lease_token, self.tries = RoomState.ENDING, "", None, 0

    def closed(self) -> None:
        """It is gone."""
        self.state, self.url, self.next_time, self.lease_token = RoomState.ENDED, "", None, None

    def again(self, now: datetime, error_code: str) -> None:
        """The provider could not be asked, or refused: later, but not for a visit that is over."""
        self.error_code, self.lease_token = error_code, None
        if self.state is RoomState.WANTED and now > self.close_time:
            self.closed()
            return
        self.next_time = now + timedelta(seconds=min(2**self.tries, _LONGEST_PAUSE))


def wants_room(visit: Appointment) -> bool:
    """Whether a visit has a room."""
    return visit.modality == "VIDEO" and visit.status in (Status.BOOKED, Status.ARRIVED, Status.CHECKED_IN)

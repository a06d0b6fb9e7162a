"""The timeline: one entry per event about a patient, from whichever service it comes."""

from datetime import datetime
from typing import Any, ClassVar

from sqlalchemy import BigInteger, DateTime, Index, Text, bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from chassis.model import Id, Owned, about_subject
from services.patients.patient import Base


class TimelineEntry(Owned, Base):
    """A projection of one event; its id is the event's, so that no delivery makes a second one."""

    __tablename__ = "timeline_entry"
    __table_args__ = (
        about_subject("timeline_entry"),
        Index("timeline_entry_by_patient", "tenant_id", "patient_id", "time", "id"),
    )
    subject_field: ClassVar[str | None] = "patient_id"

    patient_id: Mapped[str] = mapped_column(Id)
    time: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    type: Mapped[str]
    source_type: Mapped[str]
    source_id: Mapped[str] = mapped_column(Id)
    source_version: Mapped[int] = mapped_column(BigInteger)
    actor: Mapped[str] = mapped_column(Text, default="")
    clinic_id: Mapped[str | None] = mapped_column(Id)
    status: Mapped[str] = mapped_column(Text, default="")
    reason_code: Mapped[str] = mapped_column(Text, default="")
    security_labels: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list, server_default=text("'{}'"))

    @property
    def subject_id(self) -> str:
        """Whose record it is part of."""
        return self.patient_id

    @property
    def source(self) -> dict[str, str]:
        """What it happened to."""
        return {"type": self.source_type, "id": self.source_id}


# Text, because SQLAlchemy compiles ON CONFLICT anew for each event.
_PUT = text(
    "INSERT INTO timeline_entry (tenant_id, id, patient_id, time, type, source_type, source_id, source_version, actor,"
    " clinic_id, status, reason_code, security_labels) VALUES (:tenant_id, :id, :patient_id, :time, :type,"
    " :source_type, :source_id, :source_version, :actor, :clinic_id, :status, :reason_code, :security_labels)"
    " ON CONFLICT DO NOTHING"
).bindparams(
    *(bindparam(name, type_=Id) for name in ("tenant_id", "id", "patient_id", "source_id", "clinic_id")),
    bindparam("time", type_=DateTime(timezone=True)),
    bindparam("source_version", type_=BigInteger),
    bindparam("security_labels", type_=ARRAY(Text)),
    *(bindparam(name, type_=Text) for name in ("type", "source_type", "actor", "status", "reason_code")),
)


async def put(db: AsyncSession, entry: dict[str, Any]) -> None:
    """Add the entry of an event, with all columns; a second delivery changes nothing."""
    await db.execute(_PUT, entry)


async def is_outdated(db: AsyncSession, tenant_id: str, patient_id: str, source_id: str, version: int) -> bool:
    """Whether something later is known of the same aggregate: a replayed older event must not undo it."""
    later = await db.execute(
        select(TimelineEntry.id)
        .where(
            TimelineEntry.tenant_id == tenant_id,
            TimelineEntry.patient_id == patient_id,
            TimelineEntry.source_id == source_id,
            TimelineEntry.source_version > version,
        )
        .limit(1)
    )
    return later.first() is not None

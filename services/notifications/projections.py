"""What notifications knows of others' data: clinics, visit types and visits, each by the version it last heard of."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, Text, bindparam, select, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from chassis.model import Id, Owned, about_subject, base

Base = base()
NEVER_PLANNED = -1


class Projected(Owned):
    """A row that is replaced by a newer version only."""

    version: Mapped[int] = mapped_column(BigInteger)


class Clinic(Projected, Base):
    """Where a visit takes place."""

    __tablename__ = "clinic"

    name: Mapped[str]
    discreet_name: Mapped[str]
    time_zone: Mapped[str]
    address: Mapped[dict[str, Any]] = mapped_column(JSONB)
    phone: Mapped[str]
    directions: Mapped[str]
    security_labels: Mapped[list[str]] = mapped_column(ARRAY(Text))


class VisitType(Projected, Base):
    """What a visit is for."""

    __tablename__ = "visit_type"

    name: Mapped[str]
    discreet_name: Mapped[str]
    modality: Mapped[str]
    preparation: Mapped[dict[str, Any]] = mapped_column(JSONB)
    security_labels: Mapped[list[str]] = mapped_column(ARRAY(Text))


class Patient(Projected, Base):
    """Whether somebody has died, as last heard of. Who was never heard of is alive."""

    __tablename__ = "patient"

    deceased: Mapped[bool]


class Appointment(Projected, Base):
    """A visit as last heard of. `planned_version` is the schedule version whose reminders stand in the ledger."""

    __tablename__ = "appointment"
    __table_args__ = (about_subject("appointment"),)

    patient_id: Mapped[str] = mapped_column(Id)
    status: Mapped[str] = mapped_column(Text, default="")
    clinic_id: Mapped[str | None] = mapped_column(Id)
    visit_type_id: Mapped[str | None] = mapped_column(Id)
    start_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    time_zone: Mapped[str] = mapped_column(Text, default="")
    schedule_version: Mapped[int] = mapped_column(BigInteger, default=0)
    planned_version: Mapped[int] = mapped_column(BigInteger, default=NEVER_PLANNED)
    security_labels: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)


# Text, because SQLAlchemy compiles ON CONFLICT anew for each event.
_NEW_VISIT = text(
    "INSERT INTO appointment (tenant_id, id, patient_id, version, status, time_zone, schedule_version, planned_version,"
    f" security_labels) VALUES (:tenant_id, :id, :patient_id, 0, '', '', 0, {NEVER_PLANNED}, '{{}}') ON CONFLICT DO NOTHING"
).bindparams(*(bindparam(name, type_=Id) for name in ("tenant_id", "id", "patient_id")))


async def visit_row(db: AsyncSession, tenant_id: str, appointment_id: str, patient_id: str) -> Appointment:
    """The row of a visit, locked; of version 0 where nothing was heard of it yet."""
    await db.execute(_NEW_VISIT, {"tenant_id": tenant_id, "id": appointment_id, "patient_id": patient_id})
    found = await db.execute(
        select(Appointment)
        .where(Appointment.tenant_id == tenant_id, Appointment.id == appointment_id)
        .with_for_update(key_share=True)
    )
    return found.scalar_one()

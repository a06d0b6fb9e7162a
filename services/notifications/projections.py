"""What notifications knows of others' data: clinics, visit types and visits, each by the version it last heard of."""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, Text, bindparam, text
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


# Text, because SQLAlchemy compiles ON CONFLICT anew for each event. A row that is there already is locked by an update that
# changes nothing: a dead row for each later event of a visit, for one statement less with the first.
_LOCK_VISIT = text(
    "INSERT INTO appointment AS mine (tenant_id, id, patient_id, version, status, time_zone, schedule_version,"
    f" planned_version, security_labels) VALUES (:tenant_id, :id, :patient_id, 0, '', '', 0, {NEVER_PLANNED}, '{{}}')"
    " ON CONFLICT (tenant_id, id) DO UPDATE SET version = mine.version RETURNING version, status, planned_version"
).bindparams(*(bindparam(name, type_=Id) for name in ("tenant_id", "id", "patient_id")))
_HEARD = (
    "version",
    "status",
    "clinic_id",
    "visit_type_id",
    "start_time",
    "time_zone",
    "schedule_version",
    "planned_version",
    "security_labels",
)
_KEEP_VISIT = text(
    f"UPDATE appointment SET {', '.join(f'{name} = :{name}' for name in _HEARD)} WHERE tenant_id = :tenant_id AND id = :id"
).bindparams(
    *(bindparam(name, type_=Appointment.__table__.c[name].type) for name in ("tenant_id", "id", *_HEARD)),
)
_IS_DECEASED = text("SELECT deceased FROM patient WHERE tenant_id = :tenant_id AND id = :id").bindparams(
    *(bindparam(name, type_=Id) for name in ("tenant_id", "id"))
)


async def visit_row(db: AsyncSession, tenant_id: str, appointment_id: str, patient_id: str) -> Appointment:
    """How far a visit is known, its row locked; of version 0 where nothing was heard of it yet.

    Beside the session: `keep_visit` writes it back.
    """
    values = {"tenant_id": tenant_id, "id": appointment_id, "patient_id": patient_id}
    known = (await db.execute(_LOCK_VISIT, values)).one()
    return Appointment(**values, version=known.version, status=known.status, planned_version=known.planned_version)


async def keep_visit(db: AsyncSession, row: Appointment) -> None:
    """Write down what was heard of a visit."""
    names = ("tenant_id", "id", *_HEARD)
    await db.execute(_KEEP_VISIT, {name: getattr(row, name) for name in names})


async def is_deceased(db: AsyncSession, tenant_id: str, patient_id: str) -> bool:
    """Whether somebody has died, as last heard of."""
    return bool((await db.execute(_IS_DECEASED, {"tenant_id": tenant_id, "id": patient_id})).scalar())

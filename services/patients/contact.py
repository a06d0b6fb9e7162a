"""Contacts: calls, letters and talks that people made. They are recorded and never changed."""

from datetime import datetime

from sqlalchemy import BigInteger, DateTime, Index, Text
from sqlalchemy.orm import Mapped, mapped_column

from chassis.model import Aggregate, Id, about_subject
from services.patients.patient import Base


class Contact(Aggregate, Base):
    """A contact with a patient or about one, or an attempt at it."""

    __tablename__ = "contact"
    __table_args__ = (
        about_subject("contact"),
        Index("contact_by_patient", "tenant_id", "patient_id", "contact_time", "id"),
    )
    aggregate = "contact"

    patient_id: Mapped[str] = mapped_column(Id)
    channel: Mapped[str]
    direction: Mapped[str]
    outcome: Mapped[str]
    note: Mapped[str] = mapped_column(Text, default="")
    minutes: Mapped[int] = mapped_column(BigInteger, default=0)
    task_id: Mapped[str | None] = mapped_column(Id)
    referral_id: Mapped[str | None] = mapped_column(Id)
    contact_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    recorder: Mapped[str]

"""Visits that were taken back, by the version at which: what their surveys are judged by."""

from sqlalchemy.orm import Mapped, mapped_column

from chassis.model import Id
from services.feedback.questionnaire import Base


class UndoneVisit(Base):
    """That a visit did not take place after all, as of a version of its appointment."""

    __tablename__ = "undone_visit"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    appointment_id: Mapped[str] = mapped_column(Id, primary_key=True)
    visit_version: Mapped[int]

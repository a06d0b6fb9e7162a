"""Consents to be written to: for one recipient, one contact value, one channel, one purpose."""

import enum
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from sqlalchemy import DateTime, Index, Text, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from chassis.lifecycle import Lifecycle
from chassis.model import Id, Living, about_subject, status_type
from services.patients.names import contact_key
from services.patients.patient import Base, Patient, RelatedPerson


class Status(enum.StrEnum):
    """FHIR consent-state-codes, as far as they are used."""

    ACTIVE = "ACTIVE"
    INACTIVE = "INACTIVE"
    ENTERED_IN_ERROR = "ENTERED_IN_ERROR"


class Consent(Living, Base):
    """A consent to communication. It is never changed but for its end."""

    __tablename__ = "consent"
    __table_args__ = (
        about_subject("consent"),
        Index("consent_by_patient", "tenant_id", "patient_id", "create_time"),
        # One in force for the same thing.
        Index(
            "consent_in_force_key",
            "tenant_id",
            "recipient_id",
            "patient_id",
            "contact_value",
            "channel",
            "purpose",
            unique=True,
            postgresql_where=text("status = 'ACTIVE'"),
        ),
    )
    aggregate = "consent"
    lifecycle = Lifecycle(
        ("record", [], Status.ACTIVE, "created"),
        ("revoke", [Status.ACTIVE], Status.INACTIVE, "revoked"),
        ("replace", [Status.ACTIVE], Status.INACTIVE, "revoked"),
    )

    patient_id: Mapped[str] = mapped_column(Id)
    recipient: Mapped[dict[str, Any]] = mapped_column(JSONB)
    recipient_id: Mapped[str] = mapped_column(Id)
    contact_value: Mapped[str]
    channel: Mapped[str]
    purpose: Mapped[str]
    basis: Mapped[str]
    text_version: Mapped[str]
    evidence: Mapped[str]
    status: Mapped[Status] = mapped_column(status_type(Status))
    recorder: Mapped[str] = mapped_column(Text, default="")
    end_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    end_reason: Mapped[str] = mapped_column(Text, default="")
    end_evidence: Mapped[str] = mapped_column(Text, default="")

    def end(self, reason: str, now: datetime, evidence: str = "") -> None:
        """End it: "revoked", "replaced" or "contact-changed"; `evidence` says where the proof of the wish is."""
        self.move("revoke" if reason == "revoked" else "replace", reason_code=reason)
        self.end_time = now
        self.end_reason = reason
        self.end_evidence = evidence

    def covers(self, purpose: str) -> bool:
        """Whether a message of this purpose may rest on it; "care" covers all that isn't marketing."""
        return self.purpose in (purpose, "care")


async def end_consents(db: AsyncSession, patient: Patient, gone: Iterable[str]) -> None:
    """A contact value was taken from the record: what was agreed for it ends."""
    found = await db.execute(
        select(Consent).where(
            Consent.tenant_id == patient.tenant_id,
            Consent.patient_id == patient.id,
            Consent.recipient_id == patient.id,
            Consent.status == Status.ACTIVE,
            Consent.contact_value.in_(list(gone)),
        )
    )
    for consent in found.scalars():
        consent.end("contact-changed", db.info["act"].now)


def recipient_of(
    patient: Patient | None,
    person: RelatedPerson | None,
    *,
    kind: str,
    channel: str,
    purpose: str,
    consents: Iterable[Consent],
) -> dict[str, Any]:
    """Whom to write to right now, or why not: "not-found", "deceased", "no-contact", "no-consent".

    The value with the best rank whose consent covers the purpose wins.
    """
    who = person if kind == "RelatedPerson" else patient
    if patient is None or who is None or (kind == "RelatedPerson" and who.patient_id != patient.id):
        return {"refusal": "not-found"}
    if patient.deceased:
        return {"refusal": "deceased"}
    values = _values(who.telecom, channel)
    if not values:
        return {"refusal": "no-contact"}
    agreed = {
        one.contact_value: one
        for one in consents
        if one.patient_id == patient.id
        and one.recipient_id == who.id
        and one.channel == channel
        and one.status is Status.ACTIVE
        and one.covers(purpose)
    }
    for value in values:
        consent = agreed.get(value)
        if consent is not None:
            return {
                "contact_value": value,
                "languages": list(who.languages or patient.languages),
                # Where a related person lives is not known: the patient's zone is.
                "time_zones": [patient.time_zone] if patient.time_zone else [],
                "given_name": who.given_name,
                "consent_id": consent.id,
                "consent_version": consent.version,
                "consent_basis": consent.basis,
            }
    return {"refusal": "no-consent"}


def _values(telecom: Iterable[dict[str, Any]], channel: str) -> list[str]:
    """Contact values that fit a channel, best rank first. A text needs a mobile, or a number that consent names."""
    kinds = {"SMS": ("PHONE", "SMS"), "VOICE": ("PHONE",), "EMAIL": ("EMAIL",)}.get(channel, ())
    fitting = [
        one
        for one in telecom
        if one.get("system") in kinds
        and one.get("use") != "OLD"
        and one.get("line_type") not in (("INVALID", "LANDLINE") if channel == "SMS" else ("INVALID",))
    ]
    fitting.sort(key=lambda one: (one.get("rank") or 99, one.get("line_type") != "MOBILE"))
    return [contact_key(one.get("e164") or one["value"]) for one in fitting]

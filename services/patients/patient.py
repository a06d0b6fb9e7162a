"""Patients, the persons around them, and who may see their records."""

import re
from datetime import date, datetime
from typing import Any

from sqlalchemy import BigInteger, DateTime, Index, Text, UniqueConstraint, bindparam, func, select, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from chassis.errors import Invalid
from chassis.model import Aggregate, Id, Ids, Owned, about_subject, base, by_change
from services.patients.names import contact_values, digits, fold, normalized, phonetic

Base = base()
_JSON_LIST = {"nullable": False, "default": list, "server_default": text("'[]'")}


class Patient(Aggregate, Base):
    """A person in care. The record subject: its own row is what access is decided about."""

    __tablename__ = "patient"
    __table_args__ = (
        Index("patient_by_family", "tenant_id", "family_folded", postgresql_ops={"family_folded": "text_pattern_ops"}),
        Index("patient_by_sound", "tenant_id", "family_phonetic"),
        Index("patient_by_birth_date", "tenant_id", "birth_date"),
        Index("patient_by_phone", "phone_digits", postgresql_using="gin"),
        by_change("patient"),
        Index("patient_by_time", "tenant_id", "create_time", "id"),
    )
    aggregate = "patient"
    subject_field = "id"

    identifiers: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    names: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    telecom: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    addresses: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    gender: Mapped[str] = mapped_column(Text, default="CODE_UNSPECIFIED")
    birth_date: Mapped[str] = mapped_column(Text, default="")
    languages: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    interpreter_needed: Mapped[bool] = mapped_column(default=False)
    time_zone: Mapped[str] = mapped_column(Text, default="")
    time_zone_source: Mapped[str] = mapped_column(Text, default="TIME_ZONE_SOURCE_UNSPECIFIED")
    deceased: Mapped[bool] = mapped_column(default=False)
    deceased_date: Mapped[str] = mapped_column(Text, default="")
    active: Mapped[bool] = mapped_column(default=True)
    restricted: Mapped[bool] = mapped_column(default=False)
    source_system: Mapped[str] = mapped_column(Text, default="")
    survivor_id: Mapped[str | None] = mapped_column(Id)
    # Kept beside the relations for answers and lists.
    clinic_ids: Mapped[list[str]] = mapped_column(Ids, default=list)
    access_version: Mapped[int] = mapped_column(BigInteger, default=0)
    family_folded: Mapped[str] = mapped_column(Text, default="")
    given_folded: Mapped[str] = mapped_column(Text, default="")
    family_phonetic: Mapped[str] = mapped_column(Text, default="")
    phone_digits: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)

    def change(self, **values: Any) -> set[str]:
        """Set fields; answers the contact values that are gone, whose consents end.

        Raises Invalid `TIME_ZONE_UNKNOWN`, `DATE_INVALID`, `NAME_BLANK`.
        """
        if values.get("active", True) is None:
            values["active"] = True
        for number, name in enumerate(values.get("names", ())):
            _not_blank(name, f"patient.names[{number}]")
        for name in ("birth_date", "deceased_date"):
            known_day(values.get(name, ""), f"patient.{name}")
        before = contact_values(self.telecom or [])
        if "telecom" in values:
            values["telecom"] = normalized(values["telecom"])
        if "time_zone" in values and values["time_zone"] and "time_zone_source" not in values:
            values["time_zone_source"] = "STATED"
        if "languages" in values:
            values["languages"] = list(dict.fromkeys(values["languages"]))
        was_deceased = bool(self.deceased)
        for name, value in values.items():
            setattr(self, name, value)
        if self.time_zone:
            known_zone(self.time_zone)
        self._index()
        if self.deceased and not was_deceased and self.version:
            self.tell("deceased")
        return before - contact_values(self.telecom or [])

    def _index(self) -> None:
        shown = self.names[0] if self.names else {}
        self.family_folded = fold(shown.get("family_name", ""))
        self.given_folded = fold(" ".join(shown.get("given_names", ())))
        self.family_phonetic = phonetic(shown.get("family_name", ""))
        self.phone_digits = sorted({digits(one["value"]) for one in self.telecom or () if one.get("system") == "PHONE"})

    @property
    def given_name(self) -> str:
        """For a greeting."""
        shown = self.names[0] if self.names else {}
        return (shown.get("given_names") or [""])[0]

    @property
    def record_labels(self) -> list[str]:
        """Labels of the record as a whole; a restricted one carries "R"."""
        return sorted({*self.security_labels, *(("R",) if self.restricted else ())})


class PatientIdentifier(Owned, Base):
    """An identifier, unique per tenant and system."""

    __tablename__ = "patient_identifier"
    __table_args__ = (UniqueConstraint("tenant_id", "system", "value", name="patient_identifier_key"),)

    patient_id: Mapped[str] = mapped_column(Id, index=True)
    system: Mapped[str]
    value: Mapped[str]


class RelatedPerson(Aggregate, Base):
    """Somebody around a patient, with what they may do for the patient and until when."""

    __tablename__ = "related_person"
    __table_args__ = (about_subject("related_person"), Index("related_person_by_patient", "tenant_id", "patient_id"))
    aggregate = "related_person"

    patient_id: Mapped[str] = mapped_column(Id)
    name: Mapped[dict[str, Any]] = mapped_column(JSONB, default=dict)
    relationship: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    telecom: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    languages: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    proxy_permissions: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    proxy_expire_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))

    @property
    def given_name(self) -> str:
        """How a message addresses them."""
        return ((self.name or {}).get("given_names") or [""])[0]

    def change(self, **values: Any) -> None:
        """Set fields. Raises Invalid `PROXY_WITHOUT_END`, `NAME_BLANK`."""
        if values.get("name"):
            _not_blank(values["name"], "related_person.name")
        if "telecom" in values:
            values["telecom"] = normalized(values["telecom"])
        for name, value in values.items():
            setattr(self, name, value)
        if self.proxy_permissions and self.proxy_expire_time is None:
            raise Invalid("PROXY_WITHOUT_END", "A proxy's right needs proxy_expire_time.", field="proxy_expire_time")


class Relation(Owned, Base):
    """Why a clinic or a member of the care team may see a patient."""

    __tablename__ = "relation"
    __table_args__ = (
        UniqueConstraint("tenant_id", "patient_id", "grantee_id", "reason", name="relation_key"),
        about_subject("relation"),
    )

    patient_id: Mapped[str] = mapped_column(Id)
    kind: Mapped[str]  # "clinic" or "staff"
    grantee_id: Mapped[str] = mapped_column(Id)
    reason: Mapped[str]  # registered, encounter, appointment, referral, opened, care-team
    since: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=text("clock_timestamp()"))
    until: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


# Text, because SQLAlchemy compiles ON CONFLICT anew for each event.
_RELATE = text(
    "INSERT INTO relation (tenant_id, id, patient_id, kind, grantee_id, reason)"
    " SELECT :tenant, gen_random_uuid(), :patient, 'clinic', clinic, :reason FROM unnest(:clinics) AS clinic"
    " ON CONFLICT ON CONSTRAINT relation_key DO NOTHING RETURNING 1"
).bindparams(
    bindparam("tenant", type_=Id),
    bindparam("patient", type_=Id),
    bindparam("clinics", type_=Ids),
    bindparam("reason", type_=Text),
)


_IS_RELATED = text(
    "SELECT 1 FROM relation WHERE tenant_id = :tenant AND patient_id = :patient AND kind = 'clinic'"
    " AND grantee_id = :clinic AND reason = :reason"
).bindparams(
    bindparam("tenant", type_=Id),
    bindparam("patient", type_=Id),
    bindparam("clinic", type_=Id),
    bindparam("reason", type_=Text),
)


class Grant(Owned, Base):
    """Access of one staff member for a limited time, with a reason: broken glass, or a review that follows from it."""

    __tablename__ = "access_grant"
    __table_args__ = (about_subject("access_grant"), Index("access_grant_by_patient", "tenant_id", "patient_id"))

    patient_id: Mapped[str] = mapped_column(Id)
    staff_id: Mapped[str] = mapped_column(Id)
    reason: Mapped[str]
    # Empty: whatever the holder's roles allow.
    permissions: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    create_time: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=text("clock_timestamp()"))
    expire_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))


def _not_blank(name: dict[str, Any], field: str) -> None:
    if not "".join((name.get("family_name", ""), *name.get("given_names", ()))).strip():
        raise Invalid("NAME_BLANK", "A name has a family name or a given name.", field=field)


def known_day(written: str, field: str) -> None:
    """Raises Invalid `DATE_INVALID` unless it is empty, a year, a month or a day that the calendar has."""
    try:
        if written:
            if not re.fullmatch("[0-9]{4}(-[0-9]{2}){0,2}", written):
                raise ValueError
            date.fromisoformat((written + "-01-01")[:10])
    except ValueError:
        raise Invalid("DATE_INVALID", "Not a date as YYYY, YYYY-MM or YYYY-MM-DD.", field=field) from None


def known_zone(name: str) -> str:
    """An IANA zone. Raises Invalid `TIME_ZONE_UNKNOWN`."""
    from zoneinfo import available_timezones

    if name not in available_timezones():
        raise Invalid("TIME_ZONE_UNKNOWN", "time_zone is no IANA zone, such as America/New_York.", field="time_zone")
    return name


async def is_related(db: AsyncSession, tenant_id: str, patient_id: str, clinic_id: str, reason: str) -> bool:
    """Whether `relate` would add nothing."""
    values = {"tenant": tenant_id, "patient": patient_id, "clinic": clinic_id, "reason": reason}
    return (await db.execute(_IS_RELATED, values)).first() is not None


async def relate(db: AsyncSession, patient: Patient, clinic_ids: list[str], reason: str) -> bool:
    """Add relations to clinics; True where one is new. Call `tell_access` then."""
    if not clinic_ids:
        return False
    values = {"tenant": patient.tenant_id, "patient": patient.id, "reason": reason, "clinics": sorted({*clinic_ids})}
    return (await db.execute(_RELATE, values)).first() is not None


async def tell_access(db: AsyncSession, patient: Patient) -> None:
    """Work out the whole access set of a patient, keep it as this service's own projection, and tell it.

    The patient's row must be locked by this transaction, so that versions follow each other.
    """
    await db.flush()
    relations = (
        await db.execute(
            select(Relation.kind, Relation.grantee_id)
            .where(Relation.tenant_id == patient.tenant_id, Relation.patient_id == patient.id)
            .where((Relation.until.is_(None)) | (Relation.until > func.clock_timestamp()))
            .order_by(Relation.since, Relation.grantee_id)
        )
    ).all()
    grants = (
        await db.execute(
            select(Grant.staff_id, Grant.expire_time, Grant.permissions).where(
                Grant.tenant_id == patient.tenant_id,
                Grant.patient_id == patient.id,
                Grant.expire_time > func.clock_timestamp(),
            )
        )
    ).all()
    proxies = (
        await db.execute(
            select(RelatedPerson.id, RelatedPerson.proxy_expire_time, RelatedPerson.proxy_permissions).where(
                RelatedPerson.tenant_id == patient.tenant_id,
                RelatedPerson.patient_id == patient.id,
                RelatedPerson.proxy_expire_time > func.clock_timestamp(),
            )
        )
    ).all()
    patient.access_version = (patient.access_version or 0) + 1
    patient.clinic_ids = list(dict.fromkeys(one.grantee_id for one in relations if one.kind == "clinic"))
    grantees = list(dict.fromkeys([patient.id, *(one.grantee_id for one in relations)]))
    timed = [
        *(
            {"grantee_id": one.staff_id, "expire_time": one.expire_time, "permissions": one.permissions}
            for one in grants
        ),
        *(
            {"grantee_id": one.id, "expire_time": one.proxy_expire_time, "permissions": one.proxy_permissions}
            for one in proxies
            if one.proxy_permissions
        ),
    ]
    table = db.info["runtime"].tables.access.subject
    values = {
        "tenant_id": patient.tenant_id,
        "patient_id": patient.id,
        "access_version": patient.access_version,
        "grantee_ids": grantees,
        "timed_grants": [
            {
                "id": one["grantee_id"],
                "until": one["expire_time"].isoformat(),
                "permissions": one["permissions"],
            }
            for one in timed
        ],
        "security_labels": patient.record_labels,
        "survivor_id": patient.survivor_id,
    }
    statement = insert(table).values(values)
    await db.execute(
        statement.on_conflict_do_update(
            index_elements=["tenant_id", "patient_id"],
            set_={name: statement.excluded[name] for name in values if name not in ("tenant_id", "patient_id")},
        )
    )
    patient.tell(
        "access_changed",
        subject_id=patient.id,
        access_version=patient.access_version,
        grantee_ids=grantees,
        timed_grants=timed,
        security_labels=patient.record_labels,
        survivor_id=patient.survivor_id or "",
    )

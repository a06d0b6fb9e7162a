"""Staff, pools, roles and logins."""

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from chassis.errors import Invalid
from chassis.model import Aggregate, Id, Ids
from services.patients.patient import Base


class Staff(Aggregate, Base):
    """Somebody who works for the health system."""

    __tablename__ = "staff"
    __table_args__ = (
        Index("staff_login_key", "tenant_id", "issuer", "subject", unique=True, postgresql_where=text("subject <> ''")),
        Index("staff_by_name", "tenant_id", "family_name", "id"),
    )
    aggregate = "staff"
    subject_field = None

    issuer: Mapped[str] = mapped_column(Text, default="")
    subject: Mapped[str] = mapped_column(Text, default="")
    name: Mapped[dict[str, Any]] = mapped_column(JSONB, default=dict)
    family_name: Mapped[str] = mapped_column(Text, default="")
    credentials: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    clinical: Mapped[bool] = mapped_column(default=False)
    practitioner_id: Mapped[str | None] = mapped_column(Id)
    clinic_ids: Mapped[list[str]] = mapped_column(Ids, default=list)
    roles: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    licensed_states: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    absences: Mapped[list[Any]] = mapped_column(JSONB, default=list)
    clearances: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    active: Mapped[bool] = mapped_column(default=True)

    def change(self, **values: Any) -> bool:
        """Set fields and tell the whole state, since every service decides by it; answers whether there is or was a login."""
        had_login = bool(self.subject)
        if "practitioner_id" in values:
            values["practitioner_id"] = values["practitioner_id"] or None
        for name, value in values.items():
            setattr(self, name, value)
        self.family_name = (self.name or {}).get("family_name", "")
        login = had_login or bool(self.subject)
        if login:
            self.tell("changed", **self.principal)
        return login

    @property
    def principal(self) -> dict[str, Any]:
        """As `care.access.v1.PrincipalState`."""
        state = {"kind": "STAFF", "principal_id": self.id, "group_ids": self.clinic_ids}
        if not self.subject:
            # The login was taken away. Its place is kept by one that no issuer signs in, so that the old one stops working.
            state |= {"issuer": "", "subject": self.id, "active": False}
        return state


class Login(Aggregate, Base):
    """A sign-in of a patient or related person."""

    __tablename__ = "login"
    __table_args__ = (UniqueConstraint("tenant_id", "issuer", "subject", name="login_key"),)
    aggregate = "login"
    subject_field = None

    issuer: Mapped[str]
    subject: Mapped[str]
    kind: Mapped[str]  # PATIENT or RELATED
    person_id: Mapped[str] = mapped_column(Id)

    @property
    def principal(self) -> dict[str, Any]:
        """As `care.access.v1.PrincipalState`."""
        role = "patient" if self.kind == "PATIENT" else "proxy"
        return {
            "kind": self.kind,
            "principal_id": self.person_id,
            "roles": [role],
            "group_ids": [],
            "clearances": [],
            "active": True,
        }

    @property
    def person(self) -> dict[str, str]:
        """Whose sign-in it is."""
        return {"type": "Patient" if self.kind == "PATIENT" else "RelatedPerson", "id": self.person_id}


class Pool(Aggregate, Base):
    """A team that owns work."""

    __tablename__ = "pool"
    __table_args__ = (UniqueConstraint("tenant_id", "name", name="pool_name_key"),)
    aggregate = "pool"
    subject_field = None

    name: Mapped[str]
    purpose: Mapped[str] = mapped_column(Text, default="")
    staff_ids: Mapped[list[str]] = mapped_column(Ids, default=list)
    clinic_ids: Mapped[list[str]] = mapped_column(Ids, default=list)
    specialty_codes: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    active: Mapped[bool] = mapped_column(default=True)

    def change(self, **values: Any) -> None:
        """Set fields and tell the whole pool. Raises Invalid `NAME_MISSING`."""
        if values.get("active", True) is None:
            values["active"] = True
        for name, value in values.items():
            setattr(self, name, value)
        if not (self.name or "").strip():
            raise Invalid("NAME_MISSING", "A pool needs a name.", field="pool.name")
        self.tell("changed")


class Role(Aggregate, Base):
    """A named set of permissions."""

    __tablename__ = "role"
    __table_args__ = (UniqueConstraint("tenant_id", "name", name="role_name_key"),)
    aggregate = "role"
    subject_field = None

    name: Mapped[str]
    permissions: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    # What releases have ever shipped with it: what is not among these is new, what is and is lacking was taken away.
    shipped: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list, server_default=text("'{}'"))

    def ship(self, permissions: Iterable[str]) -> bool:
        """Add what a release ships that no former one did; what the tenant has taken away stays away. Whether it changed."""
        fresh = set(permissions) - set(self.shipped or ())
        if not fresh:
            return False
        self.shipped = sorted({*(self.shipped or ()), *fresh})
        before = self.permissions or []
        if fresh <= set(before):
            return False
        self.change([*before, *fresh])
        return True

    def change(self, permissions: list[str]) -> None:
        """Replace the permissions and tell them."""
        self.permissions = sorted(set(permissions))
        self.tell("changed")

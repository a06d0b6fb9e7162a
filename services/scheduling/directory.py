"""The directory: clinics, practitioners, rooms and devices, visit types, and the hours in which they can be booked."""

from collections.abc import Iterable
from datetime import date, time, timedelta
from functools import cache
from typing import Any
from zoneinfo import ZoneInfo, available_timezones

import phonenumbers
from sqlalchemy import Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from chassis.calendar import is_holiday
from chassis.errors import FailedPrecondition, Invalid
from chassis.model import Aggregate, Id, Ids, Owned, base
from services.scheduling import availability
from services.scheduling.availability import DateException, WeeklyHours

Base = base()
_JSON_LIST = {"nullable": False, "default": list, "server_default": text("'[]'")}


class DirectoryRow(Aggregate):
    """What clinics, practitioners, visit types, schedules and resources share: each change tells the full state."""

    subject_field = None
    defaults: dict[str, Any] = {}

    def change(self, **values: Any) -> bool:
        """Set fields, checked, and tell the whole state; answers whether anything differs. Raises Invalid."""
        values = {name: self.defaults.get(name) if value is None else value for name, value in values.items()}
        if self.version is None:
            values = {**{name: value for name, value in self.defaults.items() if name not in values}, **values}
        elif all(getattr(self, name) == value for name, value in values.items()):
            return False
        for name, value in values.items():
            setattr(self, name, value)
        self.check()
        self.tell("changed")
        return True

    def check(self) -> None:
        """Raises Invalid where the row as a whole is not right."""


class Clinic(DirectoryRow, Base):
    """A place where patients are seen."""

    __tablename__ = "clinic"
    __table_args__ = (Index("clinic_by_name", "tenant_id", "name", "id"),)
    aggregate = "clinic"
    defaults = {"status": "ACTIVE"}

    identifiers: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    name: Mapped[str]
    discreet_name: Mapped[str] = mapped_column(Text, default="")
    time_zone: Mapped[str] = mapped_column(Text, default="")
    address: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    telecom: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    holiday_region: Mapped[str] = mapped_column(Text, default="")
    closed_dates: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    status: Mapped[str] = mapped_column(Text, default="ACTIVE")
    directions: Mapped[str] = mapped_column(Text, default="")
    specialties: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    source_system: Mapped[str] = mapped_column(Text, default="")

    def change(self, **values: Any) -> bool:
        """As `DirectoryRow.change`. Raises Invalid `TIME_ZONE_UNKNOWN`, `HOLIDAY_REGION_UNKNOWN`, `DATE_INVALID`."""
        if values.get("status") == "STATUS_UNSPECIFIED":
            values["status"] = "ACTIVE"
        if "telecom" in values:
            values["telecom"] = [_with_e164(point) for point in values["telecom"]]
        return super().change(**values)

    def check(self) -> None:
        if not self.name:
            raise Invalid("NAME_MISSING", "A clinic needs a name.", field="clinic.name")
        if self.time_zone and self.time_zone not in _zones():
            raise Invalid(
                "TIME_ZONE_UNKNOWN", "time_zone is no IANA zone, such as America/New_York.", field="clinic.time_zone"
            )
        if self.holiday_region:
            try:
                is_holiday(date(2026, 1, 1), self.holiday_region)
            except ValueError:
                raise Invalid(
                    "HOLIDAY_REGION_UNKNOWN", "There is no such holiday calendar.", field="clinic.holiday_region"
                ) from None
        for day in self.closed_dates or ():
            _date(day, "clinic.closed_dates")

    @property
    def bookable(self) -> bool:
        """Whether visits can be booked here at all."""
        return self.status == "ACTIVE" and bool(self.time_zone)

    @property
    def zone(self) -> ZoneInfo:
        """The zone in which all its hours are. Raises FailedPrecondition `CLINIC_WITHOUT_ZONE`."""
        if not self.time_zone:
            raise FailedPrecondition("CLINIC_WITHOUT_ZONE", "This clinic has no time zone yet: nothing can be booked.")
        return ZoneInfo(self.time_zone)

    def closed_days(self, first: date, last: date) -> frozenset[date]:
        """The days from `first` to `last` on which it is closed: its own and, where a region is set, its holidays."""
        days = {date.fromisoformat(day) for day in self.closed_dates or ()}
        closed = {day for day in days if first <= day <= last}
        if self.holiday_region:
            span = (first + timedelta(days=n) for n in range((last - first).days + 1))
            closed.update(day for day in span if is_holiday(day, self.holiday_region))
        return frozenset(closed)


class Practitioner(DirectoryRow, Base):
    """Somebody whom patients see."""

    __tablename__ = "practitioner"
    __table_args__ = (
        Index("practitioner_by_name", "tenant_id", "family_name", "id"),
        Index("practitioner_by_clinic", "clinic_ids", postgresql_using="gin"),
    )
    aggregate = "practitioner"
    defaults = {"active": True}

    identifiers: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    name: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    languages: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    licensed_states: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    roles: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    gender: Mapped[str] = mapped_column(Text, default="")
    active: Mapped[bool] = mapped_column(default=True)
    source_system: Mapped[str] = mapped_column(Text, default="")
    # Kept beside name and roles for lists.
    family_name: Mapped[str] = mapped_column(Text, default="")
    clinic_ids: Mapped[list[str]] = mapped_column(Ids, default=list)

    def check(self) -> None:
        self.family_name = (self.name or {}).get("family_name", "")
        if not self.family_name:
            raise Invalid("NAME_MISSING", "A practitioner needs a family name.", field="practitioner.name.family_name")
        self.clinic_ids = list(dict.fromkeys(role["clinic_id"] for role in self.roles or ()))

    def roles_with(self, brought: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The present roles with those brought added or refreshed, clinic by clinic; none is removed."""
        by_clinic = {role["clinic_id"]: role for role in self.roles or ()}
        for role in brought:
            merged = {**by_clinic.get(role["clinic_id"], {}), **role}
            known = by_clinic.get(role["clinic_id"], {}).get("specialties", [])
            codes = {one["code"] for one in role.get("specialties", ())}
            specialties = [*(one for one in known if one["code"] not in codes), *role.get("specialties", ())]
            if specialties:
                merged["specialties"] = specialties
            by_clinic[role["clinic_id"]] = merged
        return list(by_clinic.values())

    def has_specialty(self, clinic_id: str, code: str) -> bool:
        """Whether a role at the clinic names the specialty code."""
        return any(
            role["clinic_id"] == clinic_id and any(one["code"] == code for one in role.get("specialties", ()))
            for role in self.roles or ()
        )


class Resource(DirectoryRow, Base):
    """A room or device."""

    __tablename__ = "resource"
    __table_args__ = (Index("resource_by_clinic", "tenant_id", "clinic_id", "kind"),)
    aggregate = "resource"

    clinic_id: Mapped[str] = mapped_column(Id)
    kind: Mapped[str]
    name: Mapped[str]


class VisitType(DirectoryRow, Base):
    """What can be booked."""

    __tablename__ = "visit_type"
    __table_args__ = (UniqueConstraint("tenant_id", "code", name="visit_type_code_key"),)
    aggregate = "visit_type"
    defaults = {"active": True, "modality": "IN_PERSON"}

    code: Mapped[str]
    name: Mapped[str]
    discreet_name: Mapped[str] = mapped_column(Text, default="")
    duration_minutes: Mapped[int]
    buffer_before_minutes: Mapped[int] = mapped_column(default=0)
    buffer_after_minutes: Mapped[int] = mapped_column(default=0)
    modality: Mapped[str] = mapped_column(Text, default="IN_PERSON")
    resource_kinds: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list)
    specialty: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    start_grid_minutes: Mapped[int] = mapped_column(default=0)
    minimum_notice_minutes: Mapped[int] = mapped_column(default=0)
    late_cancel_hours: Mapped[int] = mapped_column(default=0)
    overbooking_cap: Mapped[int] = mapped_column(default=0)
    preparation: Mapped[dict[str, Any]] = mapped_column(JSONB, default=dict)
    active: Mapped[bool] = mapped_column(default=True)

    def change(self, **values: Any) -> bool:
        """As `DirectoryRow.change`."""
        if values.get("modality") == "MODALITY_UNSPECIFIED":
            values["modality"] = "IN_PERSON"
        return super().change(**values)

    def check(self) -> None:
        for field in ("code", "name", "duration_minutes"):
            if not getattr(self, field):
                raise Invalid(f"{field.upper()}_MISSING", f"A visit type needs {field}.", field=f"visit_type.{field}")

    @property
    def grid(self) -> int:
        """Minutes between possible starts."""
        return self.start_grid_minutes or 15

    @property
    def late_hours(self) -> int:
        """Hours before the start from which a cancellation is late."""
        return self.late_cancel_hours or 24

    @property
    def asks(self) -> availability.VisitType:
        """What it asks of the calendar."""
        return availability.VisitType(
            self.id,
            self.duration_minutes,
            self.buffer_before_minutes or 0,
            self.buffer_after_minutes or 0,
            self.grid,
            self.minimum_notice_minutes or 0,
        )


class Schedule(DirectoryRow, Base):
    """Hours of a practitioner at a clinic."""

    __tablename__ = "schedule"
    __table_args__ = (
        UniqueConstraint("tenant_id", "practitioner_id", "clinic_id", name="schedule_practitioner_key"),
        Index("schedule_by_clinic", "tenant_id", "clinic_id"),
    )
    aggregate = "schedule"

    practitioner_id: Mapped[str] = mapped_column(Id)
    clinic_id: Mapped[str] = mapped_column(Id)
    weekly_hours: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    exceptions: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)

    def check(self) -> None:
        """Raises Invalid `DATE_INVALID`, `PERIOD_INVALID`, `TIMES_INCOMPLETE`."""
        for block in self.weekly():
            if block.valid_from and block.valid_until and block.valid_until < block.valid_from:
                raise Invalid(
                    "PERIOD_INVALID", "valid_until is before valid_from.", field="schedule.weekly_hours.valid_until"
                )
        for change in self.exceptions_():
            if (change.start is None) != (change.end is None):
                raise Invalid(
                    "TIMES_INCOMPLETE", "An exception has both times or none.", field="schedule.exceptions.start"
                )

    def weekly(self) -> tuple[WeeklyHours, ...]:
        """The weekly hours as the calendar's arithmetic takes them (0 is Monday there)."""
        return tuple(
            WeeklyHours(
                weekday=block["weekday"] - 1,
                start=time.fromisoformat(block["start"]),
                end=time.fromisoformat(block["end"]),
                visit_type_ids=frozenset(block.get("visit_type_ids", ())),
                valid_from=_date(block.get("valid_from"), "schedule.weekly_hours.valid_from"),
                valid_until=_date(block.get("valid_until"), "schedule.weekly_hours.valid_until"),
            )
            for block in self.weekly_hours or ()
        )

    def exceptions_(self) -> tuple[DateException, ...]:
        """The days that differ, as the calendar's arithmetic takes them."""
        return tuple(
            DateException(
                date=_date(change["date"], "schedule.exceptions.date"),  # type: ignore[arg-type]
                kind="closed" if change["kind"] == "CLOSED" else "extra",
                start=time.fromisoformat(change["start"]) if change.get("start") else None,
                end=time.fromisoformat(change["end"]) if change.get("end") else None,
            )
            for change in self.exceptions or ()
        )


class DirectoryIdentifier(Owned, Base):
    """A business identifier of a clinic or practitioner, unique per tenant and system."""

    __tablename__ = "directory_identifier"
    __table_args__ = (UniqueConstraint("tenant_id", "system", "value", name="directory_identifier_key"),)

    kind: Mapped[str]  # aggregate name
    owner_id: Mapped[str] = mapped_column(Id, index=True)
    system: Mapped[str]
    value: Mapped[str]


@cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones())


def _date(value: str | None, field: str) -> date | None:
    if not value:
        return None
    try:
        return date.fromisoformat(value)
    except ValueError:
        raise Invalid("DATE_INVALID", "There is no such day in the calendar.", field=field) from None


def _with_e164(point: dict[str, Any]) -> dict[str, Any]:
    """A contact point with its number in E.164 where it can be had; the raw value stays."""
    point = {name: value for name, value in point.items() if name != "e164"}
    if point.get("system") in ("PHONE", "SMS", "FAX"):
        try:
            number = phonenumbers.parse(point["value"], "US")
        except phonenumbers.NumberParseException:
            return point
        if phonenumbers.is_valid_number(number):
            point["e164"] = phonenumbers.format_number(number, phonenumbers.PhoneNumberFormat.E164)
    return point

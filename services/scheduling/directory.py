"""The directory: clinics, practitioners, rooms and devices, visit types, and the hours in which they can be booked."""

from collections.abc import Iterable, Sequence
from datetime import UTC, date, datetime, time, timedelta
from functools import cache
from itertools import combinations
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, available_timezones

import phonenumbers
from sqlalchemy import DateTime, Index, Text, UniqueConstraint, text
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import Mapped, mapped_column

from chassis.calendar import is_holiday
from chassis.errors import FailedPrecondition, Invalid
from chassis.model import Aggregate, Id, Ids, Owned, base
from services.scheduling import availability
from services.scheduling.availability import DAY, DateException, Interval, Quota, WeeklyHours, intersect, merge

Base = base()
INTERPRETER = "interpreter"
"""The kind of resource that has languages."""
_FOREVER = (-(1 << 40), 1 << 40)
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
    position: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))

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

    def in_force(self, clinic_id: str, specialties: Iterable[str] = ()) -> list[Interval]:
        """When the roles at a clinic are in force, in epoch seconds; only those with one of the specialties, where any
        is asked for. Where nothing is asked and no role at the clinic is recorded, its hours alone decide.
        """
        wanted = set(specialties)
        here = [role for role in self.roles or () if role["clinic_id"] == clinic_id]
        if not here and not wanted:
            return [_FOREVER]
        return merge(
            _in_force(role.get("period") or {})
            for role in here
            if not wanted or any(one["code"] in wanted for one in role.get("specialties", ()))
        )


class Resource(DirectoryRow, Base):
    """A room, a device or an interpreter."""

    __tablename__ = "resource"
    __table_args__ = (Index("resource_by_clinic", "tenant_id", "clinic_id", "kind"),)
    aggregate = "resource"

    defaults = {"active": True}

    clinic_id: Mapped[str] = mapped_column(Id)
    kind: Mapped[str]
    name: Mapped[str]
    weekly_hours: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    exceptions: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    languages: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list, server_default=text("'{}'"))
    active: Mapped[bool] = mapped_column(default=True, server_default=text("true"))

    def check(self) -> None:
        """Raises Invalid as `Schedule.check`, and `KIND_RESERVED`, `KIND_MISSING`, `NAME_MISSING`."""
        for field in ("kind", "name"):
            if not getattr(self, field):
                raise Invalid(f"{field.upper()}_MISSING", f"A resource needs {field}.", field=f"resource.{field}")
        if self.kind in ("patient", "practitioner"):
            raise Invalid("KIND_RESERVED", "No room or device is of this kind.", field="resource.kind")
        check_hours(weekly(self.weekly_hours, "resource"), exceptions(self.exceptions, "resource"), "resource")

    @property
    def hours(self) -> tuple[WeeklyHours, ...] | None:
        """Its own weekly hours; None for one that is there always."""
        return weekly(self.weekly_hours, "resource") or None


class Need(NamedTuple):
    """Any one of these is needed: a resource of a kind, or a certain one, or an interpreter of a language."""

    kinds: frozenset[str] = frozenset()
    resource_ids: frozenset[str] = frozenset()
    language: str = ""

    def met_by(self, resource_id: str, kind: str, languages: Sequence[str]) -> bool:
        """Whether a resource will do."""
        if self.language:
            return kind == INTERPRETER and speaks(languages, self.language)
        return kind in self.kinds or resource_id in self.resource_ids


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
    requirements: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    lock_out_minutes: Mapped[int] = mapped_column(default=0, server_default=text("0"))
    self_booking: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    self_rescheduling: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    self_cancelling: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    eligibility: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    licence_required: Mapped[bool] = mapped_column(default=False, server_default=text("false"))
    # Kept beside requirements for the statement that books.
    needed_kinds: Mapped[list[str]] = mapped_column(ARRAY(Text), default=list, server_default=text("'{}'"))
    needed_ids: Mapped[list[str]] = mapped_column(Ids, default=list, server_default=text("'{}'"))

    def change(self, **values: Any) -> bool:
        """As `DirectoryRow.change`."""
        if values.get("modality") == "MODALITY_UNSPECIFIED":
            values["modality"] = "IN_PERSON"
        return super().change(**values)

    def check(self) -> None:
        for field in ("code", "name", "duration_minutes"):
            if not getattr(self, field):
                raise Invalid(f"{field.upper()}_MISSING", f"A visit type needs {field}.", field=f"visit_type.{field}")
        needs = self.needs()
        if not all(need.kinds or need.resource_ids for need in needs):
            raise Invalid(
                "REQUIREMENT_EMPTY", "A requirement names kinds or resources.", field="visit_type.requirements"
            )
        self.needed_kinds = sorted({kind for one in self.requirements or () for kind in one.get("kinds", ())})
        self.needed_ids = sorted({one for need in needs for one in need.resource_ids})
        rule = self.eligibility or {}
        if rule.get("maximum_age", 150) < rule.get("minimum_age", 0):
            raise Invalid(
                "AGES_INVALID", "maximum_age is below minimum_age.", field="visit_type.eligibility.maximum_age"
            )

    def needs(self, interpreter_language: str = "") -> list[Need]:
        """What each visit needs, all of it: one resource for each, none for two."""
        return [
            *(Need(frozenset({kind})) for kind in self.resource_kinds or ()),
            *(
                Need(frozenset(one.get("kinds", ())), frozenset(one.get("resource_ids", ())))
                for one in self.requirements or ()
            ),
            *([Need(language=interpreter_language)] if interpreter_language else ()),
        ]

    @property
    def remote(self) -> bool:
        """Whether the patient stays at home, where the practitioner may need a licence."""
        return self.modality in ("VIDEO", "PHONE")

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
        Index("schedule_release", "release_time", postgresql_where=text("release_time IS NOT NULL")),
    )
    aggregate = "schedule"

    practitioner_id: Mapped[str] = mapped_column(Id)
    clinic_id: Mapped[str] = mapped_column(Id)
    weekly_hours: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    exceptions: Mapped[list[Any]] = mapped_column(JSONB, **_JSON_LIST)
    # When to look for blocks that were released since; none where nothing is held back.
    release_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))

    def check(self) -> None:
        """Raises Invalid `DATE_INVALID`, `PERIOD_INVALID`, `TIMES_INCOMPLETE`, `HOURS_OVERLAP`."""
        check_hours(self.weekly(), self.exceptions_(), "schedule")
        self.release_time = datetime.now(UTC) if any(block.release_hours for block in self.weekly()) else None

    def weekly(self) -> tuple[WeeklyHours, ...]:
        """The weekly hours as the calendar's arithmetic takes them."""
        return weekly(self.weekly_hours, "schedule")

    def exceptions_(self) -> tuple[DateException, ...]:
        """The days that differ, as the calendar's arithmetic takes them."""
        return exceptions(self.exceptions, "schedule")


class DirectoryIdentifier(Owned, Base):
    """A business identifier of a clinic or practitioner, unique per tenant and system."""

    __tablename__ = "directory_identifier"
    __table_args__ = (UniqueConstraint("tenant_id", "system", "value", name="directory_identifier_key"),)

    kind: Mapped[str]  # aggregate name
    owner_id: Mapped[str] = mapped_column(Id, index=True)
    system: Mapped[str]
    value: Mapped[str]


def weekly(blocks: Iterable[dict[str, Any]] | None, owner: str) -> tuple[WeeklyHours, ...]:
    """Weekly hours as the calendar's arithmetic takes them (0 is Monday there)."""
    return tuple(
        WeeklyHours(
            weekday=block["weekday"] - 1,
            start=time.fromisoformat(block["start"]),
            end=time.fromisoformat(block["end"]),
            visit_type_ids=frozenset(block.get("visit_type_ids", ())),
            valid_from=_date(block.get("valid_from"), f"{owner}.weekly_hours.valid_from"),
            valid_until=_date(block.get("valid_until"), f"{owner}.weekly_hours.valid_until"),
            release_hours=block.get("release_hours", 0),
            staff_only=block.get("staff_only", False),
            quotas=tuple(
                Quota(one.get("at_most", 0), frozenset(one.get("visit_type_ids", ())), one.get("new_patients", False))
                for one in block.get("quotas", ())
            ),
        )
        for block in blocks or ()
    )


def exceptions(changes: Iterable[dict[str, Any]] | None, owner: str) -> tuple[DateException, ...]:
    """Days that differ, as the calendar's arithmetic takes them."""
    return tuple(
        DateException(
            date=_date(change["date"], f"{owner}.exceptions.date"),  # type: ignore[arg-type]
            kind="closed" if change["kind"] == "CLOSED" else "extra",
            start=time.fromisoformat(change["start"]) if change.get("start") else None,
            end=time.fromisoformat(change["end"]) if change.get("end") else None,
        )
        for change in changes or ()
    )


def check_hours(blocks: Sequence[WeeklyHours], changes: Sequence[DateException], owner: str) -> None:
    """Raises Invalid `PERIOD_INVALID`, `TIMES_INCOMPLETE`, `HOURS_OVERLAP`."""
    for block in blocks:
        if block.valid_from and block.valid_until and block.valid_until < block.valid_from:
            raise Invalid(
                "PERIOD_INVALID", "valid_until is before valid_from.", field=f"{owner}.weekly_hours.valid_until"
            )
    for one, other in combinations(blocks, 2):
        if _overlap(one, other):
            raise Invalid(
                "HOURS_OVERLAP",
                "Two blocks of hours for the same visits overlap while both are valid.",
                field=f"{owner}.weekly_hours",
            )
    for change in changes:
        if (change.start is None) != (change.end is None):
            raise Invalid("TIMES_INCOMPLETE", "An exception has both times or none.", field=f"{owner}.exceptions.start")


def speaks(languages: Iterable[str], wanted: str) -> bool:
    """Whether one of the languages is the wanted one, or one of its regions (RFC 4647, basic filtering)."""
    wanted = wanted.lower()
    return any(one.lower() == wanted or one.lower().startswith(wanted + "-") for one in languages)


def _overlap(one: WeeklyHours, other: WeeklyHours) -> bool:
    """Whether a time of the week is in both for some visit type, on days on which both are valid."""
    if one.visit_type_ids and other.visit_type_ids and not one.visit_type_ids & other.visit_type_ids:
        return False
    if max(one.valid_from or date.min, other.valid_from or date.min) > min(
        one.valid_until or date.max, other.valid_until or date.max
    ):
        return False
    return bool(intersect(_of_week(one), _of_week(other)))


def _of_week(block: WeeklyHours) -> list[Interval]:
    """A block in seconds since Monday's midnight; what passes Sunday's goes on from the beginning."""
    week = 7 * DAY
    first = block.weekday * DAY + block.start.hour * 3600 + block.start.minute * 60
    last = block.weekday * DAY + block.end.hour * 3600 + block.end.minute * 60
    last += DAY if last <= first else 0
    return [(first, min(last, week)), (0, last - week)] if last > week else [(first, last)]


def _in_force(period: dict[str, Any]) -> Interval:
    """A role's period in epoch seconds."""
    ends = (period.get("start_time"), period.get("end_time"))
    first, last = (datetime.fromisoformat(one).timestamp() if one else None for one in ends)
    return (
        _FOREVER[0] if first is None else -int(-first // 1),
        _FOREVER[1] if last is None else -int(-last // 1),
    )


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

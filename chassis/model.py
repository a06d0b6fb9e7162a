"""What every aggregate has: tenant, version, times, history, and the events it tells."""

import enum
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    DateTime,
    ForeignKeyConstraint,
    Index,
    MetaData,
    Text,
    Uuid,
    and_,
    event,
    func,
    text,
)
from sqlalchemy import Enum as EnumType
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, declared_attr, mapped_column
from sqlalchemy.orm.attributes import flag_modified, instance_state

from chassis import tables
from chassis.ids import new_id
from chassis.lifecycle import Lifecycle, illegal
from chassis.telemetry import current_traceparent

# Constraint names are part of the contract: reasons are looked up by them.
_NAMING = {
    "ix": "%(table_name)s_%(column_0_N_name)s_ix",
    "uq": "%(table_name)s_%(column_0_N_name)s_key",
    "ck": "%(table_name)s_%(constraint_name)s_check",
    "fk": "%(table_name)s_%(column_0_N_name)s_fkey",
    "pk": "%(table_name)s_pkey",
}


def base() -> type[DeclarativeBase]:
    """A declarative base of one service with the chassis' tables: five services share one interpreter, not metadata."""

    class Base(DeclarativeBase):
        metadata = MetaData(naming_convention=_NAMING)
        metadata.info["chassis"] = tables.all_tables(metadata)
        type_annotation_map = {
            str: Text,
            datetime: DateTime(timezone=True),
            dict[str, Any]: JSONB,
            list[Any]: JSONB,
            list[str]: ARRAY(Text),
            int: BigInteger,
        }

    return Base


def about_subject(table: str, column: str = "patient_id") -> ForeignKeyConstraint:
    """The foreign key of a table about a patient: a row about somebody whom this service doesn't know can't be."""
    return ForeignKeyConstraint(
        ["tenant_id", column],
        ["record_subject.tenant_id", "record_subject.patient_id"],
        name=f"{table}_subject_fkey",
    )


def by_change(table: str) -> Index:
    """The index of a table whose list has `updated_after`."""
    return Index(f"{table}_by_change", "tenant_id", "update_time", "id")


Id = Uuid(as_uuid=False)
"""Column type of ids: `uuid` in the database, text in Python."""
Ids = ARRAY(Uuid(as_uuid=False))
"""Column type of lists of ids."""


def status_type(statuses: type[enum.Enum]) -> EnumType:
    """Column type of a status: its FHIR name as text. A filter by a status that doesn't exist finds nothing."""
    return EnumType(statuses, native_enum=False, length=40, create_constraint=False, validate_strings=False)


@dataclass(frozen=True, slots=True)
class Act:
    """Who changes things in a session, for whom, from where, at which time of the database's clock."""

    actor: str
    now: datetime
    on_behalf_of: str = ""
    source: str = ""


@dataclass(slots=True)
class Told:
    """An event that a row told and that is not in the outbox yet, with the act and the span that it was flushed in."""

    row: Any
    type: str
    extra: dict[str, Any]
    version: int = 0
    labels: list[str] = field(default_factory=list)
    act: Act | None = None
    traceparent: str = ""
    order: int = field(default_factory=time.perf_counter_ns)
    """Rows are flushed in no order; events of one transaction are told as they happened."""


class Owned:
    """Columns of every row of a tenant. The tenant leads the key: no index, no foreign key forgets it."""

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True, sort_order=-20)
    id: Mapped[str] = mapped_column(Id, primary_key=True, sort_order=-19, default=new_id)


class Aggregate(Owned):
    """A row with a life: optimistic version, times of the database's clock, events.

    `aggregate` is its name in event types; `subject_field` names the column that says whose record it is part of
    (None for directory data).
    """

    aggregate: ClassVar[str]
    lifecycle: ClassVar[Lifecycle]
    subject_field: ClassVar[str | None] = "patient_id"

    version: Mapped[int] = mapped_column(BigInteger, nullable=False, sort_order=-18)
    create_time: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=text("clock_timestamp()"), sort_order=-17
    )
    update_time: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), server_default=text("clock_timestamp()"), sort_order=-16
    )

    @declared_attr.directive
    def __mapper_args__(cls) -> dict[str, Any]:
        return {"version_id_col": cls.__table__.c.version, "eager_defaults": True}  # type: ignore[attr-defined]

    @declared_attr
    def security_labels(cls) -> Mapped[list[str]]:
        return mapped_column(ARRAY(Text), nullable=False, default=list, server_default=text("'{}'"), sort_order=90)

    @property
    def subject_id(self) -> str | None:
        """Whose record this row is part of."""
        return getattr(self, self.subject_field) if self.subject_field else None

    def tell(self, what: str, **extra: Any) -> None:
        """Tell `<aggregate>.<what>` (or `what` itself where it has a dot) when this change is committed.

        The payload is made of the row's attributes by name, `extra` first. The row is marked as changed even where
        nothing else did, since SQLAlchemy passes over clean rows and the event would be lost.
        """
        told: list[Told] = self.__dict__.setdefault("_told", [])
        told.append(Told(self, what if "." in what else f"{self.aggregate}.{what}", extra))
        if "update_time" in self.__dict__:
            flag_modified(self, "update_time")
        elif instance_state(self).persistent:  # expired or deferred: marked without reading it
            self.update_time = func.clock_timestamp()


class Living(Aggregate):
    """An aggregate with a status that changes only by its lifecycle's actions, each kept in `history`."""

    history: Mapped[list[Any]] = mapped_column(JSONB, nullable=False, default=list, sort_order=95)

    def move(self, action: str, *, reason_code: str = "", **extra: Any) -> None:
        """Take the lifecycle's arrow for `action` from the present status, keep the step, tell its event.

        Raises FailedPrecondition `ILLEGAL_TRANSITION`.
        """
        status = getattr(self, self.status_field, None)
        arrow = self.lifecycle.arrow(action, status)
        target = arrow.target if arrow.target is not None else self._before_last(action)
        setattr(self, self.status_field, target)
        step = {
            "action": action,
            "from_status": status.name if status is not None else "",
            "to_status": target.name,
            "reason_code": reason_code,
        }
        # A new list, since SQLAlchemy doesn't see changes inside a JSON value.
        self.history = [*(self.history or []), step]
        self.__dict__.setdefault("_steps", []).append(step)
        if arrow.event:
            self.tell(arrow.event, previous_status=step["from_status"], reason_code=reason_code, **extra)

    status_field: ClassVar[str] = "status"

    def _before_last(self, action: str) -> enum.Enum:
        statuses: type[enum.Enum] = type(getattr(self, self.status_field))
        undoing = {arrow.action for arrow in self.lifecycle if arrow.target is None}
        steps: list[dict[str, Any]] = []
        for step in self.history:  # a step that was taken back is no longer there to be taken back
            if step["action"] in undoing:
                del steps[-1:]
            else:
                steps.append(step)
        if not steps or not steps[-1]["from_status"]:  # nothing came before that it could go back to
            raise illegal(action, getattr(self, self.status_field))
        return statuses[steps[-1]["from_status"]]

    @property
    def last_step(self) -> dict[str, Any]:
        """The latest step, with `action`, `from_status`, `to_status`, `time`, `actor`."""
        return self.history[-1] if self.history else {}


def stamp(session: Session) -> None:
    """Before a flush: put the act's time and actor on what changed, and collect what was told."""
    act: Act | None = session.info.get("act")
    told: list[Told] = session.info.setdefault("told", [])
    for row in [*session.new, *session.dirty, *session.deleted]:
        if not isinstance(row, Aggregate):
            continue
        if act is not None:
            if row in session.new:
                row.create_time = row.create_time or act.now
            if row not in session.deleted and (row in session.new or session.is_modified(row)):
                row.update_time = act.now
            for step in row.__dict__.pop("_steps", ()):
                step.update(
                    time=act.now.astimezone(UTC).isoformat(),
                    actor=act.actor,
                    on_behalf_of=act.on_behalf_of,
                    source=act.source or "CODE_UNSPECIFIED",
                )
        for one in row.__dict__.pop("_told", ()):
            # Kept, since a consumer's transaction is of several acts.
            one.act, one.traceparent = act, current_traceparent()
            told.append(one)


def listen(session_class: type[Session]) -> None:
    """Make a service's session class stamp rows and keep versions of what was told."""

    @event.listens_for(session_class, "before_flush")
    def _before(session: Session, _context: Any, _instances: Any) -> None:
        stamp(session)

    @event.listens_for(session_class, "after_flush")
    def _after(session: Session, _context: Any) -> None:
        for told in session.info.get("told", ()):
            if not told.version:
                told.version = told.row.version
                told.labels = list(told.row.security_labels or ())


def by_id(model: type[Owned], tenant_id: str, row_id: str) -> ColumnElement[bool]:
    """The condition that names one row of a tenant."""
    return and_(model.tenant_id == tenant_id, model.id == row_id)

"""Tasks: one owner, one due time and its basis, unique per what they are about."""

import enum
from datetime import datetime
from typing import Any

from sqlalchemy import DateTime, Index, Text, UniqueConstraint, select, text
from sqlalchemy.dialects.postgresql import JSONB, insert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from chassis.errors import FailedPrecondition, Invalid
from chassis.ids import new_id
from chassis.lifecycle import Lifecycle
from chassis.model import Id, Living, about_subject, by_change, status_type
from services.patients.patient import Base
from services.patients.staff import Pool


class Status(enum.StrEnum):
    """FHIR task-status, as far as the worklist uses it."""

    READY = "READY"
    IN_PROGRESS = "IN_PROGRESS"
    COMPLETED = "COMPLETED"
    CANCELLED = "CANCELLED"


OPEN = [Status.READY, Status.IN_PROGRESS]
"""Statuses in which somebody must still act."""


class Task(Living, Base):
    """A piece of work on the worklist."""

    __tablename__ = "task"
    __table_args__ = (
        about_subject("task"),
        UniqueConstraint("tenant_id", "code", "source_id", "episode", name="task_episode_key"),
        # The worklist's own index: open tasks by due time, whatever has been done before.
        Index(
            "task_worklist",
            "tenant_id",
            "due_time",
            "id",
            postgresql_where=text("status IN ('READY', 'IN_PROGRESS')"),
        ),
        # Open ones only: what an owner has done over the years would be read and passed over each time.
        Index(
            "task_by_owner",
            "tenant_id",
            "owner_id",
            "due_time",
            "id",
            postgresql_where=text("status IN ('READY', 'IN_PROGRESS')"),
        ),
        by_change("task"),
        Index("task_by_patient", "tenant_id", "patient_id", "due_time", "id"),
    )
    aggregate = "task"
    lifecycle = Lifecycle(
        ("create", [], Status.READY, "created"),
        ("assign", OPEN, Status.READY, "assigned"),
        ("claim", [Status.READY], Status.IN_PROGRESS, "claimed"),
        ("release", [Status.IN_PROGRESS], Status.READY, "released"),
        ("snooze", [Status.READY], Status.READY, "snoozed"),
        ("snooze", [Status.IN_PROGRESS], Status.IN_PROGRESS, "snoozed"),
        ("complete", OPEN, Status.COMPLETED, "completed"),
        ("cancel", OPEN, Status.CANCELLED, "cancelled"),
    )

    patient_id: Mapped[str] = mapped_column(Id)
    code: Mapped[str]
    source: Mapped[dict[str, Any]] = mapped_column(JSONB)
    source_id: Mapped[str] = mapped_column(Id)
    episode: Mapped[str] = mapped_column(Text, default="")
    clinic_id: Mapped[str | None] = mapped_column(Id)
    priority: Mapped[str] = mapped_column(Text, default="ROUTINE")
    due_time: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    due_basis: Mapped[str] = mapped_column(Text, default="stated")
    reason_code: Mapped[str] = mapped_column(Text, default="")
    owner: Mapped[dict[str, Any]] = mapped_column(JSONB)
    owner_id: Mapped[str] = mapped_column(Id)
    pool_id: Mapped[str | None] = mapped_column(Id)
    status: Mapped[Status] = mapped_column(status_type(Status))
    snooze_time: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    outcome: Mapped[dict[str, Any] | None] = mapped_column(JSONB)
    note: Mapped[str] = mapped_column(Text, default="")

    def own(self, kind: str, owner_id: str) -> None:
        """Make somebody the owner; a pool is remembered for `release`."""
        self.owner = {"type": kind, "id": owner_id}
        self.owner_id = owner_id
        if kind == "Pool":
            self.pool_id = owner_id

    def assign(self, kind: str, owner_id: str) -> None:
        """Give it to a staff member or pool."""
        self.move("assign")
        self.own(kind, owner_id)

    def claim(self, staff_id: str) -> None:
        """Take it. Only what waits can be taken: a second one gets `ILLEGAL_TRANSITION`."""
        self.move("claim")
        self.own("Staff", staff_id)
        self.snooze_time = None

    def release(self) -> None:
        """Give it back to its pool. Raises FailedPrecondition `NO_POOL` where it came from none."""
        self.move("release")
        if self.pool_id is None:
            raise FailedPrecondition("NO_POOL", "The task came from no pool; assign it to somebody instead.")
        self.own("Pool", self.pool_id)

    def snooze(self, until: datetime, now: datetime) -> None:
        """Hide it until a time before it is due. Raises Invalid `SNOOZE_PAST_DUE`."""
        if until > max(self.due_time, now):
            raise Invalid("SNOOZE_PAST_DUE", "A task can't be hidden beyond its due time.", field="snooze_time")
        self.move("snooze")
        self.snooze_time = until

    def complete(self, outcome: dict[str, Any]) -> None:
        """End it with what came of it."""
        self.move("complete", outcome_code=outcome["code"])
        self.outcome = outcome


async def pool_for(db: AsyncSession, tenant_id: str, purpose: str, clinic_id: str | None = None) -> Pool | None:
    """The pool that a kind of work falls to: that of the clinic before one for all."""
    pools = (
        await db.execute(
            select(Pool)
            .where(Pool.tenant_id == tenant_id, Pool.purpose == purpose, Pool.active)
            .order_by(Pool.create_time, Pool.id)
        )
    ).scalars()
    fitting = [pool for pool in pools if not pool.clinic_ids or (clinic_id and clinic_id in pool.clinic_ids)]
    return max(fitting, key=lambda pool: bool(pool.clinic_ids), default=None)


async def open_task(
    db: AsyncSession,
    *,
    tenant_id: str,
    patient_id: str,
    code: str,
    source: tuple[str, str],
    purpose: str,
    due_time: datetime,
    due_basis: str,
    priority: str = "ROUTINE",
    episode: str = "",
    clinic_id: str | None = None,
    reason_code: str = "",
    note: str = "",
    labels: list[str] | None = None,
) -> Task | None:
    """A task of the pool with this `purpose`, under the labels of its cause.

    None where the same one (code, source, episode) was made before.

    Raises FailedPrecondition `NO_POOL` where the tenant has no such pool: a task must have an owner.
    """
    pool = await pool_for(db, tenant_id, purpose, clinic_id) or await pool_for(db, tenant_id, "coordination", clinic_id)
    if pool is None:
        raise FailedPrecondition("NO_POOL", f"No pool takes {purpose} work; make one.", purpose=purpose)
    # Taken by its unique key before the row: two replays make one task.
    taken = await db.execute(
        insert(TaskEpisode)
        .values(tenant_id=tenant_id, code=code, source_id=source[1], episode=episode)
        .on_conflict_do_nothing()
        .returning(TaskEpisode.code)
    )
    if taken.first() is None:
        return None
    task = Task(
        tenant_id=tenant_id,
        id=new_id(),
        patient_id=patient_id,
        code=code,
        source={"type": source[0], "id": source[1]},
        source_id=source[1],
        episode=episode,
        clinic_id=clinic_id,
        priority=priority,
        due_time=due_time,
        due_basis=due_basis,
        reason_code=reason_code,
        note=note,
        security_labels=labels or [],
    )
    task.own("Pool", pool.id)
    task.move("create", reason_code=reason_code)
    db.add(task)
    return task


class TaskEpisode(Base):
    """That a task for (code, source, episode) was made once."""

    __tablename__ = "task_episode"

    tenant_id: Mapped[str] = mapped_column(Id, primary_key=True)
    code: Mapped[str] = mapped_column(Text, primary_key=True)
    source_id: Mapped[str] = mapped_column(Id, primary_key=True)
    episode: Mapped[str] = mapped_column(Text, primary_key=True, default="")

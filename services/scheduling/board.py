"""The day board: visits by practitioner, and who waits for how long."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from services.scheduling.appointment import Appointment, Status

_WAITING = frozenset({Status.ARRIVED, Status.CHECKED_IN})


@dataclass(slots=True)
class Column:
    """A practitioner's day."""

    practitioner_id: str
    name: Mapping[str, Any] | None = None
    visits: list[dict[str, Any]] = field(default_factory=list)
    open_holds: int = 0
    waiting: int = 0


def shown(visit: Appointment, now: datetime) -> bool:
    """Whether it stands on the board: not what was a hold and has ended, or is about to."""
    if visit.status is Status.PENDING:
        return visit.hold_expire_time is not None and visit.hold_expire_time > now
    return visit.status is not Status.CANCELLED or visit.history[-1]["from_status"] != Status.PENDING.name


def arrange(
    visits: Iterable[Appointment], people: Iterable[Sequence[Any]], now: datetime, *, everybody: bool
) -> list[Column]:
    """Columns in the order of `people` ((id, name) each), then others; without `everybody` only those with visits."""
    columns = {who: Column(who, name) for who, name in people}
    for visit in visits:
        column = columns.setdefault(visit.practitioner_id, Column(visit.practitioner_id))
        column.visits.append(_shown(visit, now))
        column.open_holds += visit.status is Status.PENDING
        column.waiting += visit.status in _WAITING
    return [one for one in columns.values() if everybody or one.visits]


def arrival(visit: Appointment) -> datetime | None:
    """When the patient came, unless that was taken back."""
    if visit.status not in _WAITING and visit.status is not Status.FULFILLED:
        return None
    came = [step["time"] for step in visit.history if step["action"] == "arrive"]
    return datetime.fromisoformat(came[-1]) if came else None


def _shown(visit: Appointment, now: datetime) -> dict[str, Any]:
    came = arrival(visit)
    waits = came is not None and visit.status in _WAITING
    return {
        "id": visit.id,
        "version": visit.version,
        "patient_id": visit.patient_id,
        "status": visit.status,
        "visit_type_id": visit.visit_type_id,
        "start_time": visit.start_time,
        "end_time": visit.end_time,
        "modality": visit.modality,
        "overbooking": visit.overbooking,
        "walk_in": visit.walk_in,
        "confirm_time": visit.confirm_time,
        "arrive_time": came,
        "minutes_waited": max(int((now - came).total_seconds()) // 60, 0) if came is not None and waits else 0,
        "hold_expire_time": visit.hold_expire_time if visit.status is Status.PENDING else None,
        "resource_ids": [one["actor"]["id"] for one in visit.participants if one["actor"]["type"] == "Resource"],
    }

"""The day board: visits by practitioner, and who waits for how long."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, Self

from services.scheduling.appointment import Status

_WAITING = frozenset({Status.ARRIVED, Status.CHECKED_IN})


class Visit(NamedTuple):
    """What the board must know of a visit."""

    id: str
    version: int
    patient_id: str
    practitioner_id: str
    status: Status
    visit_type_id: str
    start_time: datetime
    end_time: datetime
    modality: str
    overbooking: int
    walk_in: bool
    confirm_time: datetime | None
    hold_expire_time: datetime | None
    arrive_time: datetime | None
    """When the patient came, unless that was taken back."""
    came_from: str
    """The status before the last step."""
    resource_ids: Sequence[str]

    @classmethod
    def of(cls, row: Sequence[Any]) -> Self:
        """Of a row with these values, the status by name and the arrival as it stands in the history."""
        visit = cls(*row)
        came = visit.arrive_time and datetime.fromisoformat(visit.arrive_time)  # type: ignore[arg-type]
        return visit._replace(status=Status[visit.status], arrive_time=came)


@dataclass(slots=True)
class Column:
    """A practitioner's day."""

    practitioner_id: str
    name: Mapping[str, Any] | None = None
    visits: list[dict[str, Any]] = field(default_factory=list)
    open_holds: int = 0
    waiting: int = 0


def shown(visit: Visit, now: datetime) -> bool:
    """Whether it stands on the board: not what was a hold and has ended, or is about to."""
    if visit.status is Status.PENDING:
        return visit.hold_expire_time is not None and visit.hold_expire_time > now
    return visit.status is not Status.CANCELLED or visit.came_from != Status.PENDING.name


def arrange(
    visits: Iterable[Visit], people: Iterable[Sequence[Any]], now: datetime, *, everybody: bool
) -> list[Column]:
    """Columns in the order of `people` ((id, name) each), then others; without `everybody` only those with visits."""
    columns = {who: Column(who, name) for who, name in people}
    for visit in visits:
        column = columns.setdefault(visit.practitioner_id, Column(visit.practitioner_id))
        column.visits.append(_shown(visit, now))
        column.open_holds += visit.status is Status.PENDING
        column.waiting += visit.status in _WAITING
    return [one for one in columns.values() if everybody or one.visits]


def _shown(visit: Visit, now: datetime) -> dict[str, Any]:
    found = visit._asdict()
    if visit.status is not Status.PENDING:
        found["hold_expire_time"] = None
    if visit.arrive_time is not None and visit.status in _WAITING:
        found["minutes_waited"] = max(int((now - visit.arrive_time).total_seconds()) // 60, 0)
    return found

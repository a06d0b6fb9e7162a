"""Which status follows which, by which action, telling which event: one table beside each model."""

from collections.abc import Iterator, Sequence
from enum import Enum
from typing import NamedTuple

from chassis.errors import FailedPrecondition


class Arrow(NamedTuple):
    """One row: `action` takes any of `sources` to `target` and tells `event` (None tells nothing).

    A `target` of None means that the status before the last step comes back (`revert`).
    """

    action: str
    sources: tuple[Enum, ...]
    target: Enum | None
    event: str | None


class Lifecycle:
    """The table of one aggregate. Rows: (action, [from, …], to, event). An empty list of sources is a birth."""

    def __init__(self, *rows: tuple[str, Sequence[Enum], Enum | None, str | None]) -> None:
        self.arrows = tuple(Arrow(action, tuple(sources), target, event) for action, sources, target, event in rows)

    def __iter__(self) -> Iterator[Arrow]:
        return iter(self.arrows)

    def arrow(self, action: str, status: Enum | None) -> Arrow:
        """The row by which `action` leaves `status`.

        Raises FailedPrecondition `ILLEGAL_TRANSITION` with `action` and `status`.
        """
        for arrow in self.arrows:
            if arrow.action == action and (status in arrow.sources or (not arrow.sources and status is None)):
                return arrow
        raise illegal(action, status)


def illegal(action: str, status: Enum | None) -> FailedPrecondition:
    """The refusal of an action that the present status doesn't allow."""
    name = status.name if status is not None else "new"
    return FailedPrecondition(
        "ILLEGAL_TRANSITION", f"{action} is not possible in status {name}.", action=action, status=name
    )

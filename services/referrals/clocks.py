"""The clock of every open state of a referral: what must happen next, and by when."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Literal
from zoneinfo import ZoneInfo

from chassis.calendar import END_OF_DAY, add_business_days, add_days, at_local

PRIORITIES = ("stat", "asap", "urgent", "routine")
OPEN_STATES = (
    "DRAFT",
    "SUBMITTED",
    "INFORMATION_REQUESTED",
    "ACCEPTED",
    "SCHEDULED",
    "UNATTENDED",
    "SEEN",
    "REPORT_RECEIVED",
    "REPORT_ACKNOWLEDGED",
    "PATIENT_INFORMED",
)

Unit = Literal["hours", "days", "business_days", "same_day"]


@dataclass(frozen=True, slots=True)
class Clock:
    """A duration: elapsed hours, calendar days or business days at the same wall time, or the end of the local day."""

    next_action: str
    unit: Unit
    amount: int = 0

    def due(self, since: datetime, zone: str, region: str, closed: frozenset[date]) -> datetime:
        if self.unit == "hours":
            return since + timedelta(hours=self.amount)
        if self.unit == "days":
            return add_days(since, self.amount, zone)
        if self.unit == "business_days":
            return add_business_days(since, self.amount, zone, region, closed)
        return max(since, at_local(since.astimezone(ZoneInfo(zone)).date(), END_OF_DAY, zone))

    def __str__(self) -> str:
        if self.unit == "same_day":
            return f"{self.next_action} on the same day"
        unit = self.unit.replace("_", " ")
        return f"{self.next_action} within {self.amount} {unit if self.amount != 1 else unit[:-1]}"


def _by_priority(next_action: str, **durations: tuple[Unit, int]) -> dict[str, Clock]:
    return {priority: Clock(next_action, *durations[priority]) for priority in PRIORITIES}


def _answer(next_action: str) -> dict[str, Clock]:
    return _by_priority(
        next_action, stat=("hours", 1), asap=("hours", 4), urgent=("business_days", 1), routine=("business_days", 3)
    )


def _schedule(next_action: str) -> dict[str, Clock]:
    return _by_priority(
        next_action, stat=("same_day", 0), asap=("days", 1), urgent=("business_days", 3), routine=("business_days", 10)
    )


def _alike(next_action: str, unit: Unit, amount: int) -> dict[str, Clock]:
    return dict.fromkeys(PRIORITIES, Clock(next_action, unit, amount))


Table = Mapping[tuple[str, str], Clock]

# The defaults. A draft and a question use the acknowledgement's clock, a missed visit the scheduling one. 48 hours
# to be seen is California's urgent standard.
DEFAULT_CLOCKS: Table = {
    (state, priority): clock
    for state, row in {
        "DRAFT": _answer("submit"),
        "SUBMITTED": _answer("accept or decline"),
        "INFORMATION_REQUESTED": _answer("answer the question"),
        "ACCEPTED": _schedule("schedule the visit"),
        "SCHEDULED": _by_priority(
            "see the patient", stat=("days", 1), asap=("days", 2), urgent=("days", 14), routine=("days", 28)
        ),
        "UNATTENDED": _schedule("schedule the visit again"),
        "SEEN": _alike("receive the report", "days", 7),
        "REPORT_RECEIVED": _alike("acknowledge the report", "business_days", 3),
        "REPORT_ACKNOWLEDGED": _alike("inform the patient", "business_days", 3),
        "PATIENT_INFORMED": _alike("close the referral", "business_days", 3),
    }.items()
    for priority, clock in row.items()
}


def due(
    state: str,
    priority: str,
    since: datetime,
    zone: str,
    region: str = "US",
    *,
    closed: frozenset[date] = frozenset(),
    table: Table = DEFAULT_CLOCKS,
) -> tuple[datetime, str]:
    """When an open state is due (UTC), and on what basis, in one plain phrase.

    `since` (aware) is when the state began; for SEEN it is the end of the visit. State and priority in any case.
    ValueError for a state that is not open or an unknown priority.
    """
    clock = table.get((state.upper().replace("-", "_"), priority.lower()))
    if clock is None:
        raise ValueError(f"no clock for state {state} with priority {priority}")
    basis = f"{clock} ({priority.lower()})"
    if clock.unit == "business_days":
        basis += f", business days of {region}"
    return clock.due(since, zone, region, closed), basis

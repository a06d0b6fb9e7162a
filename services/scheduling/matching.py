"""Who is offered a freed slot: what a wish rules out, what its score is made of, and until when it can be answered."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, time, timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from chassis.calendar import at_local

SHIPPED: Mapping[str, Any] = {
    "weight_priority": 1000,
    "weight_wait": 400,
    "weight_fit": 300,
    "weight_skip": 50,
    "full_wait_days": 90,
    "skips_at_most": 4,
}
"""Weights of the policy `waitlist` where a tenant has none of its own: no wait, fit and skips outweigh a higher band."""
BANDS: Mapping[str, int] = {"CODE_UNSPECIFIED": 0, "ROUTINE": 0, "URGENT": 1, "ASAP": 2, "STAT": 3}
"""Points of a band, in units of its weight; after FHIR request-priority."""


class Slot(NamedTuple):
    """A freed slot. Instants in UTC, with the clinic's zone beside them."""

    visit_type_id: str
    clinic_id: str
    practitioner_id: str
    start: datetime
    end: datetime
    zone: str


class Wish(NamedTuple):
    """What somebody waits for. Days are `YYYY-MM-DD` and times `HH:MM` by the clinic's clock, "" is any."""

    entry_id: str
    visit_type_id: str
    priority: str
    since: datetime
    until: datetime
    clinic_ids: Sequence[str] = ()
    practitioner_ids: Sequence[str] = ()
    weekdays: Sequence[int] = ()
    earliest_time: str = ""
    latest_time: str = ""
    earliest_date: str = ""
    latest_date: str = ""
    skips: int = 0
    before: datetime | None = None
    """Start of the visit that would be given up: only what is earlier is of use."""


class Score(NamedTuple):
    """Points by part."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(self.parts.values())


class Ranked(NamedTuple):
    """A candidate with the score that it is ranked by."""

    wish: Wish
    score: Score


class Rules(NamedTuple):
    """When offers are made and how long they stand. Times of day by the clinic's clock; alike ones mean day and night."""

    lockout: timedelta
    standing: timedelta
    shortest: timedelta
    opens: time
    closes: time


def misfits(wish: Wish, slot: Slot, now: datetime) -> tuple[str, ...]:
    """Why a slot isn't offered to somebody; empty where it may be."""
    day, weekday, clock, over = _by_the_clock(slot)
    checks = {
        "visit_type": wish.visit_type_id == slot.visit_type_id,
        "clinic": not wish.clinic_ids or slot.clinic_id in wish.clinic_ids,
        "practitioner": not wish.practitioner_ids or slot.practitioner_id in wish.practitioner_ids,
        "weekday": not wish.weekdays or weekday in wish.weekdays,
        "time_of_day": clock >= wish.earliest_time and (not wish.latest_time or over <= wish.latest_time),
        "date": day >= wish.earliest_date and (not wish.latest_date or day <= wish.latest_date),
        "not_earlier": wish.before is None or slot.start < wish.before,
        "expired": now < wish.until,
    }
    return tuple(name for name, fits in checks.items() if not fits)


@lru_cache(256)
def _by_the_clock(slot: Slot) -> tuple[str, int, str, str]:
    """Day, weekday, begin and end of a slot by the clinic's clock: the same for all who are asked about it."""
    zone = ZoneInfo(slot.zone)
    start, end = slot.start.astimezone(zone), slot.end.astimezone(zone)
    # A visit that ends on the next day is over by no time of its own day.
    over = end.strftime("%H:%M") if end.date() == start.date() else "24:00"
    return start.date().isoformat(), start.isoweekday(), start.strftime("%H:%M"), over


def score(wish: Wish, slot: Slot | None, now: datetime, weights: Mapping[str, Any] = SHIPPED) -> Score:
    """What somebody's claim is made of; without a slot as if it were the dearest one. Whole points, so that they sum up."""
    days = max(0.0, (now - wish.since) / timedelta(days=1))
    waited = min(days / max(weights["full_wait_days"], 1), 1.0)
    return Score(
        {
            "priority": int(weights["weight_priority"]) * BANDS.get(wish.priority, 0),
            "wait": round(weights["weight_wait"] * waited),
            "fit": round(weights["weight_fit"] * (_fit(wish, slot) if slot is not None else 1.0)),
            "skips": -int(weights["weight_skip"]) * min(wish.skips, int(weights["skips_at_most"])),
        }
    )


def _fit(wish: Wish, slot: Slot) -> float:
    """1 for the dearest clinic and practitioner, less for those further down; who names none takes any as gladly."""
    named = [
        1.0 / (1 + order.index(one))
        for order, one in ((wish.clinic_ids, slot.clinic_id), (wish.practitioner_ids, slot.practitioner_id))
        if one in order
    ]
    return sum(named) / len(named) if named else 1.0


def ranked(wishes: Iterable[Wish], slot: Slot, now: datetime, weights: Mapping[str, Any] = SHIPPED) -> list[Ranked]:
    """Those to whom the slot may be offered, the best first; of equals who has waited longer."""
    fitting = [Ranked(wish, score(wish, slot, now, weights)) for wish in wishes if not misfits(wish, slot, now)]
    return sorted(fitting, key=lambda one: (-one.score.total, one.wish.since, one.wish.entry_id))


def answer_by(slot: Slot, now: datetime, rules: Rules) -> datetime | None:
    """Until when an offer made now could be answered: never within the lock-out. None where it is too late to offer."""
    until = min(now + rules.standing, slot.start - rules.lockout)
    return until if until - now >= min(rules.shortest, rules.standing) else None


def offered_from(now: datetime, zone: str, rules: Rules) -> datetime:
    """When offers may be made: now, or when the clinic's day of offers begins next, since nobody is written to at night."""
    if rules.opens == rules.closes:
        return now
    local = now.astimezone(ZoneInfo(zone))
    for days in range(3):
        day = local.date() + timedelta(days=days)
        begin, end = at_local(day, rules.opens, zone), at_local(day, rules.closes, zone)
        if now < end:
            return max(now, begin).astimezone(UTC)
    return now

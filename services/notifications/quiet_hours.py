"""When a recipient may be written to: open hours in every zone that the recipient may be in."""

from collections.abc import Sequence
from datetime import datetime, time, timedelta

from chassis.calendar import is_in_local_window, next_local_time_in_window

# Nothing automatic leaves outside these, whatever a policy says (47 CFR 64.1200(c)(1)).
HARD_START, HARD_END = time(8), time(21)
DEFAULT_START, DEFAULT_END = time(9), time(20)
OWN_ACTION_WINDOW = timedelta(minutes=10)


class NeverOpen(ValueError):
    """The candidate zones lie so far apart that no instant is open in all: a person has to find out the zone."""


def _bounded(start: time, end: time) -> tuple[time, time]:
    start, end = max(start, HARD_START), min(end, HARD_END)
    if start >= end:
        raise ValueError("the open hours leave nothing between 08:00 and 21:00")
    return start, end


def answers_own_action(own_action: datetime | None, now: datetime) -> bool:
    """Whether a message now still answers what the recipient did: such answers are exempt for ten minutes (RULES C)."""
    return own_action is not None and timedelta(0) <= now - own_action <= OWN_ACTION_WINDOW


def is_open(
    now: datetime,
    zones: Sequence[str],
    start: time = DEFAULT_START,
    end: time = DEFAULT_END,
    *,
    own_action: datetime | None = None,
) -> bool:
    """Whether a message may leave now: every candidate zone shows `start <= time < end`, cut to 08:00-21:00."""
    if not zones:
        raise ValueError("at least one candidate zone is needed")
    return answers_own_action(own_action, now) or is_in_local_window(now, zones, *_bounded(start, end))


def next_allowed(
    now: datetime,
    zones: Sequence[str],
    start: time = DEFAULT_START,
    end: time = DEFAULT_END,
    *,
    own_action: datetime | None = None,
) -> datetime:
    """The first instant from `now` (aware) on at which a message may leave, in UTC; `now` itself if open.

    Raises NeverOpen if no instant of the next eight days is open in all candidate zones.
    """
    if answers_own_action(own_action, now):
        return now
    allowed = next_local_time_in_window(now, zones, *_bounded(start, end))
    if allowed is None:
        raise NeverOpen("no hour is open in all candidate zones")
    return allowed

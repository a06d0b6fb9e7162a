"""The last check: whether a message may leave now, through which channel, from what was read a moment ago."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, time
from typing import NamedTuple

from services.notifications.message import Message
from services.notifications.quiet_hours import NeverOpen, next_allowed

CANCELLED_NOTICES = frozenset({"appointment-cancelled", "series-cancelled"})
GONE = {
    "CANCELLED": "cancelled",
    "NOSHOW": "noshow",
    "ENTERED_IN_ERROR": "entered-in-error",
    "ARRIVED": "arrived",
    "CHECKED_IN": "arrived",
    "FULFILLED": "fulfilled",
}
"""Status of a visit to the reason why nothing is said about it any more."""
_WORST_FIRST = ("deceased", "no-consent", "no-contact", "no-provider", "not-found")


@dataclass(frozen=True)
class Visit:
    """The visit's own row in scheduling."""

    status: str
    schedule_version: int
    start_time: datetime
    time_zone: str
    clinic_id: str
    visit_type_id: str


@dataclass(frozen=True)
class Recipient:
    """What patients says of one recipient on one channel; `refusal` is empty where the message may leave."""

    refusal: str = ""
    contact_value: str = ""
    languages: Sequence[str] = ()
    time_zones: Sequence[str] = ()
    given_name: str = ""
    consent_id: str = ""
    consent_version: int = 0


class Go(NamedTuple):
    """It leaves now."""

    channel: str
    recipient: Recipient


class Wait(NamedTuple):
    """It leaves later."""

    until: datetime
    reason: str


class Drop(NamedTuple):
    """It never leaves."""

    reason: str


@dataclass(frozen=True)
class Known:
    """What was read for one message. `visit` is None where there is none; `clinic_zone` may be empty."""

    recipients: Mapping[str, Recipient] = field(default_factory=dict)
    visit: Visit | None = None
    clinic_zone: str = ""


def decide(message: Message, known: Known, now: datetime) -> Go | Wait | Drop:
    """Either side's "no" wins: first the visit, then whom to write to, then the hour of the day."""
    if message.expire_time <= now:
        return Drop("too-late")
    if message.about["type"] == "Appointment" and (reason := _untrue(message, known.visit)):
        return Drop(reason)
    channel, refusals = "", []
    for each in message.channels:
        if each in message.spent:
            continue
        answer = known.recipients.get(each, Recipient("no-provider"))
        if not answer.refusal:
            channel = each
            break
        refusals.append(answer.refusal)
    if not channel:
        return Drop(next((one for one in _WORST_FIRST if one in refusals), "no-contact"))
    recipient = known.recipients[channel]
    zones = list(recipient.time_zones) or [known.clinic_zone or (known.visit.time_zone if known.visit else "")]
    if not all(zones):
        return Drop("no-zone")
    try:
        allowed = next_allowed(
            now,
            zones,
            time.fromisoformat(message.open_from),
            time.fromisoformat(message.open_until),
            own_action=message.own_action_time,
        )
    except NeverOpen:
        return Drop("quiet-hours")
    if allowed <= now:
        return Go(channel, recipient)
    return Wait(allowed, "quiet-hours") if allowed < message.expire_time else Drop("quiet-hours")


def _untrue(message: Message, visit: Visit | None) -> str:
    if visit is None:
        return "not-found"
    if visit.schedule_version != message.schedule_version:
        return "moved"
    if message.kind in CANCELLED_NOTICES:
        return "" if visit.status == "CANCELLED" else GONE.get(visit.status, "not-cancelled")
    return "" if visit.status == "BOOKED" else GONE.get(visit.status, "not-booked")

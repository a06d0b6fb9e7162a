"""Offers of free slots: small values that a client carries between a search and a booking, signed by the servicer."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from chassis.errors import FailedPrecondition, Invalid
from services.scheduling.occupancy import startable


class Place(NamedTuple):
    """What is wanted: which visit, where, with whom, from which epoch second on, in which rooms preferably, and with an
    interpreter of which language, if any."""

    visit_type_id: str
    clinic_id: str
    practitioner_id: str
    start: int
    resource_ids: tuple[str, ...] = ()
    interpreter_language: str = ""


def written(tenant_id: str, place: Place, expires: int) -> list[Any]:
    """An offer as it is signed."""
    return [tenant_id, expires, *place[:4], list(place.resource_ids), place.interpreter_language]


def read(opened: Any, tenant_id: str, now: int) -> Place:
    """The place that an opened token offers.

    Raises Invalid `OFFER_INVALID`, `START_INVALID`; FailedPrecondition `OFFER_EXPIRED`.
    """
    # One of the release before says nothing of an interpreter.
    if not isinstance(opened, Sequence) or len(opened) not in (7, 8) or opened[0] != tenant_id:
        raise Invalid("OFFER_INVALID", "This is no offer of ours; search again.", field="offer_token")
    _, expires, visit_type_id, clinic_id, practitioner_id, start, resource_ids, *language = opened
    if now >= expires:
        raise FailedPrecondition("OFFER_EXPIRED", "The offer is too old; search again.")
    startable(datetime.fromtimestamp(start, UTC), "offer_token")
    return Place(visit_type_id, clinic_id, practitioner_id, start, tuple(resource_ids), *language)

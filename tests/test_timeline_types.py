"""Every step of a lifecycle that concerns a patient is on the timeline, or is left out by name."""

import importlib

import pytest

from services.patients.reactions import SOURCES, reactions

LEFT_OUT = {"appointment.held", "appointment.released", "appointment.waitlisted"}
"""Holds and places on a waitlist are no promise yet."""


@pytest.mark.parametrize("name", ["patients", "scheduling", "referrals", "notifications", "feedback"])
def test_every_event_of_a_lifecycle_is_on_the_timeline(name):
    service = importlib.import_module(f"services.{name}.service").SERVICE
    told = {
        arrow.event if "." in arrow.event else f"{model.class_.aggregate}.{arrow.event}"
        for model in service.base.registry.mappers
        for arrow in getattr(model.class_, "lifecycle", ())
        if arrow.event
    }
    concerning = {kind for kind in told if kind.partition(".")[0] in SOURCES}
    assert concerning - reactions.types - LEFT_OUT == set()

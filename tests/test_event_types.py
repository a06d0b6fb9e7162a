"""The contract names every type of event: a consumer takes what isn't named as newer than its build."""

import pytest
from care.options.v1 import options_pb2

from chassis.service import event_types
from system import topology


@pytest.mark.parametrize("name", topology.SERVICES)
def test_every_event_that_a_service_may_tell_is_named_by_its_payload(name: str) -> None:
    service = topology.service(name)
    told = {key for key in service.payloads if "." in key}
    for mapper in service.base.registry.mappers:
        for arrow in getattr(mapper.class_, "lifecycle", ()):
            if arrow.event:
                told.add(arrow.event if "." in arrow.event else f"{mapper.class_.aggregate}.{arrow.event}")
    for kind in told:
        payload = service.payloads.get(kind) or service.payloads[kind.partition(".")[0]]
        assert kind in payload.DESCRIPTOR.GetOptions().Extensions[options_pb2.event_types], kind
    # Those that are told without a lifecycle's arrow.
    for key, payload in service.payloads.items():
        assert payload.DESCRIPTOR.GetOptions().Extensions[options_pb2.event_types], key


@pytest.mark.parametrize("name", topology.SERVICES)
def test_a_service_reacts_only_to_events_that_the_contract_names(name: str) -> None:
    assert topology.service(name).reactions.types <= event_types()

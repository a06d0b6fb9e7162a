"""Which services exist, their ports and databases, and who calls whom: said here once; a test holds the chart's values against it."""

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # so that commands that only want names start at once
    from chassis.service import Service


@dataclass(frozen=True)
class Node:
    """One of the six workloads. `port` is gRPC (the gateway's: HTTP); a `database` also is a role of that name."""

    name: str
    port: int
    health_port: int
    metrics_port: int
    calls: tuple[str, ...] = ()
    database: str | None = None

    @property
    def module(self) -> str:
        """What `python -m` runs."""
        return f"services.{self.name}" if self.database else self.name


def _service(number: int, name: str, *calls: str) -> Node:
    return Node(name, 50050 + number, 50060 + number, 9460 + number, calls, name)


SERVICES: Mapping[str, Node] = {
    node.name: node
    for node in (
        _service(1, "patients"),
        _service(2, "scheduling", "patients"),
        _service(3, "referrals", "patients", "scheduling"),
        _service(4, "notifications", "patients", "scheduling", "feedback"),
        _service(5, "feedback", "patients", "scheduling"),
    )
}
# Its health and metrics are pages of its one port.
GATEWAY = Node("gateway", 8080, 8080, 8080, tuple(SERVICES))
NODES: Mapping[str, Node] = {**SERVICES, GATEWAY.name: GATEWAY}
BUS_DATABASE = "bus"


def peers(name: str, addresses: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """gRPC targets of the services that `name` calls; several addresses of one service are its replicas."""
    return {called: "ipv4:" + ",".join(addresses[called]) for called in NODES[name].calls}


def service(name: str) -> "Service":
    """What a service is made of: `services.<name>.service:SERVICE`. KeyError for a name that isn't one."""
    if name not in SERVICES:
        raise KeyError(name)
    found: Service = importlib.import_module(f"services.{name}.service").SERVICE
    return found

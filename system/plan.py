"""What each of the six workloads is told when the whole runs on one machine: ports, peers, databases, keys, providers."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from system import issuer, topology
from system.keys import Keys
from system.mailbox import ACCOUNT, Mailbox
from system.process import LOOPBACK, free_port, read_state, write_state
from system.topology import GATEWAY, SERVICES, Node

# Shorter than in a cluster, where connections that last may take half a minute to go.
_DRAIN_SECONDS = 2.0


@dataclass(frozen=True)
class Instance:
    """One replica of a workload with its ports. `name` is the node's, from the second replica on with `-2`."""

    name: str
    node: Node
    port: int
    health_port: int
    metrics_port: int

    @property
    def address(self) -> str:
        """`host:port` of gRPC, or of HTTP for the gateway."""
        return f"{LOOPBACK}:{self.port}"


@dataclass
class Plan:
    """Settings of every instance. `overrides` by name of a node or "*" win over all; ports are kept in `ports.json`."""

    folder: Path
    keys: Keys
    mailbox: Mailbox
    wanted_port: int | None
    replicas: Mapping[str, int] = field(default_factory=dict)
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    databases: dict[str, str] = field(default_factory=dict)
    """Name to URL."""
    kafka: str = ""
    """`host:port` of the broker; empty: the embedded bus."""
    instances: dict[str, Instance] = field(default_factory=dict)

    def choose_ports(self) -> None:
        """The ports of last time, else the topology's, else free ones. `wanted_port` 0 means any for all."""
        file = self.folder / "ports.json"
        known: dict[str, list[int]] = read_state(file)
        taken: set[int] = set()

        def free(preferred: int) -> int:
            while (port := free_port(preferred or None)) in taken:
                preferred = 0
            taken.add(port)
            return port

        if self.wanted_port:
            taken.add(self.wanted_port)
        for node in topology.NODES.values():
            for number in range(1, self.replicas.get(node.name, 1) + 1):
                name = node.name if number == 1 else f"{node.name}-{number}"
                self.instances[name] = self._instance(name, node, number == 1, known.get(name, []), free)
        smtp, http = known.get("mailbox", [0, 0])
        self.mailbox.smtp_port, self.mailbox.http_port = free(smtp), free(http)
        chosen = {each.name: [each.port, each.health_port, each.metrics_port] for each in self.instances.values()}
        write_state(file, {**chosen, "mailbox": [self.mailbox.smtp_port, self.mailbox.http_port]})

    def _instance(self, name: str, node: Node, first: bool, known: list[int], free: Callable[[int], int]) -> Instance:
        usual = [node.port, node.health_port, node.metrics_port] if first and self.wanted_port != 0 else [0, 0, 0]
        if node is GATEWAY:
            port = self.wanted_port or free((known or usual)[0])
            return Instance(name, node, port, port, port)
        port, health, metrics = (free(each) for each in known or usual)
        return Instance(name, node, port, health, metrics)

    @property
    def url(self) -> str:
        """Where the gateway is."""
        return f"http://{self.instances[GATEWAY.name].address}"

    def values(self, name: str) -> dict[str, Any]:
        """Settings of an instance by their names in chassis.settings.Settings and its heirs."""
        instance = self.instances[name]
        node = instance.node
        addresses = {
            each: [other.address for other in self.instances.values() if other.node.name == each] for each in SERVICES
        }
        values: dict[str, Any] = {
            "environment": "development",
            "host": LOOPBACK,
            "port": instance.port,
            "health_port": instance.health_port,
            "metrics_port": instance.metrics_port,
            "peers": topology.peers(node.name, addresses),
            "issuers": [issuer.accepted(self.keys)],
            "service_key_file": self.keys.service_key_file(node.name),
            "service_keys_file": self.keys.service_keys_file,
            "signing_secret": self.keys.signing_secret,
            "link_base_url": self.url,
            "drain_timeout": _DRAIN_SECONDS,
        }
        if node.database is not None:
            values |= {
                "database_url": self.databases[node.database],
                "kafka": {"bootstrap": self.kafka} if self.kafka else None,
                "bus_url": None if self.kafka else self.databases[topology.BUS_DATABASE],
                "audit_checkpoint_file": self.folder / "audit" / f"{node.name}.jws",
            }
        if node.name == "scheduling" and "CARE_VIDEO_PROVIDER" not in os.environ:
            values["video_provider"] = "development"
        if node.name == "notifications":
            values |= self._providers()
        return {**values, **self.overrides.get("*", {}), **self.overrides.get(node.name, {})}

    def _providers(self) -> dict[str, str]:
        """The mailbox, for the channels for which the environment names no real provider."""
        found: dict[str, str] = {}
        if "CARE_SMTP_URL" not in os.environ:
            found |= {"smtp_url": self.mailbox.smtp_url, "smtp_from": "care@clinic.example"}
        if "CARE_SMS_URL" not in os.environ:
            found |= {"sms_url": self.mailbox.sms_url, "sms_account": ACCOUNT, "sms_token": self.mailbox.token}
            found["sms_from"] = "+18005550199"
        return found

    def environment(self, name: str) -> dict[str, str]:
        """The same as environment variables of a process."""
        found = {f"CARE_{key.upper()}": _text(value) for key, value in self.values(name).items() if value is not None}
        if name == GATEWAY.name:
            found["CARE_MAILBOX_FILE"] = str(self.mailbox.file)
        return found


def _text(value: Any) -> str:
    if isinstance(value, str | int | float | Path):
        return str(value)
    return json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json", exclude_none=True) if isinstance(value, BaseModel) else str(value)

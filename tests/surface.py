"""The whole surface for tests by reflection: the five services, their RPCs, models and sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from chassis.model import Aggregate, Living
from chassis.service import Service
from gateway.contract import Rpc, files, rpcs
from system import topology

ROOT = Path(__file__).resolve().parent.parent
SERVICES: MappingProxyType[str, Service] = MappingProxyType(
    {name: topology.service(name) for name in topology.SERVICES}
)
RPCS: MappingProxyType[str, Rpc] = MappingProxyType({rpc.name: rpc for rpc in rpcs()})
# Packages of the chassis: RPCs that are served by another service than the package's name, or by all.
SERVED_BY = {"access": ("patients",), "audit": tuple(SERVICES), "batch": tuple(SERVICES)}


def servers_of(rpc: Rpc) -> tuple[str, ...]:
    """Names of the workloads that serve an RPC."""
    return SERVED_BY.get(rpc.owner, (rpc.owner,))


def short(name: str) -> str:
    """`PatientsService/GetPatient` of a full name, for tests' ids."""
    return name.rpartition(".")[2]


@cache
def aggregates(service: str) -> tuple[type[Aggregate], ...]:
    """The aggregates of a service."""
    mappers = SERVICES[service].base.registry.mappers
    found = [mapper.class_ for mapper in mappers if issubclass(mapper.class_, Aggregate)]
    return tuple(sorted(found, key=lambda model: model.__name__))


def living() -> list[tuple[str, type[Living]]]:
    """Every aggregate with a lifecycle, with its service."""
    return [(name, model) for name in SERVICES for model in aggregates(name) if issubclass(model, Living)]


def messages() -> Iterator[Descriptor]:
    """Every message of the contract, nested ones too."""

    def within(message: Descriptor) -> Iterator[Descriptor]:
        yield message
        for nested in message.nested_types:
            yield from within(nested)

    for file in files():
        for message in file.message_types_by_name.values():
            yield from within(message)


def fields_within(message: Descriptor, seen: frozenset[str] = frozenset()) -> Iterator[FieldDescriptor]:
    """Fields of a message at any depth."""
    if message.full_name in seen or message.full_name.startswith("google."):
        return
    for field in message.fields:
        yield field
        if field.message_type is not None:
            yield from fields_within(field.message_type, seen | {message.full_name})


@cache
def sources(folder: str) -> tuple[tuple[Path, ast.Module], ...]:
    """Parsed modules below a folder of the project, without tests and migrations."""
    found = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        if not {"tests", "testing", "migrations"} & set(path.relative_to(ROOT / folder).parts):
            found.append((path, ast.parse(path.read_text())))
    return tuple(found)


def calls(folder: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call in a folder's sources, with the last part of the name that is called."""
    for _, module in sources(folder):
        for node in ast.walk(module):
            if isinstance(node, ast.Call):
                function: Any = node.func
                yield getattr(function, "attr", getattr(function, "id", "")), node


def told(service: str) -> set[str]:
    """Event types that a service may tell: by its lifecycles, and by `tell` in its sources."""
    found = {
        _event(model.aggregate, arrow.event)
        for model in aggregates(service)
        if issubclass(model, Living)
        for arrow in model.lifecycle
        if arrow.event
    }
    for _, module in sources(f"services/{service}"):
        for node in ast.walk(module):
            if isinstance(node, ast.ClassDef):
                aggregate = _aggregate_name(node)
                found |= {_event(aggregate, what) for what in _told_in(node) if aggregate or "." in what}
        # Outside of a model's class: `row.tell("changed")` of whichever aggregate has that.
        for what in _told_in(module):
            found.add(what if "." in what else f"*.{what}")
    return found


def _event(aggregate: str, what: str) -> str:
    return what if "." in what else f"{aggregate}.{what}"


def _aggregate_name(node: ast.ClassDef) -> str:
    for statement in node.body:
        if isinstance(statement, ast.Assign) and getattr(statement.targets[0], "id", "") == "aggregate":
            return ast.literal_eval(statement.value)
    return ""


def _told_in(node: ast.AST) -> set[str]:
    found = set()
    for one in ast.walk(node):
        if isinstance(one, ast.Call) and getattr(one.func, "attr", "") == "tell":
            # `database.tell(db, "access.heartbeat", …)` has the type second.
            found |= {arg.value for arg in one.args[:2] if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found

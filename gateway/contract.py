"""The contract as the gateway reads it: every service of the protos, with options and comments."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from care.options.v1 import options_pb2
from google.api import annotations_pb2
from google.api.http_pb2 import HttpRule
from google.protobuf import descriptor_pb2
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pool import Default

IDEMPOTENT = descriptor_pb2.MethodOptions.IDEMPOTENT
_HTTP: Any = annotations_pb2.http
NO_SIDE_EFFECTS = descriptor_pb2.MethodOptions.NO_SIDE_EFFECTS


@dataclass(frozen=True, slots=True)
class Rpc:
    """One RPC with what its options say."""

    method: MethodDescriptor
    service: ServiceDescriptor
    owner: str
    """The service that serves it: `patients`, `scheduling`, …; `gateway` for its own aggregates."""
    http: HttpRule
    rule: Any
    idempotency: int

    @property
    def name(self) -> str:
        """Full name, such as `care.patients.v1.PatientsService/GetPatient`."""
        return f"{self.service.full_name}/{self.method.name}"


@cache
def descriptor_set() -> descriptor_pb2.FileDescriptorSet:
    """All files with their comments, as `make gen` left them beside the generated code. Not to be changed."""
    path = Path(options_pb2.__file__).parents[3] / "descriptors.binpb"
    return descriptor_pb2.FileDescriptorSet.FromString(path.read_bytes())


@cache
def files() -> tuple[FileDescriptor, ...]:
    """Our own files, loaded."""
    names = [file.name for file in descriptor_set().file if file.name.startswith("care/")]
    for name in names:
        importlib.import_module(name.removesuffix(".proto").replace("/", ".") + "_pb2")
    pool: Any = Default()
    return tuple(pool.FindFileByName(name) for name in names)


def rpcs() -> Iterator[Rpc]:
    """Every RPC of the contract."""
    for file in files():
        for service in file.services_by_name.values():
            for method in service.methods:
                options = method.GetOptions()
                yield Rpc(
                    method,
                    service,
                    file.package.split(".")[1],
                    options.Extensions[_HTTP],
                    options.Extensions[options_pb2.rule],
                    options.idempotency_level,
                )


@cache
def comments() -> dict[str, str]:
    """The leading comment of every service, method, message, field, enum and value, by full name."""
    found: dict[str, str] = {}
    for file in descriptor_set().file:
        if not file.name.startswith("care/"):
            continue
        by_path = {
            tuple(place.path): " ".join(place.leading_comments.split())
            for place in file.source_code_info.location
            if place.leading_comments
        }
        for name, path in _places(file):
            if path in by_path:
                found[name] = by_path[path]
    return found


def _places(file: descriptor_pb2.FileDescriptorProto) -> Iterator[tuple[str, tuple[int, ...]]]:
    for index, message in enumerate(file.message_type):
        yield from _message_places(message, f"{file.package}.{message.name}", (4, index))
    for index, enum in enumerate(file.enum_type):
        yield from _enum_places(enum, f"{file.package}.{enum.name}", (5, index))
    for index, service in enumerate(file.service):
        name = f"{file.package}.{service.name}"
        yield name, (6, index)
        for number, method in enumerate(service.method):
            yield f"{name}.{method.name}", (6, index, 2, number)


def _message_places(
    message: descriptor_pb2.DescriptorProto, name: str, path: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name, path
    for index, field in enumerate(message.field):
        yield f"{name}.{field.name}", (*path, 2, index)
    for index, nested in enumerate(message.nested_type):
        yield from _message_places(nested, f"{name}.{nested.name}", (*path, 3, index))
    for index, enum in enumerate(message.enum_type):
        yield from _enum_places(enum, f"{name}.{enum.name}", (*path, 4, index))


def _enum_places(
    enum: descriptor_pb2.EnumDescriptorProto, name: str, path: tuple[int, ...]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield name, path
    for index, value in enumerate(enum.value):
        yield f"{name}.{value.name}", (*path, 2, index)

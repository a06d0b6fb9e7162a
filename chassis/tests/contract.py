"""What the contract holds: the names of all its messages."""

import importlib
import pkgutil
from collections.abc import Iterator

import care
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import Descriptor


def _messages() -> Iterator[str]:
    for found in pkgutil.walk_packages(care.__path__, "care."):
        if not found.name.endswith("_pb2"):
            continue
        module = importlib.import_module(found.name)
        file = descriptor_pool.Default().FindFileByName(module.DESCRIPTOR.name)
        for message in file.message_types_by_name.values():
            yield from _with_nested(message)


def _with_nested(message: Descriptor) -> Iterator[str]:
    if not message.GetOptions().map_entry:
        yield message.full_name
    for nested in message.nested_types:
        yield from _with_nested(nested)


MESSAGES = sorted(set(_messages()))

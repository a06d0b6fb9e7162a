"""The least request that a method's own rules accept, made from its descriptor: what is wrong is mended until nothing is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import protovalidate
from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from chassis.ids import new_id

# One of these fits every pattern of the contract.
_EXAMPLES = (
    "a",
    "A1",
    "Staff",
    "en",
    "2001-02-03",
    "09:00",
    "America/New_York",
    "visit",
    "https://example.test/x",
    "00:00",
)
_MOST = 200


def minimal(descriptor: Descriptor, known: Mapping[str, Any] | None = None, *, bare: bool = False) -> Message:
    """A valid request. `known` gives values by field name at any depth, for ids and the like.

    Unless `bare`, fields of `known` are set at the top and in the resource that the request carries.
    """
    request: Message = GetMessageClass(descriptor)()
    known = known or {}
    if not bare:
        _put_known(request, known)
    for _ in range(_MOST):
        violations = protovalidate.collect_violations(request)
        if not violations:
            return request
        for violation in violations:
            _mend(request, list(violation.proto.field.elements), violation.proto.rule_id, known)
    raise AssertionError(f"{descriptor.full_name}: {[violation.proto.rule_id for violation in violations]}")


def _put_known(request: Message, known: Mapping[str, Any], depth: int = 0) -> None:
    if request.DESCRIPTOR.full_name.startswith("google."):
        return
    for field in request.DESCRIPTOR.fields:
        if field.is_repeated:
            if field.name in known and isinstance(known[field.name], list):
                getattr(request, field.name).extend(known[field.name])
        elif field.message_type is None:
            if field.name in known and not isinstance(known[field.name], list):
                setattr(request, field.name, known[field.name])
        elif depth == 0 and _required(field):
            _begin(getattr(request, field.name))
            _put_known(getattr(request, field.name), known, depth + 1)


def _begin(message: Any) -> None:
    """Present; a time lies a week ahead."""
    message.SetInParent()
    if message.DESCRIPTOR.full_name == "google.protobuf.Timestamp":
        message.FromDatetime(datetime.now(UTC) + timedelta(days=7))


def _required(field: FieldDescriptor) -> bool:
    return bool(field.GetOptions().Extensions[validate_pb2.field].required)


def _mend(message: Message, path: list[Any], rule: str, known: Mapping[str, Any]) -> None:
    target: Any = message
    for element in path[:-1]:
        field = target.DESCRIPTOR.fields_by_name[element.field_name]
        target = getattr(target, element.field_name)
        if field.is_repeated:
            target = target[element.subscript.value]
    if not path:
        raise AssertionError(f"{message.DESCRIPTOR.full_name} breaks {rule}: give it by hand")
    last = path[-1]
    field = target.DESCRIPTOR.fields_by_name[last.field_name]
    rules = field.GetOptions().Extensions[validate_pb2.field]
    if field.is_repeated:
        values = getattr(target, field.name)
        if last.subscript is not None:
            values[last.subscript.value] = _value(field, rules.repeated.items, rule, known)
        elif field.message_type is not None:
            values.add()
        else:
            values.append(_value(field, rules.repeated.items, rule, known))
    elif field.message_type is not None:
        _begin(getattr(target, field.name))
    else:
        setattr(target, field.name, _value(field, rules, rule, known))


def _value(field: FieldDescriptor, rules: Any, rule: str, known: Mapping[str, Any]) -> Any:
    given = known.get(field.name)
    if given is not None and not isinstance(given, list):
        return given
    if field.enum_type is not None:
        banned = set(rules.enum.not_in)
        return next(value.number for value in field.enum_type.values if value.number not in banned | {0})
    if field.type == FieldDescriptor.TYPE_STRING:
        return _string(rules.string)
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    kind = getattr(rules, rules.WhichOneof("type") or "int32")
    for bound, step in (("gte", 0), ("gt", 1), ("lte", 0), ("lt", -1)):
        if kind.HasField(bound):
            return getattr(kind, bound) + step
    return 1


def _string(rules: Any) -> str:
    if rules.uuid:
        return new_id()
    if rules.pattern:
        return next(example for example in _EXAMPLES if re.search(rules.pattern, example))
    choices: Iterable[str] = [choice for choice in getattr(rules, "in") if choice]
    return next(iter(choices), "x" * max(rules.min_len, 1))

"""Rows to messages and messages to plain values, by walking a message's fields once per type."""

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from chassis.errors import Invalid

M = TypeVar("M", bound=Message)
_TIMESTAMP = "google.protobuf.Timestamp"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# The years 1000 to 2999. A day before or after the ends of the calendar can't be counted, and there a database's driver
# makes "infinity" of an instant: one such row and no list that has it could be read any more.
FIRST_SECOND, LAST_SECOND = -30610224000, 32503679999
_SETTER = Callable[[Message, Any], None]
# What a resource answers but nobody sets: sent back by clients that read, change and write the whole.
OUTPUT_ONLY = frozenset({"id", "etag", "create_time", "update_time"})


def to_proto(source: Any, message: type[M], **extra: Any) -> M:
    """A message from a row, mapping or object: every field takes the attribute or key of its name, `extra` first.

    datetimes become Timestamps, enums go by name, nested mappings become messages; what is None or absent stays unset.
    `etag` is made of `version`.
    """
    built = message()
    fill(built, source, extra)
    return built


def fill(built: Message, source: Any, extra: Mapping[str, Any] | None = None) -> None:
    """Set the fields of `built` as `to_proto` does."""
    if type(source) is dict and not extra:  # what JSON columns hold: fewer keys than the message has fields
        setters = _by_name(built.DESCRIPTOR)
        for name, value in source.items():
            if value is not None and (put := setters.get(name)) is not None:
                put(built, value)
        if "etag" in setters and source.get("etag") is None and source.get("version") is not None:
            setters["etag"](built, etag_of(source["version"]))
        return
    get: Callable[[str], Any]
    if isinstance(source, Mapping):
        get = source.get
    else:

        def get(name: str) -> Any:
            return getattr(source, name, None)

    for name, put in _setters(built.DESCRIPTOR):
        value = extra[name] if extra and name in extra else get(name)
        if value is None and name == "etag" and (version := get("version")) is not None:
            value = etag_of(version)
        if value is not None:
            put(built, value)


def etag_of(version: int) -> str:
    """The etag of a version."""
    return f'"{version}"'


@cache
def _setters(descriptor: Descriptor) -> tuple[tuple[str, _SETTER], ...]:
    return tuple((field.name, _setter(field)) for field in descriptor.fields)


@cache
def _by_name(descriptor: Descriptor) -> Mapping[str, _SETTER]:
    return dict(_setters(descriptor))


def _setter(field: FieldDescriptor) -> _SETTER:
    name = field.name
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        value_field = field.message_type.fields_by_name["value"]
        if value_field.message_type is not None:
            raise TypeError(f"{field.full_name}: maps of messages are not in use")
        return lambda built, value: getattr(built, name).update(value)
    if field.is_repeated:
        if field.message_type is None:
            convert = _scalar(field)
            return lambda built, value: getattr(built, name).extend([convert(one) for one in value])
        if field.message_type.full_name == _TIMESTAMP:
            raise TypeError(f"{field.full_name}: lists of times are not in use")

        def add(built: Message, value: Iterable[Any]) -> None:
            target = getattr(built, name)
            for one in value:
                _into(target.add(), one)

        return add
    if field.message_type is None:
        convert = _scalar(field)
        if convert is str:
            return lambda built, value: setattr(built, name, value if type(value) is str else str(value))
        return lambda built, value: setattr(built, name, convert(value))
    if field.message_type.full_name == _TIMESTAMP:
        return lambda built, value: _time_into(getattr(built, name), value)

    def put(built: Message, value: Any) -> None:
        target = getattr(built, name)
        target.SetInParent()
        _into(target, value)

    return put


def _into(target: Message, value: Any) -> None:
    if type(value) is not dict and isinstance(value, Message):
        target.CopyFrom(value)
    else:
        fill(target, value)


def _time_into(target: Timestamp, value: Any) -> None:
    if isinstance(value, Timestamp):
        target.CopyFrom(value)
        return
    if isinstance(value, str):
        value = datetime.fromisoformat(value)
    if value.tzinfo is None:
        value = value.astimezone(UTC)
    # FromDatetime does the same in five times the time, and lists hold ten times to a row.
    since = value - _EPOCH
    target.seconds = since.days * 86_400 + since.seconds
    target.nanos = since.microseconds * 1000


def _scalar(field: FieldDescriptor) -> Callable[[Any], Any]:
    if field.enum_type is not None:
        by_name = {value.name: value.number for value in field.enum_type.values}

        def number(value: Any) -> int:
            if isinstance(value, Enum):
                return by_name[value.name]
            if isinstance(value, str):  # a value that this build doesn't know is kept as its digits
                return by_name[value] if value in by_name else int(value)
            return int(value)

        return number
    if field.type == FieldDescriptor.TYPE_STRING:
        return lambda value: value.name if isinstance(value, Enum) else str(value)
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return float
    return lambda value: value


def to_time(stamp: Timestamp) -> datetime:
    """An aware datetime in UTC. Raises Invalid `TIME_INVALID` for one beyond the years 1000 to 2999."""
    if not FIRST_SECOND <= stamp.seconds <= LAST_SECOND:
        raise Invalid("TIME_INVALID", "A time is beyond the years 1000 to 2999.")
    return stamp.ToDatetime(tzinfo=UTC)


def given_time(message: Message, field: str) -> datetime | None:
    """`to_time` of a field, or None where it isn't set."""
    return to_time(getattr(message, field)) if message.HasField(field) else None


def plain(message: Message) -> dict[str, Any]:
    """What is set in a message as JSON-ready values: enums by name, times as RFC 3339, maps and lists as they are."""
    return {field.name: _plain_value(field, value, stored=True) for field, value in message.ListFields()}


def given(
    message: Message, mask: FieldMask | None = None, *, read_only: frozenset[str] = OUTPUT_ONLY
) -> dict[str, Any]:
    """The values that a request sets, as columns take them: datetimes, enum names, JSON-ready dicts and lists.

    With a mask: exactly its fields, cleared ones as their empty value (None for messages, times and optionals); else
    what is set. Output-only fields are left out, since clients send back what they read. Raises Invalid for a path that
    the message doesn't have.
    """
    if mask is None or not mask.paths:
        return {
            field.name: _plain_value(field, value)
            for field, value in message.ListFields()
            if field.name not in read_only
        }
    fields = message.DESCRIPTOR.fields_by_name
    values: dict[str, Any] = {}
    for path in mask.paths:
        field = fields.get(path)
        if field is None:
            raise Invalid("FIELD_UNKNOWN", "update_mask names a field that there isn't.", field="update_mask")
        if path in read_only:
            continue
        if (field.has_presence) and not message.HasField(path):
            values[path] = None
        else:
            values[path] = _plain_value(field, getattr(message, path))
    return values


def _plain_value(field: Any, value: Any, *, stored: bool = False) -> Any:
    if field.message_type is not None:
        if field.message_type.GetOptions().map_entry:
            return dict(value)
        if field.is_repeated:
            return [plain(one) for one in value]
        if field.message_type.full_name == _TIMESTAMP:
            return to_time(value).isoformat() if stored else to_time(value)
        return plain(value)
    if field.enum_type is not None:
        if field.is_repeated:
            return [_enum_name(field.enum_type, one) for one in value]
        return _enum_name(field.enum_type, value)
    return list(value) if field.is_repeated else value


def _enum_name(enum: EnumDescriptor, number: int) -> str:
    found = enum.values_by_number.get(number)
    return found.name if found is not None else str(number)


def enum_names(enum: Any, numbers: Iterable[int]) -> list[str]:
    """Names of a repeated enum field's values, newer ones as digits; `enum` is the generated enum class."""
    return [_enum_name(enum.DESCRIPTOR, number) for number in numbers]

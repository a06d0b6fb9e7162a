"""Rows to messages and messages to plain values, by walking a message's fields once per type."""

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from enum import Enum
from functools import cache, lru_cache
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
# What a resource answers but nobody sets: sent back by clients that read, change and write the whole.
OUTPUT_ONLY = frozenset({"id", "etag", "create_time", "update_time"})


def to_proto(source: Any, message: type[M], **extra: Any) -> M:
    """A message from a row, mapping or object: every field takes the attribute or key of its name, `extra` first.

    datetimes become Timestamps, enums go by name, nested mappings become messages; what is None or absent stays unset.
    `etag` is made of `version`.
    """
    # The constructor sets what is nested in C; field by field from Python it takes three times as long.
    try:
        return message(**_taken(message.DESCRIPTOR, False)(source, extra))
    except (TypeError, ValueError):  # a key that there is no field for, an enum's newer value
        return message(**_taken(message.DESCRIPTOR, True)(source, extra))


def etag_of(version: int) -> str:
    """The etag of a version."""
    return f'"{version}"'


@cache
def _taken(descriptor: Descriptor, careful: bool) -> Callable[[Any, Mapping[str, Any]], dict[str, Any]]:
    """What a message's constructor takes, out of a row, mapping or object."""
    fields = tuple((field.name, _converter(field, careful)) for field in descriptor.fields)
    has_etag = "etag" in descriptor.fields_by_name

    def taken(source: Any, extra: Mapping[str, Any]) -> dict[str, Any]:
        is_mapping = isinstance(source, Mapping)
        found = {}
        for name, convert in fields:
            if name in extra:
                value = extra[name]
            elif is_mapping:
                value = source.get(name)
            else:
                value = getattr(source, name, None)
            if value is not None:
                # The test here, for what most fields are, saves a call for each of them.
                found[name] = (
                    value if convert is None or (convert is _text and value.__class__ is str) else convert(value)
                )
        if has_etag and "etag" not in found:
            version = source.get("version") if is_mapping else getattr(source, "version", None)
            if version is not None:
                found["etag"] = etag_of(version)
        return found

    return taken


def _nested(descriptor: Descriptor, careful: bool) -> Callable[[Any], Any]:
    """As JSON columns hold it: a copy with times for their texts is nearly all that it takes, unless one is to be careful."""
    whole: Callable[[Any, Mapping[str, Any]], dict[str, Any]] | None = None
    quick: list[tuple[str, Callable[[Any], Any]]] | None = None

    def nested(value: Any) -> Any:
        nonlocal whole, quick
        if isinstance(value, Message):
            return value
        if whole is None or quick is None:  # not before, since a message may hold its own kind
            whole = _taken(descriptor, careful)
            fields = [(field.name, _converter(field, careful)) for field in descriptor.fields if field.message_type]
            quick = [(name, convert) for name, convert in fields if convert is not None]
        if careful or value.__class__ is not dict or "version" in value:
            return whole(value, _NOTHING)
        found = value
        for name, convert in quick:
            part = value.get(name)
            if part is not None:
                if found is value:
                    found = value.copy()
                found[name] = convert(part)
        return found

    return nested


_NOTHING: Mapping[str, Any] = {}


def _converter(field: FieldDescriptor, careful: bool) -> Callable[[Any], Any] | None:
    """What makes a field's value of a source's; None where it is taken as it is."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        if field.message_type.fields_by_name["value"].message_type is not None:
            raise TypeError(f"{field.full_name}: maps of messages are not in use")
        return None
    if field.message_type is None:
        one = _scalar(field)
    elif field.message_type.full_name == _TIMESTAMP:
        if field.is_repeated:
            raise TypeError(f"{field.full_name}: lists of times are not in use")
        return _time
    else:
        one = _nested(field.message_type, careful)
    if not field.is_repeated or one is None:
        return one
    return lambda values: [one(value) for value in values]


def _time(value: Any) -> Any:
    if value.__class__ is str:
        return _written(value)
    if isinstance(value, Timestamp):
        return value
    if value.tzinfo is None:
        value = value.astimezone(UTC)
    # The constructor takes a datetime, too, in ten times the time, and lists hold ten times to a row.
    since = value - _EPOCH
    return {"seconds": since.days * 86_400 + since.seconds, "nanos": since.microseconds * 1000}


@lru_cache(4096)
def _written(time: str) -> Any:
    # The parts of one visit say the same times over and over.
    return _time(datetime.fromisoformat(time))


def _scalar(field: FieldDescriptor) -> Callable[[Any], Any] | None:
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
        return _text
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return float
    return None


def _text(value: Any) -> str:
    if type(value) is str:
        return value
    return value.name if isinstance(value, Enum) else str(value)


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

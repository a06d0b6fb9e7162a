"""Proto3 JSON both ways, compiled once per message type from its descriptor: canonical going out, strict coming in.

`json_format` costs three to ten times as much per message, takes the last of two spellings of a field and quotes the
offending value in its errors.
"""

from __future__ import annotations

import base64
import binascii
import re
import struct
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from math import isfinite
from typing import Any, Final, TypeVar, cast

from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from chassis.errors import Invalid
from chassis.wire import FIRST_SECOND, LAST_SECOND

M = TypeVar("M", bound=Message)
Convert = Callable[[Any], Any]

_F = FieldDescriptor
_INT64: Final = (_F.TYPE_INT64, _F.TYPE_UINT64, _F.TYPE_SINT64, _F.TYPE_FIXED64, _F.TYPE_SFIXED64)
_UNSIGNED: Final = (_F.TYPE_UINT32, _F.TYPE_UINT64, _F.TYPE_FIXED32, _F.TYPE_FIXED64)
_INTEGER = re.compile(r"-?(0|[1-9][0-9]{0,19})")
_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?")
_SPECIAL: Final = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}
_TIMESTAMP = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(?:\.([0-9]{1,9}))?(Z|[+-][0-9]{2}:[0-9]{2})"
)
_INSTANT: Final = "An instant of the years 1000 to 2999 is expected, such as 2026-01-31T17:30:00Z."
_DURATION = re.compile(r"(-?)([0-9]{1,12})(?:\.([0-9]{1,9}))?s")
_MASK_PATH = re.compile(r"[a-z][A-Za-z0-9]*(\.[a-z][A-Za-z0-9]*)*")
_BASE64 = re.compile(r"[A-Za-z0-9+/_-]*={0,2}")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,59}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MAX_DURATION: Final = 315576000000
_DECIMALS: Final = ((1_000_000, 3), (1_000, 6), (1, 9))


def invalid(path: str, sentence: str, reason: str = "FIELD_INVALID") -> Invalid:
    """An error that names a field by its path and never its value."""
    return Invalid(reason, sentence, field=path)


def shown(name: str) -> str:
    """A key that a client made up, if it looks like a field's name: anything else may be a value."""
    return name if _NAME.fullmatch(name) else "?"


# -- out --------------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=65536)
def _second(seconds: int) -> str:
    return (_EPOCH + timedelta(seconds=seconds)).isoformat()[:19]


def _fraction(nanos: int) -> str:
    for unit, digits in _DECIMALS:
        if nanos % unit == 0:
            return f".{nanos // unit:0{digits}d}"
    raise AssertionError("unreachable")


def _encode_timestamp(value: Any) -> str:
    nanos = value.nanos
    if not nanos:
        return f"{_second(value.seconds)}Z"
    micros, rest = divmod(nanos, 1000)
    # Mostly microseconds of a database's clock.
    return f"{_second(value.seconds)}{_fraction(nanos) if rest or not micros % 1000 else f'.{micros:06d}'}Z"


def _encode_duration(value: Any) -> str:
    seconds, nanos = value.seconds, value.nanos
    sign = "-" if seconds < 0 or nanos < 0 else ""
    return f"{sign}{abs(seconds)}{_fraction(abs(nanos)) if nanos else ''}s"


def camel(path: str) -> str:
    """`patient_id` as JSON spells it."""
    head, *rest = path.split("_")
    return head + "".join(part[:1].upper() + part[1:] for part in rest)


def _snake(path: str) -> str:
    return re.sub(r"[A-Z]", lambda found: "_" + found[0].lower(), path)


def _encode_mask(value: Any) -> str:
    return ",".join(camel(path) for path in value.paths)


def _encode_bytes(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _encode_double(value: float) -> float | str:
    if isfinite(value):
        return value
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _encode_float(value: float) -> float | str:
    if not isfinite(value):
        return _encode_double(value)
    # The shortest number that is the same float32.
    return next(near for digits in range(6, 18) if _float32(near := float(f"{value:.{digits}g}")) == value)


def _float32(value: float) -> float:
    single: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return single


_WELL_KNOWN_OUT: Final[Mapping[str, Callable[[Any], Any]]] = {
    "google.protobuf.Timestamp": _encode_timestamp,
    "google.protobuf.Duration": _encode_duration,
    "google.protobuf.FieldMask": _encode_mask,
}


def _encoder(kind: Descriptor, encoders: Callable[[Descriptor], Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Makes JSON-ready dicts of one message type."""
    # By descriptor: ListFields hands these very objects out. Compiled when it is first needed: a message may hold itself.
    fields: dict[FieldDescriptor, tuple[str, Callable[[Any], Any] | None]] = {}

    def prepare() -> None:
        for field in kind.fields:
            one = _field_out(field, encoders)
            if is_map(field):
                one = _map_out(field, encoders)
            elif field.is_repeated:
                one = _list_out(one)
            fields[field] = field.json_name, one

    def encode(message: Message) -> dict[str, Any]:
        if not fields:
            prepare()
        out: dict[str, Any] = {}
        for field, value in message.ListFields():
            name, convert = fields[field]
            out[name] = value if convert is None else convert(value)
        return out

    return encode


def _list_out(one: Callable[[Any], Any] | None) -> Callable[[Any], list[Any]]:
    if one is None:
        return list
    return lambda values: [one(value) for value in values]


def _map_out(field: FieldDescriptor, encoders: Callable[[Descriptor], Callable[[Any], Any]]) -> Callable[[Any], Any]:
    assert field.message_type is not None
    key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
    convert = _field_out(value, encoders) or (lambda item: item)
    if key.type == _F.TYPE_BOOL:
        return lambda items: {("true" if name else "false"): convert(items[name]) for name in items}
    return lambda items: {str(name): convert(items[name]) for name in items}


def _field_out(
    field: FieldDescriptor, encoders: Callable[[Descriptor], Callable[[Any], Any]]
) -> Callable[[Any], Any] | None:
    if field.message_type is not None:
        return None if is_map(field) else encoders(field.message_type)
    if field.enum_type is not None:
        names = {number: value.name for number, value in field.enum_type.values_by_number.items()}
        return lambda number: names.get(number, number)
    if field.type in _INT64:
        return str
    if field.type == _F.TYPE_BYTES:
        return _encode_bytes
    if field.type == _F.TYPE_DOUBLE:
        return _encode_double
    if field.type == _F.TYPE_FLOAT:
        return _encode_float
    return None


def is_map(field: FieldDescriptor) -> bool:
    return bool(field.message_type is not None and field.message_type.GetOptions().map_entry)


# -- in ---------------------------------------------------------------------------------------------------------------


class Mismatch(Exception):
    """A value that does not fit. The path is put before it on the way out: building it on the way in costs a third."""

    def __init__(self, sentence: str, reason: str = "FIELD_INVALID", path: str = "") -> None:
        super().__init__(reason)
        self.sentence = sentence
        self.reason = reason
        self.path = path

    def inside(self, step: str) -> Mismatch:
        """The same, one step further out; `step` is a name or an index in brackets."""
        self.path = f"{step}{self.path}" if self.path.startswith("[") or not self.path else f"{step}.{self.path}"
        return self

    def problem(self) -> Invalid:
        return invalid(self.path, self.sentence, self.reason)


def _decode_string(value: Any) -> str:
    if type(value) is not str:
        raise Mismatch("A text is expected.")
    if "\x00" in value:  # PostgreSQL's text can't hold it
        raise Mismatch("A text may not contain the character NUL.")
    return value


def _decode_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise Mismatch("true or false is expected.")
    return value


def _decode_bytes(value: Any) -> bytes:
    if type(value) is not str or not _BASE64.fullmatch(value):
        raise Mismatch("A text in base64 is expected.")
    try:
        bare = value.rstrip("=").replace("-", "+").replace("_", "/")
        return base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True)
    except (ValueError, binascii.Error):
        raise Mismatch("A text in base64 is expected.") from None


def _decode_double(value: Any) -> float:
    if type(value) is float or type(value) is int:
        return float(value)
    if type(value) is str:
        if value in _SPECIAL:
            return _SPECIAL[value]
        if _NUMBER.fullmatch(value) and isfinite(number := float(value)):
            return number
    raise Mismatch("A number is expected.")


def _integer(bits: int, signed: bool) -> Convert:
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)

    def decode(value: Any) -> int:
        if type(value) is int:
            number = value
        elif type(value) is float and value.is_integer():
            number = int(value)
        elif type(value) is str and _INTEGER.fullmatch(value):
            number = int(value)
        else:
            raise Mismatch("A whole number is expected.")
        if not low <= number <= high:
            raise Mismatch(f"A whole number from {low} to {high} is expected.")
        return number

    return decode


def _enum(kind: EnumDescriptor) -> Convert:
    numbers = {name: value.number for name, value in kind.values_by_name.items()}
    known = frozenset(numbers.values())
    expected = f"One of {', '.join(numbers)} is expected."

    def decode(value: Any) -> int:
        if type(value) is str and value in numbers:
            return numbers[value]
        if type(value) is int and value in known:
            return value
        raise Mismatch(expected)

    return decode


def _decode_timestamp(value: Any) -> tuple[int, int]:
    found = _TIMESTAMP.fullmatch(value) if type(value) is str else None
    if found is None:
        raise Mismatch(_INSTANT)
    fraction, offset = found.groups()
    try:
        since = datetime.fromisoformat(value[:19] + "+00:00") - _EPOCH
    except ValueError:
        raise Mismatch(_INSTANT) from None
    seconds = since.days * 86400 + since.seconds
    if offset != "Z":
        hours, minutes = int(offset[1:3]), int(offset[4:6])
        if hours > 23 or minutes > 59:
            raise Mismatch(_INSTANT)
        seconds -= (hours * 3600 + minutes * 60) * (-1 if offset[0] == "-" else 1)
    if not FIRST_SECOND <= seconds <= LAST_SECOND:
        raise Mismatch(_INSTANT)
    return seconds, int(fraction.ljust(9, "0")) if fraction else 0


def _decode_duration(value: Any) -> tuple[int, int]:
    found = _DURATION.fullmatch(value) if type(value) is str else None
    if found is None or int(found[2]) > _MAX_DURATION:
        raise Mismatch("A duration in seconds is expected, such as 300s or 1.5s.")
    sign = -1 if found[1] else 1
    return sign * int(found[2]), sign * int((found[3] or "0").ljust(9, "0"))


def _decode_mask(value: Any) -> list[str]:
    if type(value) is not str:
        raise Mismatch("Names of fields are expected, separated by commas.")
    paths = [part for part in value.split(",") if part]
    if not all(_MASK_PATH.fullmatch(part) for part in paths):
        raise Mismatch("Names of fields are expected, separated by commas.")
    return [_snake(part) for part in paths]


def _fill_timestamp(message: Any, value: Any) -> None:
    message.seconds, message.nanos = _decode_timestamp(value)


def _fill_duration(message: Any, value: Any) -> None:
    message.seconds, message.nanos = _decode_duration(value)


def _fill_mask(message: Any, value: Any) -> None:
    message.paths.extend(_decode_mask(value))


# Fills a message, or a field of it, with a JSON value.
Fill = Callable[[Any, Any], None]
_WELL_KNOWN_IN: Final[Mapping[str, Fill]] = {
    "google.protobuf.Timestamp": _fill_timestamp,
    "google.protobuf.Duration": _fill_duration,
    "google.protobuf.FieldMask": _fill_mask,
}


def scalar_in(field: FieldDescriptor) -> Convert:
    """The converter of one JSON value of a field that is no message; it raises Mismatch."""
    if field.enum_type is not None:
        return _enum(field.enum_type)
    if field.type == _F.TYPE_STRING:
        return _decode_string
    if field.type == _F.TYPE_BOOL:
        return _decode_bool
    if field.type == _F.TYPE_BYTES:
        return _decode_bytes
    if field.type in (_F.TYPE_DOUBLE, _F.TYPE_FLOAT):
        return _decode_double
    return _integer(64 if field.type in _INT64 else 32, field.type not in _UNSIGNED)


class Decoder:
    """Fills messages of one type from parsed JSON: `decoder(message, value)`; raises Mismatch."""

    def __init__(self, kind: Descriptor) -> None:
        self.kind = kind
        self._fills: dict[str, tuple[str, Fill]] = {}

    def compile(self, decoders: Callable[[Descriptor], Fill]) -> None:
        for field in self.kind.fields:
            fill = _fill(field, decoders)
            for spelling in (field.json_name, field.name):
                self._fills[spelling] = field.json_name, fill

    def __call__(self, message: Any, value: Any) -> None:
        if type(value) is not dict:
            raise Mismatch("An object is expected.")
        fills, seen = self._fills, set()
        for key, item in value.items():
            found = fills.get(key)
            if found is None:
                raise Mismatch("There is no such field.", "FIELD_UNKNOWN", shown(key))
            name, fill = found
            if name in seen:
                raise Mismatch("The field is given twice, in two spellings.", path=name)
            seen.add(name)
            if item is not None:
                try:
                    fill(message, item)
                except Mismatch as mismatch:
                    raise mismatch.inside(name) from None


def _fill(field: FieldDescriptor, decoders: Callable[[Descriptor], Fill]) -> Fill:
    name = field.name
    if is_map(field):
        return _fill_map(field, decoders)
    if field.message_type is not None:
        into = decoders(field.message_type)
        if not field.is_repeated:

            def fill_message(message: Any, value: Any) -> None:
                child = getattr(message, name)
                child.SetInParent()  # an empty object is present
                into(child, value)

            return fill_message

        def fill_messages(message: Any, values: Any) -> None:
            children = getattr(message, name)
            _each(values, lambda value: into(children.add(), value))

        return fill_messages
    convert = scalar_in(field)
    if not field.is_repeated:
        return lambda message, value: setattr(message, name, convert(value))

    def fill_scalars(message: Any, values: Any) -> None:
        converted: list[Any] = []
        _each(values, lambda value: converted.append(convert(value)))
        getattr(message, name).extend(converted)

    return fill_scalars


def _each(values: Any, take: Callable[[Any], None]) -> None:
    if type(values) is not list:
        raise Mismatch("A list is expected.")
    index = 0
    try:
        for value in values:
            take(value)
            index += 1
    except Mismatch as mismatch:
        raise mismatch.inside(f"[{index}]") from None


def _fill_map(field: FieldDescriptor, decoders: Callable[[Descriptor], Fill]) -> Fill:
    assert field.message_type is not None
    name = field.name
    key, value = field.message_type.fields_by_name["key"], field.message_type.fields_by_name["value"]
    to_key = scalar_in(key)
    into = decoders(value.message_type) if value.message_type is not None else None
    convert = scalar_in(value) if into is None else None

    def fill(message: Any, items: Any) -> None:
        if type(items) is not dict:
            raise Mismatch("An object is expected.")
        entries = getattr(message, name)
        try:
            for written, item in items.items():
                place = to_key({"true": True, "false": False}.get(written) if key.type == _F.TYPE_BOOL else written)
                if into is not None:
                    into(entries[place], item)
                elif convert is not None:
                    entries[place] = convert(item)
        except Mismatch as mismatch:
            raise mismatch.inside("[*]") from None  # a key is a value too: it isn't shown

    return fill


class Codec:
    """Encoders and decoders of all message types that were asked for; each is compiled once."""

    def __init__(self) -> None:
        self._encoders: dict[str, Callable[[Any], Any]] = {}
        self._decoders: dict[str, Fill] = {}

    def encoder(self, kind: Descriptor) -> Callable[[Any], Any]:
        """`encoder(message)` answers what `orjson.dumps` takes."""
        _refuse_strange(kind)
        known = _WELL_KNOWN_OUT.get(kind.full_name) or self._encoders.get(kind.full_name)
        if known is None:
            known = self._encoders[kind.full_name] = _encoder(kind, self.encoder)
            for field in kind.fields:  # what can't be encoded is found now, and not by an answer
                _field_out(field, self.encoder)
        return known

    def decoder(self, kind: Descriptor) -> Fill:
        """`decoder(message, parsed JSON)` fills `message` or raises Mismatch."""
        _refuse_strange(kind)
        known = _WELL_KNOWN_IN.get(kind.full_name) or self._decoders.get(kind.full_name)
        if known is None:
            made = Decoder(kind)
            self._decoders[kind.full_name] = known = made
            made.compile(self.decoder)
        return known

    def filler(self, field: FieldDescriptor) -> Fill:
        """`filler(message, parsed JSON)` sets one field of `message` or raises Mismatch."""
        return _fill(field, self.decoder)

    def to_json(self, message: Message) -> dict[str, Any]:
        """The canonical proto3 JSON of a message, as a dict."""
        encoded: dict[str, Any] = self.encoder(descriptor_of(type(message)))(message)
        return encoded

    def from_json(self, value: Any, kind: type[M]) -> M:
        """A message from parsed JSON; raises Invalid `FIELD_UNKNOWN` or `FIELD_INVALID` with the field's path."""
        message = kind()
        try:
            self.decoder(descriptor_of(kind))(message, value)
        except Mismatch as mismatch:
            raise mismatch.problem() from None
        return message


def _refuse_strange(kind: Descriptor) -> None:
    if kind.full_name.startswith("google.protobuf.") and kind.full_name not in _WELL_KNOWN_IN:
        raise TypeError(f"{kind.full_name} has a JSON form of its own that is not built here")


def descriptor_of(kind: type[Message]) -> Descriptor:
    """The descriptor of a generated class."""
    return cast(Descriptor, kind.DESCRIPTOR)


def message_class(kind: Descriptor) -> type[Message]:
    """The generated class of a descriptor."""
    return GetMessageClass(kind)

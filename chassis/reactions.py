"""What a service does on others' events: a registry of functions by event type."""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from care.events.v1.envelope_pb2 import Event
from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncSession

P = TypeVar("P", bound=Message)
Reaction = Callable[[P, Event, AsyncSession], Awaitable[None]]


class Registered(NamedTuple):
    """One reaction and the message that its payload must be."""

    payload: type[Message]
    function: Reaction[Any]
    enums: tuple["_EnumField", ...]
    shares: bool


class NotAlone(Exception):
    """Other events share the transaction in which a reaction needs to be by itself; it is run again, alone."""


def need_own_transaction(db: AsyncSession) -> None:
    """Called by a reaction before it locks what one that shares may not lock (see `Reactions`). Raises NotAlone."""
    if db.info.get("together"):
        raise NotAlone


class Reactions:
    """The reactions of one service; several per type are run in the order of registration, in one transaction.

    A reaction gets the parsed payload, the envelope and the open session, whose `info` holds the bus's `record` and
    the `event`. It must bear any order, writes rows only, and calls no service and no provider.

    Events of different patients may share a transaction, and so its locks, where all their reactions say so. One that
    shares locks only what belongs to its event's patient, or to the event's aggregate where it is about no patient: rows
    that no transaction locks together with another patient's, unless it passes over what is locked.
    """

    def __init__(self) -> None:
        self._by_type: dict[str, list[Registered]] = {}

    def on(self, *types: str, payload: type[P], shares: bool = False) -> Callable[[Reaction[P]], Reaction[P]]:
        """Register the decorated function for event types such as `thing.changed`.

        `shares`: it keeps to what a reaction may lock that shares its transaction with others.
        """

        def register(function: Reaction[P]) -> Reaction[P]:
            enums = tuple(_enum_fields(payload.DESCRIPTOR))
            for each in types:
                registered = self._by_type.setdefault(each, [])
                if registered and registered[0].payload is not payload:
                    raise ValueError(
                        f"{each} already has another payload: {registered[0].payload.DESCRIPTOR.full_name}"
                    )
                registered.append(Registered(payload, function, enums, shares))
            return function

        return register

    @property
    def types(self) -> frozenset[str]:
        """Event types that have a reaction."""
        return frozenset(self._by_type)

    def for_type(self, name: str) -> list[Registered]:
        return self._by_type.get(name, [])


class _EnumField(NamedTuple):
    path: tuple[Any, ...]
    numbers: frozenset[int]


def _enum_fields(message: Any, path: tuple[Any, ...] = (), seen: frozenset[str] = frozenset()) -> Iterator[_EnumField]:
    """Where a payload holds enums, at any depth; computed once per registration."""
    if message.full_name in seen or message.GetOptions().map_entry:
        return
    for field in message.fields:
        if field.enum_type is not None:
            yield _EnumField((*path, field), frozenset(field.enum_type.values_by_number))
        elif field.message_type is not None:
            yield from _enum_fields(field.message_type, (*path, field), seen | {message.full_name})


def knows_all_values(payload: Message, enums: tuple[_EnumField, ...]) -> bool:
    """Whether every enum in it holds a value that this build has: proto3 keeps newer numbers silently."""
    return all(number in field.numbers for field in enums for number in _numbers(payload, field.path))


def _numbers(message: Message, path: tuple[Any, ...]) -> Iterator[int]:
    field, rest = path[0], path[1:]
    value = getattr(message, field.name)
    if field.is_repeated:
        if rest:
            for each in value:
                yield from _numbers(each, rest)
        else:
            yield from value
    elif rest:
        if message.HasField(field.name):
            yield from _numbers(value, rest)
    else:
        yield value

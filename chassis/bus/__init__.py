"""The bus that events travel on: what it promises, whichever of the two implementations keeps the promise."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

from aiokafka.partitioner import murmur2

PARTITIONS = 12
# Leaves room below a broker's usual 1,048,588 bytes, so that a dead letter (the same value and a few headers) still fits.
MAX_MESSAGE_BYTES = 900_000

Partition = tuple[str, int]


class BusUnavailable(Exception):
    """Nothing may be assumed about what was asked of the bus; ask again. Its text names an error class, never a value."""


class AppendRefused(NamedTuple):
    """This message will never be accepted as it is: sending it again is no use."""

    reason: str


TOO_LARGE = AppendRefused("MESSAGE_TOO_LARGE")
UNAUTHORIZED = AppendRefused("TOPIC_UNAUTHORIZED")
INVALID = AppendRefused("MESSAGE_INVALID")
# Not at fault itself: an earlier message of its key in the same call was refused, and order per key stands.
HELD_BACK = AppendRefused("HELD_BACK")


class Message(NamedTuple):
    """What is appended; `key` (an opaque id, never who a person is) picks the partition."""

    key: str
    value: bytes
    headers: tuple[tuple[str, bytes], ...] = ()


class Record(NamedTuple):
    """What is read back, with its place in the log."""

    topic: str
    partition: int
    offset: int
    key: str
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ms: int

    def header(self, name: str) -> bytes | None:
        """The first header of that name."""
        return next((value for key, value in self.headers if key == name), None)


class Lag(NamedTuple):
    """How far a group is behind on one partition: records, age in seconds of the first unread one, end of the log."""

    records: int
    seconds: float
    end: int


class Reader(Protocol):
    """One member of a group. Members share the partitions; what a dead one had is taken over by the others.

    Delivery is at least once: whatever was not committed comes again, to this member or another.
    """

    async def start(self) -> None: ...

    async def fetch(self, max_records: int, timeout: float) -> dict[Partition, list[Record]]:
        """Up to `max_records` of partitions that are not paused; empty after `timeout` seconds. Raises BusUnavailable."""
        ...

    def assignment(self) -> frozenset[Partition]:
        """The partitions that this member has now."""
        ...

    async def commit(self, offsets: dict[Partition, int]) -> None:
        """Next offset to read per partition; partitions that this member no longer has are passed over silently."""
        ...

    async def pause(self, partitions: Iterable[Partition]) -> None: ...

    async def resume(self, partitions: Iterable[Partition]) -> None: ...

    async def seek(self, partition: Partition, offset: int) -> None: ...

    async def lag(self) -> dict[Partition, Lag]:
        """Of the partitions that this member has now, by the committed offset."""
        ...

    async def stop(self) -> None: ...


MayLeave = Callable[[], bool]
"""Whether what waits to be sent may still be: the process may have been stopped for long in the middle of sending."""


class Bus(Protocol):
    """Append-only topics of keyed partitions, read by groups; a new group reads from the start."""

    async def start(self) -> None:
        """Never fails because the bus is away: a service starts without it and its events wait in the outbox."""
        ...

    async def stop(self) -> None: ...

    async def ensure_topics(self, topics: Iterable[str], partitions: int = PARTITIONS) -> None:
        """Make those that are missing; the number of partitions is fixed at creation."""
        ...

    async def append(
        self, topic: str, messages: Sequence[Message], may_leave: MayLeave | None = None
    ) -> list[AppendRefused | None]:
        """Append in order per key; the answer has one entry a message, None where it is acknowledged.

        Raises BusUnavailable where nothing may be assumed: the caller sends all again, duplicates are allowed.
        `may_leave` is asked at the last moment at which messages can be kept back; its no is BusUnavailable, too.
        """
        ...

    def reader(self, group: str, topics: Sequence[str]) -> Reader: ...

    def tail(self, topics: Sequence[str]) -> Reader:
        """Reads all partitions from where they end at `start`, which raises BusUnavailable; it belongs to no group, so
        nothing is shared and nothing is committed. After BusUnavailable make a new one: what came meanwhile is missed.
        """
        ...

    async def trim(self, older_than_seconds: float, at_most: int = 100_000) -> int:
        """Delete records older than that, where the bus doesn't do so by itself; how many went."""
        ...


@lru_cache(maxsize=65_536)
def _hash(key: bytes) -> int:
    return int(murmur2(key)) & 0x7FFFFFFF


def partition_of(key: str | bytes, partitions: int) -> int:
    """Kafka's default partitioner (murmur2), so that both implementations spread keys alike."""
    return _hash(key.encode() if isinstance(key, str) else key) % partitions


def refuse_in_order(messages: Sequence[Message], limit: int) -> list[AppendRefused | None]:
    """Verdicts known before sending: what is too large, and what stands behind it under the same key."""
    verdicts: list[AppendRefused | None] = []
    refused: set[str] = set()
    for message in messages:
        if message.key in refused:
            verdicts.append(HELD_BACK)
        elif len(message.value) + len(message.key) > limit:
            refused.add(message.key)
            verdicts.append(TOO_LARGE)
        else:
            verdicts.append(None)
    return verdicts

"""The embedded bus: topics as tables in a PostgreSQL database of their own, with Kafka's semantics and partitioner."""

import asyncio
import contextlib
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any
from weakref import WeakSet, WeakValueDictionary

import asyncpg
import orjson

from chassis.bus import (
    MAX_MESSAGE_BYTES,
    PARTITIONS,
    AppendRefused,
    BusUnavailable,
    Lag,
    MayLeave,
    Message,
    Partition,
    Record,
    partition_of,
    refuse_in_order,
)

# bus_append takes the row of each partition, in order, and keeps it until the commit: offsets become visible in
# ascending order, so a reader that stands at n never has an n-1 appear behind it. The price: appends to one partition
# queue, which costs nothing here, since only one relay per service writes a topic.
_SCHEMA = """
SELECT pg_advisory_xact_lock(7261001);
CREATE TABLE IF NOT EXISTS topic (
    name text PRIMARY KEY,
    partitions int NOT NULL CHECK (partitions > 0)
);
CREATE TABLE IF NOT EXISTS topic_partition (
    topic text NOT NULL REFERENCES topic (name),
    partition int NOT NULL,
    next_offset bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (topic, partition)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);
CREATE TABLE IF NOT EXISTS log (
    topic text NOT NULL,
    partition int NOT NULL,
    "offset" bigint NOT NULL,
    key text NOT NULL,
    value bytea,
    headers bytea NOT NULL,
    time timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (topic, partition, "offset")
);
CREATE TABLE IF NOT EXISTS group_offset (
    group_name text NOT NULL,
    topic text NOT NULL,
    partition int NOT NULL,
    next_offset bigint NOT NULL DEFAULT 0,
    owner uuid,
    lease_until timestamptz,
    PRIMARY KEY (group_name, topic, partition)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);
CREATE TABLE IF NOT EXISTS group_member (
    group_name text NOT NULL,
    member uuid NOT NULL,
    topics text[] NOT NULL,
    lease_until timestamptz NOT NULL,
    PRIMARY KEY (group_name, member)
);
CREATE OR REPLACE FUNCTION bus_append(
    in_topic text, in_partitions int[], in_keys text[], in_values bytea[], in_headers bytea[]
) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    each_partition int;
    first_offset bigint;
BEGIN
    FOR each_partition IN SELECT DISTINCT p FROM unnest(in_partitions) AS p ORDER BY p LOOP
        UPDATE topic_partition
           SET next_offset = next_offset
               + (SELECT count(*) FROM unnest(in_partitions) AS p WHERE p = each_partition)
         WHERE topic = in_topic AND partition = each_partition
        RETURNING next_offset - (SELECT count(*) FROM unnest(in_partitions) AS p WHERE p = each_partition)
          INTO STRICT first_offset;
        INSERT INTO log (topic, partition, "offset", key, value, headers)
        SELECT in_topic, each_partition, first_offset - 1 + row_number() OVER (ORDER BY place), key, value, headers
          FROM unnest(in_partitions, in_keys, in_values, in_headers)
               WITH ORDINALITY AS m (partition, key, value, headers, place)
         WHERE m.partition = each_partition;
    END LOOP;
END $$;
"""

# What may be read is split evenly among the partitions that have something: a full one starves none.
_TAKE_NEWER = """
WITH behind AS (
    SELECT p.topic, p.partition, p.position
      FROM unnest($1::text[], $2::int[], $3::bigint[]) AS p (topic, partition, position)
      JOIN topic_partition t ON t.topic = p.topic AND t.partition = p.partition AND t.next_offset > p.position
), share AS (SELECT greatest(1, $4::bigint / greatest(1, count(*))) AS records FROM behind)
SELECT r.topic, r.partition, r."offset", r.key, r.value, r.headers,
       (extract(epoch FROM r.time) * 1000)::bigint AS ms
  FROM behind b,
  LATERAL (SELECT * FROM log WHERE log.topic = b.topic AND log.partition = b.partition
                               AND log."offset" >= b.position
            ORDER BY log."offset" LIMIT (SELECT records FROM share)) AS r
 ORDER BY r."offset" LIMIT $4
"""

_MEMBER = """
INSERT INTO group_member (group_name, member, topics, lease_until)
VALUES ($1, $2, $3, clock_timestamp() + $4 * interval '1 second')
ON CONFLICT (group_name, member) DO UPDATE SET lease_until = excluded.lease_until, topics = excluded.topics
"""

_LAG = """
SELECT g.topic, g.partition, t.next_offset AS end_offset,
       coalesce(t.next_offset - first."offset", 0) AS records,
       coalesce(extract(epoch FROM clock_timestamp() - first.time)::float8, 0) AS seconds
  FROM group_offset g JOIN topic_partition t ON t.topic = g.topic AND t.partition = g.partition
  LEFT JOIN LATERAL (SELECT "offset", time FROM log WHERE log.topic = g.topic AND log.partition = g.partition
                        AND log."offset" >= g.next_offset ORDER BY log."offset" LIMIT 1) AS first ON true
 WHERE g.group_name = $1 AND g.topic = ANY($2) AND g.owner = $3
"""

# What says that the server is away or busy, not that the statement is wrong.
_AWAY = ("08", "40", "53", "57", "28", "3D")


class _Bell:
    """Wakes the readers of this process right after an append; other processes find it at their next poll."""

    def __init__(self) -> None:
        self.readers: WeakSet[PostgresReader] = WeakSet()

    def ring(self, topic: str) -> None:
        for reader in self.readers:
            if topic in reader.topics:
                reader.bell.set()


# By address: several bus objects on one database in one process wake each other. Holds no state but who listens.
_bells: WeakValueDictionary[str, _Bell] = WeakValueDictionary()


class PostgresBus:
    """The bus on `url` (`postgresql+asyncpg://…` or a plain one); makes its tables when first used.

    `poll` bounds, in seconds, how late a reader in another process sees a record; `lease` how long a dead member
    keeps its partitions.
    """

    def __init__(
        self,
        url: str,
        *,
        poll: float = 0.25,
        lease: float = 10.0,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        pool_size: int = 6,
    ) -> None:
        self._url = url.replace("postgresql+asyncpg://", "postgresql://", 1)
        self.poll = poll
        self.lease = lease
        self._limit = max_message_bytes
        self._pool_size = pool_size
        self._pool: Any = None
        self._opening = asyncio.Lock()
        self._partitions: dict[str, int] = {}
        self.bell = _bells.setdefault(self._url, _Bell())

    async def start(self) -> None:
        # A database that is away must not keep a service from starting; the pool is tried again at first use.
        with contextlib.suppress(BusUnavailable):
            async with self.connection():
                pass

    async def stop(self) -> None:
        pool, self._pool = self._pool, None
        if pool is not None:
            try:
                await asyncio.wait_for(pool.close(), 5)
            except TimeoutError:
                pool.terminate()

    async def ensure_topics(self, topics: Iterable[str], partitions: int = PARTITIONS) -> None:
        missing = sorted({topic for topic in topics if topic not in self._partitions})
        if not missing:
            return
        async with self.connection() as connection, connection.transaction():
            await connection.execute(
                "INSERT INTO topic (name, partitions) SELECT unnest($1::text[]), $2 ON CONFLICT DO NOTHING",
                missing,
                partitions,
            )
            await connection.execute(
                "INSERT INTO topic_partition (topic, partition) SELECT name, generate_series(0, partitions - 1)"
                " FROM topic WHERE name = ANY($1) ORDER BY 1, 2 ON CONFLICT DO NOTHING",
                missing,
            )
            rows = await connection.fetch("SELECT name, partitions FROM topic WHERE name = ANY($1)", missing)
        self._partitions.update((row["name"], row["partitions"]) for row in rows)

    async def append(
        self, topic: str, messages: Sequence[Message], may_leave: MayLeave | None = None
    ) -> list[AppendRefused | None]:
        verdicts = refuse_in_order(messages, self._limit)
        sent = [message for message, verdict in zip(messages, verdicts, strict=True) if verdict is None]
        if not sent:
            return verdicts
        await self.ensure_topics([topic])
        partitions = self._partitions[topic]
        async with self.connection() as connection:
            if may_leave is not None and not may_leave():
                raise BusUnavailable("KEPT_BACK")
            await connection.execute(
                "SELECT bus_append($1, $2, $3, $4, $5)",
                topic,
                [partition_of(message.key, partitions) for message in sent],
                [message.key for message in sent],
                [message.value for message in sent],
                [_pack(message.headers) for message in sent],
            )
        self.bell.ring(topic)
        return verdicts

    def reader(self, group: str, topics: Sequence[str]) -> "PostgresReader":
        return PostgresReader(self, group, topics)

    def tail(self, topics: Sequence[str]) -> "PostgresTail":
        return PostgresTail(self, "", topics)

    async def trim(self, older_than_seconds: float, at_most: int = 100_000) -> int:
        """Delete records older than that, oldest first, at most so many; returns how many. Groups that were behind
        go on with the first record that is left, as on Kafka."""
        async with self.connection() as connection:
            done = await connection.execute(
                "DELETE FROM log WHERE ctid = ANY(ARRAY(SELECT ctid FROM log"
                " WHERE time < clock_timestamp() - $1 * interval '1 second' ORDER BY topic, partition, \"offset\""
                " LIMIT $2))",
                float(older_than_seconds),
                at_most,
            )
        return int(done.split()[-1])

    @contextlib.asynccontextmanager
    async def connection(self) -> AsyncIterator[Any]:
        """A connection; whatever says that the server is away becomes BusUnavailable, without the driver's text."""
        try:
            if self._pool is None:
                await self._open()
            async with self._pool.acquire(timeout=10) as connection:
                yield connection
        except asyncpg.PostgresError as error:
            if (error.sqlstate or "")[:2] in _AWAY:
                raise BusUnavailable(type(error).__name__) from None
            raise
        except asyncpg.InterfaceError as error:
            if isinstance(error, ValueError):  # a wrong argument, not a lost connection
                raise
            raise BusUnavailable(type(error).__name__) from None
        except (OSError, TimeoutError, AttributeError) as error:
            # AttributeError: the pool was closed by stop() between the check and the use.
            if isinstance(error, AttributeError) and self._pool is not None:
                raise
            raise BusUnavailable(type(error).__name__) from None

    async def _open(self) -> None:
        async with self._opening:
            if self._pool is not None:
                return
            pool = await asyncpg.create_pool(
                self._url,
                min_size=0,
                max_size=self._pool_size,
                max_inactive_connection_lifetime=300,
                command_timeout=30,
                timeout=10,
                # No session state is ever set, so the round trip that would clear it is saved.
                reset=_leave_as_it_is,
                server_settings={"application_name": "care-bus"},
            )
            try:
                async with pool.acquire() as connection, connection.transaction():
                    await connection.execute(_SCHEMA)
            except BaseException:
                pool.terminate()
                raise
            self._pool = pool


async def _leave_as_it_is(_: Any) -> None:
    return None


def _pack(headers: tuple[tuple[str, bytes], ...]) -> bytes:
    return orjson.dumps([(name, value.decode("latin-1")) for name, value in headers]) if headers else b"[]"


def _unpack(packed: bytes) -> tuple[tuple[str, bytes], ...]:
    if packed == b"[]":
        return ()
    return tuple((name, value.encode("latin-1")) for name, value in orjson.loads(packed))


class PostgresReader:
    """A member of a group: leases partitions row by row, gives up what is above its fair share, takes what is free."""

    def __init__(self, bus: PostgresBus, group: str, topics: Sequence[str]) -> None:
        self._bus = bus
        self._group = group
        self.topics = sorted(set(topics))
        self._member = uuid.uuid4()
        self._positions: dict[Partition, int] = {}
        self._paused: set[Partition] = set()
        self._leased_at = float("-inf")
        self._leasing = asyncio.Lock()
        self._keeper: asyncio.Task[None] | None = None
        self.bell = asyncio.Event()

    async def start(self) -> None:
        self._bus.bell.readers.add(self)
        self._keeper = asyncio.create_task(self._keep(), name=f"bus lease {self._group}")

    async def stop(self) -> None:
        self._bus.bell.readers.discard(self)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        self._positions.clear()
        with contextlib.suppress(BusUnavailable):  # then the leases simply run out
            async with self._bus.connection() as connection, connection.transaction():
                await connection.execute(
                    "UPDATE group_offset SET owner = NULL, lease_until = NULL WHERE group_name = $1 AND owner = $2",
                    self._group,
                    self._member,
                )
                await connection.execute(
                    "DELETE FROM group_member WHERE group_name = $1 AND member = $2", self._group, self._member
                )

    async def fetch(self, max_records: int, timeout: float) -> dict[Partition, list[Record]]:
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout
        if self._leased_at == float("-inf"):
            await self._balance()
        while True:
            self.bell.clear()
            if found := await self._newer(max_records):
                return found
            left = min(until - loop.time(), self._bus.poll)
            if until - loop.time() <= 0:
                return {}
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.bell.wait(), left)

    async def _newer(self, max_records: int) -> dict[Partition, list[Record]]:
        # A member that stood still past its lease (stopped process, sleeping laptop) asks first who owns what now.
        if asyncio.get_running_loop().time() - self._leased_at > self._bus.lease * 2 / 3:
            await self._balance()
        wanted = {partition: at for partition, at in self._positions.items() if partition not in self._paused}
        if not wanted:
            return {}
        async with self._bus.connection() as connection:
            rows = await connection.fetch(
                _TAKE_NEWER,
                [topic for topic, _ in wanted],
                [number for _, number in wanted],
                list(wanted.values()),
                max_records,
            )
        found: dict[Partition, list[Record]] = defaultdict(list)
        for row in rows:
            partition = (row["topic"], row["partition"])
            # Neither lost (and perhaps had again, from what is committed), nor sought back, nor paused meanwhile.
            if self._positions.get(partition) == wanted[partition] and partition not in self._paused:
                found[partition].append(
                    Record(*partition, row["offset"], row["key"], row["value"], _unpack(row["headers"]), row["ms"])
                )
        for partition, records in found.items():
            self._positions[partition] = records[-1].offset + 1
        return dict(found)

    def assignment(self) -> frozenset[Partition]:
        return frozenset(self._positions)

    async def commit(self, offsets: dict[Partition, int]) -> None:
        if not offsets:
            return
        parts = list(offsets)
        async with self._bus.connection() as connection:
            # Only where this member is still the owner: a zombie must not move back whoever took over.
            await connection.execute(
                "UPDATE group_offset g SET next_offset = o.next_offset"
                " FROM unnest($3::text[], $4::int[], $5::bigint[]) AS o (topic, partition, next_offset)"
                " WHERE g.group_name = $1 AND g.owner = $2 AND g.topic = o.topic AND g.partition = o.partition",
                self._group,
                self._member,
                [topic for topic, _ in parts],
                [number for _, number in parts],
                [offsets[partition] for partition in parts],
            )

    async def pause(self, partitions: Iterable[Partition]) -> None:
        self._paused.update(partitions)

    async def resume(self, partitions: Iterable[Partition]) -> None:
        self._paused.difference_update(partitions)
        self.bell.set()

    async def seek(self, partition: Partition, offset: int) -> None:
        if partition in self._positions:
            self._positions[partition] = offset
            self.bell.set()

    async def lag(self) -> dict[Partition, Lag]:
        async with self._bus.connection() as connection:
            rows = await connection.fetch(_LAG, self._group, self.topics, self._member)
        return {
            (row["topic"], row["partition"]): Lag(row["records"], max(row["seconds"], 0.0), row["end_offset"])
            for row in rows
        }

    async def _keep(self) -> None:
        while True:
            await asyncio.sleep(self._bus.lease / 3)
            # Anything at all is tried again: a keeper that died would silently cost the member its partitions.
            with contextlib.suppress(Exception):
                await self._balance()

    async def _balance(self) -> None:
        async with self._leasing:
            await self._bus.ensure_topics(self.topics)
            asked_at = asyncio.get_running_loop().time()
            async with self._bus.connection() as connection, connection.transaction():
                # One member of a group at a time; three to six short statements every third of a lease.
                await connection.execute("SELECT pg_advisory_xact_lock(7261002, hashtext($1))", self._group)
                await connection.execute(_MEMBER, self._group, self._member, self.topics, self._bus.lease)
                await connection.execute(
                    "DELETE FROM group_member WHERE group_name = $1 AND lease_until < clock_timestamp()", self._group
                )
                await connection.execute(
                    "INSERT INTO group_offset (group_name, topic, partition) SELECT $1, topic, partition"
                    " FROM topic_partition WHERE topic = ANY($2) ON CONFLICT DO NOTHING",
                    self._group,
                    self.topics,
                )
                owned = {
                    (row["topic"], row["partition"]): row["next_offset"]
                    for row in await connection.fetch(
                        "UPDATE group_offset SET lease_until = clock_timestamp() + $3 * interval '1 second'"
                        " WHERE group_name = $1 AND owner = $2 AND topic = ANY($4)"
                        " RETURNING topic, partition, next_offset",
                        self._group,
                        self._member,
                        self._bus.lease,
                        self.topics,
                    )
                }
                owned = await self._share(connection, owned)
            self._leased_at = asked_at
            for partition in [partition for partition in self._positions if partition not in owned]:
                del self._positions[partition]
            for partition, next_offset in owned.items():
                self._positions.setdefault(partition, next_offset)
            self.bell.set()

    async def _share(self, connection: Any, owned: dict[Partition, int]) -> dict[Partition, int]:
        """Per topic: give up what is above ceil(partitions / members), take up to that from what nobody holds."""
        counts = await connection.fetch(
            "SELECT t.name, t.partitions, (SELECT count(*) FROM group_member m"
            " WHERE m.group_name = $1 AND t.name = ANY(m.topics)) AS members FROM topic t WHERE t.name = ANY($2)",
            self._group,
            self.topics,
        )
        kept = dict(owned)
        for row in counts:
            topic, fair = row["name"], -(-row["partitions"] // max(row["members"], 1))
            mine = sorted(number for name, number in owned if name == topic)
            if surplus := mine[fair:]:
                await connection.execute(
                    "UPDATE group_offset SET owner = NULL, lease_until = NULL"
                    " WHERE group_name = $1 AND topic = $2 AND partition = ANY($3)",
                    self._group,
                    topic,
                    surplus,
                )
                for number in surplus:
                    del kept[topic, number]
            elif len(mine) < fair:
                taken = await connection.fetch(
                    "UPDATE group_offset SET owner = $3, lease_until = clock_timestamp() + $4 * interval '1 second'"
                    " WHERE group_name = $1 AND topic = $2 AND partition IN (SELECT partition FROM group_offset"
                    " WHERE group_name = $1 AND topic = $2 AND (owner IS NULL OR lease_until < clock_timestamp())"
                    " ORDER BY partition LIMIT $5 FOR UPDATE)"
                    " RETURNING partition, next_offset",
                    self._group,
                    topic,
                    self._member,
                    self._bus.lease,
                    fair - len(mine),
                )
                for each in taken:
                    kept[topic, each["partition"]] = each["next_offset"]
        return kept


class PostgresTail(PostgresReader):
    """Reads all partitions from their ends, in no group: the same look for newer records, without leases."""

    async def start(self) -> None:
        await self._bus.ensure_topics(self.topics)
        async with self._bus.connection() as connection:
            ends = await connection.fetch(
                "SELECT topic, partition, next_offset FROM topic_partition WHERE topic = ANY($1)", self.topics
            )
        self._positions = {(row["topic"], row["partition"]): row["next_offset"] for row in ends}
        self._leased_at = float("inf")
        self._bus.bell.readers.add(self)

    async def stop(self) -> None:
        self._bus.bell.readers.discard(self)
        self._positions.clear()

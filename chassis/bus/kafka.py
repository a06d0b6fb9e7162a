"""The real bus: Apache Kafka through aiokafka, idempotent producer, consumer groups, offsets committed by hand."""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import (
    CommitFailedError,
    ConsumerStoppedError,
    IllegalStateError,
    InvalidTopicError,
    KafkaError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    RecordTooLargeError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    for_code,
)
from aiokafka.protocol.produce import ProduceRequest

from chassis.bus import (
    HELD_BACK,
    INVALID,
    MAX_MESSAGE_BYTES,
    PARTITIONS,
    TOO_LARGE,
    UNAUTHORIZED,
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

_REFUSALS: tuple[tuple[tuple[type[Exception], ...], AppendRefused], ...] = (
    ((MessageSizeTooLargeError, RecordTooLargeError, RecordListTooLargeError), TOO_LARGE),
    ((TopicAuthorizationFailedError,), UNAUTHORIZED),
    ((InvalidTopicError,), INVALID),
)


def _refusal(error: BaseException) -> AppendRefused | None:
    return next((refused for kinds, refused in _REFUSALS if isinstance(error, kinds)), None)


def _pick(key: bytes, partitions: Sequence[int], available: Sequence[int]) -> int:
    return partitions[partition_of(key, len(partitions))]


class KafkaBus:
    """The bus on `bootstrap` (`host:port,…`).

    `security` goes to every client as it is: `security_protocol`, `ssl_context`, `sasl_mechanism`,
    `sasl_plain_username`, `sasl_plain_password`, `sasl_oauth_token_provider`. `delivery` bounds in seconds how long one
    append may take before the producer is given up and built anew; `session` when a silent member loses its
    partitions; `stall` how long records may wait unread before the consumer is built anew. `trim` and the embedded
    bus's leases have no counterpart here: the broker does both.
    """

    def __init__(
        self,
        bootstrap: str,
        *,
        client_id: str = "care",
        security: Mapping[str, Any] | None = None,
        replication_factor: int = 1,
        topic_configs: Mapping[str, str] | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        delivery: float = 30.0,
        session: float = 10.0,
        stall: float = 30.0,
    ) -> None:
        self._limit = max_message_bytes
        self._delivery = delivery
        self._replication_factor = replication_factor
        self._topic_configs = dict(topic_configs or {})
        self.session = session
        self.stall = stall
        # The defaults let a client sit still for 23 s after a broker came back; these calm down within two.
        self.client: dict[str, Any] = {
            "bootstrap_servers": bootstrap,
            "client_id": client_id,
            "retry_backoff_ms": 100,
            "metadata_max_age_ms": 10_000,
            "request_timeout_ms": 10_000,
            **(security or {}),
        }
        self._producer: Any = None
        self._building = asyncio.Lock()
        self._known: set[str] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._may_leave: dict[str, MayLeave] = {}

    async def start(self) -> None:
        # aiokafka logs a line per failed try and, at DEBUG, keys and values: neither may reach a log. What matters is
        # told by BusUnavailable and the metrics.
        logging.getLogger("aiokafka").setLevel(logging.CRITICAL)

    async def stop(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            await _close_producer(producer)
        await asyncio.gather(*self._closing, return_exceptions=True)

    async def trim(self, older_than_seconds: float, at_most: int = 100_000) -> int:
        """The broker deletes by `retention.ms` of the topic."""
        return 0

    async def ensure_topics(self, topics: Iterable[str], partitions: int = PARTITIONS) -> None:
        wanted = {topic for topic in topics if topic not in self._known}
        if not wanted:
            return
        admin = AIOKafkaAdminClient(**self.client)
        try:
            await admin.start()
            # Look before making: in production the account may well read and write topics but not create them.
            missing = sorted(wanted - set(await admin.list_topics()))
            if missing:
                made = await admin.create_topics(
                    [
                        NewTopic(name, partitions, self._replication_factor, topic_configs=self._topic_configs)
                        for name in missing
                    ]
                )
                for _, code, *_ in made.topic_errors:
                    refusal = for_code(code)
                    if code and refusal is not TopicAlreadyExistsError:
                        raise refusal()
        except (KafkaError, OSError, TimeoutError) as error:
            raise BusUnavailable(type(error).__name__) from None
        finally:
            with contextlib.suppress(Exception):
                await admin.close()
        self._known |= wanted

    async def append(
        self, topic: str, messages: Sequence[Message], may_leave: MayLeave | None = None
    ) -> list[AppendRefused | None]:
        if may_leave is not None:
            self._may_leave[topic] = may_leave
        verdicts = refuse_in_order(messages, self._limit)
        sent = [place for place, verdict in enumerate(verdicts) if verdict is None]
        if not sent:
            return verdicts
        try:
            async with asyncio.timeout(self._delivery):
                await self.ensure_topics([topic])
                outcomes = await self._send(topic, [messages[place] for place in sent])
        except (KafkaError, OSError, TimeoutError) as error:
            # With idempotence aiokafka retries a batch for ever; a producer that is given up must not go on in secret.
            self._drop_producer()
            raise BusUnavailable(type(error).__name__) from None
        except asyncio.CancelledError:
            self._drop_producer()
            raise
        failed = [place for place, outcome in zip(sent, outcomes, strict=True) if outcome is not None]
        errors = [outcome for outcome in outcomes if outcome is not None]
        if not failed:
            return verdicts
        self._drop_producer()  # its sequence numbers have a gap now
        for failure in errors:
            if _refusal(failure) is None:
                raise BusUnavailable(type(failure).__name__) from None
        # The broker refuses whole batches: one by one, the guilty message is found and its neighbours get through.
        refused: set[str] = set()
        for place in failed:
            verdicts[place] = await self._send_alone(topic, messages[place], refused)
        return verdicts

    async def _send_alone(self, topic: str, message: Message, refused: set[str]) -> AppendRefused | None:
        if message.key in refused:
            return HELD_BACK
        try:
            async with asyncio.timeout(self._delivery):
                (error,) = await self._send(topic, [message])
        except (KafkaError, OSError, TimeoutError) as trouble:
            self._drop_producer()
            raise BusUnavailable(type(trouble).__name__) from None
        if error is None:
            return None
        self._drop_producer()
        if (refusal := _refusal(error)) is None:
            raise BusUnavailable(type(error).__name__)
        refused.add(message.key)
        return refusal

    async def _send(self, topic: str, messages: Sequence[Message]) -> list[BaseException | None]:
        """One outcome a message; raises what says that the producer itself is of no use."""
        producer = await self._producing()
        sending: list[asyncio.Future[Any]] = []
        try:
            for message in messages:
                sending.append(
                    await producer.send(topic, message.value, key=message.key.encode(), headers=list(message.headers))
                )
        except KafkaError as error:
            if sending or _refusal(error) is None:
                raise
            return [error] * len(messages)
        finally:
            for future in sending:
                future.add_done_callback(_look_at)
        if sending:
            await asyncio.wait(sending)
        return [_error_of(future) for future in sending]

    async def _producing(self) -> Any:
        if self._producer is None:
            async with self._building:
                if self._producer is None:
                    producer = AIOKafkaProducer(
                        **self.client,
                        enable_idempotence=True,
                        acks="all",
                        linger_ms=0,
                        max_batch_size=131_072,
                        max_request_size=max(self._limit + 65_536, 1_000_000),
                        partitioner=_pick,
                    )
                    try:
                        await producer.start()
                    except BaseException:
                        await _close_producer(producer)
                        raise
                    self._guard(producer.client)
                    self._producer = producer
        return self._producer

    def _guard(self, client: Any) -> None:
        """Ask `may_leave` right before the bytes go: a batch waits in the producer for the one before it, for a connection,
        or because the whole process was stopped."""
        send = client.send

        async def guarded(node_id: Any, request: Any, **options: Any) -> Any:
            # Once it is connected, nothing is awaited any more between the question and the socket.
            if isinstance(request, ProduceRequest) and await client.ready(node_id):
                for topic, _ in request._topics:
                    if not self._may_leave.get(topic, _always)():
                        raise KeptBack
            return await send(node_id, request, **options)

        client.send = guarded

    def _drop_producer(self) -> None:
        producer, self._producer = self._producer, None
        if producer is not None:
            self.later(_close_producer(producer))

    def later(self, closing: Any) -> None:
        task = asyncio.get_running_loop().create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def reader(self, group: str, topics: Sequence[str]) -> "KafkaReader":
        return KafkaReader(self, group, topics)

    def tail(self, topics: Sequence[str]) -> "KafkaTail":
        return KafkaTail(self, "", topics)


class KeptBack(KafkaError):  # type: ignore[misc]
    """What was to be sent may no longer be; not to be tried again by the producer itself."""

    retriable = False


def _always() -> bool:
    return True


def _look_at(future: "asyncio.Future[Any]") -> None:
    if not future.cancelled():
        future.exception()  # else asyncio would print it, with whatever it carries


def _error_of(future: "asyncio.Future[Any]") -> BaseException | None:
    return KafkaError() if future.cancelled() else future.exception()


async def _close_producer(producer: Any) -> None:
    # stop() waits for the buffer to drain, which never happens while the broker is away: end the sender first.
    sender = getattr(producer, "_sender", None)
    task = getattr(sender, "sender_task", None)
    if task is not None:
        task.cancel()
    with contextlib.suppress(Exception):
        await asyncio.wait_for(producer.stop(), 5)


class _Assignment(ConsumerRebalanceListener):  # type: ignore[misc]
    """Carries pauses over a rebalance or a new consumer, where aiokafka forgets them."""

    def __init__(self, reader: "KafkaReader", consumer: Any) -> None:
        self._reader = reader
        self._consumer = consumer

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        return None

    async def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        self._reader.assigned_anew(self._consumer, list(assigned))


class KafkaReader:
    """A member of a Kafka group that builds its consumer anew when it fails or stalls."""

    def __init__(self, bus: KafkaBus, group: str, topics: Sequence[str]) -> None:
        self._bus = bus
        self._group = group
        self.topics = sorted(set(topics))
        self._consumer: Any = None
        self._paused: set[Partition] = set()
        # Places and times of records that were handed out and not committed yet: the age of the oldest is the lag.
        self._unread: dict[Partition, deque[tuple[int, int]]] = {}
        self._behind_since: dict[Partition, float] = {}
        self._committed: dict[Partition, int] = {}
        self._moved_at = time.monotonic()
        self._looked_at = time.monotonic()
        self._stopped = False

    async def start(self) -> None:
        self._stopped = False

    async def stop(self) -> None:
        self._stopped = True
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await _close_consumer(consumer)

    async def fetch(self, max_records: int, timeout: float) -> dict[Partition, list[Record]]:
        consumer = None
        try:
            consumer = await self._consuming()
            try:
                # A rebalance makes getmany wait without regard to its own limit.
                async with asyncio.timeout(timeout + 1):
                    batches = await consumer.getmany(timeout_ms=int(timeout * 1000), max_records=max_records)
            except TimeoutError:
                batches = {}
            if batches:
                self._moved_at = time.monotonic()
            else:
                await self._watch(consumer)
        except (KafkaError, ConsumerStoppedError, OSError, TimeoutError) as error:
            self._drop_consumer(consumer)
            raise BusUnavailable(type(error).__name__) from None
        except Exception as error:
            raise self._broken(consumer, error) from error
        found: dict[Partition, list[Record]] = {}
        for place, records in batches.items():
            partition = (place.topic, place.partition)
            found[partition] = [
                Record(
                    place.topic,
                    place.partition,
                    record.offset,
                    (record.key or b"").decode(errors="replace"),
                    record.value,
                    tuple(record.headers),
                    record.timestamp,
                )
                for record in records
            ]
            self._unread.setdefault(partition, deque()).extend((r.offset, r.timestamp) for r in records)
        return found

    async def _watch(self, consumer: Any) -> None:
        """aiokafka can stand still for good (after an offset out of range, or a lost fetch): notice and start over."""
        now = time.monotonic()
        if now - max(self._moved_at, self._looked_at) < self._bus.stall / 3:
            return
        self._looked_at = now
        places = [p for p in consumer.assignment() if (p.topic, p.partition) not in self._paused]
        if not places:
            return
        ends = await asyncio.wait_for(consumer.end_offsets(places), 10)
        behind = False
        for place in places:
            position = await asyncio.wait_for(consumer.position(place), 10)
            behind = behind or ends[place] > position
        if not behind:
            self._moved_at = now
        elif now - self._moved_at > self._bus.stall:
            self._moved_at = now
            raise KafkaError("stalled")

    def assignment(self) -> frozenset[Partition]:
        if self._consumer is None:
            return frozenset()
        return frozenset((place.topic, place.partition) for place in self._consumer.assignment())

    async def commit(self, offsets: dict[Partition, int]) -> None:
        consumer = self._consumer
        if consumer is None or not offsets:
            return
        assigned = consumer.assignment()
        ours = {TopicPartition(*p): offset for p, offset in offsets.items() if TopicPartition(*p) in assigned}
        if not ours:
            return
        try:
            async with asyncio.timeout(10):
                await consumer.commit(ours)
        except (CommitFailedError, IllegalStateError):
            return  # rebalanced meanwhile: the new owner reads it again, and the inbox knows what is done
        except (KafkaError, OSError, TimeoutError) as error:
            raise BusUnavailable(type(error).__name__) from None
        except Exception as error:
            raise self._broken(consumer, error) from error
        for place, offset in ours.items():
            self._committed[place.topic, place.partition] = offset
            unread = self._unread.get((place.topic, place.partition), deque())
            while unread and unread[0][0] < offset:
                unread.popleft()

    async def pause(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self._paused.add(partition)
            with contextlib.suppress(IllegalStateError):
                if self._consumer is not None:
                    self._consumer.pause(TopicPartition(*partition))

    async def resume(self, partitions: Iterable[Partition]) -> None:
        for partition in partitions:
            self._paused.discard(partition)
            with contextlib.suppress(IllegalStateError):
                if self._consumer is not None:
                    self._consumer.resume(TopicPartition(*partition))

    async def seek(self, partition: Partition, offset: int) -> None:
        with contextlib.suppress(IllegalStateError):
            if self._consumer is not None:
                self._consumer.seek(TopicPartition(*partition), offset)
                self._unread.pop(partition, None)

    async def lag(self) -> dict[Partition, Lag]:
        consumer = self._consumer
        if consumer is None or not (places := list(consumer.assignment())):
            return {}
        try:
            async with asyncio.timeout(15):
                ends = await consumer.end_offsets(places)
                unknown = [place for place in places if (place.topic, place.partition) not in self._committed]
                begins = await consumer.beginning_offsets(places)
                for place in unknown:
                    self._committed[place.topic, place.partition] = await consumer.committed(place) or 0
        except (KafkaError, ConsumerStoppedError, OSError, TimeoutError) as error:
            raise BusUnavailable(type(error).__name__) from None
        except Exception as error:
            raise self._broken(consumer, error) from error
        lags: dict[Partition, Lag] = {}
        now = time.time()
        for place in places:
            partition = (place.topic, place.partition)
            records = max(ends[place] - max(self._committed.get(partition, 0), begins[place]), 0)
            if not records:
                self._behind_since.pop(partition, None)
            since = self._behind_since.setdefault(partition, now) if records else now
            unread = self._unread.get(partition)
            if records and unread:
                since = min(since, unread[0][1] / 1000)
            lags[partition] = Lag(records, max(now - since, 0.0), ends[place])
        return lags

    def assigned_anew(self, consumer: Any, places: list[TopicPartition]) -> None:
        mine = {(place.topic, place.partition) for place in places}
        for partition in [partition for partition in self._unread if partition not in mine]:
            del self._unread[partition]
        # Another member may have committed since: what was known of offsets is asked again.
        self._committed.clear()
        for partition in self._paused & mine:
            with contextlib.suppress(IllegalStateError):
                consumer.pause(TopicPartition(*partition))
        self._moved_at = time.monotonic()

    async def _consuming(self) -> Any:
        if self._consumer is None:
            if self._stopped:
                raise ConsumerStoppedError
            await self._bus.ensure_topics(self.topics)
            consumer = AIOKafkaConsumer(
                **self._bus.client,
                group_id=self._group or None,
                enable_auto_commit=False,
                auto_offset_reset="earliest" if self._group else "latest",
                session_timeout_ms=int(self._bus.session * 1000),
                heartbeat_interval_ms=int(self._bus.session * 1000 / 5),
                # A partition that was resumed joins the next fetch only: the long poll bounds how long that takes. An
                # idle one of 100 ms cost each service 3 % of a core.
                fetch_max_wait_ms=500,
                # What was fetched ahead is thrown away when its partition is paused: about one queue of ours at a time.
                max_partition_fetch_bytes=131_072,
            )
            try:
                async with asyncio.timeout(30):
                    await self._begin(consumer)
            except BaseException:
                await _close_consumer(consumer)
                raise
            self._unread.clear()
            self._moved_at = time.monotonic()
            self._consumer = consumer
        return self._consumer

    async def _begin(self, consumer: Any) -> None:
        consumer.subscribe(self.topics, listener=_Assignment(self, consumer))
        await consumer.start()

    def _broken(self, consumer: Any, error: Exception) -> BusUnavailable:
        """What aiokafka doesn't expect, it doesn't mend: uvloop says by a bare RuntimeError that a dead broker's connection is
        closed, aiokafka takes it for open, and the consumer fails at every call from then on. So it is built anew.
        """
        self._drop_consumer(consumer)
        return BusUnavailable(type(error).__name__)

    def _drop_consumer(self, consumer: Any) -> None:
        if consumer is not None and consumer is self._consumer:  # else it was built anew meanwhile
            self._consumer = None
            self._bus.later(_close_consumer(consumer))


class KafkaTail(KafkaReader):
    """Reads all partitions from their ends, in no group. Its consumer is not built anew: its place would be lost in secret."""

    async def start(self) -> None:
        await super().start()
        try:
            await self._consuming()
        except (KafkaError, OSError, TimeoutError) as error:
            raise BusUnavailable(type(error).__name__) from None
        self._stopped = True

    async def fetch(self, max_records: int, timeout: float) -> dict[Partition, list[Record]]:
        found = await super().fetch(max_records, timeout)
        self._unread.clear()  # nothing is ever committed
        return found

    async def _begin(self, consumer: Any) -> None:
        consumer.subscribe(self.topics)
        await consumer.start()
        for place, end in (await consumer.end_offsets(list(consumer.assignment()))).items():
            consumer.seek(place, end)


async def _close_consumer(consumer: Any) -> None:
    with contextlib.suppress(Exception):
        await asyncio.wait_for(consumer.stop(), 5)

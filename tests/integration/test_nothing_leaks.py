"""What a patient's record holds is in no log, span, metric, event, key, URL or error."""

import asyncio
import base64
import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import grpc
import httpx2
import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from care.scheduling.v1.waitlist_pb2 import IssueWaitlistOfferLinkRequest
from care.scheduling.v1.waitlist_pb2_grpc import WaitlistServiceStub
from google.protobuf.descriptor import Descriptor, FieldDescriptor

from chassis.auth import Credential
from chassis.bus import PARTITIONS
from chassis.testing.otlp import OtlpReceiver
from gateway.contract import rpcs
from system.issuer import TENANT_ID
from system.run import System
from tests.integration.world import User, World, until

pytestmark = [pytest.mark.integration, pytest.mark.postgres, pytest.mark.kafka]

PLANTED = {
    "family": "Qzwixbury",
    "given": "Yvthmira",
    "maiden": "Ploxhagen",
    "prefix": "Rvzdr",
    "street": "7713 Grvolt Alley",
    "city": "Wexqumton",
    "district": "Hjarnshire",
    "postal": "QX9 7ZK",
    "birth": "1913-11-29",
    "phone": "2025550143",
    "email": "yvthmira.q@zzmail-planted.example",
    "mrn": "MRN-88-QZW-4471",
    "ssn": "987-65-4320",
    "consent": "evidence-planted-vkrx",
    "contact note": "spoke of planted wjqvz",
    "referral note": "reason planted kqxhm",
    "task note": "task planted jxvoq",
    "comment": "comment planted zzgrw",
    "glass": "reason planted dqmvx",
    "related family": "Kvorfelm",
    "related given": "Ossqwin",
    "related phone": "2025550191",
    "opened": "opened planted bvxqj",
    "query": "valueplantedqxz",
    "emoji": "planted🦩qvj",
    "null": "planted\u0000nulqv",
    "wrong enum": "PLANTED_ENUM_QVX",
    "path": "plantedpathqvzx",
    "bearer": "plantedbearerqvzx",
    "link": "s-plantedlinkqvzxw",
    "waitlist link": "w-plantedwaitqvzxwkj",
    "calendar link": "c-plantedcalendarqvzxw",
    "request note": "request planted qhzvb",
    "attempt note": "attempt planted wkqpz",
}


class Watcher:
    """Keeps every error that was answered."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    async def heard_from(self, answer: httpx2.Response) -> None:
        if answer.status_code >= 400:
            await answer.aread()
            self.heard.append(answer.text)
            self.heard.append(json.dumps(dict(answer.headers)))


@pytest.fixture(scope="module")
async def world(systems: Any) -> Any:
    world = World(await systems(kafka=True))
    yield world
    await world.close()


async def test_no_value_of_a_patient_comes_out(world: World, otlp: OtlpReceiver) -> None:
    watcher = Watcher()
    coordinator = world.user("coordinator")
    coordinator.http.event_hooks["response"] = [watcher.heard_from]
    try:
        await lived_through(world, coordinator)
        # Links that were really made, and work: whoever reads one of them in a log has what it opens.
        links = await scheduled(world, coordinator)
        await asked_everything(world, watcher)
    finally:
        coordinator.http.event_hooks["response"] = []
    await asyncio.sleep(3)  # spans and events are on their way
    everything = {"errors": "\n".join(watcher.heard).encode(), "spans": b"\n".join(otlp.raw)}
    everything |= logs(world.system)
    everything |= await metrics(world.system)
    everything |= await events(world.system)
    assert len(watcher.heard) > 50 and len(everything["spans"]) > 10_000, "nothing came out to be searched"
    assert all(everything[f"topic care.{name}"] for name in ("patients", "scheduling", "referrals"))
    found = [
        f"{what} in {where}"
        for where, text in everything.items()
        for what, value in {**PLANTED, **links}.items()
        if any(form in text for form in forms(value))
    ]
    assert not found, found


def forms(value: str) -> set[bytes]:
    """A value as it may stand in a log: plain, escaped, in a URL, in base64."""
    raw = value.replace("\u0000", "").encode()
    encoded = base64.b64encode(raw)
    return {
        raw,
        quote(value).encode(),
        json.dumps(value).strip('"').encode(),
        # The inner part: the ends depend on what stands beside it.
        encoded[4:-4] if len(encoded) > 16 else raw,
    }


async def lived_through(world: World, user: User) -> None:
    """A record with every planted value, and what is done with it, right and wrong."""
    me = await user.get("/v1/self")
    clinic = me["clinicIds"][0]
    patient = {
        "names": [
            {
                "use": "OFFICIAL",
                "familyName": PLANTED["family"],
                "givenNames": [PLANTED["given"], PLANTED["emoji"]],
                "prefixes": [PLANTED["prefix"]],
            },
            {"use": "MAIDEN", "familyName": PLANTED["maiden"]},
        ],
        "birthDate": PLANTED["birth"],
        "telecom": [
            {"system": "PHONE", "value": PLANTED["phone"], "use": "MOBILE", "lineType": "MOBILE"},
            {"system": "EMAIL", "value": PLANTED["email"]},
        ],
        "addresses": [
            {
                "lines": [PLANTED["street"]],
                "city": PLANTED["city"],
                "district": PLANTED["district"],
                "postalCode": PLANTED["postal"],
            }
        ],
        "identifiers": [
            {"system": "urn:planted:mrn", "value": PLANTED["mrn"], "type": "MR"},
            {"system": "urn:planted:ssn", "value": PLANTED["ssn"], "type": "SS"},
        ],
    }
    made = await user.post(f"/v1/patients?clinicId={clinic}", patient)
    twice = await user.request("POST", f"/v1/patients?clinicId={clinic}&confirmNew=true", patient)
    assert twice.status_code == 409  # the identifiers are taken
    assert (await user.request("POST", f"/v1/patients?clinicId={clinic}", patient)).status_code == 409
    nul = {"names": [{"familyName": PLANTED["null"]}]}
    assert (await user.request("POST", f"/v1/patients?clinicId={clinic}", nul)).status_code == 400
    path = f"/v1/patients/{made['id']}"
    for channel, value in (("SMS", PLANTED["phone"]), ("EMAIL", PLANTED["email"])):
        await user.post(
            "/v1/consents",
            {
                "patientId": made["id"],
                "contactValue": value,
                "channel": channel,
                "purpose": "care",
                "basis": "EXPRESS",
                "textVersion": "1",
                "evidence": PLANTED["consent"],
            },
        )
    await user.post(
        "/v1/contacts",
        {
            "patientId": made["id"],
            "channel": "VOICE",
            "direction": "INBOUND",
            "outcome": "REACHED",
            "note": PLANTED["contact note"],
        },
    )
    referral = await user.post(
        "/v1/referrals",
        {
            "patientId": made["id"],
            "clinicId": clinic,
            "specialty": {"code": "394579002"},
            "note": PLANTED["referral note"],
        },
    )
    await user.post(f"/v1/referrals/{referral['id']}:submit")
    await user.post(
        "/v1/tasks",
        {
            "code": "call-patient",
            "patientId": made["id"],
            "dueTime": "2030-01-01T00:00:00Z",
            "note": PLANTED["task note"],
        },
    )
    await user.post(
        "/v1/relatedPersons",
        {
            "patientId": made["id"],
            "name": {"familyName": PLANTED["related family"], "givenNames": [PLANTED["related given"]]},
            "telecom": [{"system": "PHONE", "value": PLANTED["related phone"]}],
        },
    )
    visit_types = (await user.get("/v1/visitTypes", pageSize=100))["visitTypes"]
    slots: list[Any] = []
    for visit_type in visit_types:
        found = await user.post(
            "/v1/availability:search", {"visitTypeId": visit_type["id"], "clinicIds": [clinic], "pageSize": 5}
        )
        slots = found.get("slots", [])
        if slots:
            break
    visit = await user.post(
        "/v1/appointments",
        {"patientId": made["id"], "offerToken": slots[0]["offerToken"], "comment": PLANTED["comment"]},
    )
    await until(
        lambda: user.get("/v1/messages", patientIds=made["id"]),
        lambda answer: [one for one in answer.get("messages", []) if one["status"] == "COMPLETED"],
    )
    await user.post(f"/v1/appointments/{visit['id']}:cancel", {"reason": {"code": "pat"}})
    await user.post("/v1/patients:search", {"familyName": PLANTED["family"], "birthDate": PLANTED["birth"]})
    await user.post(f"{path}:breakGlass", {"reason": PLANTED["glass"]})
    await user.post(f"{path}:open", {"clinicId": clinic, "reason": PLANTED["opened"]})
    for wrong in (
        {"gender": PLANTED["wrong enum"]},
        {"birthDate": PLANTED["family"]},
        {"names": PLANTED["family"]},
        {"unknownField": PLANTED["query"]},
        {"languages": [PLANTED["emoji"]]},
    ):
        answer = await user.request("PATCH", path, wrong, if_match=made["etag"])
        assert answer.status_code == 400, (wrong, answer.text)
    for address in (
        f"/v1/patients?unknownField={PLANTED['query']}",
        f"/v1/{PLANTED['path']}/{PLANTED['family']}",
        f"/v1/patients/{PLANTED['family']}",
        f"/p/{PLANTED['link']}",
        f"/p/{PLANTED['waitlist link']}",
        f"/calendars/{PLANTED['calendar link']}.ics",
    ):
        assert (await user.http.get(address)).status_code in (400, 404), address
    broken = await user.http.post("/v1/contacts", content='{"note": "' + PLANTED["contact note"] + '", ')
    assert broken.status_code in (400, 415)
    stranger = await user.http.get(path, headers={"authorization": f"Bearer {PLANTED['bearer']}"})
    assert stranger.status_code == 401


async def scheduled(world: World, user: User) -> dict[str, str]:
    """A request with notes, an offer of the waitlist and a calendar feed, each with its link; answers the links' tokens."""
    clinic = (await user.get("/v1/self"))["clinicIds"][0]
    named = {"names": [{"familyName": PLANTED["family"]}], "birthDate": PLANTED["birth"]}
    waits, books = [(await user.post(f"/v1/patients?clinicId={clinic}&confirmNew=true", named))["id"] for _ in range(2)]
    request = await user.post(
        "/v1/schedulingRequests", {"patientId": waits, "clinicId": clinic, "note": PLANTED["request note"]}
    )
    await user.post(
        f"/v1/schedulingRequests/{request['id']}:recordAttempt",
        {"outcome": "VOICEMAIL", "note": PLANTED["attempt note"]},
    )
    later = (datetime.now(UTC) + timedelta(days=4)).isoformat()
    for visit_type in (await user.get("/v1/visitTypes", pageSize=100))["visitTypes"]:
        search = {"visitTypeId": visit_type["id"], "clinicIds": [clinic], "startTime": later, "patientId": books}
        if slots := (await user.post("/v1/availability:search", search)).get("slots", []):
            break
    visit = await user.post("/v1/appointments", {"patientId": books, "offerToken": slots[0]["offerToken"]})
    wish = {"priority": "STAT", "practitionerIds": [visit["practitionerId"]], "clinicIds": [clinic]}
    entry = await user.post(
        "/v1/waitlistEntries", {"patientId": waits, "visitTypeId": visit_type["id"], "waitlistEntry": wish}
    )
    await user.post(f"/v1/appointments/{visit['id']}:cancel", {"reason": {"code": "pat"}})
    offered = await until(
        lambda: user.get(f"/v1/waitlistEntries/{entry['id']}"), lambda answer: answer["status"] == "OFFERED"
    )
    plan = world.system.plan
    async with grpc.aio.insecure_channel(plan.instances["scheduling"].address) as channel:
        # As notifications asks for it when the message leaves; by night none does.
        credential = Credential("notifications", plan.keys.service_key_file("notifications"))
        asked = IssueWaitlistOfferLinkRequest(tenant_id=TENANT_ID, offer_id=offered["offerId"])
        metadata = (("authorization", f"Bearer {credential.token()}"), ("care-tenant", TENANT_ID))
        link = await WaitlistServiceStub(channel).IssueWaitlistOfferLink(asked, metadata=metadata)
    feed = await user.post("/v1/calendarFeeds", {"patientId": waits, "includeDetails": True})
    for answer in (
        await user.http.get(f"/p/{link.token}"),
        await user.http.get(f"/calendars/{feed['token']}.ics"),
    ):
        assert answer.status_code == 200, answer.text
    await user.post(f"/v1/calendarFeeds/{feed['calendarFeed']['id']}:revoke")
    assert (await user.http.get(f"/calendars/{feed['token']}.ics")).status_code == 404
    await user.post(f"/v1/waitlistEntries/{entry['id']}:withdraw")
    await user.http.get(f"/p/{link.token}")
    return {"a waitlist link": link.token, "a calendar link": feed["token"]}


async def asked_everything(world: World, watcher: Watcher) -> None:
    """Every public RPC, as an administrator and as a coordinator, with planted text in each field that takes text."""
    for role in ("admin", "coordinator", "integration_client"):
        user = world.user(role)
        hooks = user.http.event_hooks
        user.http.event_hooks = {**hooks, "response": [watcher.heard_from]}
        try:
            for rpc in rpcs():
                verb = rpc.http.WhichOneof("pattern")
                if verb is None:
                    continue
                address = re.sub(r"\{[^}]*\}", _NOBODY, getattr(rpc.http, verb))
                if verb == "get":
                    answer = await user.http.get(address)
                else:
                    body = pick(rpc.method.input_type, rpc.http.body)
                    named = {"if-match": '"1"'} if verb == "patch" else {}
                    answer = await user.http.request(verb.upper(), address, json=body, headers=named)
                # 503 only says that this machine is slow.
                assert answer.status_code < 500 or answer.status_code == 503, (rpc.name, answer.status_code)
        finally:
            user.http.event_hooks = hooks


_NOBODY = "0190a000-0000-7000-8000-000000000000"


def pick(message: Descriptor, field: str) -> dict[str, Any]:
    """The HTTP body of a request: the whole of it without what the path and headers bring, or one field."""
    if field != "*":
        return without(filled(message.fields_by_name[field].message_type), "id", "etag")
    return without(filled(message), "id", "etag", "requestId")


def without(body: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in body.items() if name not in names}


def filled(message: Descriptor, depth: int = 0) -> dict[str, Any]:
    """JSON of a message with planted text in all its strings."""
    values: dict[str, Any] = {}
    for number, field in enumerate(message.fields):
        value = filled_value(field, depth, number)
        if value is not None:
            values[field.json_name] = [value] if field.is_repeated and not _is_map(field) else value
    return values


def _is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and field.message_type.GetOptions().map_entry


def filled_value(field: FieldDescriptor, depth: int, number: int) -> Any:
    texts = list(PLANTED.values())
    if _is_map(field):
        return {"en": texts[number % len(texts)]}
    if field.message_type is not None:
        if field.message_type.full_name == "google.protobuf.Timestamp":
            return "2030-01-01T00:00:00Z"
        if field.message_type.full_name.startswith("google.") or depth > 3:
            return None
        return filled(field.message_type, depth + 1)
    if field.enum_type is not None:
        return field.enum_type.values[-1].name
    if field.type == FieldDescriptor.TYPE_STRING:
        if field.name == "id" or field.name.endswith("_id") or field.name.endswith("_ids"):
            return _NOBODY
        return texts[number % len(texts)].replace("\u0000", "")
    if field.type == FieldDescriptor.TYPE_BOOL:
        return True
    if field.type in (FieldDescriptor.TYPE_DOUBLE, FieldDescriptor.TYPE_FLOAT):
        return 1.5
    return 1


def logs(system: System) -> dict[str, bytes]:
    """Everything that processes, PostgreSQL and Kafka wrote to logs."""
    found = {}
    for file in Path(system.folder).rglob("*.log*"):
        if file.is_file() and "kafka/data" not in str(file):
            found[f"log {file.relative_to(system.folder)}"] = file.read_bytes()
    assert len(found) >= 7, sorted(found)
    return found


async def metrics(system: System) -> dict[str, bytes]:
    found = {}
    async with httpx2.AsyncClient(trust_env=False) as client:
        for name, instance in system.plan.instances.items():
            answer = await client.get(f"http://127.0.0.1:{instance.metrics_port}/metrics")
            assert answer.status_code == 200
            found[f"metrics {name}"] = answer.content
    return found


async def events(system: System) -> dict[str, bytes]:
    """All that lies on the topics: keys, headers, values."""
    assert system.kafka is not None
    consumer = AIOKafkaConsumer(bootstrap_servers=system.kafka.bootstrap, enable_auto_commit=False)
    await consumer.start()
    try:
        topics = [topic for topic in await consumer.topics() if topic.startswith("care.")]
        partitions = [TopicPartition(topic, one) for topic in topics for one in range(PARTITIONS)]
        consumer.assign(partitions)
        await consumer.seek_to_beginning(*partitions)
        ends = await consumer.end_offsets(partitions)
        found: dict[str, list[bytes]] = {f"topic {topic}": [] for topic in topics}
        while any([await consumer.position(one) < end for one, end in ends.items()]):
            for partition, records in (await consumer.getmany(timeout_ms=500)).items():
                for record in records:
                    found[f"topic {partition.topic}"] += [
                        record.key or b"",
                        record.value or b"",
                        *(name.encode() + b"=" + value for name, value in record.headers),
                    ]
        return {name: b"\n".join(parts) for name, parts in found.items()}
    finally:
        await consumer.stop()

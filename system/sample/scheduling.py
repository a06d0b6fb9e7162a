"""What scheduling can do, once each at the sample's first clinic, so that there is something to look at."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Protocol
from zoneinfo import ZoneInfo

from system.importing.client import GatewayClient, Refused
from system.sample import people
from system.sample.people import Json

CLINIC, CLEARED = "riverbend", "mesa-verde"
ZONE = ZoneInfo("America/New_York")
CLASS = "Moving well"


class Loaded(Protocol):
    """What is in already."""

    clinics: dict[str, str]
    people: list[tuple[str, Json]]

    def client(self, role: str) -> GatewayClient: ...

    async def all(self, role: str, path: str, name: str, **filters: list[str]) -> list[Json]: ...


async def extend_directory(loaded: Loaded) -> None:
    """Hours of a room, a device and an interpreter; somebody for classes and walk-ins; a block that is held back."""
    clinic, admin = loaded.clinics[CLINIC], loaded.client("admin")
    kinds = await _kinds(loaded)
    known = {each["name"]: each for each in await loaded.all("admin", "/v1/resources", "resources", clinicIds=[clinic])}
    for resource in people.RESOURCES:
        if resource["name"] not in known:
            await admin.post("/v1/resources", {**resource, "clinicId": clinic})
    staff = {
        each["name"]["familyName"]: each for each in await loaded.all("admin", "/v1/practitioners", "practitioners")
    }
    therapist = staff.get("Aldous") or await admin.post(
        "/v1/practitioners", {**people.THERAPIST, "roles": [{"clinicId": clinic}]}
    )
    schedules = await loaded.all("admin", "/v1/schedules", "schedules", clinicIds=[clinic])
    if not any(each["practitionerId"] == therapist["id"] for each in schedules):
        own = [kinds[code] for code in ("urgent-visit", "movement-class", "physiotherapy")]
        always = [{"weekday": day, "start": "00:00", "end": "00:00", "visitTypeIds": own} for day in range(1, 8)]
        record = {"practitionerId": therapist["id"], "clinicId": clinic, "weeklyHours": always}
        await admin.post("/v1/schedules", record)
    (theirs,) = [each for each in schedules if each["practitionerId"] == staff["Okonjo"]["id"]]
    if not any(block.get("releaseHours") for block in theirs["weeklyHours"]):
        hours = [block for block in theirs["weeklyHours"] if (block["weekday"], block["start"]) not in people.REPLACED]
        await admin.patch(
            f"/v1/schedules/{theirs['id']}",
            {"weeklyHours": hours + people.blocks(kinds["new-patient"])},
            theirs["etag"],
        )


async def show(loaded: Loaded) -> None:
    """A series, a class, a video visit, walk-ins of today, a freed slot, a feed and a cleared day; each that is missing."""
    kinds = await _kinds(loaded)
    own = [patient["id"] for place, patient in loaded.people if place == CLINIC]
    booked = await loaded.all("scheduler", "/v1/appointments", "appointments", patientIds=own)
    have = {(each["patientId"], each["visitTypeId"]) for each in booked}
    shown: list[tuple[str, Callable[[Loaded, dict[str, str], list[str]], Awaitable[None]]]] = [
        ("physiotherapy", _series),
        ("movement-class", _session),
        ("video-check-in", _video),
        ("urgent-visit", _walk_ins),
    ]
    for code, work in shown:
        if not any(kind == kinds[code] for _, kind in have):
            await work(loaded, kinds, own)
    await _freed(loaded, kinds, own, booked)
    await _feed(loaded)
    await _cleared(loaded)


async def _kinds(loaded: Loaded) -> dict[str, str]:
    return {each["code"]: each["id"] for each in await loaded.all("admin", "/v1/visitTypes", "visitTypes")}


async def _offer(loaded: Loaded, kind: str, days: int, **more: object) -> Json:
    """The first free slot some days ahead."""
    begin = (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)
    search = {
        "visitTypeId": kind,
        "clinicIds": [loaded.clinics[CLINIC]],
        "startTime": _stamp(begin),
        "endTime": _stamp(begin + timedelta(days=21)),
        "earliest": "09:00",
        "latest": "17:00",
        "pageSize": 1,
        **more,
    }
    found = await loaded.client("scheduler").post("/v1/availability:search", search)
    slot: Json = found["slots"][0]
    return slot


async def _series(loaded: Loaded, kinds: dict[str, str], own: list[str]) -> None:
    """Four weeks of physiotherapy at the same time by the clinic's clock."""
    slot = await _offer(loaded, kinds["physiotherapy"], 3, weekdays=[1, 2, 3, 4])
    local = datetime.fromisoformat(slot["startTime"]).astimezone(ZONE)
    series = {
        "patientId": own[3],
        "visitTypeId": kinds["physiotherapy"],
        "clinicId": slot["clinicId"],
        "practitionerId": slot["practitionerId"],
        "start": f"{local:%Y-%m-%dT%H:%M}",
        "rule": "FREQ=WEEKLY;COUNT=4",
        "onConflict": "BOOK_WHAT_FITS",
    }
    await loaded.client("scheduler").post("/v1/series", series)


async def _session(loaded: Loaded, kinds: dict[str, str], own: list[str]) -> None:
    """A class of three places, which are taken, and one who waits."""
    client, filters = loaded.client("scheduler"), {"clinicIds": [loaded.clinics[CLINIC]]}
    known = [
        each for each in await loaded.all("scheduler", "/v1/sessions", "sessions", **filters) if each["name"] == CLASS
    ]
    if known:
        session = known[0]
    else:
        slot = await _offer(loaded, kinds["movement-class"], 5)
        place = {name: slot[name] for name in ("visitTypeId", "clinicId", "practitionerId", "startTime")}
        session = await client.post("/v1/sessions", {"name": CLASS, "capacity": 3, "waitlistSize": 3, **place})
    for patient_id in own[5:9]:
        await client.post(f"/v1/sessions/{session['id']}:enroll", {"patientId": patient_id, "joinWaitlist": True})


async def _video(loaded: Loaded, kinds: dict[str, str], own: list[str]) -> None:
    slot = await _offer(loaded, kinds["video-check-in"], 1)
    await loaded.client("scheduler").post(
        "/v1/appointments", {"patientId": own[2], "offerToken": slot["offerToken"], "source": "STAFF"}
    )


async def _walk_ins(loaded: Loaded, kinds: dict[str, str], own: list[str]) -> None:
    """Two who stand at the desk today, one of them checked in; none where the clinic is closed today."""
    client = loaded.client("scheduler")
    walk_in = {"clinicId": loaded.clinics[CLINIC], "visitTypeId": kinds["urgent-visit"], "comment": "Walked in"}
    try:
        first = await client.post("/v1/appointments:walkIn", {**walk_in, "patientId": own[8]})
        await client.post(f"/v1/appointments/{first['id']}:checkIn", {})
        await client.post("/v1/appointments:walkIn", {**walk_in, "patientId": own[9]})
    except Refused as refused:
        if refused.reason not in ("OUTSIDE_HOURS", "SLOT_TAKEN"):
            raise


async def _freed(loaded: Loaded, kinds: dict[str, str], own: list[str], booked: list[Json]) -> None:
    """A physical that is called off: it is offered to who waits for one, by day in the clinic's zone."""
    if any(each["status"] == "CANCELLED" for each in booked):
        return
    client = loaded.client("scheduler")
    slot = await _offer(loaded, kinds["annual-physical"], 3, weekdays=[1, 2, 3, 4], latest="12:00")
    visit = await client.post(
        "/v1/appointments", {"patientId": own[7], "offerToken": slot["offerToken"], "source": "STAFF"}
    )
    await client.post(f"/v1/appointments/{visit['id']}:cancel", {"reason": {"code": "pat-lt"}, "source": "PHONE"})


async def _feed(loaded: Loaded) -> None:
    """A calendar of the clinic's visits; its link is shown to whoever makes one, once."""
    if not await loaded.all("coordinator", "/v1/calendarFeeds", "calendarFeeds"):
        await loaded.client("coordinator").post("/v1/calendarFeeds", {"clinicId": loaded.clinics[CLINIC]})


async def _cleared(loaded: Loaded) -> None:
    """A day with visits on which a practitioner is away: some are moved, some offered another time, some left to people."""
    clinic = loaded.clinics[CLEARED]
    schedules = await loaded.all("manager", "/v1/schedules", "schedules", clinicIds=[clinic])
    if any(each.get("exceptions") for each in schedules):
        return
    visits = await loaded.all("manager", "/v1/appointments", "appointments", clinicIds=[clinic], statuses=["BOOKED"])
    days: dict[tuple[str, str], int] = {}
    soonest = datetime.now(UTC) + timedelta(days=2)
    for each in visits:
        start = datetime.fromisoformat(each["startTime"])
        if start > soonest:
            day = each["practitionerId"], f"{start.astimezone(ZoneInfo(each['timeZone'])):%Y-%m-%d}"
            days[day] = days.get(day, 0) + 1
    (practitioner, date), _ = max(days.items(), key=lambda item: (item[1], item[0]))
    away = {"clinicId": clinic, "date": date, "reason": {"code": "prov-pers", "display": "Away"}}
    await loaded.client("manager").post(f"/v1/practitioners/{practitioner}:clearDay", away)


def _stamp(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")

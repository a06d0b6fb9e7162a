"""A made-up tenant, loaded through the HTTP API: three clinics in three time zones, staff, patients, and scheduling at work."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from system.importing.client import GatewayClient, Refused, Stopped
from system.importing.load import load_clinics
from system.importing.report import Report
from system.issuer import ISSUER, ROLES, staff_subject
from system.process import ServerFailed
from system.sample import people, scheduling
from system.sample.people import Json

_AT_ONCE = 8
T = TypeVar("T")


async def load(url: str, token: Callable[[str], str]) -> bool:
    """Bring the sample in, as far as it isn't there; answers whether anything was to be done. `token` signs in a role.

    Everything has a natural key that is looked up first, so that a load that was killed goes on where it stood. Raises ServerFailed.
    """
    clients = {
        role: GatewayClient(url, token(role))
        for role in ("admin", "integration_client", "coordinator", "scheduler", "manager")
    }
    loading = _Loading(clients)
    try:
        # The questionnaires go in last: when they are there, all is.
        known = {each["name"] for each in await loading.all("admin", "/v1/questionnaires", "questionnaires")}
        missing = [each for each in people.QUESTIONNAIRES if each["name"] not in known]
        if not missing:
            return False
        await loading.directory()
        await scheduling.extend_directory(loading)
        await loading.staff()
        await loading.pools()
        await loading.patients()
        await loading.appointments()
        await loading.waitlist()
        await loading.requests()
        await scheduling.show(loading)
        for each in missing:
            await loading.client("admin").post("/v1/questionnaires", each)
        return True
    except (Refused, Stopped) as error:
        raise ServerFailed(f"the sample did not go in: {error}") from None
    finally:
        await asyncio.gather(*(client.__aexit__(None, None, None) for client in clients.values()))


class _Loading:
    def __init__(self, clients: dict[str, GatewayClient]) -> None:
        self._clients = clients
        self.clinics: dict[str, str] = {}
        self._staff: dict[str, str] = {}
        self.people: list[tuple[str, Json]] = []

    def client(self, role: str) -> GatewayClient:
        return self._clients[role]

    async def all(self, role: str, path: str, name: str, **filters: list[str]) -> list[Json]:
        return await self.client(role).all_of(path, name, filters)

    async def directory(self) -> None:
        """Clinics, rooms, visit types, practitioners and hours, as `care import --clinics` does."""
        report = Report()
        await load_clinics(Path(__file__).parent / "clinics.json", self.client("admin"), report, at_once=_AT_ONCE)
        if report.stopped or report.refused:
            refused = report.refused[0]
            raise ServerFailed(
                f"the sample's clinics did not go in: {report.stopped or f'{refused.kind}: {refused.why}'}"
            )
        for clinic in await self.all("admin", "/v1/clinics", "clinics"):
            for identifier in clinic.get("identifiers", []):
                if identifier["system"] == people.CLINIC_SYSTEM:
                    self.clinics[identifier["value"]] = clinic["id"]

    async def staff(self) -> None:
        self._staff = {
            each["subject"]: each["id"]
            for each in await self.all("admin", "/v1/staff", "staff")
            if each.get("issuer") == ISSUER
        }

        async def one(role: str) -> None:
            subject = staff_subject(role)
            record = people.staff(role, ISSUER, subject, list(self.clinics.values()))
            self._staff[subject] = (await self.client("admin").post("/v1/staff", record))["id"]

        await _each((role for role in ROLES if staff_subject(role) not in self._staff), one)

    async def pools(self) -> None:
        known = {each["name"]: each for each in await self.all("admin", "/v1/pools", "pools")}
        for name, (purpose, roles) in people.POOLS.items():
            members = [self._staff[staff_subject(role)] for role in roles]
            pool = known.get(name)
            if pool is None:
                await self.client("admin").post("/v1/pools", {"name": name, "purpose": purpose, "staffIds": members})
            elif not pool.get("staffIds"):  # the tenant was shipped with it, without members
                await self.client("admin").patch(f"/v1/pools/{pool['id']}", {"staffIds": members}, pool["etag"])

    async def patients(self) -> None:
        async def one(place: tuple[str, Json]) -> None:
            clinic, record = place
            answer = await self.client("integration_client").post(
                "/v1/patients:upsert", {"patient": record, "clinicIds": [self.clinics[clinic]]}
            )
            patient_id = answer["patient"]["id"]
            self.people.append((clinic, {**record, "id": patient_id}))
            if not answer.get("created"):
                given = await self.all("coordinator", "/v1/consents", "consents", patientId=[patient_id])
                known = {(each["channel"], each["contactValue"]) for each in given}
            else:
                known = set()
            for consent in people.consents(record):
                if (consent["channel"], consent["contactValue"]) not in known:
                    await self.client("coordinator").post("/v1/consents", {**consent, "patientId": patient_id})

        await _each(people.patients(), one)
        self.people.sort(key=lambda each: str(each[1]["identifiers"][0]["value"]))

    async def appointments(self) -> None:
        """Visits within two weeks: one of each patient, two of every third."""
        kinds = {each["code"]: each["id"] for each in await self.all("scheduler", "/v1/visitTypes", "visitTypes")}
        clinics = list(self.clinics.values())
        booked = await self.all("scheduler", "/v1/appointments", "appointments", clinicIds=clinics)
        have = {(each["patientId"], each["visitTypeId"]) for each in booked}

        async def one(clinic: str) -> None:
            own = [patient["id"] for place, patient in self.people if place == clinic]
            wishes = [("follow-up", patient_id) for patient_id in own]
            wishes += [("annual-physical", patient_id) for patient_id in own[::3]]
            day = datetime.now(UTC).replace(hour=5, minute=0, second=0, microsecond=0) + timedelta(days=1)
            offers: list[Json] = []
            for code, patient_id in wishes:
                if (patient_id, kinds[code]) in have:
                    continue
                while not offers or offers[0]["visitTypeId"] != kinds[code]:
                    offers = await self._offers(kinds[code], self.clinics[clinic], day)
                    day += timedelta(days=1)
                offer = offers.pop(0)
                await self.client("scheduler").post(
                    "/v1/appointments", {"patientId": patient_id, "offerToken": offer["offerToken"], "source": "STAFF"}
                )

        await _each(people.CLINICS, one)

    async def waitlist(self) -> None:
        """At each clinic two who wait for a physical, one of them urgently, and one who would come earlier."""
        kinds = {each["code"]: each["id"] for each in await self.all("scheduler", "/v1/visitTypes", "visitTypes")}
        waiting = await self.all("scheduler", "/v1/waitlistEntries", "waitlistEntries")
        known = {each["patientId"] for each in waiting}

        async def one(clinic: str) -> None:
            own = [patient for place, patient in self.people if place == clinic]
            for patient, wishes in zip((own[1], own[2], own[4]), people.WAITLIST, strict=True):
                if patient["id"] in known:
                    continue
                facts = {"clinicIds": [self.clinics[clinic]], "language": patient["languages"][0][:2]}
                code = wishes["code"]
                if wishes["earlier"]:
                    theirs = await self.all("scheduler", "/v1/appointments", "appointments", patientIds=[patient["id"]])
                    facts["appointmentId"] = next(
                        each["id"]
                        for each in theirs
                        if each["visitTypeId"] == kinds[code] and each["status"] == "BOOKED"
                    )
                entry = {"waitlistEntry": {**facts, **wishes["entry"]}}
                await self.client("scheduler").post(
                    "/v1/waitlistEntries", {"patientId": patient["id"], "visitTypeId": kinds[code], **entry}
                )

        await _each(people.CLINICS, one)

    async def requests(self) -> None:
        """At each clinic visits that somebody must still make, one of them tried already, and one patient who may be moved."""
        asked = await self.all("scheduler", "/v1/schedulingRequests", "schedulingRequests")
        known = {each["patientId"] for each in asked}
        client = self.client("scheduler")

        async def one(clinic: str) -> None:
            own = [patient["id"] for place, patient in self.people if place == clinic]
            for patient_id, wanted in zip(own, people.REQUESTS, strict=False):
                if patient_id in known:
                    continue
                request = {**wanted["request"], "patientId": patient_id, "clinicId": self.clinics[clinic]}
                made = await client.post("/v1/schedulingRequests", request)
                for attempt in wanted["attempts"]:
                    await client.post(f"/v1/schedulingRequests/{made['id']}:recordAttempt", attempt)
            for patient_id in own[:1]:
                wishes = {"preferences": people.WISHES}
                await client.post(f"/v1/patients/{patient_id}/schedulingPreferences:set", wishes)

        await _each(people.CLINICS, one)

    async def _offers(self, kind: str, clinic: str, day: datetime) -> list[Json]:
        """Two free slots of a day, now of its morning, now of its afternoon; none on a day off."""
        if day > datetime.now(UTC) + timedelta(days=90):
            raise ServerFailed("the sample's clinics have no free slots")
        found = await self.client("scheduler").post(
            "/v1/availability:search",
            {
                "visitTypeId": kind,
                "clinicIds": [clinic],
                "startTime": _stamp(day),
                "endTime": _stamp(day + timedelta(days=1)),
                "earliest": ("08:00", "10:00", "12:30")[day.day % 3],
                "pageSize": 24,
            },
        )
        slots = found.get("slots", [])
        later = [slot for slot in slots if slot["startTime"] >= slots[0]["endTime"]]
        return [*slots[:1], *later[2:3]]


def _stamp(instant: datetime) -> str:
    return instant.isoformat().replace("+00:00", "Z")


async def _each(things: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(thing: T) -> None:
        async with room:
            await work(thing)

    try:
        async with asyncio.TaskGroup() as group:
            for thing in things:
                group.create_task(one(thing))
    except ExceptionGroup as several:
        raise several.exceptions[0] from None

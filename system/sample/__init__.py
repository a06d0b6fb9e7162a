"""A made-up tenant, loaded through the HTTP API: three clinics in three time zones, staff of each role, patients, visits."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from system.importing.client import GatewayClient
from system.importing.load import load_clinics
from system.importing.report import Report
from system.issuer import ISSUER, ROLES, staff_subject
from system.process import ServerFailed
from system.sample import people
from system.sample.people import Json

_AT_ONCE = 8
_DAYS = 14
_VISITS = ("follow-up", "annual-physical")
T = TypeVar("T")


async def load(url: str, token: Callable[[str], str]) -> bool:
    """Bring the sample in, as far as it isn't there; answers whether anything was to be done. `token` signs in a role.

    Everything has a natural key that is looked up first, so that a load that was killed goes on where it stood.
    """
    clients = {
        role: GatewayClient(url, token(role)) for role in ("admin", "integration_client", "coordinator", "scheduler")
    }
    loading = _Loading(clients)
    try:
        # The questionnaires go in last: when they are there, all is.
        known = {each["name"] for each in await loading.all("admin", "/v1/questionnaires", "questionnaires")}
        missing = [each for each in people.QUESTIONNAIRES if each["name"] not in known]
        if not missing:
            return False
        await loading.directory()
        await loading.staff()
        await loading.pools()
        await loading.patients()
        await loading.appointments()
        for each in missing:
            await loading.client("admin").post("/v1/questionnaires", each)
        return True
    finally:
        await asyncio.gather(*(client.__aexit__(None, None, None) for client in clients.values()))


class _Loading:
    def __init__(self, clients: dict[str, GatewayClient]) -> None:
        self._clients = clients
        self._clinics: dict[str, str] = {}
        self._staff: dict[str, str] = {}
        self._patients: list[tuple[str, Json]] = []

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
                    self._clinics[identifier["value"]] = clinic["id"]

    async def staff(self) -> None:
        self._staff = {
            each["subject"]: each["id"]
            for each in await self.all("admin", "/v1/staff", "staff")
            if each.get("issuer") == ISSUER
        }

        async def one(role: str) -> None:
            subject = staff_subject(role)
            record = people.staff(role, ISSUER, subject, list(self._clinics.values()))
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
                "/v1/patients:upsert", {"patient": record, "clinicIds": [self._clinics[clinic]]}
            )
            patient_id = answer["patient"]["id"]
            self._patients.append((clinic, {**record, "id": patient_id}))
            if not answer.get("created"):
                given = await self.all("coordinator", "/v1/consents", "consents", patientId=[patient_id])
                known = {(each["channel"], each["contactValue"]) for each in given}
            else:
                known = set()
            for consent in people.consents(record):
                if (consent["channel"], consent["contactValue"]) not in known:
                    await self.client("coordinator").post("/v1/consents", {**consent, "patientId": patient_id})

        await _each(people.patients(), one)
        self._patients.sort(key=lambda each: str(each[1]["identifiers"][0]["value"]))

    async def appointments(self) -> None:
        """Two visits for every patient within two weeks, at offers spread over what is free."""
        kinds = {each["code"]: each["id"] for each in await self.all("scheduler", "/v1/visitTypes", "visitTypes")}
        clinics = list(self._clinics.values())
        booked = await self.all("scheduler", "/v1/appointments", "appointments", clinicIds=clinics)
        have = {(each["patientId"], each["visitTypeId"]) for each in booked}
        now = datetime.now(UTC).replace(microsecond=0)

        async def one(clinic: str) -> None:
            for number, code in enumerate(_VISITS):
                whom = [
                    patient["id"]
                    for place, patient in self._patients
                    if place == clinic and (patient["id"], kinds[code]) not in have
                ]
                # A window each, so that the second kind's offers are not the first one's places.
                window = timedelta(days=_DAYS / len(_VISITS))
                start = now + timedelta(hours=12) + number * window
                offers = await self._offers(kinds[code], self._clinics[clinic], start, start + window, len(whom))
                for patient_id, offer in zip(whom, offers, strict=False):
                    await self.client("scheduler").post(
                        "/v1/appointments",
                        {"patientId": patient_id, "offerToken": offer["offerToken"], "source": "STAFF"},
                    )

        await _each(people.CLINICS, one)

    async def _offers(self, kind: str, clinic: str, start: datetime, end: datetime, wanted: int) -> list[Json]:
        """As many free slots as wanted, no two at once, spread over the window."""
        query: Json = {
            "visitTypeId": kind,
            "clinicIds": [clinic],
            "startTime": start.isoformat().replace("+00:00", "Z"),
            "endTime": end.isoformat().replace("+00:00", "Z"),
            "pageSize": 200,
        }
        free: list[Json] = []
        while True:
            page = await self.client("scheduler").post("/v1/availability:search", query)
            free += page.get("slots", [])
            if not page.get("nextPageToken") or len(free) > 1000:
                break
            query["pageToken"] = page["nextPageToken"]
        apart: list[Json] = []
        for slot in sorted(free, key=lambda each: (each["startTime"], each["practitionerId"])):
            if not apart or slot["startTime"] >= apart[-1]["endTime"]:
                apart.append(slot)
        step = max(1, len(apart) // max(1, wanted))
        return apart[::step][:wanted]


async def _each(things: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(thing: T) -> None:
        async with room:
            await work(thing)

    async with asyncio.TaskGroup() as group:
        for thing in things:
            group.create_task(one(thing))

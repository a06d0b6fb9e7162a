"""The system under load: real Kafka, six processes, PostgreSQL with fsync, and the data set inside."""

import asyncio
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import care
import httpx2

from bench.data import PATIENT, PRACTITIONERS_PER_CLINIC, STAFF_CLINICS, ZONES, Data, Directory, subject, uid
from bench.rows import load
from system import postgres
from system.importing.client import GatewayClient
from system.issuer import ISSUER, DevelopmentIssuer, staff_subject
from system.process import LOOPBACK, free_port
from system.run import System, bootstrap
from system.topology import GATEWAY, SERVICES

CLINICS = 50
STAFF = 50
_SHAPE = 3
"""Of the data set; another one is loaded anew."""
_ALL_WEEK = [{"weekday": day, "start": "08:00", "end": "18:00"} for day in range(1, 8)]


class World:
    """`async with World(folder, patients, appointments)`: everything runs, and the data set is in the databases.

    A folder that holds the data set already is taken as it is, unless its visits to come have become past.
    """

    def __init__(self, folder: Path, patients: int, appointments: int) -> None:
        self.folder, self._patients, self._appointments = folder, patients, appointments
        self._marker = folder / "bench.json"
        postgres.SETTINGS.update(
            # When rows became visible, by the server's own clock: what latencies between services are measured by.
            track_commit_timestamp="on",
            # The data set fits; a laptop's default would measure the copying of pages.
            shared_buffers="4GB",
        )
        self.system = System(folder, 0, kafka=True, empty=True)
        self.data: Data
        self._state: dict[str, Any] = {}

    async def __aenter__(self) -> Self:
        await self.system.start()
        try:
            await self._fill()
        except BaseException:
            await self.system.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self._save()
        await self.system.stop()

    # -- data ----------------------------------------------------------------------------------------------------------

    async def _fill(self) -> None:
        size = [_SHAPE, self._patients, self._appointments]
        today = datetime.now(UTC).date()
        if self._marker.exists():
            self._state = json.loads(self._marker.read_text())
        known = (
            self._state.get("size") == size and self._state.get("day", "") >= (today - timedelta(days=5)).isoformat()
        )
        if not known:
            directory = await _make_directory(self.system)
            self._state = {"size": size, "day": (today + timedelta(days=1)).isoformat(), "next_slot": 0}
            self._state["directory"] = vars(directory)
        day = datetime.fromisoformat(self._state["day"]).date()
        self.data = Data(self._patients, self._appointments, day, Directory(**self._state["directory"]))
        if not known:
            await self._load()
            self._save()

    async def _load(self) -> None:
        began = time.perf_counter()
        for name in SERVICES:
            await self.system.stop_service(name)
            rows = await load(self.system.postgres.url(name, postgres.SUPERUSER), self.data.tables(name))
            await self.system.start_service(name)
            print(f"  {name}: " + ", ".join(f"{count:,} {table}" for table, count in rows.items()), flush=True)
        await self.system.ready()
        print(f"  loaded in {time.perf_counter() - began:.0f} s", flush=True)

    def _save(self) -> None:
        if self._state:
            self._marker.write_text(json.dumps(self._state))

    def slots(self, count: int) -> range:
        """Numbers of so many slots that nobody has booked yet; each is given out once."""
        first = self._state["next_slot"]
        self._state["next_slot"] = first + count
        self._save()
        return range(first, first + count)

    def tokens(self, count: int) -> list[str]:
        """Tokens of so many members of staff."""
        issuer = DevelopmentIssuer(self.system.keys)
        return [issuer.issue(subject=subject(number % STAFF)) for number in range(count)]

    def booking(self, slot: int, patient: int) -> bytes:
        """The body of a request that books a slot for a patient."""
        clinic, practitioner, start = self.data.free_slot(slot)
        directory = self.data.directory
        return json.dumps(
            {
                "patientId": self.patient(patient),
                "visitTypeId": directory.visit_type,
                "clinicId": directory.clinics[clinic],
                "practitionerId": directory.practitioners[practitioner],
                "startTime": datetime.fromtimestamp(start, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                "source": "PHONE",
            }
        ).encode()

    def patient(self, number: int) -> str:
        """A patient's id."""
        return uid(PATIENT, number % self.data.patients)

    def patient_at(self, slot: int, rival: int = 0, rivals: int = 1) -> int:
        """Number of a patient of the slot's clinic, each slot and each rival for it another one."""
        per_clinic = self.data.patients // CLINICS
        clinic, place = divmod(slot % (CLINICS * PRACTITIONERS_PER_CLINIC), PRACTITIONERS_PER_CLINIC)
        turn = slot // (CLINICS * PRACTITIONERS_PER_CLINIC) * PRACTITIONERS_PER_CLINIC + place
        return clinic + CLINICS * ((turn * rivals + rival) % per_clinic)

    def staff_of(self, patient: int) -> int:
        """Number of a member of staff who may see a patient, neighbours in number others."""
        return (patient % CLINICS - patient // CLINICS % STAFF_CLINICS) % STAFF

    # -- another gateway -----------------------------------------------------------------------------------------------

    async def second_gateway(self, **settings: str) -> "SecondGateway":
        """A gateway beside the first with other settings (`CARE_…` without the prefix, in lower case)."""
        return await SecondGateway.start(self.system, settings)


class SecondGateway:
    """A process with a gateway on a port of its own."""

    def __init__(self, process: subprocess.Popen[bytes], url: str) -> None:
        self.process, self.url = process, url

    @classmethod
    async def start(cls, system: System, settings: dict[str, str]) -> Self:
        """Returns when it is ready."""
        port = free_port()
        paths = [str(Path(__file__).resolve().parents[1]), str(Path(next(iter(care.__path__))).parent)]
        environment = {
            **os.environ,
            **system.plan.environment(GATEWAY.name),
            **{f"CARE_{name.upper()}": value for name, value in settings.items()},
            "CARE_PORT": str(port),
            "PYTHONPATH": os.pathsep.join(paths),
        }
        with (system.folder / "logs" / "gateway-2.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "system.gateway"], env=environment, stdout=log, stderr=log, cwd="/"
            )
        gateway = cls(process, f"http://{LOOPBACK}:{port}")
        async with httpx2.AsyncClient(timeout=2, trust_env=False) as client:
            for _ in range(300):
                with suppress(httpx2.HTTPError):
                    if (await client.get(f"{gateway.url}/readyz")).status_code == 200:
                        return gateway
                await asyncio.sleep(0.1)
        gateway.stop()
        raise RuntimeError("the second gateway is not ready")

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(15)


async def _make_directory(system: System) -> Directory:
    """Clinics, practitioners, hours, staff and a questionnaire through the API, so that every projection has them."""
    await bootstrap(system.database_url("patients"), administrator=True)
    token = DevelopmentIssuer(system.keys).issue(subject=staff_subject("admin"))
    room = asyncio.Semaphore(8)
    async with GatewayClient(system.url, token) as client:

        async def make(path: str, body: dict[str, Any]) -> str:
            async with room:
                return str((await client.post(path, body))["id"])

        run = f"{int(time.time()):x}"
        specialty = {"system": "http://snomed.info/sct", "code": "394802001", "display": "General medicine"}
        clinics = await asyncio.gather(
            *(
                make("/v1/clinics", {"name": f"Clinic {run} {n:02}", "timeZone": ZONES[n % len(ZONES)]})
                for n in range(CLINICS)
            )
        )
        practitioners = await asyncio.gather(
            *(
                make(
                    "/v1/practitioners",
                    {
                        "name": {"familyName": f"Example {n:03}", "givenNames": ["Alex"]},
                        "roles": [{"clinicId": clinics[n // PRACTITIONERS_PER_CLINIC], "specialties": [specialty]}],
                    },
                )
                for n in range(CLINICS * PRACTITIONERS_PER_CLINIC)
            )
        )
        await asyncio.gather(
            *(
                make(
                    "/v1/schedules",
                    {
                        "practitionerId": practitioner,
                        "clinicId": clinics[n // PRACTITIONERS_PER_CLINIC],
                        "weeklyHours": _ALL_WEEK,
                    },
                )
                for n, practitioner in enumerate(practitioners)
            )
        )
        visit_type = await make(
            "/v1/visitTypes", {"code": f"visit-{run}", "name": "Visit", "durationMinutes": 15, "startGridMinutes": 15}
        )
        known = {each.get("subject"): each for each in await client.all_of("/v1/staff", "staff")}
        for n in range(STAFF):
            record = {
                "issuer": ISSUER,
                "subject": subject(n),
                "name": {"familyName": f"Staff {n:02}", "givenNames": ["Kim"]},
                "roles": ["coordinator"],
                "clinicIds": [clinics[(n + k) % CLINICS] for k in range(STAFF_CLINICS)],
                "active": True,
            }
            if (there := known.get(subject(n))) is not None:
                await client.patch(f"/v1/staff/{there['id']}", {"clinicIds": record["clinicIds"]}, there["etag"])
            else:
                await make("/v1/staff", record)
        pools = await client.all_of("/v1/pools", "pools")
        questionnaire = await make("/v1/questionnaires", _questionnaire(run))
    pool = next(each["id"] for each in pools if each.get("purpose") == "coordination")
    # The projections of the others are made from events.
    await asyncio.sleep(5)
    return Directory(list(clinics), list(practitioners), visit_type, pool, questionnaire, STAFF)


def _questionnaire(run: str) -> dict[str, Any]:
    return {
        "name": f"bench-{run}",
        "number": 1,
        "status": "ACTIVE",
        "title": {"en": "How was your visit?"},
        "items": [
            {
                "linkId": "q1",
                "text": {"en": "How likely are you to recommend us, from 0 to 10?"},
                "kind": "SCALE",
                "options": [{"value": value, "text": {"en": str(value)}} for value in range(11)],
                "required": True,
            }
        ],
        "scoring": {"method": "nps", "linkIds": ["q1"], "badAt": 6},
    }

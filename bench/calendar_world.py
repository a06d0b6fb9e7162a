"""The scheduling service alone under load: two data sets of one shape, each with a process of its own, on one PostgreSQL with fsync.

Fifty clinics and 250 practitioners in both. The calendar of the days to come is the same one, full at first and emptier
from day to day; what differs is how much is past: 1,000,000 visits or a tenth.
"""

import asyncio
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Self
from zoneinfo import ZoneInfo

import asyncpg
import care
import grpc
import psutil

from bench.data import ZONES, subject, uid
from bench.rows import Rows, load
from chassis import migrations
from chassis.bus import PARTITIONS
from services.scheduling.service import SERVICE
from system.issuer import ISSUER, TENANT_ID, DevelopmentIssuer, accepted
from system.keys import Keys
from system.postgres import SUPERUSER, Postgres
from system.process import LOOPBACK, FolderLock, free_port

CLINICS, PRACTITIONERS = 50, 250
HERE = PRACTITIONERS // CLINICS
OPENS, MINUTES, PER_DAY = 8, 15, 40
"""Each practitioner sees patients from 8 to 18 o'clock of the clinic's zone, every day, a quarter of an hour each."""
WINDOW = 30
FREE_FROM = 35
"""Days after the first on which nobody has a visit yet."""
STAFF = 50
_SHAPE = 1
_CLINIC, _PRACTITIONER, _SCHEDULE, _KIND, _PATIENT, _VISIT, _LOGIN = range(17, 24)
VISIT_TYPE = uid(_KIND, 0)
PERMISSIONS = ("availability.search", "appointments.book", "appointments.write", "appointments.read")


def clinic_id(number: int) -> str:
    """A clinic's id."""
    return uid(_CLINIC, number)


def practitioner_id(number: int) -> str:
    """A practitioner's id: `HERE` at each clinic."""
    return uid(_PRACTITIONER, number)


def patient_id(number: int) -> str:
    """A patient's id; patient n is of clinic n % CLINICS."""
    return uid(_PATIENT, number)


def opening(clinic: int, day: date) -> int:
    """Epoch second at which a clinic opens."""
    at = datetime(day.year, day.month, day.day, OPENS, tzinfo=ZoneInfo(ZONES[clinic % len(ZONES)]))
    return round(at.timestamp())


def _taken(practitioner: int, day: int, slot: int) -> bool:
    """Whether somebody has a slot of a day to come: nine of ten tomorrow, one of a hundred in a month."""
    draw = (practitioner * 7919 + day * 104_729 + slot * 1_299_709) * 2_654_435_761 % (1 << 32)
    return draw < 0.9 * math.exp(-day / 7) * (1 << 32)


class Calendar:
    """One data set: `visits` in all, those of the days from `day` on the same for any number of them."""

    def __init__(self, name: str, visits: int, day: date) -> None:
        self.name, self.visits, self.day = name, visits, day
        self.patients = visits // 10

    @cached_property
    def _to_come(self) -> list[tuple[int, int, int]]:
        """(practitioner, day, slot), by clinic and time."""
        return [
            (clinic * HERE + who, day, slot)
            for clinic in range(CLINICS)
            for day in range(WINDOW)
            for slot in range(PER_DAY)
            for who in range(HERE)
            if _taken(clinic * HERE + who, day, slot)
        ]

    def _all(self) -> Iterator[tuple[int, int, int, str]]:
        """(practitioner, start, patient, status) of every visit; those who are seen at the same time are different patients."""
        past = self.visits - len(self._to_come)
        per_clinic = self.patients // CLINICS
        turns = [0] * CLINICS

        def visit(practitioner: int, day: int, slot: int, status: str) -> tuple[int, int, int, str]:
            clinic = practitioner // HERE
            turns[clinic] += 1
            start = opening(clinic, self.day + timedelta(days=day)) + slot * MINUTES * 60
            return practitioner, start, clinic + CLINICS * (turns[clinic] % per_clinic), status

        statuses = ("FULFILLED",) * 10 + ("CANCELLED", "NOSHOW")
        days = -(-past // (PRACTITIONERS * PER_DAY))
        for number in range(past):
            # By day, clinic, slot: neighbours are at the same time.
            day, place = divmod(number, PRACTITIONERS * PER_DAY)
            clinic, within = divmod(place, HERE * PER_DAY)
            slot, who = divmod(within, HERE)
            yield visit(clinic * HERE + who, day - days, slot, statuses[number % 12])
        for practitioner, day, slot in self._to_come:
            yield visit(practitioner, day, slot, "BOOKED")

    # -- rows ----------------------------------------------------------------------------------------------------------

    def tables(self) -> list[tuple[Rows, Iterator[Sequence[str]]]]:
        """What is written into the database."""
        tables = SERVICE.base.metadata.tables
        hours = json.dumps([{"weekday": day, "start": "08:00", "end": "18:00"} for day in range(1, 8)])

        def rows(table: str, varying: str, **same: Any) -> Rows:
            columns = {column.name for column in tables[table].columns}
            times = {name: datetime.now(UTC) for name in ("create_time", "update_time") if name in columns}
            version = {"version": 1} if "version" in columns and "version" not in varying else {}
            return Rows(tables[table], varying.split(), **{"tenant_id": TENANT_ID, **times, **version, **same})

        def visits() -> Iterator[Sequence[str]]:
            for number, (practitioner, start, patient, status) in enumerate(self._all()):
                clinic = practitioner // HERE
                begin, end = (datetime.fromtimestamp(at, UTC).isoformat() for at in (start, start + MINUTES * 60))
                period = f'"period":{{"start_time":"{begin}","end_time":"{end}"}}'
                yield (
                    uid(_VISIT, number), patient_id(patient), status, clinic_id(clinic), practitioner_id(practitioner),
                    begin, end, ZONES[clinic % len(ZONES)],
                    f'[{{"actor":{{"type":"Practitioner","id":"{practitioner_id(practitioner)}"}},"role":"practitioner",'
                    f'"status":"ACCEPTED",{period}}},{{"actor":{{"type":"Patient","id":"{patient_id(patient)}"}},'
                    f'"role":"patient","status":"ACCEPTED",{period}}}]',
                    _HISTORIES[status],
                )  # fmt: skip

        def occupancy() -> Iterator[Sequence[str]]:
            for number, (practitioner, start, patient, status) in enumerate(self._all()):
                if status != "CANCELLED":
                    for no in (practitioner + 1, PRACTITIONERS + 1 + patient):
                        first = (no << 34) + start
                        yield uid(_VISIT, number), str(no), f"[{first},{first + MINUTES * 60})"

        def clinics_of(number: int) -> str:
            return "{" + ",".join(clinic_id((number + k) % CLINICS) for k in range(5)) + "}"

        people = range(PRACTITIONERS)
        practitioners = (
            (
                practitioner_id(n),
                f'{{"family_name":"Example {n:03}","given_names":["Alex"]}}',
                f"Example {n:03}",
                f'[{{"clinic_id":"{clinic_id(n // HERE)}"}}]',
                f"{{{clinic_id(n // HERE)}}}",
            )
            for n in people
        )
        numbers = [(practitioner_id(n), str(n + 1), "practitioner") for n in people]
        numbers += [(patient_id(n), str(PRACTITIONERS + 1 + n), "patient") for n in range(self.patients)]
        staff = {"issuer": ISSUER, "kind": "STAFF", "roles": ["bench"], "clearances": [], "active": True}
        kind = {"duration_minutes": MINUTES, "start_grid_minutes": MINUTES, "active": True}
        visit = {"visit_type_id": VISIT_TYPE, "modality": "IN_PERSON", "schedule_version": 1, "late_cancel_hours": 24}
        clinics = ((clinic_id(n), f"Clinic {n:02}", ZONES[n % len(ZONES)]) for n in range(CLINICS))
        schedules = ((uid(_SCHEDULE, n), practitioner_id(n), clinic_id(n // HERE), hours) for n in people)
        subjects = ((patient_id(n), f"{{{patient_id(n)},{clinic_id(n % CLINICS)}}}") for n in range(self.patients))
        logins = ((subject(n), uid(_LOGIN, n), uid(_LOGIN, n), clinics_of(n)) for n in range(STAFF))
        role = ("bench", "{" + ",".join(PERMISSIONS) + "}")
        columns = "id patient_id status clinic_id practitioner_id start_time end_time time_zone participants history"
        return [
            (rows("clinic", "id name time_zone", status="ACTIVE"), clinics),
            (rows("practitioner", "id name family_name roles clinic_ids", active=True), practitioners),
            (rows("schedule", "id practitioner_id clinic_id weekly_hours"), schedules),
            (rows("visit_type", "id code name", **kind), iter([(VISIT_TYPE, "visit", "Visit")])),
            (rows("record_subject", "patient_id grantee_ids", access_version=1), subjects),
            (rows("principal", "subject id principal_id group_ids", **staff), logins),
            (rows("role_permissions", "name permissions"), iter([role])),
            (rows("bookable", "ref_id no kind"), iter(numbers)),
            (rows("appointment", columns, **visit), visits()),
            (rows("occupancy", "holder_id no during", lane=0), occupancy()),
        ]


def _history(*steps: tuple[str, str, str]) -> str:
    return json.dumps(
        [
            {"action": action, "from_status": before, "to_status": after, "reason_code": "",
             "time": "2026-01-05T15:00:00+00:00", "actor": "system:scheduling", "on_behalf_of": "", "source": "PHONE"}
            for action, before, after in steps
        ]
    )  # fmt: skip


_HISTORIES = {
    "BOOKED": _history(("book", "", "BOOKED")),
    "CANCELLED": _history(("book", "", "BOOKED"), ("cancel", "BOOKED", "CANCELLED")),
    "NOSHOW": _history(("book", "", "BOOKED"), ("mark_no_show", "BOOKED", "NOSHOW")),
    "FULFILLED": _history(("book", "", "BOOKED"), ("fulfill", "CHECKED_IN", "FULFILLED")),
}


class CalendarWorld:
    """`async with CalendarWorld(folder, visits)`: both services run, `whole` on `visits` and `tenth` on a tenth of them."""

    def __init__(self, folder: Path, visits: int) -> None:
        self.folder = folder.resolve()
        self._visits = visits
        self.keys = Keys(self.folder / "keys")
        self.postgres = Postgres(self.folder / "postgres")
        self._lock = FolderLock(self.folder)
        self._marker = self.folder / "calendar.json"
        self._state: dict[str, Any] = {}
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self.targets: dict[str, str] = {}
        self.urls: dict[str, str] = {}
        self.bus_url = ""
        self.calendars: dict[str, Calendar] = {}

    async def __aenter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock.take()
        try:
            self.keys.ensure()
            await self.postgres.start()
            self.bus_url = await self.postgres.create_database("bus", "bus")
            for name in ("whole", "tenth"):
                self.urls[name] = await self.postgres.create_database(name, name)
                await migrations.upgrade(self.urls[name], SERVICE.migrations, SERVICE.base.metadata)
            await self._fill()
            for name in self.urls:
                await self._start(name)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            process.wait(15)
        await self.postgres.stop()
        self._lock.give_back()

    async def _fill(self) -> None:
        today = datetime.now(UTC).date()
        if self._marker.exists():
            self._state = json.loads(self._marker.read_text())
        known = self._state.get("shape") == [_SHAPE, self._visits] and self._state["day"] > today.isoformat()
        known = known and self._state["next_slot"] < 200 * PRACTITIONERS * PER_DAY
        if not known:
            day = today + timedelta(days=1)
            self._state = {"shape": [_SHAPE, self._visits], "day": day.isoformat(), "next_slot": 0}
        self.day = date.fromisoformat(self._state["day"])
        for name, visits in (("whole", self._visits), ("tenth", self._visits // 10)):
            self.calendars[name] = Calendar(name, visits, self.day)
            if not known:
                began = time.perf_counter()
                counted = await load(self.postgres.url(name, SUPERUSER), self.calendars[name].tables())
                print(f"  {name}: {counted['appointment']:,} visits, {time.perf_counter() - began:.0f} s", flush=True)
            db = await asyncpg.connect(self.urls[name].replace("+asyncpg", ""))
            await db.executemany(
                "INSERT INTO access_heartbeat VALUES ($1, clock_timestamp() + interval '1 day')"
                " ON CONFLICT (partition) DO UPDATE SET time = excluded.time",
                [(number,) for number in range(PARTITIONS)],
            )
            await db.close()
        self._marker.write_text(json.dumps(self._state))

    def settings(self, name: str, port: int) -> dict[str, Any]:
        """Settings of a service on one of the data sets, as `chassis.settings` names them."""
        return {
            "environment": "development",
            "host": LOOPBACK,
            "port": port,
            "health_port": free_port(),
            "metrics_port": free_port(),
            "peers": {"patients": f"ipv4:{LOOPBACK}:9"},
            "issuers": [accepted(self.keys)],
            "service_key_file": self.keys.service_key_file("scheduling"),
            "service_keys_file": self.keys.service_keys_file,
            "signing_secret": self.keys.signing_secret,
            "database_url": self.urls[name],
            "bus_url": self.bus_url,
            "audit_checkpoint_file": self.folder / f"{name}.jws",
            "video_provider": "development",
        }

    async def _start(self, name: str) -> None:
        port = free_port()
        self.targets[name] = f"{LOOPBACK}:{port}"
        values = self.settings(name, port) | {
            "issuers": json.dumps([one.model_dump(mode="json", exclude_none=True) for one in [accepted(self.keys)]]),
            "peers": json.dumps({"patients": f"ipv4:{LOOPBACK}:9"}),
        }
        paths = [str(Path(__file__).resolve().parents[1]), str(Path(next(iter(care.__path__))).parent)]
        environment = {
            **os.environ,
            **{f"CARE_{key.upper()}": str(value) for key, value in values.items()},
            "PYTHONPATH": os.pathsep.join(paths),
        }
        with (self.folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [sys.executable, "-m", "services.scheduling"], env=environment, stdout=log, stderr=log, cwd="/"
            )
        async with grpc.aio.insecure_channel(self.targets[name]) as channel:
            await asyncio.wait_for(channel.channel_ready(), 30)

    # -- what workloads ask --------------------------------------------------------------------------------------------

    def pid(self, name: str) -> int:
        """Of the service on a data set."""
        return self._processes[name].pid

    def used(self, name: str) -> tuple[float, float]:
        """CPU seconds so far of a service and of PostgreSQL."""
        server = psutil.Process(self.postgres.pid or 0)
        times = server.cpu_times()
        seconds = times.user + times.system + times.children_user + times.children_system
        return _used(self.pid(name)), seconds + sum(_used(child.pid) for child in server.children())

    def tokens(self) -> list[str]:
        """`authorization` of each member of staff."""
        issuer = DevelopmentIssuer(self.keys)
        return [f"Bearer {issuer.issue(subject=subject(number))}" for number in range(STAFF)]

    def slots(self, count: int) -> range:
        """Numbers of so many slots that nobody has booked yet; each is given out once."""
        first = self._state["next_slot"]
        self._state["next_slot"] = first + count
        self._marker.write_text(json.dumps(self._state))
        return range(first, first + count)

    def free_slot(self, number: int) -> tuple[int, int]:
        """(practitioner, start) of a slot that nobody has: neighbours in number are at different practitioners."""
        slot, practitioner = divmod(number, PRACTITIONERS)
        day, within = divmod(slot, PER_DAY)
        opens = opening(practitioner // HERE, self.day + timedelta(days=FREE_FROM + day))
        return practitioner, opens + within * MINUTES * 60

    def patient_for(self, slot: int, name: str, rival: int = 0, rivals: int = 1) -> int:
        """Number of a patient of the slot's clinic, another one for each slot at the same time and for each rival."""
        practitioner = slot % PRACTITIONERS
        turn = (slot // PRACTITIONERS * HERE + practitioner % HERE) * rivals + rival
        return practitioner // HERE + CLINICS * (turn % (self.calendars[name].patients // CLINICS))


def _used(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)

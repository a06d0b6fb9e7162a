"""Puts bundles and the file on clinics in through the gateway, so that every run ends in the same state."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import Progress

from system.importing.bundles import (
    BundleBroken,
    BundleRead,
    ClinicRead,
    Json,
    Key,
    PatientRead,
    PractitionerRead,
    Rules,
    read_bundle,
)
from system.importing.client import GatewayClient, Refused, Stopped
from system.importing.clinics import ClinicsFile, PractitionerEntry, read_clinics
from system.importing.places import zone_of
from system.importing.report import Report

AT_ONCE = 8
_MOST_CLINICS = 100  # of one upsert of a patient, and of one filter
_KEPT_OF_PRACTITIONERS = ("name", "languages", "licensedStates", "gender", "active", "sourceSystem")

T = TypeVar("T")


class NothingToImport(Exception):
    """The folder is missing or holds no bundle; the message says which and what to do."""


@dataclass(slots=True)
class _Directory:
    """Clinics and practitioners on the server, by every identifier that they have."""

    clinics: dict[Key, Json] = field(default_factory=dict)
    practitioners: dict[Key, Json] = field(default_factory=dict)

    @classmethod
    async def read(cls, client: GatewayClient) -> "_Directory":
        """Reads both lists. Stopped where nothing can go in: what can't be read can't be merged."""
        directory = cls()
        try:
            for clinic in await client.all_of("/v1/clinics", "clinics"):
                _index(directory.clinics, clinic)
            for practitioner in await client.all_of("/v1/practitioners", "practitioners"):
                _index(directory.practitioners, practitioner)
        except Refused as refused:
            raise Stopped(
                f"the directory can't be read ({refused}); see that --url or CARE_URL names the gateway"
            ) from None
        return directory


def _index(records: dict[Key, Json], record: Json) -> None:
    for identifier in record.get("identifiers", []):
        records[Key(identifier["system"], identifier["value"])] = record


def _label(key: Key) -> str:
    """How a directory entry is named in the report."""
    return f"{key.system}|{key.value}"


async def load_bundles(
    folder: Path,
    client: GatewayClient | None,
    report: Report,
    *,
    rules: Rules | None = None,
    stated: ClinicsFile | None = None,
    at_once: int = AT_ONCE,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> None:
    """Brings in every `*.json` of a folder: all are read and checked first, then directory, then patients with relations.

    Every write is an upsert by identifier, so that a run which was killed is healed by the next one, and a second one changes
    nothing. `stated` (the file on clinics of the same run) wins over the bundles. A zone that is only derived fills a gap and
    never replaces one. With `dry_run` nothing is sent and `client` may be None. NothingToImport if there is no bundle.
    """
    paths = await asyncio.to_thread(_bundles_in, folder)
    progress = progress or Progress(disable=True)
    bundles = []
    for path in progress.track(paths, description="Reading"):
        try:
            # In a thread: the bar and Ctrl-C stay alive while a large file is read.
            bundles.append(await asyncio.to_thread(read_bundle, path, rules))
        except BundleBroken as broken:
            report.break_(broken)
    clinics, practitioners, patients = _joined(bundles, report)
    for bundle in bundles:
        report.read(bundle)
    if dry_run or client is None:
        report.counts["clinic", "to send"] += len(clinics)
        report.counts["practitioner", "to send"] += len(practitioners)
        report.counts["patient", "to send"] += len(patients)
        report.started = True
        return
    try:
        directory = await _Directory.read(client)
        loading = _Loading(client, report, directory, at_once, progress, _overlay(stated))
        await loading.each("Clinics", clinics, loading.clinic)
        await loading.each("Practitioners", practitioners, loading.practitioner)
        await loading.each("Patients", patients, loading.patient)
    except Stopped as stopped:
        report.stopped = str(stopped)


def _bundles_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise NothingToImport(f"{folder} is no folder; give the one with the bundles")
    paths = sorted(path for path in folder.glob("*.json") if path.is_file())
    if not paths:
        raise NothingToImport(f"{folder} holds no *.json; give the folder with the bundles")
    return paths


def _joined(
    bundles: list[BundleRead], report: Report
) -> tuple[list[ClinicRead], list[tuple[str, PractitionerRead]], list[tuple[str, PatientRead]]]:
    """The records of all bundles, each once. Files that differ in a directory entry: the first by name has it.

    A patient's record that stands in two files must be the same in both: else the two would overwrite each other on every
    run, so the second file counts as broken and leaves the list.
    """
    clinics: dict[Key, ClinicRead] = {}
    practitioners: dict[Key, tuple[str, PractitionerRead]] = {}
    patients: dict[Key, tuple[str, PatientRead]] = {}
    for bundle in list(bundles):
        name = bundle.path.name
        clash = next(
            (one for one in bundle.patients if one.key in patients and patients[one.key][1].record != one.record), None
        )
        if clash:
            path, what = (
                f"entry[{clash.entry}].resource.identifier",
                f"the record number has another record in {patients[clash.key][0]}",
            )
            report.break_(BundleBroken(name, clash.entry, "Patient", path, what))
            bundles.remove(bundle)
            continue
        for patient in bundle.patients:
            file, first = patients.get(patient.key, (name, patient))
            both = tuple(sorted({*first.clinics, *patient.clinics}))
            patients[patient.key] = (file, replace(first, clinics=both))
        for clinic in bundle.clinics:
            if clinics.setdefault(clinic.key, clinic).record != clinic.record:
                report.note(name, "Organization", "differs from the one in an earlier file; the earlier one is taken")
        for one in bundle.practitioners:
            file, known = practitioners.get(one.key, (name, one))
            if known.record != one.record:
                report.note(name, "Practitioner", "differs from the one in an earlier file; the earlier one is taken")
            practitioners[one.key] = (file, replace(known, clinics=tuple(sorted({*known.clinics, *one.clinics}))))
    return list(clinics.values()), list(practitioners.values()), list(patients.values())


def _overlay(stated: ClinicsFile | None) -> dict[Key, Json]:
    """What the file says of clinics and practitioners, by identifier (their issuers differ, so the two never meet)."""
    records = [(entry.key, entry.record) for entry in stated.clinics] if stated else []
    records += [(entry.key, entry.record) for entry in stated.practitioners] if stated else []
    return {key: {name: part for name, part in record.items() if name != "identifiers"} for key, record in records}


@dataclass(slots=True)
class _Loading:
    client: GatewayClient
    report: Report
    directory: _Directory
    at_once: int = AT_ONCE
    progress: Progress = field(default_factory=lambda: Progress(disable=True))
    stated: Mapping[Key, Json] = field(default_factory=dict)
    source: str = ""

    async def each(self, title: str, things: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
        """Works on all things, so many at once; the first Stopped ends it."""
        waiting = list(things)
        bar = self.progress.add_task(title, total=len(waiting))
        queue, stops = iter(waiting), list[Stopped]()

        async def worker() -> None:
            for thing in queue:
                try:
                    await work(thing)
                except Stopped as stopped:
                    stops.append(stopped)
                if stops:
                    return
                self.progress.advance(bar)

        await asyncio.gather(*(worker() for _ in range(self.at_once)))
        if stops:
            raise stops[0]

    async def upsert(self, kind: str, path: str, record: Json, place: str) -> Json | None:
        """Sends one upsert, counts what it did and gives the record as it is now; None if it was refused."""
        try:
            answer = await self.client.post(path, {kind: record})
        except Refused as refused:
            self.report.refuse(place, kind + self.source, str(refused))
            return None
        self.report.took(kind + self.source, _outcome(answer))
        return {**answer[kind], "identifiers": _identifiers(answer[kind], record)}

    # -- bundles

    async def clinic(self, clinic: ClinicRead) -> None:
        known = self.directory.clinics.get(clinic.key)
        record = dict(clinic.record)
        if known:
            record["identifiers"] = _identifiers(known, record)
            if known.get("timeZone"):
                record.pop("timeZone", None)
        await self.put_clinic(record | self.stated.get(clinic.key, {}), _label(clinic.key))

    async def put_clinic(self, record: Json, place: str) -> None:
        if clinic := await self.upsert("clinic", "/v1/clinics:upsert", record, place):
            _index(self.directory.clinics, clinic)

    async def practitioner(self, named: tuple[str, PractitionerRead]) -> None:
        file, practitioner = named
        roles: list[tuple[Key, Json]] = [(clinic, {}) for clinic in practitioner.clinics]
        record = practitioner.record | self.stated.get(practitioner.key, {})
        await self.put_practitioner(practitioner.key, record, roles, file)

    async def put_practitioner(self, key: Key, record: Json, roles: Iterable[tuple[Key, Json]], place: str) -> None:
        """Upserts what is known of a practitioner with this on top: a role keeps specialties of which only the other source knows."""
        known = self.directory.practitioners.get(key, {})
        merged = {name: known[name] for name in _KEPT_OF_PRACTITIONERS if name in known} | record
        merged["identifiers"] = _identifiers(known, record)
        by_clinic: dict[str, Json] = {role["clinicId"]: role for role in known.get("roles", [])}
        for clinic, more in roles:
            if clinic not in self.directory.clinics:
                self.report.note(
                    place, "Practitioner", "works at a clinic that is neither in the files nor on the server; left out"
                )
                continue
            identity = self.directory.clinics[clinic]["id"]
            by_clinic[identity] = {"clinicId": identity} | by_clinic.get(identity, {}) | more
        if by_clinic:
            merged["roles"] = list(by_clinic.values())
        if practitioner := await self.upsert("practitioner", "/v1/practitioners:upsert", merged, place):
            _index(self.directory.practitioners, practitioner)

    async def patient(self, named: tuple[str, PatientRead]) -> None:
        file, patient = named
        place = f"{file}: entry {patient.entry} (Patient)"
        clinics = [self.directory.clinics[key] for key in patient.clinics if key in self.directory.clinics]
        if len(clinics) < len(patient.clinics):
            self.report.note(
                place, "Patient", "was seen at a clinic that is neither in the files nor on the server; left out"
            )
        if not clinics:
            self.report.refuse(
                place, "patient", "none of its clinics is in the files or on the server; import them first"
            )
            return
        record = patient.record
        if "timeZone" not in record and (
            zone := next((one["timeZone"] for one in clinics if one.get("timeZone")), None)
        ):
            record = record | {"timeZone": zone, "timeZoneSource": "CLINIC"}
        ids = sorted(clinic["id"] for clinic in clinics)
        outcomes = []
        for start in range(0, len(ids), _MOST_CLINICS):
            body = {"patient": record, "clinicIds": ids[start : start + _MOST_CLINICS]}
            try:
                outcomes.append(_outcome(await self.client.post("/v1/patients:upsert", body)))
            except Refused as refused:
                self.report.refuse(place, "patient", str(refused))
                return
        self.report.took("patient", next((one for one in ("created", "changed") if one in outcomes), "unchanged"))


def _outcome(answer: Json) -> str:
    return "created" if answer.get("created") else "changed" if answer.get("changed") else "unchanged"


def _identifiers(known: Json, record: Json) -> list[Json]:
    """Those that the server has, in its order, and new ones behind: the first one is the key of the upsert and stays it."""
    found = {Key(one["system"], one["value"]): one for one in known.get("identifiers", [])}
    for one in record.get("identifiers", []):
        found.setdefault(Key(one["system"], one["value"]), one)
    return list(found.values())


async def load_clinics(
    source: Path | ClinicsFile,
    client: GatewayClient | None,
    report: Report,
    *,
    at_once: int = AT_ONCE,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> None:
    """Brings in a file on clinics: clinics and rooms, visit types, practitioners, then hours; a second run changes nothing.

    Raises ClinicsFileBroken, before anything is sent, if the file has a fault.
    """
    file = source if isinstance(source, ClinicsFile) else read_clinics(source)
    if dry_run or client is None:
        for kind, things in (
            ("clinic (file)", file.clinics),
            ("visit type", file.visit_types),
            ("practitioner (file)", file.practitioners),
        ):
            report.counts[kind, "to send"] += len(things)
        report.started = True
        return
    try:
        directory = await _Directory.read(client)
        loading = _Loading(client, report, directory, at_once, progress or Progress(disable=True), source=" (file)")
        await _FileLoading(loading, file).all()
    except Stopped as stopped:
        report.stopped = str(stopped)


@dataclass(slots=True)
class _FileLoading:
    loading: _Loading
    file: ClinicsFile

    async def all(self) -> None:
        loading, file = self.loading, self.file
        for entry in file.clinics:
            known = loading.directory.clinics.get(entry.key, {})
            record = entry.record | {"identifiers": _identifiers(known, entry.record)}
            if not known and "timeZone" not in record and (zone := zone_of(record.get("address", {}))):
                record["timeZone"] = zone[0]
            if not known and not ("timeZone" in record and "name" in record):
                loading.report.refuse(
                    self.place(entry.line), "clinic (file)", "is new and needs a name and a time_zone; write them"
                )
            else:
                await loading.put_clinic(record, self.place(entry.line))
        await self.rooms()
        await self.visit_types()
        for one in file.practitioners:
            if one.key not in loading.directory.practitioners and "name" not in one.record:
                loading.report.refuse(
                    self.place(one.line), "practitioner (file)", "is new and needs a family_name; write it"
                )
                continue
            roles = [
                (role.clinic, {"specialties": list(role.specialties)} if role.specialties else {}) for role in one.roles
            ]
            await loading.put_practitioner(one.key, one.record, roles, self.place(one.line))
        await self.schedules()

    def place(self, line: int) -> str:
        return f"{self.file.path.name}, line {line}"

    async def put(self, kind: str, path: str, known: Json | None, record: Json, place: str) -> None:
        """Creates what is not there, changes what differs by its etag, leaves the rest."""
        try:
            if known is None:
                await self.loading.client.post(path, record)
                self.loading.report.took(kind, "created")
                return
            changes = {name: value for name, value in record.items() if not same(value, known.get(name))}
            if changes:
                await self.loading.client.patch(f"{path}/{known['id']}", changes, known.get("etag", ""))
            self.loading.report.took(kind, "changed" if changes else "unchanged")
        except Refused as refused:
            self.loading.report.refuse(place, kind, str(refused))

    async def listed(self, path: str, name: str, filter_name: str, ids: Iterable[str]) -> list[Json]:
        """A collection filtered by any number of ids."""
        wanted, found = sorted(set(ids)), []
        for start in range(0, len(wanted), _MOST_CLINICS):
            found += await self.loading.client.all_of(path, name, {filter_name: wanted[start : start + _MOST_CLINICS]})
        return found

    async def visit_types(self) -> None:
        if self.file.visit_types:
            known = {one.get("code"): one for one in await self.loading.client.all_of("/v1/visitTypes", "visitTypes")}
            for entry in self.file.visit_types:
                await self.put(
                    "visit type", "/v1/visitTypes", known.get(entry.code), entry.record, self.place(entry.line)
                )

    async def rooms(self) -> None:
        wanted = [
            (self.loading.directory.clinics[entry.key]["id"], kind, name, entry.line)
            for entry in self.file.clinics
            if entry.key in self.loading.directory.clinics
            for kind, name in entry.rooms
        ]
        known = {
            (one["clinicId"], one.get("kind"), one.get("name")): one
            for one in await self.listed("/v1/resources", "resources", "clinicIds", (clinic for clinic, *_ in wanted))
        }
        for clinic, kind, name, line in wanted:
            record = {"clinicId": clinic, "kind": kind, "name": name}
            await self.put("room or device", "/v1/resources", known.get((clinic, kind, name)), record, self.place(line))

    async def schedules(self) -> None:
        """Hours of each practitioner at each clinic: the role's own, else the clinic's."""
        directory = self.loading.directory
        wanted: dict[tuple[str, str], tuple[tuple[Json, ...], int]] = {}
        for entry in self.file.clinics:
            if entry.hours and entry.key in directory.clinics:
                clinic = directory.clinics[entry.key]["id"]
                for practitioner in _once(directory.practitioners.values()):
                    if practitioner.get("active", True) and any(
                        role["clinicId"] == clinic for role in practitioner.get("roles", [])
                    ):
                        wanted[practitioner["id"], clinic] = (entry.hours, entry.line)
        for one in self.file.practitioners:
            self._own_hours(one, wanted)
        known = {
            (one.get("practitionerId"), one.get("clinicId")): one
            for one in await self.listed("/v1/schedules", "schedules", "clinicIds", (clinic for _, clinic in wanted))
        }

        async def put(item: tuple[tuple[str, str], tuple[tuple[Json, ...], int]]) -> None:
            pair, (hours, line) = item
            record: Json = {"weeklyHours": list(hours)}
            if pair not in known:
                record |= {"practitionerId": pair[0], "clinicId": pair[1]}
            await self.put("schedule", "/v1/schedules", known.get(pair), record, self.place(line))

        await self.loading.each("Hours", sorted(wanted.items(), key=lambda item: item[0]), put)

    def _own_hours(self, one: PractitionerEntry, wanted: dict[tuple[str, str], tuple[tuple[Json, ...], int]]) -> None:
        directory = self.loading.directory
        for role in one.roles:
            if role.hours is not None and one.key in directory.practitioners and role.clinic in directory.clinics:
                pair = directory.practitioners[one.key]["id"], directory.clinics[role.clinic]["id"]
                wanted[pair] = (role.hours, one.line)


def _once(records: Iterable[Json]) -> list[Json]:
    return list({record["id"]: record for record in records}.values())


def same(wanted: Any, found: Any) -> bool:
    """Whether two values of proto3 JSON say the same: defaults may be left out, hours are a set."""
    return bool(_plain({"value": wanted}) == _plain({"value": found}))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            name: plain
            for name, part in value.items()
            if (plain := _plain(part)) not in (None, "", 0, [], {}) or plain is True
        }
    if isinstance(value, list):
        parts = [_plain(part) for part in value]
        if parts and all(isinstance(part, dict) and "weekday" in part for part in parts):
            parts.sort(key=lambda part: (part["weekday"], part.get("start", "")))
        return parts
    return value

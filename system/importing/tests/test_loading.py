"""Imports through a real HTTP server on loopback: twice, broken, refused, interrupted, killed."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import typer
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from typer.testing import CliRunner

from system.importing.bundles import SYNTHEA, Key
from system.importing.cli import import_command
from system.importing.client import GatewayClient, Refused
from system.importing.clinics import ClinicEntry, ClinicsFile, read_clinics
from system.importing.load import NothingToImport, load_bundles, load_clinics
from system.importing.report import Report
from system.importing.tests.gateway import TOKEN, Gateway
from system.importing.tests.people import CLINIC, ENCOUNTER, PATIENT, bundle, resource, write
from system.importing.tests.test_clinics_file import EXAMPLE

ROOT = Path(__file__).parents[3]
pytestmark = pytest.mark.integration


@pytest_asyncio.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with Gateway().serve() as served:
        yield served


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six bundles: two clinics, two practitioners, of whom the first works at both."""
    folder = tmp_path / "bundles"
    folder.mkdir()
    for number in range(6):
        of_clinic = "clinic-a" if number % 2 else "clinic-b"
        npi = "1234567893" if number < 4 else "190"
        write(folder, f"{number}.json", bundle(number, of_clinic, npi))
    return folder


async def _load(gateway: Gateway, folder: Path, attempts: int = 3, stated: ClinicsFile | None = None) -> Report:
    report = Report()
    async with GatewayClient(gateway.url, TOKEN, attempts=attempts) as client:
        await load_bundles(folder, client, report, stated=stated, at_once=4)
    return report


async def _load_file(gateway: Gateway, file: ClinicsFile) -> Report:
    report = Report()
    async with GatewayClient(gateway.url, TOKEN, attempts=3) as client:
        await load_clinics(file, client, report)
    return report


def _counts(report: Report, outcome: str) -> dict[str, int]:
    return {kind: count for (kind, how), count in report.counts.items() if how == outcome}


async def test_all_comes_in_and_a_second_run_changes_nothing(gateway: Gateway, folder: Path) -> None:
    first = await _load(gateway, folder)
    assert first.exit_status() == 0
    assert _counts(first, "created") == {"clinic": 2, "practitioner": 2, "patient": 6}
    clinics = {one["identifiers"][0]["value"]: one["id"] for one in gateway.records["clinics"]}
    roles = {
        one["identifiers"][0]["value"]: [role["clinicId"] for role in one["roles"]]
        for one in gateway.records["practitioners"]
    }
    assert sorted(roles["1234567893"]) == sorted(clinics.values())
    assert {len(related) for related in gateway.relations.values()} == {1}
    writes = gateway.writes
    second = await _load(gateway, folder)
    assert _counts(second, "unchanged") == {"clinic": 2, "practitioner": 2, "patient": 6}
    assert _counts(second, "created") == _counts(second, "changed") == {}
    assert (gateway.writes, second.exit_status()) == (writes, 0)


async def test_only_what_changed_is_changed(gateway: Gateway, folder: Path) -> None:
    await _load(gateway, folder)
    content = json.loads((folder / "3.json").read_text())
    resource(content, PATIENT)["name"][1]["family"] = "Neu"
    resource(content, ENCOUNTER)["serviceProvider"] = {"reference": f"Organization?identifier={SYNTHEA}|clinic-b"}
    write(folder, "3.json", content)
    report = await _load(gateway, folder)
    assert _counts(report, "changed") == {"patient": 1}
    assert sorted(map(len, gateway.relations.values())) == [1, 1, 1, 1, 1, 2]


async def test_a_broken_file_is_reported_and_the_others_go_in(gateway: Gateway, folder: Path) -> None:
    content = json.loads((folder / "2.json").read_text())
    resource(content, PATIENT)["birthDate"] = "yesterday"
    write(folder, "2.json", content)
    (folder / "9.json").write_text("{")
    report = await _load(gateway, folder)
    assert [(one.file, one.path) for one in report.broken] == [
        ("2.json", "entry[0].resource.birthDate"),
        ("9.json", "$"),
    ]
    assert (_counts(report, "created")["patient"], report.files, report.exit_status()) == (5, 7, 1)
    assert "MRN-2" not in json.dumps(gateway.records)


async def test_nothing_is_sent_before_all_files_are_read(gateway: Gateway, folder: Path) -> None:
    report = Report()
    async with GatewayClient(gateway.url, TOKEN) as client:
        await load_bundles(folder, client, report, dry_run=True)
    assert not gateway.calls
    assert _counts(report, "to send") == {"clinic": 2, "practitioner": 2, "patient": 6}


async def test_one_record_number_with_two_records_breaks_the_later_file(gateway: Gateway, folder: Path) -> None:
    twin = bundle(1, "clinic-a")
    write(folder, "7-same.json", twin)
    resource(twin, PATIENT)["gender"] = "male"
    write(folder, "8-other.json", twin)
    report = await _load(gateway, folder)
    assert [one.file for one in report.broken] == ["8-other.json"]
    assert "another record in 1.json" in report.broken[0].what
    assert _counts(report, "created")["patient"] == 6


async def test_files_that_differ_in_a_clinic_make_a_note_and_no_flapping(gateway: Gateway, folder: Path) -> None:
    content = json.loads((folder / "5.json").read_text())
    resource(content, CLINIC)["name"] = "Another name"
    write(folder, "5.json", content)
    report = await _load(gateway, folder)
    assert ("Organization", "differs from the one in an earlier file; the earlier one is taken") in report.notes
    assert _counts(await _load(gateway, folder), "changed") == {}


async def test_a_refused_record_is_reported_with_its_reason_and_the_others_go_in(
    gateway: Gateway, folder: Path
) -> None:
    def refuse_once(request: Request) -> Response | None:
        if request.url.path != "/v1/patients:upsert" or gateway.calls["POST patients:upsert"] != 2:
            return None
        detail = {"reason": "IDENTIFIER_TAKEN", "metadata": {"field": "patient.identifiers"}}
        return JSONResponse({"error": {"message": "is taken", "details": [detail]}}, 409)

    gateway.before = refuse_once
    report = await _load(gateway, folder)
    (refused,) = report.refused
    assert re.fullmatch(r"\d\.json: entry 0 \(Patient\)", refused.place)
    assert refused.why == "409 IDENTIFIER_TAKEN: is taken (patient.identifiers)"
    assert (_counts(report, "created")["patient"], report.exit_status()) == (5, 1)


async def test_a_patient_whose_clinic_is_nowhere_is_refused(gateway: Gateway, folder: Path) -> None:
    content = json.loads((folder / "0.json").read_text())
    resource(content, ENCOUNTER)["serviceProvider"] = {"reference": "Organization?identifier=urn:x|nowhere"}
    write(folder, "0.json", content)
    report = await _load(gateway, folder)
    assert [one.place for one in report.refused] == ["0.json: entry 0 (Patient)"]
    assert "import them first" in report.refused[0].why


async def test_a_patient_without_coordinates_and_state_has_the_clinics_zone(gateway: Gateway, folder: Path) -> None:
    content = json.loads((folder / "0.json").read_text())
    resource(content, PATIENT)["address"] = [{"city": "Somewhere"}]
    write(folder, "0.json", content)
    await _load(gateway, folder)
    (patient,) = [one for one in gateway.records["patients"] if one["identifiers"][0]["value"] == "MRN-0"]
    assert (patient["timeZone"], patient["timeZoneSource"]) == ("America/New_York", "CLINIC")


async def test_busy_and_lost_answers_are_tried_again_with_one_key_and_one_effect(
    gateway: Gateway, folder: Path
) -> None:
    keys: list[str] = []

    def busy(request: Request) -> Response | None:
        if key := request.headers.get("idempotency-key"):
            keys.append(key)
            if keys.count(key) == 1:
                return Response(status_code=429 if len(keys) % 2 else 503, headers={"retry-after": "0"})
        return None

    def lose(request: Request) -> Response | None:
        lost = keys.count(request.headers["idempotency-key"]) == 2
        return PlainTextResponse("bad gateway", 502, headers={"retry-after": "0"}) if lost else None

    gateway.before, gateway.after = busy, lose
    report = await _load(gateway, folder, attempts=5)
    assert report.exit_status() == 0
    assert _counts(report, "created") == {"clinic": 2, "practitioner": 2, "patient": 6}
    assert {keys.count(key) for key in keys} == {3}
    assert gateway.writes == 10
    await _load(gateway, folder, attempts=5)
    assert len(set(keys)) == 20  # a second run's calls are no replays of the first one's


async def test_a_gateway_that_goes_away_ends_the_run_and_the_next_one_heals(gateway: Gateway, folder: Path) -> None:
    def gone(request: Request) -> Response | None:
        away = gateway.calls["POST patients:upsert"] > 2
        return Response(status_code=503, headers={"retry-after": "0"}) if away else None

    gateway.before = gone
    report = await _load(gateway, folder)
    assert "answers 503 again and again" in report.stopped
    assert (report.exit_status(), _counts(report, "created")["patient"]) == (1, 2)
    gateway.before = lambda request: None
    healed = await _load(gateway, folder)
    assert healed.exit_status() == 0
    assert (_counts(healed, "created"), _counts(healed, "unchanged")["patient"]) == ({"patient": 4}, 2)


async def test_a_token_that_is_not_taken_or_may_not_import_stops_at_once(gateway: Gateway, folder: Path) -> None:
    report = Report()
    async with GatewayClient(gateway.url, "another") as client:
        await load_bundles(folder, client, report)
    assert ("does not take the token" in report.stopped, report.exit_status()) == (True, 2)
    gateway.before = lambda request: (
        JSONResponse({"error": {"message": "no permission"}}, 403) if request.method == "POST" else None
    )
    report = await _load(gateway, folder)
    assert ("may not import (no permission)" in report.stopped, report.exit_status()) == (True, 2)


async def test_an_address_where_no_gateway_answers_could_not_start(gateway: Gateway, folder: Path) -> None:
    gateway.before = lambda request: PlainTextResponse("<html>hello</html>")
    report = await _load(gateway, folder)
    assert ("no gateway of this system" in report.stopped, report.exit_status()) == (True, 2)
    report = Report()
    async with GatewayClient("http://127.0.0.1:9", TOKEN, attempts=2) as client:
        await load_bundles(folder, client, report)
    assert ("can't be reached" in report.stopped, report.exit_status()) == (True, 2)


@pytest.mark.parametrize("name", ["missing", "empty"])
async def test_a_folder_without_bundles_could_not_start(gateway: Gateway, tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(NothingToImport):
        await _load(gateway, tmp_path / name)


async def test_a_derived_zone_never_replaces_one_that_was_stated(gateway: Gateway, folder: Path) -> None:
    await _load(gateway, folder)
    gateway.records["clinics"][0]["timeZone"] = "America/Denver"
    report = await _load(gateway, folder)
    assert _counts(report, "changed") == {}
    assert gateway.records["clinics"][0]["timeZone"] == "America/Denver"


async def test_what_the_directory_knows_besides_survives_the_next_run(gateway: Gateway, folder: Path) -> None:
    await _load(gateway, folder)
    practitioner = gateway.records["practitioners"][0]
    practitioner |= {"languages": ["es"], "licensedStates": ["MA"]}
    practitioner["roles"][0]["specialties"] = [{"system": "urn:s", "code": "1", "display": "Heart"}]
    assert _counts(await _load(gateway, folder), "changed") == {}


async def test_lists_are_read_over_all_their_pages(gateway: Gateway, folder: Path) -> None:
    gateway.page = 1
    await _load(gateway, folder)
    assert _counts(await _load(gateway, folder), "unchanged") == {"clinic": 2, "practitioner": 2, "patient": 6}
    assert gateway.calls["GET clinics"] == 3


def _sample_clinics(folder: Path) -> None:
    """Makes the folder's two clinics those that the example file names."""
    names = {"clinic-a": "f71ce1a9-cca7-3295-9a1e-c88ac3479b6f", "clinic-b": "6be05ccf-ef94-341f-a2a3-1cf9bfde1b18"}
    for path in folder.iterdir():
        text = path.read_text()
        for ours, theirs in names.items():
            text = text.replace(ours, theirs)
        path.write_text(text)


async def test_the_file_on_clinics_brings_hours_visit_types_and_rooms_and_twice_changes_nothing(
    gateway: Gateway, folder: Path
) -> None:
    _sample_clinics(folder)
    file = read_clinics(EXAMPLE)
    await _load(gateway, folder)
    first = await _load_file(gateway, file)
    assert first.exit_status() == 0, first.refused
    assert _counts(first, "created") == {
        "clinic (file)": 1,
        "room or device": 5,
        "visit type": 3,
        "practitioner (file)": 1,
        # The bundles' two practitioners at two clinics each; one of them at the new one too, beside a new one.
        "schedule": 6,
    }
    assert _counts(first, "changed") == {"clinic (file)": 2, "practitioner (file)": 1}
    hours = {len(one["weeklyHours"]) for one in gateway.records["schedules"]}
    assert hours == {1, 5, 10}
    writes = gateway.writes
    second = await _load_file(gateway, file)
    assert _counts(second, "created") == _counts(second, "changed") == {}
    bundles_again = await _load(gateway, folder, stated=file)
    assert _counts(bundles_again, "changed") == {}
    assert gateway.writes == writes


async def test_only_what_differs_is_patched_by_its_etag(gateway: Gateway, folder: Path) -> None:
    _sample_clinics(folder)
    file = read_clinics(EXAMPLE)
    await _load(gateway, folder)
    await _load_file(gateway, file)
    gateway.records["visitTypes"][0]["durationMinutes"] = 45
    gateway.records["schedules"][0]["weeklyHours"] = []
    report = await _load_file(gateway, file)
    assert _counts(report, "changed") == {"visit type": 1, "schedule": 1}
    assert gateway.calls["PATCH visitTypes"] == gateway.calls["PATCH schedules"] == 1


async def test_one_run_with_both_takes_the_files_word_over_the_bundles(gateway: Gateway, folder: Path) -> None:
    record = {"name": "A better name", "timeZone": "America/Denver"}
    key = Key(SYNTHEA, "clinic-a")
    entry = ClinicEntry(key, {"identifiers": [{"system": key.system, "value": key.value}], **record}, (), (), 2)
    file = ClinicsFile(Path("c.csv"), (entry,))
    await _load(gateway, folder, stated=file)
    writes = gateway.writes
    await _load_file(gateway, file)
    await _load(gateway, folder, stated=file)
    assert gateway.writes == writes
    (clinic,) = [one for one in gateway.records["clinics"] if one["identifiers"][0]["value"] == "clinic-a"]
    assert (clinic["name"], clinic["timeZone"]) == ("A better name", "America/Denver")


async def test_a_new_clinic_without_name_or_zone_is_refused_with_its_line(gateway: Gateway) -> None:
    entry = ClinicEntry(Key("urn:x", "1"), {"identifiers": [{"system": "urn:x", "value": "1"}], "name": "X"}, (), (), 4)
    report = await _load_file(gateway, ClinicsFile(Path("c.csv"), (entry,)))
    assert [(one.place, one.why) for one in report.refused] == [
        ("c.csv, line 4", "is new and needs a name and a time_zone; write them")
    ]


async def test_an_etag_that_does_not_hold_is_refused(gateway: Gateway) -> None:
    async with GatewayClient(gateway.url, TOKEN) as client:
        made = await client.post("/v1/visitTypes", {"code": "x", "name": "X"})
        with pytest.raises(Refused) as caught:
            await client.patch(f"/v1/visitTypes/{made['id']}", {"name": "Y"}, "0")
    assert (caught.value.code, caught.value.reason) == (412, "ETAG_MISMATCH")


# -- the command


app = typer.Typer()
app.command()(import_command)


def _command(*arguments: str, url: str = "") -> list[str]:
    code = "import typer; from system.importing.cli import import_command as c; a = typer.Typer(); a.command()(c); a()"
    return [sys.executable, "-c", code, *arguments, *(["--url", url, "--token", TOKEN] if url else [])]


async def _run(*arguments: str, url: str) -> tuple[int | None, str]:
    process = await asyncio.create_subprocess_exec(
        *_command(*arguments, url=url), cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}", "COLUMNS": "120"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_killed_in_the_middle_and_run_again_all_is_in_once(gateway: Gateway, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(60):
        write(folder, f"{number:02}.json", bundle(number))
    gateway.delay = 0.05
    process = await asyncio.create_subprocess_exec(
        *_command(str(folder), "--at-once", "2", url=gateway.url), cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'gen'}"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    async with asyncio.timeout(30):
        while len(gateway.records["patients"]) < 10:
            await asyncio.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    assert 10 <= len(gateway.records["patients"]) < 60
    gateway.delay = 0.0
    status, output = await _run(str(folder), url=gateway.url)
    assert status == 0, output
    assert len(gateway.records["patients"]) == 60
    assert gateway.writes == 62
    writes = gateway.writes
    status, output = await _run(str(folder), url=gateway.url)
    assert (status, gateway.writes) == (0, writes)
    assert re.search(r"patient +│ 0 +│ 0 +│ 60 +│ 0", output)


async def test_the_command_says_what_it_did_and_no_value_of_a_patient(gateway: Gateway, folder: Path) -> None:
    content = json.loads((folder / "2.json").read_text())
    resource(content, PATIENT)["gender"] = "Zilda"
    write(folder, "2.json", content)
    status, output = await _run(str(folder), "--clinics", str(EXAMPLE), url=gateway.url)
    assert status == 1
    assert "broken 2.json: entry 0 (Patient): entry[0].resource.gender: must be one of" in output
    assert re.search(r"patient +│ 5 +│ 0 +│ 0 +│ 0", output)
    assert re.search(r"Patient.identifier SS +│ 5", output)
    for value in ("Zilda", "Beispiel", "MRN-", "999-00", "1980-02", "555-010", "example.org"):
        assert value not in output


def test_the_command_needs_something_to_import_a_token_and_a_whole_file(tmp_path: Path, folder: Path) -> None:
    run = CliRunner(env={"CARE_TOKEN": "", "CARE_URL": ""})
    assert run.invoke(app, []).exit_code == 2
    assert "CARE_TOKEN" in run.invoke(app, [str(folder)]).output
    (tmp_path / "c.csv").write_text("identifier,time_zone\na,Mars\n")
    told = run.invoke(app, [str(folder), "--clinics", str(tmp_path / "c.csv"), "--dry-run"])
    assert told.exit_code == 2
    assert "c.csv, line 2, time_zone" in told.output
    assert run.invoke(app, [str(tmp_path / "none"), "--dry-run"]).exit_code == 2
    dry = run.invoke(app, [str(folder), "--dry-run"])
    assert (dry.exit_code, "Would be sent" in dry.output) == (0, True)


@pytest.mark.skipif(
    "CARE_SYNTHEA" not in os.environ, reason="CARE_SYNTHEA names no folder with Synthea's sample bundles"
)
async def test_the_real_folder_goes_in_and_a_second_run_changes_nothing(gateway: Gateway) -> None:
    folder, file = Path(os.environ["CARE_SYNTHEA"]), read_clinics(EXAMPLE)
    first = await _load(gateway, folder, stated=file)
    assert (first.exit_status(), first.refused) == (0, [])
    assert _counts(first, "created") == {"clinic": 27, "practitioner": 27, "patient": 21}
    assert sum(map(len, gateway.relations.values())) == 33
    from_file = await _load_file(gateway, file)
    assert from_file.exit_status() == 0, from_file.refused
    writes = gateway.writes
    assert _counts(await _load(gateway, folder, stated=file), "unchanged") == _counts(first, "created")
    assert _counts(await _load_file(gateway, file), "changed") == {}
    assert gateway.writes == writes

"""Another system's visits through a real HTTP server on loopback: every row is accounted for, and no value is told."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from typer.testing import CliRunner

from system.cli import app
from system.importing.client import GatewayClient
from system.importing.tests.gateway import TOKEN, Gateway
from system.importing.visits_file import FileBroken, Reading
from system.importing.visits_load import VisitsReport, load_visits

HEADER = "identifier,patient,practitioner,clinic,visit_type,start,duration_minutes\n"


@pytest_asyncio.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with Gateway().serve() as served:
        yield served


class Calendar:
    """In place of scheduling: what is there by identifier, who is where at which minute."""

    def __init__(self) -> None:
        self.there: dict[str, str] = {}

    def __call__(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        practitioner, patient = body["practitionerIdentifier"]["value"], body["patientIdentifier"]["value"]
        answer = {
            "status": body["status"], "startTime": body["startTime"], "practitionerId": practitioner, "patientId": patient,
            "endTime": body["startTime"].replace(":00Z", ":01Z"),
        }  # fmt: skip
        if patient == "nobody":
            details = [{"reason": "PATIENT_UNKNOWN", "metadata": {"field": "patient_identifier"}}]
            return 400, {"error": {"message": "There is no such patient.", "details": details}}
        if body["startTime"] < "2026" and body["status"] == "BOOKED":
            return 400, {"error": {"message": "The visit is over.", "details": [{"reason": "STATUS_UNFIT"}]}}
        if body["identifier"] in self.there:
            return 200, answer | {
                "outcome": "ALREADY_THERE",
                "differs": self.there[body["identifier"]] != body["startTime"],
            }
        if f"{practitioner} {body['startTime']}" in self.there.values():
            return 409, {"error": {"message": "This time is taken.", "details": [{"reason": "SLOT_TAKEN"}]}}
        if not body.get("validateOnly"):
            self.there[body["identifier"]] = f"{practitioner} {body['startTime']}"
        return 200, answer | {"outcome": "IMPORTED", "outsideHours": practitioner == "9"}


async def bring(gateway: Gateway, file: Path, **more: Any) -> VisitsReport:
    report = VisitsReport()
    async with GatewayClient(gateway.url, TOKEN, attempts=2) as client:
        await load_visits(file, Reading("old"), client, report, **more)
    report.rows.sort(key=lambda row: (row.line, row.number))
    return report


def outcomes(report: VisitsReport) -> list[tuple[int, str, str]]:
    return [(row.line, row.outcome, row.reason or row.what) for row in report.rows]


async def test_a_dry_run_says_of_each_row_what_the_import_then_does(gateway: Gateway, tmp_path: Path) -> None:
    calendar = gateway.visits = Calendar()
    file = tmp_path / "visits.csv"
    file.write_text(
        HEADER + "A1,p1,5,m,v,2027-03-02T09:00Z,\n"  # fine
        "A2,nobody,5,m,v,2027-03-02T10:00Z,\n"
        "A3,p3,5,m,v,2027-03-02T09:00Z,\n"  # where A1 is
        "A4,p4,9,m,v,2027-03-02T09:00Z,\n"
        "A5,p5,5,m,v,2019-03-02T09:00Z,\n"
        "A6,p5,5,m,v,,\n"
    )
    dry = await bring(gateway, file, dry_run=True)
    assert calendar.there == {} and dry.exit_status() == 1
    real = await bring(gateway, file)
    assert outcomes(dry) == outcomes(real) == [
        (2, "imported", ""), (3, "refused", "PATIENT_UNKNOWN"), (4, "refused", "SLOT_TAKEN"),
        (5, "imported", "outside of the practitioner's hours"), (6, "refused", "STATUS_UNFIT"),
        (7, "refused", "VALUE_MISSING"),
    ]  # fmt: skip
    assert real.rows[1].field == "patient_identifier"
    again = await bring(gateway, file, past="FULFILLED")
    assert [row.outcome for row in again.rows][::3] == ["already there", "already there"]
    assert again.rows[4].outcome == "imported"


async def test_a_broken_file_sends_nothing(gateway: Gateway, tmp_path: Path) -> None:
    file = tmp_path / "visits.csv"
    file.write_text(HEADER + "A1,p1,5,m,v,2027-03-02T09:00Z,\n" + 'A2,"p2\n')
    with pytest.raises(FileBroken, match="is no CSV"):
        await bring(gateway, file)
    assert not gateway.calls


async def test_a_gateway_that_goes_away_stops_it_and_a_second_run_goes_on(gateway: Gateway, tmp_path: Path) -> None:
    calendar = gateway.visits = Calendar()
    file = tmp_path / "visits.csv"
    file.write_text(HEADER + "".join(f"A{n},p{n},{n},m,v,2027-03-02T09:00Z,\n" for n in range(20)))
    gateway.visits = lambda body: calendar(body) if len(calendar.there) < 5 else (503, {})
    stopped = await bring(gateway, file, at_once=2)
    assert "again and again" in stopped.stopped and stopped.exit_status() == 1
    gateway.visits = calendar
    whole = await bring(gateway, file)
    assert len(calendar.there) == 20 and whole.exit_status() == 0
    assert [row.line for row in whole.rows] == list(range(2, 22))


async def test_the_command_tells_lines_and_reasons_and_no_value(gateway: Gateway, tmp_path: Path) -> None:
    gateway.visits = Calendar()
    file, told = tmp_path / "visits.csv", tmp_path / "told.csv"
    file.write_text("Id,MRN,When\nSECRET1,Zilda,2027-03-02T09:00Z\nSECRET2,nobody,2027-03-02T10:00Z\n")
    values = [f"--set={pair}" for pair in ("practitioner=5", "clinic=m", "visit_type=v")]
    columns = [f"--column={pair}" for pair in ("identifier=Id", "patient=MRN", "start=When")]
    arguments = ["import", "calendar", str(file), "--source", "old", *values, *columns, "--report", str(told)]
    runner = CliRunner(env={"CARE_URL": gateway.url, "CARE_TOKEN": TOKEN, "COLUMNS": "120", "CARE_DATA": str(tmp_path)})
    result = await asyncio.to_thread(runner.invoke, app, arguments)
    assert result.exit_code == 1, result.output
    assert "line 3: PATIENT_UNKNOWN (patient_identifier): There is no such patient." in result.output
    rows = told.read_text().splitlines()
    assert rows[1].startswith("2,,imported,") and rows[2].startswith("3,,refused,PATIENT_UNKNOWN,patient_identifier,")
    for value in ("SECRET", "Zilda", "nobody", "2027-03"):
        assert value not in result.output + told.read_text()


def test_the_command_says_what_it_needs(tmp_path: Path) -> None:
    run = CliRunner(env={"CARE_TOKEN": "", "CARE_URL": "", "CARE_DATA": str(tmp_path)})
    assert run.invoke(app, ["import", "calendar", "x.csv", "--source", "old"]).exit_code == 2
    given = ["import", "calendar", "x.csv", "--source", "old", "--token", "t"]
    assert "identifier, patient" in run.invoke(app, [*given, "--column", "mrn=x"]).output
    assert "No such file" in run.invoke(app, given).output
    assert run.invoke(app, [*given, "--past", "arrived"]).exit_code == 2
    # Before anything is sent: it was found out when all was in, and what had become of it was lost.
    there = tmp_path / "x.csv"
    there.write_text("identifier\n")
    nowhere = run.invoke(
        app, ["import", "calendar", str(there), *given[3:], "--report", str(tmp_path / "no" / "r.csv")]
    )
    assert (nowhere.exit_code, "No such file" in nowhere.output) == (2, True)
    assert "--clinics" in run.invoke(app, ["import", "bundles", "--help"]).output
    assert "--clinics" in run.invoke(app, ["import"]).output  # short for bundles

"""The calendar of another system comes in through gateway, scheduling and patients: a dry run, the import, and again."""

from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from system.importing.client import GatewayClient
from system.importing.hours import HoursReport, load_hours
from system.importing.visits_file import Reading
from system.importing.visits_load import VisitsReport, load_visits
from system.run import System

pytestmark = pytest.mark.integration


async def test_a_calendar_is_taken_over_once(systems: Callable[..., Awaitable[System]], tmp_path: Path) -> None:
    system = await systems(kafka=False)
    async with GatewayClient(system.url, system.token("coordinator")) as staff:
        patients = [
            one
            for one in await staff.all_of("/v1/patients", "patients")
            if one["identifiers"] and not one.get("deceased")
        ]
        first, second = patients[:2]
        named = first["identifiers"][0]
        schedule = (await staff.all_of("/v1/schedules", "schedules"))[0]
        visit_type = next(
            one for one in await staff.all_of("/v1/visitTypes", "visitTypes") if not one.get("resourceKinds")
        )
    # A Sunday night, where nothing else stands.
    night = datetime.now(UTC) + timedelta(days=200)
    night = (night + timedelta(days=6 - night.weekday())).replace(hour=3, minute=0, second=0, microsecond=0)
    file = tmp_path / "calendar.csv"
    lines = [
        f"V1,{named['value']},{named['system']},{night:%Y-%m-%dT%H:%MZ},",
        f"V2,{second['id']},id,{night + timedelta(days=1):%Y-%m-%dT%H:%MZ},",
        f"V3,{second['id']},id,{night:%Y-%m-%dT%H:%MZ},",  # where V1 is
        f"V4,{second['id']},id,2024-05-06T14:00Z,noshow",
        f"V5,nobody,{named['system']},{night:%Y-%m-%dT%H:%MZ},",
    ]
    file.write_text("identifier,patient,patient_system,start,status\n" + "\n".join(lines) + "\n")
    values = {
        "practitioner": schedule["practitionerId"], "practitioner_system": "id", "clinic": schedule["clinicId"],
        "clinic_system": "id", "visit_type": visit_type["code"],
    }  # fmt: skip
    reading = Reading("legacy", values=values)
    async with GatewayClient(system.url, system.token("integration_client")) as client:
        told = []
        for dry_run in (True, False, False):
            report = VisitsReport()
            await load_visits(file, reading, client, report, dry_run=dry_run)
            assert not report.stopped
            told.append({row.line: (row.outcome, row.reason) for row in report.rows})
    dry, real, again = told
    assert dry == real == {
        2: ("imported", ""), 3: ("imported", ""), 4: ("refused", "SLOT_TAKEN"), 5: ("imported", ""),
        6: ("refused", "PATIENT_UNKNOWN"),
    }  # fmt: skip
    assert Counter(again.values()) == {
        ("already there", ""): 3,
        ("refused", "SLOT_TAKEN"): 1,
        ("refused", "PATIENT_UNKNOWN"): 1,
    }
    async with GatewayClient(system.url, system.token("coordinator")) as staff:
        visits = await staff.all_of("/v1/appointments", "appointments", {"patientIds": [first["id"], second["id"]]})
    mine = {one["identifiers"][0]["value"]: one["status"] for one in visits if one.get("sourceSystem") == "legacy"}
    assert mine == {"V1": "BOOKED", "V2": "BOOKED", "V4": "NOSHOW"}


async def test_weekly_hours_come_out_of_a_file_and_whom_they_leave_outside_is_told_before(
    systems: Callable[..., Awaitable[System]], tmp_path: Path
) -> None:
    system = await systems(kafka=False)
    async with GatewayClient(system.url, system.token("coordinator")) as staff:
        schedules = await staff.all_of("/v1/schedules", "schedules")
        ahead = {"startTimeFrom": [f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"], "statuses": ["BOOKED"]}
        visits = await staff.all_of("/v1/appointments", "appointments", ahead)
        visit = [one for one in visits if not one.get("sourceSystem") and not one.get("sessionId")][-1]
    seat = visit["practitionerId"], visit["clinicId"]
    (before,) = (one for one in schedules if (one["practitionerId"], one["clinicId"]) == seat)
    file = tmp_path / "hours.csv"
    header = (
        "practitioner,practitioner_system,clinic,clinic_system,weekday,from,to,visit_types,valid_until,staff_only\n"
    )
    file.write_text(header + f"{seat[0]},id,{seat[1]},id,Mo-Su,03:00,03:30,,,yes\n")

    async def run(*, dry_run: bool = False) -> HoursReport:
        report = HoursReport()
        async with GatewayClient(system.url, system.token("integration_client")) as client:
            await load_hours(file, client, report, dry_run=dry_run)
        return report

    dry = await run(dry_run=True)
    assert [(one.outcome, one.lines) for one in dry.seats] == [("changed", (2,))]
    assert visit["id"] in [appointment_id for appointment_id, _ in dry.seats[0].visits]
    async with GatewayClient(system.url, system.token("integration_client")) as client:
        (now,) = (one for one in await client.all_of("/v1/schedules", "schedules") if one["id"] == before["id"])
        assert now == before
    real = await run()
    assert real.seats == dry.seats and real.exit_status() == 0
    assert [(one.outcome, one.left) for one in (await run()).seats] == [("unchanged", 0)]
    async with GatewayClient(system.url, system.token("coordinator")) as staff:
        path = f"/v1/schedules/{before['id']}/strandedAppointments"
        assert visit["id"] in [one["id"] for one in (await staff._call("GET", path))["appointments"]]
    # Nothing is set where one line is wrong; and what was there comes back.
    file.write_text(
        file.read_text() + f"nobody,,{seat[1]},id,Mo,09:00,10:00,,,\n{seat[0]},id,{seat[1]},id,Mo,03:15,04:00,dance,,\n"
    )
    wrong = await run()
    assert sorted(wrong.problems) == [(3, "there is no such practitioner"), (4, "there is no such visit type")]
    assert wrong.seats == [] and wrong.exit_status() == 1
    file.write_text(
        file.read_text().replace("nobody,,", f"{seat[0]},id,").replace("dance", "").replace("09:00", "03:20")
    )
    overlapping = await run()
    assert [line for line, _ in overlapping.problems] == [2] and "HOURS_OVERLAP" in overlapping.problems[0][1]
    async with GatewayClient(system.url, system.token("integration_client")) as client:
        (now,) = (one for one in await client.all_of("/v1/schedules", "schedules") if one["id"] == before["id"])
        await client.patch(f"/v1/schedules/{before['id']}", {"weeklyHours": before["weeklyHours"]}, now["etag"])

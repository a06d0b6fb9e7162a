"""The calendar of another system comes in through gateway, scheduling and patients: a dry run, the import, and again."""

from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from system.importing.client import GatewayClient
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

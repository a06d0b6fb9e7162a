"""A small practice in an otherwise empty system: one clinic that never closes, for tests that book very much."""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asyncpg

from services.notifications.reactions import SHIPPED
from system.importing.client import GatewayClient
from system.importing.load import load_clinics
from system.importing.report import Report
from system.issuer import ISSUER, TENANT_ID, staff_subject
from system.run import System, bootstrap

ZONE = "Etc/UTC"
CARDIOLOGY = {"system": "http://snomed.info/sct", "code": "394579002", "display": "Cardiology"}
MINUTES = 15
_SYSTEM = "urn:care:test"


@dataclass(frozen=True)
class Slot:
    """Time of one practitioner for one patient; no two of them share either at once."""

    start: datetime
    practitioner_id: str
    patient_id: str

    @property
    def wanted(self) -> dict[str, str]:
        """As a request says it."""
        return {
            "practitionerId": self.practitioner_id,
            "startTime": self.start.isoformat().replace("+00:00", "Z"),
        }


@dataclass
class Practice:
    """What the tests need of it."""

    system: System
    clinic_id: str = ""
    announced: str = ""
    """Visit type that is confirmed by a message at booking."""
    quiet: str = ""
    """Visit type with reminders before the visit only: a message costs ten times as much as a plan."""
    practitioners: list[str] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    reached: set[str] = field(default_factory=set)
    """Patients with consent to e-mail; their visits are announced."""
    referrals: dict[str, str] = field(default_factory=dict)
    """Patient to an accepted referral."""

    @property
    def token(self) -> str:
        """The coordinator's."""
        return self.system.token("coordinator")

    def slots(self, first_day: int = 7, *, of: str = "") -> Iterator[Slot]:
        """Slots from so many days ahead on: all practitioners at each time, each with another patient, or those `of` one."""
        start = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=first_day)
        number = 0
        while True:
            for place, patient in enumerate(self.patients):
                if of in ("", patient):
                    yield Slot(start, self.practitioners[(place + number) % len(self.practitioners)], patient)
            start += timedelta(minutes=MINUTES)
            number += 1

    def booking(self, slot: Slot) -> dict[str, Any]:
        """The body of a direct booking."""
        return {
            "patientId": slot.patient_id,
            "visitTypeId": self.announced if slot.patient_id in self.reached else self.quiet,
            "clinicId": self.clinic_id,
            **slot.wanted,
        }


async def open_practice(system: System, *, size: int = 24, reached: int = 0, referred: bool = False) -> Practice:
    """Fill a system that was started with `empty=True`: so many practitioners and patients, the first `reached` with consent to e-mail."""
    await bootstrap(system.database_url("patients"), administrator=True)
    practice = Practice(system)
    async with GatewayClient(system.url, system.token("admin")) as admin:
        await _directory(practice, admin, size)
        await admin.post(
            "/v1/staff",
            {
                "issuer": ISSUER,
                "subject": staff_subject("coordinator"),
                "name": {"familyName": "Castellane", "givenNames": ["Imani"]},
                "roles": ["coordinator"],
                "clinicIds": [practice.clinic_id],
            },
        )
    async with GatewayClient(system.url, practice.token) as coordinator:
        for place in range(size):
            practice.patients.append(await _patient(practice, coordinator, place, place < reached))
        practice.reached = set(practice.patients[:reached])
        if referred:
            for patient in practice.patients:
                practice.referrals[patient] = await _referral(practice, coordinator, patient)
    return practice


async def _directory(practice: Practice, admin: GatewayClient, size: int) -> None:
    stated = {
        "clinics": [
            {
                "identifier_system": _SYSTEM,
                "identifier": "practice",
                "name": "Night and Day Clinic",
                "time_zone": ZONE,
                "hours": ["Mo-Su 00:00-12:00", "Mo-Su 12:00-00:00"],
                "specialties": ["394579002|Cardiology"],
            }
        ],
        "visit_types": [
            {
                "code": code,
                "name": "Short visit",
                "duration_minutes": MINUTES,
                "modality": "IN_PERSON",
                "start_grid_minutes": MINUTES,
            }
            for code in ("announced", "quiet")
        ],
        "practitioners": [
            {
                "identifier_system": _SYSTEM,
                "identifier": f"practitioner-{number}",
                "family_name": f"Muster{number}",
                "given_names": ["Ole"],
                "roles": [
                    {"clinic_system": _SYSTEM, "clinic": "practice", "specialties": ["394579002|Cardiology"]},
                ],
            }
            for number in range(size)
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clinics.json"
        file.write_text(json.dumps(stated))
        report = Report()
        await load_clinics(file, admin, report)
    assert not report.stopped and not report.refused, report
    (clinic,) = await admin.all_of("/v1/clinics", "clinics")
    practice.clinic_id = clinic["id"]
    kinds = {one["code"]: one["id"] for one in await admin.all_of("/v1/visitTypes", "visitTypes")}
    practice.announced, practice.quiet = kinds["announced"], kinds["quiet"]
    practice.practitioners = [one["id"] for one in await admin.all_of("/v1/practitioners", "practitioners")]
    assert len(practice.practitioners) == size
    settings = {**SHIPPED, "offsets": [one for one in SHIPPED["offsets"] if one["kind"] != "at_booking"]}
    connection = await asyncpg.connect(practice.system.database_url("notifications").replace("+asyncpg", ""))
    try:
        await connection.execute(
            "INSERT INTO policy (tenant_id, key, scope, scope_id, version, settings)"
            " VALUES ($1, 'reminders', 'visit_type', $2, 1, $3)",
            TENANT_ID,
            practice.quiet,
            json.dumps(settings),
        )
    finally:
        await connection.close()


async def _patient(practice: Practice, coordinator: GatewayClient, number: int, reached: bool) -> str:
    address = f"patient{number}@clinic.example"
    patient: dict[str, Any] = {
        "names": [{"familyName": f"Beispiel{number}", "givenNames": ["Ada"]}],
        "birthDate": f"19{50 + number}-02-03",
    }
    if reached:
        patient["telecom"] = [{"system": "EMAIL", "value": address}]
    made = await coordinator.post(f"/v1/patients?clinicId={practice.clinic_id}&confirmNew=true", patient)
    if reached:
        await coordinator.post(
            "/v1/consents",
            {
                "patientId": made["id"],
                "contactValue": address,
                "channel": "EMAIL",
                "purpose": "care",
                "basis": "EXPRESS",
                "textVersion": "1",
                "evidence": "form",
            },
        )
    return str(made["id"])


async def _referral(practice: Practice, coordinator: GatewayClient, patient_id: str) -> str:
    referral = await coordinator.post(
        "/v1/referrals", {"patientId": patient_id, "clinicId": practice.clinic_id, "specialty": CARDIOLOGY}
    )
    await coordinator.post(f"/v1/referrals/{referral['id']}:submit", {})
    await coordinator.post(f"/v1/referrals/{referral['id']}:accept", {})
    return str(referral["id"])

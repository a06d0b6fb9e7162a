"""A small practice in an otherwise empty system: one clinic that never closes, for tests that book very much."""

import asyncio
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from system.importing.client import GatewayClient
from system.importing.load import load_clinics
from system.importing.report import Report
from system.issuer import ISSUER, staff_subject
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
    visit_type_id: str = ""
    practitioners: list[str] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
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
            "visitTypeId": self.visit_type_id,
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
                "code": "short-visit",
                "name": "Short visit",
                "duration_minutes": MINUTES,
                "modality": "IN_PERSON",
                "start_grid_minutes": MINUTES,
            }
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
    (visit_type,) = await admin.all_of("/v1/visitTypes", "visitTypes")
    practice.clinic_id, practice.visit_type_id = clinic["id"], visit_type["id"]
    practice.practitioners = [one["id"] for one in await admin.all_of("/v1/practitioners", "practitioners")]
    assert len(practice.practitioners) == size


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


async def metric(system: System, instance: str, name: str, **labels: str) -> float | None:
    """The value of a metric's first sample with these labels at an instance's `/metrics`, None where there is none."""
    for sample, value in (await samples(system, instance)).items():
        if sample.partition("{")[0] == name and all(f'{key}="{wanted}"' in sample for key, wanted in labels.items()):
            return value
    return None


async def samples(system: System, instance: str) -> dict[str, float]:
    """All samples of an instance's `/metrics` by their names with labels."""
    text = await _get(system.plan.instances[instance].metrics_port, "/metrics")
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, _, value = line.partition(" # ")[0].rpartition(" ")
            found[name] = float(value)
    return found


async def _get(port: int, path: str) -> str:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        assert head.split(b" ")[1] == b"200", head
        return body.decode()
    finally:
        writer.close()

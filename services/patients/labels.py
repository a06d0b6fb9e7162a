"""Which security labels work made by hand carries: those of whatever it is about."""

from sqlalchemy import func, select, union
from sqlalchemy.ext.asyncio import AsyncSession

from services.patients.due_times import ClinicCalendar
from services.patients.patient import Patient
from services.patients.timeline import TimelineEntry


async def labels_of(
    db: AsyncSession, tenant_id: str, patient_id: str, *, source_id: str = "", clinic_id: str | None = None
) -> list[str]:
    """Labels of the patient, of the clinic, and of the source as far as the patient's timeline knows it, sorted."""
    found = [
        select(func.unnest(Patient.security_labels)).where(Patient.tenant_id == tenant_id, Patient.id == patient_id)
    ]
    if clinic_id:
        found.append(
            select(func.unnest(ClinicCalendar.security_labels)).where(
                ClinicCalendar.tenant_id == tenant_id, ClinicCalendar.id == clinic_id
            )
        )
    if source_id and source_id != patient_id:
        found.append(
            select(func.unnest(TimelineEntry.security_labels)).where(
                TimelineEntry.tenant_id == tenant_id,
                TimelineEntry.patient_id == patient_id,
                TimelineEntry.source_id == source_id,
            )
        )
    return sorted((await db.execute(union(*found))).scalars())

"""Clinics, practitioners, rooms and devices, visit types and hours over gRPC."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from care.scheduling.v1 import directory_pb2 as pb
from care.scheduling.v1.directory_pb2_grpc import (
    ClinicsServiceServicer,
    PractitionersServiceServicer,
    ResourcesServiceServicer,
    SchedulesServiceServicer,
    VisitTypesServiceServicer,
)
from google.protobuf.field_mask_pb2 import FieldMask
from sqlalchemy import func, select
from sqlalchemy.dialects.postgresql import insert

from chassis.call import Call, require_etag
from chassis.errors import AlreadyExists, FailedPrecondition, Invalid
from chassis.ids import new_id
from chassis.reading import Rows
from chassis.wire import OUTPUT_ONLY, enum_names, given, to_proto
from services.scheduling.directory import (
    Clinic,
    DirectoryIdentifier,
    Practitioner,
    Resource,
    Schedule,
    VisitType,
)
from services.scheduling.stranding import Stranding

R = TypeVar("R", Clinic, Practitioner)

# What other systems don't know, so that it changes here whoever owns the rest of the entry.
_OURS = {
    "clinic": {"discreet_name", "time_zone", "holiday_region", "closed_dates", "status", "directions", "specialties"}
    | {"security_labels", "position"},
    "practitioner": {"languages", "licensed_states", "roles", "active"},
}


class ClinicsServicer(ClinicsServiceServicer):
    """Where patients are seen."""

    async def CreateClinic(self, request: pb.CreateClinicRequest, call: Call) -> pb.Clinic:
        clinic = Clinic(id=new_id())
        values = _values(call, request.clinic)
        if not values.get("time_zone"):
            raise Invalid("TIME_ZONE_MISSING", "A clinic needs a time zone.", field="clinic.time_zone")
        clinic.change(**values)
        await call.add(clinic)
        await _claim_identifiers(call, clinic)
        await call.db.flush()
        return to_proto(clinic, pb.Clinic)

    async def GetClinic(self, request: pb.GetClinicRequest, call: Call) -> pb.Clinic:
        return to_proto(await call.get(Clinic, request.id), pb.Clinic)

    async def ListClinics(self, request: pb.ListClinicsRequest, call: Call) -> pb.ListClinicsResponse:
        statuses = enum_names(pb.Clinic.Status, request.statuses) or ["ACTIVE"]
        rows, following = await call.page(Rows(Clinic).among(Clinic.status, statuses), request, Clinic.name, Clinic.id)
        return pb.ListClinicsResponse(clinics=[to_proto(row, pb.Clinic) for row in rows], next_page_token=following)

    async def UpdateClinic(self, request: pb.UpdateClinicRequest, call: Call) -> pb.Clinic:
        clinic = await call.get(Clinic, request.clinic.id, etag=require_etag(request.etag))
        values = _values(call, request.clinic, request.update_mask)
        _refuse_managed(call, clinic, values)
        async with _around(call, values, clinic_id=clinic.id):
            clinic.change(**values)
        await _claim_identifiers(call, clinic)
        await call.db.flush()
        return to_proto(clinic, pb.Clinic)

    async def UpsertClinic(self, request: pb.UpsertClinicRequest, call: Call) -> pb.UpsertClinicResponse:
        values = given(request.clinic)
        clinic, created = await _by_first_identifier(call, Clinic, values)
        async with _around(call, {} if created else values, clinic_id=clinic.id):
            changed = await _change_upserted(call, clinic, values)
        return pb.UpsertClinicResponse(clinic=to_proto(clinic, pb.Clinic), created=created, changed=changed)


class PractitionersServicer(PractitionersServiceServicer):
    """Whom patients see."""

    async def CreatePractitioner(self, request: pb.CreatePractitionerRequest, call: Call) -> pb.Practitioner:
        practitioner = Practitioner(id=new_id())
        practitioner.change(**_values(call, request.practitioner))
        await _know_clinics(call, practitioner.clinic_ids)
        await call.add(practitioner)
        await _claim_identifiers(call, practitioner)
        await call.db.flush()
        return to_proto(practitioner, pb.Practitioner)

    async def GetPractitioner(self, request: pb.GetPractitionerRequest, call: Call) -> pb.Practitioner:
        return to_proto(await call.get(Practitioner, request.id), pb.Practitioner)

    async def ListPractitioners(self, request: pb.ListPractitionersRequest, call: Call) -> pb.ListPractitionersResponse:
        wanted = Rows(Practitioner).overlap(Practitioner.clinic_ids, request.clinic_ids)
        rows, following = await call.page(wanted, request, Practitioner.family_name, Practitioner.id)
        return pb.ListPractitionersResponse(
            practitioners=[to_proto(row, pb.Practitioner) for row in rows], next_page_token=following
        )

    async def UpdatePractitioner(self, request: pb.UpdatePractitionerRequest, call: Call) -> pb.Practitioner:
        practitioner = await call.get(Practitioner, request.practitioner.id, etag=require_etag(request.etag))
        values = _values(call, request.practitioner, request.update_mask)
        _refuse_managed(call, practitioner, values)
        known = set(practitioner.clinic_ids)
        async with _around(call, values, practitioner_id=practitioner.id):
            practitioner.change(**values)
        await _know_clinics(call, set(practitioner.clinic_ids) - known)
        await _claim_identifiers(call, practitioner)
        await call.db.flush()
        return to_proto(practitioner, pb.Practitioner)

    async def UpsertPractitioner(
        self, request: pb.UpsertPractitionerRequest, call: Call
    ) -> pb.UpsertPractitionerResponse:
        values = given(request.practitioner)
        practitioner, created = await _by_first_identifier(call, Practitioner, values)
        known = set(practitioner.clinic_ids or ())
        if "roles" in values:
            values["roles"] = practitioner.roles_with(values["roles"])
        async with _around(call, {} if created else values, practitioner_id=practitioner.id):
            changed = await _change_upserted(call, practitioner, values)
        await _know_clinics(call, set(practitioner.clinic_ids) - known)
        return pb.UpsertPractitionerResponse(
            practitioner=to_proto(practitioner, pb.Practitioner), created=created, changed=changed
        )


class ResourcesServicer(ResourcesServiceServicer):
    """Rooms and devices."""

    async def CreateResource(self, request: pb.CreateResourceRequest, call: Call) -> pb.Resource:
        resource = Resource(id=new_id())
        resource.change(**given(request.resource))
        await _know_clinics(call, [resource.clinic_id])
        await call.add(resource)
        await call.db.flush()
        return to_proto(resource, pb.Resource)

    async def GetResource(self, request: pb.GetResourceRequest, call: Call) -> pb.Resource:
        return to_proto(await call.get(Resource, request.id), pb.Resource)

    async def UpdateResource(self, request: pb.UpdateResourceRequest, call: Call) -> pb.Resource:
        resource = await call.get(Resource, request.resource.id, etag=require_etag(request.etag))
        values = given(request.resource, request.update_mask)
        for fixed in ("clinic_id", "kind"):
            if values.pop(fixed, None) not in (None, getattr(resource, fixed)):
                raise Invalid("FIELD_FIXED", f"{fixed} can't be changed.", field=f"resource.{fixed}")
        async with _around(call, values, resource_id=resource.id):
            resource.change(**values)
        await call.db.flush()
        return to_proto(resource, pb.Resource)

    async def ListResources(self, request: pb.ListResourcesRequest, call: Call) -> pb.ListResourcesResponse:
        wanted = Rows(Resource).among(Resource.clinic_id, request.clinic_ids)
        rows, following = await call.page(wanted, request, Resource.name, Resource.id)
        return pb.ListResourcesResponse(
            resources=[to_proto(row, pb.Resource) for row in rows], next_page_token=following
        )


class VisitTypesServicer(VisitTypesServiceServicer):
    """What can be booked."""

    async def CreateVisitType(self, request: pb.CreateVisitTypeRequest, call: Call) -> pb.VisitType:
        visit_type = VisitType(id=new_id())
        visit_type.change(**given(request.visit_type))
        await call.add(visit_type)
        await call.db.flush()
        return to_proto(visit_type, pb.VisitType)

    async def GetVisitType(self, request: pb.GetVisitTypeRequest, call: Call) -> pb.VisitType:
        return to_proto(await call.get(VisitType, request.id), pb.VisitType)

    async def ListVisitTypes(self, request: pb.ListVisitTypesRequest, call: Call) -> pb.ListVisitTypesResponse:
        rows, following = await call.page(Rows(VisitType), request, VisitType.name, VisitType.id)
        return pb.ListVisitTypesResponse(
            visit_types=[to_proto(row, pb.VisitType) for row in rows], next_page_token=following
        )

    async def UpdateVisitType(self, request: pb.UpdateVisitTypeRequest, call: Call) -> pb.VisitType:
        visit_type = await call.get(VisitType, request.visit_type.id, etag=require_etag(request.etag))
        visit_type.change(**given(request.visit_type, request.update_mask))
        await call.db.flush()
        return to_proto(visit_type, pb.VisitType)


class SchedulesServicer(SchedulesServiceServicer):
    """Hours in which practitioners see patients."""

    async def CreateSchedule(self, request: pb.CreateScheduleRequest, call: Call) -> pb.Schedule:
        schedule = Schedule(id=new_id())
        values = given(request.schedule)
        await _know_clinics(call, [values.get("clinic_id")])
        await _know_practitioner(call, values.get("practitioner_id"))
        stranding = Stranding(call.db, call.tenant_id, call.now)
        await stranding.before(clinic_id=values["clinic_id"], practitioner_id=values["practitioner_id"])
        schedule.change(**values)
        await call.add(schedule)
        await call.db.flush()
        await stranding.after(schedule)
        return to_proto(schedule, pb.Schedule)

    async def GetSchedule(self, request: pb.GetScheduleRequest, call: Call) -> pb.Schedule:
        return to_proto(await call.get(Schedule, request.id), pb.Schedule)

    async def ListSchedules(self, request: pb.ListSchedulesRequest, call: Call) -> pb.ListSchedulesResponse:
        wanted = (
            Rows(Schedule)
            .among(Schedule.practitioner_id, request.practitioner_ids)
            .among(Schedule.clinic_id, request.clinic_ids)
        )
        rows, following = await call.page(wanted, request, Schedule.id)
        return pb.ListSchedulesResponse(
            schedules=[to_proto(row, pb.Schedule) for row in rows], next_page_token=following
        )

    async def UpdateSchedule(self, request: pb.UpdateScheduleRequest, call: Call) -> pb.Schedule:
        schedule = await call.get(Schedule, request.schedule.id, etag=require_etag(request.etag))
        # Whose hours they are, and where, doesn't change: other hours are another schedule.
        values = given(request.schedule, request.update_mask)
        for fixed in ("practitioner_id", "clinic_id"):
            if values.pop(fixed, None) not in (None, getattr(schedule, fixed)):
                raise Invalid("FIELD_FIXED", f"{fixed} can't be changed.", field=f"schedule.{fixed}")
        async with _around(call, values, clinic_id=schedule.clinic_id, practitioner_id=schedule.practitioner_id):
            schedule.change(**values)
        await call.db.flush()
        return to_proto(schedule, pb.Schedule)


_SAYS_WHEN = {
    "closed_dates", "holiday_region", "time_zone", "status", "active", "roles", "weekly_hours", "exceptions",
}  # fmt: skip
"""Fields of the directory by which visits can take place or not."""


@asynccontextmanager
async def _around(call: Call, values: dict[str, Any], **whose: str) -> AsyncIterator[None]:
    """Around a change: what it leaves outside is told, what it opens is offered to who waits."""
    if not _SAYS_WHEN & values.keys():
        yield
        return
    stranding = Stranding(call.db, call.tenant_id, call.now)
    await stranding.before(**whose)
    yield
    call.saw(*(one.patient_id for one in await stranding.after()))


def _values(call: Call, entry: pb.Clinic | pb.Practitioner, mask: FieldMask | None = None) -> dict[str, Any]:
    """What a request sets. Only who imports names the owning system: anybody else's word would lock the entry."""
    own = frozenset() if call.allows("directory.import") else frozenset({"source_system"})
    return given(entry, mask, read_only=OUTPUT_ONLY | own)


async def _by_first_identifier(call: Call, model: type[R], values: dict[str, Any]) -> tuple[R, bool]:
    """The entry that has the first identifier, locked, or a new one that claims it; whether it is new.

    The claim is an insert, so that of two imports at once the second waits and then finds the first one's entry.
    """
    if not values.get("identifiers"):
        raise Invalid("IDENTIFIER_MISSING", "An upsert needs an identifier.", field=f"{model.aggregate}.identifiers")
    key = values["identifiers"][0]
    claimed = await call.db.execute(
        insert(DirectoryIdentifier)
        .values(
            tenant_id=call.tenant_id,
            id=new_id(),
            kind=model.aggregate,
            owner_id=new_id(),
            system=key["system"],
            value=key["value"],
        )
        .on_conflict_do_nothing(constraint="directory_identifier_key")
        .returning(DirectoryIdentifier.owner_id)
    )
    new_owner = claimed.scalar_one_or_none()
    if new_owner is not None:
        return await call.add(model(id=new_owner)), True
    owner = await call.db.execute(
        select(DirectoryIdentifier.owner_id).where(
            DirectoryIdentifier.tenant_id == call.tenant_id,
            DirectoryIdentifier.kind == model.aggregate,
            DirectoryIdentifier.system == key["system"],
            DirectoryIdentifier.value == key["value"],
        )
    )
    owner_id = owner.scalar_one_or_none()
    if owner_id is None:
        raise AlreadyExists("IDENTIFIER_TAKEN", "The identifier belongs to another entry of the directory.")
    return await call.get(model, owner_id), False


async def _change_upserted(call: Call, row: Clinic | Practitioner, values: dict[str, Any]) -> bool:
    """Set what is given; identifiers are added, never removed. Answers whether anything was written."""
    known = {(one["system"], one["value"]) for one in row.identifiers or ()}
    brought = [one for one in values["identifiers"] if (one["system"], one["value"]) not in known]
    values["identifiers"] = [*(row.identifiers or ()), *brought]
    changed = row.change(**values)
    if brought:
        await _claim_identifiers(call, row)
    await call.db.flush()
    return changed


async def _claim_identifiers(call: Call, row: Clinic | Practitioner) -> None:
    """Make the claims of an entry those of its list; one that is another's breaks the unique key at the flush."""
    rows = await call.db.execute(
        select(DirectoryIdentifier).where(
            DirectoryIdentifier.tenant_id == call.tenant_id, DirectoryIdentifier.owner_id == row.id
        )
    )
    claims = {(claim.system, claim.value): claim for claim in rows.scalars()}
    wanted = {(one["system"], one["value"]) for one in row.identifiers or ()}
    for key, claim in claims.items():
        if key not in wanted:
            await call.db.delete(claim)
    for system, value in sorted(wanted - claims.keys()):
        call.db.add(
            DirectoryIdentifier(
                tenant_id=call.tenant_id,
                id=new_id(),
                kind=row.aggregate,
                owner_id=row.id,
                system=system,
                value=value,
            )
        )


def _refuse_managed(call: Call, row: Clinic | Practitioner, values: dict[str, Any]) -> None:
    """Raises FailedPrecondition `MANAGED_OUTSIDE` where another system owns what would change."""
    ours = _OURS[row.aggregate]
    theirs = {name for name, value in values.items() if name not in ours and getattr(row, name) != value}
    if row.source_system and theirs and not call.allows("directory.import"):
        raise FailedPrecondition("MANAGED_OUTSIDE", "Another system owns this entry; change it there.")


async def _know_clinics(call: Call, clinic_ids: Iterable[str | None]) -> None:
    """Raises Invalid `CLINIC_UNKNOWN` unless all are clinics of the tenant."""
    wanted = set(clinic_ids)
    if not wanted:
        return
    known = await call.db.execute(
        select(func.count())
        .select_from(Clinic)
        .where(Clinic.tenant_id == call.tenant_id, Clinic.id.in_([one for one in wanted if one]))
    )
    if known.scalar_one() != len(wanted):
        raise Invalid("CLINIC_UNKNOWN", "There is no such clinic.", field="clinic_id")


async def _know_practitioner(call: Call, practitioner_id: str | None) -> None:
    """Raises Invalid `PRACTITIONER_UNKNOWN`."""
    known = (
        practitioner_id
        and (
            await call.db.execute(
                select(Practitioner.id).where(
                    Practitioner.tenant_id == call.tenant_id, Practitioner.id == practitioner_id
                )
            )
        ).scalar_one_or_none()
    )
    if not known:
        raise Invalid("PRACTITIONER_UNKNOWN", "There is no such practitioner.", field="practitioner_id")

"""The directory over gRPC: what is asked of an entry, what imports change, and what the others are told."""

import asyncio

import pytest
from care.scheduling.v1 import directory_pb2 as pb
from care.scheduling.v1.directory_pb2_grpc import (
    ClinicsServiceStub,
    PractitionersServiceStub,
    ResourcesServiceStub,
    SchedulesServiceStub,
    VisitTypesServiceStub,
)
from sqlalchemy import text

from chassis.errors import Problem
from chassis.ids import new_id
from chassis.testing.harness import Harness
from services.scheduling.service import SERVICE

ALL = ["directory.read", "directory.write", "directory.import"]


@pytest.fixture(scope="module")
async def harness(database):
    harness = Harness(database)
    await harness.start(SERVICE)
    await harness.staff("ada", ALL)
    await harness.staff("rita", ["directory.read"])
    await harness.staff("max", ["directory.read", "directory.write"])
    yield harness
    await harness.stop()


class Directory:
    """The five services under one roof."""

    def __init__(self, harness):
        self.harness = harness

    async def __call__(self, stub, method, request, subject="ada"):
        return await self.harness.call("scheduling", stub, method, request, subject)

    async def clinic(self, name="Riverside", time_zone="America/New_York", subject="ada", **more):
        clinic = pb.Clinic(name=name, time_zone=time_zone, **more)
        return await self(ClinicsServiceStub, "CreateClinic", pb.CreateClinicRequest(clinic=clinic), subject)

    async def upsert_clinic(self, **fields):
        request = pb.UpsertClinicRequest(clinic=pb.Clinic(**fields))
        return await self(ClinicsServiceStub, "UpsertClinic", request)

    async def practitioner(self, family="Abara", **more):
        request = pb.CreatePractitionerRequest(practitioner=pb.Practitioner(name={"family_name": family}, **more))
        return await self(PractitionersServiceStub, "CreatePractitioner", request)

    async def upsert_practitioner(self, **fields):
        request = pb.UpsertPractitionerRequest(practitioner=pb.Practitioner(**fields))
        return await self(PractitionersServiceStub, "UpsertPractitioner", request)

    async def visit_type(self, code, **more):
        fields = {"name": "New patient", "duration_minutes": 30, **more}
        request = pb.CreateVisitTypeRequest(visit_type=pb.VisitType(code=code, **fields))
        return await self(VisitTypesServiceStub, "CreateVisitType", request)

    async def schedule(self, practitioner_id, clinic_id, **more):
        fields = {"weekly_hours": [{"weekday": 1, "start": "09:00", "end": "17:00"}], **more}
        schedule = pb.Schedule(practitioner_id=practitioner_id, clinic_id=clinic_id, **fields)
        return await self(SchedulesServiceStub, "CreateSchedule", pb.CreateScheduleRequest(schedule=schedule))

    async def told(self, kind, row_id):
        """Events on the topic or on the way there, oldest first."""
        import json

        from care.events.v1.envelope_pb2 import Event

        found = []
        for _ in range(100):
            reader = self.harness.bus.reader(f"test-{new_id()}", ["care.scheduling"])
            await reader.start()
            try:
                while batch := await reader.fetch(500, 0.3):
                    for records in batch.values():
                        found += [Event.FromString(record.value) for record in records if record.value]
            finally:
                await reader.stop()
            found = [one for one in found if one.type == kind and one.aggregate_id == row_id]
            if found:
                return found
            await asyncio.sleep(0.05)
        raise AssertionError(json.dumps([kind, row_id]))


@pytest.fixture
def directory(harness):
    return Directory(harness)


async def refused(awaitable):
    with pytest.raises(Problem) as problem:
        await awaitable
    return problem.value.reason


async def test_a_clinic_is_recorded_active_with_its_number_in_e164_and_told_whole(directory):
    clinic = await directory.clinic(
        holiday_region="US-MA", telecom=[{"system": 1, "value": "555-0134"}, {"system": 1, "value": "617-253-1000"}]
    )
    assert clinic.status == pb.Clinic.ACTIVE and clinic.etag == '"1"'
    assert [point.e164 for point in clinic.telecom] == ["", "+16172531000"]
    read = await directory(ClinicsServiceStub, "GetClinic", pb.GetClinicRequest(id=clinic.id), "rita")
    assert read == clinic
    (event,) = await directory.told("clinic.changed", clinic.id)
    assert event.payload_type == "care.scheduling.v1.Clinic" and event.version == 1
    assert pb.Clinic.FromString(event.payload) == clinic


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"name": "X", "time_zone": "Mars/Olympus"}, "TIME_ZONE_UNKNOWN"),
        ({"name": "X", "time_zone": ""}, "TIME_ZONE_MISSING"),
        ({"name": "", "time_zone": "UTC"}, "NAME_MISSING"),
        ({"name": "X", "holiday_region": "US-ZZ"}, "HOLIDAY_REGION_UNKNOWN"),
        ({"name": "X", "closed_dates": ["2026-02-30"]}, "DATE_INVALID"),
    ],
)
async def test_a_clinic_that_is_not_right_is_refused_with_its_reason(directory, fields, reason):
    assert await refused(directory.clinic(**fields)) == reason


async def test_reading_the_directory_gives_no_right_to_change_it(directory):
    assert await refused(directory.clinic(subject="rita")) == "PERMISSION_MISSING"


async def test_an_update_changes_what_its_mask_names_and_needs_the_etag_that_was_read(directory):
    clinic = await directory.clinic(name="Hill", directions="Third floor")

    def update(etag, paths=("name", "directions")):
        changed = pb.Clinic(id=clinic.id, name="Hilltop")
        request = pb.UpdateClinicRequest(clinic=changed, update_mask={"paths": paths}, etag=etag)
        return directory(ClinicsServiceStub, "UpdateClinic", request)

    assert await refused(update("")) == "ETAG_REQUIRED"
    assert await refused(update('"9"')) == "ETAG_MISMATCH"
    changed = await update(clinic.etag)
    assert (changed.name, changed.directions, changed.time_zone) == ("Hilltop", "", "America/New_York")
    assert changed.etag == '"2"'
    assert await refused(update(clinic.etag)) == "ETAG_MISMATCH"


async def test_the_list_goes_by_name_in_pages_and_leaves_out_closed_clinics_unless_asked(directory):
    for name in ("zz-c", "zz-a", "zz-b"):
        await directory.clinic(name=name, status=pb.Clinic.ACTIVE)
    await directory.clinic(name="zz-gone", status=pb.Clinic.INACTIVE)
    names, token = [], ""
    while True:
        page = await directory(
            ClinicsServiceStub, "ListClinics", pb.ListClinicsRequest(page_size=2, page_token=token), "rita"
        )
        names += [clinic.name for clinic in page.clinics]
        token = page.next_page_token
        if not token:
            break
    assert names == sorted(names)
    assert [name for name in names if name.startswith("zz-")] == ["zz-a", "zz-b", "zz-c"]
    inactive = await directory(
        ClinicsServiceStub, "ListClinics", pb.ListClinicsRequest(statuses=[pb.Clinic.INACTIVE]), "rita"
    )
    assert "zz-gone" in [clinic.name for clinic in inactive.clinics]


async def test_an_upsert_finds_its_clinic_by_the_first_identifier_and_keeps_what_is_absent(directory):
    key = {"system": "urn:ehr", "value": "org-1"}
    first = await directory.upsert_clinic(identifiers=[key], name="Quincy", directions="By the pier")
    assert (first.created, first.changed, first.clinic.time_zone) == (True, True, "")
    same = await directory.upsert_clinic(identifiers=[key], name="Quincy")
    assert (same.created, same.changed, same.clinic) == (False, False, first.clinic)
    zoned = await directory.upsert_clinic(
        identifiers=[key, {"system": "urn:npi", "value": "1"}], time_zone="America/New_York"
    )
    assert (zoned.created, zoned.changed) == (False, True)
    assert (zoned.clinic.name, zoned.clinic.directions) == ("Quincy", "By the pier")
    assert [one.value for one in zoned.clinic.identifiers] == ["org-1", "1"]
    found = await directory.upsert_clinic(identifiers=[{"system": "urn:npi", "value": "1"}], name="Quincy")
    assert (found.changed, found.clinic.id) == (False, first.clinic.id)
    assert await refused(directory.upsert_clinic(name="Nameless")) == "IDENTIFIER_MISSING"


async def test_an_identifier_belongs_to_one_entry_only(directory):
    key = {"system": "urn:ehr", "value": "org-taken"}
    await directory.clinic(identifiers=[key])
    assert await refused(directory.clinic(identifiers=[key])) == "IDENTIFIER_TAKEN"
    other = await directory.clinic(identifiers=[{"system": "urn:ehr", "value": "org-free"}])
    request = pb.UpdateClinicRequest(clinic=pb.Clinic(id=other.id, identifiers=[key]), etag=other.etag)
    assert await refused(directory(ClinicsServiceStub, "UpdateClinic", request)) == "IDENTIFIER_TAKEN"
    refusal = directory.upsert_practitioner(identifiers=[key], name={"family_name": "Odd"})
    assert await refused(refusal) == "IDENTIFIER_TAKEN"


async def test_a_dropped_identifier_is_free_again(directory):
    key = {"system": "urn:ehr", "value": "org-dropped"}
    clinic = await directory.clinic(identifiers=[key])
    request = pb.UpdateClinicRequest(
        clinic=pb.Clinic(id=clinic.id), update_mask={"paths": ["identifiers"]}, etag=clinic.etag
    )
    await directory(ClinicsServiceStub, "UpdateClinic", request)
    assert (await directory.clinic(identifiers=[key])).id != clinic.id


async def test_sixteen_upserts_at_once_make_one_clinic(directory, harness):
    key = {"system": "urn:ehr", "value": "org-raced"}
    answers = await asyncio.gather(*[directory.upsert_clinic(identifiers=[key], name="Raced") for _ in range(16)])
    assert len({answer.clinic.id for answer in answers}) == 1
    assert sum(answer.created for answer in answers) == 1
    async with harness.servers["scheduling"].database.engine.connect() as connection:
        count = await connection.scalar(text("SELECT count(*) FROM clinic WHERE name = 'Raced'"))
    assert count == 1


async def test_what_another_system_owns_changes_here_only_where_it_knows_nothing_of_it(directory):
    owned = await directory.upsert_clinic(
        identifiers=[{"system": "urn:ehr", "value": "org-owned"}], name="Owned", source_system="urn:ehr"
    )

    def update(subject, **fields):
        request = pb.UpdateClinicRequest(clinic=pb.Clinic(id=owned.clinic.id, **fields), etag=owned.clinic.etag)
        return directory(ClinicsServiceStub, "UpdateClinic", request, subject)

    assert await refused(update("max", name="Mine")) == "MANAGED_OUTSIDE"
    assert (await update("max", time_zone="America/Chicago")).time_zone == "America/Chicago"


async def test_only_who_imports_says_that_another_system_owns_an_entry(directory):
    clinic = await directory.clinic(name="Ours", source_system="urn:ehr", subject="max")
    assert clinic.source_system == ""
    clinic.source_system, clinic.name = "urn:ehr", "Still ours"
    request = pb.UpdateClinicRequest(clinic=clinic, etag=clinic.etag)
    changed = await directory(ClinicsServiceStub, "UpdateClinic", request, "max")
    assert (changed.source_system, changed.name) == ("", "Still ours")
    practitioner = pb.Practitioner(name={"family_name": "Ours"}, source_system="urn:ehr")
    request = pb.CreatePractitionerRequest(practitioner=practitioner)
    practitioner = await directory(PractitionersServiceStub, "CreatePractitioner", request, "max")
    practitioner.source_system = "urn:ehr"
    request = pb.UpdatePractitionerRequest(practitioner=practitioner, etag=practitioner.etag)
    changed = await directory(PractitionersServiceStub, "UpdatePractitioner", request, "max")
    assert (practitioner.etag, changed.source_system) == (changed.etag, "")


async def test_a_practitioners_imported_roles_are_added_and_never_removed(directory):
    one, two = await directory.clinic(), await directory.clinic()
    npi = [{"system": "http://hl7.org/fhir/sid/us-npi", "value": "9999900099"}]
    made = await directory.upsert_practitioner(
        identifiers=npi,
        name={"family_name": "Okafor", "given_names": ["Uche"]},
        roles=[{"clinic_id": one.id, "specialties": [{"code": "cardiology"}]}],
    )
    assert made.created and made.practitioner.active
    more = await directory.upsert_practitioner(
        identifiers=npi, roles=[{"clinic_id": two.id}, {"clinic_id": one.id, "specialties": [{"code": "sleep"}]}]
    )
    assert more.changed and not more.created
    assert {role.clinic_id for role in more.practitioner.roles} == {one.id, two.id}
    assert [code.code for code in more.practitioner.roles[0].specialties] == ["cardiology", "sleep"]
    again = await directory.upsert_practitioner(identifiers=npi, roles=[{"clinic_id": two.id}])
    assert not again.changed
    listed = await directory(
        PractitionersServiceStub, "ListPractitioners", pb.ListPractitionersRequest(clinic_ids=[two.id]), "rita"
    )
    assert [each.id for each in listed.practitioners] == [made.practitioner.id]
    assert await refused(directory.upsert_practitioner(identifiers=npi, roles=[{"clinic_id": new_id()}])) == (
        "CLINIC_UNKNOWN"
    )


async def test_practitioner_and_room_need_a_clinic_that_exists(directory):
    assert await refused(directory.practitioner(roles=[{"clinic_id": new_id()}])) == "CLINIC_UNKNOWN"
    room = pb.Resource(clinic_id=new_id(), kind="exam-room", name="1")
    refusal = directory(ResourcesServiceStub, "CreateResource", pb.CreateResourceRequest(resource=room))
    assert await refused(refusal) == "CLINIC_UNKNOWN"
    room.clinic_id = (await directory.clinic()).id
    made = await directory(ResourcesServiceStub, "CreateResource", pb.CreateResourceRequest(resource=room))
    listed = await directory(
        ResourcesServiceStub, "ListResources", pb.ListResourcesRequest(clinic_ids=[room.clinic_id]), "rita"
    )
    assert list(listed.resources) == [made]
    await directory.told("resource.changed", made.id)


async def test_a_practitioner_set_inactive_stays_so_until_it_is_said_otherwise(directory):
    practitioner = await directory.practitioner(active=False)
    assert practitioner.HasField("active") and not practitioner.active
    request = pb.UpdatePractitionerRequest(
        practitioner=pb.Practitioner(id=practitioner.id, active=True), etag=practitioner.etag
    )
    assert (await directory(PractitionersServiceStub, "UpdatePractitioner", request)).active


async def test_a_visit_type_needs_code_name_and_duration_and_its_code_is_its_own(directory):
    made = await directory.visit_type("echo", preparation={"en": "Nothing to eat for two hours"})
    assert made.active and made.modality == pb.VisitType.IN_PERSON
    assert dict(made.preparation) == {"en": "Nothing to eat for two hours"}
    assert await refused(directory.visit_type("echo")) == "CODE_TAKEN"
    assert await refused(directory.visit_type("")) == "CODE_MISSING"
    assert await refused(directory.visit_type("a", name="")) == "NAME_MISSING"
    assert await refused(directory.visit_type("b", duration_minutes=0)) == "DURATION_MINUTES_MISSING"
    request = pb.UpdateVisitTypeRequest(visit_type=pb.VisitType(id=made.id, active=False), etag=made.etag)
    assert not (await directory(VisitTypesServiceStub, "UpdateVisitType", request)).active
    events = await directory.told("visit_type.changed", made.id)
    assert pb.VisitType.FromString(events[-1].payload).code == "echo"


async def test_hours_are_set_once_for_a_practitioner_at_a_clinic(directory):
    clinic, practitioner = await directory.clinic(), await directory.practitioner()
    made = await directory.schedule(
        practitioner.id, clinic.id, exceptions=[{"date": "2026-12-24", "kind": pb.Schedule.Exception.CLOSED}]
    )
    assert await refused(directory.schedule(practitioner.id, clinic.id)) == "SCHEDULE_EXISTS"
    assert await refused(directory.schedule(practitioner.id, new_id())) == "CLINIC_UNKNOWN"
    assert await refused(directory.schedule(new_id(), clinic.id)) == "PRACTITIONER_UNKNOWN"
    read = await directory(SchedulesServiceStub, "GetSchedule", pb.GetScheduleRequest(id=made.id), "rita")
    assert read == made
    listed = await directory(
        SchedulesServiceStub, "ListSchedules", pb.ListSchedulesRequest(practitioner_ids=[practitioner.id]), "rita"
    )
    assert list(listed.schedules) == [made]
    (event,) = await directory.told("schedule.changed", made.id)
    assert pb.Schedule.FromString(event.payload) == made


async def test_hours_that_can_not_be_are_refused(directory):
    clinic, practitioner = await directory.clinic(), await directory.practitioner()
    block = {"weekday": 1, "start": "09:00", "end": "17:00"}

    def hours(**more):
        return directory.schedule(practitioner.id, clinic.id, **more)

    reversed_bounds = [{**block, "valid_from": "2026-05-02", "valid_until": "2026-05-01"}]
    assert await refused(hours(weekly_hours=reversed_bounds)) == "PERIOD_INVALID"
    assert await refused(hours(weekly_hours=[{**block, "valid_from": "2026-13-01"}])) == "DATE_INVALID"
    half = [{"date": "2026-05-01", "kind": 2, "start": "09:00"}]
    assert await refused(hours(exceptions=half)) == "TIMES_INCOMPLETE"


async def test_whose_hours_they_are_can_not_be_changed(directory):
    clinic, practitioner = await directory.clinic(), await directory.practitioner()
    made = await directory.schedule(practitioner.id, clinic.id)
    request = pb.UpdateScheduleRequest(schedule=pb.Schedule(id=made.id, practitioner_id=new_id()), etag=made.etag)
    assert await refused(directory(SchedulesServiceStub, "UpdateSchedule", request)) == "FIELD_FIXED"
    made.weekly_hours[0].end = "12:00"
    request = pb.UpdateScheduleRequest(schedule=made, etag=made.etag)
    assert (await directory(SchedulesServiceStub, "UpdateSchedule", request)).weekly_hours[0].end == "12:00"

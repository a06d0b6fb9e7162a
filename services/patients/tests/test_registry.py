"""The registry over gRPC: who may read, who may write, and what a stranger learns."""

import asyncio
import runpy

import pytest
from care.events.v1.envelope_pb2 import Event
from care.patients.v1 import events_pb2, staff_pb2
from care.patients.v1 import patients_pb2 as pb
from care.patients.v1.patients_pb2_grpc import PatientsServiceStub
from care.patients.v1.staff_pb2_grpc import PoolsServiceStub, RolesServiceStub, StaffServiceStub
from sqlalchemy import text

from chassis.errors import Problem
from chassis.ids import new_id
from chassis.testing.harness import Harness
from services.patients.bootstrap import bootstrap
from services.patients.service import SERVICE

WORK = ["patients.read", "patients.write", "patients.match", "patients.break_glass", "accesses.read", "pools.write"]


@pytest.fixture(scope="module")
async def harness(database):
    harness = Harness(database)
    await harness.start(SERVICE)
    yield harness
    await harness.stop()


@pytest.fixture(scope="module")
async def clinics(harness):
    here, elsewhere = new_id(), new_id()
    await harness.staff("cora", WORK, clinics=[here])
    await harness.staff("elias", WORK, clinics=[elsewhere])
    await harness.call(
        "patients",
        PoolsServiceStub,
        "CreatePool",
        staff_pb2.CreatePoolRequest(pool=staff_pb2.Pool(name="privacy", purpose="privacy")),
        "cora",
    )
    return here, elsewhere


async def patients(harness, method, request, subject="cora"):
    return await harness.call("patients", PatientsServiceStub, method, request, subject)


def a_patient(family="Okonkwo", given="Ada", born="1980-02-29"):
    return pb.Patient(
        names=[{"family_name": family, "given_names": [given]}],
        birth_date=born,
        gender=pb.Gender.FEMALE,
        telecom=[{"system": 1, "value": "555-867-0134", "use": 1}],
    )


async def created(harness, clinic, subject="cora", **more):
    return await patients(
        harness, "CreatePatient", pb.CreatePatientRequest(patient=a_patient(**more), clinic_id=clinic), subject
    )


async def test_a_patient_is_read_by_staff_of_the_clinic_and_by_nobody_else(harness, clinics):
    patient = await created(harness, clinics[0], family="Whitfield")
    read = await patients(harness, "GetPatient", pb.GetPatientRequest(id=patient.id))
    assert read.names[0].family_name == "Whitfield"
    assert list(read.clinic_ids) == [clinics[0]]
    with pytest.raises(Problem) as hidden:
        await patients(harness, "GetPatient", pb.GetPatientRequest(id=patient.id), "elias")
    with pytest.raises(Problem) as absent:
        await patients(harness, "GetPatient", pb.GetPatientRequest(id=new_id()), "elias")
    assert (hidden.value.code, hidden.value.reason, hidden.value.message) == (
        absent.value.code,
        absent.value.reason,
        absent.value.message,
    )
    assert hidden.value.reason == "NOT_FOUND"


async def test_an_invalid_phone_is_kept_and_marked(harness, clinics):
    patient = await created(harness, clinics[0], family="Lindqvist")
    assert patient.telecom[0].value == "555-867-0134"
    assert patient.telecom[0].e164 == ""


async def test_a_blank_name_and_days_to_come_are_refused(harness, clinics):
    patient = await created(harness, clinics[0], family="Achterberg", born="1971-03-04")
    refused = [
        ({"names": [{"family_name": " ", "given_names": ["", " "]}]}, "NAME_BLANK", "patient.names[0]"),
        ({"birth_date": "2999-01-01"}, "DATE_IN_FUTURE", "patient.birth_date"),
        ({"birth_date": "2999"}, "DATE_IN_FUTURE", "patient.birth_date"),
        ({"deceased": True, "deceased_date": "2999-01"}, "DATE_IN_FUTURE", "patient.deceased_date"),
    ]
    for changed, reason, field in refused:
        change = pb.UpdatePatientRequest(patient={"id": patient.id, **changed}, etag=patient.etag)
        with pytest.raises(Problem) as problem:
            await patients(harness, "UpdatePatient", change)
        assert (problem.value.reason, problem.value.metadata["field"]) == (reason, field)


async def test_a_pool_has_only_members_of_the_staff(harness, clinics):
    pool = staff_pb2.Pool(name="nobody's", staff_ids=[new_id()])
    with pytest.raises(Problem) as refused:
        await harness.call("patients", PoolsServiceStub, "CreatePool", staff_pb2.CreatePoolRequest(pool=pool), "cora")
    assert refused.value.reason == "STAFF_UNKNOWN"


async def test_an_update_needs_the_etag_that_was_read(harness, clinics):
    patient = await created(harness, clinics[0], family="Marchetti")
    change = pb.UpdatePatientRequest(patient={"id": patient.id, "languages": ["es"]})
    with pytest.raises(Problem) as missing:
        await patients(harness, "UpdatePatient", change)
    assert missing.value.reason == "ETAG_REQUIRED"
    change.etag = patient.etag
    updated = await patients(harness, "UpdatePatient", change)
    assert list(updated.languages) == ["es"] and updated.etag != patient.etag
    with pytest.raises(Problem) as stale:
        await patients(harness, "UpdatePatient", change)
    assert stale.value.reason == "ETAG_MISMATCH"


async def test_of_64_writers_with_one_etag_one_wins_and_the_others_are_told(harness, clinics):
    patient = await created(harness, clinics[0], family="Vandermeer")

    async def write(number):
        change = pb.UpdatePatientRequest(
            patient={"id": patient.id, "languages": [f"x{chr(97 + number % 26)}"]}, etag=patient.etag
        )
        try:
            await patients(harness, "UpdatePatient", change)
        except Problem as problem:
            return problem.reason
        return "written"

    outcomes = await asyncio.gather(*(write(number) for number in range(64)))
    assert outcomes.count("written") == 1
    assert set(outcomes) == {"written", "ETAG_MISMATCH"}


async def test_64_twins_of_one_request_have_one_effect_and_one_answer(harness, clinics):
    request = pb.CreatePatientRequest(
        patient=a_patient(family="Castellanos"), clinic_id=clinics[0], request_id="twins-1"
    )
    answers = await asyncio.gather(*(patients(harness, "CreatePatient", request) for _ in range(64)))
    assert len({answer.id for answer in answers}) == 1
    request.patient.birth_date = "1981-01-01"
    with pytest.raises(Problem) as reused:
        await patients(harness, "CreatePatient", request)
    assert reused.value.reason == "IDEMPOTENCY_KEY_REUSED"


async def test_a_like_patient_is_refused_until_confirmed(harness, clinics):
    first = await created(harness, clinics[0], family="Baptiste")
    with pytest.raises(Problem) as alike:
        await created(harness, clinics[0], family="Baptiste")
    assert alike.value.reason == "POSSIBLE_DUPLICATE"
    assert alike.value.metadata["ids"] == first.id
    again = await patients(
        harness,
        "CreatePatient",
        pb.CreatePatientRequest(patient=a_patient(family="Baptiste"), clinic_id=clinics[0], confirm_new=True),
    )
    assert again.id != first.id


async def test_broken_glass_opens_a_record_for_one_person(harness, clinics):
    patient = await created(harness, clinics[0], family="Abernathy")
    broken = await patients(
        harness, "BreakGlass", pb.BreakGlassRequest(id=patient.id, reason="unconscious in our emergency room"), "elias"
    )
    assert broken.expire_time.seconds > 0
    read = await patients(harness, "GetPatient", pb.GetPatientRequest(id=patient.id), "elias")
    assert read.id == patient.id


async def test_a_match_needs_two_criteria_and_shows_a_card(harness, clinics):
    patient = await created(harness, clinics[0], family="Núñez", born="1975-05-05")
    with pytest.raises(Problem) as one:
        await patients(harness, "SearchPatients", pb.SearchPatientsRequest(family_name="nunez"), "elias")
    assert one.value.reason == "TWO_CRITERIA_NEEDED"
    found = await patients(
        harness, "SearchPatients", pb.SearchPatientsRequest(family_name="nunez", birth_date="1975-05-05"), "elias"
    )
    assert [card.id for card in found.matches] == [patient.id]
    assert found.matches[0].phone_last_four == "0134" and not found.matches[0].readable
    opened = await patients(
        harness,
        "OpenPatient",
        pb.OpenPatientRequest(id=patient.id, clinic_id=clinics[1], reason="the patient calls"),
        "elias",
    )
    assert clinics[1] in opened.clinic_ids
    await patients(harness, "GetPatient", pb.GetPatientRequest(id=patient.id), "elias")


async def test_a_page_token_serves_only_its_own_query(harness, clinics):
    first = await patients(harness, "ListPatients", pb.ListPatientsRequest(page_size=2))
    assert first.next_page_token and len(first.patients) == 2
    second = await patients(
        harness, "ListPatients", pb.ListPatientsRequest(page_size=2, page_token=first.next_page_token)
    )
    assert not {one.id for one in first.patients} & {one.id for one in second.patients}
    with pytest.raises(Problem) as other:
        await patients(
            harness,
            "ListPatients",
            pb.ListPatientsRequest(clinic_ids=[clinics[0]], page_token=first.next_page_token),
        )
    assert other.value.reason == "PAGE_TOKEN_INVALID"


async def test_a_staff_member_whose_login_is_switched_off_is_a_stranger(harness, clinics):
    await harness.staff("root", ["staff.write", "staff.read"])
    staff = await harness.call(
        "patients",
        StaffServiceStub,
        "CreateStaff",
        staff_pb2.CreateStaffRequest(
            staff={"issuer": "https://issuer.test", "subject": "nora", "name": {"family_name": "N"}}
        ),
        "root",
    )
    await harness.call(
        "patients",
        StaffServiceStub,
        "UpdateStaff",
        staff_pb2.UpdateStaffRequest(staff={"id": staff.id, "active": False}, etag=staff.etag),
        "root",
    )
    with pytest.raises(Problem) as off:
        await patients(harness, "GetPatient", pb.GetPatientRequest(id=new_id()), "nora")
    assert off.value.reason == "LOGIN_INACTIVE"


async def test_a_login_that_is_taken_away_signs_nobody_in(harness, clinics):
    async def staff(method, request):
        return await harness.call("patients", StaffServiceStub, method, request, "root")

    async def answer(subject):
        with pytest.raises(Problem) as refused:
            await patients(harness, "GetPatient", pb.GetPatientRequest(id=new_id()), subject)
        return refused.value.reason

    login = {"issuer": "https://issuer.test", "name": {"family_name": "N"}}
    first, second = [
        await staff("CreateStaff", staff_pb2.CreateStaffRequest(staff={**login, "subject": subject}))
        for subject in ("gone-1", "gone-2")
    ]
    for one, subject in ((first, "gone-1"), (second, "gone-2")):
        assert await answer(subject) == "PERMISSION_MISSING"
        request = staff_pb2.UpdateStaffRequest(staff={"id": one.id}, update_mask={"paths": ["subject"]}, etag=one.etag)
        one = await staff("UpdateStaff", request)
        assert await answer(subject) == "LOGIN_UNKNOWN"
    await staff("UpdateStaff", staff_pb2.UpdateStaffRequest(staff={"id": one.id, "subject": "back"}, etag=one.etag))
    assert await answer("back") == "PERMISSION_MISSING"


async def test_events_say_whether_the_patient_has_died_as_of_their_version(harness, clinics):
    here, _ = clinics
    pool = staff_pb2.CreatePoolRequest(pool=staff_pb2.Pool(name="coordination", purpose="coordination"))
    await harness.call("patients", PoolsServiceStub, "CreatePool", pool, "cora")
    patient = a_patient(family="Sørli")
    patient.deceased = True
    request = pb.CreatePatientRequest(patient=patient, clinic_id=here, confirm_new=True)
    patient = await patients(harness, "CreatePatient", request)
    for deceased in (False, True, False):
        patient = await patients(
            harness,
            "UpdatePatient",
            pb.UpdatePatientRequest(
                patient={"id": patient.id, "deceased": deceased}, update_mask={"paths": ["deceased"]}, etag=patient.etag
            ),
        )
    reader = harness.bus.reader(f"test-{new_id()}", ["care.patients"])
    await reader.start()
    states = []
    async with asyncio.timeout(10):
        while len(states) < 5:
            for records in (await reader.fetch(500, 0.2)).values():
                for event in (Event.FromString(record.value) for record in records):
                    if event.aggregate_id == patient.id and event.payload_type == "care.patients.v1.PatientEvent":
                        payload = events_pb2.PatientEvent.FromString(event.payload)
                        assert payload.HasField("deceased")
                        states.append((event.type.partition(".")[2], payload.deceased, event.version))
    await reader.stop()
    assert [state[:2] for state in states] == [
        ("registered", True),
        ("updated", False),
        ("deceased", True),
        ("updated", True),
        ("updated", False),
    ]
    assert sorted(each[2] for each in states) == [each[2] for each in states]


@pytest.mark.parametrize("blank", [{"given_name": "-"}, {"given_name": " "}, {"phone": "none"}, {"family_name": "?"}])
async def test_what_fits_everybody_is_no_criterion(harness, clinics, blank):
    with pytest.raises(Problem) as one:
        await patients(harness, "SearchPatients", pb.SearchPatientsRequest(**{"family_name": "haverford"} | blank))
    assert one.value.reason == "TWO_CRITERIA_NEEDED"


async def test_a_name_without_latin_letters_is_not_like_every_other_one(harness, clinics):
    patient = await created(harness, clinics[0], family="王", born="1971-01-02")
    await created(harness, clinics[0], family="Ивано́в", born="1971-01-02", given="Олег")
    found = await patients(
        harness, "SearchPatients", pb.SearchPatientsRequest(family_name="王", birth_date="1971-01-02")
    )
    assert [card.id for card in found.matches] == [patient.id]


async def update(harness, patient, mask, **fields):
    request = pb.UpdatePatientRequest(
        patient={"id": patient.id, **fields}, update_mask={"paths": mask}, etag=patient.etag
    )
    return await patients(harness, "UpdatePatient", request)


async def test_a_record_whose_use_is_left_open_stays_in_use(harness, clinics):
    patient = await created(harness, clinics[0], family="Brancusi")
    assert (await update(harness, patient, ["active"])).active


@pytest.mark.parametrize("field", ["birth_date", "deceased_date"])
async def test_a_day_that_no_calendar_has_is_refused(harness, clinics, field):
    patient = await created(harness, clinics[0], family="Feldkirch", born=f"19{70 + len(field)}")
    for wrong in ("1999-02-30", "0000"):
        with pytest.raises(Problem) as refused:
            await update(harness, patient, [field], **{field: wrong})
        assert (refused.value.reason, refused.value.metadata["field"]) == ("DATE_INVALID", f"patient.{field}")
    assert getattr(await update(harness, patient, [field], **{field: "1999-12"}), field) == "1999-12"


async def test_only_who_imports_says_that_another_system_owns_a_record(harness, clinics):
    named = a_patient(family="Ostrander")
    named.source_system = "ehr"
    request = pb.CreatePatientRequest(patient=named, clinic_id=clinics[0], confirm_new=True)
    patient = await patients(harness, "CreatePatient", request)
    assert patient.source_system == ""
    patient = await update(harness, patient, ["source_system", "languages"], source_system="ehr", languages=["fr"])
    assert (patient.source_system, list(patient.languages)) == ("", ["fr"])


async def test_an_identifier_that_a_record_gives_up_is_free(harness, clinics):
    one = await created(harness, clinics[0], family="Grünewald", born="1961-01-01")
    other = await created(harness, clinics[0], family="Thibodeaux", born="1962-01-01")
    key, new = {"system": "urn:mrn", "value": "given-up"}, {"system": "urn:mrn", "value": "instead"}
    one = await update(harness, one, ["identifiers"], identifiers=[key])
    with pytest.raises(Problem) as taken:
        await update(harness, other, ["identifiers"], identifiers=[key])
    assert taken.value.reason == "IDENTIFIER_TAKEN"
    await update(harness, one, ["identifiers"], identifiers=[new])
    await update(harness, other, ["identifiers"], identifiers=[key])
    found = await patients(harness, "SearchPatients", pb.SearchPatientsRequest(identifier=key))
    assert [card.id for card in found.matches] == [other.id]


async def test_an_update_does_not_tell_that_a_restricted_record_has_an_identifier(harness, clinics):
    key = {"system": "urn:mrn", "value": "hidden"}
    hidden = a_patient(family="Quillfeather", born="1963-01-01")
    hidden.restricted = True
    hidden.identifiers.add(**key)
    await patients(harness, "CreatePatient", pb.CreatePatientRequest(patient=hidden, clinic_id=clinics[0]))
    other = await created(harness, clinics[0], family="Underhill", born="1964-01-01")
    updated = await update(harness, other, ["identifiers"], identifiers=[key])
    assert updated.identifiers[0].value == "hidden"
    async with harness.servers["patients"].database.engine.connect() as connection:
        reviews = await connection.scalar(
            text("SELECT count(*) FROM task WHERE code = 'review-duplicate' AND patient_id = :id"), {"id": other.id}
        )
    assert reviews == 1


async def test_a_pool_keeps_its_name_and_stays_in_use_where_nothing_is_said(harness, clinics):
    async def pools(method, request):
        return await harness.call("patients", PoolsServiceStub, method, request, "cora")

    pool = await pools("CreatePool", staff_pb2.CreatePoolRequest(pool={"name": "night", "purpose": "urgent"}))
    request = staff_pb2.UpdatePoolRequest(pool={"id": pool.id}, update_mask={"paths": ["active"]}, etag=pool.etag)
    pool = await pools("UpdatePool", request)
    assert pool.active
    request = staff_pb2.UpdatePoolRequest(pool={"id": pool.id}, update_mask={"paths": ["name"]}, etag=pool.etag)
    with pytest.raises(Problem) as nameless:
        await pools("UpdatePool", request)
    assert nameless.value.reason == "NAME_MISSING"


async def test_a_tenant_whose_pools_were_given_other_work_is_completed_and_not_refused(harness):
    server, tenant = harness.servers["patients"], new_id()
    for _ in range(3):
        await bootstrap(server.settings.database_url, tenant_id=tenant, issuer="https://issuer.test")
        async with server.database.engine.begin() as connection:
            pools = await connection.execute(
                text("SELECT purpose FROM pool WHERE tenant_id = :tenant ORDER BY purpose"), {"tenant": tenant}
            )
            assert {"coordination", "privacy", "referrals", "urgent"} <= set(pools.scalars())
            await connection.execute(
                text("UPDATE pool SET purpose = '' WHERE tenant_id = :tenant AND purpose = 'urgent'"),
                {"tenant": tenant},
            )


async def test_the_role_that_gives_rights_cannot_lose_its_own(harness, clinics):
    await bootstrap(
        harness.servers["patients"].settings.database_url, tenant_id=harness.tenant_id, issuer="https://issuer.test"
    )
    await harness.staff("rosa", ["roles.write", "staff.read"], clinics=[clinics[0]])
    roles = await harness.call("patients", RolesServiceStub, "ListRoles", staff_pb2.ListRolesRequest(), "rosa")
    admin = next(each for each in roles.roles if each.name == "admin")
    request = staff_pb2.UpdateRoleRequest(role=admin, etag=admin.etag)
    request.role.permissions.remove("roles.write")
    with pytest.raises(Problem) as refused:
        await harness.call("patients", RolesServiceStub, "UpdateRole", request, "rosa")
    assert refused.value.reason == "ADMIN_NEEDED"


async def test_a_role_gets_what_a_later_release_ships_and_never_back_what_was_taken_away(harness, monkeypatch):
    """Roles are stored once: a tenant's schedulers never got the permissions of features that came after."""
    server, tenant = harness.servers["patients"], new_id()

    async def start(shipped):
        monkeypatch.setattr("services.patients.bootstrap.SHIPPED", {"scheduler": frozenset(shipped)})
        await bootstrap(server.settings.database_url, tenant_id=new_id(), issuer="https://issuer.test")

    async def stored():
        async with server.database.engine.begin() as connection:
            found = "SELECT permissions, version FROM role WHERE tenant_id = :tenant AND name = 'scheduler'"
            return (await connection.execute(text(found), {"tenant": tenant})).one()

    monkeypatch.setattr(
        "services.patients.bootstrap.SHIPPED", {"scheduler": frozenset({"self.read", "appointments.book"})}
    )
    await bootstrap(server.settings.database_url, tenant_id=tenant, issuer="https://issuer.test")
    async with server.database.engine.begin() as connection:  # the tenant's own choice
        await connection.execute(
            text("UPDATE role SET permissions = '{self.read,staff.read}' WHERE tenant_id = :tenant"), {"tenant": tenant}
        )
    # Whoever starts it: all tenants' roles are brought up to date.
    await start({"self.read", "appointments.book", "waitlist.write"})
    permissions, version = await stored()
    assert permissions == ["self.read", "staff.read", "waitlist.write"]
    async with server.database.engine.begin() as connection:
        told = "SELECT permissions FROM role_permissions WHERE tenant_id = :tenant AND name = 'scheduler'"
        assert sorted((await connection.execute(text(told), {"tenant": tenant})).scalar_one()) == permissions
    await start({"self.read", "appointments.book", "waitlist.write"})
    assert await stored() == (permissions, version)


async def test_an_installation_gets_what_a_release_ships_with_its_migration(harness, monkeypatch):
    """Only `care up` brought roles up: where workloads are run by themselves, no new permission reached anybody."""
    server, tenant = harness.servers["patients"], new_id()
    url = server.settings.database_url
    shipped = {"scheduler": frozenset({"self.read"})}
    monkeypatch.setattr("services.patients.bootstrap.SHIPPED", shipped)
    await bootstrap(url, tenant_id=tenant, issuer="https://issuer.test")
    shipped["scheduler"] |= {"waitlist.write"}
    monkeypatch.setenv("CARE_DATABASE_URL", url)
    monkeypatch.setattr("sys.argv", ["patients", "migrate"])
    await asyncio.to_thread(runpy.run_module, "services.patients", run_name="__main__")
    async with server.database.engine.begin() as connection:
        found = "SELECT permissions FROM role WHERE tenant_id = :tenant"
        rows = (await connection.execute(text(found), {"tenant": tenant})).scalars().all()
    assert rows == [["self.read", "waitlist.write"]]

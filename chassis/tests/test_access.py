"""Who may see whom: the predicate, labels, timed grants, what is read through and when, and how old the projection may be."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from care.access.v1 import access_pb2
from google.protobuf.timestamp_pb2 import Timestamp

from chassis import access
from chassis.access import Caller
from chassis.bus import PARTITIONS
from chassis.errors import NotFound, Problem, Unauthenticated, Unavailable
from chassis.ids import new_id
from chassis.settings import Settings
from chassis.testing.harness import ISSUER
from chassis.tests.small import ALL, Small


async def outcome(calling: Any) -> str:
    """`OK` or the reason of the refusal."""
    try:
        await calling
    except Problem as problem:
        return problem.reason
    return "OK"


async def sees(small: Small, who: str, task: Any) -> bool:
    """Whether somebody sees a row, by every way to it alike."""
    ways = [
        await outcome(small.rpc("GetTask", who, id=task.id)) == "OK",
        task.id in [one.id for one in (await small.rpc("ListTasks", who, patient_id=task.patient_id)).tasks],
        task.id in [one.id for one in (await small.rpc("ListTasks", who, page_size=200)).tasks],
        await outcome(small.rpc("SnoozeTask", who, id=task.id, snooze_time=task.due_time)) == "OK",
    ]
    assert len(set(ways)) == 1, ways
    return ways[0]


async def grant(small: Small, patient: str, *grantees: str, version: int, timed: Any = (), **more: Any) -> None:
    """Put a patient's access set into the projection; `timed` holds (grantee, seconds from now, permissions)."""
    ((now,),) = await small.sql("SELECT clock_timestamp()")
    state = access_pb2.SubjectAccess(
        subject_id=patient,
        tenant_id=small.harness.tenant_id,
        access_version=version,
        grantee_ids=[patient, *grantees],
        **more,
    )
    for grantee, seconds, permissions in timed:
        until = Timestamp()
        until.FromDatetime(now)
        until.FromNanoseconds(until.ToNanoseconds() + int(seconds * 1e9))
        state.timed_grants.add(grantee_id=grantee, expire_time=until, permissions=permissions)
    async with small.server.database.engine.begin() as connection:
        await access.store_subject(connection, small.server.access.tables, state)


@contextlib.asynccontextmanager
async def heard(small: Small, seconds_ago: float) -> AsyncIterator[None]:
    """As if nothing had come from patients since then."""
    watched = small.server.access

    async def put(seconds: float) -> None:
        await small.sql(
            "UPDATE access_heartbeat SET time = clock_timestamp() - :age * interval '1 second'", age=seconds
        )
        watched._heard_age, watched._heard_at = seconds, watched._clock()

    await put(seconds_ago)
    try:
        yield
    finally:
        await put(-86400.0)


@pytest.fixture
async def desk(small: Small) -> AsyncIterator[Small]:
    small.owner.known.clear()
    small.owner.away = False
    small.server.access._denies.clear()
    yield small
    small.owner.away = False
    small.server.access._denies.clear()


# -- the predicate -----------------------------------------------------------------------------------------------------


async def test_staff_see_the_patients_of_their_clinics_and_care_teams_only(desk: Small) -> None:
    member = await desk.harness.staff("member", ALL, clinics=[new_id()])
    await desk.harness.staff("elsewhere", ALL, clinics=[new_id()])
    await desk.harness.staff("nowhere", ALL)
    task = await desk.task(await desk.patient(desk.clinic, member))
    assert await sees(desk, "ada", task)
    assert await sees(desk, "member", task)
    assert not await sees(desk, "elsewhere", task)
    assert not await sees(desk, "nowhere", task)


async def test_a_patient_sees_the_own_record_whatever_its_labels_and_no_other(desk: Small) -> None:
    patient = await desk.patient(labels=["addiction"])
    task = await _labelled(desk, patient, "addiction")
    other = await desk.task(await desk.patient())
    await desk.harness.staff("me", ALL, kind="PATIENT", principal_id=patient)
    assert await sees(desk, "me", task)
    assert not await sees(desk, "me", other)


async def test_another_tenants_ids_answer_as_none(desk: Small) -> None:
    """The same clinic and the same grantee in another tenant open nothing."""
    tenant, patient = new_id(), new_id()
    await desk.harness.subject(desk.clinic, desk.ada, patient_id=patient, tenant_id=tenant)
    theirs = new_id()
    await desk.sql(
        "INSERT INTO task (tenant_id, id, version, history, patient_id, code, due_time, note, done, status, security_labels)"
        " VALUES (:tenant, :id, 1, '[]', :patient, 'call-patient', now(), '', 0, 'READY', '{}')",
        tenant=tenant,
        id=theirs,
        patient=patient,
    )
    assert await outcome(desk.rpc("GetTask", id=theirs)) == "NOT_FOUND"
    assert await outcome(desk.rpc("ClaimTask", id=theirs)) == "NOT_FOUND"
    assert theirs not in [one.id for one in (await desk.rpc("ListTasks", page_size=200)).tasks]
    assert await outcome(desk.consent(patient)) == "NOT_FOUND"
    pool = new_id()
    await desk.sql(
        "INSERT INTO pool (tenant_id, id, version, name, purpose, staff_ids, clinic_ids, specialty_codes, active)"
        " VALUES (:tenant, :id, 1, 'Theirs', '', '{}', '{}', '{}', true)",
        tenant=tenant,
        id=pool,
    )
    assert await outcome(desk.rpc("GetPool", id=pool)) == "NOT_FOUND"


async def _labelled(desk: Small, patient: str, label: str) -> Any:
    if not await desk.sql("SELECT 1 FROM principal WHERE subject = 'labeller'"):
        await desk.harness.staff("labeller", ALL, clinics=[desk.clinic], clearances=["addiction", "hiv"])
    return await desk.task(patient, who="labeller", reason_code=label)


async def test_labels_of_record_and_row_need_their_clearances(desk: Small) -> None:
    await desk.harness.staff("cleared", ALL, clinics=[desk.clinic], clearances=["addiction"])
    await desk.harness.staff("half", ALL, clinics=[desk.clinic], clearances=["hiv"])
    plain = await desk.patient()
    row = await _labelled(desk, plain, "addiction")
    beside = await desk.task(plain)
    for who, of_row in (("ada", False), ("half", False), ("cleared", True)):
        assert await sees(desk, who, row) is of_row
        assert await sees(desk, who, beside)
    record = await _labelled(desk, await desk.patient(labels=["addiction", "hiv"]), "hiv")
    for who, of_record in (("ada", False), ("half", False), ("cleared", False), ("labeller", True)):
        assert await sees(desk, who, record) is of_record


async def test_a_timed_grant_ends_by_the_databases_clock_and_opens_labelled_rows(desk: Small) -> None:
    nurse = await desk.harness.staff("nurse", ALL, clinics=[new_id()])
    patient = await desk.patient()
    row = await _labelled(desk, patient, "addiction")
    assert not await sees(desk, "nurse", row)
    await grant(desk, patient, desk.clinic, version=2, timed=[(nurse, 60, [])])
    assert await sees(desk, "nurse", row)
    assert not await sees(desk, "ada", row)
    await grant(desk, patient, desk.clinic, version=3, timed=[(nurse, 0.2, [])])
    await asyncio.sleep(0.3)  # nobody tells anything: it ends by itself
    assert not await sees(desk, "nurse", row)


async def test_a_proxy_sees_what_the_grant_allows_until_it_expires(desk: Small) -> None:
    mother = await desk.harness.staff("mother", ALL, kind="RELATED")
    patient = await desk.patient()
    task, consent = await desk.task(patient), await desk.consent(patient)
    await grant(desk, patient, desk.clinic, version=2, timed=[(mother, 60, ["tasks.read", "tasks.write"])])
    assert await sees(desk, "mother", task)
    assert await outcome(desk.rpc("GetConsent", "mother", id=consent.id)) == "NOT_FOUND"
    await grant(desk, patient, desk.clinic, version=3, timed=[(mother, -1, [])])
    assert not await sees(desk, "mother", task)


async def test_revoked_access_is_gone_at_once_and_an_older_set_never_wins(desk: Small) -> None:
    patient = await desk.patient(version=5)
    task = await desk.task(patient)
    await grant(desk, patient, version=7)
    assert not await sees(desk, "ada", task)
    await grant(desk, patient, desk.clinic, version=6)
    assert not await sees(desk, "ada", task)
    await grant(desk, patient, desk.clinic, version=7)  # the same version is not newer
    assert not await sees(desk, "ada", task)
    await grant(desk, patient, desk.clinic, version=8)
    assert await sees(desk, "ada", task)


async def test_an_older_login_or_role_never_wins(desk: Small) -> None:
    tables = desk.server.access.tables
    who = await desk.harness.staff("fired", ALL, clinics=[desk.clinic])
    state = access_pb2.PrincipalState(
        id=who, tenant_id=desk.harness.tenant_id, issuer=ISSUER, subject="fired", kind="STAFF", principal_id=who,
        roles=["role of fired"], active=False, version=3,
    )  # fmt: skip
    role = access_pb2.RoleState(tenant_id=desk.harness.tenant_id, name="role of fired", permissions=[], version=3)
    async with desk.server.database.engine.begin() as connection:
        await access.store_principal(connection, tables, state)
        await access.store_role(connection, tables, role)
        older = access_pb2.PrincipalState()
        older.CopyFrom(state)
        older.active, older.version = True, 2
        await access.store_principal(connection, tables, older)
        await access.store_role(
            connection,
            tables,
            access_pb2.RoleState(tenant_id=role.tenant_id, name=role.name, permissions=ALL, version=2),
        )
    assert await outcome(desk.rpc("ListPools", "fired")) == "LOGIN_INACTIVE"
    state.active, state.version = True, 4
    async with desk.server.database.engine.begin() as connection:
        await access.store_principal(connection, tables, state)
    assert await outcome(desk.rpc("ListPools", "fired")) == "PERMISSION_MISSING"


async def test_a_subject_that_was_given_on_signs_nobody_in_wrongly_in_any_order(desk: Small) -> None:
    """Login A gives up `shared`, B takes it: B's event comes first."""
    tables, (a, b) = desk.server.access.tables, (new_id(), new_id())

    def login(who: str, subject: str, version: int) -> access_pb2.PrincipalState:
        return access_pb2.PrincipalState(
            id=who, tenant_id=desk.harness.tenant_id, issuer=ISSUER, subject=subject, kind="STAFF", principal_id=who,
            active=True, version=version,
        )  # fmt: skip

    async def hear(state: access_pb2.PrincipalState) -> None:
        async with desk.server.database.engine.begin() as connection:
            await access.hear_principal(connection, tables, state)

    async def signed_in(subject: str) -> Any:
        key = (desk.harness.tenant_id, ISSUER, subject)
        stored = await desk.server.access._stored_principal(key)
        return stored and stored["principal_id"]

    shared, own = f"shared {new_id()}", f"own {new_id()}"
    await hear(login(a, shared, 1))
    await hear(login(b, own, 1))
    await hear(login(b, shared, 2))
    assert await signed_in(shared) is None  # unsure: the owner is asked
    assert await signed_in(own) is None
    desk.owner.logins[shared] = access_pb2.ResolvePrincipalResponse(principal=login(b, shared, 2))
    assert await outcome(desk.rpc("ListPools", shared)) == "PERMISSION_MISSING"
    assert await signed_in(shared) == b
    await hear(login(a, shared, 1))  # an old one, delivered again
    await hear(login(a, f"else {new_id()}", 2))
    desk.server.access.forget_callers()
    assert await outcome(desk.rpc("ListPools", shared)) == "PERMISSION_MISSING"
    assert await signed_in(shared) == b


async def test_who_comes_after_a_change_waits_for_no_look_from_before_it(
    desk: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = f"changed {new_id()}"
    await desk.harness.staff(subject, ["pools.read"])
    watched, gate, looks = desk.server.access, asyncio.Event(), 0
    look = watched._stored_principal

    async def slow(key: tuple[str, str, str]) -> Any:
        nonlocal looks
        looks += 1
        found = await look(key)
        if looks == 1:
            await gate.wait()
        return found

    monkeypatch.setattr(watched, "_stored_principal", slow)
    monkeypatch.setattr(watched, "_cache_for", 2.0)
    before = [asyncio.create_task(desk.rpc("ListPools", subject)) for _ in range(2)]
    while not looks:
        await asyncio.sleep(0.01)
    await desk.sql("UPDATE principal SET active = false WHERE subject = :subject", subject=subject)
    watched.forget_callers()
    try:
        assert await outcome(asyncio.wait_for(desk.rpc("ListPools", subject), 3)) == "LOGIN_INACTIVE"
    finally:
        gate.set()
    before[0].cancel()  # the first of them takes nobody along
    await before[1]
    assert looks == 2
    assert not watched._looking
    assert await outcome(desk.rpc("ListPools", subject)) == "LOGIN_INACTIVE"
    watched.forget_callers()


# -- reading through ---------------------------------------------------------------------------------------------------


async def test_a_patient_that_this_service_has_not_heard_of_is_read_through(desk: Small) -> None:
    patient = new_id()
    desk.owner.known[patient] = access_pb2.SubjectAccess(
        subject_id=patient, tenant_id=desk.harness.tenant_id, access_version=1, grantee_ids=[patient, desk.clinic]
    )
    asked = len(desk.owner.asked)
    consent = await desk.consent(patient)
    assert desk.owner.asked[asked:] == [patient]
    assert await outcome(desk.rpc("GetConsent", id=consent.id)) == "OK"
    assert desk.owner.asked[asked:] == [patient]


async def test_only_who_was_asked_about_counts_as_confirmed(desk: Small) -> None:
    many = [new_id() for _ in range(150)]
    assert await desk.server.access.read_through(desk.harness.tenant_id, many) == many[:100] == desk.owner.asked[-100:]


async def test_broken_glass_is_seen_at_once(desk: Small) -> None:
    nurse = await desk.harness.staff("night nurse", ALL, clinics=[new_id()])
    patient = await desk.patient()
    task = await desk.task(patient)
    assert await outcome(desk.rpc("GetTask", "night nurse", id=task.id)) == "NOT_FOUND"
    desk.owner.known[patient] = access_pb2.SubjectAccess(
        subject_id=patient, tenant_id=desk.harness.tenant_id, access_version=9, grantee_ids=[patient, desk.clinic]
    )
    desk.owner.known[patient].timed_grants.add(grantee_id=nurse).expire_time.FromSeconds(4102444800)
    assert await outcome(desk.rpc("GetTask", "night nurse", id=task.id)) == "OK"


def signed_in(desk: Small, name: str, principal: str, kind: str, clinic: str) -> None:
    """Let the owner know a login of `Harness.staff`."""
    role = f"role of {name}"
    desk.owner.logins[name] = access_pb2.ResolvePrincipalResponse(
        principal=access_pb2.PrincipalState(
            id=principal, tenant_id=desk.harness.tenant_id, issuer=ISSUER, subject=name, kind=kind,
            principal_id=principal, roles=[role], group_ids=[clinic], active=True, version=2,
        ),
        roles=[access_pb2.RoleState(tenant_id=desk.harness.tenant_id, name=role, permissions=ALL, version=1)],
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["STAFF", "PATIENT"])
@pytest.mark.parametrize("age", [0.0, 60.0, 1000.0])
@pytest.mark.parametrize("away", [False, True], ids=["asked", "away"])
async def test_an_unknown_id_and_a_hidden_one_look_the_same(desk: Small, kind: str, age: float, away: bool) -> None:
    """The same answer by the same statements and as many questions to the owner: for reads, writes, fresh and stale."""
    who = f"prying {kind} {age} {away}"
    prying = await desk.harness.staff(who, ALL, clinics=[new_id()], kind=kind)
    signed_in(desk, who, prying, kind, new_id())
    hidden = await desk.task(await desk.patient())
    desk.owner.known[hidden.patient_id] = access_pb2.SubjectAccess(
        subject_id=hidden.patient_id,
        tenant_id=desk.harness.tenant_id,
        access_version=1,
        grantee_ids=[hidden.patient_id, desk.clinic],
    )
    async with heard(desk, age):
        desk.server.access._cache_for = 60.0  # else the login itself can't be confirmed
        try:
            await desk.rpc("ListPools", who)
            desk.owner.away = away
            for method, ids in (
                ("GetTask", (hidden.id, new_id())),
                ("ClaimTask", (hidden.id, new_id())),
                ("CreateConsent", (hidden.patient_id, new_id())),
            ):
                known, unknown = [await _trace(desk, method, who, wanted) for wanted in ids]
                assert known == unknown, method
                assert known[0][1] == ("ACCESS_UNCONFIRMED" if away else "NOT_FOUND")
        finally:
            desk.server.access._cache_for = 0.0
            desk.server.access.forget_callers()


async def _trace(desk: Small, method: str, who: str, wanted: str) -> tuple[Any, ...]:
    desk.server.access._denies.clear()
    asked = len(desk.owner.asked)
    with desk.statements() as statements:
        try:
            if method == "CreateConsent":
                await desk.consent(wanted, who)
            else:
                await desk.rpc(method, who, id=wanted)
            raise AssertionError("it was to be hidden")
        except Problem as problem:
            told = (type(problem), problem.reason, problem.message, tuple(problem.metadata))
    assert statements
    kept = ("INSERT INTO record_subject", "SELECT FROM record_subject")
    sent = tuple("what the owner said" if one.startswith(kept) else one for one in statements)
    return told, sent, len(desk.owner.asked) - asked


async def test_denies_ask_the_owner_twenty_times_and_then_once_in_two_seconds(desk: Small) -> None:
    now = 1000.0
    await desk.harness.staff("guessing", ALL, clinics=[new_id()])
    hidden = await desk.task(await desk.patient())
    watched = desk.server.access
    clock, watched._clock = watched._clock, lambda: now
    watched._heard_at, watched._heard_age = now, -86400.0
    try:
        asked = len(desk.owner.asked)
        for number in range(25):
            wanted = hidden.id if number % 2 else new_id()
            assert await outcome(desk.rpc("GetTask", "guessing", id=wanted)) == "NOT_FOUND"
        assert len(desk.owner.asked) - asked == 20
        for step, more in ((1.9, 0), (0.2, 1), (1.0, 0), (1.1, 1)):
            now += step
            before = len(desk.owner.asked)
            for _ in range(3):
                assert await outcome(desk.rpc("GetTask", "guessing", id=new_id())) == "NOT_FOUND"
            assert len(desk.owner.asked) - before == more, step
        # Others have a budget of their own, and after ten quiet seconds it is full again.
        await desk.harness.staff("other", ALL, clinics=[new_id()])
        before = len(desk.owner.asked)
        await outcome(desk.rpc("GetTask", "other", id=new_id()))
        assert len(desk.owner.asked) - before == 1
        now += 15
        before = len(desk.owner.asked)
        for _ in range(22):
            await outcome(desk.rpc("GetTask", "guessing", id=new_id()))
        assert len(desk.owner.asked) - before == 20
    finally:
        watched._clock = clock
        watched._heard_at = clock()


async def test_an_unknown_login_asks_the_owner_no_more_often_than_a_deny(desk: Small) -> None:
    stranger, asked = f"stranger {new_id()}", len(desk.owner.asked)
    for _ in range(25):
        assert await outcome(desk.rpc("ListPools", stranger)) == "LOGIN_UNKNOWN"
    assert 20 <= len(desk.owner.asked) - asked <= 21


async def test_what_turns_out_to_be_allowed_uses_no_budget_up(desk: Small) -> None:
    for _ in range(30):
        patient = new_id()
        desk.owner.known[patient] = access_pb2.SubjectAccess(
            subject_id=patient, tenant_id=desk.harness.tenant_id, access_version=1, grantee_ids=[patient, desk.clinic]
        )
        assert await outcome(desk.consent(patient)) == "OK"


async def test_a_deny_with_the_owner_away_is_unavailable_not_a_lie(desk: Small) -> None:
    desk.owner.away = True
    assert await outcome(desk.rpc("GetTask", id=new_id())) == "ACCESS_UNCONFIRMED"
    assert await outcome(desk.rpc("GetTask", f"new here {new_id()}", id=new_id())) == "ACCESS_UNCONFIRMED"


# -- how old the projection may be -------------------------------------------------------------------------------------


async def test_staff_go_on_for_fifteen_minutes_and_patients_for_thirty_seconds(desk: Small) -> None:
    patient = await desk.patient()
    task = await desk.task(patient)
    await desk.harness.staff("portal", ALL, kind="PATIENT", principal_id=patient)
    desk.server.access._cache_for = 60.0
    await outcome(desk.rpc("ListPools"))
    await outcome(desk.rpc("ListPools", "portal"))
    desk.owner.away = True
    try:
        for age, staff, own in (
            (9, "OK", "OK"),
            (31, "OK", "ACCESS_UNCONFIRMED"),
            (901, "ACCESS_UNCONFIRMED", "ACCESS_UNCONFIRMED"),
        ):
            async with heard(desk, age):
                for who, expected in (("ada", staff), ("portal", own)):
                    assert await outcome(desk.rpc("GetTask", who, id=task.id)) == expected, (age, who)
                    assert await outcome(desk.rpc("ListTasks", who, patient_id=patient)) == expected, (age, who)
    finally:
        desk.server.access._cache_for = 0.0
        desk.server.access.forget_callers()


async def test_a_stale_projection_is_confirmed_live_and_follows_what_the_owner_says(desk: Small) -> None:
    patient = await desk.patient()
    task = await desk.task(patient)
    who = await desk.harness.staff("portal2", ALL, kind="PATIENT", principal_id=patient)
    signed_in(desk, "ada", desk.ada, "STAFF", desk.clinic)
    signed_in(desk, "portal2", who, "PATIENT", desk.clinic)
    state = desk.owner.known[patient] = access_pb2.SubjectAccess(
        subject_id=patient, tenant_id=desk.harness.tenant_id, access_version=1, grantee_ids=[patient, desk.clinic]
    )
    async with heard(desk, 1000):
        for name in ("ada", "portal2"):
            for _ in range(25):  # each one live, and none of them a deny
                assert await outcome(desk.rpc("GetTask", name, id=task.id)) == "OK"
            listed = await desk.rpc("ListTasks", name, patient_id=patient)
            assert [one.id for one in listed.tasks] == [task.id]
        # Nobody in particular is named: better no answer than a wrong one.
        assert await outcome(desk.rpc("ListTasks")) == "ACCESS_STALE"
        state.access_version, state.grantee_ids[:] = 2, [patient]
        assert await outcome(desk.rpc("GetTask", id=task.id)) == "NOT_FOUND"
        assert await outcome(desk.rpc("GetTask", "portal2", id=task.id)) == "OK"
        desk.owner.logins["ada"].principal.active = False
        desk.owner.logins["ada"].principal.version = 3
        assert await outcome(desk.rpc("GetTask", id=task.id)) == "LOGIN_INACTIVE"
        desk.owner.logins["ada"].principal.active = True
        desk.owner.logins["ada"].principal.version = 4
        assert await outcome(desk.rpc("ListPools")) == "OK"


async def test_broken_glass_and_proxies_are_confirmed_after_thirty_seconds(desk: Small) -> None:
    nurse = await desk.harness.staff("late nurse", ALL, clinics=[new_id()])
    patient = await desk.patient()
    task = await desk.task(patient)
    await grant(desk, patient, desk.clinic, version=2, timed=[(nurse, 3600, [])])
    assert await outcome(desk.rpc("GetTask", "late nurse", id=task.id)) == "OK"
    async with heard(desk, 60):
        asked = len(desk.owner.asked)
        desk.owner.away = True
        assert await outcome(desk.rpc("GetTask", "late nurse", id=task.id)) == "ACCESS_UNCONFIRMED"
        desk.owner.away = False
        assert await outcome(desk.rpc("GetTask", "late nurse", id=task.id)) == "OK"
        assert desk.owner.asked[asked:] == [patient, patient]
        assert await outcome(desk.rpc("GetTask", id=task.id)) == "OK"
        assert desk.owner.asked[asked:] == [patient, patient]


def test_the_limits_are_exact_by_kind_of_caller(running: Small) -> None:
    watched = running.server.access
    kept = watched._clock, watched._heard_age, watched._heard_at
    try:
        watched._clock, watched._heard_at = (lambda: 0.0), 0.0
        for age, staff, timed, own in (
            (30, True, True, True),
            (30.1, True, False, False),
            (900.1, False, False, False),
        ):
            watched._heard_age = age
            by_kind = {
                kind: watched.conditions(Caller(kind, "x", "y"), "z") for kind in ("staff", "patient", "related")
            }
            assert [by_kind[kind]["plain"] for kind in by_kind] == [staff, own, own]
            assert {one["timed"] for one in by_kind.values()} == {timed}
    finally:
        watched._clock, watched._heard_age, watched._heard_at = kept


async def test_the_age_is_that_of_the_partition_heard_of_longest_ago(desk: Small) -> None:
    watched = desk.server.access
    async with heard(desk, 3):
        await desk.sql("UPDATE access_heartbeat SET time = time - interval '500 seconds' WHERE partition = 7")
        async with asyncio.timeout(5):
            while watched.age < 490:
                await asyncio.sleep(0.05)
        await desk.sql("DELETE FROM access_heartbeat WHERE partition = 7")
        async with asyncio.timeout(5):
            while watched.age != float("inf"):
                await asyncio.sleep(0.05)
        await desk.sql("INSERT INTO access_heartbeat VALUES (7, clock_timestamp())")
        async with asyncio.timeout(5):
            while watched.age > 30:
                await asyncio.sleep(0.05)
    assert len(await desk.sql("SELECT 1 FROM access_heartbeat")) == PARTITIONS


def test_what_is_shipped_is_thirty_seconds_and_fifteen_minutes() -> None:
    shipped = Settings()
    assert (shipped.access_stale_patient, shipped.access_stale_staff) == (30.0, 900.0)
    assert (shipped.idempotency_hours, shipped.lock_timeout, shipped.token_cache) == (48, 2.0, 60.0)


async def test_a_login_that_the_owner_no_longer_knows_is_out(desk: Small) -> None:
    who = await desk.harness.staff("leaver", ALL, clinics=[desk.clinic])
    assert who
    async with heard(desk, 1000):
        with pytest.raises(Unauthenticated) as refused:
            await desk.rpc("ListPools", "leaver")
        assert refused.value.reason == "LOGIN_UNKNOWN"


async def test_a_new_row_needs_sight_of_its_patient(desk: Small) -> None:
    await desk.harness.staff("outsider", ALL, clinics=[new_id()])
    patient = await desk.patient()
    with pytest.raises(NotFound):
        await desk.consent(patient, "outsider")
    with pytest.raises(NotFound):
        await desk.consent(new_id())
    desk.owner.away = True
    with pytest.raises(Unavailable):
        await desk.consent(new_id())


async def test_a_login_is_looked_up_on_the_short_way(desk: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = desk.server.access
    watched.forget_callers()
    found: list[int] = []
    fetch = watched._fetch
    assert fetch is not None

    async def counted(statement: Any, named: Any) -> Any:
        rows = await fetch(statement, named)
        found.append(len(rows))
        return rows

    monkeypatch.setattr(watched, "_fetch", counted)
    await desk.rpc("ListPools", "ada")
    assert found == [1]

"""The worklist: one owner, one due time, and nobody works on what another has taken."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from care.patients.v1 import tasks_pb2 as pb
from care.referrals.v1 import events_pb2 as referral_events
from care.scheduling.v1 import directory_pb2
from sqlalchemy import text

from chassis.errors import Problem
from chassis.ids import new_id
from services.patients.tests.desk import WORK, stamp


def in_hours(hours):
    return stamp(datetime.now(UTC) + timedelta(hours=hours))


async def a_task(desk, patient, hours=24, **more):
    fields = {"code": "call-patient", "patient_id": patient.id, "due_time": in_hours(hours), **more}
    return await desk.rpc("CreateTask", task=fields)


async def for_the_pool(desk, patient, **more):
    return await a_task(desk, patient, owner={"type": "Pool", "id": desk.pools["coordination"]}, **more)


async def test_a_task_made_by_hand_is_its_makers_and_says_so_in_its_history(desk):
    patient = await desk.patient()
    task = await a_task(desk, patient, note="ask about the ride")
    self_id = (await desk.rpc("ClaimTask", id=task.id)).owner.id
    assert (task.owner.type, task.owner.id, task.status) == ("Staff", self_id, pb.Task.READY)
    assert (task.source.type, task.source.id, task.due_basis) == ("Patient", patient.id, "stated")
    assert [(step.action, step.actor) for step in task.history] == [("create", f"staff:{self_id}")]


async def test_the_same_task_may_be_made_by_hand_twice(desk):
    patient = await desk.patient()
    first, second = await a_task(desk, patient), await a_task(desk, patient)
    assert first.id != second.id


async def test_a_task_made_by_hand_carries_the_labels_of_its_clinic_source_and_patient(desk):
    await desk.harness.staff("rika", WORK, clinics=[desk.clinic], clearances=["42CFRPart2", "PSY"])
    patient, other = await desk.patient(), await desk.patient()
    clinic = directory_pb2.Clinic(id=new_id(), security_labels=["42CFRPart2"])
    plain = directory_pb2.Clinic(id=clinic.id)
    await desk.tell(
        desk.event("clinic.changed", "", clinic, version=2), desk.event("clinic.changed", "", plain, version=1)
    )
    referral = referral_events.ReferralEvent(id=new_id())
    await desk.tell(desk.event("referral.created", patient.id, referral, security_labels=["PSY"]), service="referrals")
    source = {"type": "Referral", "id": referral.id}
    labels = {
        (await a_task(desk, patient, clinic_id=clinic.id)).id: ["42CFRPart2"],
        (await a_task(desk, patient, source=source)).id: ["PSY"],
        (await a_task(desk, patient, source=source, clinic_id=clinic.id)).id: ["42CFRPart2", "PSY"],
        (await a_task(desk, patient, clinic_id=desk.clinic)).id: [],
        # Somebody else's source says nothing.
        (await a_task(desk, other, source=source)).id: [],
    }
    async with desk.harness.servers["patients"].database.engine.begin() as connection:
        await connection.execute(text("UPDATE patient SET security_labels = '{PSY}' WHERE id = :id"), {"id": other.id})
    labels[(await a_task(desk, other)).id] = ["PSY"]
    async with desk.harness.servers["patients"].database.engine.connect() as connection:
        rows = await connection.execute(
            text("SELECT id::text, security_labels FROM task WHERE id = ANY(CAST(:ids AS uuid[]))"),
            {"ids": list(labels)},
        )
        assert {row[0]: row[1] for row in rows} == labels
    said = {"patient_id": patient.id, "channel": "VOICE", "direction": "OUTBOUND", "outcome": "NO_ANSWER"}
    await desk.rpc("CreateContact", contact={**said, "referral_id": referral.id})
    assert list((await desk.rpc("ListContacts", patient_id=patient.id)).contacts) == []
    assert len((await desk.rpc("ListContacts", "rika", patient_id=patient.id)).contacts) == 1
    seen = {task.id for task in await desk.tasks(patient.id)}
    assert {id for id in labels if id in seen} == {id for id, has in list(labels.items())[:4] if not has}
    assert len(await desk.tasks(patient.id, who="rika")) == 4


async def test_a_task_without_due_time_is_refused(desk):
    patient = await desk.patient()
    with pytest.raises(Problem) as refused:
        await desk.rpc("CreateTask", task={"code": "call-patient", "patient_id": patient.id})
    assert refused.value.reason == "DUE_TIME_MISSING"


@pytest.mark.parametrize("kind", ["Pool", "Staff", "Patient"])
async def test_nobody_who_is_unknown_owns_a_task(desk, kind):
    patient = await desk.patient()
    owner = {"type": kind, "id": new_id()}
    with pytest.raises(Problem) as made:
        await a_task(desk, patient, owner=owner)
    task = await a_task(desk, patient)
    with pytest.raises(Problem) as given:
        await desk.rpc("AssignTask", id=task.id, owner=owner)
    assert made.value.reason == given.value.reason == "OWNER_UNKNOWN"


async def test_a_pool_that_is_out_of_use_owns_no_new_task(desk):
    pool = await desk.rpc("CreatePool", pool={"name": f"old {new_id()}", "active": False})
    patient = await desk.patient()
    with pytest.raises(Problem) as refused:
        await a_task(desk, patient, owner={"type": "Pool", "id": pool.id})
    assert refused.value.reason == "OWNER_UNKNOWN"


async def test_of_two_who_claim_a_task_one_gets_it(desk):
    patient = await desk.patient()
    for _ in range(5):
        task = await for_the_pool(desk, patient)
        answers = await asyncio.gather(
            desk.rpc("ClaimTask", "cora", id=task.id), desk.rpc("ClaimTask", "carl", id=task.id), return_exceptions=True
        )
        taken = [one for one in answers if isinstance(one, pb.Task)]
        refused = [one for one in answers if isinstance(one, Problem)]
        assert len(taken) == 1 and [one.reason for one in refused] == ["ILLEGAL_TRANSITION"]
        kept = await desk.rpc("GetTask", id=task.id)
        assert kept.owner == taken[0].owner and kept.status == pb.Task.IN_PROGRESS


async def test_a_released_task_waits_in_its_pool_again(desk):
    patient = await desk.patient()
    task = await for_the_pool(desk, patient)
    await desk.rpc("ClaimTask", id=task.id)
    released = await desk.rpc("ReleaseTask", id=task.id)
    assert (released.status, released.owner.id) == (pb.Task.READY, desk.pools["coordination"])
    with pytest.raises(Problem) as again:
        await desk.rpc("ReleaseTask", id=task.id)
    assert again.value.reason == "ILLEGAL_TRANSITION"
    own = await a_task(desk, patient)
    await desk.rpc("ClaimTask", id=own.id)
    with pytest.raises(Problem) as homeless:
        await desk.rpc("ReleaseTask", id=own.id)
    assert homeless.value.reason == "NO_POOL"
    assert (await desk.rpc("GetTask", id=own.id)).status == pb.Task.IN_PROGRESS


async def test_the_worklist_shows_open_tasks_first_due_first_page_by_page(desk):
    patient = await desk.patient()
    late, soon, done = [await a_task(desk, patient, hours=hours) for hours in (30, 2, 1)]
    completed = await desk.rpc("CompleteTask", id=done.id, outcome={"system": "care", "code": "reached"})
    assert (completed.status, completed.outcome.code) == (pb.Task.COMPLETED, "reached")
    assert [one.id for one in await desk.tasks(patient.id)] == [soon.id, late.id]
    assert [one.id for one in await desk.tasks(patient.id, statuses=["COMPLETED"])] == [done.id]
    assert [one.id for one in await desk.tasks(patient.id, due_before=in_hours(3))] == [soon.id]
    first = await desk.rpc("ListTasks", patient_id=patient.id, page_size=1)
    second = await desk.rpc("ListTasks", patient_id=patient.id, page_size=1, page_token=first.next_page_token)
    assert [first.tasks[0].id, second.tasks[0].id, second.next_page_token] == [soon.id, late.id, ""]


async def test_the_worklist_is_filtered_by_owner_clinic_and_code(desk):
    patient = await desk.patient()
    pooled = await for_the_pool(desk, patient, clinic_id=desk.clinic, code="check-form")
    await a_task(desk, patient)
    for fields in (
        {"owner_ids": [desk.pools["coordination"]]},
        {"clinic_ids": [desk.clinic]},
        {"codes": ["check-form"]},
    ):
        assert [one.id for one in await desk.tasks(patient.id, **fields)] == [pooled.id]


async def test_the_worklist_holds_nothing_about_another_clinics_patients(desk):
    patient = await desk.patient()
    task = await for_the_pool(desk, patient)
    listed = await desk.rpc("ListTasks", "elias", owner_ids=[desk.pools["coordination"]], page_size=200)
    assert task.id not in {one.id for one in listed.tasks}
    with pytest.raises(Problem) as refused:
        await desk.rpc("ClaimTask", "elias", id=task.id)
    assert refused.value.reason == "NOT_FOUND"


async def test_a_snoozed_task_is_hidden_until_its_time_and_never_beyond_its_due_time(desk):
    patient = await desk.patient()
    task = await a_task(desk, patient, hours=5)
    with pytest.raises(Problem) as refused:
        await desk.rpc("SnoozeTask", id=task.id, snooze_time=in_hours(6))
    assert refused.value.reason == "SNOOZE_PAST_DUE"
    snoozed = await desk.rpc("SnoozeTask", id=task.id, snooze_time=in_hours(1))
    assert snoozed.due_time == task.due_time
    assert await desk.tasks(patient.id) == []
    assert [one.id for one in await desk.tasks(patient.id, include_snoozed=True)] == [task.id]
    soon = stamp(datetime.now(UTC) + timedelta(seconds=0.3))
    await desk.rpc("SnoozeTask", id=task.id, snooze_time=soon)
    assert await desk.until(desk.tasks, patient.id)


async def test_an_ended_task_is_not_taken_assigned_or_ended_again(desk):
    patient = await desk.patient()
    task = await a_task(desk, patient)
    outcome = {"code": "reached"}
    await desk.rpc("CompleteTask", id=task.id, outcome=outcome)
    pool = {"type": "Pool", "id": desk.pools["coordination"]}
    for method, fields in (
        ("ClaimTask", {}),
        ("AssignTask", {"owner": pool}),
        ("CompleteTask", {"outcome": outcome}),
        ("SnoozeTask", {"snooze_time": in_hours(1)}),
    ):
        with pytest.raises(Problem) as refused:
            await desk.rpc(method, id=task.id, **fields)
        assert refused.value.reason == "ILLEGAL_TRANSITION"


async def test_an_assigned_task_has_its_new_owner_and_a_stale_etag_is_refused(desk):
    patient = await desk.patient()
    staff = await desk.rpc("CreateStaff", staff={"name": {"family_name": "Nurse"}, "clinic_ids": [desk.clinic]})
    task = await for_the_pool(desk, patient)
    owner = {"type": "Staff", "id": staff.id}
    given = await desk.rpc("AssignTask", id=task.id, owner=owner, etag=task.etag)
    assert (given.owner.id, given.status) == (staff.id, pb.Task.READY)
    assert [step.action for step in given.history] == ["create", "assign"]
    with pytest.raises(Problem) as refused:
        await desk.rpc("AssignTask", id=task.id, owner=owner, etag=task.etag)
    assert refused.value.reason == "ETAG_MISMATCH"


async def test_setting_deceased_makes_one_task(desk):
    patient = await desk.patient()
    dead = await desk.rpc(
        "UpdatePatient",
        patient={"id": patient.id, "deceased": True, "deceased_date": "2026-01"},
        update_mask={"paths": ["deceased", "deceased_date"]},
        etag=patient.etag,
    )
    await desk.rpc(
        "UpdatePatient",
        patient={"id": patient.id, "deceased": True, "deceased_date": "2026-01-02"},
        update_mask={"paths": ["deceased", "deceased_date"]},
        etag=dead.etag,
    )
    (task,) = await desk.tasks(patient.id)
    assert (task.code, task.owner.id) == ("deceased-review", desk.pools["coordination"])
    assert task.due_basis.startswith("1 business day")

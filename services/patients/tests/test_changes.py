"""Lists of what changed since: whoever goes on with the token misses nothing and hears nothing twice."""

import asyncio
import random
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text

from chassis.database import engine
from chassis.errors import Problem
from services.patients.tests.desk import stamp
from services.patients.tests.test_worklist import a_task, in_hours

SETTLED = 1.2
"""Seconds after which a change is shown, where nothing else is under way."""


class Follower:
    """Reads what changed of a patient's tasks, page by page, and keeps the last token."""

    def __init__(self, desk, patient, who="cora"):
        self.desk, self.who, self.token = desk, who, ""
        self.wanted = {"patient_id": patient.id, "updated_after": stamp(datetime.now(UTC) - timedelta(days=1))}

    async def page(self, size=50):
        answer = await self.desk.rpc("ListTasks", self.who, page_size=size, page_token=self.token, **self.wanted)
        assert answer.next_page_token, "one could not go on"
        self.token = answer.next_page_token
        return [(task.id, task.etag) for task in answer.tasks]

    async def all(self, size=50):
        found = []
        while page := await self.page(size):
            found += page
        return found


async def test_whoever_goes_on_with_the_token_hears_each_change_once_and_what_was_closed_too(desk):
    patient = await desk.patient()
    first, second, third = [await a_task(desk, patient) for _ in range(3)]
    await asyncio.sleep(SETTLED)
    follower = Follower(desk, patient)
    assert await follower.all(size=2) == [(task.id, task.etag) for task in (first, second, third)]
    assert await follower.all() == []
    closed = await desk.rpc("CompleteTask", id=second.id, outcome={"code": "done"})
    await asyncio.sleep(SETTLED)
    assert await follower.all() == [(second.id, closed.etag)]
    assert [task.id for task in await desk.tasks(patient.id)] == [first.id, third.id]


async def test_a_change_whose_transaction_ends_late_is_not_passed_over(desk):
    patient = await desk.patient()
    slow, follower = await a_task(desk, patient), Follower(desk, patient)
    async with desk.harness.servers["patients"].database.engine.connect() as connection:
        begun = await connection.begin()
        await connection.execute(
            text("UPDATE task SET update_time = clock_timestamp(), version = version + 1 WHERE id = :id"),
            {"id": slow.id},
        )
        quick = await a_task(desk, patient)
        await asyncio.sleep(SETTLED)
        assert await follower.all() == [], "what came later was shown first"
        await begun.commit()
    await asyncio.sleep(SETTLED)
    assert [task for task, _ in await follower.all()] == [slow.id, quick.id]


async def test_nobody_waits_for_a_verification_of_the_audit(desk):
    """It reads the whole audit in one transaction: for up to an hour every list of changes stood still."""
    patient = await desk.patient()
    verifying = engine(desk.harness.servers["patients"].settings, application="audit")
    async with verifying.connect() as connection:
        await connection.execute(text("SELECT 1"))
        task = await a_task(desk, patient)
        await asyncio.sleep(SETTLED)
        assert await Follower(desk, patient).all() == [(task.id, task.etag)]
    await verifying.dispose()


async def test_a_reader_beside_many_writers_ends_with_what_there_is(desk):
    patient = await desk.patient()
    follower, heard = Follower(desk, patient), {}
    writing = asyncio.gather(*(_change_often(desk, patient) for _ in range(8)))
    while not writing.done():
        heard.update(await follower.page(size=5))
    last = dict(await writing)
    await asyncio.sleep(SETTLED)
    heard.update(await follower.all())
    assert heard == last


async def _change_often(desk, patient):
    task = await a_task(desk, patient)
    for hours in range(1, 5):
        await asyncio.sleep(random.random() / 2)
        task = await desk.rpc("SnoozeTask", id=task.id, snooze_time=in_hours(hours))
    return task.id, task.etag


async def test_a_token_serves_the_changes_after_one_time_only(desk):
    patient = await desk.patient()
    follower = Follower(desk, patient)
    await follower.page()
    follower.wanted["updated_after"] = stamp(datetime.now(UTC))
    with pytest.raises(Problem) as refused:
        await follower.page()
    assert refused.value.reason == "PAGE_TOKEN_INVALID"


async def test_changes_are_of_those_whom_one_may_see(desk):
    patient = await desk.patient()
    await a_task(desk, patient)
    await asyncio.sleep(SETTLED)
    assert len(await Follower(desk, patient).all()) == 1
    with pytest.raises(Problem) as refused:
        await Follower(desk, patient, "elias").all()
    assert refused.value.reason == "NOT_FOUND"
    answer = await desk.rpc("ListTasks", "elias", updated_after=stamp(datetime.now(UTC) - timedelta(days=1)))
    assert not list(answer.tasks)

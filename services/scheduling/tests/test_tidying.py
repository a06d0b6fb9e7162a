"""Old occupancy goes, whatever lies ahead or is still of use stays, and nobody waits for it."""

import asyncio
from datetime import timedelta

from sqlalchemy import text

from services.scheduling import tidying
from services.scheduling.service import SERVICE
from services.scheduling.settings import SchedulingSettings
from services.scheduling.tests.desk import soon

# Lets a visit end so many seconds before now. What is packed stays within its resource and lane.
AGE = """
UPDATE occupancy SET during = int8range(at - 1800, at) FROM (
  SELECT o.holder_id AS holder, o.no AS number,
         (o.no << 34) + (o.lane << 32) + extract(epoch FROM clock_timestamp())::bigint - :seconds AS at
    FROM occupancy o) AS moved
 WHERE holder = holder_id AND number = no AND holder_id = :id
"""
WEEK = 7 * 86400


async def kept(desk, *visits):
    rows = await desk.sql("SELECT DISTINCT holder_id::text FROM occupancy")
    return [one.id in {row[0] for row in rows} for one in visits]


async def a_visit(desk, hour, ended=None, practitioner=""):
    made = await desk.book(await desk.a_patient(), soon(days=3, hour=0) + timedelta(hours=hour), practitioner)
    if ended is not None:
        await desk.sql(AGE, id=made.id, seconds=ended)
    return made


async def tidy(desk):
    return await tidying.delete_old_occupancy(desk.harness.servers["scheduling"].runtime)


async def test_what_ended_a_week_ago_is_deleted_and_nothing_else(desk):
    long_ago, just_over = await a_visit(desk, 0, 300 * 86400), await a_visit(desk, 1, WEEK + 60)
    not_yet, ahead = await a_visit(desk, 2, WEEK - 60, desk.other), await a_visit(desk, 3)
    await desk.sql("UPDATE occupancy SET lane = 3, during = int8range(lower(during) + (3::bigint << 32),"
                   " upper(during) + (3::bigint << 32)) WHERE holder_id = :id", id=just_over.id)  # fmt: skip
    assert await tidy(desk) == 4  # the doctor's and the patient's of both
    assert await kept(desk, long_ago, just_over, not_yet, ahead) == [False, False, True, True]
    assert await tidy(desk) == 0


async def test_it_walks_the_table_a_few_pages_at_a_time(desk, monkeypatch):
    monkeypatch.setattr(tidying, "PAGES", 1)
    monkeypatch.setattr(tidying, "_REST_SECONDS", 0)
    visits = [
        await a_visit(desk, 10 + n, WEEK * 2 + 4000 * n, practitioner)
        for n in range(20)
        for practitioner in (desk.doctor, desk.other)
    ]
    ((pages,),) = await desk.sql("SELECT max((ctid::text::point)[0]) FROM occupancy")
    assert pages >= 1
    assert await tidy(desk) == 2 * len(visits)
    assert await tidy(desk) == 0


async def test_neither_a_booking_nor_another_replica_waits_for_it(desk):
    for hour in (20, 21):
        await a_visit(desk, hour, WEEK * 3 + 4000 * hour)
    async with desk.database.engine.connect() as other, asyncio.timeout(5):
        await other.execute(tidying._DELETE, {"kept": timedelta(seconds=WEEK), "first": "(0,0)", "end": "(1000,0)"})
        assert await tidy(desk) == 0  # the other has them in hand
        await a_visit(desk, 22)
        await other.rollback()
    assert await tidy(desk) == 4
    for hour in (25, 26):
        await a_visit(desk, hour, WEEK * 3 + 4000 * hour)
    # Nor does it wait for a visit whose rows somebody has locked.
    async with desk.database.engine.connect() as other, asyncio.timeout(5):
        await other.execute(text("SELECT FROM occupancy FOR UPDATE"))
        assert await tidy(desk) == 0
        await other.rollback()
    assert await tidy(desk) == 4


async def test_freed_slots_go_when_they_are_old_and_settled(desk):
    for days, status in ((500, "FREE"), (500, "OPEN"), (500, "OFFERED"), (300, "FILLED")):
        await desk.sql(
            "INSERT INTO freed_slot (tenant_id, id, version, create_time, visit_type_id, clinic_id, practitioner_id,"
            " start_time, end_time, time_zone, cause, status, due_time) SELECT tenant_id, gen_random_uuid(), 1,"
            " clock_timestamp() - make_interval(days => :days), id, id, id, now(), now(), 'UTC', 'CANCELLED', :status,"
            " 'infinity' FROM visit_type LIMIT 1",
            days=days, status=status,
        )  # fmt: skip
    assert await tidy(desk) == 1
    left = await desk.sql("SELECT status FROM freed_slot WHERE due_time = 'infinity'")
    assert {row.status for row in left} == {"OPEN", "OFFERED", "FILLED"}
    await desk.sql("DELETE FROM freed_slot WHERE due_time = 'infinity'")


async def test_the_service_runs_it_and_its_setting_is_a_week():
    assert "old occupancy" in {loop.name for loop in SERVICE.loops}
    assert SchedulingSettings.model_fields["occupancy_kept"].default == WEEK

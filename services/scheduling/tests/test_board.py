"""The day board: one look at a clinic's day."""

from datetime import UTC, date, datetime, timedelta

import pytest
from care.scheduling.v1 import appointments_pb2, board_pb2
from care.scheduling.v1.board_pb2_grpc import DayBoardServiceStub

from chassis.ids import new_id
from chassis.reading import Loader
from services.scheduling import days
from services.scheduling.tests.desk import WORK, refused

DAY = date(2031, 3, 9)  # clocks go forward in New York
Shown = appointments_pb2.Appointment.Status


@pytest.fixture(scope="module")
async def clinic(desk):
    """A clinic of its own, two who work there, and one visit of each kind."""
    desk.ward = await desk.a_clinic()
    await desk.harness.staff("bea", [*WORK, "appointments.overbook"], clinics=[desk.ward])
    await desk.harness.staff("ellis", WORK, clinics=[desk.ward], clearances=["ETH"])
    desk.zoe = await desk.a_practitioner("Zoellner", clinic=desk.ward)
    desk.amy = await desk.a_practitioner("Amsel", clinic=desk.ward)
    desk.crowded = await desk.a_visit_type("board", overbooking_cap=1)
    return desk.ward


async def book(desk, hour, who="", **more):
    start = datetime(2031, 3, 9, hour, tzinfo=UTC)
    patient = await desk.harness.subject(desk.ward)
    more = {"clinic_id": desk.ward, "visit_type_id": desk.crowded, **more}
    return await desk.book(patient, start, who or desk.zoe, "bea", **more)


async def look(desk, subject="bea", **more):
    request = board_pb2.ListDayBoardRequest(**{"clinic_id": desk.ward, "date": DAY.isoformat(), **more})
    return await desk.harness.call("scheduling", DayBoardServiceStub, "ListDayBoard", request, subject)


async def test_a_day_is_shown_by_practitioner_in_one_statement(desk, clinic, monkeypatch):
    """Slow availability (cal.diy#21103, N+1): what a page costs doesn't depend on how much stands on it."""
    early, late = await book(desk, 5), await book(desk, 15)  # midnight of the 9th is 5:00 UTC
    over = await book(desk, 15, overbooking={"reason": "fever"})
    (slot, *_) = (
        await desk.search(
            desk.crowded, "bea", practitioner_ids=[desk.amy], start_time=datetime(2031, 3, 9, 20, tzinfo=UTC)
        )
    ).slots
    held = await desk.hold(await desk.harness.subject(desk.ward), slot, "bea", hold_seconds=3600)
    ended = await desk.hold(
        await desk.harness.subject(desk.ward),
        (await desk.search(desk.crowded, "bea", practitioner_ids=[desk.amy], start_time=slot.end_time)).slots[0],
        "bea",
    )
    await desk.do("Release", ended, "bea")
    gone = await book(desk, 17)
    await desk.do("Cancel", gone, "bea", reason={"code": "pat"})
    await desk.do("EnterInError", await book(desk, 19), "bea")
    await book(desk, 4)  # 23:00 of the 8th
    await desk.do("Arrive", late, "bea")
    await desk.sql(
        "UPDATE appointment SET history = jsonb_set(history, '{-1,time}', to_jsonb(CAST(:at AS text))) WHERE id = :id",
        id=late.id, at=(datetime.now(UTC) - timedelta(minutes=12, seconds=5)).isoformat(),
    )  # fmt: skip
    statements, fetch = [], Loader._fetch

    async def counted(self, sql, together):
        statements.append(sql)
        return await fetch(self, sql, together)

    monkeypatch.setattr(Loader, "_fetch", counted)
    seen = await look(desk)
    # The first time the clinic's zone is not known yet.
    assert len([one for one in statements if "audit" not in one.lower()]) <= 2, statements
    statements.clear()
    assert (await look(desk)).columns == seen.columns
    assert len([one for one in statements if "audit" not in one.lower()]) == 1, statements
    assert (seen.date, seen.time_zone, seen.next_page_token) == ("2031-03-09", "America/New_York", "")
    assert [(one.practitioner_id, one.name.family_name) for one in seen.columns] == [
        (desk.amy, "Amsel"),
        (desk.zoe, "Zoellner"),
    ]
    amy, zoe = seen.columns
    assert [(one.id, one.status) for one in amy.visits] == [(held.id, Shown.PENDING)]
    assert (amy.open_holds, amy.waiting, zoe.open_holds, zoe.waiting) == (1, 0, 0, 1)
    assert amy.visits[0].hold_expire_time == held.hold_expire_time
    assert [one.id for one in zoe.visits] == [early.id, late.id, over.id, gone.id]
    waits = zoe.visits[1]
    assert (waits.status, waits.minutes_waited, waits.overbooking) == (Shown.ARRIVED, 12, 0)
    assert zoe.visits[2].overbooking == 1 and not zoe.visits[0].HasField("arrive_time")
    assert {one.status: one.visits for one in seen.counts} == {
        Shown.PENDING: 1, Shown.BOOKED: 2, Shown.ARRIVED: 1, Shown.CANCELLED: 1,
    }  # fmt: skip
    assert (await desk.do("CheckIn", late, "bea", etag=waits.etag)).status == Shown.CHECKED_IN


async def test_a_board_shows_nobody_whom_the_caller_may_not_see(desk, clinic):
    secret = await desk.a_visit_type("board-secret", security_labels=["ETH"])
    visit = await book(desk, 22, visit_type_id=secret)
    assert visit.id not in {one.id for column in (await look(desk)).columns for one in column.visits}
    assert visit.id in {one.id for column in (await look(desk, "ellis")).columns for one in column.visits}
    assert not any(column.visits for column in (await look(desk, "elias")).columns)


async def test_a_long_day_comes_in_pages(desk, clinic):
    whole = [one.id for column in (await look(desk)).columns for one in column.visits]
    seen, token = [], ""
    while True:
        page = await look(desk, page_size=2, page_token=token)
        seen += [one.id for column in page.columns for one in column.visits]
        token = page.next_page_token
        if not token:
            break
    assert sorted(seen) == sorted(whole)


async def test_a_board_is_of_a_day_and_a_clinic_that_exist(desk, clinic):
    assert await refused(look(desk, clinic_id=new_id())) == "CLINIC_UNKNOWN"
    assert await refused(look(desk, date="2031-02-29")) == "DATE_INVALID"
    today = await look(desk, date="")
    assert abs(date.fromisoformat(today.date) - datetime.now(UTC).date()) <= timedelta(days=1)


async def test_who_works_there_is_named_to_those_who_may_read_the_directory(desk, clinic):
    visit = await book(desk, 18)
    await desk.harness.staff("nina", ["appointments.read"], clinics=[desk.ward])
    seen = await look(desk, subject="nina")
    assert visit.id in {one.id for column in seen.columns for one in column.visits}
    assert all(column.visits and not column.HasField("name") for column in seen.columns)


async def test_who_was_taken_back_no_longer_waits(desk, clinic):
    visit = await book(desk, 21)
    await desk.do("Arrive", visit, "bea")
    await desk.do("Revert", visit, "bea")
    shown = {one.id: one for column in (await look(desk)).columns for one in column.visits}[visit.id]
    assert shown.status == Shown.BOOKED and not shown.HasField("arrive_time") and not shown.minutes_waited


async def test_a_board_begins_at_midnight_of_the_zone_that_the_clinic_has_now(desk, clinic):
    """The zone of the last time is only a guess."""
    place = await desk.a_clinic("Asia/Tokyo")
    await desk.harness.staff("tomo", ["appointments.read", "directory.write", "directory.read"], clinics=[place])
    assert (await look(desk, "tomo", clinic_id=place)).time_zone == "Asia/Tokyo"
    await desk.sql("UPDATE clinic SET time_zone = 'Pacific/Honolulu', version = version + 1 WHERE id = :id", id=place)
    now, day = datetime.now(UTC), await look(desk, "tomo", clinic_id=place, date="")
    assert day.time_zone == "Pacific/Honolulu"
    assert day.date in {days.today(at, "Pacific/Honolulu").isoformat() for at in (now, datetime.now(UTC))}

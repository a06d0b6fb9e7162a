"""Free slots over gRPC: what is shown, in which order, and that whoever takes an offer gets what it says."""

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import event

from chassis.ids import new_id
from services.scheduling.tests.desk import ALWAYS, refused, soon

NEW_YORK, DENVER = ZoneInfo("America/New_York"), ZoneInfo("America/Denver")
OFFICE = [{"weekday": day, "start": "09:00", "end": "12:00"} for day in range(1, 6)]


def local(slot, zone=NEW_YORK):
    return slot.start_time.ToDatetime(tzinfo=UTC).astimezone(zone)


def clock(slots, zone=NEW_YORK):
    return [local(slot, zone).strftime("%H:%M") for slot in slots]


def day(*fields, zone=NEW_YORK):
    return datetime(*fields, tzinfo=zone).astimezone(UTC)


@pytest.fixture(scope="module")
async def office(desk):
    """A practitioner with office hours, whom no other test books."""
    return await desk.a_practitioner("Osei", OFFICE)


async def test_slots_of_two_clinics_come_by_instant_with_their_own_zone(desk):
    west = await desk.a_clinic("America/Denver")
    visit = await desk.a_visit_type("two-zones")
    here = await desk.a_practitioner("Here", OFFICE)
    there = await desk.a_practitioner("There", OFFICE, clinic=west)
    monday = day(2031, 6, 9)
    found = await desk.search(
        visit, start_time=monday, end_time=monday + timedelta(days=1), practitioner_ids=[here, there]
    )
    starts = [slot.start_time.seconds for slot in found.slots]
    assert starts == sorted(starts) and not found.next_page_token
    ours = [slot for slot in found.slots if slot.clinic_id == desk.clinic]
    theirs = [slot for slot in found.slots if slot.clinic_id == west]
    assert clock(ours) == clock(theirs, DENVER) and clock(ours)[0] == "09:00" and clock(ours)[-1] == "11:30"
    assert {slot.time_zone for slot in ours} == {"America/New_York"}
    assert {slot.time_zone for slot in theirs} == {"America/Denver"}
    assert theirs[0].start_time.seconds - ours[0].start_time.seconds == 7200


@pytest.mark.parametrize("change", [date(2031, 3, 9), date(2031, 11, 2), date(2032, 3, 14)])
async def test_office_hours_are_what_the_wall_clock_says_on_both_days_of_change(desk, change, office):
    hours = [{"weekday": 7, "start": "00:00", "end": "12:00"}]
    doctor = await desk.a_practitioner("Sunday", hours)
    begin = datetime.combine(change, datetime.min.time(), NEW_YORK).astimezone(UTC)
    found = await desk.search(
        start_time=begin, end_time=begin + timedelta(days=1), practitioner_ids=[doctor], earliest="08:00", page_size=200
    )
    assert clock(found.slots)[0] == "08:00" and clock(found.slots)[-1] == "11:30" and len(found.slots) == 15
    late = await desk.book(await desk.a_patient(), local(found.slots[-1]), doctor)
    assert late.start_time == found.slots[-1].start_time


async def test_wishes_are_heard_in_the_clinics_zone(desk, office):
    begin = day(2031, 6, 9)
    found = await desk.search(
        start_time=begin,
        end_time=begin + timedelta(days=7),
        practitioner_ids=[office],
        weekdays=[2, 4],
        earliest="10:00",
        latest="11:00",
    )
    assert [(local(slot).isoweekday(), local(slot).strftime("%H:%M")) for slot in found.slots] == [
        (weekday, clock) for weekday in (2, 4) for clock in ("10:00", "10:15", "10:30")
    ]


async def test_exceptions_closed_days_and_holidays_are_closed(desk):
    clinic = await desk.a_clinic(holiday_region="US", closed_dates=["2031-07-03"])
    exceptions = [
        {"date": "2031-07-01", "kind": "CLOSED"},
        {"date": "2031-07-02", "kind": "CLOSED", "start": "09:00", "end": "11:00"},
        {"date": "2031-07-05", "kind": "EXTRA", "start": "13:00", "end": "14:00"},
    ]
    doctor = await desk.a_practitioner("Leave", OFFICE, clinic, exceptions)
    begin = day(2031, 6, 30)  # a Monday; the 4th of July is a Friday
    found = await desk.search(
        start_time=begin, end_time=begin + timedelta(days=7), practitioner_ids=[doctor], page_size=200
    )
    days = {}
    for slot in found.slots:
        days.setdefault(local(slot).day, []).append(local(slot).strftime("%H:%M"))
    assert list(days) == [30, 2, 5]
    assert days[2] == ["11:00", "11:15", "11:30"] and days[5] == ["13:00", "13:15", "13:30"]


async def test_nothing_is_shown_that_can_not_be_booked(desk):
    suspended = await desk.a_clinic(status="SUSPENDED")
    retired = await desk.a_practitioner("Retired", active=False)
    there = await desk.a_practitioner("Away", clinic=suspended)
    over = await desk.a_visit_type("over", active=False)
    begin = day(2031, 6, 9)
    assert not (await desk.search(start_time=begin, practitioner_ids=[retired, there])).slots
    assert not (await desk.search(over, start_time=begin)).slots
    assert not (await desk.search(start_time=begin, end_time=begin)).slots
    assert not (await desk.search(start_time=soon(-9), end_time=soon(-2))).slots
    assert await refused(desk.search(new_id())) == "VISIT_TYPE_UNKNOWN"
    noticed = await desk.a_visit_type("noticed", minimum_notice_minutes=60 * 24 * 3)
    first = (await desk.search(noticed)).slots[0]
    assert first.start_time.ToDatetime(tzinfo=UTC) >= datetime.now(UTC) + timedelta(days=3, minutes=-1)


async def test_a_patients_own_visits_and_everybodys_buffers_are_left_out(desk, office):
    begin = day(2031, 8, 4, 9)
    patient = await desk.a_patient()
    await desk.book(patient, begin)  # with somebody else
    window = {"start_time": begin, "end_time": begin + timedelta(hours=1), "practitioner_ids": [office]}
    assert clock((await desk.search(**window)).slots) == ["09:00", "09:15", "09:30", "09:45"]
    assert clock((await desk.search(patient_id=patient, **window)).slots) == ["09:30", "09:45"]
    assert await refused(desk.search(patient_id=patient, subject="elias", **window)) == "NOT_FOUND"
    wide = await desk.a_visit_type("wide", buffer_before_minutes=15, buffer_after_minutes=15)
    await desk.book(await desk.a_patient(), begin + timedelta(hours=1), office, visit_type_id=wide)
    window["end_time"] = begin + timedelta(hours=3)
    assert clock((await desk.search(**window)).slots) == ["09:00", "09:15", "10:45", "11:00", "11:15", "11:30"]


async def test_all_rooms_that_a_visit_needs_are_free_at_once(desk):
    visit = await desk.a_visit_type("infusion", resource_kinds=["infusion-room", "pump"])
    begin = day(2031, 9, 1, 9)
    window = {"start_time": begin, "end_time": begin + timedelta(hours=2), "practitioner_ids": [desk.doctor]}
    assert not (await desk.search(visit, **window)).slots
    room, pump = await desk.a_room("infusion-room"), await desk.a_room("pump")
    found = (await desk.search(visit, **window)).slots
    assert list(found[0].resource_ids) == [room, pump]
    only_pump = await desk.a_visit_type("pump-only", resource_kinds=["pump"])
    await desk.book(await desk.a_patient(), begin, desk.other, visit_type_id=only_pump)
    assert clock((await desk.search(visit, **window)).slots)[0] == "09:30"


async def test_pages_go_on_where_they_ended_though_others_book_meanwhile(desk, office):
    begin = day(2031, 10, 6)
    window = {"start_time": begin, "end_time": begin + timedelta(days=5), "practitioner_ids": [office, desk.other]}
    whole = (await desk.search(page_size=200, **window)).slots
    seen, token = [], ""
    while True:
        page = await desk.search(page_size=17, page_token=token, **window)
        seen += page.slots
        token = page.next_page_token
        if not token:
            break
        if len(seen) == 34:
            await desk.hold(await desk.a_patient(), seen[0])
            await desk.hold(await desk.a_patient(), seen[33])
        assert len(seen) < 2000
    places = [(slot.start_time.seconds, slot.clinic_id, slot.practitioner_id) for slot in seen]
    assert places == sorted(set(places))
    assert places[:34] == [(one.start_time.seconds, one.clinic_id, one.practitioner_id) for one in whole[:34]]
    assert await refused(desk.search(page_token="AAAA", **window)) == "PAGE_TOKEN_INVALID"


async def test_every_offer_of_a_page_can_be_taken_until_its_time_is(desk):
    visit = await desk.a_visit_type(
        "offered", 45, buffer_before_minutes=5, buffer_after_minutes=10, start_grid_minutes=20
    )
    doctor = await desk.a_practitioner("Offa", OFFICE)
    begin = day(2031, 11, 3)
    window = {"start_time": begin, "end_time": begin + timedelta(days=1), "practitioner_ids": [doctor]}
    while slots := (await desk.search(visit, **window)).slots:
        await desk.hold(await desk.a_patient(), slots[len(slots) // 2])
    assert not await desk.overlaps()
    held = await desk.sql("SELECT start_time FROM appointment WHERE practitioner_id = :id", id=doctor)
    assert len(held) >= 2


async def test_a_search_takes_a_bounded_number_of_statements(desk):
    visit = await desk.a_visit_type("counted", resource_kinds=["counted-room"])
    await desk.a_room("counted-room")
    sent = []

    def note(_connection, _cursor, statement, *_rest):
        if any(table in statement for table in ("visit_type", "schedule", "resource", "occupancy")):
            sent.append(statement)

    engine = desk.database.engine.sync_engine
    event.listen(engine, "before_cursor_execute", note)
    try:
        found = await desk.search(visit, start_time=day(2031, 6, 9), patient_id=await desk.a_patient())
    finally:
        event.remove(engine, "before_cursor_execute", note)
    assert len(found.slots) == 50 and len(sent) == 4, sent


async def test_a_start_on_the_grid_is_offered_at_midnight_too(desk):
    doctor = await desk.a_practitioner("Night", ALWAYS)
    begin = day(2031, 6, 9)
    found = await desk.search(start_time=begin, practitioner_ids=[doctor], page_size=1)
    assert clock(found.slots) == ["00:00"]

"""Free slots over gRPC: what is shown, in which order, and that whoever takes an offer gets what it says."""

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

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
    """Zone of whom: Bahmni PR#201; medplum PR#8247 and PR#8158, the place's zone goes before the actor's."""
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
    """DST: in cal.diy#4702, #4753, #6217 and #10517 hours stood an hour off after the change, and could then not be
    booked.
    """
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
    """Buffers: cal.diy#24253 left them out where it showed what is free."""
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
    """Multi-resource: cal.diy#13745, nextcloud/calendar#3619."""
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


async def test_a_start_on_the_grid_is_offered_at_midnight_too(desk):
    doctor = await desk.a_practitioner("Night", ALWAYS)
    begin = day(2031, 6, 9)
    found = await desk.search(start_time=begin, practitioner_ids=[doctor], page_size=1)
    assert clock(found.slots) == ["00:00"]


WEEK = {"start_time": day(2031, 6, 9), "end_time": day(2031, 6, 14), "page_size": 200}


async def test_languages_genders_specialties_and_modalities_are_filters(desk):
    skin = {"system": "http://nucc.org/provider-taxonomy", "code": "207N00000X"}
    one = await desk.a_practitioner(
        "Uno", OFFICE, languages=["es-MX", "en"], gender="female", role={"specialties": [skin]}
    )
    two = await desk.a_practitioner("Due", OFFICE, languages=["it"], gender="male")

    async def who(visit="", **wishes):
        found = await desk.search(visit, practitioner_ids=[one, two], **WEEK, **wishes)
        return {slot.practitioner_id for slot in found.slots}

    assert await who() == {one, two}
    assert await who(languages=["es"]) == {one} == await who(languages=["ES-mx"])
    assert await who(languages=["es-ES"]) == set() and await who(languages=["it", "es"]) == {one, two}
    assert await who(genders=["male"]) == {two}
    assert await who(specialties=["207N00000X"]) == {one}
    assert await who(modalities=["IN_PERSON"]) == {one, two} and await who(modalities=["VIDEO", "PHONE"]) == set()


async def test_clinics_near_a_point_and_how_far_they_are(desk):
    boston = await desk.a_clinic(position={"latitude": 42.3601, "longitude": -71.0589})
    worcester = await desk.a_clinic(position={"latitude": 42.2626, "longitude": -71.8023})
    who = [await desk.a_practitioner("Near", OFFICE, clinic=clinic) for clinic in (boston, worcester, desk.clinic)]
    near = {"position": {"latitude": 42.3736, "longitude": -71.1097}, "within_km": 20}

    async def found(**wishes):
        slots = (await desk.search(practitioner_ids=who, **WEEK, **wishes)).slots
        return {slot.clinic_id: slot.distance_km for slot in slots}

    assert await found(near=near) == {boston: 4.4}
    assert await found(near={**near, "within_km": 60}) == {boston: 4.4, worcester: 58.3}
    assert await found() == dict.fromkeys([boston, worcester, desk.clinic], 0.0)


async def test_the_own_clinician_comes_first_then_the_team_and_pages_go_on_in_that_order(desk):
    own, mate, other = [await desk.a_practitioner(name, OFFICE) for name in ("Own", "Mate", "Else")]
    wish = {"practitioner_ids": [own, mate, other], "own_practitioner_id": own, "team_practitioner_ids": [mate, own]}
    window = {**WEEK, "end_time": day(2031, 6, 10)}
    whole = (await desk.search(**window, **wish)).slots
    assert [slot.practitioner_id for slot in whole] == [own] * 11 + [mate] * 11 + [other] * 11
    seen, token = [], ""
    while token or not seen:
        page = await desk.search(**{**window, "page_size": 4}, page_token=token, **wish)
        seen += page.slots
        token = page.next_page_token
        if len(seen) == 8:
            await desk.hold(await desk.a_patient(), whole[1])  # of a page that was seen
            await desk.hold(await desk.a_patient(), whole[20])
    keys = [(slot.practitioner_id, slot.start_time.seconds) for slot in seen]
    gone = {(whole[20].practitioner_id, whole[n].start_time.seconds) for n in (19, 20, 21)}
    assert keys == [key for slot in whole if (key := (slot.practitioner_id, slot.start_time.seconds)) not in gone]


async def test_days_are_counted_as_a_search_shows_them(desk):
    west = await desk.a_clinic("America/Denver")
    who = [await desk.a_practitioner("Count", OFFICE), await desk.a_practitioner("Count2", OFFICE, clinic=west)]
    await desk.a_room("counting-room"), await desk.a_room("counting-room", west)
    roomy = await desk.a_visit_type("roomy", resource_kinds=["counting-room"])
    begin = day(2031, 11, 1)  # over the end of summer time
    await desk.book(await desk.a_patient(), day(2031, 11, 3, 9), who[0])
    window = {"start_time": begin, "end_time": begin + timedelta(days=6), "practitioner_ids": who, "page_size": 200}
    for visit in (desk.visit, roomy):
        shown = {}
        for slot in (await desk.search(visit, **window)).slots:
            zone = ZoneInfo(slot.time_zone)
            shown.setdefault((slot.clinic_id, local(slot, zone).date().isoformat()), []).append(slot.start_time.seconds)
        counted = (await desk.count(visit, **window)).days
        assert {(one.clinic_id, one.date): (one.slots, one.first_start_time.seconds) for one in counted} == {
            key: (len(starts), min(starts)) for key, starts in shown.items()
        }
        assert len(counted) == 8 and [(one.clinic_id, one.date) for one in counted] == sorted(shown)


async def test_a_window_of_ten_years_and_a_page_token_of_somebody_else_are_refused(desk):
    begin = day(2031, 6, 9)
    for reaching in (begin + timedelta(days=3653), begin + timedelta(days=63)):
        assert await refused(desk.search(start_time=begin, end_time=reaching)) == "WINDOW_TOO_LONG"
        assert await refused(desk.count(start_time=begin, end_time=reaching)) == "WINDOW_TOO_LONG"
    backwards = {"start_time": begin, "end_time": begin - timedelta(seconds=1)}
    assert await refused(desk.search(**backwards)) == await refused(desk.count(**backwards)) == "PERIOD_INVALID"
    assert (await desk.search(start_time=begin, end_time=begin + timedelta(days=62))).slots
    mine = await desk.search(start_time=begin, page_size=3)
    again = {"start_time": begin, "page_size": 3, "page_token": mine.next_page_token}
    assert (await desk.search(**again)).slots
    assert await refused(desk.search(subject="sam", **again)) == "PAGE_TOKEN_INVALID"
    assert await refused(desk.search(**{**again, "languages": ["en"]})) == "PAGE_TOKEN_INVALID"

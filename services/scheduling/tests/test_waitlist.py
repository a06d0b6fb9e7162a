"""The waitlist at work: entries, what is freed, offers and their answers, over gRPC and PostgreSQL."""

import asyncio
from datetime import UTC, datetime, timedelta
from itertools import count
from zoneinfo import ZoneInfo

import pytest
from care.scheduling.v1 import appointments_pb2, directory_pb2, measures_pb2, series_pb2
from care.scheduling.v1 import waitlist_pb2 as pb
from care.scheduling.v1.directory_pb2_grpc import SchedulesServiceStub
from care.scheduling.v1.measures_pb2_grpc import MeasuresServiceStub
from care.scheduling.v1.series_pb2_grpc import SeriesServiceStub

from chassis.bus.postgres import PostgresBus
from chassis.ids import new_id
from chassis.testing.harness import Harness
from services.scheduling import measures
from services.scheduling.backfill import preview
from services.scheduling.releasing import notice_releases
from services.scheduling.service import SERVICE
from services.scheduling.tests.desk import ALWAYS, refused, soon
from services.scheduling.tests.waiting import ALWAYS_OPEN, WaitingDesk

PATIENT_CANCELS = {"code": "pat"}
Booking = appointments_pb2.Appointment.Status
Entry = pb.WaitlistEntry.Status
Offer = pb.WaitlistOffer.Status


@pytest.fixture(scope="module")
async def waiting(database):
    bus_url = await database("bus")
    harness = Harness(database, PostgresBus(bus_url))
    await harness.start(SERVICE, principal_cache=60.0, max_connection_age=3600.0, **ALWAYS_OPEN)
    yield await WaitingDesk(harness, bus_url).open()
    await harness.stop()


@pytest.fixture
async def desk(waiting):
    """Each test has a visit type and a practitioner of its own and nobody else waits, so that nobody else is asked."""
    await waiting.sql("UPDATE waitlist_entry SET status = 'EXPIRED' WHERE status IN ('WAITING', 'OFFERED')")
    await waiting.sql("UPDATE freed_slot SET status = 'GONE' WHERE status = 'OPEN'")
    number = next(_numbers)
    waiting.another = lambda **more: waiting.a_visit_type(f"another-{next(_numbers)}", **more)
    waiting.visit = await waiting.a_visit_type(f"waited-for-{number}")
    waiting.doctor = await waiting.a_practitioner(f"W{number}")
    return waiting


_numbers = count(1)


async def freed(desk, start=None, **booking):
    """A visit that is cancelled: its slot is free again."""
    start = start or soon(5)
    visit = await desk.book(await desk.a_patient(), start, subject="wilma", **booking)
    await desk.do("Cancel", visit, subject="wilma", reason=PATIENT_CANCELS)
    return start


# -- entries -----------------------------------------------------------------------------------------------------------


async def test_a_patient_waits_once_for_a_visit_type(desk):
    """canvas#446: one entry per patient and visit, or each fills a slot of its own."""
    patient = await desk.a_patient()
    entry = await desk.enlist(patient, priority="URGENT", weekdays=[1, 2], language="es", age_band="65-74")
    assert (entry.status, entry.priority, list(entry.weekdays), entry.skips) == (Entry.WAITING, 2, [1, 2], 0)
    assert entry.expire_time.ToDatetime() - entry.create_time.ToDatetime() == timedelta(days=180)
    assert await refused(desk.enlist(patient)) == "WAITLIST_ENTRY_EXISTS"
    await desk.waitlist("WithdrawWaitlistEntry", pb.WithdrawWaitlistEntryRequest(id=entry.id))
    again = await desk.enlist(patient)
    listed = await desk.waitlist("ListWaitlistEntries", pb.ListWaitlistEntriesRequest(patient_ids=[patient]))
    assert [(one.id, one.status) for one in listed.waitlist_entries] == [
        (entry.id, Entry.WITHDRAWN),
        (again.id, Entry.WAITING),
    ]
    for wished, found in (([], True), ([desk.clinic], True), ([new_id()], False)):
        # Who named no clinic takes any.
        await desk.sql("UPDATE waitlist_entry SET clinic_ids = :clinics WHERE id = :id", clinics=wished, id=again.id)
        at_ours = pb.ListWaitlistEntriesRequest(patient_ids=[patient], statuses=["WAITING"], clinic_ids=[desk.clinic])
        assert bool((await desk.waitlist("ListWaitlistEntries", at_ours)).waitlist_entries) is found
    only = pb.ListWaitlistEntriesRequest(visit_type_ids=[desk.visit], statuses=["WAITING"], page_size=1)
    assert [one.id for one in (await desk.waitlist("ListWaitlistEntries", only)).waitlist_entries] == [again.id]


async def test_wishes_are_changed_under_the_etag_that_was_read(desk):
    entry = await desk.enlist(weekdays=[1])
    change = pb.UpdateWaitlistEntryRequest(
        waitlist_entry={"id": entry.id, "earliest_time": "09:00"},
        update_mask={"paths": ["earliest_time", "weekdays"]},
        etag=entry.etag,
    )
    changed = await desk.waitlist("UpdateWaitlistEntry", change)
    assert (changed.earliest_time, list(changed.weekdays)) == ("09:00", [])
    assert await refused(desk.waitlist("UpdateWaitlistEntry", change)) == "ETAG_MISMATCH"
    change.etag = changed.etag
    change.waitlist_entry.visit_type_id = desk.clinic
    change.update_mask.paths.append("visit_type_id")
    assert await refused(desk.waitlist("UpdateWaitlistEntry", change)) == "FIELD_FIXED"


async def test_what_can_never_be_met_is_refused_with_its_reason(desk):
    visit = await desk.book(await desk.a_patient(), soon(9))
    for reason, wishes in {
        "DATE_INVALID": {"earliest_date": "2027-02-30"},
        "PERIOD_INVALID": {"earliest_date": "2027-03-02", "latest_date": "2027-03-01"},
        "EXPIRY_INVALID": {"expire_time": {"seconds": 1_600_000_000}},
        "CLINIC_UNKNOWN": {"clinic_ids": [desk.doctor]},
        "PRACTITIONER_UNKNOWN": {"practitioner_ids": [desk.clinic]},
        "APPOINTMENT_UNFIT": {"appointment_id": visit.id},
    }.items():
        assert await refused(desk.enlist(**wishes)) == reason
    assert await refused(desk.enlist(earliest_time="10:00", latest_time="10:00")) == "PERIOD_INVALID"
    assert await refused(desk.enlist(visit_type=desk.clinic)) == "VISIT_TYPE_UNKNOWN"


async def test_who_may_not_see_a_patient_learns_nothing_of_the_wait(desk):
    entry = await desk.enlist()
    await desk.harness.staff("wanda", ["waitlist.read", "waitlist.write"], clinics=[desk.harness.tenant_id])
    for method, request in {
        "GetWaitlistEntry": pb.GetWaitlistEntryRequest(id=entry.id),
        "GetWaitlistScore": pb.GetWaitlistScoreRequest(id=entry.id),
        "WithdrawWaitlistEntry": pb.WithdrawWaitlistEntryRequest(id=entry.id),
    }.items():
        assert await refused(desk.waitlist(method, request, "wanda")) == "NOT_FOUND"


async def test_a_booking_of_the_same_visit_type_elsewhere_ends_the_wait(desk):
    entry = await desk.enlist()
    other = await desk.another()
    await desk.book(entry.patient_id, soon(5, 9), visit_type_id=other)
    assert (await desk.entry(entry)).status == Entry.WAITING
    visit = await desk.book(entry.patient_id, soon(6, 9))
    assert (await desk.until(entry, "FULFILLED")).booked_appointment_id == visit.id


async def test_a_hold_that_becomes_a_booking_ends_the_wait_too(desk):
    entry = await desk.enlist()
    slot = (await desk.search(practitioner_ids=[desk.doctor])).slots[0]
    held = await desk.hold(entry.patient_id, slot)
    await desk.do("Book", held)
    await desk.until(entry, "FULFILLED")


async def test_a_wait_ends_at_its_expiry(desk):
    entry = await desk.enlist()
    await desk.sql("UPDATE waitlist_entry SET expire_time = clock_timestamp() WHERE id = :id", id=entry.id)
    await desk.until(entry, "EXPIRED")


async def test_nobody_who_has_died_is_on_the_waitlist(desk):
    entry = await desk.enlist()
    await freed(desk)
    offered = await desk.until(entry, "OFFERED")
    await desk.hear("patient.deceased", entry.patient_id)
    await desk.until_known_dead(entry.patient_id)
    await desk.until(entry, "WITHDRAWN")
    # Its offer ends, and the slot goes on to the next; here there is none.
    await desk.until_slot(soon(5), "FREE")
    assert (await desk.offers(entry))[0].status == Offer.UNAVAILABLE
    assert offered.offer_id and await refused(desk.enlist(entry.patient_id)) == "PATIENT_DECEASED"


# -- offering ----------------------------------------------------------------------------------------------------------


async def test_a_freed_slot_is_held_for_the_best_candidate_and_told(desk):
    """booking-activities#70: most bookings come from the waitlist, so it works by itself. medplum#10141,
    cal.diy#10616: who would come earlier is asked when a time is freed.
    """
    routine, urgent = await desk.enlist(), await desk.enlist(priority="URGENT", channel="SMS")
    start = await freed(desk)
    found = await desk.until(urgent, "OFFERED")
    (offer,) = await desk.offers(urgent)
    assert (offer.id, offer.status, offer.start_time.ToDatetime(), offer.practitioner_id) == (
        found.offer_id,
        Offer.OPEN,
        start.replace(tzinfo=None),
        desk.doctor,
    )
    assert offer.score == sum(part.points for part in offer.score_parts) == 1300
    held = await desk("GetAppointment", appointments_pb2.GetAppointmentRequest(id=offer.id))
    assert (held.status, held.patient_id, held.hold_expire_time) == (
        Booking.PENDING,
        urgent.patient_id,
        offer.expire_time,
    )
    assert (await desk.entry(routine)).status == Entry.WAITING
    assert start not in [
        slot.start_time.ToDatetime(start.tzinfo)
        for slot in (await desk.search(practitioner_ids=[desk.doctor], start_time=start)).slots
    ]
    told = await desk.told(urgent, 2, pb.WaitlistEvent)
    assert [kind for kind, _ in told] == ["waitlist.added", "waitlist.offered"]
    event = told[1][1]
    assert (event.offer_id, event.channel, event.clinic_id) == (offer.id, "SMS", desk.clinic)
    assert event.offer_expire_time == offer.expire_time


async def test_an_accepted_offer_is_booked(desk):
    entry = await desk.enlist()
    await freed(desk)
    offer_id = (await desk.until(entry, "OFFERED")).offer_id
    assert (await desk.accept(offer_id)).status == Offer.ACCEPTED
    booked = await desk("GetAppointment", appointments_pb2.GetAppointmentRequest(id=offer_id))
    assert (booked.status, booked.patient_id) == (Booking.BOOKED, entry.patient_id)
    ended = await desk.entry(entry)
    assert (ended.status, ended.booked_appointment_id) == (Entry.ACCEPTED, offer_id)
    assert (await desk.accept(offer_id)).status == Offer.ACCEPTED  # once more changes nothing
    assert await refused(desk.decline(offer_id)) == "OFFER_ANSWERED"
    assert not await desk.wrong()


async def test_a_declined_slot_goes_to_the_next_candidate_and_never_back(desk):
    """Yosemite-Crew#1729: an offer has an end of its own, and the slot another beginning."""
    first, second = await desk.enlist(priority="URGENT"), await desk.enlist()
    start = await freed(desk)
    offer_id = (await desk.until(first, "OFFERED")).offer_id
    assert (await desk.decline(offer_id)).status == Offer.DECLINED
    await desk.until(second, "OFFERED")
    waits = await desk.entry(first)
    assert (waits.status, waits.skips, waits.offer_id) == (Entry.WAITING, 0, "")
    await desk.decline((await desk.entry(second)).offer_id)
    await desk.until_slot(start, "FREE")  # nobody wants it: anybody may book it
    visit = await desk.book(await desk.a_patient(), start)
    assert visit.status == Booking.BOOKED


async def test_an_offer_that_nobody_answers_ends_with_a_skip_and_the_next_gets_the_slot(desk):
    first, second = await desk.enlist(priority="URGENT"), await desk.enlist()
    await freed(desk)
    offer_id = (await desk.until(first, "OFFERED")).offer_id
    await over(desk, offer_id)
    waits = await desk.until(first, "WAITING")
    assert waits.skips == 1
    await desk.until(second, "OFFERED")
    assert [one.status for one in await desk.offers(first)] == [Offer.EXPIRED]


async def over(desk, offer_id):
    """Let the time of an offer be over."""
    for statement in (
        "UPDATE occupancy SET expire_time = clock_timestamp() WHERE holder_id = :id",
        "UPDATE appointment SET hold_expire_time = clock_timestamp() WHERE id = :id",
        "UPDATE waitlist_offer SET expire_time = clock_timestamp() WHERE id = :id",
    ):
        await desk.sql(statement, id=offer_id)


async def test_an_answer_that_comes_too_late_is_refused_and_nothing_is_lost(desk):
    entry = await desk.enlist()
    await freed(desk)
    offer_id = (await desk.until(entry, "OFFERED")).offer_id
    token = await desk.link(offer_id)
    await over(desk, offer_id)
    assert await refused(desk.accept(offer_id)) == "OFFER_EXPIRED"
    assert await refused(desk.by_link(token, accept=True)) == "LINK_EXPIRED"
    assert await refused(desk.by_link(token)) == "LINK_EXPIRED"
    waits = await desk.until(entry, "WAITING")
    assert waits.skips == 1
    next_slot = await freed(desk, soon(6))
    again = await desk.until(entry, "OFFERED")
    assert again.offer_id != offer_id and next_slot and not await desk.wrong()


async def test_an_earlier_slot_moves_a_chain_of_three(desk):
    """indico#3036, canvas#446: who accepts an earlier slot frees the later one, which is offered in turn."""
    starts = [soon(day) for day in (5, 10, 15)]
    patients = [await desk.a_patient() for _ in range(3)]
    visits = [await desk.book(patient, start) for patient, start in zip(patients, starts, strict=True)]
    second = await desk.enlist(patients[1], appointment_id=visits[1].id)
    third = await desk.enlist(patients[2], appointment_id=visits[2].id)
    last = await desk.enlist()
    await desk.do("Cancel", visits[0], reason=PATIENT_CANCELS)
    for entry in (second, third, last):
        offer_id = (await desk.until(entry, "OFFERED")).offer_id
        await desk.accept(offer_id)
    rows = await desk.sql(
        "SELECT start_time, patient_id::text FROM appointment WHERE practitioner_id = :doctor AND status = 'BOOKED'"
        " ORDER BY start_time",
        doctor=desk.doctor,
    )
    assert [tuple(row) for row in rows] == list(zip(starts, [*patients[1:], last.patient_id], strict=True))
    given_up = await desk("GetAppointment", appointments_pb2.GetAppointmentRequest(id=visits[1].id))
    assert (given_up.status, given_up.cancelation_reason.code) == (Booking.CANCELLED, "pat-swl")
    assert not await desk.wrong()


async def test_only_what_is_earlier_is_offered_to_who_would_give_up_a_visit(desk):
    patient = await desk.a_patient()
    visit = await desk.book(patient, soon(5, 10))
    entry = await desk.enlist(patient, appointment_id=visit.id)
    later = await freed(desk, soon(8))
    await desk.until_slot(later, "FREE")
    assert (await desk.entry(entry)).status == Entry.WAITING


async def test_a_slot_of_another_visit_type_is_never_offered(desk):
    """MGMA, cal.diy#10616: the same template and visit type, or nothing."""
    entry = await desk.enlist()
    other = await desk.another()
    someone = await desk.enlist(visit_type=other, weekdays=[soon(5).isoweekday() % 7 + 1])
    start = await freed(desk, visit_type_id=other)
    await desk.until_slot(start, "FREE")
    assert not await desk.offers(entry) and not await desk.offers(someone)


async def test_within_the_lock_out_nothing_is_offered(desk):
    entry = await desk.enlist()
    start = soon(0) + timedelta(hours=24)
    visit = await desk.book(await desk.a_patient(), start)
    kept = desk.harness.servers["scheduling"].settings
    shipped = kept.backfill_lockout
    kept.backfill_lockout = 72 * 3600.0
    try:
        await desk.do("Cancel", visit, reason=PATIENT_CANCELS)
        await desk.until_slot(start, "LATE")
    finally:
        kept.backfill_lockout = shipped
    assert not await desk.offers(entry)


async def test_a_visit_types_own_lock_out_goes_before_the_policys(desk):
    """Longer than the shipped four hours: nothing is offered; shorter: a slot that the four hours would keep back is."""
    start, soonest = soon(0) + timedelta(hours=24), soon(0) + timedelta(hours=25)
    late = await desk.a_visit_type(f"late-{new_id()}", lock_out_minutes=72 * 60)
    entry = await desk.enlist(visit_type=late)
    await freed(desk, start, visit_type_id=late)
    await desk.until_slot(start, "LATE")
    assert not await desk.offers(entry)
    quick = await desk.a_visit_type(f"quick-{new_id()}", lock_out_minutes=30)
    waits = await desk.enlist(visit_type=quick)
    kept = desk.harness.servers["scheduling"].settings
    shipped = kept.backfill_lockout
    kept.backfill_lockout = 72 * 3600.0
    try:
        await freed(desk, soonest, visit_type_id=quick)
        await desk.until(waits, "OFFERED")
    finally:
        kept.backfill_lockout = shipped


async def test_a_referral_of_the_visit_that_is_given_up_counts_and_who_has_none_is_passed_over(desk):
    """The one without stands first and doesn't cost the others the slot."""
    kind = await desk.a_visit_type(f"referred-{new_id()}", eligibility={"referral_required": True})
    based_on = [{"type": "Referral", "id": new_id()}]
    more = {"visit_type_id": kind, "based_on": based_on}
    without = await desk.enlist(visit_type=kind, priority="STAT")
    patient = await desk.a_patient()
    older = await desk.book(patient, soon(12), subject="wilma", **more)
    waits = await desk.enlist(patient, visit_type=kind, appointment_id=older.id)
    await freed(desk, soon(11), **more)
    await desk.until(waits, "OFFERED")
    assert not await desk.offers(without)
    (offer,) = await desk.offers(waits)
    await desk.accept(offer.id)
    booked = await desk.do("Get", offer.id, "wilma")
    assert [(one.type, one.id) for one in booked.based_on] == [("Referral", based_on[0]["id"])]


async def test_an_offer_ends_before_the_lock_out_begins(desk):
    entry = await desk.enlist()
    kept = desk.harness.servers["scheduling"].settings
    shipped = kept.offer_standing
    kept.offer_standing = 30 * 86400.0
    try:
        start = await freed(desk)
        await desk.until(entry, "OFFERED")
    finally:
        kept.offer_standing = shipped
    (offer,) = await desk.offers(entry)
    assert start - offer.expire_time.ToDatetime(start.tzinfo) == timedelta(hours=4)


async def test_by_night_offers_wait_for_the_clinics_morning(desk):
    entry = await desk.enlist()
    kept = desk.harness.servers["scheduling"].settings
    # A day of offers that has just ended, wherever the clock stands.
    now = (await desk.sql("SELECT clock_timestamp() AT TIME ZONE 'America/New_York' AS now"))[0].now
    kept.offers_from = (now - timedelta(hours=2)).strftime("%H:%M") if now.hour >= 2 else "00:00"
    kept.offers_until = (now - timedelta(minutes=1)).strftime("%H:%M") if now.hour >= 2 else "00:01"
    try:
        start = await freed(desk)
        async with asyncio.timeout(5):
            while not await desk.sql("SELECT 1 FROM freed_slot WHERE start_time = :start AND version > 1", start=start):
                await asyncio.sleep(0.02)
    finally:
        kept.offers_from = kept.offers_until = "00:00"
    row = await desk.until_slot(start, "OPEN")
    assert row.due_time.astimezone() > soon(0) - timedelta(days=1) and not await desk.offers(entry)


async def test_an_overbooked_time_that_still_stands_is_not_offered(desk):
    start = soon(5)
    kind = await desk.another(overbooking_cap=1)
    waits = await desk.enlist(visit_type=kind)
    visit = await desk.book(await desk.a_patient(), start, visit_type_id=kind)
    await desk.book(await desk.a_patient(), start, visit_type_id=kind, overbooking={"reason": "acute"}, subject="sam")
    await desk.do("Cancel", visit, reason=PATIENT_CANCELS)
    await desk.until_slot(start, "GONE")
    assert not await desk.offers(waits)


async def test_a_visit_that_moves_away_frees_its_time(desk):
    entry = await desk.enlist()
    start = soon(5)
    visit = await desk.book(await desk.a_patient(), start)
    await desk.move(visit, soon(7))
    await desk.until(entry, "OFFERED")
    assert (await desk.offers(entry))[0].start_time.ToDatetime(start.tzinfo) == start


async def test_a_series_that_moves_and_an_entry_in_error_free_each_of_their_times(desk):
    kind = await desk.a_visit_type(f"series-{new_id()}")
    patient, doctor = await desk.a_patient(), await desk.a_practitioner("Series")
    day = soon(20).date()
    series = series_pb2.CreateSeriesRequest(
        patient_id=patient, practitioner_id=doctor, visit_type_id=kind, clinic_id=desk.clinic,
        start=f"{day}T10:00", rule="FREQ=WEEKLY;COUNT=3",
    )  # fmt: skip
    booked = await desk.harness.call("scheduling", SeriesServiceStub, "CreateSeries", series, "cora")
    causes = "SELECT cause, count(*) FROM freed_slot WHERE visit_type_id = :kind GROUP BY 1"
    move = series_pb2.RescheduleSeriesRequest(id=booked.series.id, scope=series_pb2.SeriesScope.ALL, time="11:00")
    assert (await desk.harness.call("scheduling", SeriesServiceStub, "RescheduleSeries", move, "cora")).booked
    assert not await desk.sql(causes, kind=kind)  # nobody waits: nothing is written
    # Who waits wants another clinic, so that what is freed stays as it is.
    await desk.enlist(visit_type=kind, clinic_ids=[desk.elsewhere])
    move.time = "12:00"
    assert (await desk.harness.call("scheduling", SeriesServiceStub, "RescheduleSeries", move, "cora")).booked
    assert dict(map(tuple, await desk.sql(causes, kind=kind))) == {"BOOKED": 3}
    await desk.do("EnterInError", booked.occurrences[0].appointment_id, "wilma")
    assert dict(map(tuple, await desk.sql(causes, kind=kind))) == {"BOOKED": 3, "ENTERED_IN_ERROR": 1}


async def test_a_busy_patient_is_passed_over_and_not_struck_off(desk):
    busy, next_one = await desk.enlist(priority="URGENT"), await desk.enlist()
    start = soon(5)
    other = await desk.another()
    await desk.book(busy.patient_id, start, practitioner=desk.other, visit_type_id=other)
    await freed(desk, start)
    await desk.until(next_one, "OFFERED")
    assert (await desk.entry(busy)).status == Entry.WAITING


async def test_a_withdrawal_ends_the_offer_and_frees_the_slot_for_the_next(desk):
    first, second = await desk.enlist(priority="URGENT"), await desk.enlist()
    await freed(desk)
    await desk.until(first, "OFFERED")
    await desk.waitlist("WithdrawWaitlistEntry", pb.WithdrawWaitlistEntryRequest(id=first.id))
    await desk.until(second, "OFFERED")
    assert (await desk.offers(first))[0].status == Offer.UNAVAILABLE


async def test_a_hold_booked_or_released_at_the_desk_settles_its_offer(desk):
    first, second = await desk.enlist(priority="URGENT"), await desk.enlist()
    await freed(desk)
    await desk.do("Release", (await desk.until(first, "OFFERED")).offer_id)
    offer_id = (await desk.until(second, "OFFERED")).offer_id
    assert (await desk.offers(first))[0].status == Offer.UNAVAILABLE
    await desk.do("Book", offer_id)
    await desk.until(second, "ACCEPTED")
    assert (await desk.offers(second))[0].status == Offer.ACCEPTED and not await desk.wrong()


# -- links -------------------------------------------------------------------------------------------------------------


async def test_a_link_shows_time_and_place_and_looking_uses_nothing_up(desk):
    entry = await desk.enlist()
    start = await freed(desk)
    token = await desk.link((await desk.until(entry, "OFFERED")).offer_id)
    for _ in range(2):
        page = await desk.by_link(token)
        assert (page.status, page.clinic, page.time_zone) == (Offer.OPEN, "Riverside", "America/New_York")
        assert page.start_time.ToDatetime(start.tzinfo) == start
    assert token.startswith("w-") and len(token) >= 24
    kept = await desk.sql("SELECT token_hash FROM waitlist_offer WHERE entry_id = :id", id=entry.id)
    assert token.encode() not in kept[0].token_hash and len(kept[0].token_hash) == 32
    assert await refused(desk.by_link("w-" + 22 * "x")) == "LINK_UNKNOWN"
    newer = await desk.link((await desk.entry(entry)).offer_id)
    assert await refused(desk.by_link(token)) == "LINK_UNKNOWN" and newer != token


async def test_two_answers_by_one_link_at_once_have_one_effect(desk):
    entry = await desk.enlist()
    await freed(desk)
    offer_id = (await desk.until(entry, "OFFERED")).offer_id
    token = await desk.link(offer_id)
    answers = await asyncio.gather(
        *(desk.by_link(token, accept=True) for _ in range(6)), desk.accept(offer_id), return_exceptions=True
    )
    assert {getattr(one, "status", one) for one in answers} == {Offer.ACCEPTED}
    booked = await desk.told(offer_id, 2)
    assert [kind for kind, _ in booked] == ["appointment.held", "appointment.booked"]
    assert await refused(desk.by_link(token, accept=False)) == "OFFER_ANSWERED"
    assert (await desk.by_link(token)).status == Offer.ACCEPTED


async def test_one_who_declines_by_link_goes_on_waiting(desk):
    entry = await desk.enlist()
    await freed(desk)
    token = await desk.link((await desk.until(entry, "OFFERED")).offer_id)
    for _ in range(2):
        assert (await desk.by_link(token, accept=False)).status == Offer.DECLINED
    assert (await desk.entry(entry)).status == Entry.WAITING
    assert await refused(desk.by_link(token, accept=True)) == "OFFER_ANSWERED"


async def test_a_labelled_clinics_page_has_its_discreet_name_or_none(desk):
    kind = await desk.another(security_labels=["ETH"])
    entry = await desk.enlist(visit_type=kind)
    await freed(desk, visit_type_id=kind)
    token = await desk.link((await desk.until(entry, "OFFERED")).offer_id)
    assert (await desk.by_link(token)).clinic == ""


# -- explained and counted ---------------------------------------------------------------------------------------------


async def test_a_score_is_explained(desk):
    entry = await desk.enlist(priority="URGENT", practitioner_ids=[desk.doctor], weekdays=[soon(5).isoweekday()])
    plain = await desk.waitlist("GetWaitlistScore", pb.GetWaitlistScoreRequest(id=entry.id))
    assert plain.score == sum(part.points for part in plain.parts) == 1300 and not plain.misfits
    named = pb.GetWaitlistScoreRequest(
        id=entry.id, clinic_id=desk.clinic, practitioner_id=desk.other, start_time=soon(6)
    )
    told = await desk.waitlist("GetWaitlistScore", named)
    assert list(told.misfits) == ["practitioner", "weekday"]


async def test_a_dry_run_shows_who_would_be_next_and_changes_nothing(desk):
    first, second = await desk.enlist(priority="URGENT"), await desk.enlist()
    await freed(desk)
    offer_id = (await desk.until(first, "OFFERED")).offer_id
    shown = [
        one
        for one in await preview(desk.harness.servers["scheduling"].runtime)
        if one.slot.practitioner_id == desk.doctor
    ]
    assert [(one.status, [wish.entry_id for wish, _ in one.best]) for one in shown if one.best] == [
        ("offered", [second.id])
    ]
    assert sum(shown[0].best[0].score.parts.values()) == shown[0].best[0].score.total == 300
    assert (await desk.entry(first)).offer_id == offer_id and not await desk.offers(second)


async def test_a_tenants_weights_and_times_are_data(desk):
    await desk.sql(
        "INSERT INTO policy (tenant_id, key, scope, scope_id, version, settings, effective_time) VALUES"
        " (:tenant, 'waitlist', 'visit_type', :kind, 3, CAST(:settings AS jsonb), clock_timestamp())",
        tenant=desk.harness.tenant_id,
        kind=desk.visit,
        settings='{"weight_priority": 7, "offer_seconds": 1200}',
    )
    entry = await desk.enlist(priority="STAT")
    await freed(desk)
    await desk.until(entry, "OFFERED")
    (offer,) = await desk.offers(entry)
    assert ({part.name: part.points for part in offer.score_parts}["priority"], offer.policy_version) == (21, 3)
    assert (
        timedelta(minutes=19) < offer.expire_time.ToDatetime() - offer.create_time.ToDatetime() <= timedelta(minutes=20)
    )


async def test_what_became_of_slots_and_offers_is_counted_by_groups_none_of_which_is_small(desk):
    clinic = desk.elsewhere
    doctor = await desk.a_practitioner("Counted", clinic=clinic)
    first = await desk.enlist(priority="URGENT", language="es", age_band="65-74")
    second = await desk.enlist(language="en", age_band="18-39")
    await freed(desk, clinic_id=clinic, practitioner=doctor)
    await desk.decline((await desk.until(first, "OFFERED")).offer_id)
    await desk.accept((await desk.until(second, "OFFERED")).offer_id)
    found = await desk.waitlist("GetWaitlistMeasures", pb.GetWaitlistMeasuresRequest(clinic_id=clinic))
    assert (found.freed, found.offered_slots, found.filled) == (1, 1, 1)
    assert [(one.language, one.age_band, one.outcomes.accepted, one.outcomes.declined) for one in found.groups] == [
        ("", "", 1, 1),
    ]
    assert (found.outcomes.offered, found.outcomes.accepted, found.outcomes.declined) == (2, 1, 1)


async def test_a_quota_that_one_candidate_would_break_leaves_the_slot_to_the_next_who_fits(desk):
    """Of new patients one may start in the block, and one does: who is established has the freed slot still."""
    hours = [{**one, "quotas": [{"at_most": 1, "new_patients": True}]} for one in ALWAYS]
    desk.doctor = await desk.a_practitioner(f"Scarce{new_id()}", hours)
    known = await desk.a_patient()
    for hour, patient in enumerate((known, someone := await desk.a_patient())):
        seen = await desk.book(patient, soon(3, 9 + hour), desk.other)
        await desk.sql("UPDATE appointment SET status = 'FULFILLED' WHERE id = :id", id=seen.id)
        await desk.shift(seen, timedelta(days=-10))
    start = soon(5, 15)
    visit = await desk.book(someone, start)
    await desk.book(await desk.a_patient(), soon(5, 17))  # the one place that new patients have
    fresh, established = await desk.enlist(priority="URGENT"), await desk.enlist(known)
    await desk.do("Cancel", visit, reason=PATIENT_CANCELS)
    await desk.until(established, "OFFERED")
    assert (await desk.entry(fresh)).status == Entry.WAITING and not await desk.offers(fresh)
    assert not await desk.wrong()


async def test_newly_opened_hours_are_offered_to_who_waits_for_them(desk):
    """An extra session used to be found by whoever searched next, and the waitlist slept."""
    doctor = await desk.a_practitioner(f"Opens{new_id()}", hours=())
    day = soon(6)
    local = day.astimezone(ZoneInfo("America/New_York")).date()
    closed = [{"date": str(local), "kind": "CLOSED"}]
    schedule = await desk.hours(doctor, exceptions=closed)
    first, second = (
        await desk.enlist(priority="URGENT", earliest_date=str(local), latest_date=str(local)),
        await desk.enlist(earliest_date=str(local), latest_date=str(local), earliest_time="14:00"),
    )
    never = await desk.enlist(weekdays=[local.isoweekday() % 7 + 1], earliest_date=str(local), latest_date=str(local))
    other = await desk.enlist(visit_type=await desk.another(), weekdays=[local.isoweekday() % 7 + 1])
    extra = [{"date": str(local), "kind": "EXTRA", "start": "13:30", "end": "14:30"}]
    request = directory_pb2.UpdateScheduleRequest(
        schedule={"id": schedule, "weekly_hours": [], "exceptions": extra}, etag='"1"',
        update_mask={"paths": ["weekly_hours", "exceptions"]},
    )  # fmt: skip
    await desk.harness.call("scheduling", SchedulesServiceStub, "UpdateSchedule", request, "ada")
    for entry, hour, minute in ((first, 13, 30), (second, 14, 0)):
        offered = await desk.until(entry, "OFFERED")
        (offer,) = await desk.offers(entry)
        start = offer.start_time.ToDatetime(UTC).astimezone(ZoneInfo("America/New_York"))
        assert (start.date(), start.hour, start.minute, offer.practitioner_id) == (local, hour, minute, doctor)
        assert offered.offer_id == offer.id
    assert not await desk.offers(never) and not await desk.offers(other)
    await desk.accept((await desk.entry(first)).offer_id)
    assert not await desk.sql("SELECT 1 FROM opened_hours WHERE practitioner_id = :who", who=doctor)
    assert not await desk.wrong()


async def test_hours_that_were_open_before_are_offered_to_nobody_by_a_change(desk):
    doctor = await desk.a_practitioner(f"Same{new_id()}", hours=())
    schedule = await desk.hours(doctor, [{"weekday": day, "start": "09:00", "end": "12:00"} for day in range(1, 8)])
    entry = await desk.enlist(practitioner_ids=[doctor])
    shorter = [{"weekday": day, "start": "10:00", "end": "12:00"} for day in range(1, 8)]
    request = directory_pb2.UpdateScheduleRequest(
        schedule={"id": schedule, "weekly_hours": shorter}, etag='"1"', update_mask={"paths": ["weekly_hours"]}
    )
    await desk.harness.call("scheduling", SchedulesServiceStub, "UpdateSchedule", request, "ada")
    assert not await desk.sql("SELECT 1 FROM opened_hours WHERE practitioner_id = :who", who=doctor)
    assert not await desk.sql("SELECT 1 FROM freed_slot WHERE practitioner_id = :who", who=doctor)
    assert (await desk.entry(entry)).status == Entry.WAITING


async def test_the_rate_of_what_the_waitlist_filled_is_measured_beside_what_was_filled_at_all(desk, monkeypatch):
    monkeypatch.setattr(measures, "FEWEST", 1)
    first, second = soon(20), soon(20, 18)
    entry = await desk.enlist()
    await freed(desk, first)
    await desk.accept((await desk.until(entry, "OFFERED")).offer_id)
    loser = await desk.enlist()
    await freed(desk, second)
    await desk.decline((await desk.until(loser, "OFFERED")).offer_id)
    await desk.until_slot(second, "FREE")
    day = str(first.astimezone(ZoneInfo("America/New_York")).date())
    request = measures_pb2.GetVisitRatesRequest(
        clinic_id=desk.clinic, first_date=day, last_date=day, visit_type_id=desk.visit
    )
    rates = await desk.harness.call("scheduling", MeasuresServiceStub, "GetVisitRates", request, "wilma")
    assert (rates.waitlist_fill_rate.value, rates.waitlist_fill_rate.counted) == (0.5, 2)


async def test_a_block_that_is_released_is_offered_to_who_waits(desk):
    """Held back, it is nobody's yet; when its time has come, who waits need not be the last to know."""
    begins = soon(2, 18)
    local = begins.astimezone(ZoneInfo("America/New_York"))
    doctor = await desk.a_practitioner(f"Back{new_id()}", hours=())
    block = {
        "weekday": local.isoweekday(), "start": local.strftime("%H:%M"), "valid_from": str(local.date()),
        "end": (local + timedelta(hours=1)).strftime("%H:%M"), "valid_until": str(local.date()), "release_hours": 1,
    }  # fmt: skip
    schedule = await desk.hours(doctor, [block])
    entry = await desk.enlist(practitioner_ids=[doctor])
    runtime = desk.harness.servers["scheduling"].runtime
    etag = (await desk.sql("SELECT version FROM schedule WHERE id = :id", id=schedule))[0][0]
    await notice_releases(runtime)
    ((due,),) = await desk.sql("SELECT release_time FROM schedule WHERE id = :id", id=schedule)
    assert due <= begins - timedelta(hours=1) and not await desk.offers(entry)
    # As if it had been released just now: an hour before, as it is, would be within the lock-out.
    released = int((begins - datetime.now(UTC)) / timedelta(hours=1))
    await desk.sql(
        "UPDATE schedule SET release_time = clock_timestamp() - interval '1 hour',"
        " weekly_hours = jsonb_set(weekly_hours, '{0,release_hours}', to_jsonb(CAST(:hours AS int))) WHERE id = :id",
        hours=released + 1, id=schedule,
    )  # fmt: skip
    await notice_releases(runtime)
    await desk.until(entry, "OFFERED")
    (offer,) = await desk.offers(entry)
    assert offer.start_time.ToDatetime(UTC) == begins
    ((version, following),) = await desk.sql("SELECT version, release_time FROM schedule WHERE id = :id", id=schedule)
    assert version == etag and following > datetime.now(UTC)

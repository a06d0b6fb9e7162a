"""Measures: by definition, by hand on a small clinic, and each night once."""

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from care.scheduling.v1 import measures_pb2 as pb
from care.scheduling.v1.measures_pb2_grpc import MeasuresServiceStub
from sqlalchemy import event

from chassis.calendar import at_local
from chassis.errors import Invalid
from services.scheduling import measures
from services.scheduling.availability import VisitType
from services.scheduling.nightly import take_measures
from services.scheduling.tests.desk import WORK, refused

ZONE = ZoneInfo("America/New_York")
HALF_HOUR = VisitType("v", 30, grid=15)
WEEKDAYS = [{"weekday": day, "start": "09:00", "end": "10:00"} for day in range(1, 8)]


def local(days, hour, minute=0):
    """A wall time of the clinic's some days from its today."""
    return at_local(datetime.now(ZONE).date() + timedelta(days=days), time(hour, minute), ZONE.key)


def test_starts_that_overlap_are_one_appointment():
    starts = [60 * minute for minute in (0, 15, 30, 45, 60, 75)]
    assert measures.third(starts, HALF_HOUR) == 60 * 60
    assert measures.third(starts[:4], HALF_HOUR) is None
    buffered = VisitType("v", 30, buffer_after=15, grid=15)
    assert measures.third(starts, buffered) is None
    assert measures.third([*starts, 90 * 60], buffered) == 90 * 60


def test_enough_starts_are_looked_at_to_hold_the_third():
    for kind in (HALF_HOUR, VisitType("v", 50, 5, 10, 15), VisitType("v", 10, grid=60)):
        starts = [60 * kind.grid * number for number in range(200)]
        needed = measures.starts_to_look_at(kind)
        assert measures.third(starts[:needed], kind) == measures.third(starts, kind) is not None


def test_days_are_counted_by_the_clinics_calendar_and_averaged_over_practitioners():
    """Reported elsewhere, DST, medplum#8417: in the evening the server's day is already the next one."""
    now = int(datetime(2026, 11, 24, 23, 30, tzinfo=ZONE).timestamp())
    tomorrow = int(datetime(2026, 11, 25, 9, tzinfo=ZONE).timestamp())
    assert measures.wait(now, [tomorrow, tomorrow + 3 * 86400, None], ZONE) == measures.Wait(2.5, 2, 1)
    assert measures.wait(now, [None], ZONE) == measures.Wait(None, 0, 1)


def test_a_window_is_of_whole_days_of_the_clinics_own_on_the_nights_in_which_clocks_are_turned_too():
    for day, hours in (("2026-11-01", 25), ("2027-03-14", 23), ("2026-11-02", 24)):
        begin, end = measures.days(day, day, ZONE, 31)
        assert end - begin == timedelta(hours=hours)
        assert begin.astimezone(ZONE).date() == date.fromisoformat(day)
    assert refusal("2026-11-01", "2026-12-02") == refusal("2026-11-02", "2026-11-01") == "WINDOW_TOO_LONG"
    assert refusal("2026-02-30", "2026-03-01") == refusal("0001-01-01", "0001-01-02") == "DATE_INVALID"


def refusal(first, last):
    with pytest.raises(Invalid) as caught:
        measures.days(first, last, ZONE, 31)
    return caught.value.reason


def test_a_share_of_fewer_than_eleven_is_left_out():
    assert measures.share(1, 10) is None
    assert measures.share(1, 11) == measures.Figure(1 / 11, 11)


def test_a_night_is_the_clinics_own_and_comes_once_a_day():
    at = datetime(2027, 3, 13, 12, tzinfo=UTC)
    nights = []
    for _ in range(3):
        at = measures.next_night(at, ZONE)
        nights.append(at.astimezone(ZONE).isoformat())
    # 02:30 is skipped on the 14th.
    assert nights == ["2027-03-14T03:30:00-04:00", "2027-03-15T02:30:00-04:00", "2027-03-16T02:30:00-04:00"]


@pytest.fixture(scope="module")
async def ask(desk):
    await desk.harness.staff("quill", ["measures.read"])
    clinics = [await desk.a_clinic() for _ in range(2)]
    await desk.harness.staff("mia", WORK, clinics=clinics)

    async def call(method, request):
        return await desk.harness.call("scheduling", MeasuresServiceStub, method, request, "quill")

    call.clinics = clinics
    return call


async def test_third_next_available_on_a_clinic_counted_by_hand_held_times_left_out(desk, ask):
    """An hour each morning: two appointments a day. One practitioner has nothing tomorrow but a hold and a visit."""
    clinic = ask.clinics[0]
    free = await desk.a_practitioner("Free", WEEKDAYS, clinic)
    busy = await desk.a_practitioner("Busy", WEEKDAYS, clinic)
    away = await desk.a_practitioner("Away", [{**WEEKDAYS[0], "valid_until": "2020-01-01"}], clinic)
    kind = await desk.a_visit_type("third", minimum_notice_minutes=24 * 60)
    patient = await desk.harness.subject(clinic)
    # The first day on which both morning appointments lie beyond the notice.
    first = 1 if datetime.now(ZONE).time() < time(9) else 2
    request = pb.GetThirdNextAvailableRequest(clinic_id=clinic, visit_type_ids=[kind])

    async def counted():
        (row,) = (await ask("GetThirdNextAvailable", request)).rows
        assert row.visit_type_id == kind and row.practitioners_full == 1  # Away
        return row.days, row.practitioners

    # Two on the first day, the third on the day after.
    assert await counted() == (first + 1, 2)
    at = local(first, 9)
    await desk.book(patient, at, busy, visit_type_id=kind, clinic_id=clinic, subject="mia")
    assert await counted() == (first + 1, 2)
    later = await desk.search(kind, clinic_ids=[clinic], practitioner_ids=[busy], start_time=local(first, 9, 30))
    held = await desk.hold(patient, later.slots[0], "mia")
    assert held.start_time.ToDatetime(tzinfo=UTC) == local(first, 9, 30)
    # Nothing on the first day, two on the second: the third one is on the third day.
    assert await counted() == (first + 1.5, 2)
    await desk.do("Release", held, "mia")
    assert await counted() == (first + 1, 2)
    assert free and away


async def test_a_visit_of_a_specialty_is_waited_for_with_those_who_have_it(desk, ask):
    clinic = ask.clinics[0]
    heart = {"system": "http://snomed.info/sct", "code": "394579002"}
    await desk.a_practitioner("Heart", WEEKDAYS, clinic, role={"specialties": [heart]})
    await desk.a_practitioner("Other", WEEKDAYS, clinic)
    kind = await desk.a_visit_type("third-of-hearts", specialty=heart)
    request = pb.GetThirdNextAvailableRequest(clinic_id=clinic, visit_type_ids=[kind])
    (row,) = (await ask("GetThirdNextAvailable", request)).rows
    assert (row.visit_type_id, row.practitioners, row.practitioners_full) == (kind, 1, 0)


async def test_rates_and_minutes_on_visits_counted_by_hand(desk, ask):
    """Twelve visits a week ago, of which 6 came, 3 did not, 3 were cancelled, one of these late; one time was refilled."""
    clinic = ask.clinics[1]
    doctor = await desk.a_practitioner("Quota", clinic=clinic)
    patients = [await desk.harness.subject(clinic) for _ in range(14)]
    visits = []
    for number in range(12):
        visits.append(
            await desk.book(
                patients[number], local(10, 8) + timedelta(hours=number), doctor, clinic_id=clinic, subject="mia"
            )
        )
    for visit in visits[9:]:
        await desk.do("Cancel", visit, "mia", reason={"code": "pat"})
    again = await desk.book(patients[12], local(10, 17), doctor, clinic_id=clinic, subject="mia")  # the time of visit 9
    held = (await desk.search(clinic_ids=[clinic], practitioner_ids=[doctor], start_time=local(10, 18))).slots[0]
    await desk.do("Release", await desk.hold(patients[13], held, "mia"), "mia")  # was never promised
    ids = [one.id for one in visits]
    back = timedelta(days=-17)
    for one in [*visits, again]:
        await desk.shift(one, back)
    # As if all had been made and cancelled two days before they were to begin.
    await desk.sql(
        "UPDATE appointment SET create_time = start_time - interval '4 days',"
        " update_time = start_time - interval '2 days' WHERE clinic_id = :clinic AND status <> 'PENDING'",
        clinic=clinic,
    )
    await desk.sql("UPDATE appointment SET status = 'FULFILLED' WHERE id = ANY(:ids)", ids=ids[:6])
    await desk.sql("UPDATE appointment SET status = 'NOSHOW' WHERE id = ANY(:ids)", ids=ids[6:9])
    await desk.sql("UPDATE appointment SET late_cancel = true WHERE id = :id", id=ids[11])
    day = (datetime.now(ZONE).date() + timedelta(days=-7)).isoformat()
    request = pb.GetVisitRatesRequest(clinic_id=clinic, first_date=day, last_date=day)
    looks = []

    def hear(_connection, _cursor, statement, parameters, *_):
        if "percentile_cont" in statement:
            looks.append((statement, parameters))

    event.listen(desk.database.engine.sync_engine, "before_cursor_execute", hear)
    try:
        rates = await ask("GetVisitRates", request)
    finally:
        event.remove(desk.database.engine.sync_engine, "before_cursor_execute", hear)
    assert (rates.lead_time.value, rates.lead_time.counted) == (4.0, 13)
    assert not rates.HasField("no_show_rate"), "nine were due, which is too few"
    assert (rates.late_cancel_rate.value, rates.late_cancel_rate.counted) == (pytest.approx(1 / 13), 13)
    assert not rates.HasField("fill_rate")
    ((statement, parameters),) = looks
    async with desk.database.engine.begin() as connection:
        await connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
        plan = "\n".join((await connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)).scalars())
    assert "Seq Scan" not in plan and "Index Cond" in plan, plan

    minutes = await ask("GetUtilization", pb.GetUtilizationRequest(clinic_id=clinic, first_date=day, last_date=day))
    # Open day and night; nine visits and the one that refilled a time, of half an hour each.
    assert (minutes.open_minutes, minutes.booked_minutes) == (24 * 60, 10 * 30)


async def test_fill_and_no_show_rates_count_what_they_say(desk, ask, monkeypatch):
    monkeypatch.setattr(measures, "FEWEST", 1)
    day = (datetime.now(ZONE).date() + timedelta(days=-7)).isoformat()
    rates = await ask("GetVisitRates", pb.GetVisitRatesRequest(clinic_id=ask.clinics[1], first_date=day, last_date=day))
    assert (rates.no_show_rate.value, rates.no_show_rate.counted) == (pytest.approx(3 / 9), 9)
    assert (rates.fill_rate.value, rates.fill_rate.counted) == (pytest.approx(1 / 3), 3)


async def test_a_clinic_is_measured_once_a_night_and_the_figures_are_told(desk, ask):
    runtime = desk.harness.servers["scheduling"].runtime
    await take_measures(runtime)  # plans what is new
    before = await desk.sql("SELECT count(*) AS n FROM measure WHERE clinic_id = :id", id=desk.clinic)
    await desk.sql(
        "UPDATE measure_run SET due_time = clock_timestamp() - interval '1 minute' WHERE id = :id", id=desk.clinic
    )
    while await take_measures(runtime):
        pass
    listed = await ask("ListMeasures", pb.ListMeasuresRequest(clinic_ids=[desk.clinic]))
    assert before[0].n == 0 and {one.kind for one in listed.measures} >= {
        pb.Measure.THIRD_NEXT_AVAILABLE, pb.Measure.UTILIZATION,
    }  # fmt: skip
    one = listed.measures[0]
    ((kind, _),) = await desk.told(one.id, 1, pb.Measure)
    assert kind == "measure.taken"
    # The same night again, as after a restore: nothing is told twice.
    await desk.sql(
        "UPDATE measure_run SET due_time = clock_timestamp() - interval '1 minute' WHERE id = :id", id=desk.clinic
    )
    while await take_measures(runtime):
        pass
    again = await ask("ListMeasures", pb.ListMeasuresRequest(clinic_ids=[desk.clinic]))
    assert again.measures == listed.measures
    planned = await desk.sql("SELECT due_time FROM measure_run WHERE id = :id", id=desk.clinic)
    assert planned[0].due_time.astimezone(ZONE).time() == measures.NIGHT


async def test_no_clinic_of_another_tenant_is_measured(ask):
    request = pb.GetVisitRatesRequest(
        clinic_id="01890000-0000-7000-8000-00000000dead", first_date="2026-11-01", last_date="2026-11-01"
    )
    assert await refused(ask("GetVisitRates", request)) == "CLINIC_UNKNOWN"

"""Recurring visits over real gRPC: booked whole, moved and cancelled by scope, and nothing else is touched."""

import asyncio
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from care.scheduling.v1 import appointments_pb2, requests_pb2
from care.scheduling.v1 import series_pb2 as pb
from care.scheduling.v1.requests_pb2_grpc import SchedulingRequestsServiceStub
from care.scheduling.v1.series_pb2_grpc import SeriesServiceStub
from sqlalchemy.exc import DBAPIError

from chassis.errors import LostRace
from chassis.ids import new_id
from services.scheduling.offers import Place
from services.scheduling.placing import Wanted, look_at_all
from services.scheduling.tests.desk import WORK, refused, soon

ZONE = ZoneInfo("America/New_York")
THIS, FOLLOWING, ALL = pb.SeriesScope.THIS, pb.SeriesScope.THIS_AND_FOLLOWING, pb.SeriesScope.ALL
DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


class SeriesDesk:
    """The desk, and what it asks about series."""

    def __init__(self, desk):
        self.desk = desk

    def __getattr__(self, name):
        return getattr(self.desk, name)

    async def ask(self, method, request, subject="cora"):
        return await self.desk.harness.call("scheduling", SeriesServiceStub, method, request, subject)

    def wish(self, patient, start, rule, practitioner, **more):
        more = {"visit_type_id": self.desk.visit, "clinic_id": self.desk.clinic, **more}
        return pb.CreateSeriesRequest(
            patient_id=patient, practitioner_id=practitioner, start=start, rule=rule, **more
        )  # fmt: skip

    async def book_series(self, patient, start, rule, practitioner, subject="cora", **more):
        return await self.ask("CreateSeries", self.wish(patient, start, rule, practitioner, **more), subject)

    async def reschedule(self, series, scope, visit=None, **more):
        request = pb.RescheduleSeriesRequest(
            id=series.id, scope=scope, appointment_id=visit.id if visit is not None else "", **more
        )
        return await self.ask("RescheduleSeries", request)

    async def cancel(self, series, scope, visit=None, **more):
        request = pb.CancelSeriesRequest(
            id=series.id, scope=scope, appointment_id=visit.id if visit is not None else "",
            reason={"code": "pat"}, **more,
        )  # fmt: skip
        return await self.ask("CancelSeries", request)

    async def get(self, series):
        return await self.ask("GetSeries", pb.GetSeriesRequest(id=series.id))

    async def visits(self, series):
        """The visits of a series by number, as the list shows them."""
        request = appointments_pb2.ListAppointmentsRequest(series_ids=[series.id], page_size=200)
        found = (await self.desk("ListAppointments", request)).appointments
        return sorted(found, key=lambda one: one.series_number)

    async def counts(self):
        """Rows of all that a booking keeps."""
        return [
            (await self.desk.sql(f"SELECT count(*) FROM {table}"))[0][0]
            for table in ("series", "appointment", "occupancy")
        ]

    async def somebody(self, rule="FREQ=WEEKLY;COUNT=6", at="09:00", first=None):
        """A series of a patient of its own with a practitioner of its own."""
        patient, doctor = await self.desk.a_patient(), await self.desk.a_practitioner("Own")
        outcome = await self.book_series(patient, f"{first or monday()}T{at}", rule, doctor)
        assert outcome.booked
        return outcome.series, await self.visits(outcome.series)


@pytest.fixture
async def series_desk(desk):
    return SeriesDesk(desk)


def monday(weeks=4):
    """A Monday at least so many weeks ahead."""
    day = datetime.now(UTC).date() + timedelta(weeks=weeks)
    return day + timedelta(days=-day.weekday() % 7)


def at(day, clock):
    """The instant of a wall time at the clinic."""
    return datetime.fromisoformat(f"{day}T{clock}").replace(tzinfo=ZONE).astimezone(UTC)


def walls(visits):
    return [one.start_time.ToDatetime(UTC).astimezone(ZONE).strftime("%Y-%m-%dT%H:%M") for one in visits]


def weekly(first, count, clock):
    return [f"{first + timedelta(weeks=n)}T{clock}" for n in range(count)]


def status(visits):
    return [appointments_pb2.Appointment.Status.Name(one.status) for one in visits]


# -- booking -----------------------------------------------------------------------------------------------------------


async def test_a_weekly_series_books_each_visit_with_its_own_id_at_the_same_wall_time(series_desk):
    """Recurring: Bahmni AP-20, each occurrence is a visit of its own."""
    patient, doctor = await series_desk.a_patient(), await series_desk.a_practitioner("Weekly")
    outcome = await series_desk.book_series(patient, f"{monday()}T09:00", "FREQ=WEEKLY;COUNT=30", doctor)
    assert outcome.booked and outcome.conflicts == 0 and len(outcome.occurrences) == 30
    visits = await series_desk.visits(outcome.series)
    assert [one.series_number for one in visits] == list(range(1, 31)) and len({one.id for one in visits}) == 30
    # Thirty weeks pass a change of the clock: the wall time stays, the instant doesn't.
    assert walls(visits) == weekly(monday(), 30, "09:00")
    assert len({one.start_time.ToDatetime().hour for one in visits}) == 2
    assert all(one.series_start_time == one.start_time for one in visits)
    assert [one.appointment_id for one in outcome.occurrences] == [one.id for one in visits]


async def test_every_eighth_week_is_every_eighth_week(series_desk):
    """openemr#7967: a medication is given every 8th week, which the rules on offer there could not say."""
    _, visits = await series_desk.somebody("FREQ=WEEKLY;INTERVAL=8;COUNT=6")
    assert walls(visits) == [f"{monday() + timedelta(weeks=8 * n)}T09:00" for n in range(6)]


async def test_a_conflict_in_the_middle_books_nothing_and_says_which_why_and_what_is_free_near_it(series_desk):
    """medplum#10408: the full series is evaluated when it is booked. cal.diy#15997: only the first two were looked at.
    cal.diy PR#30016.
    """
    patient, doctor = await series_desk.a_patient(), await series_desk.a_practitioner("Middle")
    third, fifth = (at(monday() + timedelta(weeks=n), "09:00") for n in (2, 4))
    await series_desk.book(await series_desk.a_patient(), third, doctor)
    await series_desk.book(patient, fifth, series_desk.other)
    before = await series_desk.counts()
    outcome = await series_desk.book_series(patient, f"{monday()}T09:00", "FREQ=WEEKLY;COUNT=6", doctor)
    assert (outcome.booked, outcome.conflicts, outcome.HasField("series")) == (False, 2, False)
    assert [one.reason for one in outcome.occurrences] == ["", "", "SLOT_TAKEN", "", "PATIENT_BUSY", ""]
    assert await series_desk.counts() == before
    # Nearest first, bookable as they are.
    offers = outcome.occurrences[2].alternatives
    away = [abs(offer.start_time.ToDatetime(UTC) - third) for offer in offers]
    assert len(offers) == 3 and away == sorted(away) and away[0] == timedelta(minutes=30)
    assert {offer.practitioner_id for offer in offers} == {doctor}

    choices = [{"number": 3, "offer_token": offers[0].offer_token}, {"number": 5}]
    outcome = await series_desk.book_series(
        patient, f"{monday()}T09:00", "FREQ=WEEKLY;COUNT=6", doctor, choices=choices
    )  # fmt: skip
    assert outcome.booked and [one.skipped for one in outcome.occurrences] == [False] * 4 + [True, False]
    visits = await series_desk.visits(outcome.series)
    assert [one.series_number for one in visits] == [1, 2, 3, 4, 6]
    assert visits[2].start_time == offers[0].start_time
    assert visits[2].series_start_time.ToDatetime(UTC) == third
    assert not await series_desk.overlaps()


async def test_what_fits_is_booked_only_when_that_is_asked_for(series_desk):
    """cal.diy#15997: "this slot is only available for 20 bookings - accept?" is what a user asked for."""
    patient, doctor = await series_desk.a_patient(), await series_desk.a_practitioner("Fits")
    await series_desk.book(await series_desk.a_patient(), at(monday() + timedelta(weeks=1), "09:00"), doctor)
    outcome = await series_desk.book_series(
        patient, f"{monday()}T09:00", "FREQ=WEEKLY;COUNT=3", doctor,
        on_conflict=pb.CreateSeriesRequest.BOOK_WHAT_FITS,
    )  # fmt: skip
    assert outcome.booked and outcome.conflicts == 1 and outcome.occurrences[1].reason == "SLOT_TAKEN"
    assert [one.series_number for one in await series_desk.visits(outcome.series)] == [1, 3]


async def test_hours_leave_and_closed_days_count_for_each_visit(series_desk):
    """Cal-ID#732: a series was booked into days on which nobody works."""
    leave = monday() + timedelta(weeks=1)
    week = [{"weekday": day, "start": "08:00", "end": "17:00"} for day in range(1, 6)]
    doctor = await series_desk.a_practitioner("Leave", week, exceptions=[{"date": f"{leave}", "kind": "CLOSED"}])
    patient = await series_desk.a_patient()
    outcome = await series_desk.book_series(patient, f"{monday()}T09:00", "FREQ=DAILY;COUNT=8", doctor)
    assert [one.reason for one in outcome.occurrences] == [""] * 5 + ["OUTSIDE_HOURS"] * 2 + ["OUTSIDE_HOURS"]
    assert not outcome.booked


async def test_a_preview_books_nothing(series_desk):
    patient, doctor = await series_desk.a_patient(), await series_desk.a_practitioner("Preview")
    before = await series_desk.counts()
    wish = series_desk.wish(patient, f"{monday()}T09:00", "FREQ=WEEKLY;COUNT=4", doctor)
    outcome = await series_desk.ask("PreviewSeries", pb.PreviewSeriesRequest(series=wish))
    assert (outcome.booked, outcome.conflicts, len(outcome.occurrences)) == (False, 0, 4)
    assert await series_desk.counts() == before


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("FREQ=WEEKLY", "SERIES_WITHOUT_END"),
        ("FREQ=DAILY;COUNT=1000000", "TOO_MANY_OCCURRENCES"),
        ("FREQ=DAILY;UNTIL=99991231", "RULE_INVALID"),
        ("FREQ=DAILY;UNTIL=29991231", "SERIES_TOO_LONG"),
        ("FREQ=DAILY;UNTIL=20260101", "RULE_INVALID"),
        ("FREQ=SECONDLY;COUNT=2", "RULE_INVALID"),
        ("FREQ=WEEKLY;BYDAY=TU;COUNT=4", "FIRST_NOT_IN_RULE"),
        ("every week", "RULE_INVALID"),
    ],
)
async def test_a_rule_that_cannot_be_is_refused_with_its_field(series_desk, rule, reason):
    """medplum#8407 and others: a rule without an end, or with a million visits, kept a server busy for ever."""
    started = asyncio.get_running_loop().time()
    patient = await series_desk.a_patient()
    assert await refused(series_desk.book_series(patient, f"{monday()}T09:00", rule, series_desk.doctor)) == reason
    assert asyncio.get_running_loop().time() - started < 5


async def test_a_start_that_is_none_or_past_is_refused(series_desk):
    patient = await series_desk.a_patient()
    for start, reason in (("tomorrow", "START_INVALID"), ("2020-01-06T09:00", "START_PAST")):
        call = series_desk.book_series(patient, start, "FREQ=WEEKLY;COUNT=2", series_desk.doctor)
        assert await refused(call) == reason


async def test_the_same_request_id_books_one_series(series_desk):
    patient, doctor = await series_desk.a_patient(), await series_desk.a_practitioner("Once")
    wish = series_desk.wish(patient, f"{monday()}T09:00", "FREQ=WEEKLY;COUNT=3", doctor, request_id=f"once-{patient}")
    one, other = [await series_desk.ask("CreateSeries", wish) for _ in range(2)]
    assert one.series.id == other.series.id and len(await series_desk.visits(one.series)) == 3


async def test_a_series_is_its_patients_record(series_desk):
    series, _ = await series_desk.somebody()
    assert await refused(series_desk.ask("GetSeries", pb.GetSeriesRequest(id=series.id), "elias")) == "NOT_FOUND"
    shown = await series_desk.ask("ListSeries", pb.ListSeriesRequest(patient_ids=[series.patient_id]))
    assert [one.id for one in shown.series] == [series.id]
    request = pb.CancelSeriesRequest(id=series.id, scope=ALL, reason={"code": "pat"})
    assert await refused(series_desk.ask("CancelSeries", request, "elias")) == "NOT_FOUND"


# -- moving ------------------------------------------------------------------------------------------------------------


async def test_moving_one_visit_moves_one_and_makes_none(series_desk):
    """cal.diy#12461 and #10524: moving one visit of a series made new ones. #9154: one alone could not be moved."""
    series, visits = await series_desk.somebody()
    outcome = await series_desk.reschedule(series, THIS, visits[2], time="14:00", weekday=3)
    assert outcome.booked and len(outcome.occurrences) == 1
    after = await series_desk.visits(series)
    assert [one.id for one in after] == [one.id for one in visits]
    assert walls(after)[2] == f"{monday() + timedelta(weeks=2, days=2)}T14:00"
    assert [one for n, one in enumerate(after) if n != 2] == [one for n, one in enumerate(visits) if n != 2]
    assert after[2].series_start_time == visits[2].series_start_time


async def test_this_and_following_splits_the_series_and_leaves_the_earlier_visits(series_desk):
    series, visits = await series_desk.somebody()
    outcome = await series_desk.reschedule(series, FOLLOWING, visits[3], time="10:30", weekday=2)
    new = outcome.series
    assert outcome.booked and new.id != series.id and new.previous_series_id == series.id
    assert await series_desk.visits(series) == visits[:3]
    moved = await series_desk.visits(new)
    assert [one.id for one in moved] == [one.id for one in visits[3:]]
    tuesday = monday() + timedelta(weeks=3, days=1)
    assert walls(moved) == weekly(tuesday, 3, "10:30")
    assert all(one.series_start_time == one.start_time and one.schedule_version == 2 for one in moved)
    assert (new.start, new.rule) == (
        f"{tuesday}T10:30",
        f"FREQ=WEEKLY;BYDAY=TU;UNTIL={tuesday + timedelta(weeks=2):%Y%m%d}T103000",
    )
    last = monday() + timedelta(weeks=2)
    assert (await series_desk.get(series)).rule == f"FREQ=WEEKLY;UNTIL={last:%Y%m%d}T090000"
    assert not await series_desk.overlaps()


async def test_what_was_moved_by_itself_stays_unless_asked_for(series_desk):
    series, visits = await series_desk.somebody()
    await series_desk.move(visits[2], at(monday() + timedelta(weeks=2, days=4), "16:00"))
    friday = f"{monday() + timedelta(weeks=2, days=4)}T16:00"
    await series_desk.reschedule(series, ALL, time="11:00")
    after = await series_desk.visits(series)
    assert walls(after) == [*weekly(monday(), 2, "11:00"), friday, *weekly(monday() + timedelta(weeks=3), 3, "11:00")]
    # It is an exception of the series as it is now.
    assert walls([after[2]]) != [f"{monday() + timedelta(weeks=2)}T11:00"]
    assert after[2].series_start_time.ToDatetime(UTC) == at(monday() + timedelta(weeks=2), "11:00")
    await series_desk.reschedule(series, ALL, time="12:00", include_exceptions=True)
    assert walls(await series_desk.visits(series)) == weekly(monday(), 6, "12:00")


async def test_past_visits_are_never_touched(series_desk):
    """cal.diy PR#3448: cancelling a series took visits along that had already taken place."""
    series, visits = await series_desk.somebody()
    for visit in visits[:2]:
        await series_desk.shift(visit, -timedelta(weeks=8))
    past = (await series_desk.visits(series))[:2]
    await series_desk.reschedule(series, ALL, time="15:00", include_exceptions=True)
    after = await series_desk.visits(series)
    assert after[:2] == past and walls(after[2:]) == weekly(monday() + timedelta(weeks=2), 4, "15:00")
    for method in (
        series_desk.reschedule(series, FOLLOWING, past[1], time="16:00"),
        series_desk.cancel(series, THIS, past[0]),
    ):
        assert await refused(method) == "OCCURRENCE_PAST"
    await series_desk.cancel(series, ALL)
    after = await series_desk.visits(series)
    assert after[:2] == past and status(after[2:]) == ["CANCELLED"] * 4


async def test_a_move_that_meets_a_conflict_moves_nothing(series_desk):
    series, visits = await series_desk.somebody()
    other = await series_desk.a_patient()
    await series_desk.book(other, at(monday() + timedelta(weeks=4), "13:00"), series.practitioner_id)
    held = await series_desk.sql("SELECT holder_id, no, during::text FROM occupancy ORDER BY 1, 2")
    outcome = await series_desk.reschedule(series, FOLLOWING, visits[1], time="13:00")
    assert not outcome.booked and outcome.conflicts == 1
    assert [one.reason for one in outcome.occurrences] == ["", "", "", "SLOT_TAKEN", ""]
    assert outcome.occurrences[3].alternatives
    assert await series_desk.visits(series) == visits
    assert await series_desk.sql("SELECT holder_id, no, during::text FROM occupancy ORDER BY 1, 2") == held
    before = await series_desk.counts()
    outcome = await series_desk.reschedule(series, ALL, time="16:00", validate_only=True)
    assert not outcome.booked and outcome.conflicts == 0 and await series_desk.counts() == before


async def test_a_series_moves_to_another_practitioner_and_into_its_own_old_times(series_desk):
    series, visits = await series_desk.somebody()
    # By a quarter of an hour: each visit stands in its own way, and only there.
    assert (await series_desk.reschedule(series, ALL, time="09:15")).booked
    other = await series_desk.a_practitioner("Takes over")
    outcome = await series_desk.reschedule(series, FOLLOWING, visits[0], practitioner_id=other)
    assert outcome.booked and outcome.series.id == series.id  # nothing came before it: nothing is split
    after = await series_desk.visits(series)
    assert {one.practitioner_id for one in after} == {other} and walls(after) == weekly(monday(), 6, "09:15")
    # The old one is free again, the patient and the new one are taken once.
    await series_desk.book(await series_desk.a_patient(), at(monday(), "09:00"), series.practitioner_id)
    assert not await series_desk.overlaps()


async def test_a_change_must_say_what_and_where_from(series_desk):
    series, visits = await series_desk.somebody("FREQ=WEEKLY;BYDAY=MO,WE;COUNT=4")
    assert await refused(series_desk.reschedule(series, ALL)) == "CHANGE_MISSING"
    assert await refused(series_desk.reschedule(series, THIS, time="10:00")) == "OCCURRENCE_MISSING"
    assert await refused(series_desk.reschedule(series, ALL, weekday=5)) == "WEEKDAY_NOT_MOVABLE"
    request = pb.RescheduleSeriesRequest(id=series.id, scope=ALL, time="10:00", etag='"77"')
    assert await refused(series_desk.ask("RescheduleSeries", request)) == "ETAG_MISMATCH"
    assert await series_desk.visits(series) == visits


# -- cancelling --------------------------------------------------------------------------------------------------------


async def test_cancelling_the_rest_cancels_each_of_the_rest_and_frees_their_times(series_desk):
    """cal.diy#6281 and #16203: cancelling the rest of a series took only the first of it off the calendar. In #5431
    "cancel" took the next one only.
    """
    series, visits = await series_desk.somebody()
    outcome = await series_desk.cancel(series, FOLLOWING, visits[2])
    assert [one.appointment_id for one in outcome.occurrences] == [one.id for one in visits[2:]]
    after = await series_desk.visits(series)
    assert status(after) == ["BOOKED"] * 2 + ["CANCELLED"] * 4
    assert {one.cancelation_reason.code for one in after[2:]} == {"pat"}
    assert (await series_desk.get(series)).status == pb.Series.ACTIVE
    again = await series_desk.book_series(
        await series_desk.a_patient(), f"{monday() + timedelta(weeks=2)}T09:00", "FREQ=WEEKLY;COUNT=4",
        series.practitioner_id,
    )  # fmt: skip
    assert again.booked
    for visit in after[2:]:
        told = await series_desk.told(visit, 2)
        assert [kind for kind, _ in told] == ["appointment.booked", "appointment.cancelled"]


async def test_cancelling_one_visit_cancels_one(series_desk):
    """cal.diy PR#3448: cancelling one visit cancelled the series. #13827: one that was cancelled was not told outside."""
    series, visits = await series_desk.somebody()
    await series_desk.cancel(series, THIS, visits[1])
    after = await series_desk.visits(series)
    assert status(after) == ["BOOKED", "CANCELLED", *["BOOKED"] * 4]
    assert (await series_desk.told(visits[1], 2))[1][0] == "appointment.cancelled"
    await series_desk.cancel(series, ALL)
    assert (await series_desk.get(series)).status == pb.Series.CANCELLED
    assert await refused(series_desk.cancel(series, ALL)) == "ILLEGAL_TRANSITION"


async def test_one_act_tells_each_visit_and_says_which_one_speaks_for_all(series_desk):
    series, visits = await series_desk.somebody("FREQ=WEEKLY;COUNT=3")
    await series_desk.reschedule(series, ALL, time="10:00")
    await series_desk.reschedule(series, THIS, visits[0], time="11:00")
    parts = []
    for number, visit in enumerate(visits, 1):
        told = await series_desk.told(visit, 3 if number == 1 else 2)
        assert {payload.series_id for _, payload in told} == {series.id}
        assert [payload.series_part for _, payload in told[:2]] == [number, number]
        parts += [payload.series_part for _, payload in told[2:]]
    assert parts == [0]


# -- rivals ------------------------------------------------------------------------------------------------------------


async def test_series_that_cross_never_overlap_and_never_deadlock(series_desk):
    """cal.diy PR#22803 and #15997: recurring bookings were booked twice."""
    doctors = [await series_desk.a_practitioner(name) for name in ("Cross", "Roads")]
    patients = [await series_desk.a_patient() for _ in range(3)]
    deadlocks = (await series_desk.sql(DEADLOCKS))[0][0]
    rules = ("FREQ=WEEKLY;COUNT=8", "FREQ=WEEKLY;INTERVAL=2;COUNT=4", "FREQ=DAILY;INTERVAL=7;COUNT=8")
    singles = [at(monday() + timedelta(weeks=n), "09:00") for n in (7, 5)]

    async def one(number):
        rule, patient = rules[number % 3], patients[number % 3]
        start = monday() + timedelta(weeks=number % 2)
        wish = series_desk.wish(
            patient, f"{start}T09:{15 * (number % 2):02}", rule, doctors[number // 3],
            on_conflict=pb.CreateSeriesRequest.BOOK_WHAT_FITS,
        )  # fmt: skip
        return await series_desk.ask("CreateSeries", wish)

    async def single(start):
        return await series_desk.book(await series_desk.a_patient(), start, doctors[0])

    # Few at once: each waits for those before it, and nobody waits for a lock for more than two seconds.
    outcomes = await asyncio.gather(
        *(one(number) for number in range(5)), *(single(start) for start in singles), return_exceptions=True
    )
    refusals = {one.reason for one in outcomes if isinstance(one, BaseException)}
    assert refusals <= {"SLOT_TAKEN"}
    assert sum(one.booked for one in outcomes[:5] if not isinstance(one, BaseException)) >= 2
    assert not await series_desk.overlaps()
    assert (await series_desk.sql(DEADLOCKS))[0][0] == deadlocks


async def test_series_that_swap_their_times_at_once_neither_deadlock_nor_overlap(series_desk):
    one, _ = await series_desk.somebody("FREQ=WEEKLY;COUNT=8", "09:00")
    patient = await series_desk.a_patient()
    outcome = await series_desk.book_series(
        patient, f"{monday()}T10:00", "FREQ=WEEKLY;COUNT=8", one.practitioner_id
    )  # fmt: skip
    deadlocks = (await series_desk.sql(DEADLOCKS))[0][0]
    for _ in range(3):
        moves = await asyncio.gather(
            series_desk.reschedule(one, ALL, time="09:30"),
            series_desk.reschedule(outcome.series, ALL, time="09:30"),
            return_exceptions=True,
        )
        assert not [move for move in moves if isinstance(move, BaseException)]
        assert sum(move.booked for move in moves) == 1
        await asyncio.gather(
            series_desk.reschedule(one, ALL, time="09:00"), series_desk.reschedule(outcome.series, ALL, time="10:00")
        )
    assert (await series_desk.sql(DEADLOCKS))[0][0] == deadlocks
    assert not await series_desk.overlaps()


async def test_series_that_want_practitioners_of_no_number_crosswise_do_not_deadlock(series_desk):
    """Who is first wanted gets a number: two who made them one by one, from both ends, waited for each other."""
    doctors = [await series_desk.a_practitioner("New") for _ in range(8)]
    start = int(soon(30).timestamp())
    runtime = series_desk.harness.servers["scheduling"].runtime
    patients = [await series_desk.a_patient() for _ in range(2)]

    async def look(patient, order):
        wanted = [
            Wanted(number, Place(series_desk.visit, series_desk.clinic, doctor, start + 86_400 * number))
            for number, doctor in enumerate(order, 1)
        ]
        async with runtime.database.acting("system:scheduling") as db:
            await look_at_all(db, series_desk.harness.tenant_id, patient, wanted, db.info["act"].now, lock=True)

    deadlocks = (await series_desk.sql(DEADLOCKS))[0][0]
    outcomes = await asyncio.gather(
        look(patients[0], doctors), look(patients[1], doctors[::-1]), return_exceptions=True
    )
    assert not any(isinstance(one, DBAPIError) for one in outcomes)
    # Somebody else may have given out the number a moment ago: that is tried again, and nobody waited in a circle.
    assert all(one is None or isinstance(one, LostRace) for one in outcomes)
    assert (await series_desk.sql(DEADLOCKS))[0][0] == deadlocks


# -- what a series counts against, and what it answers ----------------------------------------------------------------


async def test_visits_of_one_series_count_against_each_others_quota(series_desk):
    """Of a day two visits may start: three choices of one series on that day are one too many."""
    rule = "FREQ=WEEKLY;BYDAY=MO;COUNT=3"
    day = [{"weekday": day, "start": "00:00", "end": "00:00", "quotas": [{"at_most": 2}]} for day in range(1, 8)]
    doctor = await series_desk.a_practitioner("Two", day)
    offered = (await series_desk.search(practitioner_ids=[doctor], start_time=at(monday(5), "12:00"))).slots[:6:2]
    same_day = [{"number": number, "offer_token": slot.offer_token} for number, slot in enumerate(offered, 1)]
    wish = series_desk.wish(await series_desk.a_patient(), f"{monday()}T09:00", rule, doctor, choices=same_day)
    seen = await series_desk.ask("PreviewSeries", pb.PreviewSeriesRequest(series=wish))
    assert [one.reason for one in seen.occurrences] == ["", "", "QUOTA_REACHED"]
    whole = await series_desk.ask("CreateSeries", wish)
    assert not whole.booked and whole.conflicts == 1


async def test_a_series_answers_the_request_for_a_visit_until_its_last_one_falls_through(series_desk):
    rita = await series_desk.desk.harness.staff(
        "rosa", [*WORK, "requests.ask", "requests.read", "requests.work"], clinics=[series_desk.clinic]
    )
    assert rita

    async def requests(method, request):
        return await series_desk.desk.harness.call("scheduling", SchedulingRequestsServiceStub, method, request, "rosa")

    patient, doctor = await series_desk.a_patient(), await series_desk.a_practitioner("Asked")
    wanted = requests_pb2.SchedulingRequest(patient_id=patient, clinic_id=series_desk.clinic)
    asked = await requests(
        "CreateSchedulingRequest", requests_pb2.CreateSchedulingRequestRequest(scheduling_request=wanted)
    )
    named = [{"type": "SchedulingRequest", "id": asked.id}]
    rule = "FREQ=WEEKLY;COUNT=3"
    outcome = await series_desk.book_series(patient, f"{monday()}T09:00", rule, doctor, based_on=named)
    visits = await series_desk.visits(outcome.series)
    read = requests_pb2.GetSchedulingRequestRequest(id=asked.id)
    booked = await requests("GetSchedulingRequest", read)
    assert (booked.status, booked.appointment_id) == (requests_pb2.SchedulingRequest.BOOKED, visits[0].id)
    await series_desk.desk.do("Cancel", visits[0], reason={"code": "pat"})
    still = await requests("GetSchedulingRequest", read)
    assert (still.status, still.appointment_id) == (requests_pb2.SchedulingRequest.BOOKED, visits[1].id)
    await series_desk.cancel(outcome.series, ALL)
    again = await requests("GetSchedulingRequest", read)
    assert (again.status, again.appointment_id) == (requests_pb2.SchedulingRequest.OPEN, "")


async def test_what_is_free_near_a_conflict_counts_the_referral(series_desk):
    """Of a visit type that needs a referral nothing was shown near a conflict, though the series had one."""
    visit = await series_desk.a_visit_type(f"referred-{new_id()}", eligibility={"referral_required": True})
    doctor = await series_desk.a_practitioner("Referred")
    day = monday()
    named = [{"type": "Referral", "id": new_id()}]
    await series_desk.book(
        await series_desk.a_patient(), at(day, "09:00"), doctor, visit_type_id=visit, based_on=named
    )  # fmt: skip
    wish = series_desk.wish(
        await series_desk.a_patient(), f"{day}T09:00", "FREQ=WEEKLY;COUNT=2", doctor, visit_type_id=visit,
        based_on=named,
    )  # fmt: skip
    seen = await series_desk.ask("PreviewSeries", pb.PreviewSeriesRequest(series=wish))
    assert [one.reason for one in seen.occurrences] == ["SLOT_TAKEN", ""] and seen.occurrences[0].alternatives

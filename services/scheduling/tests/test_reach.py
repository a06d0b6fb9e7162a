"""What staff of another clinic and patients reach of a clinic: nothing, and what isn't theirs answers as what doesn't exist."""

import pytest
from care.scheduling.v1 import (
    appointments_pb2,
    board_pb2,
    clearings_pb2,
    feeds_pb2,
    requests_pb2,
    series_pb2,
    sessions_pb2,
    video_pb2,
    waitlist_pb2,
)
from care.scheduling.v1.board_pb2_grpc import DayBoardServiceStub
from care.scheduling.v1.clearings_pb2_grpc import ClearingsServiceStub
from care.scheduling.v1.feeds_pb2_grpc import CalendarFeedsServiceStub
from care.scheduling.v1.requests_pb2_grpc import SchedulingPreferencesServiceStub, SchedulingRequestsServiceStub
from care.scheduling.v1.series_pb2_grpc import SeriesServiceStub
from care.scheduling.v1.sessions_pb2_grpc import SessionsServiceStub
from care.scheduling.v1.video_pb2_grpc import VideoRoomsServiceStub
from care.scheduling.v1.waitlist_pb2_grpc import WaitlistServiceStub

from chassis.errors import NotFound, Problem
from chassis.ids import new_id
from services.scheduling.tests.desk import WORK, refused, soon

STAFF = [
    *WORK, "appointments.clear", "appointments.join", "appointments.overbook", "feeds.write", "requests.ask",
    "requests.read", "requests.work", "sessions.write", "waitlist.answer", "waitlist.read", "waitlist.write",
]  # fmt: skip
# What the shipped role of patients holds here.
PATIENT = [
    "availability.search", "appointments.read", "appointments.book", "appointments.write", "appointments.join",
    "feeds.write", "requests.ask", "requests.read", "waitlist.answer", "waitlist.read",
]  # fmt: skip


class Reach:
    """Nell works at the clinic, Otto at another, and Pia is a patient."""

    def __init__(self, desk, elsewhere, patient, nell):
        self.desk, self.elsewhere, self.patient, self.nell = desk, elsewhere, patient, nell

    async def __call__(self, stub, method, request, subject="nell"):
        return await self.desk.harness.call("scheduling", stub, method, request, subject)

    async def session(self, **more):
        request = sessions_pb2.CreateSessionRequest(
            name="Moving", visit_type_id=self.desk.visit, practitioner_id=await self.desk.a_practitioner("Class"),
            clinic_id=self.desk.clinic, capacity=3, waitlist_size=1,
        )  # fmt: skip
        request.start_time.FromDatetime(soon(12))
        subject = more.pop("subject", "nell")
        return await self(SessionsServiceStub, "CreateSession", request, subject)

    async def clearing(self, practitioner, subject="nell", **more):
        request = clearings_pb2.ClearDayRequest(
            id=practitioner, date=soon(30).date().isoformat(), reason={"code": "prov-pers"}, **more
        )
        return (await self(ClearingsServiceStub, "ClearDay", request, subject)).clearing


@pytest.fixture(scope="module")
async def reach(desk):
    elsewhere, patient = await desk.a_clinic(), await desk.a_patient()
    nell = await desk.harness.staff("nell", STAFF, clinics=[desk.clinic])
    await desk.harness.staff("otto", STAFF, clinics=[elsewhere])
    await desk.harness.staff("pia", PATIENT, kind="PATIENT", principal_id=patient)
    return Reach(desk, elsewhere, patient, nell)


async def test_a_session_is_its_own_clinics_to_plan_move_and_cancel(desk, reach):
    session = await reach.session()
    seat = await reach(
        SessionsServiceStub,
        "EnrollSession",
        sessions_pb2.EnrollSessionRequest(id=session.id, patient_id=await desk.a_patient()),
    )
    move = sessions_pb2.RescheduleSessionRequest(id=session.id)
    move.start_time.FromDatetime(soon(13))
    cancel = sessions_pb2.CancelSessionRequest(id=session.id, reason={"code": "prov"})
    for method, request in (("RescheduleSession", move), ("CancelSession", cancel)):
        assert await refused(reach(SessionsServiceStub, method, request, "otto")) == "NOT_FOUND"
        request.id = new_id()
        assert await refused(reach(SessionsServiceStub, method, request, "otto")) == "NOT_FOUND"
    assert await refused(reach.session(subject="otto")) == "CLINIC_UNKNOWN"
    assert (await desk.do("Confirm", seat)).start_time == session.start_time


async def test_days_are_cleared_at_ones_own_clinics_only(desk, reach):
    doctor = await desk.a_practitioner("Both")
    await desk.hours(doctor, clinic=reach.elsewhere)
    for more in ({"clinic_id": desk.clinic}, {"clinic_id": new_id()}):
        for preview in (True, False):
            assert await refused(reach.clearing(doctor, "otto", preview=preview, **more)) == "CLINIC_UNKNOWN"
    assert await refused(reach.clearing(await desk.a_practitioner("Here"), "otto")) == "CLINIC_UNKNOWN"
    await reach.clearing(doctor, "otto")
    closed = await desk.sql(
        "SELECT clinic_id::text FROM schedule WHERE practitioner_id = :id AND exceptions <> '[]'", id=doctor
    )
    assert [one.clinic_id for one in closed] == [reach.elsewhere]


async def test_why_a_practitioner_is_away_is_nothing_for_patients_and_other_clinics(desk, reach):
    clearing = await reach.clearing(await desk.a_practitioner("Away"))
    request = clearings_pb2.GetClearingRequest(id=clearing.id)
    assert (await reach(ClearingsServiceStub, "GetClearing", request)).reason.code == "prov-pers"
    for stranger in ("otto", "pia"):
        assert await refused(reach(ClearingsServiceStub, "GetClearing", request, stranger)) == "NOT_FOUND"


async def test_what_is_about_another_clinics_patient_is_as_if_it_were_not_there(desk, reach):
    patient = await desk.a_patient()
    visit = await desk.book(patient, soon(14), await desk.a_practitioner("Seen"))
    entry = await reach(
        WaitlistServiceStub,
        "CreateWaitlistEntry",
        waitlist_pb2.CreateWaitlistEntryRequest(patient_id=patient, visit_type_id=desk.visit, waitlist_entry={}),
    )
    wanted = await reach(
        SchedulingRequestsServiceStub,
        "CreateSchedulingRequest",
        requests_pb2.CreateSchedulingRequestRequest(
            scheduling_request={"patient_id": patient, "clinic_id": desk.clinic, "visit_type_id": desk.visit}
        ),
    )
    series = await reach(
        SeriesServiceStub,
        "CreateSeries",
        series_pb2.CreateSeriesRequest(
            patient_id=patient, visit_type_id=desk.visit, clinic_id=desk.clinic,
            practitioner_id=await desk.a_practitioner("Weekly"), start=f"{soon(15):%Y-%m-%d}T09:00", rule="FREQ=WEEKLY;COUNT=2",
        ),
    )  # fmt: skip
    assert series.booked
    feed = await reach(
        CalendarFeedsServiceStub, "CreateCalendarFeed", feeds_pb2.CreateCalendarFeedRequest(patient_id=patient)
    )
    by_id = [
        (WaitlistServiceStub, "GetWaitlistEntry", waitlist_pb2.GetWaitlistEntryRequest, entry.id),
        (WaitlistServiceStub, "GetWaitlistScore", waitlist_pb2.GetWaitlistScoreRequest, entry.id),
        (WaitlistServiceStub, "WithdrawWaitlistEntry", waitlist_pb2.WithdrawWaitlistEntryRequest, entry.id),
        (WaitlistServiceStub, "AcceptWaitlistOffer", waitlist_pb2.AcceptWaitlistOfferRequest, visit.id),
        (SchedulingRequestsServiceStub, "GetSchedulingRequest", requests_pb2.GetSchedulingRequestRequest, wanted.id),
        (SchedulingRequestsServiceStub, "RecordLetter", requests_pb2.RecordLetterRequest, wanted.id),
        (SeriesServiceStub, "GetSeries", series_pb2.GetSeriesRequest, series.series.id),
        (CalendarFeedsServiceStub, "RevokeCalendarFeed", feeds_pb2.RevokeCalendarFeedRequest, feed.calendar_feed.id),
        (CalendarFeedsServiceStub, "GetAppointmentCalendar", feeds_pb2.GetAppointmentCalendarRequest, visit.id),
        (VideoRoomsServiceStub, "GetVideoRoom", video_pb2.GetVideoRoomRequest, visit.id),
    ]
    for stranger in ("otto", "pia"):
        for stub, method, kind, there in by_id:
            if stranger == "pia" and method in ("WithdrawWaitlistEntry", "RecordLetter"):
                assert await refused(reach(stub, method, kind(id=there), stranger)) == "PERMISSION_MISSING"
                continue
            answers = [await _answer(reach(stub, method, kind(id=one), stranger)) for one in (there, new_id())]
            assert answers[0] == answers[1] and answers[0][0] is NotFound, (method, answers)
        lists = [
            await reach(
                WaitlistServiceStub, "ListWaitlistEntries",
                waitlist_pb2.ListWaitlistEntriesRequest(visit_type_ids=[desk.visit]), stranger,
            ),
            await reach(
                SchedulingRequestsServiceStub, "ListSchedulingRequests",
                requests_pb2.ListSchedulingRequestsRequest(clinic_ids=[desk.clinic]), stranger,
            ),
            await reach(SeriesServiceStub, "ListSeries", series_pb2.ListSeriesRequest(), stranger),
            await reach(
                DayBoardServiceStub, "ListDayBoard",
                board_pb2.ListDayBoardRequest(clinic_id=desk.clinic, date=soon(14).date().isoformat()), stranger,
            ),
        ]  # fmt: skip
        for one in lists:
            assert patient not in str(one) and visit.id not in str(one)
        wishes = requests_pb2.GetSchedulingPreferencesRequest(patient_id=patient)
        assert (
            await refused(reach(SchedulingPreferencesServiceStub, "GetSchedulingPreferences", wishes, stranger))
            == "NOT_FOUND"
        )
        others = feeds_pb2.CreateCalendarFeedRequest(patient_id=patient)
        assert await refused(reach(CalendarFeedsServiceStub, "CreateCalendarFeed", others, stranger)) == "NOT_FOUND"


async def test_a_patient_does_nothing_that_is_the_staffs(desk, reach):
    doctor = await desk.a_practitioner("Staffed")
    await desk.book(await desk.a_patient(), soon(16), doctor)
    over = desk.book(reach.patient, soon(16), doctor, "pia", overbooking=appointments_pb2.Overbooking(reason="urgent"))
    assert await refused(over) == "OVERBOOKING_NOT_ALLOWED"
    assert await refused(reach.clearing(doctor, "pia")) == "PERMISSION_MISSING"
    assert await refused(reach.session(subject="pia")) == "PERMISSION_MISSING"
    # Whoever a patient names works on nothing by that, and isn't looked for: there is no pool here.
    for owner in (reach.nell, new_id()):
        wanted = {"patient_id": reach.patient, "clinic_id": desk.clinic, "owner": {"type": "Staff", "id": owner}}
        asking = requests_pb2.CreateSchedulingRequestRequest(scheduling_request=wanted)
        asked = reach(SchedulingRequestsServiceStub, "CreateSchedulingRequest", asking, "pia")
        assert await refused(asked) == "NO_POOL"


async def _answer(calling):
    with pytest.raises(Problem) as caught:
        await calling
    return type(caught.value), caught.value.reason, str(caught.value)

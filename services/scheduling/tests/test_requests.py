"""The request queue over gRPC and by event: an owner and a clock for each, three calls, a letter, an end."""

import asyncio
from datetime import UTC, datetime, timedelta

import pytest
from care.events.v1.envelope_pb2 import Event
from care.referrals.v1 import events_pb2 as referrals_pb2
from care.scheduling.v1 import requests_pb2 as pb
from care.scheduling.v1.requests_pb2_grpc import SchedulingPreferencesServiceStub, SchedulingRequestsServiceStub

from chassis.bus import Message
from chassis.ids import new_id
from services.scheduling.reactions import OVERDUE
from services.scheduling.tests.desk import WORK, refused, soon

Status = pb.SchedulingRequest.Status
Outcome = pb.SchedulingRequest.Attempt.Outcome
MISSES = (Outcome.NO_ANSWER, Outcome.VOICEMAIL, Outcome.WRONG_NUMBER)


@pytest.fixture(scope="module")
async def queue(desk):
    desk.rita = await desk.harness.staff("rita", [*WORK, "requests.ask", "requests.read", "requests.work"],
                                         clinics=[desk.clinic])  # fmt: skip
    return Queue(desk)


class Queue:
    """Rita's calls, and referrals as the bus tells them."""

    def __init__(self, desk):
        self.desk = desk

    async def __call__(self, method, request, subject="rita"):
        stub = SchedulingPreferencesServiceStub if "Preferences" in method else SchedulingRequestsServiceStub
        return await self.desk.harness.call("scheduling", stub, method, request, subject)

    async def ask(self, patient="", subject="rita", **more):
        wanted = {"patient_id": patient or await self.desk.a_patient(), "clinic_id": self.desk.clinic, **more}
        request = pb.CreateSchedulingRequestRequest(scheduling_request=pb.SchedulingRequest(**wanted))
        return await self("CreateSchedulingRequest", request, subject)

    async def attempt(self, request, outcome=Outcome.NO_ANSWER, **more):
        return await self("RecordAttempt", pb.RecordAttemptRequest(id=request.id, outcome=outcome, **more))

    async def letter(self, request):
        return await self("RecordLetter", pb.RecordLetterRequest(id=request.id))

    async def close(self, request, code="unreachable"):
        return await self(
            "CloseSchedulingRequest", pb.CloseSchedulingRequestRequest(id=request.id, reason={"code": code})
        )

    async def read(self, request):
        return await self("GetSchedulingRequest", pb.GetSchedulingRequestRequest(id=request.id))

    async def list(self, **filters):
        return await self("ListSchedulingRequests", pb.ListSchedulingRequestsRequest(**filters))

    async def tell(self, what, referral, patient, version, status, **state):
        """An event of referrals."""
        payload = referrals_pb2.ReferralEvent(
            id=referral, clinic_id=self.desk.clinic, business_status=status, **{"priority": 2, **state}
        )
        payload.owner.type, payload.owner.id = "Pool", "01890000-0000-7000-8000-0000000000aa"
        told = Event(
            id=new_id(),
            type=f"referral.{what}",
            tenant_id=self.desk.harness.tenant_id,
            aggregate_id=referral,
            patient_id=patient,
            version=version,
            payload_type="care.referrals.v1.ReferralEvent",
            payload=payload.SerializeToString(),
        )
        told.time.GetCurrentTime()
        await self.desk.harness.bus.append("care.referrals", [Message(referral, told.SerializeToString())])
        await self.desk._until("SELECT 1 FROM referral_state WHERE id = :id AND version >= :version", True,
                               id=referral, version=version)  # fmt: skip

    async def of(self, patient):
        return list((await self.list(patient_ids=[patient])).scheduling_requests)


async def test_three_calls_then_a_letter_then_closed_with_an_owner_and_a_clock_at_each_step(queue, desk):
    """Reported elsewhere, the queue that rests: "no request without an owner, a due time and provable attempts"."""
    request = await queue.ask(priority=2)
    seen = [request]
    assert await refused(queue.letter(request)) == "ILLEGAL_TRANSITION"
    assert await refused(queue.close(request)) == "LETTER_NOT_SENT"
    for outcome in MISSES:
        seen.append(await queue.attempt(request, outcome, note="line busy"))
    assert [one.status for one in seen] == [Status.OPEN, Status.OPEN, Status.OPEN, Status.LETTER_DUE]
    assert await refused(queue.close(request)) == "LETTER_NOT_SENT"
    seen.append(await queue.letter(request))
    assert seen[-1].status == Status.LETTER_SENT and seen[-1].HasField("letter_time")
    assert [one.next_action for one in seen] == [
        "call the patient", "call again", "call again", "send the letter", "wait for the answer",
    ]  # fmt: skip
    for one in seen:
        assert one.owner.type == "Staff" and one.owner.id == desk.rita
        assert one.due_time.ToDatetime(tzinfo=UTC) > datetime.now(UTC) and one.due_basis
    assert [one.outcome for one in seen[-1].attempts] == list(MISSES)
    assert all(one.actor == f"staff:{desk.rita}" and one.HasField("time") for one in seen[-1].attempts)
    closed = await queue.close(request)
    assert closed.status == Status.CLOSED and not closed.HasField("due_time")
    assert await refused(queue.attempt(request)) == "ILLEGAL_TRANSITION"
    told = [kind for kind, _ in await desk.told(request, 7)]
    assert told == [f"scheduling_request.{what}" for what in (
        "opened", "attempted", "attempted", "attempted", "letter_due", "letter_sent", "closed")]  # fmt: skip


async def test_a_patient_who_calls_back_needs_no_letter(queue):
    request = await queue.ask()
    for outcome in MISSES:
        await queue.attempt(request, outcome)
    back = datetime.now(UTC).replace(microsecond=0) + timedelta(days=2)
    reached = await queue.attempt(request, Outcome.REACHED, call_back_time=back)
    assert reached.status == Status.OPEN and reached.due_time.ToDatetime(tzinfo=UTC) == back
    past = datetime.now(UTC) - timedelta(hours=1)
    assert await refused(queue.attempt(request, Outcome.REACHED, call_back_time=past)) == "CALL_BACK_PAST"


async def test_the_queue_is_read_by_what_is_next_and_a_page_goes_on_while_others_work(queue, desk):
    owner = await desk.harness.staff("queue owner", [], clinics=[desk.clinic])
    mine = {"type": "Staff", "id": owner}
    asked = [await queue.ask(priority=priority, owner=mine) for priority in (1, 4, 2, 3, 1)]
    first = await queue.list(owner_ids=[owner], open=True, page_size=2)
    await queue.close(asked[1], "declined")
    rest = await queue.list(owner_ids=[owner], open=True, page_size=3, page_token=first.next_page_token)
    read = [one.id for one in (*first.scheduling_requests, *rest.scheduling_requests)]
    assert read == [asked[n].id for n in (1, 3, 2, 0, 4)]
    late = asked[0].due_time.ToDatetime(tzinfo=UTC) - timedelta(hours=1)
    due = await queue.list(owner_ids=[owner], open=True, due_before=late)
    assert {one.id for one in due.scheduling_requests} == {asked[2].id, asked[3].id}
    assert await refused(queue.list(open=True, page_token=first.next_page_token)) == "PAGE_TOKEN_INVALID"


async def test_a_visit_that_names_the_request_answers_it_and_opens_it_again_when_it_falls_through(queue, desk):
    """Reschedule and cancel by patient, openemr#562: what a patient asks for waits for somebody who books it."""
    request = await queue.ask(visit_type_id=desk.visit)
    named = [{"type": "SchedulingRequest", "id": request.id}]
    visit = await desk.book(request.patient_id, soon(3), based_on=named)
    booked = await queue.read(request)
    assert booked.status == Status.BOOKED and booked.appointment_id == visit.id and not booked.HasField("due_time")
    await desk.do("Cancel", visit, reason={"code": "pat"})
    again = await queue.read(request)
    assert again.status == Status.OPEN and not again.appointment_id and again.HasField("due_time")
    other = await desk.book(request.patient_id, soon(4))
    linked = await queue(
        "BookSchedulingRequest", pb.BookSchedulingRequestRequest(id=request.id, appointment_id=other.id)
    )
    assert linked.appointment_id == other.id
    await desk.do("Cancel", other, reason={"code": "pat"})
    assert (await queue.read(request)).status == Status.OPEN
    stranger = await desk.book(await desk.a_patient(), soon(5))
    wrong = pb.BookSchedulingRequestRequest(id=request.id, appointment_id=stranger.id)
    assert await refused(queue("BookSchedulingRequest", wrong)) == "PATIENT_DIFFERS"
    gone = pb.BookSchedulingRequestRequest(id=request.id, appointment_id=other.id)
    assert await refused(queue("BookSchedulingRequest", gone)) == "APPOINTMENT_NOT_BOOKED"


async def test_an_accepted_referral_opens_one_request_and_a_replay_makes_no_second(queue, desk):
    patient, referral = await desk.a_patient(), new_id()
    for _ in range(2):
        await queue.tell("accepted", referral, patient, 3, "ACCEPTED")
    await queue.tell("accepted", referral, patient, 4, "ACCEPTED")
    (request,) = await queue.of(patient)
    assert request.origin == pb.SchedulingRequest.REFERRAL and request.owner.type == "Pool" and request.priority == 2
    again = pb.SchedulingRequest(
        patient_id=patient, clinic_id=desk.clinic, based_on={"type": "Referral", "id": referral}
    )
    by_hand = pb.CreateSchedulingRequestRequest(scheduling_request=again)
    assert await refused(queue("CreateSchedulingRequest", by_hand)) == "REQUEST_EXISTS"
    visit = await desk.book(patient, soon(3, 9), based_on=[{"type": "Referral", "id": referral}])
    assert (await queue.read(request)).appointment_id == visit.id
    await queue.tell("scheduled", referral, patient, 5, "SCHEDULED", appointment_id=visit.id)
    assert (await queue.read(request)).status == Status.BOOKED
    await desk.do("Cancel", visit, reason={"code": "prov"})
    await queue.tell("unattended", referral, patient, 6, "UNATTENDED")
    assert (await queue.read(request)).status == Status.OPEN
    await queue.tell("cancelled", referral, patient, 7, "CANCELLED")
    closed = await queue.read(request)
    assert closed.status == Status.CLOSED and closed.close_reason.code == "referral-cancelled"


async def test_a_referral_heard_out_of_order_opens_nothing_that_is_over(queue, desk):
    patient, referral = await desk.a_patient(), new_id()
    await queue.tell("cancelled", referral, patient, 5, "CANCELLED")
    await queue.tell("accepted", referral, patient, 3, "ACCEPTED")
    await asyncio.sleep(0.3)
    assert await queue.of(patient) == []


async def test_a_visit_booked_before_the_referral_is_heard_answers_its_request_at_once(queue, desk):
    patient, referral = await desk.a_patient(), new_id()
    visit = await desk.book(patient, soon(3, 11), based_on=[{"type": "Referral", "id": referral}])
    await queue.tell("accepted", referral, patient, 3, "ACCEPTED")
    (request,) = await queue.of(patient)
    assert request.status == Status.BOOKED and request.appointment_id == visit.id


async def test_what_is_past_due_is_told_once(queue, desk):
    request = await queue.ask()
    await desk.sql("UPDATE scheduling_request SET due_time = now() - interval '1 hour' WHERE id = :id", id=request.id)
    desk.harness.servers["scheduling"].runtime.loops[OVERDUE].wake()
    assert [kind for kind, _ in await desk.told(request, 2)][1:] == ["scheduling_request.overdue"]
    desk.harness.servers["scheduling"].runtime.loops[OVERDUE].wake()
    await asyncio.sleep(0.2)
    assert len(await desk.told(request, 2)) == 2


async def test_a_request_that_is_wrong_is_refused_with_its_reason_and_leaves_nothing(queue, desk):
    patient, nobody = await desk.a_patient(), new_id()
    for reason, wrong in {
        "CLINIC_UNKNOWN": {"clinic_id": nobody},
        "VISIT_TYPE_UNKNOWN": {"visit_type_id": nobody},
        "PRACTITIONER_UNKNOWN": {"preferred_practitioner_ids": [nobody]},
        "OWNER_UNKNOWN": {"owner": {"type": "Pool", "id": nobody}},
        "DATE_INVALID": {"earliest_date": "2026-02-30"},
        "PERIOD_INVALID": {"earliest_date": "2027-02-01", "latest_date": "2027-01-01"},
        "BASED_ON_UNKNOWN": {"based_on": {"type": "Appointment", "id": nobody}},
        "NOT_FOUND": {"patient_id": nobody},
    }.items():
        assert await refused(queue.ask(**{"patient": patient, **wrong})) == reason
    assert await queue.of(patient) == []
    far = await desk.harness.subject("01890000-0000-7000-8000-00000000dead")
    assert await refused(queue.ask(far)) == "NOT_FOUND"
    assert await refused(queue("GetSchedulingRequest", pb.GetSchedulingRequestRequest(id=nobody))) == "NOT_FOUND"


async def test_a_death_ends_what_was_asked_for(queue, desk):
    request = await queue.ask()
    await desk.hear("patient.deceased", request.patient_id, deceased=True)
    await desk.until_known_dead(request.patient_id)
    closed = await queue.read(request)
    assert closed.status == Status.CLOSED and closed.close_reason.code == "deceased"


async def test_wishes_are_put_whole_and_guarded_by_their_etag(queue, desk):
    patient = await desk.a_patient()
    empty = await queue("GetSchedulingPreferences", pb.GetSchedulingPreferencesRequest(patient_id=patient))
    assert not empty.etag and not empty.HasField("may_be_moved")
    wishes = pb.SchedulingPreferences(
        weekdays=[5, 1, 5], earliest="09:00", may_be_moved={"within_days": 14}, barriers=[{"code": "transport"}]
    )
    put = await queue("SetSchedulingPreferences",
                      pb.SetSchedulingPreferencesRequest(patient_id=patient, preferences=wishes))  # fmt: skip
    assert list(put.weekdays) == [1, 5] and put.may_be_moved.within_days == 14 and put.etag
    fewer = pb.SetSchedulingPreferencesRequest(
        patient_id=patient, preferences=pb.SchedulingPreferences(latest="12:00"), etag=put.etag
    )
    put = await queue("SetSchedulingPreferences", fewer)
    assert not put.weekdays and not put.HasField("may_be_moved") and put.latest == "12:00"
    assert await refused(queue("SetSchedulingPreferences", fewer)) == "ETAG_MISMATCH"
    unknown = pb.SchedulingPreferences(clinic_ids=[new_id()])
    bad = pb.SetSchedulingPreferencesRequest(patient_id=patient, preferences=unknown)
    assert await refused(queue("SetSchedulingPreferences", bad)) == "CLINIC_UNKNOWN"


async def test_a_patient_does_not_say_that_a_visit_cannot_wait(queue):
    """STAT stands before all others in the queue: that is for staff to say."""
    patient = await queue.desk.a_patient()
    await queue.desk.harness.staff("paul", ["requests.ask", "requests.read"], kind="PATIENT", principal_id=patient)
    assert await refused(queue.ask(patient, "paul", priority="STAT")) == "PRIORITY_REFUSED"
    assert (await queue.ask(patient, priority="STAT")).id


async def test_a_patient_needs_a_referral_of_their_own_where_one_is_asked_for_not_just_any_id(queue, desk):
    patient, stranger, doctor = await desk.a_patient(), await desk.a_patient(), await desk.a_practitioner("Referred")
    may = ["appointments.read", "appointments.book"]
    await desk.harness.staff("referred", may, kind="PATIENT", principal_id=patient)
    kind = await desk.a_visit_type("referred", eligibility={"referral_required": True})
    mine, theirs, start = new_id(), new_id(), soon(6)
    await queue.tell("accepted", theirs, stranger, 1, "ACCEPTED")

    def book(referral, subject):
        based_on = [{"type": "Referral", "id": referral}]
        return desk.book(patient, start, doctor, subject, visit_type_id=kind, based_on=based_on)

    for unfit in (mine, theirs):
        assert await refused(book(unfit, "referred")) == "NOT_ELIGIBLE"
    await queue.tell("accepted", mine, patient, 1, "ACCEPTED")
    assert (await book(mine, "referred")).id

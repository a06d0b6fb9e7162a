"""The referral loop over gRPC and by event: owners, due times, who sees what, and any order of what is heard."""

import itertools
from datetime import UTC, datetime, timedelta

import pytest
from care.referrals.v1 import referrals_pb2 as pb
from sqlalchemy import text

from chassis.ids import new_id
from services.referrals.tests.conftest import State, refused

DOCUMENT = {"system": "urn:dms", "value": "doc-1"}
REASON = {"code": "withdrawn"}


def names(events):
    return [event.type for event, _ in events]


def has_owner_and_clock(referral):
    assert referral.owner.type in ("Staff", "Pool") and referral.owner.id
    assert referral.HasField("due_time") and referral.due_basis and referral.next_action


async def test_the_whole_loop_has_an_owner_and_a_due_time_in_every_open_state_and_tells_each_step(desk):
    referral = await desk.draft()
    assert referral.business_status == State.DRAFT and referral.owner.id == desk.cora
    steps = [
        ("SubmitReferral", {}, State.SUBMITTED, desk.cardiology),
        ("AcceptReferral", {}, State.ACCEPTED, desk.cardiology),
        ("booked", {}, State.SCHEDULED, desk.cardiology),
        ("noshow", {}, State.UNATTENDED, desk.cardiology),
        ("booked again", {}, State.SCHEDULED, desk.cardiology),
        ("fulfilled", {}, State.SEEN, desk.cardiology),
        ("RecordReport", {"document": DOCUMENT}, State.REPORT_RECEIVED, desk.cora),
        ("AcknowledgeReport", {}, State.REPORT_ACKNOWLEDGED, desk.cora),
        ("RecordPatientInformed", {"channel": 3}, State.PATIENT_INFORMED, desk.cora),
    ]
    has_owner_and_clock(referral)
    first, second = new_id(), new_id()
    visits = {
        "booked": ("booked", 1, first, "BOOKED"),
        "noshow": ("noshow", 2, first, "NOSHOW"),
        "booked again": ("booked", 1, second, "BOOKED"),
        "fulfilled": ("fulfilled", 4, second, "FULFILLED"),
    }
    for method, fields, state, owner in steps:
        if method in visits:
            kind, version, visit_id, status = visits[method]
            await desk.tell(desk.visit(kind, referral, version=version, visit_id=visit_id, status=status))
            now = await desk.read(referral)
            assert now.appointment_id == visit_id
        else:
            now = await desk.do(method, referral, **fields)
        assert now.business_status == state, method
        assert now.status == pb.Referral.ACTIVE and now.owner.id == owner, method
        has_owner_and_clock(now)
    assert now.attempts == 1 and now.report.document.value == "doc-1"
    assert now.report.HasField("receive_time") and now.report.HasField("inform_time")
    closed = await desk.do("CloseReferral", referral, outcome={"code": "treated"})
    assert closed.business_status == State.CLOSED and closed.status == pb.Referral.COMPLETED
    assert not closed.HasField("due_time") and closed.next_action == "" and closed.outcome.code == "treated"
    events = await desk.told(referral)
    assert names(events) == [
        "referral.created",
        "referral.submitted",
        "referral.accepted",
        "referral.scheduled",
        "referral.unattended",
        "referral.scheduled",
        "referral.seen",
        "referral.report_received",
        "referral.report_acknowledged",
        "referral.patient_informed",
        "referral.closed",
    ]
    assert [event.version for event, _ in events] == list(range(1, 12))
    for (_, before), (_, after) in itertools.pairwise(events):
        assert after.previous_status == before.business_status
    assert events[1][1].owner.id == desk.cardiology and events[4][1].attempts == 1
    assert all(event.patient_id == referral.patient_id for event, _ in events)
    assert b"doc-1" not in b"".join(event.SerializeToString() for event, _ in events)
    assert [step.to_status for step in closed.history][:3] == ["DRAFT", "SUBMITTED", "ACCEPTED"]


async def test_another_clinics_referral_is_not_found_like_one_that_does_not_exist(desk):
    referral = await desk.draft()
    assert await refused(desk.read(referral, "elias")) == "NOT_FOUND"
    assert await refused(desk.do("SubmitReferral", referral, "elias")) == "NOT_FOUND"
    assert await refused(desk.read(pb.Referral(id=new_id()), "elias")) == "NOT_FOUND"
    listed = await desk.rpc("ListReferrals", pb.ListReferralsRequest(), "elias")
    assert not listed.referrals
    one = pb.ListReferralsRequest(patient_ids=[referral.patient_id])
    assert await refused(desk.rpc("ListReferrals", one, "elias")) == "NOT_FOUND"


async def test_a_referral_for_a_patient_out_of_sight_can_not_be_made(desk):
    patient = await desk.patient()
    assert await refused(desk.draft("elias", patient_id=patient, clinic_id=desk.other_clinic)) == "NOT_FOUND"


async def test_nobody_shows_a_patient_to_anothers_clinic_by_a_referral(desk):
    assert await refused(desk.draft(clinic_id=desk.other_clinic)) == "NOT_OWN_CLINIC"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"specialty": None}, "SPECIALTY_MISSING"),
        ({"clinic_id": ""}, "CLINIC_MISSING"),
        ({"clinic_id": "0198c0de-0000-7000-8000-000000000000"}, "CLINIC_UNKNOWN"),
        ({"owner": {"type": "Pool", "id": "0198c0de-0000-7000-8000-000000000000"}}, "OWNER_UNKNOWN"),
        ({"owner": {"type": "Staff", "id": "0198c0de-0000-7000-8000-000000000000"}}, "OWNER_UNKNOWN"),
    ],
)
async def test_what_a_referral_needs_is_asked_for_by_name(desk, fields, reason):
    assert await refused(desk.draft(**fields)) == reason


async def test_a_clinic_without_a_zone_can_not_refer_yet(desk):
    assert await refused(desk.draft(clinic_id=desk.zoneless)) == "CLINIC_WITHOUT_ZONE"


async def test_a_referral_takes_the_labels_of_its_clinic_and_is_seen_with_clearance_only(desk):
    await desk.harness.staff("nils", ["referrals.read"], clinics=[desk.labelled_clinic])
    referral = await desk.draft(clinic_id=desk.labelled_clinic, security_labels=["ETH"])
    assert list(referral.security_labels) == ["42CFRPart2", "ETH"]
    assert await refused(desk.read(referral, "nils")) == "NOT_FOUND"
    assert await refused(desk.read(referral)) == "NOT_FOUND"  # cleared for one of two labels
    (event, _), *_ = await desk.told(referral)
    assert list(event.security_labels) == ["42CFRPart2", "ETH"]


async def test_a_specialty_without_its_own_pool_goes_to_the_one_for_all_and_a_named_pool_is_taken(desk):
    referral = await desk.draft(specialty={"code": "dermatology"})
    assert (await desk.do("SubmitReferral", referral)).pool_id == desk.general
    named = await desk.draft()
    assert (await desk.do("SubmitReferral", named, pool_id=desk.general)).owner.id == desk.general
    nowhere = await desk.draft()
    assert await refused(desk.do("SubmitReferral", nowhere, pool_id=new_id())) == "NO_POOL"


async def test_a_step_out_of_turn_is_refused_and_changes_nothing(desk):
    referral = await desk.draft()
    for method, fields in (
        ("AcceptReferral", {}),
        ("DeclineReferral", {"reason": REASON}),
        ("RecordReport", {"document": DOCUMENT}),
        ("AcknowledgeReport", {}),
        ("RecordPatientInformed", {}),
        ("CloseReferral", {}),
        ("RecordAppointment", {"appointment_time": {"seconds": 1}}),
    ):
        assert await refused(desk.do(method, referral, **fields)) == "ILLEGAL_TRANSITION", method
    assert await desk.read(referral) == referral


async def test_a_declined_referral_is_revoked_and_back_with_whoever_referred(desk):
    referral = await desk.draft()
    await desk.do("SubmitReferral", referral)
    declined = await desk.do("DeclineReferral", referral, reason={"code": "out-of-scope"})
    assert declined.status == pb.Referral.REVOKED and declined.outcome.code == "out-of-scope"
    assert declined.owner.id == desk.cora and not declined.HasField("due_time")
    assert await refused(desk.do("AcceptReferral", referral)) == "ILLEGAL_TRANSITION"


async def test_a_cancelled_referral_no_longer_follows_its_visit(desk):
    referral = await desk.accepted()
    cancelled = await desk.do("CancelReferral", referral, reason=REASON)
    assert cancelled.status == pb.Referral.REVOKED
    await desk.tell(desk.visit("booked", referral, version=1, visit_id=new_id(), status="BOOKED"))
    assert (await desk.read(referral)).business_status == State.CANCELLED


async def test_a_draft_changes_freely_and_an_open_referral_only_its_owner(desk):
    referral = await desk.draft()

    def update(now, **fields):
        request = pb.UpdateReferralRequest(referral=pb.Referral(id=referral.id, **fields), etag=now.etag)
        return desk.rpc("UpdateReferral", request)

    urgent = await update(referral, priority=2, note="Murmur")
    assert (urgent.priority, urgent.note) == (2, "Murmur")
    assert urgent.due_time.seconds < referral.due_time.seconds and "urgent" in urgent.due_basis
    assert await refused(update(referral, note="Lost")) == "ETAG_MISMATCH"
    assert await refused(update(urgent, patient_id=new_id())) == "FIELD_FIXED"
    submitted = await desk.do("SubmitReferral", referral)
    assert await refused(update(submitted, note="Later")) == "ILLEGAL_TRANSITION"
    taken = await update(submitted, owner={"type": "Staff", "id": desk.cora})
    assert taken.owner.id == desk.cora and taken.due_time == submitted.due_time
    assert (await desk.do("AcceptReferral", referral)).owner.id == desk.cora
    assert "referral.assigned" in names(await desk.told(referral))


async def test_an_owner_can_not_be_taken_away(desk):
    referral = await desk.draft()
    request = pb.UpdateReferralRequest(
        referral=pb.Referral(id=referral.id), update_mask={"paths": ["owner"]}, etag=referral.etag
    )
    assert await refused(desk.rpc("UpdateReferral", request)) == "OWNER_MISSING"


async def test_one_identifier_names_one_referral(desk):
    key = [{"system": "urn:placer", "value": "R-1"}]
    await desk.draft(identifiers=key)
    assert await refused(desk.draft(identifiers=key)) == "IDENTIFIER_TAKEN"


async def test_the_list_is_due_first_and_filters_by_owner_state_and_due_time(desk):
    patient = await desk.patient()
    routine = await desk.draft(patient_id=patient)
    stat = await desk.draft(patient_id=patient, priority=4)
    gone = await desk.draft(patient_id=patient)
    await desk.do("CancelReferral", gone, reason=REASON)

    async def listed(**fields):
        request = pb.ListReferralsRequest(patient_ids=[patient], **fields)
        return [one.id for one in (await desk.rpc("ListReferrals", request)).referrals]

    assert await listed() == [stat.id, routine.id, gone.id]
    assert await listed(open=True) == [stat.id, routine.id]
    assert await listed(business_statuses=[State.CANCELLED]) == [gone.id]
    assert await listed(business_statuses=[0, 99]) == []
    assert await listed(owner_ids=[desk.general]) == []
    assert await listed(due_before=routine.due_time) == [stat.id]
    page = await desk.rpc("ListReferrals", pb.ListReferralsRequest(patient_ids=[patient], page_size=2))
    rest = await desk.rpc(
        "ListReferrals",
        pb.ListReferralsRequest(patient_ids=[patient], page_size=2, page_token=page.next_page_token),
    )
    assert [one.id for one in [*page.referrals, *rest.referrals]] == [stat.id, routine.id, gone.id]


async def test_a_visit_outside_is_recorded_moved_and_then_seen(desk):
    referral = await desk.accepted()
    later = datetime.now(UTC) + timedelta(days=5)

    def record(at, seen=False):
        return desk.do("RecordAppointment", referral, appointment_time=at, seen=seen, source=4)

    planned = await record(later)
    assert planned.business_status == State.SCHEDULED and planned.appointment_id == ""
    assert planned.history[-1].source == 4
    assert await refused(record(later, seen=True)) == "NOT_YET"
    moved = await record(later + timedelta(days=1))
    assert moved.business_status == State.SCHEDULED and moved.due_time.seconds > planned.due_time.seconds
    seen = await record(datetime.now(UTC) - timedelta(hours=1), seen=True)
    assert seen.business_status == State.SEEN and "report" in seen.next_action
    assert await refused(record(later)) == "ILLEGAL_TRANSITION"


async def test_a_moved_visit_moves_the_time_and_the_due_time_and_a_confirmed_one_nothing(desk):
    referral = await desk.accepted()
    visit_id, start = new_id(), datetime(2031, 5, 5, 15, tzinfo=UTC)
    soon = datetime.now(UTC) + timedelta(days=2)
    await desk.tell(desk.visit("booked", referral, version=1, visit_id=visit_id, status="BOOKED", start=soon))
    booked = await desk.read(referral)
    assert booked.due_basis == "see the patient on the day of the visit"
    await desk.tell(desk.visit("confirmed", referral, version=2, visit_id=visit_id, status="BOOKED", start=soon))
    assert await desk.read(referral) == booked
    await desk.tell(desk.visit("rescheduled", referral, version=3, visit_id=visit_id, status="BOOKED", start=start))
    moved = await desk.read(referral)
    assert moved.appointment_time.ToDatetime(tzinfo=UTC) == start
    assert moved.due_basis.startswith("see the patient within 28 days") and moved.attempts == 0
    assert moved.due_time.seconds > booked.due_time.seconds


async def test_the_report_is_due_seven_days_after_the_end_of_the_visit(desk):
    referral = await desk.accepted()
    start = datetime.now(UTC).replace(microsecond=0) - timedelta(days=1)
    await desk.tell(desk.visit("fulfilled", referral, version=5, visit_id=new_id(), status="FULFILLED", start=start))
    seen = await desk.read(referral)
    due = seen.due_time.ToDatetime(tzinfo=UTC) - start - timedelta(minutes=30)
    assert abs(due - timedelta(days=7)) <= timedelta(hours=1)  # an hour where the clocks change


async def test_a_visit_booked_before_anybody_accepted_counts_as_soon_as_somebody_does(desk):
    referral = await desk.draft()
    await desk.do("SubmitReferral", referral)
    await desk.tell(desk.visit("booked", referral, version=1, visit_id=new_id(), status="BOOKED"))
    assert (await desk.read(referral)).business_status == State.SUBMITTED
    assert (await desk.do("AcceptReferral", referral)).business_status == State.SCHEDULED
    events = await desk.told(referral)
    assert names(events)[-2:] == ["referral.accepted", "referral.scheduled"]
    assert [payload.business_status for _, payload in events][-2:] == ["ACCEPTED", "SCHEDULED"]
    assert len({event.version for event, _ in events}) == len(events)


async def test_a_no_show_that_is_reverted_is_scheduled_again_and_was_no_attempt(desk):
    referral = await desk.accepted()
    visit_id = new_id()
    await desk.tell(desk.visit("booked", referral, version=1, visit_id=visit_id, status="BOOKED"))
    await desk.tell(desk.visit("noshow", referral, version=2, visit_id=visit_id, status="NOSHOW"))
    missed = await desk.read(referral)
    assert (missed.business_status, missed.attempts) == (State.UNATTENDED, 1)
    reverted = desk.visit("reverted", referral, version=3, visit_id=visit_id, status="BOOKED", previous_status="NOSHOW")
    await desk.tell(reverted)
    again = await desk.read(referral)
    assert (again.business_status, again.attempts) == (State.SCHEDULED, 0)


async def test_cancelling_the_former_visit_after_another_was_booked_changes_nothing(desk):
    referral = await desk.accepted()
    former, present = new_id(), new_id()
    await desk.tell(desk.visit("booked", referral, version=1, visit_id=former, status="BOOKED"))
    await desk.tell(desk.visit("booked", referral, version=1, visit_id=present, status="BOOKED"))
    await desk.tell(desk.visit("cancelled", referral, version=2, visit_id=former, status="CANCELLED"))
    now = await desk.read(referral)
    assert (now.business_status, now.appointment_id, now.attempts) == (State.SCHEDULED, present, 1)


async def test_a_hold_that_was_released_was_no_visit(desk):
    referral = await desk.accepted()
    await desk.tell(
        desk.visit("released", referral, version=2, visit_id=new_id(), status="CANCELLED", previous_status="PENDING")
    )
    now = await desk.read(referral)
    assert (now.business_status, now.attempts) == (State.ACCEPTED, 0)


async def test_a_visit_made_by_mistake_leaves_the_referral_as_accepted(desk):
    referral = await desk.accepted()
    visit_id = new_id()
    await desk.tell(desk.visit("booked", referral, version=1, visit_id=visit_id, status="BOOKED"))
    await desk.tell(desk.visit("entered_in_error", referral, version=2, visit_id=visit_id, status="ENTERED_IN_ERROR"))
    now = await desk.read(referral)
    assert (now.business_status, now.appointment_id) == (State.ACCEPTED, "")
    assert names(await desk.told(referral))[-1] == "referral.unscheduled"


async def test_in_whatever_order_a_visits_events_are_heard_the_end_is_the_same(desk):
    ends = set()
    for order in itertools.permutations(range(4)):
        referral = await desk.accepted()
        visit_id, start = new_id(), datetime(2031, 5, 5, 15, tzinfo=UTC)
        steps = [("booked", "BOOKED"), ("noshow", "NOSHOW"), ("reverted", "BOOKED"), ("fulfilled", "FULFILLED")]
        events = [
            desk.visit(kind, referral, version=number + 1, visit_id=visit_id, status=status, start=start)
            for number, (kind, status) in enumerate(steps)
        ]
        await desk.tell(*[events[number] for number in order])
        now = await desk.read(referral)
        ends.add((now.business_status, now.attempts, now.appointment_time.seconds, now.due_time.seconds))
    assert len(ends) == 1 and ends.pop()[:2] == (State.SEEN, 0)


async def test_an_event_heard_twice_has_one_effect(desk):
    referral = await desk.accepted()
    visit_id = new_id()
    booked = desk.visit("booked", referral, version=1, visit_id=visit_id, status="BOOKED")
    missed = desk.visit("noshow", referral, version=2, visit_id=visit_id, status="NOSHOW")
    await desk.tell(booked, missed)
    before = await desk.read(referral)
    replayed = [desk.visit("booked", referral, version=1, visit_id=visit_id, status="BOOKED")]  # another envelope
    await desk.tell(booked, missed, booked, *replayed)
    assert await desk.read(referral) == before
    assert names(await desk.told(referral)).count("referral.unattended") == 1


async def test_another_patients_visit_moves_nobodys_referral(desk):
    referral = await desk.accepted()
    stranger = pb.Referral(id=referral.id, patient_id=await desk.patient())
    await desk.tell(desk.visit("booked", stranger, version=1, visit_id=new_id(), status="BOOKED"))
    assert (await desk.read(referral)).business_status == State.ACCEPTED


async def test_what_is_past_due_is_told_once_a_state(desk):
    referral = await desk.accepted()
    server = desk.harness.servers["referrals"]

    async def make_due():
        async with server.database.engine.begin() as connection:
            await connection.execute(
                text("UPDATE referral SET due_time = clock_timestamp() - interval '1 minute' WHERE id = :id"),
                {"id": referral.id},
            )
        loop = server.runtime.loops["overdue referrals"]
        loop.wake()

    async def overdue(count):
        return names(await desk.told(referral)).count("referral.overdue") == count

    await make_due()
    await desk.until(overdue, 1)
    await make_due()
    await desk.tell(desk.visit("booked", referral, version=1, visit_id=new_id(), status="BOOKED"))
    assert await overdue(1)
    await make_due()
    await desk.until(overdue, 2)
    event, payload = (await desk.told(referral))[-1]
    assert payload.business_status == "SCHEDULED" and payload.owner.id == desk.cardiology
    assert event.actor == "system:referrals"


async def test_a_call_with_the_same_key_is_done_once(desk):
    referral = await desk.draft()
    request = pb.SubmitReferralRequest(id=referral.id, request_id="key-1")
    first = await desk.rpc("SubmitReferral", request)
    assert await desk.rpc("SubmitReferral", request) == first
    assert names(await desk.told(referral)).count("referral.submitted") == 1

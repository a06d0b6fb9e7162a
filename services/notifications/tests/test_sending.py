"""What leaves, what waits, and what never leaves: against real providers and real neighbours."""

import asyncio
import random
import time
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from sqlalchemy import text

from services.notifications.tests.conftest import Status, basic, zone_at


async def test_the_confirmation_leaves_at_once_in_the_clinics_zone_with_its_abbreviation(world, visit_type):
    clinic = await world.clinic(zone="America/Phoenix")
    patient_id, number, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    message = await world.message(visit.id, "COMPLETED")
    local = visit.start_time.ToDatetime(UTC).astimezone(ZoneInfo("America/Phoenix"))
    (said,) = world.sms.texts(number)
    assert said.startswith("Maple Street Clinic: Hi Ada, your visit is booked for ")
    assert f"{local:%a, %b} {local.day}, {local.year} at {local.hour % 12 or 12}:{local:%M} {local:%p} MST" in said
    assert "Dermatology" not in said
    form = world.sms.calls[-1][1]
    assert "StatusCallback" not in form  # nothing would answer it
    assert form["From"] == "+18005550199" and world.sms.authorization == basic("ACtest", "secret")
    assert message.attempts[0].provider_message_id.startswith("SM")
    assert message.consent_id and message.local_time[-6:] == datetime.now(ZoneInfo(zone_at(13))).isoformat()[-6:]
    assert world.metric("care_messages_total", channel="sms", outcome="sent") >= 1
    late = world.metric(
        "care_reminder_lateness_seconds_bucket", purpose="appointment-reminder", channel="sms", le="2.0"
    )
    assert late >= 1


async def test_a_reminder_says_how_to_change_the_visit(world, clinic, visit_type):
    patient_id, number, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.message(visit.id, "COMPLETED")
    await world.make_due(visit, "1d")
    await world.message(visit.id, "COMPLETED", kind="appointment-reminder")
    # It offers no answer by text: nobody reads them yet.
    text = world.sms.texts(number)[1]
    assert "To change it, call +1" in text and "Reply" not in text


async def test_who_agreed_to_email_only_gets_email_with_everything_in_it(world, clinic, visit_type):
    patient_id, number, address = await world.patient(sms=False)
    visit = await world.visit(patient_id, clinic, visit_type)
    message = await world.message(visit.id, "COMPLETED")
    assert message.channel == "EMAIL" and not world.sms.texts(number)
    (letter,) = world.mail.to(address)
    assert letter["Message-ID"] == f"<{message.id}@clinic.test>" and "unsubscribe" in letter["List-Unsubscribe"]
    body = letter.get_content()
    assert "Dermatology follow-up" in body and "12 Maple Street" in body and "Eat nothing." in body
    assert letter.get_content_type() == "text/plain" and "Dermatology" not in letter["Subject"]


async def test_consent_that_was_revoked_after_planning_is_obeyed(world, clinic, visit_type):
    patient_id, number, _ = await world.patient(mail=False)
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.message(visit.id, "COMPLETED")
    world.neighbours.people[patient_id]["SMS"] = {"refusal": "no-consent"}
    await world.make_due(visit, "1d")
    message = await world.message(visit.id, "NOT_DONE", kind="appointment-reminder")
    assert message.status_reason == "no-consent" and len(world.sms.texts(number)) == 1
    assert not message.attempts
    assert [event.type for event in await world.told(message.id)] == ["message.suppressed"]


async def test_quiet_hours_in_the_recipients_zone_hold_a_reminder_until_they_end(world, clinic, visit_type):
    zone = zone_at(3)
    patient_id, number, _ = await world.patient(zone=zone)
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.message(visit.id, "COMPLETED")  # their own booking is answered at any hour
    await world.make_due(visit, "3d")
    message = await world.message(visit.id, "ON_HOLD", kind="appointment-reminder")
    assert message.status_reason == "quiet-hours" and message.next_time == message.due_time
    assert message.due_time.astimezone(ZoneInfo(zone)).time().isoformat() == "09:00:00"
    assert timedelta(0) < message.due_time - datetime.now(UTC) < timedelta(hours=7)
    assert len(world.sms.texts(number)) == 1


async def test_a_visit_moved_in_scheduling_stops_the_reminder_before_the_event_comes(world, clinic, visit_type):
    patient_id, number, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.message(visit.id, "COMPLETED")
    visit.schedule_version = 2
    await world.make_due(visit, "1d")
    message = await world.message(visit.id, "NOT_DONE", kind="appointment-reminder")
    assert message.status_reason == "moved" and len(world.sms.texts(number)) == 1


@pytest.mark.parametrize(("status", "reason"), [("CANCELLED", "cancelled"), ("NOSHOW", "noshow"), (None, "not-found")])
async def test_a_visit_that_is_gone_is_not_reminded_of(world, clinic, visit_type, status, reason):
    patient_id, number, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.message(visit.id, "COMPLETED")
    if status is None:
        del world.neighbours.visits[visit.id]
    else:
        visit.status = Status.Value(status)
    await world.make_due(visit, "1d")
    message = await world.message(visit.id, "NOT_DONE", kind="appointment-reminder")
    assert message.status_reason == reason and len(world.sms.texts(number)) == 1


async def test_somebody_deceased_is_not_written_to(world, clinic, visit_type):
    patient_id, number, _ = await world.patient()
    world.neighbours.people[patient_id] = {"refusal": "deceased"}
    visit = await world.visit(patient_id, clinic, visit_type)
    assert (await world.message(visit.id, "NOT_DONE")).status_reason == "deceased"
    assert not world.sms.texts(number)


async def test_a_spanish_speaker_is_written_to_in_spanish(world, clinic, visit_type):
    patient_id, number, _ = await world.patient(languages=("es-MX",))
    visit = await world.visit(patient_id, clinic, visit_type)
    message = await world.message(visit.id, "COMPLETED")
    assert (message.language, message.wished_language) == ("es", "")
    assert message.template == "appointment-booked/sms/es/1"
    assert "su cita es el " in world.sms.texts(number)[0]


async def test_a_language_without_a_text_falls_back_and_is_noted(world, clinic, visit_type):
    patient_id, number, _ = await world.patient(languages=("zh-Hant", "vi"))
    visit = await world.visit(patient_id, clinic, visit_type)
    message = await world.message(visit.id, "COMPLETED")
    assert (message.language, message.wished_language) == ("en", "zh-Hant")
    assert "your visit is booked" in world.sms.texts(number)[0]


async def test_a_labelled_visit_goes_by_discreet_names_only(world):
    clinic = await world.clinic(version=1)
    clinic.name, clinic.discreet_name = "Maple Addiction Center", "Maple Center"
    clinic.security_labels.append("ETH")
    await world.tell("clinic.changed", clinic, aggregate_id=clinic.id, version=2)
    kind = await world.visit_type(name="Methadone intake", security_labels=["ETH"], preparation={"en": "Secret."})
    texted, number, _ = await world.patient()
    mailed, _, address = await world.patient(sms=False)
    for patient_id in (texted, mailed):
        visit = await world.visit(patient_id, clinic, kind, labels=["ETH"])
        message = await world.message(visit.id, "COMPLETED")
        assert message.security_labels == ["ETH"]
    said = world.sms.texts(number)[0] + str(world.mail.to(address)[0])
    assert "Maple Center" in said
    assert "Addiction" not in said and "Methadone" not in said and "Secret" not in said


@pytest.mark.parametrize("service", ["patients", "scheduling"])
async def test_a_service_that_is_away_means_that_the_message_waits(world, clinic, visit_type, service):
    world.neighbours.away.add(service)
    patient_id, number, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    waiting = await world.message(visit.id, "ON_HOLD")
    assert waiting.status_reason == "service-away"
    await asyncio.sleep(0.8)
    assert not world.sms.texts(number)
    world.neighbours.away.clear()
    sent = await world.message(visit.id, "COMPLETED")
    assert sent.due_time == waiting.due_time and len(world.sms.texts(number)) == 1


async def test_what_waited_until_the_visit_began_never_leaves(world, clinic, visit_type):
    world.neighbours.away.add("patients")
    patient_id, number, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type, ahead=timedelta(seconds=1.5))
    await world.message(visit.id, "ON_HOLD")
    await asyncio.sleep(1.5)
    world.neighbours.away.clear()
    assert (await world.message(visit.id, "NOT_DONE")).status_reason == "too-late"
    assert not world.sms.texts(number)


async def test_without_its_clinic_nothing_leaves_until_it_is_known(world, visit_type):
    clinic = await world.clinic()
    unknown = type(clinic).FromString(clinic.SerializeToString())
    unknown.id = "0198f000-0000-7000-8000-00000000c11c"
    patient_id, number, _ = await world.patient()
    visit = await world.visit(patient_id, unknown, visit_type)
    assert (await world.message(visit.id, "ON_HOLD")).status_reason == "clinic-unknown"
    await world.tell("clinic.changed", unknown, aggregate_id=unknown.id)
    await world.message(visit.id, "COMPLETED")
    assert len(world.sms.texts(number)) == 1


async def test_a_provider_that_is_busy_is_tried_again(world, clinic, visit_type):
    world.sms.faults.extend([429, 503])
    patient_id, number, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    message = await world.message(visit.id, "COMPLETED")
    assert [one.outcome for one in message.attempts] == ["failed", "failed", "accepted"]
    assert len(world.sms.texts(number)) == 3
    assert sum(form["To"] == number for form in world.sms.taken) == 1


async def test_a_number_that_the_provider_refuses_leads_to_the_next_channel(world, clinic, visit_type):
    world.sms.faults.append(400)
    patient_id, number, address = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    message = await world.message(visit.id, "COMPLETED")
    assert [(one.channel, one.outcome, one.error_code) for one in message.attempts] == [
        ("SMS", "refused", "21211"),
        ("EMAIL", "accepted", ""),
    ]
    assert len(world.sms.texts(number)) == len(world.mail.to(address)) == 1


async def test_what_every_channel_refuses_has_failed(world, clinic, visit_type):
    patient_id, _, _ = await world.patient(sms=False, address="nobody@mail.test")
    visit = await world.visit(patient_id, clinic, visit_type)
    message = await world.message(visit.id, "NOT_DONE", "STOPPED")
    # SMS was no choice, so e-mail was the only one tried.
    assert (message.status.name, message.attempts[0].error_code) == ("STOPPED", "smtp-550")
    (event,) = await world.told(message.id)
    assert event.type == "message.failed"


async def test_a_mail_server_that_is_busy_is_tried_again(world, clinic, visit_type):
    world.mail.faults.append("451 4.7.1 later")
    patient_id, _, address = await world.patient(sms=False)
    visit = await world.visit(patient_id, clinic, visit_type)
    message = await world.message(visit.id, "COMPLETED")
    assert [one.error_code for one in message.attempts] == ["smtp-451", ""]
    assert len(world.mail.to(address)) == 1


async def test_the_link_of_a_survey_leaves_and_is_kept_nowhere(world, clinic):
    token = "T0KEN-of-the-only-link"
    patient_id, number, _ = await world.patient()
    survey = await world.invite(patient_id, clinic, token)
    message = await world.message(survey.id, "COMPLETED")
    assert f"http://care.test/p/{token}" in world.sms.texts(number)[0]
    assert "http://care.test/p/[link]" in message.text
    assert ("SMS", "survey") in {
        (channel, purpose) for who, channel, purpose in world.neighbours.asked if who == patient_id
    }
    async with world.server.database.engine.connect() as connection:
        for table in ("message", "attempt", "outbox", "audit"):
            rows = (await connection.execute(text(f"SELECT {table}::text FROM {table}"))).scalars()
            assert not any(token in row for row in rows)
    assert token not in world.harness.log_of("notifications")


async def test_an_offered_slot_is_told_with_time_place_and_a_link_that_is_kept_nowhere(world, clinic):
    patient_id, number, _ = await world.patient(languages=("es",))
    offered = await world.offer(patient_id, clinic)
    message = await world.message(offered.offer_id, "COMPLETED")
    (told,) = world.sms.texts(number)
    assert "Maple Street Clinic" in told and "16 de mar de 2027" in told and "Responda antes de" in told
    assert "http://care.test/p/w-SECRETTOKEN" in told and "w-SECRETTOKEN" not in message.text
    assert (message.kind, message.language) == ("waitlist-offer", "es")


async def test_an_offer_that_has_ended_or_is_told_by_voice_is_not_sent(world, clinic):
    patient_id, number, address = await world.patient()
    late = await world.offer(patient_id, clinic, ends_in=timedelta(seconds=-1))
    assert (await world.message(late.offer_id, "NOT_DONE")).status_reason == "too-late"
    answered = await world.offer(patient_id, clinic, token="")
    assert (await world.message(answered.offer_id, "NOT_DONE")).status_reason == "closed"
    await world.offer(patient_id, clinic, channel="VOICE")
    mailed = await world.offer(patient_id, clinic, channel="EMAIL")
    assert (await world.message(mailed.offer_id, "COMPLETED")).channel == "EMAIL"
    assert not world.sms.texts(number) and len(world.mail.to(address)) == 1


async def test_an_invitation_that_is_closed_is_not_sent(world, clinic):
    patient_id, number, _ = await world.patient()
    survey = await world.invite(patient_id, clinic, "")
    assert (await world.message(survey.id, "NOT_DONE")).status_reason == "closed"
    assert not world.sms.texts(number)


async def test_after_an_outage_only_the_last_missed_reminder_of_a_visit_leaves(world, clinic, visit_type):
    patient_id, number, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.message(visit.id, "COMPLETED")
    async with world.server.database.engine.begin() as connection:
        await connection.execute(
            text(
                "UPDATE reminder SET due_time = clock_timestamp() - CASE \"offset\" WHEN '3d' THEN 2 ELSE 1 END"
                " * interval '1 hour' WHERE appointment_id = :id AND status = 'ACTIVE'"
            ),
            {"id": visit.id},
        )
    world.server.runtime.loops["send"].wake()
    message = await world.message(visit.id, "COMPLETED", kind="appointment-reminder")
    assert message.offset == "1d" and len(world.sms.texts(number)) == 2
    rows = await world.reminders(visit)
    assert {(row.offset, row.status.name, row.status_reason) for row in rows} == {
        ("booked", "COMPLETED", ""),
        ("3d", "REVOKED", "missed"),
        ("1d", "COMPLETED", ""),
    }


async def test_no_name_number_or_address_is_logged(world, clinic, visit_type):
    world.sms.faults.extend([400, 500])
    patient_id, number, address = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    await world.message(visit.id, "COMPLETED")
    log = world.harness.log_of("notifications")
    assert number not in log and address not in log and "Ada" not in log


async def test_a_provider_that_took_it_and_never_answered_leaves_it_unknown_for_good(a_world):
    world = await a_world(provider_timeout=0.4)
    clinic, kind = await world.clinic(), await world.visit_type()
    patient_id, number, address = await world.patient()
    world.sms.faults.append(("slow", 1.0))
    visit = await world.visit(patient_id, clinic, kind)
    message = await world.message(visit.id, "UNKNOWN")
    assert message.attempts[0].outcome == "unknown"
    await asyncio.sleep(1.2)
    assert len(world.sms.texts(number)) == 1 and not world.mail.to(address)
    assert [event.type for event in await world.told(message.id)] == ["message.unknown"]


async def test_an_answer_that_comes_after_the_lease_still_resolves_what_was_unknown(a_world):
    world = await a_world(send_lease=0.6)
    clinic, kind = await world.clinic(), await world.visit_type()
    patient_id, number, _ = await world.patient()
    world.sms.faults.append(("slow", 1.6))
    visit = await world.visit(patient_id, clinic, kind)
    message = await world.message(visit.id, "UNKNOWN")
    await world.message(visit.id, "COMPLETED")
    assert len(world.sms.texts(number)) == 1
    assert [event.type for event in await world.told(message.id, 2)] == ["message.unknown", "message.sent"]
    assert world.metric("care_messages_fenced_total") == 1


async def test_a_check_that_is_too_old_is_made_again_before_anything_leaves(a_world):
    world = await a_world(check_age=0.25)
    clinic, kind = await world.clinic(), await world.visit_type()
    patient_id, number, _ = await world.patient()
    world.neighbours.delay = 0.35
    visit = await world.visit(patient_id, clinic, kind)
    await asyncio.sleep(1.5)
    assert not world.sms.texts(number)
    world.neighbours.delay = 0.0
    message = await world.message(visit.id, "COMPLETED")
    assert len(world.sms.texts(number)) == 1 and message.attempts[-1].outcome == "accepted"
    assert {one.error_code for one in message.attempts[:-1]} <= {"check-too-old"}


async def test_two_replicas_on_one_database_never_send_anything_twice(a_world):
    world = await a_world()
    second = world.harness.build(world.server.service, world.server.settings.database_url, **world.settings)
    await world.harness.hear_patients(second)
    await second.start()
    try:
        clinic, kind = await world.clinic(), await world.visit_type()
        people = [await world.patient() for _ in range(25)]
        visits = [await world.visit(patient_id, clinic, kind) for patient_id, _, _ in people]
        for visit in visits:
            await world.message(visit.id, "COMPLETED")
        async with world.server.database.engine.begin() as connection:
            await connection.execute(text("UPDATE reminder SET due_time = clock_timestamp() WHERE \"offset\" = '1d'"))
        for visit in visits:
            await world.message(visit.id, "COMPLETED", kind="appointment-reminder")
        assert all(len(world.sms.texts(number)) == 2 for _, number, _ in people)
        both = [
            server.telemetry.registry.get_sample_value("care_messages_total", {"channel": "sms", "outcome": "sent"})
            or 0
            for server in (world.server, second)
        ]
        assert sum(both) == 50
    finally:
        await second.stop()


async def test_no_call_begins_more_than_a_second_after_a_cancel_or_move_was_committed(a_world):
    # One connection to a slow provider: most of a batch would begin far too late after its check.
    world = await a_world(send_batch=5, provider_connections=1)
    clinic, kind = await world.clinic(), await world.visit_type()
    chance = random.Random(7)
    people = [await world.patient() for _ in range(24)]
    visits = [await world.visit(patient_id, clinic, kind) for patient_id, _, _ in people]
    for visit in visits:
        await world.message(visit.id, "COMPLETED")
    world.neighbours.delay = 0.3
    world.sms.faults.extend([("slow", 0.25)] * 1000)
    committed = {}

    async def race(visit, number):
        await asyncio.sleep(chance.random() * 2)
        await world.make_due(visit, "1d")
        await asyncio.sleep(chance.random() * 3)
        if chance.random() < 0.5:
            visit.schedule_version = 2
            committed[number] = time.monotonic()
            await world.tell_visit("rescheduled", visit, version=2)
        else:
            visit.status = Status.Value("CANCELLED")
            committed[number] = time.monotonic()
            await world.tell_visit("cancelled", visit, version=2, previous="BOOKED", reason="pat")

    await asyncio.gather(*(race(visit, number) for visit, (_, number, _) in zip(visits, people, strict=True)))
    for visit in visits:
        await world.message(
            visit.id, "COMPLETED", "NOT_DONE",
            kind="appointment-cancelled" if visit.status == Status.Value("CANCELLED") else "appointment-moved",
        )  # fmt: skip
    begun_after = []
    for at, form in world.sms.calls:
        if "a reminder of your visit" in form["Body"] and at > committed[form["To"]]:
            begun_after.append(at - committed[form["To"]])
            corrections = [one for one in world.sms.texts(form["To"]) if "cancelled" in one or "has moved" in one]
            assert corrections and world.sms.texts(form["To"])[-1] == corrections[-1]
    assert max(begun_after, default=0.0) <= 1.0


async def test_what_left_in_the_second_after_a_cancel_is_counted_and_corrected(world, clinic, visit_type):
    patient_id, number, _ = await world.patient()
    visit = await world.visit(patient_id, clinic, visit_type)
    message = await world.message(visit.id, "COMPLETED")
    before = world.metric("care_messages_overtaken_total", channel="sms")
    visit.status = Status.Value("CANCELLED")
    committed = message.attempts[0].start_time - timedelta(milliseconds=400)
    await world.tell_visit("cancelled", visit, version=2, previous="BOOKED", at=committed, reason="pat")
    await world.message(visit.id, "COMPLETED", kind="appointment-cancelled")
    assert world.metric("care_messages_overtaken_total", channel="sms") == before + 1
    assert "is cancelled" in world.sms.texts(number)[-1]


async def test_the_send_belongs_to_the_trace_of_what_it_answers(world, clinic, visit_type):
    trace_id, seen = "4bf92f3577b34da6a3ce929d0e0e4736", []
    tracer = world.server.telemetry.tracer
    start = tracer.start_as_current_span

    def watched(name, **options):
        seen.append((name, options))
        return start(name, **options)

    tracer.start_as_current_span = watched
    world.traceparent = f"00-{trace_id}-00f067aa0ba902b7-01"
    try:
        patient_id, _, _ = await world.patient()
        visit = await world.visit(patient_id, clinic, visit_type)
        message = await world.message(visit.id, "COMPLETED")
        await world.make_due(visit, "1d")
        await world.message(visit.id, "COMPLETED", kind="appointment-reminder")
    finally:
        tracer.start_as_current_span = start
        del world.traceparent
    assert trace_id in message.traceparent
    at_once, *_, later = (options for name, options in seen if name == "send sms")
    from opentelemetry.trace import SpanKind, get_current_span

    assert f"{get_current_span(at_once['context']).get_span_context().trace_id:x}" == trace_id
    assert at_once["kind"] is SpanKind.CLIENT
    assert not get_current_span(later["context"]).get_span_context().is_valid
    assert f"{later['links'][0].context.trace_id:x}" == trace_id


async def test_every_message_that_left_has_one_accepted_call(world):
    async with world.server.database.engine.connect() as connection:
        rows = await connection.execute(
            text(
                "SELECT m.status, count(*) FILTER (WHERE a.outcome = 'accepted') AS taken FROM message m"
                " LEFT JOIN attempt a ON (a.tenant_id, a.message_id) = (m.tenant_id, m.id) GROUP BY m.id, m.status"
            )
        )
        assert all(row.taken == (row.status == "COMPLETED") for row in rows)

"""Calendar feeds over gRPC: who may make one, what its link shows, and when it shows nothing more."""

import asyncio
from datetime import timedelta

import grpc
import pytest
from care.access.v1 import access_pb2
from care.scheduling.v1 import directory_pb2
from care.scheduling.v1 import feeds_pb2 as pb
from care.scheduling.v1.directory_pb2_grpc import ClinicsServiceStub
from care.scheduling.v1.feeds_pb2_grpc import CalendarFeedsServiceStub, CalendarLinksServiceStub
from sqlalchemy import event

from chassis import access
from chassis.errors import problem_from_rpc
from chassis.testing.harness import ISSUER
from services.scheduling.tests.desk import WORK, refused, soon
from services.scheduling.tests.reading import by_icalendar

PERMISSIONS = [*WORK, "feeds.write", "feeds.details"]


class Calendars:
    """Makes and reads feeds of the desk's clinic; `fay` works there."""

    def __init__(self, desk):
        self.desk = desk

    async def __call__(self, method, request, subject="fay"):
        return await self.desk.harness.call("scheduling", CalendarFeedsServiceStub, method, request, subject)

    async def make(self, subject="fay", **shown):
        return await self("CreateCalendarFeed", pb.CreateCalendarFeedRequest(**shown), subject)

    async def read(self, feed, *etags):
        """As the gateway does. Raises Problem."""
        stub = CalendarLinksServiceStub(self.desk.harness.channel("scheduling"))
        request = pb.GetCalendarByLinkRequest(token=getattr(feed, "token", feed), etags=etags)
        try:
            return await stub.GetCalendarByLink(request, metadata=self.desk.harness.as_service("gateway"), timeout=10)
        except grpc.RpcError as error:
            raise problem_from_rpc(error) from None

    async def shown(self, feed):
        """What another program reads in a feed, by the appointment's id."""
        return {one["uid"]: one for one in by_icalendar((await self.read(feed)).calendar)}

    async def grant(self, subject, principal_id, version, **state):
        """Another state of a login."""
        server = self.desk.harness.servers["scheduling"]
        async with server.database.engine.begin() as connection:
            told = access_pb2.PrincipalState(
                id=principal_id, tenant_id=self.desk.harness.tenant_id, issuer=ISSUER, subject=subject, kind="STAFF",
                principal_id=principal_id, version=version, **{"active": True, "roles": [f"role of {subject}"], **state},
            )  # fmt: skip
            await access.store_principal(connection, server.runtime.tables.access, told)
        server.access.forget_callers()


@pytest.fixture(scope="module")
async def feeds(desk):
    for name in ("fay", "finn"):
        await desk.harness.staff(name, PERMISSIONS, clinics=[desk.clinic])
    return Calendars(desk)


@pytest.fixture(scope="module")
def a_time():
    """A time of its own for each visit of a test."""
    hours = iter(range(200))
    return lambda: soon(3, 0) + timedelta(hours=next(hours))


async def test_a_feed_shows_the_instants_of_the_rows_and_names_nobody(feeds, a_time):
    desk, patient = feeds.desk, await feeds.desk.a_patient()
    booked = await desk.book(patient, a_time())
    for shown in ({"patient_id": patient}, {"clinic_id": desk.clinic}, {"practitioner_id": desk.doctor}):
        made = await feeds.make(**shown)
        assert made.path == f"/calendars/{made.token}.ics" and len(made.token) == 24
        found = (await feeds.shown(made))[booked.id]
        assert (found["start"], found["end"]) == (booked.start_time.seconds, booked.end_time.seconds)
        assert found["status"] == "CONFIRMED"
        text = (await feeds.read(made)).calendar
        assert patient not in text and "Abara" not in text and "follow-up" not in text


async def test_a_move_and_a_cancellation_raise_the_sequence_and_the_cancelled_visit_stays_in_sight(feeds, a_time):
    desk, patient = feeds.desk, await feeds.desk.a_patient()
    booked = await desk.book(patient, a_time())
    made = await feeds.make(patient_id=patient)
    told = [(await feeds.shown(made))[booked.id]]
    moved = await desk.move(booked, a_time())
    told.append((await feeds.shown(made))[booked.id])
    assert told[-1]["start"] == moved.start_time.seconds
    await desk.do("Cancel", booked, reason={"code": "pat"})
    told.append((await feeds.shown(made))[booked.id])
    assert [one["status"] for one in told] == ["CONFIRMED", "CONFIRMED", "CANCELLED"]
    assert [one["sequence"] for one in told] == sorted({one["sequence"] for one in told})
    await desk.sql("UPDATE appointment SET update_time = update_time - interval '31 days' WHERE id = :id", id=booked.id)
    assert booked.id not in await feeds.shown(made)


async def test_who_has_the_calendar_is_told_so_until_something_in_it_changes(feeds, a_time):
    desk, patient = feeds.desk, await feeds.desk.a_patient()
    booked = await desk.book(patient, a_time())
    made = await feeds.make(patient_id=patient)
    first = await feeds.read(made)
    again = await feeds.read(made, "another", first.etag)
    assert again.unchanged and again.calendar == "" and again.etag == first.etag
    await desk.move(booked, a_time())
    second = await feeds.read(made, first.etag)
    assert not second.unchanged and second.calendar != first.calendar
    # What the visit is named after, too.
    clinic = await desk.harness.call(
        "scheduling", ClinicsServiceStub, "GetClinic", directory_pb2.GetClinicRequest(id=desk.clinic), "ada"
    )
    clinic.discreet_name = "Riverside East"
    await desk.harness.call(
        "scheduling", ClinicsServiceStub, "UpdateClinic",
        directory_pb2.UpdateClinicRequest(clinic=clinic, etag=clinic.etag), "ada",
    )  # fmt: skip
    third = await feeds.read(made, second.etag)
    assert not third.unchanged and "Riverside East" in third.calendar


async def test_an_unchanged_feed_costs_one_look_at_the_visits_by_an_index(feeds, a_time):
    desk, patient = feeds.desk, await feeds.desk.a_patient()
    await desk.book(patient, a_time())
    for shown, index in (
        ({"patient_id": patient}, "appointment_by_patient"),
        ({"clinic_id": desk.clinic}, "appointment_by_clinic"),
        ({"practitioner_id": desk.doctor}, "appointment_by_practitioner"),
    ):
        made = await feeds.make(**shown)
        etag = (await feeds.read(made)).etag
        looks = []

        def hear(_connection, _cursor, statement, parameters, *_, looks=looks):
            if "FROM appointment " in statement and "FOR UPDATE" not in statement:  # as the loops beside it do
                looks.append((statement, parameters))

        engine = desk.database.engine.sync_engine
        event.listen(engine, "before_cursor_execute", hear)
        try:
            assert (await feeds.read(made, etag)).unchanged
        finally:
            event.remove(engine, "before_cursor_execute", hear)
        ((statement, parameters),) = looks
        async with desk.database.engine.begin() as connection:
            for order in ("enable_seqscan", "enable_sort"):
                await connection.exec_driver_sql(f"SET LOCAL {order} = off")
            found = await connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)
            plan = "\n".join(found.scalars())
        assert index in plan and "Index Cond" in plan, plan


async def test_a_revoked_link_answers_as_one_that_never_was(feeds):
    made = await feeds.make(clinic_id=feeds.desk.clinic)
    await feeds.read(made)
    revoked = await feeds("RevokeCalendarFeed", pb.RevokeCalendarFeedRequest(id=made.calendar_feed.id))
    assert revoked.status == pb.CalendarFeed.REVOKED
    assert await refused(feeds.read(made)) == await refused(feeds.read("c-" + "A" * 22)) == "LINK_UNKNOWN"
    again = feeds("RevokeCalendarFeed", pb.RevokeCalendarFeedRequest(id=made.calendar_feed.id))
    assert await refused(again) == "ILLEGAL_TRANSITION"


async def test_a_feed_is_its_makers_alone_and_its_link_is_shown_once(feeds):
    made = await feeds.make(subject="finn", clinic_id=feeds.desk.clinic)
    request = pb.RevokeCalendarFeedRequest(id=made.calendar_feed.id)
    assert await refused(feeds("RevokeCalendarFeed", request)) == "NOT_FOUND"
    ids = [one.id for one in (await feeds("ListCalendarFeeds", pb.ListCalendarFeedsRequest())).calendar_feeds]
    assert made.calendar_feed.id not in ids
    listed = await feeds("ListCalendarFeeds", pb.ListCalendarFeedsRequest(), "finn")
    assert made.calendar_feed in listed.calendar_feeds
    stored = await feeds.desk.sql("SELECT * FROM calendar_feed WHERE id = :id", id=made.calendar_feed.id)
    assert made.token not in str(listed) and made.token not in str(stored)


async def test_nobody_follows_what_they_cannot_see(feeds):
    desk = feeds.desk
    elsewhere = await desk.a_clinic()
    stranger = await desk.harness.subject(elsewhere)
    away = await desk.a_practitioner("Clay", clinic=elsewhere)
    for shown in ({"clinic_id": elsewhere}, {"practitioner_id": away}, {"patient_id": stranger}):
        assert await refused(feeds.make(**shown)) == "NOT_FOUND"
    me = await desk.a_patient()
    await desk.harness.staff("pat", ["feeds.write"], kind="PATIENT", principal_id=me)
    assert await refused(feeds.make(subject="pat", clinic_id=desk.clinic)) == "NOT_FOUND"
    assert await refused(feeds.make(subject="pat", patient_id=stranger)) == "NOT_FOUND"
    assert await refused(feeds.make(subject="pat", patient_id=me, include_details=True)) == "PERMISSION_MISSING"
    assert (await feeds.make(subject="pat", patient_id=me)).token


async def test_a_feed_ends_when_its_maker_may_see_it_no_longer(feeds):
    desk, patient = feeds.desk, await feeds.desk.a_patient()
    gil = await desk.harness.staff("gil", PERMISSIONS, clinics=[desk.clinic])
    made = [
        await feeds.make(subject="gil", **shown)
        for shown in ({"patient_id": patient}, {"clinic_id": desk.clinic}, {"practitioner_id": desk.doctor})
    ]
    for one in made:
        await feeds.read(one)
    ends = [{"group_ids": []}, {"group_ids": [desk.clinic], "active": False}, {"group_ids": [desk.clinic], "roles": []}]
    for version, state in enumerate(ends, 2):
        await feeds.grant("gil", gil, version, **state)
        for one in made:
            assert await refused(feeds.read(one)) == "LINK_UNKNOWN", state


async def test_a_visit_whose_label_its_maker_is_not_cleared_for_is_not_shown(feeds, a_time):
    desk = feeds.desk
    patient = await desk.a_patient()
    kind = await desk.a_visit_type("groups", security_labels=["SUD"])
    await desk.harness.staff("cleo", PERMISSIONS, clinics=[desk.clinic], clearances=["SUD"])
    booked = await desk.book(patient, a_time(), visit_type_id=kind, subject="cora")
    assert booked.id not in await feeds.shown(await feeds.make(clinic_id=desk.clinic))
    found = (await feeds.shown(await feeds.make(subject="cleo", clinic_id=desk.clinic, include_details=True)))[
        booked.id
    ]
    assert found["summary"] == "Visit (in person, 30 min)"


async def test_nobody_has_more_than_twenty_feeds(feeds):
    await feeds.desk.harness.staff("max", PERMISSIONS, clinics=[feeds.desk.clinic])
    made = [await feeds.make(subject="max", clinic_id=feeds.desk.clinic) for _ in range(19)]
    # At once: each of them saw the last place free.
    last = await asyncio.gather(
        *(feeds.make(subject="max", clinic_id=feeds.desk.clinic) for _ in range(4)), return_exceptions=True
    )
    assert [getattr(one, "reason", "") for one in last].count("") == 1
    assert await refused(feeds.make(subject="max", clinic_id=feeds.desk.clinic)) == "FEED_LIMIT_REACHED"
    await feeds("RevokeCalendarFeed", pb.RevokeCalendarFeedRequest(id=made[0].calendar_feed.id), "max")
    assert (await feeds.make(subject="max", clinic_id=feeds.desk.clinic)).token


async def test_a_reading_is_noted_with_the_maker_and_a_patients_own_as_a_look_into_the_record(feeds):
    desk, patient = feeds.desk, await feeds.desk.a_patient()
    for shown, subjects in (({"patient_id": patient}, [patient]), ({"clinic_id": desk.clinic}, [])):
        made = await feeds.make(**shown)
        await feeds.read(made)
        rows = await desk.sql(
            "SELECT actor, on_behalf_of, subject_ids::text[] AS subjects FROM audit"
            " WHERE method LIKE '%GetCalendarByLink' ORDER BY time DESC LIMIT 1"
        )
        assert (rows[0].actor, rows[0].subjects) == ("link", subjects)
        assert rows[0].on_behalf_of.startswith("staff:")


async def test_one_visit_can_be_taken_along_as_a_file(feeds, a_time):
    desk, patient = feeds.desk, await feeds.desk.a_patient()
    booked = await desk.book(patient, a_time())
    answer = await feeds("GetAppointmentCalendar", pb.GetAppointmentCalendarRequest(id=booked.id))
    (found,) = by_icalendar(answer.calendar)
    assert (found["uid"], found["start"]) == (booked.id, booked.start_time.seconds)
    assert answer.file_name == "visit.ics"

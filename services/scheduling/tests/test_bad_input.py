"""What can't be is refused as INVALID_ARGUMENT (400 over HTTP), at once, with the field and the reason."""

from datetime import UTC, datetime, timedelta

import grpc
import pytest
from care.scheduling.v1 import appointments_pb2 as pb
from care.scheduling.v1 import directory_pb2, series_pb2
from care.scheduling.v1.directory_pb2_grpc import ClinicsServiceStub, SchedulesServiceStub
from care.scheduling.v1.series_pb2_grpc import SeriesServiceStub

from chassis.errors import Problem
from services.scheduling.tests.desk import ALWAYS

MONDAY = datetime(2031, 6, 9, tzinfo=UTC)
BACKWARDS = {"valid_from": "2031-05-02", "valid_until": "2031-05-01"}


def block(start, end, **more):
    return {"weekday": 1, "start": start, "end": end, **more}


async def hours(desk, *blocks, exceptions=()):
    schedule = directory_pb2.Schedule(
        practitioner_id=await desk.a_practitioner("Hours", ()), clinic_id=desk.clinic, weekly_hours=blocks,
        exceptions=exceptions,
    )  # fmt: skip
    request = directory_pb2.CreateScheduleRequest(schedule=schedule)
    await desk.harness.call("scheduling", SchedulesServiceStub, "CreateSchedule", request, "ada")


async def zone(desk, name):
    request = directory_pb2.CreateClinicRequest(clinic=directory_pb2.Clinic(name="Nowhere", time_zone=name))
    await desk.harness.call("scheduling", ClinicsServiceStub, "CreateClinic", request, "ada")


async def series(desk, rule):
    request = series_pb2.CreateSeriesRequest(
        patient_id=await desk.a_patient(), visit_type_id=desk.visit, clinic_id=desk.clinic, practitioner_id=desk.doctor,
        start=f"{datetime.now(UTC) + timedelta(days=9):%Y-%m-%d}T09:00", rule=rule,
    )  # fmt: skip
    await desk.harness.call("scheduling", SeriesServiceStub, "CreateSeries", request, "cora")


async def somebody_elses_page(desk):
    for _ in range(2):
        patient = await desk.a_patient()
        await desk.book(patient, MONDAY, await desk.a_practitioner("Page", ALWAYS))
    request = pb.ListAppointmentsRequest(clinic_ids=[desk.clinic], page_size=1)
    request.page_token = (await desk("ListAppointments", request)).next_page_token
    await desk("ListAppointments", request, "sam")


async def somebody_elses_search(desk):
    token = (await desk.search(start_time=MONDAY, page_size=1)).next_page_token
    await desk.search(subject="sam", start_time=MONDAY, page_size=1, page_token=token)


async def hold(desk, seconds):
    slot = (await desk.search(start_time=MONDAY, page_size=1)).slots[0]
    await desk.hold(await desk.a_patient(), slot, hold_seconds=seconds)


def late(count):
    return MONDAY + timedelta(days=count)


@pytest.mark.parametrize(
    ("reason", "field", "attempt"),
    [
        ("HOURS_OVERLAP", "weekly_hours", lambda desk: hours(desk, block("09:00", "12:00"), block("11:59", "13:00"))),
        ("HOURS_OVERLAP", "weekly_hours", lambda desk: hours(desk, block("22:00", "02:00"), {**block("01:00", "03:00"), "weekday": 2})),
        ("PERIOD_INVALID", "valid_until", lambda desk: hours(desk, block("09:00", "12:00", **BACKWARDS))),
        ("FIELD_INVALID", "weekly_hours", lambda desk: hours(desk, block("09:00", "24:00"))),
        ("DATE_INVALID", "date", lambda desk: hours(desk, exceptions=[{"date": "2031-02-30", "kind": "CLOSED"}])),
        ("TIME_ZONE_UNKNOWN", "time_zone", lambda desk: zone(desk, "Mars/Olympus")),
        ("TIME_ZONE_UNKNOWN", "time_zone", lambda desk: zone(desk, "../../etc/passwd")),
        ("SERIES_WITHOUT_END", "rule", lambda desk: series(desk, "FREQ=DAILY")),
        ("TOO_MANY_OCCURRENCES", "rule", lambda desk: series(desk, "FREQ=DAILY;COUNT=1000000")),
        ("RULE_INVALID", "rule", lambda desk: series(desk, "FREQ=DAILY;UNTIL=20200101")),
        ("RULE_INVALID", "rule", lambda desk: series(desk, "FREQ=SECONDLY;COUNT=9")),
        ("WINDOW_TOO_LONG", "end_time", lambda desk: desk.search(start_time=MONDAY, end_time=late(3653))),
        ("WINDOW_TOO_LONG", "end_time", lambda desk: desk.count(start_time=MONDAY, end_time=late(3653))),
        ("PERIOD_INVALID", "end_time", lambda desk: desk.search(start_time=MONDAY, end_time=late(-1))),
        ("PAGE_TOKEN_INVALID", "page_token", somebody_elses_page),
        ("PAGE_TOKEN_INVALID", "page_token", somebody_elses_search),
        ("FIELD_INVALID", "hold_seconds", lambda desk: hold(desk, 0)),
        ("FIELD_INVALID", "hold_seconds", lambda desk: hold(desk, -1)),
    ],
)  # fmt: skip
async def test_what_can_not_be_is_refused_with_its_field_and_reason(desk, reason, field, attempt):
    with pytest.raises(Problem) as refusal:
        await attempt(desk)
    assert (refusal.value.code, refusal.value.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason)
    assert field in refusal.value.metadata["field"] and refusal.value.message

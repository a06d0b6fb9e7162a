"""One booking by HTTP is one trace up to the provider's call, as a real collector receives it; metrics and logs know it too."""

import asyncio
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from chassis.testing.otlp import OtlpReceiver, ReceivedSpan
from system import topology
from tests.integration.looking import log_lines, metric, samples
from tests.integration.world import User, World, until

pytestmark = [pytest.mark.integration, pytest.mark.postgres, pytest.mark.kafka]

CREATE = "care.scheduling.v1.AppointmentsService/CreateAppointment"


class Traced:
    """A booking and a refused one, each under a trace of the caller's own."""

    def __init__(self) -> None:
        self.trace, self.refused_trace = secrets.token_hex(16), secrets.token_hex(16)
        self.caller = secrets.token_hex(8)
        self.appointment: dict[str, Any] = {}

    def header(self, trace: str) -> str:
        return f"00-{trace}-{self.caller}-01"


@pytest.fixture(scope="module")
async def world(systems: Any) -> Any:
    world = World(await systems(kafka=True))
    yield world
    await world.close()


@pytest.fixture(scope="module")
async def traced(world: World) -> Traced:
    traced = Traced()
    user = world.user("coordinator")
    patient, slot = await _reachable(user), await _free(user)
    body = {"patientId": patient, **slot}
    answer = await user.request("POST", "/v1/appointments", body, traceparent=traced.header(traced.trace))
    assert answer.status_code == 200, answer.text
    traced.appointment = answer.json()
    refused = await user.request("POST", "/v1/appointments", body, traceparent=traced.header(traced.refused_trace))
    assert refused.status_code == 409, refused.text
    return traced


async def _reachable(user: User) -> str:
    """A patient who agreed to be written to."""
    clinics = (await user.get("/v1/self"))["clinicIds"]
    visits = await user.get("/v1/appointments", clinicIds=clinics, pageSize=100)
    for patient in dict.fromkeys(one["patientId"] for one in visits["appointments"]):
        consents = (await user.get("/v1/consents", patientId=patient)).get("consents", [])
        if any(one["status"] == "ACTIVE" for one in consents):
            return str(patient)
    raise AssertionError("no patient of the sample agreed to be written to")


async def _free(user: User) -> dict[str, Any]:
    start = datetime.now(UTC) + timedelta(days=20)
    for kind in (await user.get("/v1/visitTypes", pageSize=100))["visitTypes"]:
        found = await user.post(
            "/v1/availability:search",
            {"visitTypeId": kind["id"], "startTime": start.isoformat().replace("+00:00", "Z"), "pageSize": 5},
        )
        if found.get("slots"):
            (slot, *_) = found["slots"]
            names = ("visitTypeId", "clinicId", "practitionerId", "startTime")
            return {name: slot[name] for name in names}
    raise AssertionError("nothing is free")


def _is(service: str, kind: str, name: str) -> Callable[[ReceivedSpan], bool]:
    return lambda span: (span.service, span.kind, span.name) == (service, kind, name)


def _provider(span: ReceivedSpan) -> bool:
    """The call that hands the message over."""
    return span.service == "notifications" and span.kind == "CLIENT" and span.name in ("send sms", "send email")


async def _only(otlp: OtlpReceiver, trace: str, wanted: Callable[[ReceivedSpan], bool]) -> ReceivedSpan:
    """The one such span of a trace."""
    await otlp.wait_for(lambda spans: any(span.trace_id == trace and wanted(span) for span in spans), timeout=20)
    (found,) = [span for span in otlp.spans if span.trace_id == trace and wanted(span)]
    return found


async def test_a_booking_is_one_trace_up_to_the_provider(traced: Traced, otlp: OtlpReceiver) -> None:
    trace = traced.trace
    http = await _only(otlp, trace, _is("gateway", "SERVER", "POST /v1/appointments"))
    client = await _only(otlp, trace, _is("gateway", "CLIENT", CREATE))
    server = await _only(otlp, trace, _is("scheduling", "SERVER", CREATE))
    process = await _only(otlp, trace, _is("notifications", "CONSUMER", "process appointment.booked"))
    provider = await _only(otlp, trace, _provider)
    assert http.parent_span_id == traced.caller
    assert client.parent_span_id == http.span_id
    assert server.parent_span_id == client.span_id
    assert process.parent_span_id == server.span_id
    assert (trace, server.span_id) in {(link.trace_id, link.span_id) for link in process.links}
    assert provider.parent_span_id == process.span_id
    assert (trace, process.span_id) in {(link.trace_id, link.span_id) for link in provider.links}
    assert http.attributes["http.response.status_code"] == 200 and http.attributes["http.route"] == "/v1/appointments"
    assert client.attributes["rpc.response.status_code"] == server.attributes["rpc.response.status_code"] == "OK"
    assert process.attributes["messaging.consumer.group.name"] == "notifications"
    assert process.attributes["messaging.destination.name"] == "care.scheduling"
    assert provider.name == f"send {provider.attributes['care.channel']}"
    assert {span.status for span in (http, client, server, process, provider)} == {"UNSET"}
    for earlier, later in ((http, client), (client, server)):
        assert earlier.start_time <= later.start_time <= later.end_time <= earlier.end_time


async def test_the_relay_sends_beside_the_trace_and_links_to_it(traced: Traced, otlp: OtlpReceiver) -> None:
    server = await _only(otlp, traced.trace, _is("scheduling", "SERVER", CREATE))
    origin = (traced.trace, server.span_id)

    def sends(span: ReceivedSpan) -> bool:
        links = {(link.trace_id, link.span_id) for link in span.links}
        return _is("scheduling", "PRODUCER", "send care.scheduling")(span) and origin in links

    await otlp.wait_for(lambda spans: any(map(sends, spans)), timeout=10)
    (sent,) = [span for span in otlp.spans if sends(span)]
    assert sent.trace_id != traced.trace, "one batch serves many traces"
    assert sent.status == "UNSET" and sent.attributes["messaging.batch.message_count"] >= 1


async def test_every_service_that_reacts_is_in_the_trace_and_none_is_an_orphan(
    traced: Traced, otlp: OtlpReceiver
) -> None:
    server = await _only(otlp, traced.trace, _is("scheduling", "SERVER", CREATE))
    await _only(otlp, traced.trace, _provider)
    for service in ("patients", "referrals"):
        found = await _only(otlp, traced.trace, _is(service, "CONSUMER", "process appointment.booked"))
        assert found.parent_span_id == server.span_id
        assert (traced.trace, server.span_id) in {(link.trace_id, link.span_id) for link in found.links}
    await asyncio.sleep(1.5)  # the last batches of spans
    spans = [span for span in otlp.spans if span.trace_id == traced.trace]
    known = {span.span_id for span in spans} | {traced.caller}
    orphans = [(span.service, span.name) for span in spans if span.parent_span_id not in known]
    assert not orphans
    wrong = [(span.service, span.name, span.attributes) for span in spans if span.status != "UNSET"]
    assert not wrong


async def test_a_refusal_is_an_error_for_the_caller_and_none_for_the_server(traced: Traced, otlp: OtlpReceiver) -> None:
    trace = traced.refused_trace
    http = await _only(otlp, trace, _is("gateway", "SERVER", "POST /v1/appointments"))
    client = await _only(otlp, trace, _is("gateway", "CLIENT", CREATE))
    server = await _only(otlp, trace, _is("scheduling", "SERVER", CREATE))
    assert (http.status, client.status, server.status) == ("UNSET", "ERROR", "UNSET")
    assert http.attributes["http.response.status_code"] == 409
    for span in (client, server):
        assert span.attributes["rpc.response.status_code"] == "ALREADY_EXISTS"
    assert client.attributes["error.type"] == "ALREADY_EXISTS" and "error.type" not in server.attributes
    assert server.attributes["care.reason"] == http.attributes["care.reason"]
    assert not [span for span in otlp.spans if span.trace_id == trace and span.kind == "CONSUMER"]


async def test_metrics_show_rates_errors_durations_and_what_lags(traced: Traced, world: World) -> None:
    system = world.system
    for code in ("OK", "ALREADY_EXISTS"):
        labels = {"rpc_method": CREATE, "rpc_response_status_code": code}
        for instance, name in (("scheduling", "rpc_server_call"), ("gateway", "rpc_client_call")):
            count = await metric(system, instance, f"{name}_duration_seconds_count", **labels)
            assert count and count >= 1, (instance, labels)
            took = await metric(system, instance, f"{name}_duration_seconds_sum", **labels)
            assert took and 0 < took / count < 10
    for status in ("200", "409"):
        labels = {"http_route": "/v1/appointments", "http_response_status_code": status}
        assert await metric(system, "gateway", "http_server_request_duration_seconds_count", **labels)
    for service in topology.SERVICES:
        found = await samples(system, service)
        assert 0 <= found["care_outbox_oldest_age_seconds"] < 60
        for topic in topology.service(service).topics:
            labels = f'{{group="{service}",topic="{topic}"}}'
            assert 0 <= found[f"care_consumer_lag_seconds{labels}"] < 60, (service, topic)
            assert 0 <= found[f"care_consumer_lag_records{labels}"], (service, topic)


async def test_a_reminder_that_left_was_measured_for_its_lateness(traced: Traced, world: World) -> None:
    async def count() -> float | None:
        return await metric(world.system, "notifications", "care_reminder_lateness_seconds_count")

    assert await until(count, lambda found: found and found >= 1)


async def test_log_lines_carry_the_trace(traced: Traced, world: World) -> None:
    def lines(instance: str, trace: str) -> list[dict[str, Any]]:
        return [line for line in log_lines(world.system, instance) if line.get("trace_id") == trace]

    (booked,) = [line for line in lines("gateway", traced.trace) if line["event"] == "request"]
    assert booked["status"] == 200 and booked["route"] == "/v1/appointments"
    (refused,) = [line for line in lines("gateway", traced.refused_trace) if line["event"] == "request"]
    assert refused["status"] == 409
    (told,) = [line for line in lines("scheduling", traced.refused_trace) if line["event"] == "call refused"]
    assert told["reason"] == refused["reason"]

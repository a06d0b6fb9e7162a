"""The gateway over a real socket: what goes in, what comes out, and what is kept back."""

import asyncio
from typing import Any

import httpx2
import pytest
from care.patients.v1 import patients_pb2
from care.scheduling.v1 import appointments_pb2

from chassis.errors import (
    Aborted,
    AlreadyExists,
    FailedPrecondition,
    Invalid,
    NotFound,
    PermissionDenied,
    Problem,
    ResourceExhausted,
    Unavailable,
)
from gateway.settings import GatewaySettings
from gateway.tests.conftest import TENANT, Start, World

ID = "0198c5a2-6f00-7b3d-8a51-3f4c2d9e7a10"
GET = "care.patients.v1.PatientsService/GetPatient"
UPDATE = "care.patients.v1.PatientsService/UpdatePatient"
CANCEL = "care.scheduling.v1.AppointmentsService/CancelAppointment"


def raising(problem: Problem) -> Any:
    async def handler(request: Any, metadata: dict[str, str]) -> Any:
        raise problem

    return handler


def reason_of(answer: httpx2.Response) -> str:
    error = answer.json()["error"]
    assert error["code"] == answer.status_code
    assert error["details"][0]["@type"] == "type.googleapis.com/google.rpc.ErrorInfo"
    assert error["details"][0]["domain"] == "care"
    return str(error["details"][0]["reason"])


async def test_a_patient_is_read_with_etag_and_is_never_stored_by_caches(world: World) -> None:
    async def get(request: Any, metadata: dict[str, str]) -> Any:
        assert metadata["authorization"].startswith("Bearer ")
        assert "traceparent" in metadata
        patient = patients_pb2.Patient(id=request.id, etag='"7"', birth_date="1987", gender="FEMALE")  # type: ignore[arg-type]
        patient.names.add(family_name="Rivera")
        return patient

    world.services["patients"].answers[GET] = get
    answer = await world.http.get(f"/v1/patients/{ID}")
    assert answer.status_code == 200
    assert answer.json() == {
        "id": ID,
        "etag": '"7"',
        "names": [{"familyName": "Rivera"}],
        "gender": "FEMALE",
        "birthDate": "1987",
    }
    assert answer.headers["etag"] == '"7"'
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.headers["x-request-id"]) == 36
    head = await world.http.head(f"/v1/patients/{ID}")
    assert (head.status_code, head.content, head.headers["etag"]) == (200, b"", '"7"')


async def test_the_services_never_see_a_request_without_a_good_token(world: World) -> None:
    path = f"/v1/patients/{ID}"
    missing = httpx2.AsyncClient(base_url=str(world.http.base_url))
    async with missing:
        answer = await missing.get(path)
        assert (answer.status_code, reason_of(answer)) == (401, "TOKEN_MISSING")
        assert answer.headers["www-authenticate"] == 'Bearer realm="care"'
        basic = await missing.get(path, headers={"authorization": "Basic eDp5"})
        assert basic.status_code == 401
    for token, reason in (
        ("x", "TOKEN_INVALID"),
        (world.token()[:-4] + "AAAA", "TOKEN_INVALID"),
        (world.token(lives=-60), "TOKEN_EXPIRED"),
    ):
        answer = await world.http.get(path, headers={"authorization": f"Bearer {token}"})
        assert (answer.status_code, reason_of(answer)) == (401, reason)
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    assert world.services["patients"].seen == []


PROBLEMS: list[tuple[Problem, dict[str, str], int]] = [
    (NotFound(), {}, 404),
    (Invalid("FIELD_INVALID", "patient.birth_date is required.", field="patient.birth_date"), {}, 400),
    (Aborted("ETAG_MISMATCH", "x"), {"if-match": '"1"'}, 412),
    (Aborted("ETAG_MISMATCH", "x"), {}, 409),
    (Aborted("IN_PROGRESS", "x"), {}, 409),
    (FailedPrecondition("ILLEGAL_TRANSITION", "x"), {}, 409),
    (AlreadyExists("SLOT_TAKEN", "x"), {}, 409),
    (Invalid("IDEMPOTENCY_KEY_REUSED", "x"), {}, 422),
    (FailedPrecondition("TOO_EARLY", "x"), {}, 409),
    (FailedPrecondition("SOMETHING_ELSE", "x"), {}, 400),
    (PermissionDenied("OVERBOOKING_NOT_ALLOWED", "x"), {}, 403),
    (FailedPrecondition("OVERBOOKING_NOT_ALLOWED", "x"), {}, 409),
    (Invalid("CLINIC_UNKNOWN", "x"), {}, 400),
    (ResourceExhausted("OVERLOADED", "x"), {}, 429),
    (Unavailable("DATABASE_UNAVAILABLE", "x"), {}, 503),
]


async def test_problems_of_services_become_http_by_one_table(start: Start) -> None:
    world = await start()
    for problem, headers, status in PROBLEMS:
        world.services["scheduling"].answers[CANCEL] = raising(problem)
        path = f"/v1/appointments/{ID}:cancel"
        answer = await world.http.post(path, json={"reason": {"code": "pat"}}, headers=headers)
        assert (answer.status_code, reason_of(answer)) == (status, problem.reason)
        assert answer.json()["error"]["status"] == problem.code.name
        assert ("retry-after" in answer.headers) == (status in (429, 503) or problem.reason == "IN_PROGRESS")
        if problem.reason == "FIELD_INVALID":
            assert answer.json()["error"]["details"][0]["metadata"] == {"field": "patient.birthDate"}
            assert answer.json()["error"]["message"] == "patient.birthDate is required."


async def test_unknown_paths_and_wrong_methods_answer_in_the_same_form(world: World) -> None:
    answer = await world.http.get("/v1/unicorns")
    assert (answer.status_code, reason_of(answer)) == (404, "PATH_UNKNOWN")
    answer = await world.http.delete(f"/v1/patients/{ID}")
    assert (answer.status_code, reason_of(answer)) == (405, "METHOD_NOT_ALLOWED")
    assert answer.headers["allow"] == "GET, HEAD, PATCH"
    assert (await world.http.post("/docs")).headers["allow"] == "GET, HEAD"


async def test_large_bodies_are_refused_whether_announced_or_not(start: Start) -> None:
    world = await start(body_limit=1024)

    async def pieces() -> Any:
        for _ in range(20):
            yield b" " * 100

    for content in (b" " * 1025, pieces()):
        answer = await world.http.post(
            "/v1/appointments", content=content, headers={"content-type": "application/json"}
        )
        assert (answer.status_code, reason_of(answer)) == (413, "BODY_TOO_LARGE")
    answer = await world.http.post("/v1/appointments", content=b"{}")
    assert (answer.status_code, reason_of(answer)) == (415, "CONTENT_TYPE_UNSUPPORTED")


async def test_patch_without_if_match_is_428_and_with_it_carries_mask_and_key(world: World) -> None:
    taken: list[Any] = []

    async def update(request: Any, metadata: dict[str, str]) -> Any:
        taken.append(request)
        return patients_pb2.Patient(id=request.patient.id, etag='"8"')

    world.services["patients"].answers[UPDATE] = update
    answer = await world.http.patch(f"/v1/patients/{ID}", json={"active": False})
    assert (answer.status_code, reason_of(answer)) == (428, "ETAG_REQUIRED")
    answer = await world.http.patch(
        f"/v1/patients/{ID}",
        json={"active": False, "timeZone": None},
        headers={"if-match": '"7"', "idempotency-key": "k"},
    )
    assert (answer.status_code, answer.headers["etag"]) == (200, '"8"')
    (request,) = taken
    assert (request.etag, request.request_id, list(request.update_mask.paths)) == ('"7"', "k", ["active", "time_zone"])


async def test_the_colon_of_a_custom_method_may_be_encoded(world: World) -> None:
    for colon in (":", "%3A", "%3a"):
        answer = await world.http.post(f"/v1/appointments/{ID}{colon}confirm")
        assert answer.status_code == 200
    assert len(world.services["scheduling"].seen) == 3


async def test_a_service_that_is_away_is_503_and_its_address_stays_here(start: Start) -> None:
    world = await start()
    backend = world.services["scheduling"]
    await backend.server.stop(0)
    answer = await world.http.get(f"/v1/appointments/{ID}")
    assert (answer.status_code, reason_of(answer)) == (503, "SERVICE_UNAVAILABLE")
    assert "127.0.0.1" not in answer.text
    assert answer.headers["retry-after"] == "1"


async def test_a_slow_service_is_504_after_the_deadline_which_it_is_told(start: Start) -> None:
    world = await start(request_timeout=0.3)

    async def slow(request: Any, metadata: dict[str, str]) -> Any:
        await asyncio.sleep(5)

    world.services["patients"].answers[GET] = slow
    answer = await world.http.get(f"/v1/patients/{ID}")
    assert (answer.status_code, reason_of(answer)) == (504, "DEADLINE_EXCEEDED")


async def test_a_body_that_does_not_come_is_408(start: Start) -> None:
    world = await start(request_timeout=0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", world.gateway.port)
    writer.write(
        b"POST /v1/appointments HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
        b"Authorization: Bearer " + world.token().encode() + b"\r\n\r\n{"
    )
    assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()


async def test_a_defect_of_a_service_says_nothing_of_itself(world: World) -> None:
    async def broken(request: Any, metadata: dict[str, str]) -> Any:
        raise RuntimeError("Key (mrn)=(A-20417) already exists")

    world.services["patients"].answers[GET] = broken
    answer = await world.http.get(f"/v1/patients/{ID}")
    assert (answer.status_code, reason_of(answer)) == (500, "INTERNAL")
    assert "A-20417" not in answer.text + world.log.getvalue()


async def test_logs_spans_and_metrics_name_the_route_and_never_the_path(start: Start) -> None:
    world = await start()
    await world.http.get(f"/v1/patients/{ID}", params=None)
    await world.http.get("/v1/appointments", params={"patientIds": ID})
    await world.http.get("/v1/Maria%20Rivera")
    await world.http.get("/v1/patients", params={"Maria Rivera": "x"})
    metrics = (await world.http.get("/metrics", headers={"accept": "application/openmetrics-text"})).text
    said = world.log.getvalue() + metrics + "".join(span.to_json() for span in world.spans.get_finished_spans())
    assert ID not in said
    assert "Maria" not in said
    assert [line["route"] for line in world.lines() if line["event"] == "request"] == [
        "/v1/patients/{id}",
        "/v1/appointments",
        "unknown",
        "/v1/patients",
    ]
    labels = 'http_request_method="GET",http_response_status_code="200",http_route="/v1/patients/{id}"'
    assert f"http_server_request_duration_seconds_count{{{labels}}} 1.0" in metrics
    assert metrics.endswith("# EOF\n")


async def test_one_request_is_one_trace_with_the_callers_parent(world: World) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    await world.http.get(f"/v1/patients/{ID}", headers={"traceparent": f"00-{trace}-00f067aa0ba902b7-01"})
    spans = world.spans.get_finished_spans()
    assert {f"{span.context.trace_id:032x}" for span in spans if span.context} == {trace}
    names = {span.name: span for span in spans}
    server, client = names["GET /v1/patients/{id}"], names[GET]
    assert client.parent is not None and server.context is not None
    assert client.parent.span_id == server.context.span_id
    assert server.attributes is not None and server.attributes["care.tenant_id"] == TENANT
    (_, metadata), *_ = world.services["patients"].seen
    assert trace in metadata["traceparent"]
    assert world.lines()[-1]["trace_id"] == trace


async def test_ready_when_all_services_were_there_and_not_while_draining(start: Start) -> None:
    world = await start()
    for _ in range(100):
        answer = await world.http.get("/readyz")
        if answer.status_code == 200:
            break
        await asyncio.sleep(0.05)
    assert answer.json() == {"status": "ready"}
    await world.services["feedback"].server.stop(0)
    assert (await world.http.get("/readyz")).status_code == 200
    assert (await world.http.get("/healthz")).json() == {"status": "ok"}
    world.gateway.app.draining = True
    answer = await world.http.get("/readyz")
    assert (answer.status_code, answer.json()["for"]) == (503, ["draining"])


async def test_not_ready_before_every_service_was_there_once(start: Start) -> None:
    world = await start()
    await world.services["feedback"].server.stop(0)
    world.gateway.app._once_up.discard("feedback")
    for _ in range(10):
        await asyncio.sleep(0.05)
        if "feedback" in world.gateway.app.not_ready():
            return
    raise AssertionError("ready without feedback")


async def test_a_stop_lets_the_request_under_way_finish(start: Start) -> None:
    world = await start()
    entered = asyncio.Event()

    async def slow(request: Any, metadata: dict[str, str]) -> Any:
        entered.set()
        await asyncio.sleep(0.5)
        return appointments_pb2.Appointment(id=request.id)

    world.services["scheduling"].answers["care.scheduling.v1.AppointmentsService/GetAppointment"] = slow
    under_way = asyncio.create_task(world.http.get(f"/v1/appointments/{ID}"))
    await entered.wait()
    await world.gateway.stop()
    assert (await under_way).status_code == 200
    with pytest.raises(httpx2.ConnectError):
        await httpx2.AsyncClient().get(f"http://127.0.0.1:{world.gateway.port}/healthz")


async def test_writes_are_tried_again_while_a_service_restarts(start: Start) -> None:
    world = await start()
    tries: list[str] = []

    async def flaky(request: Any, metadata: dict[str, str]) -> Any:
        tries.append(request.request_id)
        if len(tries) < 3:
            raise Unavailable("DATABASE_UNAVAILABLE", "x")
        return appointments_pb2.Appointment(id=request.id)

    world.services["scheduling"].answers["care.scheduling.v1.AppointmentsService/ConfirmAppointment"] = flaky
    answer = await world.http.post(f"/v1/appointments/{ID}:confirm")
    assert answer.status_code == 200
    assert len(set(tries)) == 1


async def test_other_origins_are_refused_unless_set(start: Start) -> None:
    shop, console = "https://shop.example", "https://console.example"
    closed = await start()
    answer = await closed.http.get(f"/v1/patients/{ID}", headers={"origin": console})
    assert "access-control-allow-origin" not in answer.headers
    world = await start(allowed_origins=[console])
    answer = await world.http.get(f"/v1/patients/{ID}", headers={"origin": console})
    assert (answer.headers["access-control-allow-origin"], answer.headers["vary"]) == (console, "Origin")
    answer = await world.http.get(f"/v1/patients/{ID}", headers={"origin": shop})
    assert "access-control-allow-origin" not in answer.headers
    preflight = await world.http.options(
        f"/v1/patients/{ID}", headers={"origin": console, "access-control-request-method": "PATCH"}
    )
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == console
    assert "If-Match" in preflight.headers["access-control-allow-headers"]


async def test_the_document_and_its_page_are_served_without_a_login(world: World) -> None:
    async with httpx2.AsyncClient(base_url=str(world.http.base_url)) as stranger:
        document = await stranger.get("/openapi.json")
        assert document.json()["openapi"] == "3.1.0"
        again = await stranger.get("/openapi.json", headers={"if-none-match": document.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        page = await stranger.get("/docs")
        assert page.status_code == 200
        assert "http://" not in page.text and "https://" not in page.text and "src=" not in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]


async def test_a_request_that_nobody_waits_for_any_more_costs_nothing(world: World) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", world.gateway.port)
    writer.write(
        b"POST /v1/appointments HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9\r\n"
        b"Authorization: Bearer " + world.token().encode() + b"\r\n\r\n{"
    )
    await asyncio.sleep(0.1)
    writer.close()
    await asyncio.sleep(0.1)
    assert world.services["scheduling"].seen == []


def test_the_shipped_settings_are_those_of_the_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = GatewaySettings()
    assert (shipped.request_timeout, shipped.leg_timeout, shipped.body_limit) == (10.0, 0.8, 1 << 20)
    assert shipped.batch_legs
    assert shipped.allowed_origins == []
    monkeypatch.setenv("CARE_ALLOWED_ORIGINS", "https://a.example, https://b.example")
    assert GatewaySettings().allowed_origins == ["https://a.example", "https://b.example"]

"""Paths, queries, bodies and headers become requests by the contract, and nothing is taken twice."""

from typing import Any

import orjson
import pytest

from chassis.errors import FailedPrecondition, Invalid, NotFound, Problem
from gateway.codec import Codec
from gateway.contract import IDEMPOTENT, rpcs
from gateway.transcoding import HttpRequest, MethodNotAllowed, Routes

ID = "0198c5a2-6f00-7b3d-8a51-3f4c2d9e7a10"
ROUTES = Routes(Codec(), rpcs())
JSON = {"content-type": "application/json"}


def bind(
    method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, raw: bytes | None = None
) -> Any:
    path, _, query = path.partition("?")
    route, values = ROUTES.match(method, path.encode())
    sent = raw if raw is not None else b"" if body is None else orjson.dumps(body)
    return route.bind(values, HttpRequest(query.encode(), {**JSON, **(headers or {})}, sent))


def refused(*args: Any, **more: Any) -> tuple[str, str]:
    with pytest.raises(Problem) as problem:
        bind(*args, **more)
    return problem.value.reason, problem.value.metadata.get("field", "")


def test_every_rpc_has_a_route_unless_it_is_internal() -> None:
    routed = {route.rpc.name for route in ROUTES.all}
    for rpc in rpcs():
        assert (rpc.name in routed) != rpc.rule.internal, rpc.name


def test_every_route_leads_to_itself() -> None:
    for route in ROUTES.all:
        path = route.template
        for _, leaf in route.positions:
            path = path.replace(f"{{{leaf.field.json_name}}}", ID)
        found, values = ROUTES.match(route.method, path.encode())
        assert found is route
        assert values == [ID] * len(route.positions)
        again, _ = ROUTES.match(route.method, path.replace(":", "%3A").encode())
        assert again is route


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "",
        "/v1",
        "/v1/patients/",
        "/v1/nothing",
        f"/v1/appointments/{ID}:vanish",
        f"/v1/appointments/{ID}/",
        "/v1/appointments/:cancel",
        f"//v1/patients/{ID}",
        "/v1/patients%2F" + ID,
        "/v1/patients/%ff",
    ],
)
def test_unknown_paths_are_not_found(path: str) -> None:
    with pytest.raises(NotFound) as problem:
        ROUTES.match("GET", path.encode())
    assert problem.value.reason == "PATH_UNKNOWN"


def test_a_wrong_method_says_which_are_right() -> None:
    with pytest.raises(MethodNotAllowed) as problem:
        ROUTES.match("DELETE", f"/v1/patients/{ID}".encode())
    assert problem.value.allowed == ["GET", "HEAD", "PATCH"]


def test_an_encoded_slash_stays_inside_its_segment() -> None:
    assert bind("GET", "/v1/patients/a%2Fb").id == "a/b"


def test_path_body_and_key_meet_in_one_request() -> None:
    request = bind(
        "POST",
        f"/v1/appointments/{ID}:cancel",
        {"reason": {"code": "pat"}, "source": "PHONE"},
        {"idempotency-key": "k-1"},
    )
    assert (request.id, request.reason.code, request.source, request.request_id) == (ID, "pat", 2, "k-1")


def test_a_key_is_made_up_where_none_is_sent() -> None:
    first, second = (bind("POST", f"/v1/appointments/{ID}:confirm").request_id for _ in range(2))
    assert len(first) == 36
    assert first != second


def test_every_idempotent_rpc_carries_a_key() -> None:
    for route in ROUTES.all:
        if route.rpc.idempotency == IDEMPOTENT:
            assert "request_id" in route.fields, route.rpc.name


@pytest.mark.parametrize("key", ["", "with space", "x" * 101, "é"])
def test_a_malformed_key_is_refused(key: str) -> None:
    assert refused("POST", f"/v1/appointments/{ID}:confirm", None, {"idempotency-key": key}) == (
        "FIELD_INVALID",
        "Idempotency-Key",
    )


def test_header_and_field_together_are_refused() -> None:
    path = f"/v1/appointments/{ID}:cancel"
    body = {"reason": {"code": "pat"}, "requestId": "a", "etag": "b"}
    assert refused("POST", path, body, {"idempotency-key": "b"}) == ("FIELD_BOUND_BY_HEADER", "requestId")
    assert refused("POST", path, body, {"if-match": '"3"'}) == ("FIELD_BOUND_BY_HEADER", "etag")


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("POST", f"/v1/appointments/{ID}:cancel", {"id": ID, "reason": {"code": "pat"}}, "id"),
        ("POST", f"/v1/appointments/{ID}:cancel", {"id": None}, "id"),
        ("PATCH", f"/v1/patients/{ID}", {"id": ID}, "patient.id"),
        ("GET", f"/v1/patients/{ID}?id={ID}", None, "id"),
        ("GET", f"/v1/patients/{ID}/timeline?patientId={ID}", None, "patientId"),
        ("GET", f"/v1/patients/{ID}/timeline?patient_id={ID}", None, "patient_id"),
        ("PATCH", f"/v1/patients/{ID}?patient.id={ID}", {"active": True}, "patient.id"),
    ],
)
def test_a_field_of_the_path_is_refused_elsewhere(method: str, path: str, body: Any, field: str) -> None:
    assert refused(method, path, body, {"if-match": '"3"'}) == ("FIELD_BOUND_BY_PATH", field)


def test_a_field_of_the_body_is_refused_in_the_query() -> None:
    assert refused("POST", "/v1/appointments?comment=x", {}) == ("FIELD_BOUND_BY_BODY", "comment")
    assert refused("POST", "/v1/patients?patient.birthDate=2000", {}) == ("FIELD_BOUND_BY_BODY", "patient.birthDate")


def test_fields_beside_the_body_come_by_query() -> None:
    request = bind("POST", f"/v1/patients?clinicId={ID}&confirmNew=true", {"birthDate": "1987"})
    assert (request.clinic_id, request.confirm_new, request.patient.birth_date) == (ID, True, "1987")


@pytest.mark.parametrize(
    ("query", "reason", "field"),
    [
        ("nothing=1", "FIELD_UNKNOWN", "nothing"),
        ("J%C3%BCrgen%20M=1", "FIELD_UNKNOWN", "?"),
        ("descending=1", "FIELD_INVALID", "descending"),
        ("descending=true&descending=true", "FIELD_INVALID", "descending"),
        ("pageSize=ten", "FIELD_INVALID", "pageSize"),
        ("pageSize=1&page_size=1", "FIELD_INVALID", "pageSize"),
        ("patientIds=a&patientId=b", "FIELD_INVALID", "patientIds"),
        ("statuses=BOOKED&statuses=LOST", "FIELD_INVALID", "statuses[1]"),
        ("startTimeFrom=yesterday", "FIELD_INVALID", "startTimeFrom"),
        ("date=%ff", "QUERY_INVALID", ""),
    ],
)
def test_queries_are_typed(query: str, reason: str, field: str) -> None:
    assert refused("GET", f"/v1/appointments?{query}") == (reason, field)


def test_repeated_filters_repeat_and_may_be_written_in_the_singular() -> None:
    request = bind(
        "GET", "/v1/appointments?patientId=a&patientId=b&status=BOOKED&startTimeFrom=2026-01-01T00:00:00Z&pageSize=5"
    )
    assert list(request.patient_ids) == ["a", "b"]
    assert list(request.statuses) == [3]
    assert request.start_time_from.seconds == 1767225600
    assert request.page_size == 5
    assert list(bind("GET", "/v1/appointments?patient_ids=a+b%20c").patient_ids) == ["a b c"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"[]", "BODY_INVALID"),
        (b'"x"', "BODY_INVALID"),
        (b"null", "BODY_INVALID"),
        (b"{", "BODY_INVALID"),
        (b'{"a": NaN}', "BODY_INVALID"),
        (b'{"comment": "\xff"}', "BODY_INVALID"),
        (b'{"comment": "\\ud800"}', "BODY_INVALID"),
        (b"[" * 2000, "BODY_INVALID"),
    ],
)
def test_bodies_that_are_no_objects_are_refused(raw: bytes, reason: str) -> None:
    assert refused("POST", "/v1/appointments", raw=raw)[0] == reason


def test_a_body_must_be_declared_as_json() -> None:
    for content_type in ("", "text/plain", "application/x-www-form-urlencoded"):
        assert refused("POST", "/v1/appointments", {}, {"content-type": content_type})[0] == "CONTENT_TYPE_UNSUPPORTED"
    bind("POST", "/v1/appointments", {}, {"content-type": "Application/JSON; charset=utf-8"})


def test_a_wrong_field_in_the_body_is_named_from_the_requests_root() -> None:
    body = {"names": [{"use": "NICK"}]}
    assert refused("POST", f"/v1/patients?clinicId={ID}", body) == ("FIELD_INVALID", "patient.names[0].use")


def test_a_resource_needs_a_body() -> None:
    assert refused("POST", f"/v1/patients?clinicId={ID}")[0] == "BODY_REQUIRED"


def test_patch_names_the_keys_that_are_present() -> None:
    body: dict[str, Any] = {"telecom": [], "birthDate": None, "interpreter_needed": False, "etag": '"3"'}
    request = bind("PATCH", f"/v1/patients/{ID}", body, {"if-match": '"3"'})
    assert list(request.update_mask.paths) == ["telecom", "birth_date", "interpreter_needed", "etag"]
    assert (request.patient.id, request.etag) == (ID, '"3"')


def test_an_explicit_mask_wins() -> None:
    request = bind("PATCH", f"/v1/patients/{ID}?updateMask=birthDate,names", {"active": True}, {"if-match": '"3"'})
    assert list(request.update_mask.paths) == ["birth_date", "names"]


@pytest.mark.parametrize("header", ['"3"', 'W/"3"', "3", ' "3" '])
def test_etags_are_taken_quoted_weak_or_bare(header: str) -> None:
    assert bind("PATCH", f"/v1/patients/{ID}", {"active": True}, {"if-match": header}).etag == '"3"'


@pytest.mark.parametrize("header", ["*", '"3", "4"', '"', ""])
def test_if_match_names_one_etag(header: str) -> None:
    assert refused("PATCH", f"/v1/patients/{ID}", {"active": True}, {"if-match": header}) == (
        "FIELD_INVALID",
        "If-Match",
    )


def test_patch_without_if_match_is_refused() -> None:
    with pytest.raises(FailedPrecondition) as problem:
        bind("PATCH", f"/v1/patients/{ID}", {"active": True})
    assert problem.value.reason == "ETAG_REQUIRED"


def test_a_precondition_that_nobody_would_check_is_refused() -> None:
    assert refused("POST", "/v1/appointments", {"patientId": ID}, {"if-match": '"3"'}) == ("FIELD_INVALID", "If-Match")


@pytest.mark.parametrize(
    "verb",
    "book release reschedule confirm arrive checkIn fulfill markNoShow cancel revert enterInError".split(),
)
def test_every_verb_of_an_appointment_takes_a_precondition(verb: str) -> None:
    assert bind("POST", f"/v1/appointments/{ID}:{verb}", None, {"if-match": '"3"'}).etag == '"3"'


def test_an_empty_patch_is_refused() -> None:
    with pytest.raises(Invalid):
        bind("PATCH", f"/v1/patients/{ID}", {}, {"if-match": '"3"'})

"""The OpenAPI document is valid, whole, and its examples are taken by the gateway itself."""

from typing import Any

import orjson
import protovalidate
from openapi_spec_validator import OpenAPIV31SpecValidator

from gateway.codec import Codec
from gateway.contract import rpcs
from gateway.openapi import document
from gateway.transcoding import HttpRequest, Routes

ROUTES = Routes(Codec(), rpcs()).all
DOCUMENT = document(ROUTES, version="1")
ID = "0198c5a2-6f00-7b3d-8a51-3f4c2d9e7a10"


def _operation(route: Any) -> Any:
    return DOCUMENT["paths"][route.template][route.method.lower()]


def test_the_document_is_valid() -> None:
    assert [error.message for error in OpenAPIV31SpecValidator(DOCUMENT).iter_errors()] == []


def test_every_operation_and_field_is_described_and_has_examples() -> None:
    ids = set()
    for route in ROUTES:
        operation = _operation(route)
        ids.add(operation["operationId"])
        assert operation["description"]
        ((kind, content),) = operation["responses"]["200"]["content"].items()
        assert content["example"] and kind in (
            "text/event-stream" if route.streams else "application/json",
            "text/calendar",
        )
        if "requestBody" in operation:
            assert "example" in operation["requestBody"]["content"]["application/json"]
        for parameter in operation["parameters"]:
            assert "$ref" in parameter or parameter["description"], route.template
    assert len(ids) == len(ROUTES)
    for name, schema in DOCUMENT["components"]["schemas"].items():
        assert schema["description"], name
        for key, field in schema.get("properties", {}).items():
            assert field["description"], f"{name}.{key}"


def test_the_document_is_the_same_every_time() -> None:
    assert orjson.dumps(document(ROUTES, version="1")) == orjson.dumps(DOCUMENT)


def test_every_example_is_a_request_that_the_services_would_take() -> None:
    for route in ROUTES:
        operation = _operation(route)
        body = b""
        if "requestBody" in operation:
            body = orjson.dumps(operation["requestBody"]["content"]["application/json"]["example"])
        query = []
        for parameter in operation["parameters"]:
            if parameter.get("in") == "query" and "example" in parameter:
                example = parameter["example"]
                one = example[0] if isinstance(example, list) else example
                query.append(f"{parameter['name']}={str(one).lower() if isinstance(one, bool) else one}")
        headers = {"content-type": "application/json"} | ({"if-match": '"3"'} if route.method == "PATCH" else {})
        request = route.bind([ID] * len(route.positions), HttpRequest("&".join(query).encode(), headers, body))
        violations = protovalidate.collect_violations(request)
        assert [each.proto.rule_id for each in violations] == [], route.template


def test_a_file_is_described_as_what_it_is() -> None:
    (route,) = (one for one in ROUTES if one.rpc.method.name == "GetAppointmentCalendar")
    assert list(_operation(route)["responses"]["200"]["content"]) == ["text/calendar"]

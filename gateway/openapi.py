"""The OpenAPI 3.1 document, made from descriptors, their options and their comments."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

import orjson
from buf.validate import validate_pb2
from google.protobuf.descriptor import Descriptor, EnumDescriptor, FieldDescriptor

from gateway import calendars
from gateway.codec import camel, is_map
from gateway.contract import IDEMPOTENT, comments
from gateway.events import TYPE
from gateway.http_errors import BY_REASON, CONFLICTS
from gateway.transcoding import Leaf, Route, singular

Json = dict[str, Any]
_F = FieldDescriptor
_RULES: Any = validate_pb2.field
_UUID: Final = "0198c5a2-6f00-7b3d-8a51-3f4c2d9e7a10"
_REASON = re.compile(r"`([A-Z][A-Z0-9_]{2,})`")
_DEEPEST_EXAMPLE: Final = 5
_HEADER_FIELDS: Final = ("request_id", "etag")
_WELL_KNOWN: Final[Mapping[str, Json]] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": "^-?[0-9]+(\\.[0-9]{1,9})?s$"},
    "google.protobuf.FieldMask": {"type": "string"},
}
# By message and field, else by the field's name; whatever is not here is made of its type.
_EXAMPLES: Final[Mapping[str, Any]] = {
    "Identifier.system": "https://hospital.example.org/mrn",
    "Identifier.value": "A-20417",
    "Identifier.type": "MR",
    "ContactPoint.value": "+14135550123",
    "Patient.deceased": False,
    "Patient.restricted": False,
    "Scoring.method": "nps",
    "Coding.system": "http://terminology.hl7.org/CodeSystem/appointment-cancellation-reason",
    "MatchCard.birth_date": "1987-04-12",
    "Reminder.kind": "appointment",
    "ImportAppointmentRequest.validate_only": False,
    "ImportAppointmentRequest.local_start_time": "",
    "ImportAppointmentRequest.local_end_time": "",
    "ImportAppointmentRequest.duration_minutes": 0,
    "prefixes": "Dr.",
    "suffixes": "MD",
    "district": "Hampden",
    "comment": "Prefers mornings",
    "note": "Asked for a call next week",
    "role": "practitioner",
    "roles": "coordinator",
    "purpose": "appointment-reminder",
    "etag": '"3"',
    "source_system": "ehr",
    "time_zone": "America/New_York",
    "birth_date": "1987-04-12",
    "deceased_date": "",
    "date": "2026-03-02",
    "family_name": "Rivera",
    "given_name": "Alma",
    "given_names": "Alma",
    "city": "Springfield",
    "state": "MA",
    "postal_code": "01103",
    "country": "US",
    "lines": "12 Elm Street",
    "phone": "+14135550123",
    "phone_last_four": "0123",
    "e164": "+14135550123",
    "languages": "en",
    "language": "en",
    "earliest": "09:00",
    "latest": "16:30",
    "page_size": 50,
    "page_token": "",
    "next_page_token": "",
    "update_mask": "",
    "reason": "Called in and asked for a visit",
    "system": "http://hl7.org/fhir/sid/us-npi",
    "code": "pat",
    "display": "Patient",
    "type": "Patient",
    "actor": f"staff:{_UUID}",
    "recorder": f"staff:{_UUID}",
    "action": "book",
    "from_status": "PENDING",
    "to_status": "BOOKED",
    "method": "care.patients.v1.PatientsService/GetPatient",
    "permission": "patients.read",
    "permissions": "patients.read",
    "proxy_permissions": "appointments.read",
    "outcome": "OK",
    "service": "patients",
    "degraded": "feedback",
    "security_labels": "R",
    "offer_token": "b2ZmZXI.c2lnbmVk",
    "weekdays": 1,
    "opens": "08:00",
    "closes": "17:00",
    "next": f"/v1/appointments?patientIds={_UUID}",
    "issuer": "https://login.example.org",
    "link_id": "waiting-time",
    "hold_seconds": 300,
    "minutes": 15,
    "name": "Springfield Family Clinic",
    "title": "How was your visit?",
    "text": "How long did you wait?",
    "latitude": 42.1015,
    "longitude": -72.5898,
}
_STATUS_TEXT: Final[Mapping[int, str]] = {
    400: "The request is wrong by itself: `FIELD_UNKNOWN`, `FIELD_INVALID` (metadata `field` is its path), `BODY_INVALID`.",
    401: "No token, or one that can't be verified or has expired.",
    403: "The caller's roles lack the permission.",
    404: "There is no such object, or the caller may not see it: the answer is the same.",
    405: "The path takes other methods; header `Allow`.",
    406: "`NOT_ACCEPTABLE`: the answer is text/event-stream, which the client doesn't accept.",
    408: "The body did not come in time.",
    409: "The state of things doesn't allow it: an illegal transition, a taken slot, a wrong time, a change under way.",
    410: "The time to do this is over.",
    412: "`ETAG_MISMATCH`: somebody was faster; read again.",
    413: "The body is larger than 1 MiB.",
    415: "The body is not application/json.",
    422: "`IDEMPOTENCY_KEY_REUSED`: the key was used with another body.",
    428: "`ETAG_REQUIRED`: If-Match is missing.",
    429: "Too much at once; header `Retry-After`.",
    500: "A defect of the service.",
    503: "A service that is needed is away; header `Retry-After`.",
    504: "The deadline is over.",
}
_CODES: Final[Mapping[int, str]] = {
    400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED", 404: "NOT_FOUND", 405: "UNIMPLEMENTED",
    406: "INVALID_ARGUMENT",
    408: "DEADLINE_EXCEEDED", 409: "ABORTED", 410: "FAILED_PRECONDITION", 412: "ABORTED", 413: "RESOURCE_EXHAUSTED",
    415: "INVALID_ARGUMENT", 422: "INVALID_ARGUMENT", 428: "FAILED_PRECONDITION", 429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL", 503: "UNAVAILABLE", 504: "DEADLINE_EXCEEDED",
}  # fmt: skip
_REASONS: Final[Mapping[int, str]] = {
    400: "FIELD_INVALID", 401: "TOKEN_MISSING", 403: "PERMISSION_MISSING", 404: "NOT_FOUND",
    406: "NOT_ACCEPTABLE", 408: "BODY_TOO_SLOW",
    409: "ILLEGAL_TRANSITION", 412: "ETAG_MISMATCH", 413: "BODY_TOO_LARGE", 415: "CONTENT_TYPE_UNSUPPORTED",
    422: "IDEMPOTENCY_KEY_REUSED", 428: "ETAG_REQUIRED", 429: "OVERLOADED", 500: "INTERNAL", 503: "SERVICE_UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}  # fmt: skip


def document(routes: Iterable[Route], *, version: str) -> Json:
    """The whole document, JSON-ready. Deterministic: the same contract gives the same bytes."""
    return _Document(version).build(list(routes))


class _Document:
    def __init__(self, version: str) -> None:
        self._version = version
        self._comments = comments()
        self._schemas: Json = {}
        self._names: dict[str, str] = {}

    def build(self, routes: list[Route]) -> Json:
        paths: Json = {}
        tags: Json = {}
        for route in routes:
            service = route.rpc.service
            tag = service.name.removesuffix("Service")
            tags[tag] = self._comments.get(service.full_name, tag)
            paths.setdefault(route.template, {})[route.method.lower()] = self._operation(route, tag)
        return {
            "openapi": "3.1.0",
            "info": {
                "title": "Care Coordinator",
                "version": self._version,
                "summary": "Patient care coordination for health systems.",
                "description": _INTRODUCTION,
                "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            },
            "servers": [{"url": "/", "description": "This gateway."}],
            "security": [{"bearer": []}],
            "tags": [{"name": name, "description": tags[name]} for name in sorted(tags)],
            "paths": {path: paths[path] for path in sorted(paths)},
            "components": {
                "securitySchemes": {
                    "bearer": {
                        "type": "http",
                        "scheme": "bearer",
                        "bearerFormat": "JWT",
                        "description": "A token of an OIDC issuer that this system knows.",
                    }
                },
                "parameters": _PARAMETERS,
                "responses": {f"Error{status}": _error_response(status) for status in _STATUS_TEXT},
                "schemas": {"Error": _ERROR, **{name: self._schemas[name] for name in sorted(self._schemas)}},
            },
        }

    # -- operations --------------------------------------------------------------------------------------------------

    def _operation(self, route: Route, tag: str) -> Json:
        rpc = route.rpc
        text = self._comments[f"{rpc.service.full_name}.{rpc.method.name}"]
        writes = rpc.idempotency == IDEMPOTENT
        operation: Json = {
            "operationId": rpc.method.name[0].lower() + rpc.method.name[1:],
            "tags": [tag],
            "summary": text.split(". ")[0].rstrip(".") + ".",
            "description": f"{text}\n\nNeeds the permission `{rpc.rule.permission}`.",
            "parameters": self._parameters(route, writes),
        }
        if route.body:
            operation["requestBody"] = self._body(route)
        answer: Json = {
            "description": self._comments.get(rpc.method.output_type.full_name, "The answer."),
            "content": {
                "application/json": {
                    "schema": self._reference(rpc.method.output_type),
                    "example": self._example(rpc.method.output_type),
                }
            },
        }
        if rpc.method.output_type.full_name == calendars.FILE:
            answer["content"] = {"text/calendar": {"schema": {"type": "string"}, "example": "BEGIN:VCALENDAR\r\n…"}}
        if route.streams:
            answer["content"] = self._events(route)
            operation["parameters"].append({"$ref": "#/components/parameters/LastEventId"})
        if route.response_has_etag:
            answer["headers"] = {"ETag": _header("string", "The record's etag; send it back in `If-Match`.", '"3"')}
        operation["responses"] = {"200": answer, **self._errors(route, text, writes)}
        return operation

    def _events(self, route: Route) -> Json:
        """Server-sent events; what a `change` holds as its data is a schema of its own."""
        change = orjson.dumps(self._example(route.rpc.method.output_type)).decode()
        data = self._reference(route.rpc.method.output_type)["$ref"].rpartition("/")[2]
        return {
            TYPE: {
                "schema": {
                    "type": "string",
                    "description": f"Server-sent events: `reset` (read everything again; always the first), `change` (data is {data}), "
                    "`end` (data is Error: why the stream is closed), and comments as heartbeats. Open it again when it is closed.",
                },
                "example": 'retry: 2000\n\nevent: reset\ndata: {"kind":"RESET"}\n\n'
                f"id: {_UUID}\nevent: change\ndata: {change}\n\n: heartbeat\n\n",
            }
        }

    def _errors(self, route: Route, text: str, writes: bool) -> Json:
        statuses = {400, 401, 403, 429, 500, 503, 504}
        if route.streams:
            statuses.add(406)
        if route.positions:
            statuses.add(404)
        if route.body:
            statuses |= {408, 413, 415}
        if writes:
            statuses |= {404, 409, 422}
        if "etag" in route.fields:
            statuses.add(412)
        if route.method == "PATCH":
            statuses.add(428)
        for reason in _REASON.findall(text):
            statuses.add(BY_REASON.get(reason) or (409 if reason in CONFLICTS else 400))
        return {str(status): {"$ref": f"#/components/responses/Error{status}"} for status in sorted(statuses)}

    def _parameters(self, route: Route, writes: bool) -> list[Json]:
        parameters: list[Json] = []
        for _, leaf in route.positions:
            parameters.append(
                {
                    "name": leaf.field.json_name,
                    "in": "path",
                    "required": True,
                    "description": self._comments[leaf.field.full_name].removeprefix("Output only. "),
                    "schema": self._scalar(leaf.field),
                    "example": self._scalar_example(leaf.field),
                }
            )
        seen = set()
        for found in route.query.values():
            if isinstance(found, Leaf) and found.path not in seen:
                seen.add(found.path)
                if found.path in ("requestId", "etag", "updateMask") and writes:
                    continue  # the headers say these, and a PATCH its own keys
                parameters.append(self._query_parameter(found))
        if writes and "request_id" in route.fields:
            parameters.append({"$ref": "#/components/parameters/IdempotencyKey"})
        if "etag" in route.fields:
            name = "IfMatchRequired" if route.method == "PATCH" else "IfMatch"
            parameters.append({"$ref": f"#/components/parameters/{name}"})
        return parameters

    def _query_parameter(self, leaf: Leaf) -> Json:
        field = leaf.field
        schema = self._field(field)
        schema.pop("readOnly", None)
        text = schema.pop("description", "")
        example = self._field_example(field, 0)
        if field.is_repeated:
            alias = camel(singular(field.name))
            if alias != field.json_name:
                text += f" May be repeated, and written as `{alias}`."
        parameter: Json = {"name": leaf.path, "in": "query", "description": text, "schema": schema}
        if field.is_repeated:
            parameter |= {"style": "form", "explode": True}
        if example not in (None, "", [], [""]):
            parameter["example"] = example
        return parameter

    def _body(self, route: Route) -> Json:
        kind = route.rpc.method.input_type
        if route.body == "*":
            bound = {leaf.field.name for _, leaf in route.positions if not leaf.steps}
            left_out = frozenset(bound | {name for name in _HEADER_FIELDS if name in route.fields})
            schema = self._reference(kind, left_out)
            required = any(self._required(field) for field in kind.fields if field.name not in left_out)
            example = self._example(kind, left_out=left_out, inward=True)
            text = self._comments[kind.full_name]
        else:
            field = kind.fields_by_name[route.body]
            assert field.message_type is not None
            schema, required = self._reference(field.message_type), True
            left_out = frozenset(leaf.field.name for _, leaf in route.positions if leaf.steps == (route.body,))
            example = self._example(field.message_type, left_out=left_out, inward=True)
            text = self._comments[field.full_name]
            if route.method == "PATCH":
                text += " Only the keys that are present are changed; null clears one, lists are replaced whole."
        return {
            "description": text,
            "required": required,
            "content": {"application/json": {"schema": schema, "example": example}},
        }

    # -- schemas -----------------------------------------------------------------------------------------------------

    def _reference(self, kind: Descriptor, left_out: frozenset[str] = frozenset()) -> Json:
        name = self._names.get(kind.full_name)
        if name is None:
            # Without the package; with the service where two packages share the word.
            short = kind.full_name.split(".v1.", 1)[1]
            name = short if short not in self._names.values() else f"{kind.full_name.split('.')[1]}.{short}"
            self._names[kind.full_name] = name
            schema: Json = {"type": "object", "description": self._comments[kind.full_name], "properties": {}}
            self._schemas[name] = schema
            for field in kind.fields:
                if field.name not in left_out:
                    schema["properties"][field.json_name] = self._field(field)
            if required := [f.json_name for f in kind.fields if self._required(f) and f.name not in left_out]:
                schema["required"] = required
        return {"$ref": f"#/components/schemas/{name}"}

    @staticmethod
    def _required(field: FieldDescriptor) -> bool:
        rules = field.GetOptions().Extensions[_RULES]
        return bool(
            rules.required
            or (rules.string.uuid and not rules.ignore and not field.is_repeated and not field.has_presence)
        )

    def _field(self, field: FieldDescriptor) -> Json:
        if is_map(field):
            assert field.message_type is not None
            schema: Json = {
                "type": "object",
                "additionalProperties": self._one(field.message_type.fields_by_name["value"], None),
            }
        elif field.is_repeated:
            rules = field.GetOptions().Extensions[_RULES].repeated
            schema = {"type": "array", "items": self._one(field, rules.items)}
            if rules.max_items:
                schema["maxItems"] = rules.max_items
            if rules.min_items:
                schema["minItems"] = rules.min_items
        else:
            schema = self._one(field, field.GetOptions().Extensions[_RULES])
        text = self._comments[field.full_name]
        if text.startswith("Output only."):
            schema["readOnly"] = True
        schema["description"] = text
        return schema

    def _one(self, field: FieldDescriptor, rules: Any) -> Json:
        if field.message_type is not None:
            known = _WELL_KNOWN.get(field.message_type.full_name)
            return dict(known) if known is not None else self._reference(field.message_type)
        return self._scalar(field, rules)

    def _scalar(self, field: FieldDescriptor, rules: Any = None) -> Json:
        rules = rules if rules is not None else field.GetOptions().Extensions[_RULES]
        if field.enum_type is not None:
            allowed = _allowed(field.enum_type, rules)
            return {**self._enum(field.enum_type), **({"enum": allowed} if allowed else {})}
        if field.type == _F.TYPE_BOOL:
            return {"type": "boolean"}
        if field.type == _F.TYPE_BYTES:
            return {"type": "string", "contentEncoding": "base64"}
        if field.type in (_F.TYPE_DOUBLE, _F.TYPE_FLOAT):
            return {"type": "number", **_bounds(rules.double)}
        if field.type == _F.TYPE_STRING:
            return _text_schema(rules)
        if field.type in (_F.TYPE_INT32, _F.TYPE_SINT32, _F.TYPE_SFIXED32):
            return {"type": "integer", "format": "int32", **_bounds(rules.int32)}
        if field.type in (_F.TYPE_UINT32, _F.TYPE_FIXED32):
            return {"type": "integer", "minimum": 0, "maximum": 4294967295}
        return {"type": "string", "format": "int64"}

    def _enum(self, kind: EnumDescriptor) -> Json:
        short = kind.full_name.split(".v1.", 1)[1]
        name = self._names.setdefault(
            kind.full_name,
            short if short not in self._names.values() else f"{kind.full_name.split('.')[1]}.{short}",
        )
        if name not in self._schemas:
            values = [
                f"`{value.name}`: {self._comments.get(f'{kind.full_name}.{value.name}', '')}" for value in kind.values
            ]
            self._schemas[name] = {
                "type": "string",
                "enum": [value.name for value in kind.values],
                "description": " ".join(
                    [
                        self._comments.get(kind.full_name, short),
                        *values,
                        "Clients must bear values that are new to them.",
                    ]
                ),
            }
        return {"$ref": f"#/components/schemas/{name}"}

    # -- examples ----------------------------------------------------------------------------------------------------

    def _example(
        self, kind: Descriptor, depth: int = 0, *, left_out: frozenset[str] = frozenset(), inward: bool = False
    ) -> Json:
        example: Json = {}
        for field in kind.fields:
            output = self._comments[field.full_name].startswith("Output only.")
            if field.name in left_out or (inward and output):
                continue
            value = self._field_example(field, depth, inward)
            if value not in (None, "", [], {}, [{}]):
                example[field.json_name] = value
        return example

    def _field_example(self, field: FieldDescriptor, depth: int, inward: bool = False) -> Any:
        if is_map(field):
            return {"en": _EXAMPLES.get(field.name, "Words in English")}
        one = self._one_example(field, depth, inward)
        if not field.is_repeated:
            return one
        return [] if one in (None, "", {}) else [one] * max(field.GetOptions().Extensions[_RULES].repeated.min_items, 1)

    def _one_example(self, field: FieldDescriptor, depth: int, inward: bool) -> Any:
        if field.message_type is None:
            return self._scalar_example(field)
        if field.message_type.full_name == "google.protobuf.Timestamp":
            return "2026-03-02T15:30:00Z" if "end" in field.name or "expire" in field.name else "2026-03-02T15:00:00Z"
        if field.message_type.full_name == "google.protobuf.Duration":
            return "900s"
        if field.message_type.full_name in _WELL_KNOWN or depth >= _DEEPEST_EXAMPLE:
            return None
        return self._example(field.message_type, depth + 1, inward=inward)

    def _scalar_example(self, field: FieldDescriptor) -> Any:
        rules = field.GetOptions().Extensions[_RULES]
        if field.is_repeated:
            rules = rules.repeated.items
        if field.enum_type is not None:
            names = _allowed(field.enum_type, rules) or [value.name for value in field.enum_type.values]
            return names[min(1, len(names) - 1)]
        if field.type == _F.TYPE_BOOL:
            return _known_example(field) is not False
        if field.type == _F.TYPE_BYTES:
            return "AA=="
        if field.name in ("id", "ids") or field.name.endswith(("_id", "_ids")) or rules.string.uuid:
            return _UUID if field.name != "link_id" else _EXAMPLES["link_id"]
        if field.type == _F.TYPE_STRING:
            return _text_example(_known_example(field), rules.string)
        known = _known_example(field)
        if isinstance(known, int | float) and not isinstance(known, bool):
            return known
        if field.type in (_F.TYPE_DOUBLE, _F.TYPE_FLOAT):
            return 1.5
        number = max(1, rules.int32.gte)
        return number if field.type == _F.TYPE_INT32 else str(number)


def _allowed(kind: EnumDescriptor, rules: Any) -> list[str]:
    """Names of the values that a field takes, where it takes some of them only."""
    return [kind.values_by_number[number].name for number in getattr(rules.enum, "in")]


def _known_example(field: FieldDescriptor) -> Any:
    assert field.containing_type is not None
    return _EXAMPLES.get(f"{field.containing_type.name}.{field.name}", _EXAMPLES.get(field.name))


def _text_example(known: Any, rules: Any) -> str:
    allowed = list(getattr(rules, "in"))
    for candidate in (known, *allowed, "example", "2026-03-02", "09:00", "Patient", "en", "A1"):
        if not isinstance(candidate, str) or (allowed and candidate not in allowed):
            continue
        if (not rules.pattern or re.search(rules.pattern, candidate)) and (candidate or candidate == known):
            return candidate
    return ""


def _text_schema(rules: Any) -> Json:
    schema: Json = {"type": "string"}
    text = rules.string
    if text.uuid:
        schema["format"] = "uuid"
    if text.max_len:
        schema["maxLength"] = text.max_len
    if text.min_len:
        schema["minLength"] = text.min_len
    if text.pattern:
        schema["pattern"] = text.pattern
    if allowed := list(getattr(text, "in")):
        schema["enum"] = allowed
    return schema


def _bounds(rules: Any) -> Json:
    bounds: Json = {}
    if rules.HasField("gte"):
        bounds["minimum"] = rules.gte
    if rules.HasField("lte"):
        bounds["maximum"] = rules.lte
    return bounds


def _header(kind: str, text: str, example: Any) -> Json:
    return {"description": text, "schema": {"type": kind}, "example": example}


def _reasons(status: int) -> str:
    """The reasons that the table of reasons gives this status, for the description of it."""
    reasons = {reason for reason, given in BY_REASON.items() if given == status} | (
        CONFLICTS if status == 409 else set()
    )
    listed = ", ".join(f"`{reason}`" for reason in sorted(reasons) if f"`{reason}`" not in _STATUS_TEXT[status])
    return f" Reasons: {listed}." if listed else ""


def _error_response(status: int) -> Json:
    headers: Json = {}
    if status == 401:
        headers["WWW-Authenticate"] = _header("string", "How to sign in.", 'Bearer realm="care"')
    if status in (408, 409, 429, 503):
        headers["Retry-After"] = _header("string", "Seconds to wait, where waiting helps.", "1")
    if status == 405:
        headers["Allow"] = _header("string", "Methods that the path takes.", "GET, HEAD")
    response: Json = {
        "description": f"{_STATUS_TEXT[status]}{_reasons(status)}",
        "content": {
            "application/json": {
                "schema": {"$ref": "#/components/schemas/Error"},
                "example": {
                    "error": {
                        "code": status,
                        "status": _CODES[status],
                        "message": "One sentence that says what to do.",
                        "details": [
                            {
                                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                                "reason": _REASONS.get(status, _CODES[status]),
                                "domain": "care",
                            }
                        ],
                    }
                },
            }
        },
    }
    if headers:
        response["headers"] = headers
    return response


_INTRODUCTION: Final = (
    "JSON is proto3's canonical form: lowerCamel names (the original ones are taken too), enums as names, 64-bit numbers as texts, "
    "fields with their default value left out. Unknown fields and wrong types are refused with the field's path. Every write takes "
    "`Idempotency-Key`: the same key answers the same answer for 48 hours. `ETag` and `If-Match` guard against lost updates. Errors "
    "are google.rpc.Status as JSON with one ErrorInfo, whose `reason` is stable. The colon of a custom method may be written as %3A."
)
_PARAMETERS: Final[Json] = {
    "IdempotencyKey": {
        "name": "Idempotency-Key",
        "in": "header",
        "description": "Makes a repeated call safe: the same key and body answer the first answer for 48 hours. Made up where absent.",
        "schema": {"type": "string", "minLength": 1, "maxLength": 100, "pattern": "^[\\x21-\\x7e]+$"},
        "example": "9d2f6a1e-booking-1",
    },
    "IfMatch": {
        "name": "If-Match",
        "in": "header",
        "description": "The etag that was read; where somebody was faster the answer is 412.",
        "schema": {"type": "string", "maxLength": 100},
        "example": '"3"',
    },
    "LastEventId": {
        "name": "Last-Event-ID",
        "in": "header",
        "description": "Sent by clients that come back. The stream begins with a reset all the same.",
        "schema": {"type": "string", "maxLength": 100},
        "example": _UUID,
    },
    "IfMatchRequired": {
        "name": "If-Match",
        "in": "header",
        "required": True,
        "description": "The etag that was read; where somebody was faster the answer is 412, without it 428.",
        "schema": {"type": "string", "maxLength": 100},
        "example": '"3"',
    },
}
_ERROR: Final[Json] = {
    "type": "object",
    "description": "google.rpc.Status as JSON.",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "description": "What went wrong.",
            "required": ["code", "status", "message", "details"],
            "properties": {
                "code": {"type": "integer", "description": "The HTTP status."},
                "status": {"type": "string", "description": "Name of the google.rpc code."},
                "message": {"type": "string", "description": "One sentence for people; never holds a value."},
                "details": {
                    "type": "array",
                    "description": "One google.rpc.ErrorInfo.",
                    "items": {
                        "type": "object",
                        "description": "google.rpc.ErrorInfo.",
                        "required": ["reason", "domain"],
                        "properties": {
                            "@type": {"type": "string", "description": "Type URL of ErrorInfo."},
                            "reason": {"type": "string", "description": "Stable, UPPER_SNAKE; programs decide by it."},
                            "domain": {"type": "string", "description": "Always `care`."},
                            "metadata": {
                                "type": "object",
                                "description": "The dynamic parts, such as `field`.",
                                "additionalProperties": {"type": "string"},
                            },
                        },
                    },
                },
            },
        }
    },
}

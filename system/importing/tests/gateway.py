"""A gateway for the tests: a real HTTP server on loopback whose upserts do what the protos say, with memory instead of services."""

import asyncio
import contextlib
import json
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import protovalidate
import uvicorn
from care.patients.v1 import patients_pb2
from care.scheduling.v1 import directory_pb2, imports_pb2
from google.protobuf import json_format
from google.protobuf.message import Message
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Record = dict[str, Any]
TOKEN = "test-token"

_UPSERTS: dict[str, tuple[str, type[Message]]] = {
    "clinics": ("clinic", directory_pb2.UpsertClinicRequest),
    "practitioners": ("practitioner", directory_pb2.UpsertPractitionerRequest),
    "patients": ("patient", patients_pb2.UpsertPatientRequest),
}
_CREATED: dict[str, type[Message]] = {
    "visitTypes": directory_pb2.VisitType,
    "schedules": directory_pb2.Schedule,
    "resources": directory_pb2.Resource,
}


def _problem(code: int, reason: str, message: str) -> JSONResponse:
    details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason}]
    return JSONResponse({"error": {"code": code, "status": reason, "message": message, "details": details}}, code)


@dataclass
class Gateway:
    """`before` may answer in place of an endpoint (None lets it pass), `after` may replace an answer whose effect stays."""

    records: dict[str, list[Record]] = field(default_factory=lambda: {name: [] for name in (*_UPSERTS, *_CREATED)})
    relations: dict[str, set[str]] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    writes: int = 0
    answers: dict[str, tuple[int, Record]] = field(default_factory=dict)
    before: Callable[[Request], Response | None] = lambda request: None
    after: Callable[[Request], Response | None] = lambda request: None
    visits: Callable[[Record], tuple[int, Record]] = lambda body: (200, {"outcome": "IMPORTED"})
    delay: float = 0.0
    page: int = 200
    url: str = ""

    async def __call__(self, request: Request) -> Response:
        self.calls[f"{request.method} {request.url.path.split('/')[2]}"] += 1
        if request.headers.get("authorization") != f"Bearer {TOKEN}":
            return _problem(401, "UNAUTHENTICATED", "no valid token")
        if instead := self.before(request):
            return instead
        await asyncio.sleep(self.delay)
        kind, colon, _ = request.url.path.removeprefix("/v1/").partition(":")
        if request.method == "GET":
            return self._list(request, kind)
        if request.url.path == "/v1/appointments:import":
            body = await request.json()
            protovalidate.validate(json_format.ParseDict(body, imports_pb2.ImportAppointmentRequest()))
            code, answer = self.visits(body)
            return JSONResponse(answer, code)
        key = request.headers["idempotency-key"]
        if key not in self.answers:
            body = await request.json()
            if request.method == "PATCH":
                self.answers[key] = self._patch(kind, body, request.headers.get("if-match", ""))
            else:
                self.answers[key] = self._upsert(kind, body) if colon else self._create(kind, body)
        code, answer = self.answers[key]
        return self.after(request) or JSONResponse(answer, code)

    def _list(self, request: Request, kind: str) -> Response:
        found = self.records[kind]
        if wanted := request.query_params.getlist("clinicIds"):
            found = [one for one in found if one.get("clinicId") in wanted]
        start = int(request.query_params.get("pageToken", "0"))
        page: Record = {kind: found[start : start + self.page]}
        if start + self.page < len(found):
            page["nextPageToken"] = str(start + self.page)
        return JSONResponse(page)

    def _upsert(self, kind: str, body: Record) -> tuple[int, Record]:
        name, request_type = _UPSERTS[kind]
        protovalidate.validate(json_format.ParseDict(body, request_type()))
        given = body[name]
        first = _pair(given["identifiers"][0])
        known = next((one for one in self.records[kind] if first in map(_pair, one["identifiers"])), None)
        record = dict(known or {"id": str(uuid.uuid4()), "etag": "0"})
        old = json.dumps(record, sort_keys=True)
        if kind == "clinics":
            record |= given
        else:  # replaced whole, but for what is only added
            record = {name: record[name] for name in ("id", "etag", "roles") if name in record} | given
            if kind == "practitioners":
                given_at = {role["clinicId"] for role in given.get("roles", [])}
                kept = [role for role in (known or {}).get("roles", []) if role["clinicId"] not in given_at]
                record["roles"] = sorted(kept + given.get("roles", []), key=lambda role: str(role["clinicId"]))
        changed = json.dumps(record, sort_keys=True) != old
        if kind == "patients":
            related = self.relations.setdefault(record["id"], set())
            changed |= not related >= set(body["clinicIds"])
            related |= set(body["clinicIds"])
        if changed:
            self.writes += 1
            record["etag"] = str(int(record["etag"]) + 1)
            self.records[kind] = [one for one in self.records[kind] if one is not known] + [record]
        return 200, {name: record, "created": known is None, "changed": changed}

    def _create(self, kind: str, body: Record) -> tuple[int, Record]:
        protovalidate.validate(json_format.ParseDict(body, _CREATED[kind]()))
        record = body | {"id": str(uuid.uuid4()), "etag": "1"}
        self.records[kind].append(record)
        self.writes += 1
        return 200, record

    def _patch(self, path: str, body: Record, etag: str) -> tuple[int, Record]:
        kind, _, identity = path.partition("/")
        record = next(one for one in self.records[kind] if one["id"] == identity)
        if etag.strip('"') != record["etag"]:
            return 412, {"error": {"code": 412, "message": "changed since", "details": [{"reason": "ETAG_MISMATCH"}]}}
        record |= body
        record["etag"] = str(int(record["etag"]) + 1)
        self.writes += 1
        return 200, record

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator["Gateway"]:
        """Serves on a free port of loopback and sets `url`."""
        routes = [Route("/v1/{rest:path}", self._endpoint, methods=["GET", "POST", "PATCH"])]
        config = uvicorn.Config(
            Starlette(routes=routes), host="127.0.0.1", port=0, log_level="critical", lifespan="off"
        )
        server = uvicorn.Server(config)
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        port = server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        loop = asyncio.create_task(server.main_loop())
        try:
            yield self
        finally:
            loop.cancel()
            await asyncio.gather(loop, return_exceptions=True)
            await server.shutdown()

    async def _endpoint(self, request: Request) -> Response:
        try:
            return await self(request)
        except (json_format.ParseError, protovalidate.ValidationError) as error:
            return _problem(400, "INVALID", f"breaks the contract: {error}")


def _pair(identifier: Record) -> tuple[str, str]:
    return identifier["system"], identifier["value"]

"""Which HTTP status a problem gets: the one table of reasons and codes, and the JSON form of errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson
from grpc import StatusCode

from chassis.errors import DOMAIN, Problem

# As google.rpc.Code maps them.
BY_CODE: Final[Mapping[StatusCode, int]] = {
    StatusCode.CANCELLED: 499,
    StatusCode.UNKNOWN: 500,
    StatusCode.INVALID_ARGUMENT: 400,
    StatusCode.DEADLINE_EXCEEDED: 504,
    StatusCode.NOT_FOUND: 404,
    StatusCode.ALREADY_EXISTS: 409,
    StatusCode.PERMISSION_DENIED: 403,
    StatusCode.UNAUTHENTICATED: 401,
    StatusCode.RESOURCE_EXHAUSTED: 429,
    StatusCode.FAILED_PRECONDITION: 400,
    StatusCode.ABORTED: 409,
    StatusCode.OUT_OF_RANGE: 400,
    StatusCode.UNIMPLEMENTED: 501,
    StatusCode.INTERNAL: 500,
    StatusCode.UNAVAILABLE: 503,
    StatusCode.DATA_LOSS: 500,
}
# Reasons whose status isn't their code's. ETAG_MISMATCH is 412 only where If-Match was sent.
BY_REASON: Final[Mapping[str, int]] = {
    "ETAG_MISMATCH": 412,
    "ETAG_REQUIRED": 428,
    "IDEMPOTENCY_KEY_REUSED": 422,
    "ILLEGAL_TRANSITION": 409,
    "IN_PROGRESS": 409,
    "SLOT_TAKEN": 409,
    "LINK_EXPIRED": 410,
    "ALREADY_ANSWERED": 409,
    "OFFER_ANSWERED": 409,
    "WAITLIST_BUSY": 409,
    "METHOD_NOT_ALLOWED": 405,
    "BODY_TOO_SLOW": 408,
    "BODY_TOO_LARGE": 413,
    "TOO_LARGE": 413,
    "CONTENT_TYPE_UNSUPPORTED": 415,
    "NOT_ACCEPTABLE": 406,
}
# Well-formed requests that the state of what they touch, or its time, doesn't allow: as FAILED_PRECONDITION they are 409.
# The code counts too, since some of these reasons also name a wrong argument or a missing right.
CONFLICTS: Final = frozenset(
    {
        "ADMIN_NEEDED",
        "APPOINTMENT_NOT_BOOKED",
        "CLINIC_UNKNOWN",
        "CLINIC_WITHOUT_ZONE",
        "FEED_LIMIT_REACHED",
        "HELD_BACK",
        "HOLD_EXPIRED",
        "IN_SESSION",
        "LETTER_NOT_SENT",
        "MANAGED_OUTSIDE",
        "NOT_A_VIDEO_VISIT",
        "NOT_CLINIC_DAY",
        "NOT_ELIGIBLE",
        "NOT_LICENSED",
        "NO_POOL",
        "OCCURRENCE_PAST",
        "OFFER_EXPIRED",
        "OUTSIDE_HOURS",
        "OVERBOOKING_NOT_ALLOWED",
        "PATIENT_DECEASED",
        "PREVIOUS_STANDS",
        "QUOTA_REACHED",
        "SEATS_TAKEN",
        "SELF_SERVICE_LIMIT",
        "SELF_SERVICE_TOO_LATE",
        "SESSION_CLOSED",
        "TOO_EARLY",
    }
)
_AGAIN_AFTER_SECONDS: Final = 1
_LATER: Final = frozenset({408, 429, 503})


def http_status(problem: Problem, *, if_match: bool) -> int:
    """The HTTP status of a problem; `if_match` says whether the request had that header."""
    if problem.reason == "ETAG_MISMATCH" and not if_match:
        return 409
    if problem.code is StatusCode.FAILED_PRECONDITION and problem.reason in CONFLICTS:
        return 409
    return BY_REASON.get(problem.reason) or BY_CODE.get(problem.code, 500)


def error_headers(problem: Problem, status: int, *, token_sent: bool) -> list[tuple[bytes, bytes]]:
    """Headers that belong to an error: how to sign in, when to try again."""
    headers = []
    if status == 401:
        challenge = b'Bearer realm="care", error="invalid_token"' if token_sent else b'Bearer realm="care"'
        headers.append((b"www-authenticate", challenge))
    if status in _LATER or problem.reason == "IN_PROGRESS":
        seconds = problem.metadata.get("retry_after", "")
        headers.append((b"retry-after", (seconds if seconds.isdecimal() else str(_AGAIN_AFTER_SECONDS)).encode()))
    return headers


def error_json(problem: Problem, status: int) -> dict[str, Any]:
    """google.rpc.Status as JSON, the way Google's APIs show it over HTTP."""
    detail: dict[str, Any] = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": problem.reason,
        "domain": DOMAIN,
    }
    if problem.metadata:
        detail["metadata"] = problem.metadata
    return {
        "error": {
            "code": status,
            "status": problem.code.name,
            "message": problem.message,
            "details": [detail],
        }
    }


def error_body(problem: Problem, status: int) -> bytes:
    """The bytes of `error_json`."""
    return orjson.dumps(error_json(problem, status))

"""Calendar feeds without a login: the token in the path is the reader's only credential."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import grpc
from care.scheduling.v1 import feeds_pb2, feeds_pb2_grpc

from chassis.clients import Clients
from chassis.errors import NotFound, problem_from_rpc

PREFIX: Final = "/calendars/"
TEMPLATE: Final = "/calendars/{token}.ics"
# Of a feed of scheduling: the letter says which service keeps the link.
_FILE = re.compile(r"(c-[A-Za-z0-9_-]{8,98})\.ics")
_ETAG = re.compile(r'(?:W/)?"([^"]{1,100})"')
_MOST_ETAGS: Final = 20
_CALENDAR: Final = (b"content-type", b"text/calendar; charset=utf-8")
FILE: Final = feeds_pb2.AppointmentCalendar.DESCRIPTOR.full_name
"""The answer that leaves as the file that it holds, not as JSON."""
_HEADERS: Final = (
    (b"referrer-policy", b"no-referrer"),
    # Kept by who may read it, asked about each time: what was cancelled is not to stand there any longer.
    (b"cache-control", b"private, no-cache"),
    (b"x-robots-tag", b"noindex, nofollow"),
)


@dataclass(frozen=True, slots=True)
class Feed:
    """A calendar, or that the reader has it."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Calendars:
    """Reads feeds in the gateway's own name."""

    def __init__(self, clients: Clients, *, timeout: float = 10.0) -> None:
        self._clients = clients
        self._timeout = timeout

    async def get(self, file: str, headers: Mapping[str, str]) -> Feed:
        """The feed behind `<token>.ics`. Raises NotFound `LINK_UNKNOWN`, the same whatever is wrong with the link."""
        found = _FILE.fullmatch(file)
        if found is None:
            raise NotFound("LINK_UNKNOWN", "There is no such link.")
        known = _ETAG.findall(headers.get("if-none-match", ""))[:_MOST_ETAGS]
        stub = feeds_pb2_grpc.CalendarLinksServiceStub(self._clients.channel("scheduling"))
        try:
            answer: feeds_pb2.CalendarByLink = await stub.GetCalendarByLink(
                feeds_pb2.GetCalendarByLinkRequest(token=found[1], etags=known),
                timeout=self._timeout,
                metadata=self._clients.own_metadata(),
            )
        except grpc.RpcError as error:
            raise problem_from_rpc(error) from error
        sent = [*_HEADERS, (b"etag", f'"{answer.etag}"'.encode())]
        if answer.unchanged:
            return Feed(304, sent, b"")
        sent += [
            _CALENDAR,
            (b"content-disposition", b'inline; filename="visits.ics"'),
        ]
        return Feed(200, sent, answer.calendar.encode())


def as_file(answer: feeds_pb2.AppointmentCalendar) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and body of one visit to take along. The name is the service's, of no visit's words."""
    name = answer.file_name.encode("ascii", "replace").replace(b'"', b"_")
    headers = [_CALENDAR, (b"content-disposition", b'attachment; filename="' + name + b'"'), _HEADERS[1]]
    return headers, answer.calendar.encode()

"""A small client of the gateway's HTTP API that tries again what may be tried again."""

import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlencode

import httpx2
import orjson
import stamina

from system.importing.bundles import Json

_TRY_AGAIN = frozenset({408, 429, 502, 503, 504})
_LONGEST_WAIT_SECONDS = 30.0
_FIRST_ATTEMPTS = 4
_PAGE = 200


class Refused(Exception):
    """The gateway's answer that trying again doesn't change: HTTP code, reason (UPPER_SNAKE, may be empty) and message."""

    def __init__(self, code: int, reason: str, message: str, field: str = "") -> None:
        self.code, self.reason, self.said, self.field = code, reason, message, field
        self.message = message = f"{message} ({field})" if field else message
        super().__init__(f"{code} {reason}: {message}" if reason else f"{code}: {message}")


class Stopped(Exception):
    """Nothing more can go in: the gateway is away, or doesn't take the token. The message says what to do."""


class _Busy(Exception):
    def __init__(self, code: int, wait: float | None) -> None:
        self.wait = wait
        super().__init__(f"answers {code}")


class GatewayClient:
    """The API of a gateway at `url` with one token; an async context manager.

    Calls that change something carry an Idempotency-Key of their own: the same over the repetitions of one call, random for
    each call, as a key kept from an earlier run would be answered with that run's answer and write nothing. 429, 503 and the
    like and lost connections are tried again, with backoff or after the answer's Retry-After; then Stopped is raised.
    """

    def __init__(self, url: str, token: str, *, attempts: int = 10, give_up_seconds: float = 90.0) -> None:
        self._http = httpx2.AsyncClient(
            base_url=url.rstrip("/"),
            headers={"authorization": f"Bearer {token}", "accept": "application/json"},
            timeout=httpx2.Timeout(30.0, connect=5.0),
        )
        self._url, self._attempts, self._give_up = url, attempts, give_up_seconds
        self._answered = False

    async def __aenter__(self) -> Self:
        await self._http.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.__aexit__(kind, error, trace)

    async def all_of(self, path: str, name: str, filters: Mapping[str, list[str]] | None = None) -> list[Json]:
        """All items of a collection, over its pages; `name` is the list's in the answer, `filters` repeatable parameters."""
        items: list[Json] = []
        token = ""
        while True:
            parameters: dict[str, list[str]] = {**(filters or {}), "pageSize": [str(_PAGE)]}
            if token:
                parameters["pageToken"] = [token]
            page = await self._call("GET", f"{path}?{urlencode(parameters, doseq=True)}")
            items += page.get(name, [])
            token = page.get("nextPageToken", "")
            if not token:
                return items

    async def post(self, path: str, body: Json) -> Json:
        """Posts a body and gives the answer; Refused or Stopped if it doesn't go."""
        return await self._call("POST", path, body)

    async def patch(self, path: str, body: Json, etag: str) -> Json:
        """Changes the fields that stand in the body where the etag still holds."""
        return await self._call("PATCH", path, body, etag)

    async def _call(self, method: str, path: str, body: Json | None = None, etag: str = "") -> Json:
        headers: dict[str, str] = {}
        if body is not None:
            headers = {"content-type": "application/json", "idempotency-key": uuid.uuid4().hex}
        if etag:
            headers["if-match"] = etag if etag.startswith(('"', "W/")) else f'"{etag}"'
        content = orjson.dumps(body) if body is not None else None
        # Until it has answered once the likeliest cause is a wrong address, which no patience mends.
        attempts = self._attempts if self._answered else min(self._attempts, _FIRST_ATTEMPTS)
        try:
            async for attempt in stamina.retry_context(
                on=_worth_trying_again, attempts=attempts, timeout=self._give_up, wait_initial=0.2, wait_max=10.0
            ):
                with attempt:
                    response = await self._http.request(method, path, headers=headers, content=content)
                    self._answered = True
                    return _read(response)
        except httpx2.TransportError as error:
            raise Stopped(
                f"the gateway at {self._url} can't be reached ({type(error).__name__}); see that it runs"
            ) from None
        except _Busy as busy:
            raise Stopped(
                f"the gateway at {self._url} {busy} again and again; see how it is and run the import again"
            ) from None
        raise AssertionError("unreachable")


def _worth_trying_again(error: Exception) -> bool | float:
    if isinstance(error, _Busy):
        return True if error.wait is None else error.wait
    return isinstance(error, httpx2.TransportError) and not isinstance(error, httpx2.UnsupportedProtocol)


def _read(response: httpx2.Response) -> Json:
    try:
        parsed: Any = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        parsed = None
    answer: Json = parsed if isinstance(parsed, dict) else {}
    if response.is_success:
        if not isinstance(parsed, dict):
            raise Stopped("what answers there is no gateway of this system; give its address by --url or CARE_URL")
        return answer
    error = answer.get("error")
    error = error if isinstance(error, dict) else {}
    details = [detail for detail in error.get("details", []) if isinstance(detail, dict)]
    reason = next((str(detail["reason"]) for detail in details if "reason" in detail), "")
    code = response.status_code
    if code in _TRY_AGAIN or reason == "IN_PROGRESS":
        after = response.headers.get("retry-after", "")
        raise _Busy(code, min(float(after), _LONGEST_WAIT_SECONDS) if after.isdecimal() else None)
    message = str(error.get("message") or "no reason given")
    metadata: Json = next((detail["metadata"] for detail in details if isinstance(detail.get("metadata"), dict)), {})
    field = metadata.get("field")
    field = field if isinstance(field, str) else ""
    if code == 401:
        raise Stopped("the gateway does not take the token; give a valid one by --token or CARE_TOKEN")
    if code == 403:
        raise Stopped(f"the token may not import ({message}); use one of a role that may")
    raise Refused(code, reason, message, field)

"""Providers of video rooms: Daily's REST interface, and one for development that has no rooms at all."""

from datetime import datetime
from types import TracebackType
from typing import Protocol, Self

import httpx2

from services.scheduling.settings import SchedulingSettings


class RoomRefused(Exception):
    """The provider did not do it; `args[0]` is a number or word of ours, never its own words."""


class VideoProvider(Protocol):
    """Makes and closes rooms; both may be asked for again. Raises RoomRefused."""

    async def create(self, name: str, opens: datetime, closes: datetime) -> str: ...

    async def end(self, name: str) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def provider(settings: SchedulingSettings) -> VideoProvider | None:
    """The configured one."""
    if settings.video_provider == "daily":
        return Daily(settings)
    return MadeUp() if settings.video_provider == "development" else None


class MadeUp:
    """Links that lead nowhere and say so, for a machine without an account; refused in production."""

    async def create(self, name: str, opens: datetime, closes: datetime) -> str:
        """A link at a host that can't exist."""
        return f"https://development-only.invalid/no-video-here/{name}"

    async def end(self, name: str) -> None:
        """Nothing was there."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        return None


class Daily:
    """`POST /rooms`, `GET /rooms/:name`, `DELETE /rooms/:name` with a bearer key (docs.daily.co/reference/rest-api).

    Rooms have 128-bit random names and let in from `nbf` until `exp`, when everybody is put out.
    """

    def __init__(self, settings: SchedulingSettings) -> None:
        self._client = httpx2.AsyncClient(
            base_url=settings.video_url.rstrip("/"),
            headers={"authorization": f"Bearer {settings.video_key}"},
            timeout=settings.video_timeout,
            trust_env=False,
        )

    async def create(self, name: str, opens: datetime, closes: datetime) -> str:
        """The room's address; that of the room that a former try has made, where its answer was lost."""
        properties = {"nbf": int(opens.timestamp()), "exp": int(closes.timestamp()), "eject_at_room_exp": True}
        answer = await self._ask("POST", "/rooms", {"name": name, "privacy": "public", "properties": properties})
        if answer.status_code == 400:  # it has one of this name, or something is wrong with the request
            answer = await self._ask("GET", f"/rooms/{name}")
        found = _said(answer)
        url = found.get("url")
        if not isinstance(url, str) or not url.startswith("https://") or found.get("name") != name:
            raise RoomRefused("unexpected-answer")
        return url

    async def end(self, name: str) -> None:
        """Close a room; one that isn't there is closed."""
        answer = await self._ask("DELETE", f"/rooms/{name}")
        if answer.status_code != 404:
            _said(answer)

    async def _ask(self, method: str, path: str, body: object = None) -> httpx2.Response:
        try:
            return await self._client.request(method, path, json=body)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise RoomRefused(type(error).__name__) from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._client.aclose()


def _said(answer: httpx2.Response) -> dict[str, object]:
    if answer.status_code >= 300:
        raise RoomRefused(f"http-{answer.status_code}")
    try:
        said = answer.json()
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise RoomRefused("unexpected-answer")
    return said

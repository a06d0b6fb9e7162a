"""A client of the whole system for journeys: HTTP, waiting for what events bring, and the mailbox."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2

from system.run import System

Json = dict[str, Any]


class Refused(AssertionError):
    """An answer that is no success."""

    def __init__(self, response: httpx2.Response) -> None:
        self.status = response.status_code
        self.body = response.json() if "json" in response.headers.get("content-type", "") else {}
        error = self.body.get("error", {})
        details = error.get("details") or [{}]
        self.reason = details[0].get("reason", "")
        super().__init__(f"{response.request.method} {response.request.url.path}: {self.status} {error}")


class User:
    """One signed-in user over HTTP."""

    def __init__(self, url: str, token: str) -> None:
        self.http = httpx2.AsyncClient(
            base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=15, trust_env=False
        )

    async def request(self, method: str, path: str, body: Any = None, **headers: str) -> httpx2.Response:
        """The answer as it is."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.http.request(method, path, json=body, headers=named)

    async def get(self, path: str, **query: Any) -> Json:
        """A success's body. Raises Refused."""
        answer = await self.http.get(path, params=query)
        return _success(answer)

    async def post(self, path: str, body: Any = None, **headers: str) -> Json:
        """A success's body. Raises Refused."""
        return _success(await self.request("POST", path, {} if body is None else body, **headers))

    async def patch(self, path: str, body: Any, etag: str) -> Json:
        """A success's body. Raises Refused."""
        return _success(await self.request("PATCH", path, body, if_match=etag))

    async def close(self) -> None:
        """Close the connections."""
        await self.http.aclose()


def _success(answer: httpx2.Response) -> Json:
    if answer.status_code != 200:
        raise Refused(answer)
    body: Json = answer.json()
    return body


class World:
    """A running system and its users."""

    def __init__(self, system: System) -> None:
        self.system = system
        self._users: dict[str, User] = {}

    def user(self, role: str = "", *, subject: str = "") -> User:
        """The sample staff member of a role, or any login."""
        key = role or subject
        if key not in self._users:
            token = self.system.token(role) if role else self.system.token(subject=subject)
            self._users[key] = User(self.system.url, token)
        return self._users[key]

    async def close(self) -> None:
        """Close all users' connections."""
        for user in self._users.values():
            await user.close()


async def until(
    question: Callable[[], Awaitable[Any]], holds: Callable[[Any], Any] = bool, *, within: float = 20.0
) -> Any:
    """Ask until the answer holds; what events bring takes a moment. Fails with the last answer."""
    end = time.monotonic() + within
    while True:
        try:
            answer: Any = await question()
        except Refused as refused:
            answer = refused
        if not isinstance(answer, Refused) and holds(answer):
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"still not so after {within} s: {answer!r:.2000}")
        await asyncio.sleep(0.1)

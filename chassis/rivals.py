"""Rivals for what only one of them can have: they queue in the process, and most are refused without a transaction.

A queue decides nothing: whether the thing is gone, each looks up for itself, in one of the reads that all who wait share.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from chassis.errors import Problem

if TYPE_CHECKING:
    from chassis.call import Call

F = TypeVar("F", bound=Callable[..., Any])
Look = Callable[[], Awaitable[None]]


@dataclass(frozen=True)
class Contest:
    """What calls compete for. Decorates the methods that do."""

    wanted: Callable[[Any, "Call"], Hashable | None]
    """What a request wants, known without the database; None where it waits for nobody."""
    look: Callable[[Any, "Call", Any], Awaitable[None]]
    """(request, call as of a read, wanted): raises where the thing is gone now, as the method would, or what comes first."""
    gone: str
    """Reason of the refusal."""

    def __call__(self, method: F) -> F:
        method.contest = self  # type: ignore[attr-defined]
        return method


class _Line:
    """All calls that want one thing: at most one at work, others waiting for it or just looking."""

    def __init__(self) -> None:
        self.here = 0
        self.busy = False
        self.doubtful = False  # somebody at work has found the thing to be had, or gone
        self.waiting: dict[asyncio.Future[bool], None] = {}

    async def change(self) -> bool:
        """Wait until the one at work has ended; whether the thing may be gone since."""
        called: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.waiting[called] = None
        try:
            return await called
        finally:
            del self.waiting[called]

    def call(self, *, gone: bool) -> None:
        """Wake all who wait, to look; or the next one, to work."""
        for one in list(self.waiting) if gone else list(self.waiting)[:1]:
            if not one.done():
                one.set_result(gone)


class Rivals:
    """One service's queues, each kept only while somebody stands in it."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._lines: dict[Hashable, _Line] = {}

    @contextlib.asynccontextmanager
    async def turn(self, wanted: Hashable, look: Look, gone: str) -> AsyncIterator[None]:
        """Wait while another is at work; after `patience` seconds go on regardless, since the database decides.

        Raises what `look` raises, which is asked where another has been answered, or refused for the reason `gone`, since
        the line began: so all that a request must be before it can be `gone` has been checked for one that wants the same.
        """
        line = self._lines.setdefault(wanted, _Line())
        line.here += 1
        at_work = ended = False
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._patience):
                    doubt = line.doubtful and not line.busy
                    while doubt or line.busy:
                        if doubt:
                            await look()
                        doubt = line.busy and await line.change()
            at_work, line.busy = not line.busy, True
            try:
                yield
                ended = at_work
            except Problem as problem:
                ended = at_work and problem.reason == gone
                raise
        finally:
            line.here -= 1
            if at_work:
                line.busy = False
                line.doubtful |= ended
            # Also where this one was called and could not go: whoever is next must not wait for ever.
            if not line.busy:
                line.call(gone=ended)
            if not line.here:
                del self._lines[wanted]

"""Work that falls due: loops that look for it, safe at any number of replicas."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, TypeVar

from prometheus_client import Counter, Histogram
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from chassis.model import Aggregate

if TYPE_CHECKING:
    from chassis.pipeline import Runtime

A = TypeVar("A", bound=Aggregate)


class Loop:
    """Runs `work(runtime)` until it finds nothing more, then waits `every` seconds or for `wake`.

    `every` is a number or made of the service's settings. `work` answers how many things it did. What it raises is logged
    by type, once as long as it stays the same, and tried again; a loop never ends by itself.
    """

    def __init__(
        self, name: str, work: "Callable[[Runtime], Awaitable[int]]", *, every: float | Callable[[Any], float] = 1.0
    ) -> None:
        self.name = name
        self._work = work
        self._every = every

    def start(self, runtime: "Runtime") -> "RunningLoop":
        """Begin to run in a task."""
        every = self._every(runtime.settings) if callable(self._every) else self._every
        return RunningLoop(self.name, self._work, every, runtime)


class RunningLoop:
    """A loop at work."""

    def __init__(
        self, name: str, work: "Callable[[Runtime], Awaitable[int]]", every: float, runtime: "Runtime"
    ) -> None:
        self._woken = asyncio.Event()
        self._stopping = False
        self._name, self._work, self._every, self._runtime = name, work, every, runtime
        self._task = asyncio.create_task(self._run(), name=f"loop {name}")

    def wake(self) -> None:
        """Something may be due now."""
        self._woken.set()

    def more(self, done: int) -> bool:
        """Whether something may be left after a round that did so much."""
        return done > 0

    async def stop(self, timeout: float = 8.0) -> None:
        """Let the round in hand end."""
        self._stopping = True
        self._woken.set()
        await asyncio.wait({self._task}, timeout=timeout)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        metrics, log = self._runtime.loop_metrics, self._runtime.telemetry.log
        trouble = ""
        while not self._stopping:
            self._woken.clear()
            more = False
            try:
                done = await self._work(self._runtime)
                metrics.done.labels(self._name).inc(done)
                more, trouble = self.more(done), ""
            except Exception as error:  # a database or service that is away: what is due stays due
                kind = type(error).__name__
                metrics.failed.labels(self._name, kind).inc()
                if kind != trouble:
                    log.warning("timer waits, trying again", loop=self._name, exc_info=error)
                trouble = kind
            if not more and not self._stopping:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._woken.wait(), self._every)


class LoopMetrics:
    """Counts of all loops of a service."""

    def __init__(self, registry: Any) -> None:
        self.done = Counter("care_timer_done", "Things that fell due and were done.", ("loop",), registry=registry)
        self.failed = Counter("care_timer_failures", "Rounds to be tried again.", ("loop", "error"), registry=registry)
        self.lateness = Histogram(
            "care_timer_lateness_seconds",
            "How long after its due time a thing was done.",
            ("loop",),
            buckets=(0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 300, 900, 3600),
            registry=registry,
        )


async def due(db: AsyncSession, model: type[A], column: Any, *where: ColumnElement[bool], limit: int = 100) -> list[A]:
    """Rows whose `column` is past on the database's clock, first due first, locked for this transaction.

    Rows that another replica has in hand are passed over (SKIP LOCKED). Change them so that they are no longer due, in
    this very transaction.
    """
    query = (
        select(model)
        # As a subquery it is asked once; a volatile function in the condition would read the whole index at each look.
        .where(column <= select(func.clock_timestamp()).scalar_subquery(), *where)
        .order_by(column)
        .limit(limit)
        .with_for_update(skip_locked=True, of=model, key_share=True)
    )
    return list((await db.execute(query)).scalars())


def wake_after_commit(db: AsyncSession, loop: str) -> None:
    """Wake a loop of this service once this transaction is committed."""
    running = db.info["runtime"].loops.get(loop)
    if running is not None:
        db.info.setdefault("wakes", {})[loop] = running.wake

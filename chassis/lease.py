"""A lease row with an epoch: one process at a time does a thing, judged by the database's clock."""

import time
import uuid

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

_TAKE = text(
    "INSERT INTO lease AS l (name, owner, epoch, until)"
    " VALUES (:name, :owner, 1, clock_timestamp() + :ttl * interval '1 second')"
    " ON CONFLICT (name) DO UPDATE SET owner = excluded.owner, until = excluded.until,"
    " epoch = l.epoch + CASE WHEN l.owner = excluded.owner AND l.until > clock_timestamp() THEN 0 ELSE 1 END"
    " WHERE l.owner = excluded.owner OR l.until < clock_timestamp() RETURNING epoch"
)
_GIVE_UP = text("UPDATE lease SET until = clock_timestamp() WHERE name = :name AND owner = :owner AND epoch = :epoch")


class Lease:
    """The right to do `name`, kept `ttl` seconds beyond the last time that the database confirmed it.

    A session advisory lock would not fence: a stopped process keeps it, and a dropped connection lets two work. So
    whoever acts asks `hold()` right before, which believes its own memory for a third of the `ttl` only; the other
    two thirds are the room for what was begun.
    """

    def __init__(self, engine: AsyncEngine, name: str, *, ttl: float = 10.0) -> None:
        # Single statements: AUTOCOMMIT saves two round trips each.
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._name = name
        self._ttl = ttl
        self.owner = uuid.uuid4()
        self.epoch: int | None = None
        self._confirmed_at = float("-inf")

    @property
    def fresh(self) -> bool:
        """Whether the last confirmation is young enough to act on."""
        return self.epoch is not None and time.monotonic() - self._confirmed_at < self._ttl / 3

    @property
    def stands(self) -> bool:
        """Whether it can't have ended yet, by our own clock: for the very moment of acting, without asking."""
        return self.epoch is not None and time.monotonic() - self._confirmed_at < self._ttl * 0.8

    @property
    def retry_after(self) -> float:
        """Seconds after which another try, or a renewal, is due."""
        return self._ttl / 3

    async def hold(self) -> bool:
        """Whether this process holds the lease now; asks the database unless it was confirmed a moment ago."""
        while not self.fresh:
            asked_at = time.monotonic()  # before asking: the round trip counts against us
            async with self._engine.connect() as connection:
                row = (
                    await connection.execute(_TAKE, {"name": self._name, "owner": self.owner, "ttl": float(self._ttl)})
                ).first()
            self.epoch = int(row.epoch) if row is not None else None
            self._confirmed_at = asked_at
            if row is None:
                return False
        return True

    async def release(self) -> None:
        """Let another process take over at once."""
        epoch, self.epoch = self.epoch, None
        if epoch is not None:
            async with self._engine.connect() as connection:
                await connection.execute(_GIVE_UP, {"name": self._name, "owner": self.owner, "epoch": epoch})

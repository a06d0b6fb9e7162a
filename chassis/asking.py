"""What a method must learn before it goes on: of another service, outside the transaction, or on the way of a statement."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from sqlalchemy import TextClause

Key = tuple[str, str]
"""What is asked (a name in the service's `asks`) and about whom or what."""
Known = dict[Key, Any]
"""What was asked so far for one request."""
Ask = Callable[[Any, str, str], Awaitable[Any]]
"""(runtime, tenant id, about whom or what): calls the other service; raises Problem."""


class NeedFact(Exception):
    """The method can't go on without it. An RPC inside the transaction would hold its connection and its locks."""

    def __init__(self, key: Key) -> None:
        super().__init__()
        self.key = key


def fact(known: Known, key: Key) -> Any:
    """What is known under a key. Raises NeedFact the first time; the second time it is there."""
    if key not in known:
        raise NeedFact(key)
    return known[key]


class Sight(NamedTuple):
    """Whether the caller may see a patient's record, asked by a statement that asks more: a round trip fewer than `Call.subject`.

    The statement answers `condition`, with `values` beside its own ones, and the answer goes to `check` before anything
    else of it is looked at.
    """

    condition: TextClause
    values: Mapping[str, Any]
    """`tenant` and `patient` among them."""
    unseen: Exception

    def check(self, seen: bool) -> None:
        """Raises NotFound, in the end."""
        if not seen:
            raise self.unseen

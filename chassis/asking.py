"""What only another service knows: asked with a deadline outside the transaction, whereupon the method begins anew."""

from collections.abc import Awaitable, Callable
from typing import Any

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

"""A pytest plugin for lanes side by side (`-n 2`): a folder's tests stay in one lane, and some run while the other lanes wait."""

from __future__ import annotations

import fcntl
import tempfile
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

SECONDS = {"alone": 1000.0, "slow": 20.0, "integration": 3.0, "kafka": 1.5, "postgres": 0.5}
"""About how long a test with such a mark takes; one with none of them takes next to nothing.

What runs alone counts more than all else: it comes first, while no other lane has servers in its process that would stand still.
"""
LOCKS = pytest.StashKey[str]()


def folder(item: str) -> str:
    """Where a test lies. A folder's tests share servers, worlds and what they import."""
    return item.partition("::")[0].rpartition("/")[0]


def is_alone(item: pytest.Item) -> bool:
    """Whether it needs both cores, and longer than it may beside others."""
    return item.get_closest_marker("alone") is not None


class Lane:
    """What the process of one lane does."""

    def __init__(self, locks: Path) -> None:
        self._gate = open(locks / "gate", "w")
        self._room = open(locks / "room", "w")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """The longest folders first, lest one lane be idle in the end; in each, what runs alone before it starts servers."""
        seconds: dict[str, float] = defaultdict(float)
        for item in items:
            seconds[folder(item.nodeid)] += max(
                (SECONDS.get(mark.name, 0.0) for mark in item.iter_markers()), default=0.0
            )
        items.sort(key=lambda item: (-seconds[folder(item.nodeid)], folder(item.nodeid), not is_alone(item)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        """Who is to be alone keeps the gate shut until the room is empty: else small tests could go in and out for ever."""
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        fcntl.flock(self._room, fcntl.LOCK_EX if is_alone(item) else fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        try:
            return (yield)
        finally:
            fcntl.flock(self._room, fcntl.LOCK_UN)


def pytest_configure(config: pytest.Config) -> None:
    """Does nothing without lanes."""
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Lane(Path(config.workerinput["locks"])), "lane")
    elif config.getoption("numprocesses", None):
        locks = tempfile.TemporaryDirectory(prefix="care-lanes-")
        config.add_cleanup(locks.cleanup)
        config.stash[LOCKS] = locks.name


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tells each lane where the locks are."""
    node.workerinput["locks"] = node.config.stash[LOCKS]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hands out whole folders in the order in which the lanes put them."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return folder(nodeid)

    config.option.loadscopereorder = False
    return ByFolder(config, log)

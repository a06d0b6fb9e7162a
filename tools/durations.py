"""A pytest plugin that prints how long each test file took."""

from __future__ import annotations

from collections import defaultdict

import pytest


class Durations:
    """Adds up setup, call and teardown by file."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.tests: dict[str, int] = defaultdict(int)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        path = report.nodeid.split("::", 1)[0]
        self.seconds[path] += report.duration
        self.tests[path] += report.when == "call"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if len(self.seconds) < 2:
            return
        terminalreporter.section("seconds by file")
        for path, seconds in sorted(self.seconds.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{seconds:8.1f}  {path} ({self.tests[path]})")


def pytest_configure(config: pytest.Config) -> None:
    """Registers the plugin's state with this run only."""
    config.pluginmanager.register(Durations(), "durations by file")

"""Whole systems for the journeys, one per way of running, until the last journey is over."""

import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from chassis.testing.otlp import OtlpReceiver
from system.run import System

# What a clinic waits for hours, a test must not; and another lane may have the machine while a leg is under way.
SHORT: dict[str, dict[str, Any]] = {
    "gateway": {"leg_timeout": 4.0},
    "scheduling": {"no_show_grace": 0.0, "offers_from": "00:00", "offers_until": "00:00"},
    "feedback": {"survey_delay": 1.0, "survey_pause": 0.0},
}


@pytest.fixture(scope="package")
async def otlp() -> AsyncIterator[OtlpReceiver]:
    """Receives the spans of the system with Kafka."""
    async with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="package")
async def systems(otlp: OtlpReceiver) -> AsyncIterator[Callable[..., Awaitable[System]]]:
    """`await systems(kafka=True)`: a running system with the sample in it, the same one for all journeys."""
    running: dict[bool, System] = {}

    async def running_system(*, kafka: bool) -> System:
        if kafka not in running:
            folder = Path(tempfile.mkdtemp(prefix="care-system-"))
            overrides = {**SHORT, "*": {"otlp_endpoint": otlp.endpoint}} if kafka else SHORT
            system = System(folder, 0, kafka=kafka, overrides=overrides, durable=False)
            await system.start()
            running[kafka] = system
        return running[kafka]

    yield running_system
    for system in running.values():
        await system.stop()

"""`python -m services.<name> [migrate]`: one service as a process of its own."""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import uvloop

from chassis import migrations
from chassis.bus import Bus
from chassis.garbage import calm_collector
from chassis.service import Server, Service
from chassis.settings import Settings
from chassis.telemetry import install_log_guard


def run(service: Service, migrated: Callable[[str], Awaitable[None]] | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `migrate` brings the schema up and ends instead.

    `migrated(database_url)` then brings up what a release ships as rows.
    """
    arguments = sys.argv[1:]
    if arguments not in ([], ["migrate"]):
        sys.exit(f"usage: python -m services.{service.name} [migrate]")
    settings = service.settings()
    if arguments:
        uvloop.run(_migrate(service, settings, migrated))
        return
    install_log_guard(service=service.name)
    uvloop.run(_serve(service, settings))


async def _migrate(service: Service, settings: Settings, migrated: Callable[[str], Awaitable[None]] | None) -> None:
    await migrations.upgrade(settings.database_url, service.migrations, service.base.metadata)
    if migrated is not None:
        await migrated(settings.database_url)


def bus_of(settings: Settings) -> Bus:
    """The bus that the settings name: Kafka, or the embedded one."""
    if settings.kafka is not None:
        from chassis.bus.kafka import KafkaBus

        return KafkaBus(
            settings.kafka.bootstrap,
            security=_security(settings.kafka.options),
            replication_factor=settings.kafka.replication_factor,
            topic_configs=settings.kafka.topic_configs,
        )
    if settings.bus_url is None:
        raise SystemExit("Set CARE_KAFKA__BOOTSTRAP (or CARE_BUS_URL for the embedded bus).")
    from chassis.bus.postgres import PostgresBus

    return PostgresBus(settings.bus_url)


def _security(options: Mapping[str, str]) -> dict[str, Any]:
    """aiokafka's own option names; `ssl_cafile`, `ssl_certfile` and `ssl_keyfile` become its ssl_context."""
    from aiokafka.helpers import create_ssl_context

    passed: dict[str, Any] = {name: value for name, value in options.items() if not name.startswith("ssl_")}
    if "SSL" in options.get("security_protocol", ""):
        passed["ssl_context"] = create_ssl_context(
            cafile=options.get("ssl_cafile"),
            certfile=options.get("ssl_certfile"),
            keyfile=options.get("ssl_keyfile"),
            password=options.get("ssl_password"),
        )
    return passed


async def _serve(service: Service, settings: Settings) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    server = Server(service, settings, bus_of(settings))
    starting = asyncio.create_task(server.start())
    waiting = asyncio.create_task(stopped.wait())
    await asyncio.wait({starting, waiting}, return_when=asyncio.FIRST_COMPLETED)
    if starting.done() and starting.exception() is not None:
        waiting.cancel()
        starting.result()
    calm_collector()
    await waiting
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await server.stop()
    await server.bus.stop()

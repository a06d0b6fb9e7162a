"""The gateway with the development mailbox's page beside it: in our own loop, or as a process (`python -m system.gateway`)."""

import asyncio
import os
import signal
from pathlib import Path

from chassis.auth import Credential, Verifier
from chassis.clients import Clients
from chassis.garbage import calm_collector
from chassis.service import package_version
from chassis.telemetry import Telemetry, install_log_guard
from gateway.app import create_app
from gateway.serving import GatewayServer
from gateway.settings import GatewaySettings
from system import mailbox
from system.issuer import forbid_production


class DevelopmentGateway:
    """A gateway that listens, with `/dev/mailbox`: `start`, then `stop` once. NotInProduction when it is made there."""

    def __init__(self, settings: GatewaySettings, telemetry: Telemetry, mailbox_file: Path) -> None:
        forbid_production("the development mailbox", settings.environment)
        self.telemetry = telemetry
        self._clients = Clients(settings.peers, Credential("gateway", settings.service_key_file), telemetry)
        verifier = Verifier(settings.issuers, service_keys_file=settings.service_keys_file, cache=settings.token_cache)
        self.app = create_app(
            settings,
            verifier,
            self._clients,
            telemetry,
            version=package_version(),
            mounts={mailbox.PAGE: mailbox.page(mailbox_file)},
        )
        self.server = GatewayServer(self.app)

    async def start(self) -> None:
        """Returns when connections are accepted."""
        await self.server.start()
        self.telemetry.log.info("serving", port=self.server.port)

    async def stop(self) -> None:
        """Lets what is under way finish."""
        await self.server.stop()
        await self._clients.close()
        await self.telemetry.shutdown(timeout=1)


async def _serve(settings: GatewaySettings, mailbox_file: Path) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    telemetry = Telemetry.create(
        "gateway",
        otlp_endpoint=settings.otlp_endpoint,
        environment=settings.environment,
        version=package_version(),
    )
    served = DevelopmentGateway(settings, telemetry, mailbox_file)
    watching = telemetry.watch_loop()
    await served.start()
    calm_collector()
    ended, waiting = asyncio.create_task(served.server.ended()), asyncio.create_task(stopped.wait())
    await asyncio.wait((ended, waiting), return_when=asyncio.FIRST_COMPLETED)
    for task in (waiting, watching):
        task.cancel()
    await served.stop()
    ended.cancel()


if __name__ == "__main__":
    import uvloop

    install_log_guard(service="gateway")
    uvloop.run(_serve(GatewaySettings(), Path(os.environ["CARE_MAILBOX_FILE"])))

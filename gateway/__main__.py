"""`python -m gateway`: the gateway as a process of its own."""

import uvloop

from chassis.telemetry import install_log_guard
from gateway.serving import serve
from gateway.settings import GatewaySettings

if __name__ == "__main__":
    install_log_guard(service="gateway")
    uvloop.run(serve(GatewaySettings()))

"""A worker on clearings in a process of its own, to be killed: it works off what it finds and says each thing done."""

import asyncio
import json
import sys

from chassis.bus.postgres import PostgresBus
from chassis.service import Server
from chassis.telemetry import Telemetry
from services.scheduling.clearing_work import _see_to_one
from services.scheduling.service import SERVICE
from services.scheduling.settings import SchedulingSettings


async def main() -> None:
    values = json.loads(sys.argv[1])
    telemetry = Telemetry.create("scheduling", otlp_endpoint=None, environment="test", version="0")
    server = Server(SERVICE, SchedulingSettings(**values), PostgresBus(values["bus"]), telemetry=telemetry)
    while True:
        if await _see_to_one(server.runtime):
            print("done", flush=True)
        else:
            await asyncio.sleep(0.05)


if __name__ == "__main__":
    asyncio.run(main())

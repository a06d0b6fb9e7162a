"""CPU that the system's processes have used, by group."""

import asyncio
from contextlib import suppress

import psutil

from system.run import System
from system.topology import GATEWAY

GROUPS = ("gateway", "services", "postgres", "kafka")


def used(system: System, gateway_pid: int | None = None) -> dict[str, float]:
    """CPU seconds so far, user and system. `gateway_pid`: of another gateway than the system's own."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    for name in system.plan.instances:
        if (pid := system.pid(name)) is not None:
            if name == GATEWAY.name:
                seconds["gateway"] += _of(gateway_pid or pid)
            else:
                seconds["services"] += _of(pid)
    if (pid := system.pid("kafka")) is not None:
        seconds["kafka"] += _of(pid)
    if (pid := system.pid("postgres")) is not None:
        server = psutil.Process(pid)
        times = server.cpu_times()
        # What has ended and was collected counts with its parent.
        seconds["postgres"] += times.user + times.system + times.children_user + times.children_system
        seconds["postgres"] += sum(_of(child.pid) for child in server.children())
    return seconds


def per_service(system: System) -> dict[str, float]:
    """CPU seconds so far of each workload's process."""
    return {name: _of(pid) for name in system.plan.instances if (pid := system.pid(name)) is not None}


def _of(pid: int) -> float:
    with suppress(psutil.Error):
        times = psutil.Process(pid).cpu_times()
        return float(times.user + times.system)
    return 0.0


async def settled(system: System, within: float = 30.0) -> float:
    """Wait until what the load set off is done; answers the seconds that it took."""
    waited, calm = 0.0, 0
    before = sum(used(system).values())
    while waited < within and calm < 2:
        await asyncio.sleep(0.5)
        waited += 0.5
        now = sum(used(system).values())
        calm = calm + 1 if now - before < 0.15 else 0
        before = now
    return waited

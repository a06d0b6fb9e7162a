"""The service once more, as a process of its own on the same database and bus: a second replica, or one to be killed."""

import asyncio
import json
import os
import random
import socket
import sys
from contextlib import asynccontextmanager

import grpc


def seeded():
    """The seed of a run, printed: CARE_SEED repeats one."""
    seed = int(os.environ.get("CARE_SEED") or random.randrange(1 << 30))
    print(f"\nCARE_SEED={seed}")
    return seed


async def another(harness, bus_url, port=0, **settings):
    """The process of it, which is on its way up."""
    known = harness.servers["scheduling"].settings
    values = {
        "database_url": known.database_url,
        "bus_url": bus_url,
        "signing_secret": "test",
        "environment": "test",
        "service_key_file": str(known.service_key_file),
        "service_keys_file": str(known.service_keys_file),
        "audit_checkpoint_file": str(known.audit_checkpoint_file),
        "issuers": [each.model_dump(mode="json", exclude_none=True) for each in known.issuers],
        "principal_cache": 60.0,
        "max_connection_age": 3600.0,
        "port": port,
        "health_port": 0,
        "metrics_port": 0,
        **settings,
    }
    environment = {
        f"CARE_{name.upper()}": value if isinstance(value, str) else json.dumps(value) for name, value in values.items()
    }
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.scheduling",
        env={**os.environ, "PYTHONPATH": ".:gen", **environment},
        stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip


@asynccontextmanager
async def two_replicas(desk):
    """The desk's calls go to the service and to another process of it in turn; answers that process."""
    harness, port = desk.harness, free_port()
    process = await another(harness, desk.bus_url, port)
    hosts = f"ipv4:127.0.0.1:{harness.servers['scheduling'].port},127.0.0.1:{port}"
    before = harness._channels.get("scheduling")
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel, asyncio.timeout(30):
            await channel.channel_ready()
        async with grpc.aio.insecure_channel(hosts, options=[("grpc.lb_policy_name", "round_robin")]) as both:
            harness._channels["scheduling"] = both
            yield process
    finally:
        harness._channels.pop("scheduling", None)
        if before is not None:
            harness._channels["scheduling"] = before
        await kill(process)


async def kill(process):
    """End a process without a word, as a machine that fails does."""
    if process.returncode is None:
        process.kill()
    await process.wait()


def free_port():
    """A port that nobody has at this moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]

"""A process that dies between the beginning of a call and its outcome."""

import asyncio
import json
import os
import signal
import sys

import pytest


@pytest.mark.slow
async def test_a_call_that_a_killed_process_had_begun_is_unknown_and_never_repeated(a_world):
    world = await a_world(send_lease=2.0)
    clinic, kind = await world.clinic(), await world.visit_type()
    patient_id, number, address = await world.patient()
    settings = world.server.settings
    await world.server.stop()  # from here on the other process works on this database
    values = {
        **world.settings,
        "database_url": settings.database_url,
        "bus_url": world.urls["bus"],
        "signing_secret": "test",
        "environment": "test",
        "service_key_file": str(settings.service_key_file),
        "service_keys_file": str(settings.service_keys_file),
        "issuers": [each.model_dump(mode="json", exclude_none=True) for each in settings.issuers],
        "port": 0,
        "health_port": 0,
        "metrics_port": 0,
    }
    environment = {
        f"CARE_{name.upper()}": value if isinstance(value, str) else json.dumps(value) for name, value in values.items()
    }
    world.sms.faults.append(("slow", 30))
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.notifications",
        env={**os.environ, "PYTHONPATH": ".:gen", **environment}, stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        visit = await world.visit(patient_id, clinic, kind)
        for _ in range(1200):
            if world.sms.texts(number):
                break
            await asyncio.sleep(0.05)
        assert len(world.sms.texts(number)) == 1
    finally:
        process.send_signal(signal.SIGKILL)
        await process.wait()
    heir = world.harness.build(world.server.service, settings.database_url, **world.settings)
    await world.harness.hear_patients(heir)
    world.harness.servers["notifications"] = world.server = heir
    await heir.start()
    message = await world.message(visit.id, "UNKNOWN")
    assert [(one.number, one.outcome, one.error_code) for one in message.attempts] == [(1, "unknown", "lease-expired")]
    await asyncio.sleep(1.0)
    assert len(world.sms.texts(number)) == 1 and not world.mail.to(address)
    assert [event.type for event in await world.told(message.id)] == ["message.unknown"]

"""The whole system comes up, both ways, with its sample; it survives kill -9 and ends when it is told to."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import care
import httpx2
import pytest
import pytest_asyncio

from system import sample, topology
from system.cli import make_login
from system.doctor import examine
from system.issuer import ROLES
from system.process import ServerFailed
from system.run import System
from system.topology import NODES

TOOK: list[float] = []
ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.integration, pytest.mark.postgres]


class Caller:
    def __init__(self, url, token):
        self.http = httpx2.AsyncClient(base_url=url, headers={"authorization": f"Bearer {token}"}, timeout=10)

    async def get(self, path, **parameters):
        answer = await self.http.get(path, params=parameters)
        assert answer.status_code == 200, answer.text
        return answer.json()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def system(tmp_path_factory):
    running = System(tmp_path_factory.mktemp("system"), 0, durable=False)
    began = time.process_time()
    await running.start()
    TOOK.append(time.process_time() - began)
    yield running
    await running.stop()


@pytest.fixture
def coordinator(system):
    return Caller(system.url, system.token("coordinator"))


async def test_the_sample_is_there_soon_after_the_first_start(system, coordinator):
    assert TOOK[0] < 30, "CPU seconds; other tests may share the machine"
    clinics = (await coordinator.get("/v1/clinics"))["clinics"]
    assert {each["timeZone"] for each in clinics} == {"America/New_York", "America/Chicago", "America/Phoenix"}
    assert len((await coordinator.get("/v1/practitioners"))["practitioners"]) == 9
    assert len((await coordinator.get("/v1/visitTypes"))["visitTypes"]) == 9
    patients = (await coordinator.get("/v1/patients", pageSize=100))["patients"]
    assert len(patients) == 30
    booked = (await coordinator.get("/v1/appointments", pageSize=200))["appointments"]
    assert len([each for each in booked if each["status"] == "BOOKED"]) >= 40
    consents = await coordinator.get("/v1/consents", patientId=patients[0]["id"])
    assert consents["consents"]
    assert {each["purpose"] for each in (await coordinator.get("/v1/pools"))["pools"]} == {
        "coordination", "referrals", "urgent", "privacy",
    }  # fmt: skip


async def test_the_sample_has_something_to_look_at_of_each_part_of_scheduling(system, coordinator):
    manager = Caller(system.url, system.token("manager"))
    clinics = (await coordinator.get("/v1/clinics"))["clinics"]
    (first,) = [each["id"] for each in clinics if each["name"].startswith("Riverbend")]
    (series,) = (await coordinator.get("/v1/series"))["series"]
    visits = (await coordinator.get("/v1/appointments", pageSize=200))["appointments"]
    assert len([each for each in visits if each.get("seriesId") == series["id"]]) == 4
    assert any(each.get("modality") == "VIDEO" for each in visits)
    (session,) = (await coordinator.get("/v1/sessions", clinicIds=first))["sessions"]
    assert (session["enrolled"], session["waiting"]) == (3, 1)
    assert (await coordinator.get("/v1/calendarFeeds"))["calendarFeeds"]
    assert (await coordinator.get("/v1/waitlistEntries"))["waitlistEntries"]
    assert (await coordinator.get("/v1/schedulingRequests"))["schedulingRequests"]
    rows = (await manager.get("/v1/measures:thirdNextAvailable", clinicId=first))["rows"]
    assert len(rows) >= 6 and all(each["practitioners"] for each in rows)
    board = await coordinator.get(f"/v1/clinics/{first}/dayBoard")
    here = [each["status"] for column in board["columns"] for each in column.get("visits", [])]
    # None on a holiday, on which nobody is at the clinic.
    assert "CHECKED_IN" in here or not here
    resources = (await coordinator.get("/v1/resources", clinicIds=first))["resources"]
    assert {"interpreter", "gym", "ultrasound"} <= {each["kind"] for each in resources if each.get("weeklyHours")}
    schedules = (await coordinator.get("/v1/schedules"))["schedules"]
    assert any(block.get("releaseHours") for each in schedules for block in each["weeklyHours"])
    assert any(each.get("exceptions") for each in schedules), "a day is cleared"


async def test_loading_the_sample_again_changes_nothing(system, coordinator):
    before = (await coordinator.get("/v1/appointments", pageSize=200))["appointments"]
    assert await sample.load(system.url, system.token) is False
    assert (await coordinator.get("/v1/appointments", pageSize=200))["appointments"] == before


async def test_a_sample_that_is_in_is_left_to_its_owners_and_one_that_cannot_go_in_says_why(system, monkeypatch):
    stranger = system.token("external_partner")
    monkeypatch.setattr(system, "token", lambda _: stranger)
    with pytest.raises(ServerFailed, match="the sample did not go in: .*permission"):
        await sample.load(system.url, system.token)
    await system._load_sample()  # as the next start does


@pytest.mark.parametrize("role", ROLES)
async def test_a_token_signs_in_the_staff_member_who_holds_the_role(system, role):
    own = await Caller(system.url, system.token(role)).get("/v1/self")
    assert (own["kind"], own["roles"]) == ("staff", [role])


async def test_a_patient_signs_in_and_sees_their_own_record_only(system, coordinator):
    own, other = (each["id"] for each in (await coordinator.get("/v1/patients", pageSize=2))["patients"])
    for _ in range(2):
        await make_login(system.url, system.token("admin"), own)
    patient = Caller(system.url, system.token(patient_id=own))
    assert (await patient.get("/v1/self"))["kind"] == "patient"
    assert (await patient.get(f"/v1/patients/{own}"))["id"] == own
    assert (await patient.http.get(f"/v1/patients/{other}")).status_code == 404


async def test_the_mailbox_page_stands_beside_the_gateway(system):
    async with httpx2.AsyncClient(base_url=system.url) as client:
        assert "messages" in (await client.get("/dev/mailbox")).json()


async def test_one_service_can_be_stopped_and_started_again(system, coordinator):
    await system.stop_service("feedback")
    away = await coordinator.http.get("/v1/questionnaires", headers={"x-test": "1"})
    assert away.status_code in (503, 504)
    assert (await coordinator.get("/v1/patients"))["patients"]
    await system.start_service("feedback")
    await system.ready()
    async with asyncio.timeout(15):
        while (await coordinator.http.get("/v1/questionnaires")).status_code != 200:
            await asyncio.sleep(0.2)


async def test_postgres_may_be_killed_under_it(system, coordinator):
    await system.kill("postgres")
    async with asyncio.timeout(20):
        while (await coordinator.http.get("/v1/patients")).status_code != 200:
            await asyncio.sleep(0.2)


def care_command(*arguments, **keywords):
    paths = [str(ROOT), str(Path(next(iter(care.__path__))).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-m", "system.cli", *arguments]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **keywords
    )


async def line_with(process, text, within=90.0):
    """What `care up` has printed up to a line that holds a text."""
    printed = []

    def read():
        for line in process.stdout:
            printed.append(line)
            if text in line:
                return "".join(printed)
        raise AssertionError(f"ended: {''.join(printed)} {process.stderr.read()}")

    return await asyncio.wait_for(asyncio.to_thread(read), within)


def address_in(printed):
    found = re.search(r"http://127\.0\.0\.1:\d+", printed)
    assert found
    return found[0]


async def run_care(*arguments):
    process = care_command(*arguments)
    out, err = await asyncio.to_thread(process.communicate, timeout=90)
    return process.returncode, out, err


async def test_data_survive_kill_9_and_sigterm_ends_it_within_ten_seconds(tmp_path):
    data = ("--data", str(tmp_path / "data"))
    process = care_command("up", *data, "--port", "0", "--empty")
    try:
        printed = await line_with(process, "Ctrl-C")
        assert "care token --role admin" in printed
        url = address_in(printed)
        status, token, warning = await run_care("token", "--role", "admin", *data)
        assert status == 0 and "never for real patients" in warning
        caller = Caller(url, token.strip())
        assert (await caller.get("/v1/self"))["roles"] == ["admin"]
        made = await caller.http.post("/v1/visitTypes", json={"code": "kept", "name": "Kept", "durationMinutes": 20})
        assert made.status_code == 200, made.text
        process.kill()
        process.wait()

        process = care_command("up", *data, "--empty")
        printed = await line_with(process, "Ctrl-C")
        assert address_in(printed) == url, "on the port that it had"
        assert [each["code"] for each in (await caller.get("/v1/visitTypes"))["visitTypes"]] == ["kept"]
        status, out, _ = await run_care("doctor", *data)
        assert status == 0, out
        assert "All is well" in out
        status, out, _ = await run_care("audit", "verify", *data)
        assert status == 0 and out.count("whole") == 5, out
        status, _, err = await run_care("up", *data)
        assert status == 1 and "in use" in err
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 15) == 0
        crowded = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        assert time.monotonic() - began < 10 * crowded
        assert not (tmp_path / "data" / "run.json").exists()
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.kafka
async def test_six_processes_and_a_real_broker_do_the_same(tmp_path):
    system = System(tmp_path / "data", 0, kafka=True, durable=False)
    try:
        await system.start()
        coordinator = Caller(system.url, system.token("coordinator"))
        assert len({system.pid(name) for name in NODES} | {os.getpid()}) == 7
        assert len((await coordinator.get("/v1/patients", pageSize=100))["patients"]) == 30
        settings = topology.service("scheduling").settings(**system.plan.values("scheduling"))
        findings = [each async for each in examine("scheduling", settings)]
        assert not [each for each in findings if each.wrong], findings
        assert any(each.what.startswith("Kafka") for each in findings)
        before = system.pid("scheduling")
        await system.kill("scheduling")
        async with asyncio.timeout(40):
            while (await coordinator.http.get("/v1/clinics")).status_code != 200 or system.pid("scheduling") == before:
                await asyncio.sleep(0.2)
        assert len((await coordinator.get("/v1/clinics"))["clinics"]) == 3
    finally:
        began = time.monotonic()
        await system.stop()
        assert time.monotonic() - began < 20
    assert not any(system.pid(name) for name in NODES)

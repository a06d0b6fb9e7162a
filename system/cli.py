"""`care`: runs the whole system on one machine, and what one does with a system that runs."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer

if TYPE_CHECKING:
    from chassis.service import Server, Service
    from chassis.settings import Settings
    from system.run import System

# What takes long to import is imported by the command that needs it.

T = TypeVar("T")

app = typer.Typer(
    help="Care Coordinator on this machine: run it, sign in, import, look after it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
audit_app = typer.Typer(help="The audit's chain.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")
waitlist_app = typer.Typer(help="The waitlist.", no_args_is_help=True)
app.add_typer(waitlist_app, name="waitlist")

Data = Annotated[
    Path, typer.Option("--data", envvar="CARE_DATA", metavar="DIR", help="Folder with the data of `care up`.")
]
DATA = Path(".care")
_SERVICES = "patients, scheduling, referrals, notifications, feedback"
Name = Annotated[str, typer.Argument(metavar="NAME", help=f"One of {_SERVICES}, gateway.")]
Group = Annotated[str, typer.Argument(metavar="GROUP", help=f"One of {_SERVICES}.")]


def main() -> None:
    """Entry point of `care`."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    app()


@app.callback()
def _prepare(context: typer.Context) -> None:
    if context.invoked_subcommand in ("import", "hours") and "--help" not in sys.argv:
        # A system that runs here is the one that is meant.
        folder = Path(os.environ.get("CARE_DATA", DATA))
        running = _running(folder)
        if running is not None and "CARE_URL" not in os.environ and "CARE_TOKEN" not in os.environ:
            os.environ["CARE_URL"] = running["url"]
            os.environ["CARE_TOKEN"] = _issuer(folder).issue(role="integration_client")


@app.command()
def up(
    data: Data = DATA,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="HTTP port; 8080 if it is free.", show_default=False)
    ] = None,
    empty: Annotated[bool, typer.Option("--empty", help="Without the sample tenant's people and visits.")] = False,
    kafka: Annotated[
        bool, typer.Option("--kafka", help="Six processes and a real Apache Kafka instead of one process.")
    ] = False,
) -> None:
    """Run the whole system on this machine until Ctrl-C. Data stay in the folder, also over kill -9."""
    import stamina.instrumentation

    from system.issuer import NotInProduction
    from system.process import FolderInUse, ServerFailed
    from system.run import System

    stamina.instrumentation.set_on_retry_hooks([])  # loading the sample may try something twice; nobody needs to know
    try:
        _run(_up(System(data, port, kafka=kafka, empty=empty)))
    except (FolderInUse, ServerFailed, NotInProduction) as error:
        _fail(str(error))
    except OSError as error:
        _fail(error.strerror or str(error))


async def _up(system: "System") -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    typer.echo(f"Starting; data and logs are in {system.folder}", err=True)
    starting, waiting = asyncio.create_task(system.start()), asyncio.create_task(stopped.wait())
    await asyncio.wait((starting, waiting), return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)  # it stops what it has started
        return
    waiting.cancel()
    starting.result()
    typer.echo(_welcome(system))
    try:
        await stopped.wait()
    finally:
        typer.echo("Stopping", err=True)
        await system.stop()


def _welcome(system: "System") -> str:
    import psutil  # type: ignore[import-untyped]

    from system.issuer import WARNING

    ready_in = system.ready_time - psutil.Process().create_time()
    lines = [
        f"Ready in {ready_in:.1f} s: {system.url}   (documentation: /docs, mailbox: /dev/mailbox)",
        f"Note: {WARNING}.",
        "",
    ]
    if system.empty:
        lines += ["The system is empty; the first administrator signs in with:", "", "  care token --role admin"]
    else:
        lines += [
            f"  export CARE_TOKEN={system.token('coordinator')}",
            f'  curl -s {system.url}/v1/self -H "Authorization: Bearer $CARE_TOKEN"',
            f"  curl -s '{system.url}/v1/patients?pageSize=3' -H \"Authorization: Bearer $CARE_TOKEN\"",
            f"  curl -s '{system.url}/v1/visitTypes' -H \"Authorization: Bearer $CARE_TOKEN\"",
            "",
            "That token is the coordinator's; `care token --role scheduler` prints another, `care mailbox` what was sent.",
        ]
    return "\n".join([*lines, "Ctrl-C stops everything."])


@app.command()
def token(
    role: Annotated[
        str, typer.Option(metavar="ROLE", help="Role of the sample staff member.", show_default=False)
    ] = "",
    patient: Annotated[str, typer.Option(metavar="ID", help="Id of a patient.", show_default=False)] = "",
    hours: Annotated[float, typer.Option(min=0.01, max=8760, help="How long it is valid.")] = 12,
    data: Data = DATA,
) -> None:
    """Print a token of the sample staff member who holds a role, or of a patient's login (which is made if needed)."""
    from system import issuer

    if bool(role) == bool(patient):
        _fail(f"give --role or --patient; roles are {', '.join(issuer.ROLES)}", 2)
    signer = _issuer(data)
    try:
        printed = signer.issue(role=role, patient_id=patient, seconds=hours * 3600)
    except ValueError as error:
        _fail(str(error), 2)
    running = _running(data)
    if patient:
        if running is None:
            _fail("a patient's login is made by the running system: start it with `care up`")
        _run(make_login(running["url"], signer.issue(role="admin"), patient))
    elif running is not None and running["empty"]:
        if role != "admin":
            typer.echo("The system is empty: this works once an administrator has made that staff member.", err=True)
        else:
            from system.run import bootstrap

            _run(bootstrap(running["environment"]["patients"]["CARE_DATABASE_URL"], administrator=True))
    typer.echo(f"Note: {issuer.WARNING}.", err=True)
    typer.echo(printed)


async def make_login(url: str, admin: str, patient_id: str) -> None:
    """Let a patient sign in at the development issuer, unless they can already."""
    from system.importing.client import GatewayClient, Refused, Stopped
    from system.issuer import ISSUER, patient_subject

    login = {
        "issuer": ISSUER,
        "subject": patient_subject(patient_id),
        "person": {"type": "Patient", "id": patient_id},
    }
    try:
        async with GatewayClient(url, admin) as client:
            await client.post("/v1/logins", login)
    except Refused as refused:
        if refused.reason != "LOGIN_TAKEN":
            _fail(f"the login can't be made: {refused}")
    except Stopped as stopped:
        _fail(str(stopped))


@app.command()
def serve(name: Name) -> None:
    """Run one workload as this process, by CARE_… settings: the same as `python -m services.NAME` or `python -m gateway`."""
    os.execv(sys.executable, [sys.executable, "-m", _node(name).module])  # noqa: S606


@app.command()
def migrate(name: Name, data: Data = DATA) -> None:
    """Bring a service's database (CARE_DATABASE_URL, else that of the system that runs here) to this build's schema."""
    node = _node(name)
    if node.database is None:
        _fail("the gateway has no database", 2)
    environment = os.environ | _environment(name, data)
    os.execve(sys.executable, [sys.executable, "-m", node.module, "migrate"], environment)  # noqa: S606


@app.command()
def mailbox(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for more until Ctrl-C.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    data: Data = DATA,
) -> None:
    """Print what the development mailbox has received, oldest first."""
    import dataclasses
    import json

    from system.mailbox import Letters, line

    letters = Letters(data / "mailbox.jsonl")
    if not letters.file.exists():
        _fail(f"there is no mailbox in {data}: start the system with `care up`, or name its folder with --data")
    try:
        while True:
            for letter in letters.fresh():
                typer.echo(json.dumps(dataclasses.asdict(letter), ensure_ascii=False) if as_json else line(letter))
            if not follow:
                return
            time.sleep(0.3)
    except KeyboardInterrupt:
        return


@app.command()
def replay(group: Group, data: Data = DATA) -> None:
    """Apply the dead letters of a service's group again. Exit status 1 if some failed again."""

    async def work(service: "Service", settings: "Settings") -> int:
        from chassis.consumer import Retry

        server = _server(service, settings)
        try:
            await server.bus.start()
            counts = await server.consumer.replay()
        except Retry as error:
            _fail(f"the database or the bus is away ({error}); what was done stays done, run it again", 2)
        finally:
            await server.clients.close()
            await server.database.stop()
            await server.bus.stop()
        typer.echo(
            f"{group}: {counts.applied} applied, {counts.already} had their effect already,"
            f" {counts.passed} of no interest, {counts.parked_again} failed again"
        )
        return 1 if counts.parked_again else 0

    raise typer.Exit(_run(work(*_configured(group, data))))


@audit_app.command()
def verify(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help=f"One of {_SERVICES}; all if absent.")] = "",
    data: Data = DATA,
) -> None:
    """Walk the audit's chain of one or all services and compare it with the signed checkpoints. Exit status 1 if broken."""
    from system.topology import SERVICES

    async def work(service: "Service", settings: "Settings") -> bool:
        import json

        from joserfc.jwk import KeySet

        from chassis.auditing import verify as walk
        from chassis.database import engine

        file = settings.service_keys_file
        keys = KeySet.import_key_set(json.loads(file.read_text())) if file and file.exists() else None
        # It ends with one statement over the whole audit.
        database = engine(settings.model_copy(update={"statement_timeout": 3600.0}), application="audit")
        try:
            verdict = await walk(database, settings.audit_checkpoint_file, keys)
        finally:
            await database.dispose()
        signed = f"{verdict.checkpoints} checkpoints" if keys and settings.audit_checkpoint_file else "no checkpoints"
        state = f"BROKEN: {verdict.broken}" if verdict.broken else "whole"
        typer.echo(f"{service.name}: {state}; {verdict.rows} rows, {verdict.unsealed} not sealed yet, {signed}")
        return not verdict.broken

    whole = [_run(work(*_configured(each, data))) for each in ([name] if name else SERVICES)]
    raise typer.Exit(0 if all(whole) else 1)


@waitlist_app.command("run")
def run_waitlist(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be offered to whom.")] = False,
    data: Data = DATA,
) -> None:
    """Offer what was freed to those who wait, now; by the ids of entries, with the parts of each score."""

    async def work(service: "Service", settings: "Settings") -> None:
        from services.scheduling.backfill import backfill, preview

        server = _server(service, settings)
        try:
            for one in await preview(server.runtime):
                slot = one.slot
                typer.echo(
                    f"slot {slot.id}  {slot.start_time:%Y-%m-%d %H:%M %Z}  visit type {slot.visit_type_id}: {one.status}"
                )
                for place, (wish, score) in enumerate(one.best, 1):
                    parts = ", ".join(f"{name} {points}" for name, points in score.parts.items())
                    typer.echo(f"  {place}. entry {wish.entry_id}  {score.total} points ({parts})")
            done = 0 if dry_run else await backfill(server.runtime)
        finally:
            await server.clients.close()
            await server.database.stop()
        typer.echo("Nothing was changed." if dry_run else f"{done} steps done.")

    _run(work(*_configured("scheduling", data)))


@app.command()
def doctor(
    name: Annotated[str, typer.Argument(metavar="[NAME]", help=f"One of {_SERVICES}, gateway; all if absent.")] = "",
    data: Data = DATA,
) -> None:
    """Try every connection, schema, topic and clock, and say what to do. Exit status 1 if something is wrong."""
    from gateway.settings import GatewaySettings
    from system.doctor import examine
    from system.topology import NODES

    running = _running(data)
    if running is None and not name:
        _fail(
            f"nothing runs from {data}. Start it with `care up`, or name a workload to examine it by CARE_… settings", 2
        )
    names = [name] if name else list(NODES)

    async def work() -> int:
        wrong = 0
        for each in names:
            settings: Settings
            if each == "gateway":
                settings = _with_environment(each, data, GatewaySettings)
            else:
                _, settings = _configured(each, data)
            async for finding in examine(each, settings):
                head = f"{finding.where:14} {finding.what}"
                if finding.wrong:
                    wrong += 1
                    typer.echo(f"WRONG  {head}: {finding.wrong}\n       {'':14} -> {finding.todo}")
                else:
                    typer.echo(f"ok     {head}")
        return wrong

    wrong = _run(work())
    typer.echo("All is well." if not wrong else f"{wrong} to mend.")
    raise typer.Exit(1 if wrong else 0)


def _add_import() -> None:
    from system.importing.cli import hours_app, import_app

    app.add_typer(import_app, name="import")
    app.add_typer(hours_app, name="hours")


_OTHERS = {each.callback.__name__ for each in app.registered_commands if each.callback} | {"audit", "waitlist"}
if not _OTHERS & set(sys.argv[1:2]):  # half a second that they needn't wait for
    _add_import()


# -- what the commands share -------------------------------------------------------------------------------------------


def _run(work: Coroutine[Any, Any, T]) -> T:
    try:
        import uvloop
    except ImportError:  # not on every platform
        return asyncio.run(work)
    return uvloop.run(work)


def _fail(message: str, status: int = 1) -> NoReturn:
    typer.echo(f"care: {message}", err=True)
    raise typer.Exit(status)


def _running(data: Path) -> dict[str, Any] | None:
    """What `care up` wrote about the system that runs from a folder; None if none does."""
    import psutil  # type: ignore[import-untyped]

    from system.process import read_state

    state = read_state(data / "run.json")
    return state if state and psutil.pid_exists(state["pid"]) else None


def _issuer(data: Path) -> Any:
    from system.issuer import DevelopmentIssuer, NotInProduction
    from system.keys import Keys

    try:
        return DevelopmentIssuer(Keys(data / "keys"))
    except NotInProduction as error:
        _fail(str(error))
    except FileNotFoundError:
        _fail(f"there are no keys in {data}: start the system with `care up`, or name its folder with --data")


def _node(name: str) -> Any:
    from system.topology import NODES

    if name not in NODES:
        _fail(f"there is no {name}; it is one of {', '.join(NODES)}", 2)
    return NODES[name]


def _environment(name: str, data: Path) -> dict[str, str]:
    """Settings of a workload of the system that runs here, unless the environment configures one itself."""
    if "CARE_DATABASE_URL" in os.environ or (running := _running(data)) is None:
        return {}
    found: dict[str, str] = running["environment"][name]
    return found


def _with_environment(name: str, data: Path, kind: "type[Settings]") -> Any:
    before = dict(os.environ)
    os.environ.update(_environment(name, data))
    try:
        return kind()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _configured(name: str, data: Path) -> "tuple[Service, Settings]":
    from system import topology

    if _node(name).database is None:
        _fail(f"{name} is no service; it is one of {_SERVICES}", 2)
    if "CARE_DATABASE_URL" not in os.environ and _running(data) is None:
        _fail(f"nothing runs from {data} and CARE_DATABASE_URL is not set: start `care up`, or set it", 2)
    service = topology.service(name)
    return service, _with_environment(name, data, service.settings)


def _server(service: "Service", settings: "Settings") -> "Server":
    from chassis.main import bus_of
    from chassis.service import Server, package_version
    from chassis.telemetry import Telemetry, install_log_guard

    install_log_guard(sys.stderr, service=service.name)
    telemetry = Telemetry.create(
        service.name,
        otlp_endpoint=None,
        environment=settings.environment,
        version=package_version(),
        log_stream=sys.stderr,
    )
    return Server(service, settings, bus_of(settings), telemetry=telemetry)


if __name__ == "__main__":
    main()

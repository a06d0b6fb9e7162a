"""`care import`: bundles of patients from a folder, and a file on clinics."""

import asyncio
from pathlib import Path
from typing import Annotated

import stamina.instrumentation
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from system.importing.bundles import Rules
from system.importing.client import GatewayClient
from system.importing.clinics import ClinicsFile, ClinicsFileBroken, read_clinics
from system.importing.load import AT_ONCE, NothingToImport, load_bundles, load_clinics
from system.importing.report import Report

DEFAULT_URL = "http://127.0.0.1:8080"


def import_command(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="Folder with FHIR R4 transaction bundles (*.json).")
    ] = None,
    clinics: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Hours, zones, specialties, visit types, further clinics (.json or .csv)."),
    ] = None,
    url: Annotated[str, typer.Option(envvar="CARE_URL", help="The gateway.")] = DEFAULT_URL,
    token: Annotated[str, typer.Option(envvar="CARE_TOKEN", help="A token that may import.", show_default=False)] = "",
    issuer: Annotated[
        str, typer.Option(help="Issuer of the record numbers (MR) that patients are matched on.")
    ] = Rules().issuer,
    allow_ssn: Annotated[bool, typer.Option("--allow-ssn", help="Bring in social security numbers.")] = False,
    allow_licence: Annotated[bool, typer.Option("--allow-licence", help="Bring in driver's licences.")] = False,
    allow_passport: Annotated[bool, typer.Option("--allow-passport", help="Bring in passport numbers.")] = False,
    source_system: Annotated[
        str, typer.Option(help="Owner of the records: only its integration client may change them then.")
    ] = "",
    at_once: Annotated[int, typer.Option(min=1, max=64, help="Requests at a time.")] = AT_ONCE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check everything, send nothing.")] = False,
) -> None:
    """Bring in patients from FHIR bundles, and what no bundle says about clinics. Runs again change nothing.

    Exit status: 0 all is in, 1 something is broken, refused or not tried, 2 it could not start.
    """
    errors = Console(stderr=True)
    if directory is None and clinics is None:
        errors.print("Give a folder with bundles, or --clinics FILE, or both.")
        raise typer.Exit(2)
    if not dry_run and not token:
        errors.print("A token is needed: give --token or CARE_TOKEN; `care token --role admin` prints one.")
        raise typer.Exit(2)
    allowed = {"SS": allow_ssn, "DL": allow_licence, "PPN": allow_passport}
    rules = Rules(issuer, frozenset(type_ for type_, yes in allowed.items() if yes), source_system=source_system)
    stamina.instrumentation.set_on_retry_hooks([])  # a line for each repetition would tear the bar
    report = Report()
    try:
        stated = read_clinics(clinics) if clinics else None
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
        with Progress(*columns, console=errors, disable=not errors.is_terminal) as progress:
            asyncio.run(_run(directory, stated, url, token, rules, report, at_once, dry_run, progress))
    except (ClinicsFileBroken, NothingToImport) as error:
        errors.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        report.stopped, report.started = "by Ctrl-C", True
    report.print(Console(), dry_run)
    raise typer.Exit(report.exit_status())


async def _run(
    directory: Path | None,
    stated: ClinicsFile | None,
    url: str,
    token: str,
    rules: Rules,
    report: Report,
    at_once: int,
    dry_run: bool,
    progress: Progress,
) -> None:
    async with GatewayClient(url, token) as client:
        if directory is not None:
            await load_bundles(
                directory,
                client,
                report,
                rules=rules,
                stated=stated,
                at_once=at_once,
                dry_run=dry_run,
                progress=progress,
            )
        if stated is not None and not report.stopped:
            await load_clinics(stated, client, report, at_once=at_once, dry_run=dry_run, progress=progress)

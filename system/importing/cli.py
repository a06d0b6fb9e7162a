"""`care import`: bundles of patients from a folder, a file on clinics, and another system's visits."""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any

import stamina.instrumentation
import typer
import typer.core
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from system.importing.bundles import Rules
from system.importing.client import GatewayClient
from system.importing.clinics import ClinicsFile, ClinicsFileBroken, read_clinics
from system.importing.hours import HoursReport, load_hours
from system.importing.load import AT_ONCE, NothingToImport, load_bundles, load_clinics
from system.importing.report import Report
from system.importing.visits_file import NAMES, FileBroken, Reading
from system.importing.visits_load import VisitsReport, load_visits

DEFAULT_URL = "http://127.0.0.1:8080"
UNSIGNED = "A token is needed: give --token or CARE_TOKEN; `care token --role admin` prints one."
_PAST = ("FULFILLED", "NOSHOW", "CANCELLED")


class _ImportGroup(typer.core.TyperGroup):
    """`care import DIR` is short for `care import bundles DIR`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or (args[0] not in self.commands and args[0] != "--help"):
            args = ["bundles", *args]
        return super().parse_args(ctx, args)


import_app = typer.Typer(
    cls=_ImportGroup,
    help="Bring in what other systems have. `care import DIR` is short for `care import bundles DIR`.",
    rich_markup_mode=None,
)


@import_app.command("calendar")
def calendar_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The other system's visits, .csv or .ics.")],
    source: Annotated[
        str, typer.Option(metavar="NAME", help="The other system's name; the same one for each file of it.")
    ],
    column: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=THEIRS", help="Which column, or iCalendar property, has it: patient=MRN. Repeatable."
        ),
    ] = [],  # noqa: B006 - Typer copies it
    values: Annotated[
        list[str],
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Where the file doesn't say: visit_type=follow-up. Repeatable."
        ),
    ] = [],  # noqa: B006
    past: Annotated[
        str,
        typer.Option(
            metavar="STATUS", help="What became of visits that are over and only booked: fulfilled, noshow, cancelled."
        ),
    ] = "",
    until: Annotated[
        datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="Last day of iCalendar rules that have no end.", show_default=False),
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write what became of every row, as CSV.")
    ] = None,
    url: Annotated[str, typer.Option(envvar="CARE_URL", help="The gateway.")] = DEFAULT_URL,
    token: Annotated[str, typer.Option(envvar="CARE_TOKEN", help="A token that may import.", show_default=False)] = "",
    at_once: Annotated[int, typer.Option(min=1, max=64, help="Requests at a time.")] = AT_ONCE,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Ask what would become of every row, change nothing.")
    ] = False,
) -> None:
    """Take over the visits of another system, each once. Runs again change nothing.

    Names: identifier, patient, practitioner, clinic (each with NAME_system, an identifier's system, or id for our own
    ids), visit_type (its code), start, end or duration_minutes, time_zone, status (booked, fulfilled, noshow, cancelled),
    reason, comment. CSV has columns of these names; iCalendar has them in UID, DTSTART, DTEND or DURATION, STATUS, and
    X-CARE-PATIENT, X-CARE-PRACTITIONER, X-CARE-CLINIC, X-CARE-VISIT-TYPE unless --column or --set says otherwise. Times
    without a zone are the clinic's.

    Exit status: 0 all is in, 1 something is refused or not tried, 2 it could not start.
    """
    errors = Console(stderr=True)
    if past and past.upper() not in _PAST:
        errors.print("--past is fulfilled, noshow or cancelled.")
        raise typer.Exit(2)
    if not token:
        errors.print(UNSIGNED)
        raise typer.Exit(2)
    if report_file is not None:
        try:
            report_file.open("a").close()
        except OSError as error:  # else all would be in, and nobody could read what became of it
            errors.print(f"{report_file}: {error.strerror}", markup=False, soft_wrap=True)
            raise typer.Exit(2) from None
    reading = Reading(source, _pairs(column, errors), _pairs(values, errors), _day(until))
    report = VisitsReport()
    stamina.instrumentation.set_on_retry_hooks([])

    async def run(progress: Progress) -> None:
        async with GatewayClient(url, token) as client:
            await load_visits(
                file,
                reading,
                client,
                report,
                past=past.upper(),
                at_once=at_once,
                dry_run=dry_run,
                progress=progress,
            )

    _carry_out(run, report, errors, dry_run=dry_run)
    if report_file is not None:
        report.write(report_file)
    raise typer.Exit(report.exit_status())


hours_app = typer.Typer(help="Hours in which practitioners see patients.", no_args_is_help=True, rich_markup_mode=None)


@hours_app.callback()
def _hours() -> None:
    """With one command only, Typer would leave its name out."""


@hours_app.command("import")
def hours_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A block of weekly hours a line, .csv.")],
    url: Annotated[str, typer.Option(envvar="CARE_URL", help="The gateway.")] = DEFAULT_URL,
    token: Annotated[str, typer.Option(envvar="CARE_TOKEN", help="A token that may import.", show_default=False)] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would change and which visits would stand outside.")
    ] = False,
) -> None:
    """Set weekly hours out of a CSV file. Runs again change nothing.

    Columns: practitioner, clinic, weekday (Mo … Su, or Mo-Fr), from, to; if wanted practitioner_system, clinic_system (id
    for our own ids), visit_types (codes parted by ;), valid_from, valid_until, staff_only (yes or no), release_hours. What
    the file has of a practitioner at a clinic replaces all weekly hours there; days that differ stay. Visits that no longer
    fit stay where they are and become tasks.

    Exit status: 0 all is set, 1 something is refused (then nothing was set) or not tried, 2 it could not start.
    """
    errors = Console(stderr=True)
    if not token:
        errors.print(UNSIGNED)
        raise typer.Exit(2)
    report = HoursReport()
    stamina.instrumentation.set_on_retry_hooks([])

    async def run(progress: Progress) -> None:
        async with GatewayClient(url, token) as client:
            await load_hours(file, client, report, dry_run=dry_run, progress=progress)

    _carry_out(run, report, errors, dry_run=dry_run)
    raise typer.Exit(report.exit_status())


def _carry_out(
    run: Callable[[Progress], Coroutine[Any, Any, None]],
    report: HoursReport | VisitsReport,
    errors: Console,
    *,
    dry_run: bool,
) -> None:
    """Run it under a progress bar and print its report. Exits with 2 where the file can't be read."""
    try:
        with _progress(errors) as progress:
            asyncio.run(run(progress))
    except FileBroken as error:
        errors.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        report.stopped = "by Ctrl-C"
    report.print(Console(), dry_run)


def _pairs(given: Sequence[str], errors: Console) -> dict[str, str]:
    found = dict(one.partition("=")[::2] for one in given)
    if not all(found.values()) or not set(found) <= set(NAMES):
        errors.print(f"Write NAME=…, where NAME is one of {', '.join(NAMES)}.", markup=False)
        raise typer.Exit(2)
    return found


def _day(when: datetime | None) -> date | None:
    return when.date() if when is not None else None


def _progress(errors: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, console=errors, disable=not errors.is_terminal)


@import_app.command("bundles")
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
        errors.print(UNSIGNED)
        raise typer.Exit(2)
    allowed = {"SS": allow_ssn, "DL": allow_licence, "PPN": allow_passport}
    rules = Rules(issuer, frozenset(type_ for type_, yes in allowed.items() if yes), source_system=source_system)
    stamina.instrumentation.set_on_retry_hooks([])  # a line for each repetition would tear the bar
    report = Report()
    try:
        stated = read_clinics(clinics) if clinics else None
        with _progress(errors) as progress:
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

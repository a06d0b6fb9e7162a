"""`python -m bench`: the figures of docs/performance.md."""

import argparse
import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import uvloop

from bench import calendar_load, report, workloads
from bench.calendar_world import CalendarWorld
from bench.workloads import Figure
from bench.world import World
from bench.wrk import Scripts, require_wrk

WORKLOADS = ("summary", "book", "contested", "lag", "start", "calendar")
_GROWTH = 1.5
"""What an operation may cost at ten times the data."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--only", default=",".join(WORKLOADS), help="comma-separated: " + ", ".join(WORKLOADS))
    parser.add_argument("--patients", type=int, default=100_000)
    parser.add_argument("--appointments", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--data", type=Path, default=Path(".cache/bench"), help="folder of the data set; kept for the next time"
    )
    parser.add_argument(
        "--asked", default=[], type=lambda text: text.split(","), help="of calendar: words of the workloads' names"
    )
    parser.add_argument("--write", action="store_true", help="put the figures into docs/performance.md")
    parser.add_argument("--hold", action="store_true", help="measure nothing; keep the system up until Ctrl-C")
    found = parser.parse_args()
    found.only = found.only.split(",")
    if unknown := set(found.only) - set(WORKLOADS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    return found


async def _measure(arguments: argparse.Namespace) -> list[Figure]:
    seconds, only = arguments.seconds, arguments.only
    print(f"Starting the system in {arguments.data}", flush=True)
    async with World(arguments.data, arguments.patients, arguments.appointments) as world:
        if arguments.hold:
            print({name: world.system.pid(name) for name in [*world.system.plan.instances, "postgres", "kafka"]})
            print(f"{world.system.url}\n{world.tokens(1)[0]}", flush=True)
            stopped = asyncio.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, stopped.set)
            await stopped.wait()
            return []
        await workloads.check_summary(world)
        scripts = Scripts()
        runs: dict[str, list[Figure]] = {}

        async def one(measure: Callable[[], Awaitable[Figure]]) -> None:
            figure = await measure()
            runs.setdefault(figure.name, []).append(figure)
            print(report.table([figure]).splitlines()[-1], figure.more or "", flush=True)

        other = await world.second_gateway(batch_legs="false") if "summary" in only else None
        try:
            for number in range(arguments.repeats):
                if other is not None:
                    for name, tokens, url, pid in (
                        ("summary, 50 tokens", 50, "", None),
                        ("summary, 1 token", 1, "", None),
                        ("summary, not batched", 50, other.url, other.process.pid),
                    ):
                        await one(
                            lambda name=name, tokens=tokens, url=url, pid=pid, seed=number: workloads.summary(  # type: ignore[misc]
                                world, scripts, name, tokens=tokens, seconds=seconds, seed=seed, url=url, pid=pid
                            )
                        )
                if "book" in only:
                    await one(lambda: workloads.book(world, scripts, seconds=seconds))
                if "contested" in only:
                    await one(lambda: workloads.contested(world, seconds=seconds))
                if "lag" in only:
                    for rate in (25.0, 100.0):
                        await one(lambda rate=rate: workloads.lag(world, seconds=seconds, rate=rate))  # type: ignore[misc]
        finally:
            if other is not None:
                other.stop()
    return [workloads.middle(each) for each in runs.values()]


def main() -> None:
    """Measure, print, and write where that is wanted."""
    arguments = _arguments()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    if {"summary", "book"} & set(arguments.only):
        require_wrk()
    notes: list[str] = []
    figures: list[Figure] = []
    if set(arguments.only) - {"start", "calendar"}:
        figures = uvloop.run(_measure(arguments))
    if "start" in arguments.only and not arguments.hold:
        folder = arguments.data.with_name(arguments.data.name + "-start")
        shutil.rmtree(folder, ignore_errors=True)
        cold, *warm = workloads.start_times(folder)
        warmed = " and ".join(f"{one:.1f}" for one in warm)
        notes.append(
            f"`care up` from the command to the first 200 of /readyz: {warmed} s warm, {cold:.1f} s the first time"
        )
        shutil.rmtree(folder, ignore_errors=True)
    if arguments.hold:
        return
    results = uvloop.run(_calendar(arguments)) if "calendar" in arguments.only else []
    if results:
        print(f"\n{report.machine()}\n\n{report.calendar(results)}")
        if arguments.write:
            report.write_calendar(_command(), results)
    if figures or notes:
        _tell(arguments, figures, notes)
    grown = [one.workload.name for one in results if one.growth > _GROWTH]
    if grown:
        sys.exit(f"costs more than {_GROWTH} times as much at ten times the data: {', '.join(grown)}")


def _command() -> str:
    return "make bench" + "".join(f" {each}" for each in sys.argv[1:] if each != "--write")


def _tell(arguments: argparse.Namespace, figures: list[Figure], notes: list[str]) -> None:
    print(f"\n{report.machine()}\n\n{report.table(figures)}\n{report.remarks(figures)}")
    print("\n".join(notes))
    if arguments.write:
        report.write(_command(), figures, notes)


async def _calendar(arguments: argparse.Namespace) -> list[calendar_load.Result]:
    folder = arguments.data.with_name(arguments.data.name + "-calendar")
    print(f"Starting the scheduling service in {folder}", flush=True)
    async with CalendarWorld(folder, arguments.appointments) as world:
        return await calendar_load.measure(
            world,
            arguments.asked,
            arguments.seconds / 2,
            arguments.repeats,
            lambda result: print(report.calendar([result]).splitlines()[-1], flush=True),
        )


if __name__ == "__main__":
    main()

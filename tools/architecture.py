"""Draws the parts of docs/architecture.md that the code says: who hears which events, and the lifecycles.

`python tools/architecture.py` rewrites them; a test fails while the page says something else.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "gen")]
PAGE = ROOT / "docs" / "architecture.md"

from chassis.model import Living  # noqa: E402
from system import topology  # noqa: E402

_ACCESS = {"patient.access_changed", "staff.changed", "login.changed", "role.changed", "access.heartbeat"}


def teller_of(event: str) -> str:
    """The service whose aggregate an event is about."""
    aggregate = event.partition(".")[0]
    for name in topology.SERVICES:
        payloads = topology.service(name).payloads
        if aggregate in payloads or event in payloads:
            return name
    return "scheduling" if aggregate == "hold" else "patients"


def edges() -> dict[tuple[str, str], list[str]]:
    """(teller, hearer) to the events that the hearer reacts to, besides those of access, which all hear."""
    found: dict[tuple[str, str], list[str]] = {}
    for name in topology.SERVICES:
        for event in sorted(topology.service(name).reactions.types - _ACCESS):
            found.setdefault((teller_of(event), name), []).append(event)
    return found


def living() -> Iterator[tuple[str, type[Living]]]:
    """Every aggregate with a lifecycle and its service."""
    for name in topology.SERVICES:
        for mapper in sorted(topology.service(name).base.registry.mappers, key=lambda one: one.class_.__name__):
            if issubclass(mapper.class_, Living):
                yield name, mapper.class_


def drawn_edges() -> str:
    """Mermaid flowchart and table of the event edges."""
    found = edges()
    lines = ["```mermaid", "flowchart LR"]
    for (teller, hearer), events in sorted(found.items()):
        lines.append(f"  {teller} -- {len(events)} --> {hearer}")
    lines += ["```", "", "| told by | heard by | events |", "|---|---|---|"]
    for (teller, hearer), events in sorted(found.items()):
        lines.append(f"| {teller} | {hearer} | {', '.join(f'`{event}`' for event in events)} |")
    lines.append(f"| patients | all others | {', '.join(f'`{event}`' for event in sorted(_ACCESS))} |")
    return "\n".join(lines)


def drawn_lifecycles() -> str:
    """A Mermaid state diagram per aggregate with a lifecycle."""
    parts = []
    for service, model in living():
        lines = [f"### {model.__name__} ({service})", "", "```mermaid", "stateDiagram-v2"]
        for arrow in model.lifecycle:
            told = f" / {arrow.event}" if arrow.event else ""
            if not arrow.sources:
                lines.append(f"  [*] --> {arrow.target.name if arrow.target else '[*]'}: {arrow.action}{told}")
            for source in arrow.sources:
                target = arrow.target.name if arrow.target is not None else "before"
                lines.append(f"  {source.name} --> {target}: {arrow.action}{told}")
        parts.append("\n".join([*lines, "```"]))
    return "\n\n".join(parts)


def rewritten(page: str) -> str:
    """The page with its drawn parts made anew."""
    for name, drawn in (("edges", drawn_edges()), ("lifecycles", drawn_lifecycles())):
        begin, end = f"<!-- drawn: {name} -->", "<!-- end -->"
        head, _, rest = page.partition(begin)
        _, _, tail = rest.partition(end)
        page = f"{head}{begin}\n{drawn}\n{end}{tail}"
    return page


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))

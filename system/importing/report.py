"""What an import did: counts by kind and outcome, what is broken or refused, what was skipped, and the exit status."""

from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from system.importing.bundles import BundleBroken, BundleRead

OUTCOMES = ("created", "changed", "unchanged", "refused")


@dataclass(frozen=True, slots=True)
class RefusedRecord:
    """A record that the gateway refused: where it comes from, what it is, and why."""

    place: str
    kind: str
    why: str


@dataclass(slots=True)
class Report:
    """Filled by the loaders. `stopped` says why an import ended before its end, `started` whether anything was written or could be."""

    files: int = 0
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    broken: list[BundleBroken] = field(default_factory=list)
    refused: list[RefusedRecord] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: Counter[tuple[str, str]] = field(default_factory=Counter)
    first_places: dict[tuple[str, str], str] = field(default_factory=dict)
    stopped: str = ""
    started: bool = False

    def took(self, kind: str, outcome: str) -> None:
        """Counts a record of a kind: created, changed, unchanged."""
        self.counts[kind, outcome] += 1
        self.started = True

    def refuse(self, place: str, kind: str, why: str) -> None:
        """A record that did not go in."""
        self.counts[kind, "refused"] += 1
        self.refused.append(RefusedRecord(place, kind, why))

    def note(self, place: str, kind: str, what: str) -> None:
        """Something odd that stops nothing."""
        self.notes[kind, what] += 1
        self.first_places.setdefault((kind, what), place)

    def read(self, bundle: BundleRead) -> None:
        """A bundle that could be read, with its notes and what of it was skipped."""
        self.files += 1
        self.skipped += bundle.skipped
        for note in bundle.notes:
            self.note(f"{bundle.path.name}: {note.path}", note.resource, note.what)

    def break_(self, broken: BundleBroken) -> None:
        """A bundle that could not be read."""
        self.files += 1
        self.broken.append(broken)

    def exit_status(self) -> int:
        """0: all is in. 1: something is broken, refused or not tried. 2: the import could not start."""
        if self.stopped and not self.started:
            return 2
        return 1 if self.stopped or self.broken or self.refused else 0

    def print(self, console: Console, dry_run: bool = False) -> None:
        """Tables for people; no value of a patient's record."""
        for broken in self.broken:
            console.print(f"[red]broken[/] {escape(str(broken))}", soft_wrap=True)
        for refused in self.refused:
            console.print(
                f"[red]refused[/] {escape(f'{refused.place} ({refused.kind}): {refused.why}')}", soft_wrap=True
            )
        for (kind, what), count in sorted(self.notes.items()):
            first = self.first_places[kind, what]
            console.print(f"[yellow]note[/] {count} x {escape(f'{kind}: {what} (first: {first})')}", soft_wrap=True)
        outcomes = ("to send",) if dry_run else OUTCOMES
        table = Table("Kind", *outcomes, title="Would be sent" if dry_run else "Imported", title_justify="left")
        for kind in dict.fromkeys(kind for kind, _ in self.counts):
            table.add_row(kind, *(str(self.counts[kind, outcome]) for outcome in outcomes))
        console.print(table)
        if self.skipped:
            skipped = Table("Skipped", "count", title_justify="left")
            for kind, count in sorted(self.skipped.items()):
                skipped.add_row(escape(kind), str(count))
            console.print(skipped)
        if self.files:
            console.print(f"{self.files} files, {len(self.broken)} broken")
        if self.stopped:
            console.print(
                f"[red]stopped[/] {escape(self.stopped)}. What is in stays; run it again to go on.", soft_wrap=True
            )

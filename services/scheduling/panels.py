"""Several visits after each other in one trip, out of a stream of free slots for each, pulled only as far as needed."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from services.scheduling.availability import Slot


class Step(NamedTuple):
    """One visit of a trip: seconds between the end of the one before and its start, and its buffers."""

    minimum_gap: int
    maximum_gap: int
    before: int = 0
    after: int = 0


class _Kept:
    """A stream of slots, kept as far as it was pulled."""

    def __init__(self, stream: Iterator[Slot]) -> None:
        self._stream = stream
        self.slots: list[Slot] = []
        self.over = False

    def until(self, second: int) -> None:
        """Pull at least all that start up to a second."""
        while not self.over and (not self.slots or self.slots[-1].start <= second):
            slot = next(self._stream, None)
            self.over = slot is None
            if slot is not None:
                self.slots.append(slot)

    def between(self, first: int, last: int) -> Iterator[Slot]:
        """Those that start from `first` to `last`, both inclusive."""
        self.until(last)
        number = bisect_left(self.slots, first, key=lambda slot: slot.start)
        while number < len(self.slots) and self.slots[number].start <= last:
            yield self.slots[number]
            number += 1


def panels(
    streams: Sequence[Iterator[Slot]], steps: Sequence[Step], travel: Callable[[str, str], int]
) -> Iterator[tuple[Slot, ...]]:
    """Trips, one for each first slot that has one: of each further step the earliest that lets the rest follow.

    Streams are ascending. `travel` answers the seconds on the way between two clinics, which the gap must hold. Who or
    what takes part in two steps is there with the buffers of both.
    """
    kept = [_Kept(stream) for stream in streams]
    dead: set[tuple[int, Slot]] = set()  # after which no rest follows, whatever came before

    def rest(trip: tuple[Slot, ...]) -> tuple[tuple[Slot, ...] | None, bool]:
        number, last = len(trip), trip[-1]
        if number == len(steps):
            return trip, False
        if (number, last) in dead:
            return None, False
        step, owing = steps[number], False  # whether it fails for what came before the last
        for slot in kept[number].between(last.end + step.minimum_gap, last.end + step.maximum_gap):
            if slot.clinic_id != last.clinic_id and slot.start < last.end + travel(last.clinic_id, slot.clinic_id):
                continue
            clashes = [_clash(earlier, steps[at], slot, step) for at, earlier in enumerate(trip)]
            if any(clashes):
                owing |= not clashes[-1]
                continue
            found, owes = rest((*trip, slot))
            if found:
                return found, False
            owing |= owes
        if not owing:
            dead.add((number, last))
        return None, owing

    number = 0
    while True:
        while number >= len(kept[0].slots) and not kept[0].over:
            kept[0].until(kept[0].slots[-1].start if kept[0].slots else 0)
        if number >= len(kept[0].slots):
            return
        trip, _ = rest((kept[0].slots[number],))
        if trip:
            yield trip
        number += 1


def _clash(earlier: Slot, its: Step, later: Slot, step: Step) -> bool:
    """Whether somebody or something takes part in both and the buffers don't fit between."""
    if later.start - step.before >= earlier.end + its.after:
        return False
    both = {earlier.practitioner_id, *earlier.resource_ids} & {later.practitioner_id, *later.resource_ids}
    return bool(both)

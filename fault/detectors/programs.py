"""What a rank does in a step, as a sequence, and whether a rank left something out of it or did it twice.

Most jobs do the same in every step. Where a rank did so in two steps, the sequence of another step that differs from it shows
who strayed, without a majority; else the majority of the ranks that should do the same shows it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors.joining import Joined
from evermesh.fault.recorder.record import OPERATIONS, PHASES

_REPEATED = (PHASES.index("train"), PHASES.index("data"))
"""Phases in which a step does what the step before did."""

Entry = tuple[int, int, int, int, int]
"""Group as the rank counts them, operation, bytes, dtype, peer."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """A rank whose sequence leaves what was expected of it."""

    trace: int
    index: int
    """Of the record that is not the expected one."""
    expected: Entry
    found: Entry
    kind: str
    """``skipped``, ``extra``, ``skipped or other order`` or ``other``."""


def sequence_of(joined: Joined, trace: int, step: int) -> tuple[np.ndarray, list[Entry]]:
    """Indices of the records of a step, without evaluations and checkpoints, and what they are."""
    records = joined.traces[trace].records
    indices = np.flatnonzero((records["step"] == step) & np.isin(records["phase"], _REPEATED))
    own = records[indices]
    columns = (own[name].tolist() for name in ("group", "operation", "num_bytes", "dtype", "peer"))
    return indices, list(zip(*columns, strict=True))


def expected_of(joined: Joined, trace: int, step: int) -> list[Entry] | None:
    """What the rank did in each of the two steps before; None if they differ or the ring does not hold them whole."""
    if not _holds_whole(joined, trace, step - 2):
        return None
    before, earlier = sequence_of(joined, trace, step - 1)[1], sequence_of(joined, trace, step - 2)[1]
    return before if before == earlier and before else None


def _holds_whole(joined: Joined, trace: int, step: int) -> bool:
    """Whether no record of ``step`` is missing at the old end."""
    records = joined.traces[trace].records
    return len(records) > 0 and (joined.traces[trace].num_overwritten == 0 or int(records["step"][0]) < step)


def deviation_of(joined: Joined, trace: int, step: int, expected: Sequence[Entry] | None = None) -> Deviation | None:
    """Where the sequence of a rank in ``step`` leaves what it did before, or ``expected``; None: nowhere, or nobody knows."""
    reference = list(expected) if expected is not None else expected_of(joined, trace, step)
    if not reference:
        return None
    indices, found = sequence_of(joined, trace, step)
    for place, entry in enumerate(found):
        if place >= len(reference):
            return Deviation(trace, int(indices[place]), reference[-1], entry, "extra")
        if entry != reference[place]:
            return Deviation(trace, int(indices[place]), reference[place], entry, _kind(found, reference, place))
    return None


def left_out(joined: Joined, trace: int, step: int) -> Deviation | None:
    """What a rank that is in a later step left out at the end of ``step``, where it did it before; None: nothing, or nobody
    knows."""
    reference = expected_of(joined, trace, step)
    indices, found = sequence_of(joined, trace, step)
    if not reference or not found or found != reference[: len(found)] or len(found) == len(reference):
        return None
    following = sequence_of(joined, trace, step + 1)[1]
    if not following:
        return None
    return Deviation(trace, int(indices[-1]), reference[len(found)], following[0], "skipped")


def majority(joined: Joined, traces: Sequence[int], step: int) -> list[Entry] | None:
    """What more than half of some ranks, at least three of them, did in ``step``, each as far as it came; the longest."""
    if len(traces) < 3 or not all(_holds_whole(joined, trace, step) for trace in traces):
        return None
    found = [tuple(sequence_of(joined, trace, step)[1]) for trace in traces]
    for candidate, _ in sorted(Counter(found).items(), key=lambda item: (-len(item[0]), -item[1])):
        if sum(candidate[: len(other)] == other for other in found) * 2 > len(found):
            return list(candidate)
    return None


def _kind(found: Sequence[Entry], reference: Sequence[Entry], place: int) -> str:
    rest = found[place:]
    following = reference[place + 1 : place + 1 + len(rest)]
    if list(following) == list(rest):
        return "skipped" if len(rest) > 1 else "skipped or other order"
    repeated = reference[place - 1 : place - 1 + len(rest)] if place else []
    if list(repeated) == list(rest):
        return "extra"
    return "other"


def name_of(joined: Joined, trace: int, entry: Entry) -> str:
    """Operation and group of an entry, for a sentence."""
    group = joined.traces[trace].groups.get(entry[0])
    return f"{OPERATIONS[entry[1]]} of group {group.name if group else entry[0]}"

"""Collectives in which ranks do different things: another operation, other sizes, or, unnoticed, of another step.

A rank that left a collective out, or did one twice, is one number off from there on. Where operations or sizes differ it
shows at once; where they are the same nothing fails, sums are of different steps, and only the step in the record tells.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from evermesh.fault.detectors import kernels, kinds
from evermesh.fault.detectors.joining import Joined, Survey, in_step
from evermesh.fault.detectors.matching import UNEVEN, Matched
from evermesh.fault.detectors.programs import deviation_of
from evermesh.fault.detectors.step_counts import strayed_by_steps
from evermesh.fault.events import Finding
from evermesh.fault.recorder.record import DTYPES, OPERATIONS

_SURE, _LIKELY, _PERHAPS = 0.99, 0.95, 0.5
_SHARP = kernels.DIFFERS_OPERATION | kernels.DIFFERS_BYTES | kernels.DIFFERS_DTYPE | kernels.DIFFERS_PEER
_MOST_SHIFT = 3


def spoiled_by(matched: Matched) -> set[tuple[int, int]]:
    """Collectives, by group and number, whose members do not agree on what they do."""
    found = set()
    for row in np.flatnonzero(matched.flags & _SHARP).tolist():
        group = int(np.searchsorted(matched.row_starts, row, side="right")) - 1
        found.add((group, int(matched.first_numbers[group]) + row - int(matched.row_starts[group])))
    return found


def find_disagreements(joined: Joined, survey: Survey, matched: Matched) -> list[Finding]:
    """One finding for each group whose members disagree, about the first collective in which they do."""
    found: list[Finding] = []
    for group in range(len(joined.groups)):
        flags = matched.flags[matched.rows(group)]
        if not flags.any():
            continue
        sharp = np.flatnonzero(flags & _SHARP)
        of_group = list(_of_shift(joined, matched, group, int(sharp[0]))) if len(sharp) else []
        if not of_group and len(sharp):
            of_group = list(_of_row(joined, matched, group, int(sharp[0])))
        if not of_group and not len(sharp):
            of_group = list(strayed_by_steps(joined, survey, group))
        found += of_group
    return _once(found)


def _once(findings: Sequence[Finding]) -> list[Finding]:
    """One per rank and kind: who left out a collective is off in one group, but may show in several."""
    kept: dict[tuple[str, int | None], Finding] = {}
    for finding in findings:
        kept.setdefault((finding.kind, finding.rank), finding)
    return list(kept.values())


def _entries(joined: Joined, group: int, trace: int) -> dict[int, tuple[int, ...]]:
    """What a rank did in the group, by number: operation, bytes, dtype, peer, step."""
    records = joined.traces[trace].records
    local = np.flatnonzero(joined.local_groups[trace] == group)
    own = records[np.isin(records["group"], local) & (records["operation"] < OPERATIONS.index("send"))]
    columns = (own[name].tolist() for name in ("operation", "num_bytes", "dtype", "peer", "step"))
    return dict(zip(own["number"].tolist(), zip(*columns, strict=True), strict=True))


def _of_shift(joined: Joined, matched: Matched, group: int, row: int) -> Iterator[Finding]:
    """Ranks that from some number on do what the majority does so many numbers later, or earlier."""
    number = int(matched.first_numbers[group]) + row
    traces = [trace for trace in joined.members[group].tolist() if trace >= 0]
    entries = {trace: _entries(joined, group, trace) for trace in traces}
    usual = _majority(entries, number)
    if usual is None:
        return
    for trace in traces:
        if _agrees(entries[trace], usual, number, 0) or number not in entries[trace]:
            continue
        for shift in (1, -1, 2, -2, _MOST_SHIFT, -_MOST_SHIFT):
            if _agrees(entries[trace], usual, number, shift):
                yield _shifted(joined, group, trace, number, shift, entries[trace][number], usual[number])
                break


def _majority(entries: dict[int, dict[int, tuple[int, ...]]], number: int) -> dict[int, tuple[int, ...]] | None:
    """By number, near ``number``: what more than half of those who did it did; None where there is no majority at it."""
    usual: dict[int, tuple[int, ...]] = {}
    for at in range(number - 8, number + 64):
        known = [of[at] for of in entries.values() if at in of]
        if known:
            [(value, count)] = Counter(known).most_common(1)
            if count * 2 > len(entries):
                usual[at] = value
    return usual if number in usual and len(entries) > 2 else None


def _agrees(own: dict[int, tuple[int, ...]], usual: dict[int, tuple[int, ...]], number: int, shift: int) -> bool:
    """Whether a rank does from ``number`` on what others do ``shift`` later; at least two collectives say so."""
    compared = [(value, usual.get(at + shift)) for at, value in own.items() if number <= at < number + 32]
    known = [(value, expected) for value, expected in compared if expected is not None]
    return all(value == expected for value, expected in known) and len(known) >= (1 if shift == 0 else 2)


def _shifted(
    joined: Joined, group: int, trace: int, number: int, shift: int, found: Sequence[int], usual: Sequence[int]
) -> Finding:
    state, name = joined.traces[trace], joined.groups[group].name
    count = abs(shift)
    what = f"{count} collective{'s' * (count > 1)}"
    did = f"left out {what}" if shift > 0 else f"did {what} more than others"
    return Finding(
        kind=kinds.SKIPPED if shift > 0 else kinds.EXTRA,
        rank=state.rank,
        node=joined.node(trace),
        group=name,
        step=int(usual[4]),
        text=f"{joined.where(trace)} {did} in group {name}, at the latest at #{number} in step {usual[4]}: there it did "
        f"{OPERATIONS[found[0]]} of step {found[4]}, others {OPERATIONS[usual[0]]} of step {usual[4]}, and so on behind it",
        evidence={"number": number, "off_by": shift},
        confidence=_SURE,
    )


def _of_row(joined: Joined, matched: Matched, group: int, row: int) -> Iterator[Finding]:
    """Those who differ from the majority in one collective."""
    number = int(matched.first_numbers[group]) + row
    traces = [trace for trace in joined.members[group].tolist() if trace >= 0]
    entries = {trace: of[number] for trace in traces if number in (of := _entries(joined, group, trace))}
    exempt = all(entry[0] in UNEVEN for entry in entries.values())
    values = {trace: (entry[0], 0 if exempt else entry[1], entry[2], entry[3]) for trace, entry in entries.items()}
    counted = Counter(values.values()).most_common(2)
    if len(counted) < 2:
        return
    (usual, most), (_, second) = counted
    few = [trace for trace, value in values.items() if value != usual]
    if most == second or most * 2 <= len(values):
        few = [trace for trace in values if _strays(joined, group, trace, number, entries[trace][4]) is not None]
        others = [trace for trace in values if trace not in few]
        if not few or not others:
            yield _undecided(joined, group, number, values, entries)
            return
        usual = values[others[0]]
    for trace in few:
        yield _differing(joined, group, trace, number, entries[trace], usual)


def _strays(joined: Joined, group: int, trace: int, number: int, step: int) -> str | None:
    """How in this collective the rank left what it did in the steps before; None: it did not."""
    deviation = deviation_of(joined, trace, step)
    if deviation is None:
        return None
    record = joined.traces[trace].records[deviation.index]
    is_here = joined.group_of(trace, int(record["group"])) == group and int(record["number"]) == number
    return deviation.kind if is_here else None


def _differing(
    joined: Joined, group: int, trace: int, number: int, found: Sequence[int], usual: Sequence[int]
) -> Finding:
    state, name = joined.traces[trace], joined.groups[group].name
    kind, ours, theirs = kinds.MISMATCH, OPERATIONS[found[0]], OPERATIONS[usual[0]]
    how = _strays(joined, group, trace, number, found[4])
    if how is not None and how != "other":
        kind = kinds.EXTRA if how == "extra" else kinds.SKIPPED
    elif found[0] == usual[0] and found[3] != usual[3]:
        ours, theirs = f"{ours} with root {found[3]}", f"{theirs} with root {usual[3]}"
    elif found[0] == usual[0] and found[2] != usual[2]:
        kind, ours, theirs = kinds.DTYPE_MISMATCH, DTYPES[found[2]], DTYPES[usual[2]]
    elif found[0] == usual[0]:
        kind, ours, theirs = kinds.SIZE_MISMATCH, f"{found[1]:,} bytes", f"{usual[1]:,} bytes"
    return Finding(
        kind=kind,
        rank=state.rank,
        node=joined.node(trace),
        group=name,
        step=int(found[4]),
        text=f"{joined.where(trace)} came to {OPERATIONS[usual[0]]} #{number} of group {name}{in_step(found[4])} "
        f"with {ours}, others with {theirs}",
        evidence={"number": number, "found": ours, "usual": theirs},
        confidence=_LIKELY,
    )


def _undecided(
    joined: Joined,
    group: int,
    number: int,
    values: Mapping[int, tuple[int, ...]],
    entries: dict[int, tuple[int, ...]],
) -> Finding:
    name = joined.groups[group].name
    parts = [
        f"rank {joined.traces[trace].rank} {OPERATIONS[value[0]]} of {entries[trace][1]:,} bytes {DTYPES[value[2]]}"
        for trace, value in list(values.items())[:4]
    ]
    operations = {value[0] for value in values.values()}
    dtypes = {value[2] for value in values.values()}
    kind = kinds.MISMATCH if len(operations) > 1 else kinds.DTYPE_MISMATCH if len(dtypes) > 1 else kinds.SIZE_MISMATCH
    step = min(entry[4] for entry in entries.values())
    return Finding(
        kind=kind,
        group=name,
        step=step,
        text=f"ranks disagree in #{number} of group {name}{in_step(step)}: {'; '.join(parts)}; nobody knows who is right",
        evidence={"number": number, "ranks": [joined.traces[trace].rank for trace in values][:64]},
        confidence=_PERHAPS,
    )

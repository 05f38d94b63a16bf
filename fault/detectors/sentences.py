"""Parts of sentences about ranks that wait."""

from collections.abc import Iterable

from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.joining import Joined
from evermesh.fault.detectors.standing import Waiting

MOST_NAMED = 6
"""Ranks in a sentence, and findings of one kind."""
_SURE, _LIKELY = 0.98, 0.9


def operation_of(joined: Joined, one: Waiting) -> str:
    """What a rank is in."""
    group = joined.groups[one.group]
    if one.place is None:
        return f"{one.operation} #{one.number} of group {group.name}"
    preposition = "to" if one.operation == "send" else "from"
    return f"{one.operation} #{one.number} {preposition} rank {group.ranks[one.place]} of group {group.name}"


def ranks_that(joined: Joined, traces: Iterable[int], one: str = "waits for it", several: str = "wait for it") -> str:
    """Some ranks, and what they do."""
    ranks = sorted(joined.traces[trace].rank for trace in traces)
    if len(ranks) == 1:
        return f"rank {ranks[0]} {one}"
    shown = ", ".join(map(str, ranks[:MOST_NAMED]))
    rest = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return f"ranks {shown}{rest} {several}"


def is_gone(context: Context, rank: int) -> bool:
    """Whether its process is known to have ended, or to be stopped."""
    process = context.processes.get(rank)
    return rank in context.processes and (process is None or process.is_stopped)


def state_of(context: Context, rank: int, phase: str) -> tuple[str, float]:
    """What its process does, for a sentence, and how sure that makes us."""
    if rank not in context.processes:
        label = {"data": ": it waits for input", "checkpoint": ": it writes a checkpoint"}.get(phase, "")
        return label, _LIKELY
    process = context.processes[rank]
    if process is None:
        return ": its process does not run", 0.99
    if process.is_stopped:
        return ": its process is stopped", 0.99
    if process.letter == "D":
        return ": its process waits for a disk", _SURE
    return {"data": ": it waits for input", "checkpoint": ": it writes a checkpoint"}.get(phase, ""), _SURE

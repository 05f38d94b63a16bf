"""Whose process ended first, where others fail because of it: a closed connection fails what they are in at once."""

from evermesh.fault.detectors import kinds
from evermesh.fault.detectors.context import Context
from evermesh.fault.detectors.joining import Joined, in_step
from evermesh.fault.detectors.sentences import ranks_that
from evermesh.fault.detectors.standing import Standing
from evermesh.fault.events import Finding
from evermesh.fault.recorder.record import OPERATIONS, Flags

_LOOKED_AT = 16
"""Records of a rank among which one that failed is what ended it."""


def find_deaths(joined: Joined, standing: Standing, context: Context) -> list[Finding]:
    """Ranks whose processes have ended although nothing of theirs had failed, while something of others has, or others wait
    for them. Ranks that end together, as behind the last step, are no finding."""
    ended = [trace for trace, state in enumerate(joined.traces) if context.processes.get(state.rank, ...) is None]
    failed = {trace for trace in range(len(joined.traces)) if _has_failed(joined, trace)}
    first = [trace for trace in ended if trace not in failed]
    waiting = {trace for trace, one in standing.waiting.items() if set(standing.missing[one.key]) & set(first)}
    harmed = sorted((failed | waiting) - set(first))
    if not first or not harmed or len(first) * 2 > len(joined.traces):
        return []
    return [_finding(joined, trace, harmed, failed) for trace in first]


def _finding(joined: Joined, trace: int, harmed: list[int], failed: set[int]) -> Finding:
    state = joined.traces[trace]
    what = "fail because of it" if set(harmed) & failed else "wait for it"
    return Finding(
        kind=kinds.HANG,
        rank=state.rank,
        node=joined.node(trace),
        step=state.step,
        text=f"{joined.where(trace)} has ended{in_step(state.step)}: its process does not run{_last(joined, trace)}; "
        f"{ranks_that(joined, harmed, what.replace('fail', 'fails').replace('wait', 'waits'), what)}",
        evidence={"phase": state.phase, "failed": len(set(harmed) & failed), "harmed": len(harmed)},
        confidence=0.99,
    )


def _last(joined: Joined, trace: int) -> str:
    records = joined.traces[trace].records
    if not len(records):
        return ""
    record = records[-1]
    group = joined.traces[trace].groups.get(int(record["group"]))
    place = "in" if record["ended_ns"] == 0 else "behind"
    name = f" of group {group.name}" if group else ""
    return f", {place} {OPERATIONS[record['operation']]} #{record['number']}{name}"


def _has_failed(joined: Joined, trace: int) -> bool:
    flags = joined.traces[trace].records["flags"][-_LOOKED_AT:]
    return bool((flags & int(Flags.FAILED) != 0).any())

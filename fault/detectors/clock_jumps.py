"""Clocks of nodes that were set while a job runs.

Stamps of records are of the monotonic clock, which nobody sets; what is set is the wall clock, and the header of every ring
says by how much that is ahead. It changes at no other time: what slows or hastens one clock does so to both.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from evermesh.fault.detectors import kinds
from evermesh.fault.events import Finding
from evermesh.fault.recorder.trace import UNKNOWN_NODE, RankTrace

_LEAST_S = 0.1
"""A process that has to wait for a processor between the two readings is off by less than that, as a rule."""


class ClockWatch:
    """Compares the clocks of all nodes with what they were at first."""

    def __init__(self) -> None:
        self._first_ns: dict[tuple[int, int], int] = {}
        """By rank and process."""

    def look(self, traces: Sequence[RankTrace]) -> Iterator[Finding]:
        """Nodes most of whose ranks say that the wall clock was set, since they were seen first."""
        changes: dict[str, list[int]] = defaultdict(list)
        for trace in traces:
            first_ns = self._first_ns.setdefault((trace.rank, trace.pid), trace.wall_offset_ns)
            if trace.node != UNKNOWN_NODE:
                changes[trace.node].append(trace.wall_offset_ns - first_ns)
        for node, of_ranks in changes.items():
            jump_s = float(np.median(of_ranks)) / 1e9
            agree = [change for change in of_ranks if abs(change / 1e9 - jump_s) < _LEAST_S]
            if abs(jump_s) >= _LEAST_S and len(agree) * 2 > len(of_ranks):
                way = "forward" if jump_s > 0 else "back"
                yield Finding(
                    kind=kinds.CLOCK_JUMP,
                    node=node,
                    text=f"the clock of node {node} was set {way} by {abs(jump_s):.2f} s while the job runs; records are "
                    "stamped by another clock, and nobody is late because of it",
                    evidence={"jump_s": round(jump_s, 3), "ranks": len(of_ranks)},
                    confidence=0.95,
                )

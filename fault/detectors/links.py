"""Which way between two ranks is slow, or lets nothing pass: by the counters of their connections.

What is sent and not acknowledged is kept by the way: the kernel of the receiver acknowledges, whatever its process does. On a
way that is cut it is sent again and again. One that is slow is busy for long with few bytes, next to other ways or to itself
before.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from evermesh.fault.connections import Connection
from evermesh.fault.detectors import kinds
from evermesh.fault.events import Finding
from evermesh.fault.recorder.trace import UNKNOWN_NODE, RankTrace

Link = tuple[int, int]
"""From and to: global ranks."""
_LEAST_BUSY, _LEAST_RATIO = 0.15, 4.0
"""Of the time; and how much slower than others a way is that is found."""
_LEAST_OTHERS = 2
_LEAST_SPAN_S = 1.0
_LEAST_RESENT = 2
_LASTING = 2
"""Spans in a row in which the same way has to be slow."""


@dataclass(frozen=True, slots=True)
class _Rate:
    bytes_per_s: float
    """While it was busy."""
    busy: float
    """Share of the time."""


@dataclass(slots=True)
class LinkWatch:
    """Joins what the agents of all ranks see of their connections, about every second."""

    _at_s: float = 0.0
    _before: dict[Link, tuple[int, int]] = field(default_factory=dict)
    """Bytes acknowledged and milliseconds busy so far."""
    _best: dict[Link, float] = field(default_factory=dict)
    _cut: frozenset[Link] = frozenset()
    _slow: list[tuple[Link, float, float]] = field(default_factory=list)
    """One for each of the last spans: way, ratio, share of the time in which it was busy."""

    @property
    def cut(self) -> frozenset[Link]:
        """Ways on which the same is sent again and again, at the last look."""
        return self._cut

    def look(self, connections: Mapping[int, Sequence[Connection]], at_s: float) -> None:
        """Take the connections of all ranks at a moment; those that the agents of their nodes see."""
        rank_of = {one.local: rank for rank, found in connections.items() for one in found}
        counted: dict[Link, tuple[int, int]] = defaultdict(lambda: (0, 0))
        cut = set()
        for rank, found in connections.items():
            for one in found:
                other = rank_of.get(one.remote)
                if other is None or other == rank:
                    continue
                sent, busy = counted[rank, other]
                counted[rank, other] = (sent + one.acked_bytes, busy + one.busy_ms)
                if one.waiting_bytes and one.resent >= _LEAST_RESENT:
                    cut.add((rank, other))
        self._cut = frozenset(cut)
        span_s = at_s - self._at_s
        if self._before and span_s < _LEAST_SPAN_S:
            return
        if self._before:
            self._note_slow(self._rates(counted, span_s))
        self._before, self._at_s = dict(counted), at_s

    def find_slow(self, traces: Sequence[RankTrace]) -> list[Finding]:
        """The way that was much slower than others, or than itself before, in the last looks."""
        if len(self._slow) < _LASTING:
            return []
        (source, target), ratio, busy = self._slow[-1]
        link = (min(source, target), max(source, target))
        nodes = {trace.node for trace in traces if trace.rank in link} - {UNKNOWN_NODE}
        return [
            Finding(
                kind=kinds.SLOW_LINK,
                link=link,
                node=nodes.pop() if len(nodes) == 1 else None,
                text=f"what rank {source} sends to rank {target} passes {ratio:.1f} times as slowly as on other ways, or "
                f"before, and is under way {busy:.0%} of the time",
                evidence={"ratio": round(ratio, 2), "busy": round(busy, 3), "from": source, "to": target},
                confidence=0.85,
            )
        ]

    def _rates(self, counted: Mapping[Link, tuple[int, int]], span_s: float) -> dict[Link, _Rate]:
        found = {}
        for link, (sent, busy_ms) in counted.items():
            sent_before, busy_before = self._before.get(link, (0, 0))
            busy_s = (busy_ms - busy_before) / 1e3
            if sent > sent_before and busy_s >= 0:
                found[link] = _Rate((sent - sent_before) / max(busy_s, 1e-3), busy_s / span_s)
        return found

    def _note_slow(self, rates: Mapping[Link, _Rate]) -> None:
        for link, rate in rates.items():
            self._best[link] = max(self._best.get(link, 0.0), rate.bytes_per_s)
        slow = []
        for link, rate in rates.items():
            others = [one.bytes_per_s for other, one in rates.items() if set(other) != set(link)]
            usual = float(np.median(others)) if len(others) >= _LEAST_OTHERS else self._best[link]
            if rate.busy >= _LEAST_BUSY and rate.bytes_per_s * _LEAST_RATIO < usual:
                slow.append((link, usual / max(rate.bytes_per_s, 1.0), rate.busy))
        ways = {frozenset(link) for link, _, _ in slow}
        if len(ways) != 1:  # of several nobody knows which one makes the others slow
            self._slow.clear()
            return
        worst = max(slow, key=lambda one: one[1])
        if self._slow and set(self._slow[-1][0]) != set(worst[0]):
            self._slow.clear()
        self._slow = [*self._slow[-_LASTING + 1 :], worst]

"""Which way between two ranks is slow, or lets nothing pass: by what their connections hold.

What is sent and not acknowledged is held by the way: the kernel of the receiver acknowledges, whatever its process does, at
once from the second segment on. On a way that is cut it is sent again and again; one that is slow holds something most of the
time while others hardly ever do.
"""

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evermesh.fault.connections import Connection
from evermesh.fault.detectors import kinds
from evermesh.fault.events import Finding
from evermesh.fault.recorder.trace import UNKNOWN_NODE, RankTrace

Link = tuple[int, int]
"""From and to: global ranks."""
_MOST_LOOKS, _LEAST_LOOKS = 32, 12
_LEAST_SHARE, _OF_OTHERS = 0.3, 3.0
"""Of the looks in which a slow way holds something, and how much more often than any other it does."""
_LEAST_RESENT = 2
_SEGMENTS = 2
"""So many may wait for an acknowledgement that is put off."""


@dataclass(slots=True)
class LinkWatch:
    """Joins what the agents of all ranks see of their connections, some times per second."""

    _held: deque[frozenset[Link]] = field(default_factory=lambda: deque(maxlen=_MOST_LOOKS))
    """Ways, lower rank first, that held something, by look."""
    _ways: set[Link] = field(default_factory=set)
    """That there are connections for."""
    _rank_of: dict[str, int] = field(default_factory=dict)
    """By the end of a connection."""
    _cut: frozenset[Link] = frozenset()

    @property
    def cut(self) -> frozenset[Link]:
        """From and to: ways on which the same was sent again and again, at the last look."""
        return self._cut

    def look(self, connections: Mapping[int, Sequence[Connection]]) -> None:
        """Take the connections of all ranks at a moment, as the agents of their nodes see them. Those that are known and hold
        nothing may be left out."""
        self._rank_of.update((one.local, rank) for rank, found in connections.items() for one in found)
        held, cut = set(), set()
        for rank, found in connections.items():
            for one in found:
                other = self._rank_of.get(one.remote)
                if other is None or other == rank:
                    continue
                way = (min(rank, other), max(rank, other))
                self._ways.add(way)
                if one.waiting_bytes > _SEGMENTS * one.segment_bytes:
                    held.add(way)
                if one.waiting_bytes and one.resent >= _LEAST_RESENT:
                    cut.add((rank, other))
        self._cut = frozenset(cut)
        self._held.append(frozenset(held))

    def find_slow(self, traces: Sequence[RankTrace]) -> list[Finding]:
        """The way that holds something in far more looks than any other; where there is only one nobody knows."""
        counts = Counter(way for held in self._held for way in held)
        if len(self._held) < _LEAST_LOOKS or len(self._ways) < 2 or not counts:
            return []
        (link, most), *others = counts.most_common(2)
        if any(set(cut) == set(link) for cut in self._cut):
            return []  # it is not slow
        share, second = most / len(self._held), others[0][1] / len(self._held) if others else 0.0
        if share < _LEAST_SHARE or share < _OF_OTHERS * second:
            return []
        nodes = {trace.node for trace in traces if trace.rank in link} - {UNKNOWN_NODE}
        return [
            Finding(
                kind=kinds.SLOW_LINK,
                link=link,
                node=nodes.pop() if len(nodes) == 1 else None,
                text=f"what ranks {link[0]} and {link[1]} send each other is on its way in {share:.0%} of all looks, and on "
                f"no other way in more than {second:.0%}",
                evidence={"share": round(share, 3), "next": round(second, 3), "looks": len(self._held)},
                confidence=0.85,
            )
        ]

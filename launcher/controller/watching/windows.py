"""The newest summary of every rank, as agents tell them."""

import time
from collections import deque
from dataclasses import dataclass

from evermesh.fault.detectors.summaries import RankSummary
from evermesh.fault.process_state import ProcessState
from evermesh.fault.recorder.record import Group
from evermesh.fault.recorder.trace import RankTrace
from evermesh.launcher.controller.watching.reading_times import ReadingTimes
from evermesh.launcher.watching.messages import PackedSummary, RingPart, Window
from evermesh.launcher.watching.packing import SummaryInvalid, Unpacker

_WAIT_S = 3.0
"""For nodes that have said nothing yet."""
_LATE_S = 1.5
"""What was read earlier than that than the newest is no picture of one moment."""


@dataclass(slots=True)
class _OfNode:
    window: Window | None
    """None: it is in a moment that was taken."""
    heard_s: float


@dataclass(frozen=True, slots=True)
class Moment:
    """What all ranks were doing at about one moment, as it was told."""

    told: deque[tuple[str, PackedSummary, dict[int, Group]]]
    """Of every rank: its node, its summary, its groups."""
    unpacker: Unpacker
    apart_s: float
    """By how much the moments differ at which ranks of different nodes were read, at most."""

    @property
    def processes(self) -> dict[int, ProcessState | None]:
        """By rank; None: it does not run."""
        return {one.tail.rank: one.tail.process for _, one, _ in self.told}

    @property
    def starved(self) -> dict[int, float]:
        """By rank: how much of the last second it waited for a processor."""
        return {one.tail.rank: one.starved for _, one, _ in self.told}

    def summaries(self) -> list[RankSummary]:
        """Unpacked, once: what was told is let go on the way, for of many ranks it takes much memory, and a while.

        Raises:
            SummaryInvalid: one is none.
        """
        found = []
        while self.told:
            node, one, groups = self.told.popleft()
            found.append(self.unpacker.summary(one, node, groups))
        return found


class Windows:
    """Of one generation of ``num_ranks`` ranks on so many nodes."""

    def __init__(self, num_ranks: int, num_nodes: int) -> None:
        self._num_ranks, self._num_nodes = num_ranks, num_nodes
        self._unpacker = Unpacker(num_ranks)
        self._groups: dict[int, dict[int, Group]] = {}
        self._of_nodes: dict[str, _OfNode] = {}
        self._reading_times = ReadingTimes()
        self._first_s: float | None = None
        self._taken_s = 0.0

    def take(self, node: str, window: Window) -> None:
        """Take what an agent tells; the groups that it names are remembered."""
        now_s = time.monotonic()
        self._first_s = self._first_s or now_s
        for one in window.summaries:
            if one.groups is not None and one.tail.rank < self._num_ranks:
                self._groups[one.tail.rank] = self._unpacker.groups(one.groups)
        self._of_nodes[node] = _OfNode(window, now_s)
        read_s = [one.tail.read_ns / 1e9 for one in window.summaries]
        if read_s:
            self._reading_times.note(node, min(read_s), max(read_s), now_s)

    def moment(self) -> Moment | None:
        """The newest windows of all nodes, once; None: some are missing, or they are too far apart."""
        heard = [one.heard_s for one in self._of_nodes.values()]
        if not heard or min(heard) <= self._taken_s or max(heard) - min(heard) > _LATE_S:
            return None
        is_whole = len(heard) == self._num_nodes
        if not is_whole and (self._first_s is None or time.monotonic() - self._first_s < _WAIT_S):
            return None
        self._taken_s = max(heard)
        of_rank = {
            one.tail.rank: (node, one, self._groups[one.tail.rank])
            for node, of in self._of_nodes.items()
            for one in (of.window.summaries if of.window is not None else ())
            if one.tail.rank in self._groups
        }
        for of in self._of_nodes.values():
            of.window = None
        told = deque(of_rank.values())
        return Moment(told, self._unpacker, self._reading_times.apart_s()) if len(told) > 1 else None

    def trace(self, node: str, part: RingPart) -> RankTrace:
        """The records that were asked for.

        Raises:
            SummaryInvalid: they are none, or nobody knows the groups of the rank.
        """
        groups = self._groups.get(part.trace.rank)
        if groups is None:
            raise SummaryInvalid(f"the groups of rank {part.trace.rank} are not known")
        return self._unpacker.trace(part.trace, node, groups)

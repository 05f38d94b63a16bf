"""The rings of the ranks of a node as a thread of its agent reads them: in windows, and whole when the controller asks."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from evermesh.fault.detectors.summaries import RankWatch
from evermesh.fault.processors import QueueWatch
from evermesh.fault.recorder.errors import RingUnreadable
from evermesh.fault.recorder.following import RingFollower
from evermesh.fault.recorder.record import Group
from evermesh.fault.recorder.trace import RankTrace
from evermesh.launcher.watching.messages import PackedSummary, ReadRings, RingPart, Window
from evermesh.launcher.watching.packing import pack_summary, pack_trace

_TAIL = 16
"""Records before the new ones that a summary may show."""
_STILL_NS, _LONG_NS = 200_000_000, 2_000_000_000
"""A rank that has begun nothing for so long may hang soon; after the longer time it is known, or takes long in every step."""


class _Watched:
    """One rank."""

    def __init__(self, follower: RingFollower) -> None:
        self.follower, self._watch = follower, RankWatch()
        self._next = 1
        self._told: Mapping[int, Group] | None = None
        self._newest = self._moved_ns = 0
        self.stands_still = False

    def summarise(self, queue: QueueWatch, *, says_groups: bool) -> PackedSummary:
        process = self.follower.process()  # before its ring: who has ended writes no more
        trace = self.follower.read(max(1, self._next - _TAIL))
        self._note_progress(trace)
        summary = self._watch.summarise(trace)
        if summary.num_records:
            self._next += summary.num_lost + summary.num_records
        with_groups = says_groups or self._told is None or trace.groups is not self._told
        self._told = trace.groups
        return pack_summary(summary, process, with_groups=with_groups, starved=queue.look(trace.pid))

    def _note_progress(self, trace: RankTrace) -> None:
        newest = int(trace.records["sequence"][-1]) if len(trace.records) else 0
        if newest != self._newest:
            self._newest, self._moved_ns = newest, int(trace.records["entered_ns"][-1])
        self.stands_still = newest > 0 and _STILL_NS <= trace.read_ns - self._moved_ns < _LONG_NS


class RingWatch:
    """Reads the rings of one generation on a node. A ring that is not there yet, or cannot be read, is left out."""

    def __init__(self, generation: int, rings: Mapping[int, Path]) -> None:
        self._generation = generation
        self._missing = dict(rings)
        self._watched: dict[int, _Watched] = {}
        self._queue = QueueWatch()

    def window(self, *, says_groups: bool) -> Window:
        """What all ranks did since the last call. ``says_groups``: whoever hears it knows nothing."""
        for rank, path in list(self._missing.items()):
            with suppress(OSError, RingUnreadable):
                self._watched[rank] = _Watched(RingFollower(path))
                del self._missing[rank]
        found = tuple(one.summarise(self._queue, says_groups=says_groups) for _, one in sorted(self._watched.items()))
        return Window(generation=self._generation, summaries=found)

    @property
    def stands_still(self) -> bool:
        """Whether the last window showed a rank that has just stopped to begin anything."""
        return any(one.stands_still for one in self._watched.values())

    def answer(self, order: ReadRings, send: Callable[[RingPart], None]) -> None:
        """Send the newest records of the ranks that are asked for, one after another."""
        for part in self._parts(order):
            send(part)

    def close(self) -> None:
        """Unmap the rings."""
        for one in self._watched.values():
            one.follower.close()
        self._watched.clear()

    def _parts(self, order: ReadRings) -> Iterator[RingPart]:
        for rank in order.ranks:
            one = self._watched.get(rank)
            if one is not None and order.generation == self._generation:
                process = one.follower.process()
                trace = one.follower.newest(order.records)
                yield RingPart(generation=self._generation, trace=pack_trace(trace, process))

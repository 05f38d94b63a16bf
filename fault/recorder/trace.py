"""What the ring of one rank held when it was read."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evermesh.fault.recorder.record import Group
from evermesh.parallelism.collectives import Phase

UNKNOWN_NODE = ""
"""Node of a rank of which nobody knows where it ran; two such ranks are not on one node."""


@dataclass(frozen=True, slots=True)
class RankTrace:
    """Records of one rank, oldest first, with their names and what the header of the ring said."""

    rank: int
    """Global."""
    node: str
    pid: int
    records: np.ndarray
    """Array [records] of ``RECORD``, ascending ``sequence`` without gaps."""
    groups: Mapping[int, Group]
    """By the index that records hold."""
    sites: Mapping[int, str]
    """Call sites by index."""
    step: int
    """Where the rank is now, which may be beyond its last record."""
    phase: Phase
    read_ns: int
    """Monotonic clock of the node when the ring was read: what is open is that old."""
    wall_offset_ns: int
    """Wall clock minus monotonic clock of the node, nanoseconds."""

    @property
    def num_overwritten(self) -> int:
        """Records that the ring no longer holds."""
        return int(self.records["sequence"][0]) - 1 if len(self.records) else 0

"""What a synthetic job is: its grid of ranks, its groups, and how long things take."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from evermesh.fault.recorder.record import Group

AXES = ("world", "dp", "tp", "pp")
"""Groups of a rank, in the order of their index in its names. The tensor-parallel ranks are neighbours, stages are blocks."""


@dataclass(frozen=True, slots=True)
class Clock:
    """How the clock of a node differs from the true one."""

    offset_ns: int = 0
    drift_ppm: float = 0.0


@dataclass(frozen=True)
class JobShape:
    """A job of ``pp`` x ``dp`` x ``tp`` ranks that does the same in every step; times in seconds."""

    dp: int = 2
    tp: int = 1
    pp: int = 1
    ranks_per_node: int = 8
    steps: int = 12
    micro_batches: int = 2
    layers: int = 2
    """Of a stage; each ends, forward and backward, with a sum over the tensor-parallel group."""
    layer_s: float = 1e-3
    """Computation of one layer forward; backward takes twice as long."""
    jitter: float = 0.03
    """Relative standard deviation of every computation."""
    heterogeneity: float = 0.02
    """Relative standard deviation of the speed of a rank, the same for the whole job."""
    transfer_jitter: float = 0.1
    latency_s: float = 30e-6
    bytes_per_s: float = 10e9
    gradient_bytes: int = 1 << 20
    activation_bytes: int = 1 << 16
    first_step: int = 1
    ring_capacity: int = 16_384
    """Records that a rank keeps."""
    clocks: tuple[Clock, ...] = field(default=())
    """By node; the rest are true."""

    @property
    def num_ranks(self) -> int:
        return self.pp * self.dp * self.tp

    @property
    def num_nodes(self) -> int:
        return -(-self.num_ranks // self.ranks_per_node)

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def stage_of(self, rank: int) -> int:
        return rank // (self.dp * self.tp)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """All groups of more than one rank: of the world, then by axis."""
        grid = np.arange(self.num_ranks).reshape(self.pp, self.dp, self.tp)
        along = {
            "world": grid.reshape(1, -1),
            "dp": grid.transpose(0, 2, 1).reshape(-1, self.dp),
            "tp": grid.reshape(-1, self.tp),
            "pp": grid.transpose(1, 2, 0).reshape(-1, self.pp),
        }
        return tuple(
            Group(axis if axis == "world" else f"{axis}{index}", tuple(members), axis)
            for axis in AXES
            for index, members in enumerate(along[axis].tolist())
            if len(members) > 1
        )

    @cached_property
    def group_of(self) -> np.ndarray:
        """Array [ranks, axes]: index in ``groups``, -1 where the axis has one rank only."""
        of = np.full((self.num_ranks, len(AXES)), -1, np.int64)
        for index, group in enumerate(self.groups):
            of[list(group.ranks), AXES.index(group.axis)] = index
        return of

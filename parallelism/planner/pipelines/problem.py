"""What is planned, as the compiled loops see it: arrays of numbers, times in integer ticks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import LayoutDoesNotFit, SequenceTooLong
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pipeline.schedule import PipelineSchedule
from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import Coefficients, shared_s, ticks
from evermesh.parallelism.pool import Pool

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class Batch(NamedTuple):
    """What is to be placed, longest sequence first."""

    lengths: Integers
    whole: Integers
    """[recomputed, sequence]: ticks on one rank."""


class Ranks(NamedTuple):
    """Where it can be placed."""

    nodes: Integers
    """Of every HDP rank."""
    speeds: Floats
    node_size: int
    """Ranks of the largest node: rings up to that size stay in one."""
    aligned: bool
    """Whether all nodes have that size; otherwise wider rings never divide heads."""


class Machine(NamedTuple):
    """What runs the waves."""

    schedule: PipelineSchedule
    fixed: int
    """Ticks of a micro-batch without tokens."""
    speed: float
    """Of all HDP ranks together."""
    keep_room: int
    """Tokens up to which nothing is computed again; 0: always is."""


class Waves(NamedTuple):
    """How large every wave is meant to be."""

    targets: Integers
    """Ticks of a micro-batch on a rank of speed 1, without its fixed cost."""
    room: Integers
    """Tokens of a micro-batch."""
    recomputed: Flags


class Placement(NamedTuple):
    """Where every sequence of a ``Batch`` is; [sequence]."""

    wave: Integers
    first: Integers
    """The first rank of its ring."""
    ring: Integers
    heads: Integers
    gathers: Flags


class Filling(NamedTuple):
    """What is in the waves so far; all are [wave, HDP rank]."""

    loads: Integers
    """Ticks on a rank of speed 1, without the fixed cost."""
    tokens: Integers
    limits: Floats
    """The loads that are meant to be there in the end."""


class Problem(NamedTuple):
    """What is planned, as the compiled loops see it."""

    costs: Coefficients
    batch: Batch
    order: Integers
    """[index in the batch]: the sequence it is."""
    ranks: Ranks
    machine: Machine
    groups: Integers
    """[HDP rank]: the first rank of those it keeps step with; -1: none."""


def check_batch(lengths: Sequence[int], layout: Layout, pool: Pool) -> None:
    if len(pool) != layout.hdp:
        raise LayoutDoesNotFit(f"the pool has {len(pool)} HDP ranks, but layout.hdp is {layout.hdp}.", "hdp")
    for index, length in enumerate(lengths):
        if length < 1:
            raise LayoutDoesNotFit(f"sequence {index} has {length} tokens; every sequence has at least 1.")
        if length > layout.hdp * layout.capacity:
            raise SequenceTooLong(index, length, layout.capacity, layout.hdp)


def problem_of(lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool) -> Problem:
    sizes = np.array(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable")
    total_s = sum(cost.whole_s(length, recomputed=True) + cost.micro_batch_s for length in lengths)
    costs = Coefficients.of(cost, layout, total_s)
    nodes = np.array(pool.nodes, dtype=np.int64)
    _, of_node = np.unique(nodes, return_counts=True)
    ranks = Ranks(nodes, np.array(pool.speeds), int(of_node.max()), bool((of_node == of_node[0]).all()))
    groups = np.full(layout.hdp, -1, dtype=np.int64)
    for group in layout.lock_step_groups:
        groups[list(group)] = group[0]
    machine = Machine(layout.pipeline, ticks(costs, cost.micro_batch_s), float(sum(pool.speeds)), costs.keep_capacity)
    return Problem(costs, Batch(sizes[order], _whole(costs, sizes[order])), order, ranks, machine, groups)


@compiled
def _whole(costs: Coefficients, lengths: Integers) -> Integers:
    """``Batch.whole``."""
    whole = np.empty((2, lengths.size), dtype=np.int64)
    for index in range(lengths.size):
        for recomputed in range(2):
            whole[recomputed, index] = ticks(
                costs, shared_s(costs, lengths[index], 1, 1, False, False, recomputed == 1)
            )
    return whole

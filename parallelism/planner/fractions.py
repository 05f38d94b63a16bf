"""Which fraction of the tokens of every micro-batch waits in host memory: what the layout says, or what takes least time."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evermesh.parallelism.batch_plan import MicroBatch
from evermesh.parallelism.cost import CostModel, Work, best_fraction
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner.assembling import Columns
from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import Coefficients, padded_pairs
from evermesh.parallelism.planner.rings import Floats, Integers
from evermesh.parallelism.rank_work import Assignment, PackedRanks
from evermesh.parallelism.simulator.aggregate import work_of

_best_fraction = compiled(best_fraction)


def with_fractions(assignment: Assignment, lengths: Sequence[int], layout: Layout, cost: CostModel) -> Assignment:
    """The micro-batches, each that is recomputed with the fraction that the layout says or that takes least time."""

    def fraction(micro_batch: MicroBatch) -> float:
        if micro_batch.recompute == "none":
            return 0.0
        return layout.offload if layout.offload != "auto" else cost.best_offload(work_of(micro_batch, lengths, cost))

    return tuple(
        tuple(replace(micro_batch, offload=fraction(micro_batch)) for micro_batch in of_rank) for of_rank in assignment
    )


def with_offload(lengths: Integers, columns: Columns, layout: Layout, cost: CostModel) -> PackedRanks:
    """The packed plan, with fractions as ``with_fractions`` chooses them."""
    offload = np.where(columns.recomputed, layout.most_offload, 0.0)
    if layout.offload == "auto":
        tokens, pairs = _work(Coefficients.of(cost, layout, 1.0), lengths, columns)
        of_token, of_pair = cost.passes_s(Work(1.0, 0.0)), cost.passes_s(Work(0.0, 1.0))
        _choose(
            offload,
            tokens,
            of_token[0] * tokens + of_pair[0] * pairs,
            of_token[1] * tokens + of_pair[1] * pairs,
            (cost.host_token_s, cost.host_products_token_s, cost.offload_saves_token_s),
        )
    return PackedRanks(lengths, *columns, offload=offload)


@compiled
def _choose(
    offload: Floats, tokens: Floats, forward: Floats, backward: Floats, per_token: tuple[float, float, float]
) -> None:
    """Write the best fraction of every micro-batch where there is one already."""
    for micro_batch in range(len(offload)):
        if offload[micro_batch] > 0:
            offload[micro_batch] = _best_fraction(
                tokens[micro_batch], forward[micro_batch], backward[micro_batch], *per_token
            )


@compiled
def _work(costs: Coefficients, lengths: Integers, columns: Columns) -> tuple[Floats, Floats]:
    """Tokens and pairs of every micro-batch."""
    count = len(columns.micro_batch_start) - 1
    tokens, pairs = np.zeros(count), np.zeros(count)
    for micro_batch in range(count):
        for piece in range(columns.micro_batch_start[micro_batch], columns.micro_batch_start[micro_batch + 1]):
            sequence = columns.sequence[piece]
            ring = columns.ring_start[sequence + 1] - columns.ring_start[sequence]
            tokens[micro_batch] += lengths[sequence] / ring
            pairs[micro_batch] += padded_pairs(costs, lengths[sequence], ring // columns.heads[sequence]) / ring
    return tokens, pairs

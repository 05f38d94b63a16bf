"""What every micro-batch of a plan takes: ``CostModel.parts`` for all pieces at once; a test holds them equal."""

import numpy as np
from numpy.typing import NDArray

from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.proof.columns import Columns

Floats = NDArray[np.float64]


def micro_batch_seconds(columns: Columns, cost: CostModel, pool: Pool) -> Floats:
    """Seconds of every micro-batch on its own rank, without waiting, [M]."""
    of_pieces = _piece_seconds(columns, cost, pool)
    together = np.bincount(columns.micro_batch, weights=of_pieces, minlength=len(columns.rank))
    speeds = np.asarray(pool.speeds, np.float64)
    return (cost.micro_batch_s + together) / speeds[columns.rank]


def _piece_seconds(columns: Columns, cost: CostModel, pool: Pool) -> Floats:
    """Of every piece, [P]; nothing of it depends on who of a ring holds it."""
    sequence = columns.sequence
    recomputed = columns.recomputed[columns.micro_batch]
    length, ring = columns.lengths[sequence], columns.ring_size[sequence]
    heads, gathers = columns.heads[sequence], columns.gathers[sequence]
    groups = ring // heads
    token_s = cost.token_s + cost.expert_token_s + recomputed * cost.recompute_token_s
    pair_s = cost.pair_s + recomputed * cost.recompute_pair_s
    unit = np.where(groups == 1, 1, 2 * groups) * cost.tile
    padded = length if cost.tile == 1 else -(-length // unit) * unit
    attention = pair_s * (padded * (padded + 1) / 2) / ring
    network = (_crosses_nodes(columns, pool) & (columns.ring_size > columns.heads))[sequence]
    passed_token_s = np.where(network, _or(cost.network_token_s, cost.ring_token_s), cost.ring_token_s)
    step_s = np.where(network, _or(cost.network_step_s, cost.ring_step_s), cost.ring_step_s)
    passed = (groups - 1) / groups * length / heads * passed_token_s
    exchanged = (heads - 1) / heads * length / ring * cost.head_token_s
    steps = groups - 1 + (heads > 1)
    shown = np.where(gathers, attention + passed, np.maximum(attention, passed))
    turns = np.where(gathers, np.minimum(steps, 2), steps)
    return cost.piece_s + token_s * length / ring + shown + exchanged + turns * step_s


def _or(found: float | None, otherwise: float) -> float:
    return otherwise if found is None else found


def _crosses_nodes(columns: Columns, pool: Pool) -> NDArray[np.bool_]:
    """Of every sequence: whether its ring has members in several nodes, [N]."""
    node = np.asarray(pool.nodes, np.int64)[columns.ring]
    elsewhere = node != node[columns.ring_start[:-1]][columns.sequence_of_member]
    return np.bincount(columns.sequence_of_member, weights=elsewhere, minlength=len(columns.lengths)) > 0

"""What every micro-batch of a plan takes: ``CostModel.parts`` and ``offload_s`` for all at once; a test holds them equal."""

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
    return (cost.micro_batch_s + together + _offload_seconds(columns, cost)) / speeds[columns.rank]


def _offload_seconds(columns: Columns, cost: CostModel) -> Floats:
    """What offloading adds to every micro-batch, [M]: copies beside the passes that they hide behind, less what is saved."""
    ring = columns.ring_size[columns.sequence]
    tokens, pairs = (
        np.bincount(columns.micro_batch, weights=of_pieces, minlength=len(columns.rank))
        for of_pieces in (columns.lengths[columns.sequence] / ring, _pairs(columns, cost.tile) / ring)
    )
    forward = cost.token_s * tokens / 3.0 + cost.pair_s * pairs / 3.5
    saved = columns.offload * cost.offload_saves_token_s * tokens
    backward = (cost.token_s * 2.0 / 3.0 + cost.recompute_token_s) * tokens - saved
    backward += (cost.pair_s * 2.5 / 3.5 + cost.recompute_pair_s) * pairs
    copies = (cost.host_token_s + columns.offload * cost.host_products_token_s) * tokens
    longer = np.maximum(copies - forward, 0.0) + np.maximum(copies - backward, 0.0)
    return np.where(columns.recomputed, longer - saved, 0.0)


def _pairs(columns: Columns, tile: int) -> Floats:
    """Visible pairs of the sequence of every piece, with the padding of tiles, [P]."""
    length = columns.lengths[columns.sequence]
    groups = (columns.ring_size // columns.heads)[columns.sequence]
    unit = np.where(groups == 1, 1, 2 * groups) * tile
    padded = length if tile == 1 else -(-length // unit) * unit
    pairs: Floats = padded * (padded + 1) / 2
    return pairs


def _piece_seconds(columns: Columns, cost: CostModel, pool: Pool) -> Floats:
    """Of every piece, [P]; nothing of it depends on who of a ring holds it."""
    sequence = columns.sequence
    recomputed = columns.recomputed[columns.micro_batch]
    length, ring = columns.lengths[sequence], columns.ring_size[sequence]
    heads, gathers = columns.heads[sequence], columns.gathers[sequence]
    groups = ring // heads
    token_s = cost.token_s + cost.expert_token_s + recomputed * cost.recompute_token_s
    pair_s = cost.pair_s + recomputed * cost.recompute_pair_s
    attention = pair_s * _pairs(columns, cost.tile) / ring
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

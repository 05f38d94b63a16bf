"""A time that no plan for free ranks can beat, by the verifier's own formula: simpler than the planner's, never above it."""

import numpy as np

from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.proof.durations import Floats
from evermesh.parallelism.rank_work import Integers


def valid_bound_s(lengths: Integers, layout: Layout, cost: CostModel, pool: Pool) -> float:
    """Seconds, for ranks that hold the whole model and keep step with nobody: the larger of two bounds.

    - Work: products and attention of every token, once, with copies to host memory that all hide, and the
      fixed cost of as few micro-batches as hold all tokens, spread over all ranks by their speeds.
    - The longest sequence on its best ring of ranks as fast as the fastest. Where heads may be divided or keys gathered,
      what rings send is left out, which only lowers it.
    """
    if not len(lengths):
        return 0.0
    always = layout.recompute == "block" and layout.keep_capacity is None
    again_s = cost.recompute_token_s - layout.most_offload * cost.offload_saves_token_s
    token_s = cost.token_s + cost.expert_token_s + always * again_s
    pair_s = cost.pair_s + always * cost.recompute_pair_s
    padded = -(-lengths // cost.tile) * cost.tile
    products, attention = token_s * lengths, pair_s * (padded * (padded + 1) / 2)
    fixed = -(-int(lengths.sum()) // layout.capacity) * cost.micro_batch_s
    work = (float((products + attention + cost.piece_s).sum()) + fixed) / sum(pool.speeds)

    alone = _longest_s(int(lengths.max()), float(products.max()), float(attention.max()), layout, cost, pool)
    return max(work, (alone + cost.micro_batch_s) / max(pool.speeds))


def _longest_s(length: int, products: float, attention: float, layout: Layout, cost: CostModel, pool: Pool) -> float:
    """Seconds of the longest sequence on its best ring, without the micro-batch."""
    rings = np.arange(-(-length // layout.capacity), len(pool) + 1)
    shared: Floats = attention / rings
    steps: Floats = np.zeros(len(rings))
    if layout.ulysses == 1 and not layout.gathers_keys:
        network = rings > pool.largest_node
        token = cost.ring_token_s if cost.network_token_s is None else cost.network_token_s
        step = cost.ring_step_s if cost.network_step_s is None else cost.network_step_s
        sent = (rings - 1) / rings * length * np.where(network, token, cost.ring_token_s)
        shared = np.maximum(shared, sent)
        step_s: Floats = np.where(network, step, cost.ring_step_s)
        steps = step_s * (rings - 1)
    return float((cost.piece_s + products / rings + shared + steps).min())

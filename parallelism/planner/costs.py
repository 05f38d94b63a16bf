"""The cost model as the planner's loops see it: integer ticks.

The formulas are those of ``CostModel.shared_s``, written again as functions that numba compiles; a test holds them equal.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.offloading import Planes, planes_of

Integers = NDArray[np.int64]


class Coefficients(NamedTuple):
    """Of a cost model and a layout; seconds as in ``CostModel``, with what is left out filled in."""

    token_s: float
    pair_s: float
    micro_batch_s: float
    piece_s: float
    tile: int
    recompute_token_s: float
    recompute_pair_s: float
    offloads: bool
    """Whether offloading changes the time of what is recomputed."""
    planes: Planes
    """The largest of them is what offloading adds to a micro-batch; see ``offloading``."""
    ring_step_s: float
    ring_token_s: float
    network_step_s: float
    network_token_s: float
    head_token_s: float
    most_heads: int
    """Neighbours that may divide heads."""
    gathers: bool
    """Whether keys and values may be gathered."""
    capacity: int
    """Tokens of a rank in a micro-batch."""
    keep_capacity: int
    """Up to so many tokens nothing is computed again; 0: always, ``capacity``: never."""
    ticks_per_s: float
    """A power of two."""

    @classmethod
    def of(cls, cost: CostModel, layout: Layout, total_s: float) -> "Coefficients":
        """With ticks so fine that work of ``total_s`` seconds on one rank takes some 2^50 of them."""
        keep = layout.capacity if layout.recompute == "none" else min(layout.keep_capacity or 0, layout.capacity)
        return cls(
            token_s=cost.token_s + cost.expert_token_s,
            pair_s=cost.pair_s,
            micro_batch_s=cost.micro_batch_s,
            piece_s=cost.piece_s,
            tile=cost.tile,
            recompute_token_s=cost.recompute_token_s,
            recompute_pair_s=cost.recompute_pair_s,
            offloads=cost.offloads,
            planes=planes_of(cost, layout.offload),
            ring_step_s=cost.ring_step_s,
            ring_token_s=cost.ring_token_s,
            network_step_s=cost.ring_step_s if cost.network_step_s is None else cost.network_step_s,
            network_token_s=cost.ring_token_s if cost.network_token_s is None else cost.network_token_s,
            head_token_s=cost.head_token_s,
            most_heads=layout.ulysses,
            gathers=layout.gathers_keys,
            capacity=layout.capacity,
            keep_capacity=keep,
            ticks_per_s=2.0 ** (50 - math.frexp(max(total_s, 1e-12))[1]),
        )


@compiled
def shared_s(
    costs: Coefficients, length: int, ring: int, heads: int, gathers: bool, crosses_nodes: bool, recomputed: bool
) -> float:
    """``CostModel.shared_s``, and what offloading adds if the micro-batch holds nothing else."""
    token_s, pair_s = costs.token_s, costs.pair_s
    if recomputed:
        token_s += costs.recompute_token_s
        pair_s += costs.recompute_pair_s
    groups = ring // heads
    pairs = padded_pairs(costs, length, groups)
    seconds = costs.piece_s + token_s * length / ring
    attention = pair_s * pairs / ring
    if recomputed and costs.offloads:
        seconds += offloaded_s(costs, length / ring, pairs / ring)
    if ring == 1:
        return seconds + attention
    exchanged = (heads - 1) / heads * length / ring * costs.head_token_s
    passed_token_s, step_s = costs.ring_token_s, costs.ring_step_s
    if crosses_nodes and groups > 1:
        passed_token_s, step_s = costs.network_token_s, costs.network_step_s
    passed = (groups - 1) / groups * length / heads * passed_token_s
    steps = groups - 1
    if heads > 1:
        steps += 1
    if gathers:
        return seconds + attention + passed + exchanged + min(steps, 2) * step_s
    return seconds + max(attention, passed) + exchanged + steps * step_s


@compiled
def padded_pairs(costs: Coefficients, length: int, groups: int) -> float:
    """Visible pairs of a document whose chunks so many groups of ranks share."""
    padded = length
    if costs.tile > 1:
        unit = (1 if groups == 1 else 2 * groups) * costs.tile
        padded = (length + unit - 1) // unit * unit
    return padded * (padded + 1) / 2


@compiled
def offloaded_s(costs: Coefficients, tokens: float, pairs: float) -> float:
    """What offloading adds to a recomputed micro-batch; below zero where it saves more."""
    seconds = -np.inf
    for token_s, pair_s in costs.planes:
        seconds = max(seconds, token_s * tokens + pair_s * pairs)
    return seconds


@compiled
def gained_together(costs: Coefficients, lengths: Integers) -> int:
    """Ticks that whole sequences take less in one recomputed micro-batch than if each hid its copies by itself."""
    tokens, pairs, apart = 0.0, 0.0, 0
    for length in lengths:
        own = padded_pairs(costs, length, 1)
        apart += ticks(costs, offloaded_s(costs, length, own))
        tokens += length
        pairs += own
    return apart - ticks(costs, offloaded_s(costs, tokens, pairs))


@compiled
def best_sharing(
    costs: Coefficients, length: int, ring: int, node_size: int, crosses_nodes: bool, recomputed: bool
) -> tuple[float, int, bool]:
    """The seconds, heads and gathering of the cheapest way to share a sequence over a ring.

    ``node_size`` ranks are neighbours in one node; those that divide heads are a divisor of ``most_heads``, so that the model
    decides by one number whether its heads can be divided. Of equals, the fewest heads, and passing before gathering.
    """
    best, best_heads, best_gathers = shared_s(costs, length, ring, 1, False, crosses_nodes, recomputed), 1, False
    if ring == 1:
        return best, best_heads, best_gathers
    most = min(costs.most_heads, node_size, ring)
    for heads in range(1, most + 1):
        if ring % heads or costs.most_heads % heads or (crosses_nodes and node_size % heads):
            continue
        for gathering in range(2):
            if gathering == 1 and (not costs.gathers or heads == ring):
                continue
            seconds = shared_s(costs, length, ring, heads, gathering == 1, crosses_nodes, recomputed)
            if seconds < best:
                best, best_heads, best_gathers = seconds, heads, gathering == 1
    return best, best_heads, best_gathers


@compiled
def least_shared_s(costs: Coefficients, length: int, ring: int, node_size: int, recomputed: bool) -> float:
    """The cheapest way to share, wherever the members are: neighbours may divide heads if the largest node, of ``node_size``
    ranks, has so many."""
    least = np.inf
    for heads in range(1, min(costs.most_heads, node_size, ring) + 1):
        if ring % heads or costs.most_heads % heads:
            continue
        least = min(least, shared_s(costs, length, ring, heads, False, ring > node_size, recomputed))
        if costs.gathers and ring > 1:
            least = min(least, shared_s(costs, length, ring, heads, True, ring > node_size, recomputed))
    return least


@compiled
def least_in_company_s(costs: Coefficients, length: int, ring: int, node_size: int) -> float:
    """No member of a ring takes less, whatever shares its micro-batches.

    Where a share could be kept its micro-batch may still be computed again, which is cheaper under some planes of offloading.
    """
    is_kept = not is_recomputed(costs, max(1, length // ring))
    least = least_shared_s(costs, length, ring, node_size, False) if is_kept else np.inf
    if not is_kept or costs.offloads:
        least = min(least, least_shared_s(costs, length, ring, node_size, True))
    return least


@compiled
def is_recomputed(costs: Coefficients, num_tokens: int) -> bool:
    """Whether a micro-batch with so many tokens computes its blocks again."""
    return num_tokens > costs.keep_capacity


@compiled
def ticks(costs: Coefficients, seconds: float) -> int:
    """Seconds as an integer number of ticks, rounded."""
    return int(seconds * costs.ticks_per_s + 0.5)


def linear(costs: Coefficients, lengths: Integers) -> tuple[Coefficients, ...]:
    """Costs that add up: however documents share micro-batches, they take at least as long as with one of these.

    Offloading has one plane: that of copies which all hide, and that which is largest for ``lengths`` together.
    """
    if not costs.offloads:
        return (costs,)
    sizes = -(-lengths // costs.tile) * costs.tile
    tokens, pairs = float(lengths.sum()), float((sizes * (sizes + 1) / 2).sum())
    largest = max(costs.planes, key=lambda plane: plane[0] * tokens + plane[1] * pairs)
    return tuple(costs._replace(planes=(plane,) * 4) for plane in dict.fromkeys((costs.planes[0], largest)))

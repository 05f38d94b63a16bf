"""Gives the rings of a wave their ranks, inside nodes as far as they fit."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from evermesh.parallelism.batch_plan import MicroBatch, Piece
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.planner.costs import Coefficients, best_sharing, is_recomputed
from evermesh.parallelism.pool import Pool


class Wave(NamedTuple):
    """What the ranks of a block run at once."""

    ranks: tuple[int, ...]
    """Of the block."""
    rings: Sequence[tuple[int, Sequence[int]]]
    """Number of members, and the sequences of their micro-batch."""
    slow: dict[int, Sequence[int]]
    """Sequences of slow ranks, which are in no rings."""


def place(wave: Wave, lengths: Sequence[int], layout: Layout, costs: Coefficients, pool: Pool) -> dict[int, MicroBatch]:
    """The micro-batch of every rank of the block; one without pieces where it has nothing to do.

    All of a wave compute their blocks again, or none, since ranks that keep step must agree.
    """
    by_ring = {(rank,): sequences for rank, sequences in wave.slow.items()}
    free = [rank for rank in wave.ranks if rank not in wave.slow]
    for members, sequences in sorted(wave.rings, key=lambda ring: -ring[0]):  # stable
        ring = _neighbours(members, free, pool)
        free = [rank for rank in free if rank not in ring] if members > 1 else free[1:]
        by_ring[ring] = sequences
    fullest = max(sum(-(-lengths[i] // len(ring)) for i in sequences) for ring, sequences in by_ring.items())
    keeps = layout.recompute == "none" or not is_recomputed(costs, fullest)
    nothing = MicroBatch((), recompute="none" if keeps else "block", offload=0.0 if keeps else layout.offload)
    placed = dict.fromkeys(wave.ranks, nothing)
    for ring, sequences in by_ring.items():
        schemes = [_scheme(costs, lengths[i], ring, pool, not keeps) for i in sequences]
        for index, rank in enumerate(ring):
            pieces = (
                Piece(i, share_of(lengths[i], len(ring), index).ranges(), ring, heads, gathers)
                for i, (heads, gathers) in zip(sequences, schemes, strict=True)
            )
            placed[rank] = MicroBatch(tuple(pieces), nothing.recompute, nothing.offload)
    return placed


def _neighbours(members: int, free: Sequence[int], pool: Pool) -> tuple[int, ...]:
    """So many free ranks: of the fullest node that has them, else of as few nodes as possible."""
    if members == 1:
        return (free[0],)
    by_node: dict[int, list[int]] = {}
    for rank in free:
        by_node.setdefault(pool.nodes[rank], []).append(rank)
    roomy = [node for node, ranks in by_node.items() if len(ranks) >= members]
    if roomy:
        node = min(roomy, key=lambda one: (len(by_node[one]), one))
        return tuple(by_node[node][:members])
    ring: list[int] = []
    for node in sorted(by_node, key=lambda one: (-len(by_node[one]), one)):
        ring += by_node[node][: members - len(ring)]
    return tuple(sorted(ring))


def _scheme(costs: Coefficients, length: int, ring: tuple[int, ...], pool: Pool, recomputed: bool) -> tuple[int, bool]:
    """Heads and gathering; those who divide heads are neighbours in one node."""
    if len(ring) == 1:
        return 1, False
    in_node = Counter(pool.nodes[rank] for rank in ring).values()
    _, heads, gathers = best_sharing(costs, length, len(ring), math.gcd(*in_node), len(in_node) > 1, recomputed)
    return heads, gathers


__all__ = ["Wave", "place"]

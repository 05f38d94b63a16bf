"""Gives the rings of a wave their ranks, inside nodes as far as they fit."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from evermesh.parallelism.batch_plan import Piece
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
    slow: Mapping[int, Sequence[int]]
    """Sequences of slow ranks, which are in no rings."""


class Placed(NamedTuple):
    """A wave whose rings have their ranks."""

    pieces: dict[int, tuple[Piece, ...]]
    """Of every rank of the block; none where it has nothing to do."""
    keeps: bool
    """Whether all of them keep their activations. Ranks that keep step must agree."""


def place(wave: Wave, lengths: Sequence[int], layout: Layout, costs: Coefficients, pool: Pool) -> Placed:
    """Give every ring its ranks, in the order of the search, and every sequence its cheapest scheme of attention there."""
    by_ring: dict[tuple[int, ...], Sequence[int]] = {(rank,): sequences for rank, sequences in wave.slow.items()}
    free = [rank for rank in wave.ranks if rank not in wave.slow]
    for members, sequences in wave.rings:
        ring = _neighbours(members, free, pool)
        free = [rank for rank in free if rank not in ring]
        by_ring[ring] = sequences
    fullest = max(sum(-(-lengths[i] // len(ring)) for i in sequences) for ring, sequences in by_ring.items())
    keeps = layout.recompute == "none" or not is_recomputed(costs, fullest)
    pieces: dict[int, tuple[Piece, ...]] = dict.fromkeys(wave.ranks, ())
    for ring, sequences in by_ring.items():
        if len(ring) == 1:
            pieces[ring[0]] = tuple(Piece(i, ((0, lengths[i]),), ring) for i in sequences)
            continue
        schemes = [_scheme(costs, lengths[i], ring, pool, not keeps) for i in sequences]
        for index, rank in enumerate(ring):
            pieces[rank] = tuple(
                Piece(i, share_of(lengths[i], len(ring), index).ranges(), ring, heads, gathers)
                for i, (heads, gathers) in zip(sequences, schemes, strict=True)
            )
    return Placed(pieces, keeps)


def _neighbours(members: int, free: Sequence[int], pool: Pool) -> tuple[int, ...]:
    """So many free ranks: of the fullest node that has them, else of the emptiest nodes. The search assumes the same."""
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
    in_node = Counter(pool.nodes[rank] for rank in ring).values()
    _, heads, gathers = best_sharing(costs, length, len(ring), math.gcd(*in_node), len(in_node) > 1, recomputed)
    return heads, gathers


__all__ = ["Placed", "Wave", "place"]

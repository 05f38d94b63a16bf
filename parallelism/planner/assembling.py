"""From placed rings and filled slots to the columns of a plan, and its exact makespan."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evermesh.parallelism.planner.compiling import compiled
from evermesh.parallelism.planner.costs import (
    Coefficients,
    best_sharing,
    gained_together,
    is_recomputed,
    shared_s,
    ticks,
)
from evermesh.parallelism.planner.filling import Filling, Slots, members, packs_of
from evermesh.parallelism.planner.rings import Floats, Integers, Rings, ranks_of, scaled


class Columns(NamedTuple):
    """As ``PackedRanks``."""

    rank_start: Integers
    micro_batch_start: Integers
    sequence: Integers
    ring_start: Integers
    ring: Integers
    heads: Integers
    gathers: NDArray[np.bool_]
    recomputed: NDArray[np.bool_]


class Sharings(NamedTuple):
    """How rings share their sequences."""

    order: Integers
    """The members of every ring in ring order, ring behind ring."""
    heads: Integers
    """Of every sequence."""
    gathers: NDArray[np.bool_]
    """Of every sequence."""
    durations: Integers
    """Of every ring on ranks of nominal speed, ticks."""


@compiled
def assemble(
    costs: Coefficients,
    lengths: Integers,
    alone: Integers,
    rings: Rings,
    slots: Slots,
    filling: Filling,
    slowness: Floats,
    node_of: Integers,
    node_size: int,
    pack: int,
) -> tuple[Columns, int]:
    """The columns, and when the last rank is done, ticks: rings in the order in which they were placed, packs around them.

    ``alone`` is the time of every sequence whole in a pack of ``pack`` tokens, without the micro-batch.
    """
    heads, gathers, durations = _sharings(costs, lengths, rings, node_of, node_size)
    sharings = Sharings(_ring_orders(rings, heads), heads, gathers, durations)
    return columns_of(costs, lengths, alone, rings, sharings, slots, filling, slowness, pack)


@compiled
def columns_of(
    costs: Coefficients,
    lengths: Integers,
    alone: Integers,
    rings: Rings,
    sharings: Sharings,
    slots: Slots,
    filling: Filling,
    slowness: Floats,
    pack: int,
) -> tuple[Columns, int]:
    """As ``assemble``, of rings whose members know their places."""
    ranks, count = len(slowness), len(rings.first)
    by_rank, ring_of_rank = _rings_by_rank(rings, ranks)
    slot_order = np.argsort(slots.rank * (count + 1) + slots.before)
    slot_start = np.searchsorted(slots.rank[slot_order], np.arange(ranks + 1))
    num_pieces = int(rings.size.sum())
    for sequence in filling.next:
        num_pieces += 1 if sequence >= -1 else 0
    num_pieces -= count
    sequence_of = np.empty(num_pieces, np.int64)
    micro_batch_start, recomputed = np.empty(num_pieces + 1, np.int64), np.empty(num_pieces, np.bool_)
    rank_start = np.zeros(ranks + 1, np.int64)
    slot_ticks = np.zeros(len(slots.rank), np.int64)
    piece, micro_batch = 0, 0
    for rank in range(ranks):
        at = slot_start[rank]
        for k in range(by_rank[rank], by_rank[rank + 1] + 1):
            before = ring_of_rank[k] if k < by_rank[rank + 1] else count
            if at < slot_start[rank + 1] and slots.before[slot_order[at]] == before:
                slot = slot_order[at]
                at += 1
                sequences = members(filling, lengths, slot)
                chosen, packs = packs_of(lengths, sequences, pack)
                starts = _grouped(sequences, chosen, packs, sequence_of, piece)
                total = packs * ticks(costs, costs.micro_batch_s)
                for p in range(packs):
                    micro_batch_start[micro_batch] = starts[p]
                    own = sequence_of[starts[p] : starts[p + 1]]
                    recomputed[micro_batch] = again = is_recomputed(costs, lengths[own].sum())
                    for sequence in own:
                        if again == is_recomputed(costs, max(lengths[sequence], pack)):
                            total += alone[sequence]
                        else:
                            total += ticks(costs, shared_s(costs, lengths[sequence], 1, 1, False, False, again))
                    if again and costs.offloads:
                        total -= gained_together(costs, lengths[own])
                    micro_batch += 1
                piece = starts[packs]
                slot_ticks[slot] = scaled(total, slowness[rank])
            if before < count:
                sequence = rings.sequence[before]
                micro_batch_start[micro_batch], sequence_of[piece] = piece, sequence
                share = (lengths[sequence] + rings.size[before] - 1) // rings.size[before]
                recomputed[micro_batch] = is_recomputed(costs, share)
                micro_batch += 1
                piece += 1
        rank_start[rank + 1] = micro_batch
    micro_batch_start[micro_batch] = piece
    ring_start, ring = _members(lengths, rings, sharings.order, sequence_of, rank_start, micro_batch_start)
    makespan = _replay(rings, sharings.durations, slots, slot_order, slot_start, slot_ticks, slowness)
    columns = Columns(
        rank_start,
        micro_batch_start[: micro_batch + 1].copy(),
        sequence_of,
        ring_start,
        ring,
        sharings.heads,
        sharings.gathers,
        recomputed[:micro_batch].copy(),
    )
    return columns, makespan


@compiled
def _grouped(sequences: Integers, chosen: Integers, packs: int, sequence_of: Integers, piece: int) -> Integers:
    """Write ``sequences`` pack by pack from ``piece`` on; returns where every pack begins, and where the last one ends."""
    starts = np.zeros(packs + 2, np.int64)
    for pack in chosen:
        starts[pack + 2] += 1
    starts[1] = piece
    for pack in range(packs):
        starts[pack + 2] += starts[pack + 1]
    for m in range(len(sequences)):
        at = starts[chosen[m] + 1]
        sequence_of[at] = sequences[m]
        starts[chosen[m] + 1] += 1
    starts[0] = piece
    return starts[: packs + 1]


@compiled
def renamed(columns: Columns, names: Integers) -> Columns:
    """The columns with sequence ``names[s]`` in place of s."""
    count = len(names)
    heads, gathers, start = np.empty(count, np.int64), np.empty(count, np.bool_), np.zeros(count + 1, np.int64)
    for sequence in range(count):
        name = names[sequence]
        heads[name], gathers[name] = columns.heads[sequence], columns.gathers[sequence]
        start[name + 1] = columns.ring_start[sequence + 1] - columns.ring_start[sequence]
    start = np.cumsum(start)
    ring = np.empty(len(columns.ring), np.int64)
    for sequence in range(count):
        first, at = columns.ring_start[sequence], start[names[sequence]]
        for member in range(columns.ring_start[sequence + 1] - first):
            ring[at + member] = columns.ring[first + member]
    return Columns(
        columns.rank_start,
        columns.micro_batch_start,
        names[columns.sequence],
        start,
        ring,
        heads,
        gathers,
        columns.recomputed,
    )


@compiled
def _rings_by_rank(rings: Rings, ranks: int) -> tuple[Integers, Integers]:
    """The rings of every rank in their order: where they begin, and which they are."""
    start = np.zeros(ranks + 1, np.int64)
    for ring in range(len(rings.first)):
        for rank in ranks_of(rings, ring):
            start[rank + 1] += 1
    start = np.cumsum(start)
    found, filled = np.empty(start[-1], np.int64), start.copy()
    for ring in range(len(rings.first)):
        for rank in ranks_of(rings, ring):
            found[filled[rank]] = ring
            filled[rank] += 1
    return start, found


@compiled
def _sharings(
    costs: Coefficients, lengths: Integers, rings: Rings, node_of: Integers, node_size: int
) -> tuple[Integers, NDArray[np.bool_], Integers]:
    """Heads and gathering of every sequence, and the duration of every ring where it was placed."""
    heads, gathers = np.ones(len(lengths), np.int64), np.zeros(len(lengths), np.bool_)
    durations = np.empty(len(rings.first), np.int64)
    for ring in range(len(rings.first)):
        sequence, size = rings.sequence[ring], rings.size[ring]
        nodes = node_of[ranks_of(rings, ring)]
        crosses_nodes = nodes.min() != nodes.max()
        again = is_recomputed(costs, (lengths[sequence] + size - 1) // size)
        seconds, together, gathering = best_sharing(costs, lengths[sequence], size, node_size, crosses_nodes, again)
        for group in range(0, size, together):
            if nodes[group : group + together].min() != nodes[group : group + together].max():
                # a node that lost a rank: neighbours that would divide heads are not all in one
                together, gathering = 1, False
                seconds = shared_s(costs, lengths[sequence], size, 1, False, crosses_nodes, again)
                break
        heads[sequence], gathers[sequence] = together, gathering
        durations[ring] = ticks(costs, seconds + costs.micro_batch_s)
    return heads, gathers, durations


@compiled
def _ring_orders(rings: Rings, heads: Integers) -> Integers:
    """The members of every ring in ring order.

    A ring goes up over every other rank and back over those between, so that a rank only ever talks to the two before and the
    two after it, whatever rings it is in. Ranks that divide heads stay together.
    """
    order = np.empty(int(rings.size.sum()), np.int64)
    at = 0
    for ring in range(len(rings.first)):
        ranks, together = ranks_of(rings, ring), heads[rings.sequence[ring]]
        groups = rings.size[ring] // together
        for k in range(groups):
            group = 2 * k if 2 * k < groups else 2 * (groups - 1 - k) + 1
            order[at : at + together] = ranks[group * together : (group + 1) * together]
            at += together
    return order


@compiled
def _members(
    lengths: Integers,
    rings: Rings,
    order: Integers,
    sequence_of: Integers,
    rank_start: Integers,
    micro_batch_start: Integers,
) -> tuple[Integers, Integers]:
    """The members of the ring of every sequence, in ring order: a single rank for those that are whole."""
    start = np.zeros(len(lengths) + 1, np.int64)
    start[1:] = 1
    for ring in range(len(rings.first)):
        start[rings.sequence[ring] + 1] = rings.size[ring]
    start = np.cumsum(start)
    ring_of = np.empty(start[-1], np.int64)
    for rank in range(len(rank_start) - 1):
        for piece in range(micro_batch_start[rank_start[rank]], micro_batch_start[rank_start[rank + 1]]):
            ring_of[start[sequence_of[piece]]] = rank
    at = 0
    for ring in range(len(rings.first)):
        first, size = start[rings.sequence[ring]], rings.size[ring]
        ring_of[first : first + size] = order[at : at + size]
        at += size
    return start, ring_of


@compiled
def _replay(
    rings: Rings,
    durations: Integers,
    slots: Slots,
    slot_order: Integers,
    slot_start: Integers,
    slot_ticks: Integers,
    slowness: Floats,
) -> int:
    """When the last rank is done if every ring begins as soon as all its members are there."""
    ranks = len(slowness)
    free, at = np.zeros(ranks, np.int64), slot_start.copy()
    for ring in range(len(rings.first)):
        start, slowest = np.int64(0), 0.0
        for rank in ranks_of(rings, ring):
            slot = slot_order[at[rank]]
            if slots.before[slot] == ring:
                free[rank] += slot_ticks[slot]
                at[rank] += 1
            start, slowest = max(start, free[rank]), max(slowest, slowness[rank])
        for rank in ranks_of(rings, ring):
            free[rank] = start + scaled(durations[ring], slowest)
    for rank in range(ranks):
        free[rank] += slot_ticks[rank]
    return int(free.max())

"""The rules of ``verify_plan`` for a packed plan, all pieces at once: right, or to be looked at piece by piece.

The packed form can say less than objects can. That pieces of a ring cover their sequence once and are balanced to a token and
L pairs is what ``share_of``, by which a packed ring *is* cut, is tested for; here remain who is in which ring and when.
"""

import numpy as np

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.proof.columns import Columns, columns_of
from evermesh.parallelism.proof.order import free_ranks_go_on, waves_go_on
from evermesh.parallelism.proof.partners import partners
from evermesh.parallelism.rank_work import Integers, PackedRanks


def is_right(plan: BatchPlan, layout: Layout, pool: Pool | None) -> bool:
    """Whether a packed plan keeps all rules; False: it breaks one, or this cannot tell. Certificates are not looked at."""
    ranks = plan.ranks
    if not isinstance(ranks, PackedRanks) or len(ranks) != layout.hdp or not fits_together(plan):
        return False
    if min(plan.lengths, default=1) < 1:
        return False
    columns = columns_of(plan)
    return (
        _micro_batches_are_right(columns, layout)
        and _sharing_is_right(columns, layout, pool)
        and _lock_steps_are_right(columns, layout, ranks.lock_step)
        and (waves_go_on(columns, layout) if layout.runs_in_waves else free_ranks_go_on(columns))
    )


def fits_together(plan: BatchPlan) -> bool:
    """Whether the columns of a packed plan make objects: every index points at something, and holders are members."""
    ranks = plan.ranks
    assert isinstance(ranks, PackedRanks)
    micro_batches, sequences = len(ranks.micro_batch_start) - 1, len(ranks.lengths)
    starts = (
        (ranks.rank_start, micro_batches),
        (ranks.micro_batch_start, len(ranks.sequence)),
        (ranks.ring_start, len(ranks.ring)),
    )
    return (
        all(start[0] == 0 and start[-1] == total and (np.diff(start) >= 0).all() for start, total in starts)
        and len(ranks.ring_start) - 1 == len(ranks.heads) == len(ranks.gathers) == sequences
        and len(ranks.recomputed) == len(ranks.offload) == micro_batches
        and (ranks.lock_step is None or len(ranks.lock_step) == micro_batches)
        and _within(ranks.sequence, sequences)
        and _within(ranks.ring, len(ranks))
        and np.array_equal(ranks.lengths, np.asarray(plan.lengths, np.int64))
        and _holders_are_members(columns_of(plan))
    )


def _within(indices: Integers, number: int) -> bool:
    return not len(indices) or (int(indices.min()) >= 0 and int(indices.max()) < number)


def _holders_are_members(columns: Columns) -> bool:
    """Every sequence has a ring, no rank is in it twice, and its members are those that have a piece, each one."""
    ranks = len(columns.rank_start) - 1
    held = np.sort(columns.sequence * ranks + columns.rank[columns.micro_batch])
    named = np.sort(columns.sequence_of_member * ranks + columns.ring)
    return bool((columns.ring_size > 0).all() and (np.diff(named) > 0).all() and np.array_equal(held, named))


def _micro_batches_are_right(columns: Columns, layout: Layout) -> bool:
    tokens = columns.tokens(tokens_of_pieces(columns))
    recomputed = columns.recomputed[columns.micro_batch]
    members = np.bincount(columns.sequence, minlength=len(columns.lengths))
    choices = np.bincount(columns.sequence, weights=recomputed, minlength=len(columns.lengths))
    offload = columns.offload[columns.recomputed]
    most = 1.0 if "offload" in layout.activation_policies else 0.0
    kept = layout.capacity if layout.recompute == "none" else layout.keep_capacity or 0
    return bool(
        (tokens <= layout.capacity).all()
        and ((choices == 0) | (choices == members)).all()
        and (columns.recomputed | (tokens <= kept)).all()
        and ((offload >= 0.0) & (offload <= most)).all()
    )


def tokens_of_pieces(columns: Columns) -> Integers:
    """Tokens of every piece by the cut of ``share_of``, [P]."""
    ranks = len(columns.rank_start) - 1
    by_member = np.argsort(columns.sequence_of_member * ranks + columns.ring)
    by_piece = np.argsort(columns.sequence * ranks + columns.rank[columns.micro_batch])
    place = np.empty_like(by_piece)
    place[by_piece] = columns.place_in_ring[by_member]
    size = columns.ring_size[columns.sequence]
    chunk, left = np.divmod(columns.lengths[columns.sequence], 2 * size)
    longer_tails = np.minimum(left, size)
    longer_heads = left - longer_tails
    return 2 * chunk + (place < longer_heads) + (size - 1 - place < longer_tails)


def _sharing_is_right(columns: Columns, layout: Layout, pool: Pool | None) -> bool:
    heads = columns.heads
    if not (heads >= 1).all() or (layout.ulysses % heads).any() or (columns.ring_size % heads).any():
        return False
    if columns.gathers.any() and not layout.gathers_keys:
        return False
    if layout.most_peers is not None and (partners(columns) > layout.most_peers).any():
        return False
    if pool is None:
        return True
    node = np.asarray(pool.nodes, np.int64)[columns.ring]
    place = np.arange(len(columns.ring))
    first = place - columns.place_in_ring % heads[columns.sequence_of_member]
    return bool((node == node[first]).all())


def _lock_steps_are_right(columns: Columns, layout: Layout, lock_step: Integers | None) -> bool:
    """Also False where only some ranks keep step."""
    groups = layout.lock_step_groups
    if not groups or not len(columns.rank):
        return lock_step is None
    if lock_step is None or sum(map(len, groups)) != layout.hdp or (lock_step != columns.index).any():
        return False
    group_of = np.empty(layout.hdp, np.int64)
    for number, group in enumerate(groups):
        group_of[list(group)] = number
    counts = np.diff(columns.rank_start)
    if any(len(np.unique(counts[list(group)])) > 1 for group in groups):
        return False
    step = group_of[columns.rank] * (int(counts.max()) + 1) + lock_step
    together, choices = np.bincount(step), np.bincount(step, weights=columns.recomputed)
    return bool(((choices == 0) | (choices == together)).all())

"""Proves that a batch plan is right, sharing no code with the planner.

What is proved:
- every token of every sequence is held exactly once, so that the weights 1/tokens sum to one;
- all members of a ring know it and each other, in the same order, and each holds one piece; they agree about heads and
  gathering, which the layout allows, and those that divide heads are in one node;
- the members of a ring differ by at most 2 tokens and L (query, key) pairs;
- no rank passes keys and values around with more ranks than ``most_peers``;
- no micro-batch exceeds the capacity; one that keeps all its activations, where the layout does not, has at most
  ``keep_capacity`` tokens; members of a ring agree on recomputation;
- HDP ranks that communicate in every micro-batch (they share experts, or gather parameters block by block) have equally many
  of them, numbered as lock-steps, with one choice of recomputation at each number; nobody else has lock-steps;
- with a pipeline or lock-steps, a ring is the micro-batch of the same index on all its members;
- the joint order of all ranks' actions (forward, recomputation, backward of every ring and lock-step, layer by layer,
  with blocking exchanges, in every pipeline stage, and the messages between stages) has no cycle, so nobody waits for
  ever;
- the certificate does not promise less than its own lower bound; given a cost model, its makespan is that of a replay, and
  its bound is none that this plan or simple arithmetic refutes.

A packed plan is proved column by column (``proof.packed``). Only what fails there, or cannot be told there, is looked at
piece by piece, which says what is wrong.
"""

from collections import defaultdict
from collections.abc import Sequence

from evermesh.parallelism.batch_plan import BatchPlan, Piece
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import LayoutDoesNotFit, PlanInvalid
from evermesh.parallelism.joint_order import check_order
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.proof.certificate import check_certificate, check_promise
from evermesh.parallelism.proof.columns import columns_of
from evermesh.parallelism.proof.packed import fits_together, is_right
from evermesh.parallelism.proof.partners import partners
from evermesh.parallelism.rank_work import PackedRanks


def verify_plan(
    plan: BatchPlan,
    lengths: Sequence[int],
    layout: Layout,
    *,
    cost: CostModel | None = None,
    pool: Pool | None = None,
) -> None:
    """Raise ``PlanInvalid`` unless ``plan`` is a right plan of ``lengths`` on the ranks of ``layout``.

    The order of a pipeline rank is that of ``layout.schedule``, which the executor follows whatever the plan says.

    Args:
        plan: packed or not.
        lengths: tokens of every sequence of the batch.
        layout: what the plan is for.
        cost: cost model of the planner; None: the certificate is only held against itself.
        pool: nodes and speeds of the HDP ranks; None: where ranks are is not looked at, and for the certificate all are
            equally fast, in one node.

    Raises:
        PlanInvalid: with the first thing that is wrong.
        LayoutDoesNotFit: the pool has another number of ranks than the layout.
    """
    if pool is not None and len(pool) != layout.hdp:
        raise LayoutDoesNotFit(f"the pool has {len(pool)} ranks, but layout.hdp is {layout.hdp}. Make them equal.")
    if plan.lengths != tuple(lengths):
        raise PlanInvalid(
            f"the plan is for {len(plan.lengths)} sequences of other lengths than the {len(lengths)} given."
        )
    if len(plan.ranks) != layout.hdp:
        raise PlanInvalid(f"the plan is for {len(plan.ranks)} ranks, but the layout has {layout.hdp}.")
    if not is_right(plan, layout, pool):
        check_pieces(plan, layout, pool)
    check_promise(plan.certificate)
    if cost is not None:
        check_certificate(plan, layout, cost, pool or Pool.of(layout.hdp))


def check_pieces(plan: BatchPlan, layout: Layout, pool: Pool | None = None) -> None:
    """Raise ``PlanInvalid`` unless the plan keeps all rules but those of certificates: piece by piece, whatever its form."""
    if isinstance(plan.ranks, PackedRanks) and not fits_together(plan):
        raise PlanInvalid(
            "the columns of the packed plan do not fit together: an index points at nothing, or the members of a ring are "
            "not the ranks that hold its pieces."
        )
    holders = _holders(plan)
    for sequence, length in enumerate(plan.lengths):
        _check_tokens(sequence, length, holders.get(sequence, {}))
        _check_ring(sequence, length, holders[sequence])
        _check_sharing(sequence, holders[sequence], layout, pool)
    _check_peers(plan, layout)
    _check_micro_batches(plan, layout)
    _check_lock_steps(plan, layout)
    if layout.runs_in_waves:
        _check_waves(plan)
    check_order(plan, layout)


def _holders(plan: BatchPlan) -> dict[int, dict[int, Piece]]:
    """The piece of every rank, by sequence."""
    holders: dict[int, dict[int, Piece]] = defaultdict(dict)
    for rank, micro_batches in enumerate(plan.ranks):
        for piece in (piece for micro_batch in micro_batches for piece in micro_batch.pieces):
            if not 0 <= piece.sequence < len(plan.lengths):
                raise PlanInvalid(f"rank {rank} holds sequence {piece.sequence}, which the batch does not have.")
            if rank in holders[piece.sequence]:
                raise PlanInvalid(f"rank {rank} holds two pieces of sequence {piece.sequence}.")
            holders[piece.sequence][rank] = piece
    return holders


def _check_tokens(sequence: int, length: int, pieces: dict[int, Piece]) -> None:
    ranges = sorted((start, stop, rank) for rank, piece in pieces.items() for start, stop in piece.ranges)
    expected = 0
    for start, stop, rank in ranges:
        if start >= stop:
            raise PlanInvalid(f"rank {rank} holds the empty range [{start}, {stop}) of sequence {sequence}.")
        if start != expected:
            fault = "nobody holds" if start > expected else "two ranks hold"
            raise PlanInvalid(
                f"{fault} tokens from {min(start, expected)} to {max(start, expected)} of sequence {sequence}."
            )
        expected = stop
    if expected != length:
        raise PlanInvalid(f"sequence {sequence} has {length} tokens, but the plan holds {expected} of them.")


def _check_ring(sequence: int, length: int, pieces: dict[int, Piece]) -> None:
    rings = {piece.ring for piece in pieces.values()}
    if len(rings) != 1:
        raise PlanInvalid(
            f"the ranks {sorted(pieces)} disagree about the ring of sequence {sequence}: {sorted(rings)}."
        )
    ring = rings.pop()
    if len(set(ring)) != len(ring) or set(ring) != set(pieces):
        raise PlanInvalid(f"sequence {sequence} names the ring {ring}, but ranks {sorted(pieces)} hold its pieces.")
    tokens = [piece.num_tokens for piece in pieces.values()]
    pairs = [
        sum(_pairs_before(stop) - _pairs_before(start) for start, stop in piece.ranges) for piece in pieces.values()
    ]
    if max(tokens) - min(tokens) > 2 or max(pairs) - min(pairs) > length:
        raise PlanInvalid(
            f"the ring of sequence {sequence} is unbalanced: tokens {tokens}, (query, key) pairs {pairs}."
        )


def _check_sharing(sequence: int, pieces: dict[int, Piece], layout: Layout, pool: Pool | None) -> None:
    schemes = {(piece.heads, piece.gathers) for piece in pieces.values()}
    if len(schemes) > 1:
        raise PlanInvalid(f"the ring of sequence {sequence} disagrees about heads and gathering: {sorted(schemes)}.")
    ring, (heads, gathers) = next(iter(pieces.values())).ring, schemes.pop()
    if heads < 1 or len(ring) % heads:
        raise PlanInvalid(f"{heads} neighbours divide heads in the ring of {len(ring)} of sequence {sequence}.")
    if layout.ulysses % heads:
        raise PlanInvalid(
            f"{heads} neighbours divide heads in the ring of sequence {sequence}; layout.ulysses is {layout.ulysses}, and "
            "only its divisors are allowed."
        )
    if gathers and not layout.gathers_keys:
        raise PlanInvalid(f"sequence {sequence} gathers its keys and values, which layout.gathers_keys does not allow.")
    for first in range(0, len(ring), heads):
        neighbours = ring[first : first + heads]
        if pool is not None and pool.crosses_nodes(neighbours):
            raise PlanInvalid(
                f"the ranks {neighbours} divide the heads of sequence {sequence}, but are not in one node."
            )


def _check_peers(plan: BatchPlan, layout: Layout) -> None:
    if layout.most_peers is None:
        return
    peers = partners(columns_of(plan))
    if (peers > layout.most_peers).any():
        raise PlanInvalid(
            f"rank {int(peers.argmax())} passes keys and values around with {int(peers.max())} ranks; layout.most_peers is "
            f"{layout.most_peers}."
        )


def _pairs_before(position: int) -> int:
    """(query, key) pairs of a causal mask for the queries before ``position``."""
    return position * (position + 1) // 2


def _check_micro_batches(plan: BatchPlan, layout: Layout) -> None:
    most = 1.0 if "offload" in layout.activation_policies else 0.0
    kept = layout.capacity if layout.recompute == "none" else layout.keep_capacity or 0
    choice: dict[int, str] = {}
    for rank, micro_batches in enumerate(plan.ranks):
        for index, micro_batch in enumerate(micro_batches):
            if micro_batch.num_tokens > layout.capacity:
                raise PlanInvalid(
                    f"micro-batch {index} of rank {rank} has {micro_batch.num_tokens} tokens; the capacity is "
                    f"{layout.capacity}."
                )
            if not 0.0 <= micro_batch.offload <= most:
                raise PlanInvalid(
                    f"micro-batch {index} of rank {rank} offloads {micro_batch.offload} of its tokens; the layout allows 0 "
                    f"to {most}."
                )
            if micro_batch.recompute == "none" and micro_batch.num_tokens > kept:
                raise PlanInvalid(
                    f"micro-batch {index} of rank {rank} keeps the activations of {micro_batch.num_tokens} tokens; the "
                    f"layout has room for those of {kept}."
                )
            for piece in micro_batch.pieces:
                if choice.setdefault(piece.sequence, micro_batch.recompute) != micro_batch.recompute:
                    raise PlanInvalid(f"the ring of sequence {piece.sequence} disagrees about recomputation.")


def _check_lock_steps(plan: BatchPlan, layout: Layout) -> None:
    group_of = {rank: group for group in layout.lock_step_groups for rank in group}
    for rank, micro_batches in enumerate(plan.ranks):
        steps = [micro_batch.lock_step for micro_batch in micro_batches]
        if rank not in group_of:
            if any(step is not None for step in steps):
                raise PlanInvalid(
                    f"rank {rank} joins the lock-step collectives {steps}, but it keeps step with nobody."
                )
            continue
        longest = max(len(plan.ranks[member]) for member in group_of[rank])
        if steps != list(range(longest)):
            raise PlanInvalid(
                f"rank {rank} joins the lock-step collectives {steps}; the HDP ranks {group_of[rank]}, which keep "
                f"step, join 0 to {longest - 1}."
            )
    for group in layout.lock_step_groups:
        for index, together in enumerate(zip(*(plan.ranks[rank] for rank in group), strict=True)):
            choices = {micro_batch.recompute for micro_batch in together}
            if len(choices) > 1:
                raise PlanInvalid(f"the HDP ranks {group} disagree about recomputation in lock-step {index}.")


def _check_waves(plan: BatchPlan) -> None:
    index_of: dict[int, int] = {}
    for rank, micro_batches in enumerate(plan.ranks):
        for index, micro_batch in enumerate(micro_batches):
            for piece in micro_batch.pieces:
                if index_of.setdefault(piece.sequence, index) != index:
                    raise PlanInvalid(
                        f"sequence {piece.sequence} is in micro-batch {index} of rank {rank}, but in micro-batch "
                        f"{index_of[piece.sequence]} of another member of its ring."
                    )

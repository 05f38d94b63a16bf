"""Proves that a batch plan is right, sharing no code with the planner.

What is proved:
- every token of every sequence is held exactly once, so that the weights 1/tokens sum to one;
- all members of a ring know it and each other, in the same order, and each holds one piece;
- the members of a ring differ by at most 2 tokens and L (query, key) pairs;
- no micro-batch exceeds the capacity; members of a ring agree on recomputation;
- lock-step indices ascend without gaps and are the same on every rank that has any;
- the joint order of all ranks' actions (forward, recomputation, backward of every ring, layer by layer, with blocking
  exchanges) has no cycle, so nobody waits for ever;
- the certificate does not promise less than its own lower bound.
"""

import itertools
from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Sequence

from evermesh.parallelism.batch_plan import BatchPlan, MicroBatch, Piece
from evermesh.parallelism.errors import PlanInvalid

_LAYERS = 2
"""Two layers show every order that more layers would: exchanges of one layer against those of the next."""


def verify_plan(plan: BatchPlan, lengths: Sequence[int], *, hdp: int, capacity: int) -> None:
    """Raise ``PlanInvalid`` unless ``plan`` is a right plan of ``lengths`` on ``hdp`` ranks of ``capacity`` tokens."""
    if plan.lengths != tuple(lengths):
        raise PlanInvalid(
            f"the plan is for {len(plan.lengths)} sequences of other lengths than the {len(lengths)} given."
        )
    if len(plan.ranks) != hdp:
        raise PlanInvalid(f"the plan is for {len(plan.ranks)} ranks, but the layout has {hdp}.")
    holders = _holders(plan)
    for sequence, length in enumerate(lengths):
        _check_tokens(sequence, length, holders.get(sequence, {}))
        _check_ring(sequence, length, holders[sequence])
    _check_micro_batches(plan, capacity)
    _check_lock_steps(plan)
    _check_order(plan)
    if plan.certificate.makespan_s < plan.certificate.lower_bound_s * (1 - 1e-9):
        raise PlanInvalid(
            f"the certificate promises {plan.certificate.makespan_s:.6g} s, less than its lower bound "
            f"{plan.certificate.lower_bound_s:.6g} s."
        )


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


def _pairs_before(position: int) -> int:
    """(query, key) pairs of a causal mask for the queries before ``position``."""
    return position * (position + 1) // 2


def _check_micro_batches(plan: BatchPlan, capacity: int) -> None:
    choice: dict[int, str] = {}
    for rank, micro_batches in enumerate(plan.ranks):
        for index, micro_batch in enumerate(micro_batches):
            if micro_batch.num_tokens > capacity:
                raise PlanInvalid(
                    f"micro-batch {index} of rank {rank} has {micro_batch.num_tokens} tokens; the capacity is {capacity}."
                )
            for piece in micro_batch.pieces:
                if choice.setdefault(piece.sequence, micro_batch.recompute) != micro_batch.recompute:
                    raise PlanInvalid(f"the ring of sequence {piece.sequence} disagrees about recomputation.")


def _check_lock_steps(plan: BatchPlan) -> None:
    lists = {
        rank: [micro_batch.lock_step for micro_batch in micro_batches if micro_batch.lock_step is not None]
        for rank, micro_batches in enumerate(plan.ranks)
    }
    longest = max((len(steps) for steps in lists.values()), default=0)
    for rank, steps in lists.items():
        if longest and steps != list(range(longest)):
            raise PlanInvalid(
                f"rank {rank} joins the lock-step collectives {steps}; all ranks join 0 to {longest - 1}."
            )


def _check_order(plan: BatchPlan) -> None:
    """Kahn's algorithm on the joint graph: one node per exchange, shared by all members, one chain per rank."""
    followers: dict[Hashable, list[Hashable]] = defaultdict(list)
    waiting_for: dict[Hashable, int] = defaultdict(int)
    for micro_batches in plan.ranks:
        chain = list(_exchanges(micro_batches))
        for earlier, later in itertools.pairwise(chain):
            followers[earlier].append(later)
            waiting_for[later] += 1
        if chain:
            waiting_for[chain[0]] += 0
    free = deque(node for node, count in waiting_for.items() if count == 0)
    done = 0
    while free:
        done += 1
        for later in followers[free.popleft()]:
            waiting_for[later] -= 1
            if waiting_for[later] == 0:
                free.append(later)
    if done < len(waiting_for):
        stuck = sorted({str(node) for node, count in waiting_for.items() if count > 0})
        raise PlanInvalid(f"the ranks would wait for each other for ever, first at: {', '.join(stuck[:4])}.")


def _exchanges(micro_batches: Sequence[MicroBatch]) -> Iterator[Hashable]:
    """The blocking exchanges of one rank in the order in which it reaches them."""
    for micro_batch in micro_batches:
        rings = [piece.sequence for piece in micro_batch.pieces if len(piece.ring) > 1]
        collective = [f"lock-step {micro_batch.lock_step}"] if micro_batch.lock_step is not None else []
        nodes = [f"ring of sequence {sequence}" for sequence in rings] + collective
        for layer in range(_LAYERS):
            yield from ((f"forward of {node}", layer) for node in nodes)
        for layer in reversed(range(_LAYERS)):
            if micro_batch.recompute == "block":
                yield from ((f"recomputation of {node}", layer) for node in nodes)
            yield from ((f"backward of {node}", layer) for node in nodes)

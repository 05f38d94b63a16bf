"""Ways to break a right plan, each of which makes it wrong whatever plan it was."""

import dataclasses
import itertools
import random
from collections.abc import Callable, Sequence
from typing import Any

from evermesh.parallelism import BatchPlan, Layout, MicroBatch, Piece

Ranks = list[list[MicroBatch]]
Mutation = Callable[[BatchPlan, Layout, random.Random], BatchPlan | None]
"""None: this plan offers nothing to break."""
MUTATIONS: dict[str, Mutation] = {}


def _kind(name: str) -> Callable[[Mutation], Mutation]:
    def register(mutation: Mutation) -> Mutation:
        MUTATIONS[name] = mutation
        return mutation

    return register


def _with(plan: BatchPlan, ranks: Sequence[Sequence[MicroBatch]]) -> BatchPlan:
    return dataclasses.replace(plan, ranks=tuple(map(tuple, ranks)))


def _pieces(plan: BatchPlan) -> list[tuple[int, Piece]]:
    return [(r, p) for r, mbs in enumerate(plan.ranks) for mb in mbs for p in mb.pieces]


def _edited(
    plan: BatchPlan, change: Callable[[int, Piece], Piece | None], of_micro_batch: dict[str, Any] | None = None
) -> BatchPlan:
    """The plan with every piece that ``change`` changes; None takes it away."""

    def changed(rank: int, mb: MicroBatch) -> MicroBatch:
        pieces = tuple(new for piece in mb.pieces if (new := change(rank, piece)) is not None)
        return mb if pieces == mb.pieces else dataclasses.replace(mb, pieces=pieces, **of_micro_batch or {})

    return _with(plan, [[changed(rank, mb) for mb in mbs] for rank, mbs in enumerate(plan.ranks)])


def _of_one_piece(
    change: Callable[[Piece, BatchPlan, random.Random], Piece | None], *, shared: bool = False
) -> Mutation:
    """Break one piece; ``shared``: of a ring."""

    def mutation(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
        places = [(rank, piece) for rank, piece in _pieces(plan) if piece.num_tokens > 0]
        places = [place for place in places if len(place[1].ring) > 1] if shared else places
        if not places:
            return None
        at, broken = dice.choice(places)
        new = change(broken, plan, dice)
        return _edited(plan, lambda rank, piece: new if (rank, piece) == (at, broken) else piece)

    return mutation


def _of_one_ring(change: Callable[[Piece, Layout, int], dict[str, Any] | None], smallest: int = 2) -> Mutation:
    """Break one ring, the same on all members; ``change`` gets a piece, the layout and a rank outside, or -1."""

    def mutation(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
        rings = [piece for _, piece in _pieces(plan) if len(piece.ring) >= smallest]
        if not rings:
            return None
        broken = dice.choice(rings)
        outside = next((rank for rank in range(layout.hdp) if rank not in broken.ring), -1)
        changes = change(broken, layout, outside)
        if changes is None:
            return None
        same = broken.sequence
        return _edited(
            plan, lambda _, piece: dataclasses.replace(piece, **changes) if piece.sequence == same else piece
        )

    return mutation


def _edit(**changes: Any) -> Callable[[Piece, BatchPlan, random.Random], Piece]:
    return lambda piece, *_: dataclasses.replace(piece, **changes)


def _shorter(piece: Piece, *_: Any) -> Piece:
    *rest, (start, stop) = piece.ranges
    return dataclasses.replace(piece, ranges=(*rest, (start, stop - 1)))


def _shifted(piece: Piece, *_: Any) -> Piece:
    return dataclasses.replace(piece, ranges=tuple((start + 1, stop + 1) for start, stop in piece.ranges))


def _other_sequence(piece: Piece, plan: BatchPlan, *_: Any) -> Piece:
    return dataclasses.replace(piece, sequence=(piece.sequence + 1) % len(plan.lengths) if len(plan.lengths) > 1 else 7)


MUTATIONS |= {
    "a piece left out": _of_one_piece(lambda *_: None),
    "a token left out": _of_one_piece(_shorter),
    "a token held twice or never": _of_one_piece(_shifted),
    "an empty range": _of_one_piece(lambda piece, *_: dataclasses.replace(piece, ranges=((0, 0), *piece.ranges))),
    "a sequence that is not there": _of_one_piece(_edit(sequence=10**6)),
    "a piece of another sequence": _of_one_piece(_other_sequence),
    "members that see another order": _of_one_piece(
        lambda piece, *_: dataclasses.replace(piece, ring=piece.ring[::-1]), shared=True
    ),
    "members that disagree about heads": _of_one_piece(
        lambda piece, *_: dataclasses.replace(piece, heads=piece.heads + 1), shared=True
    ),
    "members that disagree about gathering": _of_one_piece(
        lambda piece, *_: dataclasses.replace(piece, gathers=not piece.gathers), shared=True
    ),
    "a member that nobody names": _of_one_ring(lambda piece, *_: {"ring": piece.ring[1:]}),
    "a member without a piece": _of_one_ring(
        lambda piece, _, outside: {"ring": (*piece.ring, outside)} if outside >= 0 else None, smallest=1
    ),
    "a member twice": _of_one_ring(lambda piece, *_: {"ring": (*piece.ring, piece.ring[0])}),
    "heads that do not divide the ring": _of_one_ring(lambda piece, *_: {"heads": len(piece.ring) + 1}),
    "no heads": _of_one_ring(lambda *_: {"heads": 0}),
    "more heads than the layout has, or other ways": _of_one_ring(
        lambda piece, layout, _: {"heads": len(piece.ring)} if layout.ulysses % len(piece.ring) else None
    ),
    "gathering that the layout does not have": _of_one_ring(
        lambda _, layout, __: None if layout.gathers_keys else {"gathers": True}, smallest=1
    ),
}


@_kind("plain blocks instead of a balanced cut")
def _blocks(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    rings = [p for _, p in _pieces(plan) if len(p.ring) > 2 and plan.lengths[p.sequence] > 4 * len(p.ring)]
    if not rings:
        return None
    ring, sequence = (chosen := dice.choice(rings)).ring, chosen.sequence
    cuts = [plan.lengths[sequence] * index // len(ring) for index in range(len(ring) + 1)]
    blocks = dict(zip(ring, itertools.pairwise(cuts), strict=True))
    return _edited(plan, lambda r, p: dataclasses.replace(p, ranges=(blocks[r],)) if p.sequence == sequence else p)


@_kind("a micro-batch run twice")
def _twice(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    places = [(rank, mb) for rank, mbs in enumerate(plan.ranks) for mb in mbs if mb.pieces]
    if not places:
        return None
    at, again = dice.choice(places)
    return _with(plan, [[*mbs, again] if rank == at else list(mbs) for rank, mbs in enumerate(plan.ranks)])


@_kind("a sequence run by a second rank")
def _by_another(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    pieces = [piece for _, piece in _pieces(plan)]
    if not pieces or layout.hdp == 1:
        return None
    piece = dice.choice(pieces)
    others = [rank for rank in range(layout.hdp) if rank not in piece.ring]
    if not others:
        return None
    at = dice.choice(others)
    new = MicroBatch((dataclasses.replace(piece, ring=(at,)),))
    return _with(plan, [[*mbs, new] if rank == at else list(mbs) for rank, mbs in enumerate(plan.ranks)])


@_kind("a rank too many")
def _rank_too_many(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan:
    return _with(plan, [*plan.ranks, ()])


@_kind("a micro-batch over the capacity")
def _over_capacity(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    """All that a rank runs in one micro-batch, which is more than fits."""
    fitting = [r for r, mbs in enumerate(plan.ranks) if sum(mb.num_tokens for mb in mbs) > layout.capacity]
    if not fitting:
        return None
    at = dice.choice(fitting)
    one = dataclasses.replace(plan.ranks[at][0], pieces=tuple(p for mb in plan.ranks[at] for p in mb.pieces))
    return _with(plan, [[one] if rank == at else list(mbs) for rank, mbs in enumerate(plan.ranks)])


def _changed(plan: BatchPlan, places: list[tuple[int, int]], dice: random.Random, **changes: Any) -> BatchPlan | None:
    """One of the micro-batches at ``places``, changed."""
    if not places:
        return None
    rank, index = dice.choice(places)
    ranks = [list(mbs) for mbs in plan.ranks]
    ranks[rank][index] = dataclasses.replace(ranks[rank][index], **changes)
    return _with(plan, ranks)


def _places(plan: BatchPlan, wanted: Callable[[MicroBatch], bool]) -> list[tuple[int, int]]:
    return [(r, i) for r, mbs in enumerate(plan.ranks) for i, mb in enumerate(mbs) if wanted(mb)]


@_kind("more activations kept than fit")
def _kept(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    if layout.recompute == "none":
        return None
    keep = layout.keep_capacity or 0
    return _changed(plan, _places(plan, lambda mb: mb.num_tokens > keep), dice, recompute="none", offload=0.0)


@_kind("recomputation on one member only")
def _recompute_alone(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    shared = _places(plan, lambda mb: mb.recompute == "none" and any(len(piece.ring) > 1 for piece in mb.pieces))
    return _changed(plan, shared, dice, recompute="block")


@_kind("more offloaded than there is")
def _offload(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    return _changed(plan, _places(plan, lambda _: True), dice, offload=1.5)


@_kind("something offloaded where nothing is")
def _offload_unasked(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    if "offload" in layout.activation_policies:
        return None
    return _changed(plan, _places(plan, lambda _: True), dice, offload=0.5, recompute="block")


@_kind("a lock-step of another number, or of nobody")
def _lock_step(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    rank_index = _places(plan, lambda _: True)
    if not rank_index:
        return None
    rank, index = dice.choice(rank_index)
    return _changed(plan, [(rank, index)], dice, lock_step=index + 1)


@_kind("a zero-token step that the others do not run")
def _extra_step(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    if not layout.lock_step_groups:
        return None
    at = dice.choice(layout.lock_step_groups[0])
    extra = MicroBatch((), recompute=layout.recompute, lock_step=len(plan.ranks[at]))
    return _with(plan, [[*mbs, extra] if rank == at else list(mbs) for rank, mbs in enumerate(plan.ranks)])


@_kind("a lock-step that one rank leaves out")
def _step_left_out(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    if not layout.lock_step_groups or not plan.ranks[layout.lock_step_groups[0][0]]:
        return None
    at = dice.choice(layout.lock_step_groups[0])
    return _with(plan, [list(mbs[:-1]) if rank == at else list(mbs) for rank, mbs in enumerate(plan.ranks)])


@_kind("a ring at another index")
def _other_wave(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    """In waves: the micro-batch of a ring changes places with another of its rank."""
    if not layout.runs_in_waves:
        return None
    rings = _places(plan, lambda mb: any(len(piece.ring) > 1 for piece in mb.pieces))
    rings = [place for place in rings if len(plan.ranks[place[0]]) > 1]
    if not rings:
        return None
    rank, index = dice.choice(rings)
    return _swapped(plan, rank, index, (index + 1) % len(plan.ranks[rank]))


@_kind("rings that cross")
def _crossing(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    """Free ranks: one of two ranks that share two rings runs them the other way round."""
    if layout.runs_in_waves:
        return None
    for rank, mbs in enumerate(plan.ranks):
        rings = [(i, mb.pieces[0]) for i, mb in enumerate(mbs) if mb.pieces and len(mb.pieces[0].ring) > 1]
        for (first, one), (second, other) in itertools.combinations(rings, 2):
            if len(set(one.ring) & set(other.ring)) > 1:
                return _swapped(plan, rank, first, second)
    return None


@_kind("rings of one wave in another order")
def _crossing_in_wave(plan: BatchPlan, layout: Layout, dice: random.Random) -> BatchPlan | None:
    """One of two ranks that share two rings of one micro-batch begins with the second."""
    for rank, index in _places(plan, lambda mb: sum(len(piece.ring) > 1 for piece in mb.pieces) > 1):
        pieces = plan.ranks[rank][index].pieces
        for (i, one), (j, other) in itertools.combinations(enumerate(pieces), 2):
            if len(set(one.ring) & set(other.ring)) > 1:
                order = list(pieces)
                order[i], order[j] = other, one
                return _changed(plan, [(rank, index)], dice, pieces=tuple(order))
    return None


def _swapped(plan: BatchPlan, rank: int, first: int, second: int) -> BatchPlan:
    """Two micro-batches of a rank, each in the place and with the lock-step of the other."""
    ranks = [list(mbs) for mbs in plan.ranks]
    one, other = ranks[rank][first], ranks[rank][second]
    ranks[rank][first] = dataclasses.replace(other, lock_step=one.lock_step)
    ranks[rank][second] = dataclasses.replace(one, lock_step=other.lock_step)
    return _with(plan, ranks)

"""Every scheme of attention, in micro-batches of several sequences, against attention written out in one process."""

import random
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from evermesh.parallelism import ByteLedger, Communicator, Layout, LayoutDoesNotFit, MicroBatch, Piece, ring_attention
from evermesh.parallelism.attention.kernels import kernel_for
from evermesh.parallelism.attention.micro_batch import MicroBatchAttention
from evermesh.parallelism.attention.traffic import AttentionSizes, sequence_traffic
from evermesh.parallelism.collectives import Moment
from evermesh.parallelism.heads import check_heads, heads_of
from evermesh.parallelism.ledger import Traffic, add_up
from evermesh.parallelism.pieces import joint_share, share_of
from tests.cluster import run_ranks
from tests.oracle import gradient, plain_attention

HEAD_DIM, RANKS = 4, 4
NODES = (0, 0, 1, 1)


class Sequence(NamedTuple):
    """One of a micro-batch, and its scheme."""

    length: int
    ring: tuple[int, ...]
    heads: int = 1
    gathers: bool = False

    def piece(self, number: int, rank: int) -> Piece:
        ranges = share_of(self.length, len(self.ring), self.ring.index(rank)).ranges()
        return Piece(number, ranges, self.ring, self.heads, self.gathers)


class Case(NamedTuple):
    """One micro-batch of every rank; sequences are in one order on all of them."""

    sequences: tuple[Sequence, ...]
    num_heads: tuple[int, int]
    """Of queries, of keys and values."""
    window: int | None = None
    dtype: torch.dtype = torch.float64
    has_result: bool = False
    """Whether the backward pass begins with the result alone, as where it waited on the host."""

    def document(self, number: int) -> list[Tensor]:
        """Queries, keys, values and the gradient of the output."""
        dice, (heads, kv_heads) = torch.Generator().manual_seed(number), self.num_heads
        shapes = [(self.sequences[number].length, h, HEAD_DIM) for h in (heads, kv_heads, kv_heads, heads)]
        return [torch.randn(shape, dtype=torch.float64, generator=dice).to(self.dtype) for shape in shapes]

    def rows(self, number: int, rank: int) -> list[int]:
        ranges = self.sequences[number].piece(number, rank).ranges
        return [row for start, stop in ranges for row in range(start, stop)]

    def held(self, rank: int) -> list[int]:
        return [number for number, sequence in enumerate(self.sequences) if rank in sequence.ring]


class Outcome(NamedTuple):
    """Of one rank: output and gradients of its tokens, and what it sent."""

    tensors: list[Tensor]
    traffic: tuple[Traffic, ...]
    kept_elements: int
    """In tensors that wait for the backward pass, storages counted once."""


def _run(rank: int, _: int, cases: list[Case]) -> list[Outcome]:
    import torch.distributed as dist

    moment = Moment(step=1, phase="train")
    communicator = Communicator(dist.group.WORLD, axis="hdp", nodes=NODES, moment=moment)
    return [_outcome(case, rank, communicator) for case in cases]


def _outcome(case: Case, rank: int, communicator: Communicator) -> Outcome:
    numbers = case.held(rank)
    pieces = tuple(case.sequences[number].piece(number, rank) for number in numbers)
    kernel = kernel_for(torch.device("cpu"), case.dtype)
    lengths = [sequence.length for sequence in case.sequences]
    attend = MicroBatchAttention(MicroBatch(pieces), lengths, kernel, communicator)
    parts = [[x[case.rows(number, rank)] for x in case.document(number)] for number in numbers]
    empty = [
        torch.empty(0, heads, HEAD_DIM, dtype=case.dtype) for heads in (*case.num_heads, *reversed(case.num_heads))
    ]
    q, k, v, grad = (torch.cat([empty[i], *(part[i] for part in parts)]) for i in range(4))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    ledger, kept = ByteLedger(), dict[int, Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with communicator.listen(ledger), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        if case.has_result:
            with torch.no_grad():
                result = attend.forward(q, k, v, case.window)
            out = attend.with_result(q, k, v, result, window=case.window)
        else:
            out = attend(q, k, v, window=case.window)
        out.backward(grad)
    elements = sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())
    return Outcome([out.detach(), *map(gradient, leaves)], ledger.take_step(1), elements)


def _outcomes(cases: list[Case], ranks: int = RANKS) -> list[list[Outcome]]:
    """By case, by rank."""
    return [list(of_case) for of_case in zip(*run_ranks(ranks, _run, cases), strict=True)]


def _worst_error(case: Case, outcomes: list[Outcome]) -> float:
    errors = []
    for number in range(len(case.sequences)):
        q, k, v, grad = (x.double() for x in case.document(number))
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        out = plain_attention(*leaves, window=case.window)
        out.backward(grad)
        for index, expected in enumerate([out.detach(), *map(gradient, leaves)]):
            actual = torch.full_like(expected, float("nan"))
            for rank in case.sequences[number].ring:
                first = sum(len(case.rows(other, rank)) for other in case.held(rank) if other < number)
                rows = case.rows(number, rank)
                actual[rows] = outcomes[rank].tensors[index][first : first + len(rows)].double()
            # one key leaves queries no gradient at all: then rounding is held against one
            errors.append((actual - expected).norm().item() / max(1.0, expected.norm().item()))
    return max(errors)


def _formula(case: Case) -> tuple[Traffic, ...]:
    heads, kv_heads = case.num_heads
    offloaded = int(case.has_result)
    sizes = AttentionSizes(
        1, 0, offloaded, heads * HEAD_DIM, 2 * kv_heads * HEAD_DIM, 2 * HEAD_DIM, case.dtype.itemsize
    )
    parts = [
        part
        for number, sequence in enumerate(case.sequences)
        if len(sequence.ring) > 1
        for part in sequence_traffic(
            sequence.length, sequence.piece(number, sequence.ring[0]), sizes, NODES, recomputed=True
        )
    ]
    return add_up(parts)


def _check(cases: list[Case]) -> None:
    for case, outcomes in zip(cases, _outcomes(cases), strict=True):
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}[case.dtype]
        assert _worst_error(case, outcomes) <= tolerance, case
        assert add_up(part for outcome in outcomes for part in outcome.traffic) == _formula(case), case


RING = (0, 1, 2, 3)
SCHEMES = [(heads, gathers) for heads in (1, 2, 4) for gathers in (False, True)]


def test_every_scheme_alone_equals_plain_attention_and_sends_what_the_formula_says() -> None:
    _check(
        [
            Case((Sequence(length, RING, heads, gathers),), num_heads, window, has_result=has_result)
            for heads, gathers in SCHEMES
            for length, window in ((61, None), (64, 11), (3, None))
            for num_heads, has_result in (((8, 4), False), ((4, 2), True))
        ]
    )


def test_members_without_head_tail_or_any_token() -> None:
    _check(
        [
            Case((Sequence(length, (3, 1, 0, 2), heads, gathers),), (4, 4))
            for length in (1, 2, 3, 5, 6, 7, 9)
            for heads, gathers in SCHEMES
        ]
    )


def test_more_neighbours_than_key_heads_get_copies_and_add_up_their_gradients() -> None:
    pairs = [(4, 1), (4, 2), (12, 1), (8, 2)]
    ulysses = [Case((Sequence(45, RING, 4),), num_heads) for num_heads in pairs]
    _check([*ulysses, *(Case((Sequence(45, RING, 2, gathers),), (6, 1)) for gathers in (False, True))])


def test_narrower_numbers() -> None:
    _check(
        [
            Case((Sequence(70, RING, heads, gathers),), (4, 2), dtype=dtype)
            for dtype in (torch.float32, torch.bfloat16)
            for heads, gathers in SCHEMES
        ]
    )


def _drawn(dice: random.Random) -> Case:
    num_heads = dice.choice([(4, 2), (12, 4), (4, 1), (6, 6), (12, 12)])
    sequences = []
    for _ in range(dice.randint(1, 5)):
        ring = tuple(dice.sample(range(RANKS), dice.choice((1, 1, 2, 3, 4))))
        fitting = [ways for ways in range(1, len(ring) + 1) if len(ring) % ways == 0 and _divide(num_heads, ways)]
        sequences.append(Sequence(dice.randint(1, 90), ring, dice.choice(fitting), dice.random() < 0.4))
    return Case(tuple(sequences), num_heads, dice.choice((None, 1, 7, 40)), has_result=dice.random() < 0.3)


def _divide(num_heads: tuple[int, int], ways: int) -> bool:
    heads, kv_heads = num_heads
    return heads % ways == 0 and (kv_heads % ways == 0 or ways % kv_heads == 0)


def test_drawn_micro_batches_of_packs_rings_and_all_schemes() -> None:
    dice = random.Random(5)
    cases = [_drawn(dice) for _ in range(60)]
    mixed = [case for case in cases if len({(s.heads, s.gathers, len(s.ring) > 1) for s in case.sequences}) >= 3]
    assert len(mixed) > 10
    _check(cases)


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(8))
def test_many_drawn_micro_batches(seed: int) -> None:
    dice = random.Random(100 + seed)
    _check([_drawn(dice) for _ in range(150)])


def _plain_ring(rank: int, _: int, case: Case) -> list[Tensor]:
    import torch.distributed as dist

    sequence = case.sequences[0]
    q, k, v, grad = (x[case.rows(0, rank)] for x in case.document(0))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = ring_attention(
        *leaves, length=sequence.length, members=sequence.ring, communicator=Communicator(dist.group.WORLD)
    )
    out.backward(grad)
    return [out.detach(), *map(gradient, leaves)]


def test_one_head_group_per_rank_is_the_ring_bit_for_bit_whatever_is_in_the_same_micro_batch() -> None:
    around = Sequence(77, RING)
    alone = Case((around,), (4, 2), dtype=torch.float32)
    beside = Case(
        (around, Sequence(50, RING, 4), Sequence(9, (2,)), Sequence(30, RING, 2, True)), (4, 2), dtype=torch.float32
    )
    ring = run_ranks(RANKS, _plain_ring, alone)
    for case, outcomes in zip((alone, beside), _outcomes([alone, beside]), strict=True):
        for rank in range(RANKS):
            tokens = len(case.rows(0, rank))
            for actual, expected in zip(outcomes[rank].tensors, ring[rank], strict=True):
                assert torch.equal(actual[:tokens], expected)


def test_what_divided_heads_keep_is_one_output_more_than_a_ring_keeps() -> None:
    tokens, (heads, kv_heads) = 64, (8, 4)
    cases = [Case((Sequence(tokens, RING, ways),), (heads, kv_heads)) for ways in (1, 4, 2)]
    mixed = Case((Sequence(tokens, RING, 4), Sequence(tokens, RING)), (heads, kv_heads))
    ring, ulysses, both, beside = ([outcome.kept_elements for outcome in of] for of in _outcomes([*cases, mixed]))
    of_rank = tokens // RANKS
    assert ring == [of_rank * ((2 * heads + 2 * kv_heads) * HEAD_DIM + heads)] * RANKS
    assert ulysses == both == [ring[0] + of_rank * heads * HEAD_DIM] * RANKS
    assert beside == [ring[0] + ulysses[0]] * RANKS


def test_the_bytes_of_ulysses_and_of_rings_are_the_published_ones() -> None:
    """Jacobs et al. (arXiv 2309.14509, section 3.2): of N h / P per rank for each of Q, K, V and the output, (P - 1) / P."""
    length, heads, kv_heads, size = 800, 8, 8, 2
    sizes = AttentionSizes(1, 0, 0, heads * HEAD_DIM, 2 * kv_heads * HEAD_DIM, 2 * HEAD_DIM, size)

    def sent(ways: int, gathers: bool) -> dict[str, int]:
        piece = Sequence(length, RING, ways, gathers).piece(0, 0)
        totals: dict[str, int] = {}
        for part in sequence_traffic(length, piece, sizes, NODES, recomputed=False):
            totals[part.call_site] = totals.get(part.call_site, 0) + part.wire_bytes
        return totals

    hidden_bytes = length * heads * HEAD_DIM * size
    ulysses = sent(4, gathers=False)
    assert ulysses == {"heads forward": 4 * hidden_bytes * 3 // 4, "heads backward": 4 * hidden_bytes * 3 // 4}
    passed, gathered = sent(1, gathers=False), sent(1, gathers=True)
    full_ring = 3 * 2 * hidden_bytes
    assert passed["ring forward"] == gathered["gather forward"] == full_ring * 3 // 4
    assert gathered["gather gradients"] == 2 * gathered["gather backward"] == 2 * full_ring * 3 // 4  # in float32
    both = sent(2, gathers=False)
    assert both["heads forward"] == 4 * hidden_bytes // 2
    assert both["ring forward"] == 2 * hidden_bytes * 3 // 4  # half as many steps, and half the heads of each


@pytest.mark.parametrize("length", [0, 1, 5, 16, 61])
def test_neighbours_hold_one_head_and_one_tail_together(length: int) -> None:
    for ring in range(1, 9):
        for number in (n for n in range(1, ring + 1) if ring % n == 0):
            for first in range(0, ring, number):
                shares = [share_of(length, ring, index) for index in range(first, first + number)]
                rows = sorted(row for share in shares for part in share for row in range(*part))
                joint = joint_share(length, ring, first, number)
                assert [row for part in joint for row in range(*part)] == rows


def test_every_head_has_a_rank_and_its_own_keys() -> None:
    for heads, kv_heads, ways in ((8, 8, 4), (8, 4, 4), (8, 2, 4), (12, 1, 6), (12, 6, 3)):
        computed = [head for index in range(ways) for head in range(heads)[heads_of(heads, ways, index)]]
        assert computed == list(range(heads))
        for index in range(ways):
            queries, keys = range(heads)[heads_of(heads, ways, index)], range(kv_heads)[heads_of(kv_heads, ways, index)]
            local = [keys[place * len(keys) // len(queries)] for place in range(len(queries))]
            assert local == [head * kv_heads // heads for head in queries]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tp", "ulysses", "way_out"),
    [
        (8, 8, 1, 3, "Set layout.ulysses to 1 or 2 or 4 or 8"),
        (8, 4, 4, 4, "Set layout.ulysses to 1 or 2"),
        (12, 6, 1, 4, "4 neighbours cannot divide the 12 query heads and 6 key and value heads"),
        (32, 8, 1, 64, "1 or 2 or 4 or 8 or 16 or 32"),
    ],
)
def test_heads_that_cannot_be_divided_are_refused(
    heads: int, kv_heads: int, tp: int, ulysses: int, way_out: str
) -> None:
    with pytest.raises(LayoutDoesNotFit, match=way_out):
        check_heads(Layout(tp=tp, ulysses=ulysses), heads, kv_heads)
    for lawful in (1, 2):
        check_heads(Layout(tp=tp, ulysses=lawful), heads, kv_heads)

"""Tokens that travel to experts, over every folding of 8 ranks, against one process; and every byte they take."""

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evermesh.checkpoint.coverage import check_cover, whole
from evermesh.checkpoint.cutting import regions_of_interval
from evermesh.checkpoint.regions import Box, Region, StoredForm
from evermesh.parallelism import LayoutDoesNotFit, MicroBatch, Piece
from evermesh.parallelism.experts import ExpertSharding, GridCut, HotBudget, Placement, choose_hot
from evermesh.parallelism.experts.balance import within_capacity
from evermesh.parallelism.experts.dispatch import Point
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.parallelism.experts.traffic import ExpertGroup, copy_traffic, expert_traffic
from evermesh.parallelism.ledger import Traffic, add_up
from tests.cluster import run_ranks
from tests.oracle import relative_error
from tests.parallelism.mixtures import (
    CHANNELS,
    EXPERTS,
    WIDTH,
    Folding,
    Mixture,
    Outcome,
    expected,
    joined,
    run_folded,
    tokens_of,
)

FOLDINGS = [Folding(1, 8, 1), Folding(2, 2, 2), Folding(8, 1, 1), Folding(1, 1, 8)]
MORE_FOLDINGS = [Folding(2, 4, 1), Folding(1, 4, 2), Folding(4, 2, 1)]
SIZES = (5, 0, 17, 1, 8, 0, 3, 29)
NODES = (0, 0, 0, 1, 1, 1, 2, 2)
TOLERANCE = 1e-12


def _errors(outcomes: Sequence[Outcome], folding: Folding, sizes: tuple[int, ...], zipf: float = 0.0) -> list[float]:
    outs, xs, weights, parameters = expected(sizes, zipf)
    errors = []
    for outcome, out, x, weight in zip(outcomes, outs, xs, weights, strict=True):
        pairs = ((outcome.out, out), (outcome.grad_x, x), (outcome.grad_weights, weight))
        errors += [relative_error(actual, wanted) for actual, wanted in pairs]
    whole = joined(outcomes, folding)
    return errors + [relative_error(whole[name], parameters[name]) for name in parameters]


def _formula(
    folding: Folding,
    sizes: Sequence[int],
    copies: Mapping[int, tuple[int, ...]] | None = None,
    zipf: float = 0.0,
    *,
    recomputed: bool = False,
) -> tuple[Traffic, ...]:
    """What all EP x ETP groups send."""
    parts: list[Traffic] = []
    each = folding.ep * folding.etp
    for first in range(0, len(sizes), each):
        ranks = range(first, first + each)
        chosen = [tokens_of(rank, sizes, zipf).chosen for rank in ranks]
        counts = [torch.bincount(of_rank[of_rank >= 0], minlength=EXPERTS).tolist() for of_rank in chosen]
        placement = Placement(EXPERTS, folding.ep, copies or {})
        group = ExpertGroup(placement, folding.etp, tuple(NODES[rank] for rank in ranks), row_bytes=CHANNELS * 8)
        parts += expert_traffic(counts, group, recomputed=recomputed)
        parts += copy_traffic(group, [WIDTH // folding.etp * CHANNELS * 8] * 2)
    return add_up(parts)


def _sent(outcomes: Sequence[Outcome]) -> tuple[Traffic, ...]:
    return add_up(part for outcome in outcomes for part in outcome.traffic)


@pytest.mark.parametrize(
    "folding", [*FOLDINGS, *(pytest.param(folding, marks=pytest.mark.parity) for folding in MORE_FOLDINGS)], ids=str
)
def test_outputs_gradients_and_bytes_of_every_folding(folding: Folding) -> None:
    outcomes = run_ranks(8, run_folded, folding, SIZES, None, 0.0, NODES)
    assert max(_errors(outcomes, folding, SIZES)) <= TOLERANCE
    assert _sent(outcomes) == _formula(folding, SIZES)


def test_no_rank_of_a_group_has_a_token() -> None:
    folding, sizes = Folding(2, 2, 2), (0, 0, 0, 0, 5, 1, 0, 2)
    outcomes = run_ranks(8, run_folded, folding, sizes, None, 0.0, NODES)
    assert max(_errors(outcomes, folding, sizes)) <= TOLERANCE
    assert _sent(outcomes) == _formula(folding, sizes)


def test_recomputation_sends_the_forward_rows_twice_and_gives_the_same_bits() -> None:
    folding, sizes, nodes = Folding(2, 2, 1), SIZES[:4], NODES[:4]
    once, twice = (run_ranks(4, run_folded, folding, sizes, None, 0.0, nodes, again) for again in (False, True))
    assert _sent(twice) == _formula(folding, sizes, recomputed=True)
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(a.grad_x, b.grad_x)
        assert all(torch.equal(a.parameters[name][1], b.parameters[name][1]) for name in a.parameters)


COPIES: dict[str, dict[int, tuple[int, ...]]] = {
    "everywhere": {0: (1, 2, 3), 5: (0, 1, 3)},
    "on some ranks": {0: (2,), 1: (1, 3), 6: (1,)},  # rank 0 has none
}


@pytest.mark.parametrize(
    ("copies", "folding", "recompute"),
    [("everywhere", Folding(2, 4, 1), False), ("on some ranks", Folding(1, 4, 1), True)],
)
def test_copies_of_hot_experts_change_no_result_and_cost_what_the_formula_says(
    copies: str, folding: Folding, recompute: bool
) -> None:
    ranks = folding.ep * folding.etp
    sizes, nodes = SIZES[:ranks], NODES[:ranks]
    outcomes = run_ranks(ranks, run_folded, folding, sizes, COPIES[copies], 1.2, nodes, recompute)
    assert max(_errors(outcomes, folding, sizes, 1.2)) <= TOLERANCE
    assert _sent(outcomes) == _formula(folding, sizes, COPIES[copies], 1.2, recomputed=recompute)


def _load(outcomes: Sequence[Outcome]) -> float:
    rows = [outcome.rows for outcome in outcomes]
    return max(rows) / (sum(rows) / len(rows))


def test_copies_even_out_the_ranks_and_save_bytes_when_few_experts_are_hot() -> None:
    """The copies of a full replication cost hot share x size of all experts x (ranks - 1), both ways (Hecate)."""
    folding, sizes = Folding(1, 8, 1), (64,) * 8
    plain = run_ranks(8, run_folded, folding, sizes, None, 1.2, NODES)
    counts = sum(torch.bincount(tokens_of(rank, sizes, 1.2).chosen.flatten(), minlength=EXPERTS) for rank in range(8))
    budget = HotBudget(expert_bytes=1, memory_bytes=100, hidden_s=28.0, bytes_per_s=1.0)
    assert isinstance(counts, torch.Tensor)
    hot = dict(choose_hot([counts.tolist()], 8, NODES, budget).placement.copies)
    assert 2 <= len(hot) <= 4
    copied = run_ranks(8, run_folded, folding, sizes, hot, 1.2, NODES)
    assert _load(plain) > 2.0
    assert _load(copied) < 1.5
    rows, fewer_rows = (
        sum(part.wire_bytes for part in _sent(outcomes) if part.call_site == "expert forward")
        for outcomes in (plain, copied)
    )
    assert fewer_rows < 0.6 * rows
    of_copies = {part.call_site: 0 for part in _sent(copied)}
    for part in _sent(copied):
        of_copies[part.call_site] += part.wire_bytes
    whole_size = EXPERTS * 2 * WIDTH * CHANNELS * 8
    assert of_copies["expert copies"] == of_copies["expert copy gradients"] == len(hot) * whole_size // EXPERTS * 7


def _scattered(x: int) -> int:
    """The finaliser of splitmix64, on unsigned integers."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@given(
    lengths=st.lists(st.integers(1, 30), min_size=0, max_size=4),
    factor=st.floats(0.1, 3),
    seed=st.integers(0, 5),
    layer=st.integers(0, 3),
)
def test_a_full_expert_keeps_the_tokens_of_the_document_with_the_smallest_keys(
    lengths: list[int], factor: float, seed: int, layer: int
) -> None:
    pieces = tuple(Piece(index, ((0, length),), (0,)) for index, length in enumerate(lengths))
    context = TokenContext(MicroBatch(pieces), lengths, [f"d{index}" for index in range(len(lengths))], 1, 4, seed)
    likely = torch.tensor([4.0, 2, 1, 1]).expand(sum(lengths), -1)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.multinomial(likely, 2, generator=generator) if lengths else torch.empty(0, 2).long()
    passing = within_capacity(chosen, factor, 4, layer, context)
    wanted, first = chosen.clone(), 0
    for index, length in enumerate(lengths):
        digest = hashlib.blake2b(f"{seed}:4:{layer}:d{index}".encode(), digest_size=8).digest()
        keys = [_scattered((int.from_bytes(digest, "little") + position) % 2**64) for position in range(length)]
        keys = [key - 2**64 if key >= 2**63 else key for key in keys]
        assert len(set(keys)) == length
        for expert in range(4):
            tokens = [token for token in range(length) if expert in chosen[first + token]]
            for token in sorted(tokens, key=lambda token: keys[token])[math.ceil(length * factor * 2 / 4) :]:
                wanted[first + token][chosen[first + token] == expert] = -1
        first += length
    assert torch.equal(passing, wanted)


def test_who_is_dropped_does_not_depend_on_the_position() -> None:
    """Random token selection: by position, the end of a document would always lose."""
    length, dropped = 400, torch.zeros(400)
    for step in range(200):
        context = TokenContext(MicroBatch((Piece(0, ((0, length),), (0,)),)), [length], ["d"], length, step)
        dropped += within_capacity(torch.zeros(length, 1).long(), 2.0, 4, 0, context)[:, 0] == -1
    expected_drops = 200 / 2
    chi_square = ((dropped - expected_drops) ** 2 / (200 * 0.25)).sum().item()
    assert 280 < chi_square < 540, "400 degrees of freedom, five standard deviations"


def test_hooks_see_the_rows_at_six_points_and_may_change_them() -> None:
    mixture, tokens, seen = Mixture(), tokens_of(0, (9,)), list[tuple[str, int]]()

    def hook(point: str, factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
        def see(rows: torch.Tensor) -> torch.Tensor:
            seen.append((point, rows.shape[0]))
            return rows * factor

        return see

    plain = mixture(tokens.x, tokens.chosen, tokens.weights)
    points: tuple[Point, ...] = get_args(Point)
    for point in points:
        factor = 2.0 if point in ("after_experts", "before_combine", "after_combine") else 1.0
        mixture.dispatcher.hooks[point].append(hook(point, factor))
    hooked = mixture(tokens.x, tokens.chosen, tokens.weights)
    assert seen == [(point, int((tokens.chosen >= 0).sum())) for point in points]
    assert torch.equal(hooked, 8 * plain)


@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    ep=st.integers(1, 3),
    etp=st.integers(1, 3),
    dim=st.sampled_from([1, 2]),
    pieces=st.integers(1, 4),
)
def test_a_grid_cut_and_its_intervals_cover_the_tensor_once(
    shape: tuple[int, int, int], ep: int, etp: int, dim: int, pieces: int
) -> None:
    sizes = [shape[0] * ep, shape[1], shape[2]]
    sizes[dim] *= etp
    cut = GridCut(tuple(sizes), ((0, ep), (dim, etp)))
    regions: list[Region] = []
    for rank in range(cut.ranks):
        box = Box(cut.offsets(rank), cut.local_shape(rank))
        assert box.num_elements == cut.num_elements(rank) == math.prod(sizes) // cut.ranks
        edges = [box.num_elements * piece // pieces for piece in range(pieces + 1)]
        for start, stop in itertools.pairwise(edges):
            regions += regions_of_interval(box, cut.shape, start, stop)
    check_cover(StoredForm(cut.shape, None, None), tuple(whole(region) for region in regions if region.num_elements))


@pytest.mark.parametrize(
    ("ep", "etp", "message"),
    [
        (3, 1, r"layout.ep is 3, .* experts, 8. It can be 1, 2, 4, 8"),
        (2, 5, r"layout.etp is 5, .* 12. .* 1, 2, 3, 4, 6, 12"),
    ],
)
def test_degrees_that_do_not_divide_are_refused_with_those_that_do(ep: int, etp: int, message: str) -> None:
    sharding = ExpertSharding({"*.up": 1})
    with pytest.raises(LayoutDoesNotFit, match=message):
        sharding.cuts({"a.up": (8, 12, 4), "router": (8, 4)}, ep, etp)


BUDGET = HotBudget(expert_bytes=100, memory_bytes=800, hidden_s=1.0, bytes_per_s=900.0)


def test_as_many_hot_experts_as_hide_go_everywhere_when_they_fit() -> None:
    loads = [[9.0] * 16] * 3 + [[8.0, 1, 1, 1, 1, 1, 30, 1, 1, 7, 6, 1, 1, 1, 1, 1]] * 5
    decision = choose_hot(loads, ranks=4, nodes=(0, 0, 1, 1), budget=BUDGET)
    assert decision.placement.copies == {0: (1, 2, 3), 6: (0, 2, 3), 9: (0, 1, 3)}
    assert "3 hot experts of 16" in decision.reason


def test_the_copies_that_relieve_the_busiest_rank_come_first() -> None:
    one = HotBudget(expert_bytes=100, memory_bytes=800, hidden_s=1.0, bytes_per_s=300.0)
    loads = [[20.0, 0, 0, 0, 15, 15, 15, 15, 5, 5, 5, 5, 5, 5, 5, 5]]  # expert 0 has most tokens, rank 1 has most
    assert list(choose_hot(loads, 4, (0,) * 4, one).placement.copies) == [4]


def test_an_even_load_needs_no_copies_and_neither_does_a_rank_alone() -> None:
    assert choose_hot([[3.0] * 8], 4, (0,) * 4, BUDGET).placement.copies == {}
    assert choose_hot([[9.0, 1, 1, 1]], 1, (0,), BUDGET).placement.copies == {}
    assert choose_hot([], 4, (0,) * 4, BUDGET).placement.copies == {}


def test_few_slots_are_dealt_by_load_and_to_nodes_without_a_copy_first() -> None:
    loads = [[100.0, 40.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]]
    tight = HotBudget(expert_bytes=100, memory_bytes=200, hidden_s=1.0, bytes_per_s=900.0)
    decision = choose_hot(loads, ranks=4, nodes=(0, 0, 1, 1), budget=tight)
    # 0 goes to rank 2, on the other node; then half of its load, on rank 1, still exceeds that of 1, which gets rank 3
    assert decision.placement.copies == {0: (1, 2), 1: (3,)}


@given(
    loads=st.lists(st.integers(0, 1000), min_size=16, max_size=16),
    memory=st.integers(0, 2000),
    hidden=st.floats(0, 10),
)
def test_no_placement_exceeds_memory_or_moves_an_owner(loads: list[int], memory: int, hidden: float) -> None:
    budget = HotBudget(expert_bytes=100, memory_bytes=memory, hidden_s=hidden, bytes_per_s=900.0)
    placement = choose_hot([[float(load) for load in loads]], 4, (0, 0, 1, 1), budget).placement
    for rank in range(4):
        assert placement.held[rank][:4] == tuple(range(4 * rank, 4 * rank + 4))
        assert (len(placement.held[rank]) - 4) * 2 * 100 <= memory
        for expert, target in enumerate(placement.targets(rank, (0, 0, 1, 1))):
            assert expert in placement.held[target]
            assert target == rank or expert not in placement.held[rank]

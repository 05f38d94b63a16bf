"""FlexSP restated does what its paper says, and our plans keep its rules and its bound."""

import itertools
import random
from collections.abc import Iterator

import pytest

from tests.benchmarks.parallelism import flexsp
from tests.benchmarks.parallelism.bench_flexsp import our_plan


def test_times_are_those_of_the_published_coefficients() -> None:
    """8,192 tokens on 8 GPUs: 43 ms of attention, 188 of matrix products, 21 of exchanges at 96.5 GB/s; 629 ms fixed."""
    assert flexsp.sequence_ms(8192, 8) == pytest.approx(43.0 + 188.4 + 21.2, abs=0.5)
    assert flexsp.micro_batch_ms([(8, [8192]), (8, [8192, 8192])]) == pytest.approx(629.36 + 2 * 252.6, abs=1)
    assert flexsp.CAPACITY == 6457


def test_buckets_have_the_least_error_of_all_cuts() -> None:
    draw = random.Random(0)
    for _ in range(20):
        lengths = sorted(draw.randint(1, 99) for _ in range(9))
        found = flexsp.buckets(lengths, 3)
        cuts = [(0, *cut, 9) for cut in itertools.combinations(range(1, 9), 2)]
        least = min(_error([lengths[a:b] for a, b in itertools.pairwise(cut)]) for cut in cuts)
        assert sorted(itertools.chain(*found)) == lengths
        assert _error(found) == least


def _error(buckets: list[list[int]]) -> int:
    return sum(bucket[-1] - length for bucket in buckets for length in bucket)


def test_chunks_are_neighbours_by_length_with_as_few_tokens_as_can_be() -> None:
    lengths = [9, 1, 7, 3, 3, 8, 2, 5]
    found = flexsp.chunks(lengths, 3)
    cuts = [(0, *cut, 8) for cut in itertools.combinations(range(1, 8), 2)]
    least = min(max(sum(sorted(lengths)[a:b]) for a, b in itertools.pairwise(cut)) for cut in cuts)
    assert list(itertools.chain(*found)) == sorted(lengths)
    assert max(map(sum, found)) == least


@pytest.mark.parametrize("solver", [flexsp.by_highs, flexsp.by_scip])
@pytest.mark.parametrize(
    "lengths", [[400_000], [200_000, 150_000], [200_000, 60_000, 30_000], [90_000, 50_000, 40_000, 9]]
)
def test_the_program_finds_the_best_groups(lengths: list[int], solver: flexsp.Solver) -> None:
    """Of all ways to give every sequence one of up to four groups that use all GPUs."""
    best = min(
        flexsp.micro_batch_ms(groups)
        for number in range(1, len(lengths) + 1)
        for sizes in itertools.combinations_with_replacement(flexsp.SIZES, number)
        if sum(sizes) == flexsp.GPUS
        for owners in itertools.product(range(number), repeat=len(lengths))
        if set(owners) == set(range(number))
        for groups in [
            [(size, [x for x, o in zip(lengths, owners, strict=True) if o == p]) for p, size in enumerate(sizes)]
        ]
        if all(flexsp.fits(sum(of_group), size) for size, of_group in groups)
    )
    found = flexsp.program_plan(lengths, 10.0, solver)
    assert found is not None
    flexsp.check([found], lengths)
    assert flexsp.micro_batch_ms(found) == pytest.approx(best)
    assert flexsp.bound_ms(lengths) <= best * (1 + 1e-12)


def test_no_plan_at_all_is_faster_than_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """All plans of four GPUs for up to four sequences in up to two micro-batches; the bound is near the best of most."""
    monkeypatch.setattr(flexsp, "GPUS", 4)
    monkeypatch.setattr(flexsp, "SIZES", (2, 4))
    draw, ratios = random.Random(2), []
    for _ in range(40):
        lengths = [draw.randint(1, draw.choice((1, 2, 4)) * flexsp.CAPACITY) for _ in range(draw.randint(2, 4))]
        best = min(map(_ms, _all_plans(lengths)), default=None)
        if best is not None:
            ratios.append(flexsp.bound_ms(lengths) / best)
    assert len(ratios) > 20
    assert max(ratios) <= 1 + 1e-12
    assert sum(ratios) / len(ratios) > 0.97


def _ms(plan: list[flexsp.MicroBatch]) -> float:
    return sum(map(flexsp.micro_batch_ms, plan))


def _all_plans(lengths: list[int]) -> Iterator[list[flexsp.MicroBatch]]:
    for sizes in itertools.product(((4,), (2, 2)), repeat=2):
        groups = [(number, size) for number, of_one in enumerate(sizes) for size in of_one]
        for owners in itertools.product(range(len(groups)), repeat=len(lengths)):
            held = [[x for x, owner in zip(lengths, owners, strict=True) if owner == p] for p in range(len(groups))]
            if all(flexsp.fits(sum(own), size) for own, (_, size) in zip(held, groups, strict=True)):
                plan: list[flexsp.MicroBatch] = [[], []]
                for own, (number, size) in zip(held, groups, strict=True):
                    plan[number] += [(size, own)] if own else []
                yield [micro_batch for micro_batch in plan if micro_batch]


def test_our_plans_keep_the_rules_and_are_no_faster_than_the_bound() -> None:
    draw = random.Random(1)
    for _ in range(10):
        lengths = [min(190_000, int(draw.lognormvariate(5.95, 1.6)) + 1) for _ in range(300)]
        plan = our_plan(lengths)
        flexsp.check(plan, lengths)
        step_ms = sum(map(flexsp.micro_batch_ms, plan))
        assert flexsp.bound_ms(lengths) * (1 - 1e-6) <= step_ms
        adaptive = flexsp.adaptive_plan(lengths)
        flexsp.check(adaptive, lengths)
        assert step_ms <= sum(map(flexsp.micro_batch_ms, adaptive)) * 1.001


def test_the_check_of_the_rules_can_fail() -> None:
    for plan in ([[(8, [5])]], [[(64, [5, 6]), (2, [])]], [[(3, [5, 6])]], [[(2, [5, 6]), (2, [40_000])]]):
        with pytest.raises(AssertionError):
            flexsp.check(plan, [5, 6, 40_000] if len(plan[0]) > 1 and plan[0][1][1] else [5, 6])

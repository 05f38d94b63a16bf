"""The odds of recovery against a published table, brute force and simulation; the best interval against every
interval."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.fault.snapshot.coding import Code
from evermesh.fault.snapshot.stripes.interval import Rates, best_interval, daly_s, interval, stretch, young_s
from evermesh.fault.snapshot.stripes.placement import Candidate, plan_stripes
from evermesh.fault.snapshot.stripes.survival import (
    domains_survival,
    replicated,
    replicated_within,
    simulated,
    striped,
)

_LOSSES = (2, 3, 4)
_TABLE = {
    ("copies", 2): (".933 .800 .615", ".992 .976 .953", ".9990 .9971 .9941"),
    ("copies", 3): ("1 .989 .956", "1 .9999 .9995", "1 1 1"),
    (3, 1): (".800 .457 .141", ".976 .930 .863", ".9971 .9912 .9825"),
    (7, 1): (".533 0 0", ".945 .840 .699", ".9932 .9796 .9594"),
    (6, 2): ("1 .800 .431", "1 .9974 .9898", "1 1 .9998"),
    (4, 2): ("1 .818 .455", "1 .9987 .9949", "1 1 .9999"),
    (5, 3): ("1 1 .923", "1 1 .9999", "1 1 1"),
}
"""Survival of 2, 3 and 4 losses of 16, 128 and 1024 nodes, these rounded down to a multiple of the size of a group."""


@pytest.mark.parametrize("scheme", _TABLE, ids=str)
@pytest.mark.parametrize(("column", "nodes"), [(0, 16), (1, 128), (2, 1024)])
def test_survival_is_that_of_the_table(scheme: tuple[str | int, int], column: int, nodes: int) -> None:
    first, second = scheme
    group = second if first == "copies" else int(first) + second
    number = nodes // group
    is_copies = first == "copies"
    found = replicated(number * group, group, 4) if is_copies else striped([group] * number, second, 4)
    for losses, printed in zip(_LOSSES, _TABLE[scheme][column].split(), strict=True):
        digits = len(printed.partition(".")[2]) or 4
        assert found.survival(losses) == pytest.approx(float(printed), abs=0.5000001 * 10**-digits)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(3, 5), min_size=1, max_size=3), st.integers(1, 2), st.integers(1, 4))
def test_formula_counts_what_can_be_counted(sizes: list[int], parity: int, losses: int) -> None:
    stripe_of = [stripe for stripe, size in enumerate(sizes) for _ in range(size)]
    lost_sets = list(itertools.combinations(stripe_of, min(losses, len(stripe_of))))
    recovered = sum(all(lost.count(stripe) <= parity for stripe in lost) for lost in lost_sets)
    found = striped(sizes, parity, 4).survival(min(losses, len(stripe_of)))
    assert found == pytest.approx(recovered / len(lost_sets))


@pytest.mark.parametrize("sizes", [[8] * 16, [8, 8, 7], [5, 5, 4, 4]], ids=str)
@pytest.mark.parametrize("losses", [2, 3, 4])
def test_simulation_and_formula_agree_within_the_bounds(sizes: list[int], losses: int) -> None:
    found = simulated(sizes, 2, losses, trials=4000)
    assert found.low <= striped(sizes, 2, 4).survival(losses) <= found.high
    assert found.high - found.low < 0.06


def test_bounds_of_what_always_or_never_happens_hold_it() -> None:
    always, never = simulated([8] * 16, 2, 2, trials=20_000), simulated([4], 1, 2, trials=20_000)
    assert always.low < always.value == always.high == 1
    assert never.high > never.value == never.low == 0


@pytest.mark.parametrize("memory", [0.25, 1 / 3, 0.5, 0.6, 0.75])
def test_copies_in_the_memory_of_a_code_survive_what_the_best_choice_of_copies_does(memory: float) -> None:
    """All ways to give so many of seven nodes a copy are tried; a node keeps one of another at most."""
    nodes, losses = 7, 2
    copied = int(nodes * memory)
    best = 0
    for keeper in itertools.permutations(range(nodes), copied):
        if any(at == kept for at, kept in enumerate(keeper)):
            continue
        safe = 0
        for lost in itertools.combinations(range(nodes), losses):
            safe += all(node < copied and keeper[node] not in lost for node in lost)
        best = max(best, safe)
    assert replicated_within(nodes, memory, 4).survival(losses) == best / math.comb(nodes, losses)


def test_p_and_q_survive_more_than_a_copy_of_everything_in_a_third_of_its_memory() -> None:
    striped_128, copies = striped([8] * 16, 2, 4), replicated(128, 2, 4)
    assert striped_128.memory == pytest.approx(copies.memory / 3)
    assert all(striped_128.survival(losses) > copies.survival(losses) for losses in _LOSSES)


def test_loss_of_racks_is_counted_as_losing_them_does() -> None:
    nodes = [Candidate(f"{rack}.{at}", {"rack": str(rack)}) for rack in range(4) for at in range(4)]
    plan = plan_stripes(nodes, Code(6, 2))  # two members of either stripe in every rack
    assert [domains_survival(plan, nodes, "rack", losses).value for losses in (1, 2)] == [1.0, 0.0]
    spread = [Candidate(f"{rack}.{at}", {"rack": str(rack)}) for rack in range(16) for at in range(2)]
    plan = plan_stripes(spread, Code(6, 2))  # 4 stripes, every rack in two of them
    found = domains_survival(plan, spread, "rack", 3).value
    stripes_of = [{plan.stripe_of(f"{rack}.{at}")[0] for at in range(2)} for rack in range(16)]
    lost_sets = list(itertools.combinations(stripes_of, 3))
    assert found == sum(not set.intersection(*lost) for lost in lost_sets) / len(lost_sets)


@settings(deadline=None, max_examples=60)
@given(st.floats(0.05, 100), st.floats(0, 300), st.floats(0, 100), st.floats(0, 600), st.floats(100, 1e6))
def test_no_interval_loses_less_than_the_best(
    step_s: float, stall_s: float, protect_s: float, restart_s: float, mean_s: float
) -> None:
    rates = Rates(step_s, stall_s, protect_s, restart_s, mean_s)
    best = best_interval(rates)
    assert best.steps * step_s >= protect_s * (1 - 1e-6)
    least = max(1, math.ceil(protect_s / step_s - 1e-9))
    others = {least, *(max(least, round(best.steps * factor)) for factor in (0.3, 0.7, 0.9, 1.1, 1.5, 4))}
    others |= {max(least, best.steps - 1), best.steps + 1}
    assert all(stretch(rates, best.steps) <= stretch(rates, other) * (1 + 1e-12) for other in others)


def test_a_snapshot_that_hides_is_taken_every_step() -> None:
    found = best_interval(Rates(step_s=2, stall_s=0, protect_s=0, restart_s=60, failure_every_s=3600))
    assert (found.steps, found.stall_share) == (1, 0)
    protected_slowly = best_interval(Rates(step_s=2, stall_s=0, protect_s=7, restart_s=60, failure_every_s=3600))
    assert protected_slowly.steps == 4


def test_formulas_of_young_and_daly_are_near_the_best_interval() -> None:
    rates = Rates(step_s=1, stall_s=30, protect_s=0, restart_s=120, failure_every_s=86_400)
    best = best_interval(rates)
    assert daly_s(rates) == pytest.approx(best.steps, rel=0.01)
    assert young_s(rates) == pytest.approx(best.steps, rel=0.03)


def test_expected_time_and_lost_work_are_those_of_simulated_failures() -> None:
    rates = Rates(step_s=1, stall_s=4, protect_s=0, restart_s=20, failure_every_s=150)
    drawn = random.Random(1)
    steps, intervals = 25, 40_000
    time_s, lost_s, failures = 0.0, 0.0, 0
    next_failure_s = drawn.expovariate(1 / rates.failure_every_s)
    for _ in range(intervals):
        remaining = steps * rates.step_s + rates.stall_s
        while next_failure_s < remaining:
            time_s += next_failure_s
            lost_s += min(next_failure_s, steps * rates.step_s)
            failures += 1
            restart = rates.restart_s
            while (failure := drawn.expovariate(1 / rates.failure_every_s)) < restart:
                time_s += failure
            time_s += restart
            next_failure_s = drawn.expovariate(1 / rates.failure_every_s)
        time_s += remaining
        next_failure_s -= remaining
    assert time_s / (intervals * steps * rates.step_s) == pytest.approx(stretch(rates, steps), rel=0.02)
    assert lost_s / failures == pytest.approx(interval(rates, steps).lost_work_s, rel=0.02)

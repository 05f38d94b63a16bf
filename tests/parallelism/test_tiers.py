"""Tiers of sharding: who holds what, and which numbers are refused."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evermesh.parallelism import Layout
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.tiers import LEVELS, Division, Tiers


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@st.composite
def _divisions(draw: st.DrawFn) -> Division:
    ranks = draw(st.sampled_from((1, 2, 4, 6, 8, 12, 16, 36, 64)))
    states = draw(st.sampled_from(_divisors(ranks)))
    gradients = draw(st.sampled_from(_divisors(states)))
    return Division(ranks, draw(st.sampled_from(_divisors(gradients))), gradients, states)


@given(_divisions())
def test_what_a_rank_holds_of_each_tier_lies_in_what_it_holds_of_the_one_before(division: Division) -> None:
    for rank in range(division.ranks):
        gradient_part = division.gradient_part(rank)
        assert division.interval(rank) * division.gradients // division.states == gradient_part
        assert gradient_part * division.parameters // division.gradients == division.parameter_part(rank)


@given(_divisions())
def test_every_interval_has_equally_many_holders_of_which_one_is_first(division: Division) -> None:
    holders = [division.holders(interval) for interval in range(division.states)]
    assert sorted(itertools.chain(*holders)) == list(range(division.ranks))
    for ranks in holders:
        assert len(ranks) == division.ranks // division.states
        assert [division.is_first_replica(rank) for rank in ranks] == [True, *[False] * (len(ranks) - 1)]


@given(_divisions())
def test_groups_hold_the_parts_that_make_a_whole_in_their_order(division: Division) -> None:
    part_of = {
        "parameters": division.parameter_part,
        "gradients": division.gradient_part,
        "states": division.interval,
    }
    for level in LEVELS:
        groups = division.groups(level)
        assert sorted(itertools.chain(*groups)) == list(range(division.ranks))
        assert {len(group) for group in groups} == {division.size(level)}
        for group in groups:
            if level == "sums":  # the same part on all of them
                assert len({division.gradient_part(rank) for rank in group}) == 1
            else:
                parts = [part_of[level](rank) for rank in group]
                assert parts == list(range(parts[0], parts[0] + len(group)))


def test_the_three_levels_of_a_slow_network() -> None:
    """Two nodes of eight ranks: parameters in pairs, gradients in a node, states over all."""
    division = Tiers(parameters=2, gradients=8).division(16)
    assert division == (16, 2, 8, 16)
    assert division.groups("parameters")[0] == (0, 1)
    assert division.groups("gradients")[0] == (0, 2, 4, 6)
    assert division.groups("sums")[0] == division.groups("states")[0] == (0, 8)


def test_numbers_that_are_not_nested_are_refused_with_those_that_are() -> None:
    with pytest.raises(
        ValueError, match=r"sharding.parameters is 4 and sharding.gradients 2: .* a multiple of 4, or all"
    ):
        Tiers(parameters=4, gradients=2)
    with pytest.raises(
        ValueError, match=r"sharding.gradients is all and sharding.states 2: .* sharding.states can be all"
    ):
        Tiers(gradients="all", states=2)


def test_a_number_that_does_not_divide_the_ranks_is_refused_with_those_that_do() -> None:
    layout = Layout(hdp=6, sharding=Tiers(gradients=4))
    with pytest.raises(LayoutDoesNotFit, match=r"sharding.gradients is 4, .* hdp 6 ranks .* can be 1, 2, 3, 6, or all"):
        _ = layout.division


@pytest.mark.parametrize(("hdp", "edp", "expected"), [(8, 4, (4, 2, 4, 4)), (8, 2, (2, 2, 2, 2)), (6, 3, (3, 1, 3, 3))])
def test_experts_are_divided_as_far_as_their_own_ranks_allow(hdp: int, edp: int, expected: tuple[int, ...]) -> None:
    assert Tiers(parameters=2, gradients="all").expert_division(hdp, edp) == expected

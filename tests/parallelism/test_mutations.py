"""Every kind of broken plan is refused, whoever planned it, and packed plans are judged as their pieces are."""

import dataclasses
import math
import random
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from evermesh.parallelism import BatchPlan, Certificate, CostModel, Layout, verify_plan
from evermesh.parallelism.errors import LayoutDoesNotFit, PlanInvalid
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.proof.packed import is_right
from evermesh.parallelism.rank_work import PackedRanks
from evermesh.parallelism.verifier import check_pieces
from tests.parallelism.mutations import MUTATIONS
from tests.parallelism.planned import KINDS, Case, draw

CASES_OF_A_KIND = 40
LEAST = 5
"""Plans that every mutation must find something to break in."""


@cache
def _planned() -> tuple[tuple[Case, BatchPlan], ...]:
    cases = [draw(seed, kind, most_ranks=8) for kind in KINDS for seed in range(1000, 1000 + CASES_OF_A_KIND)]
    return tuple((case, case.plan()) for case in cases)


def _is_refused(plan: BatchPlan, layout: Layout, pool: Pool) -> bool:
    try:
        check_pieces(plan, layout, pool)
    except PlanInvalid:
        return True
    return False


def test_plans_of_all_planners_are_right_packed_and_piece_by_piece() -> None:
    for case, plan in _planned():
        assert isinstance(plan.ranks, PackedRanks)
        assert is_right(plan, case.layout, case.pool), case
        unpacked = dataclasses.replace(plan, ranks=tuple(plan.ranks))
        for form in (plan, unpacked):
            verify_plan(form, case.lengths, case.layout, cost=case.cost, pool=case.pool)
        check_pieces(unpacked, case.layout, case.pool)


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutated_plan_is_refused_in_both_forms(name: str) -> None:
    broken = packed = 0
    for number, (case, plan) in enumerate(_planned()):
        mutant = MUTATIONS[name](plan, case.layout, random.Random(number))
        if mutant is None or mutant == plan:
            continue
        broken += 1
        with pytest.raises(PlanInvalid):
            verify_plan(mutant, case.lengths, case.layout, pool=case.pool)
        try:
            ranks = PackedRanks.of(mutant.ranks, mutant.lengths)
        except (PlanInvalid, IndexError, ValueError):
            continue
        packed += 1
        mutant = dataclasses.replace(mutant, ranks=ranks)
        assert not is_right(mutant, case.layout, case.pool)
        assert len(mutant.ranks) != case.layout.hdp or _is_refused(mutant, case.layout, case.pool)
    assert broken >= LEAST, f"only {broken} plans could be broken so ({packed} packed)"


def _any_column(packed: PackedRanks, dice: random.Random) -> PackedRanks | None:
    """One number of one column, changed to any other, nearby or far."""
    names = ("rank_start", "micro_batch_start", "sequence", "ring_start", "ring", "heads", "gathers", "recomputed")
    name = dice.choice((*names, "offload", "lock_step"))
    column = getattr(packed, name)
    if column is None or not len(column):
        return None
    column = column.copy()
    at = dice.randrange(len(column))
    column[at] = not column[at] if column.dtype == np.bool_ else column[at] + dice.choice((-100, -2, -1, 1, 2, 100))
    return dataclasses.replace(packed, **{name: column})


@pytest.mark.parametrize("seed", range(20))
def test_packed_plans_are_judged_as_their_pieces_are(seed: int) -> None:
    """Not every change makes a plan wrong; but both ways to prove it have to say the same."""
    dice, judged = random.Random(seed), {True: 0, False: 0}
    for case, plan in _planned():
        assert isinstance(plan.ranks, PackedRanks)
        ranks = _any_column(plan.ranks, dice)
        if ranks is None:
            continue
        mutant = dataclasses.replace(plan, ranks=ranks)
        right = is_right(mutant, case.layout, case.pool)
        assert right != _is_refused(mutant, case.layout, case.pool), (case, mutant)
        judged[right] += 1
    assert judged[False] > 20


def _certificate(**changes: Any) -> Callable[[BatchPlan], BatchPlan]:
    return lambda plan: dataclasses.replace(plan, certificate=dataclasses.replace(plan.certificate, **changes))


def _scaled(makespan: float, bound: float) -> Callable[[BatchPlan], BatchPlan]:
    def mutate(plan: BatchPlan) -> BatchPlan:
        old = plan.certificate
        return _certificate(makespan_s=old.makespan_s * makespan, lower_bound_s=old.lower_bound_s * bound)(plan)

    return mutate


CERTIFICATES: dict[str, tuple[Callable[[BatchPlan], BatchPlan], str]] = {
    "promises too much": (_scaled(1 - 1e-6, 0.9), "but the plan takes"),
    "promises too little": (_scaled(1 + 1e-6, 1.0), "but the plan takes"),
    "a bound that the plan refutes": (_scaled(2.0, 2.0), "but the plan takes"),
    "a bound above its promise": (_scaled(1.0, 1e3), "less than its lower bound"),
    "a bound that anybody can raise": (_scaled(1.0, 1e-6), "that any plan takes"),
    "a negative bound": (_scaled(1.0, -1.0), "over a lower bound"),
    "a promise without number": (_certificate(makespan_s=math.nan), "promises nan"),
    "an endless promise": (_certificate(makespan_s=math.inf), "promises inf"),
    "no constraint": (_certificate(binding="luck"), "none of work"),
    "nothing binds": (_certificate(binding="nothing"), "is said to bind"),
    "another cost model": (lambda plan: dataclasses.replace(plan, cost_version=9), "cost model 9"),
}


@pytest.mark.parametrize("name", CERTIFICATES)
def test_wrong_certificate_is_refused(name: str) -> None:
    mutate, message = CERTIFICATES[name]
    refused = 0
    for case, plan in _planned():
        if not case.lengths or (name == "a bound that anybody can raise" and case.layout.runs_in_waves):
            continue
        with pytest.raises(PlanInvalid, match=message):
            verify_plan(mutate(plan), case.lengths, case.layout, cost=case.cost, pool=case.pool)
        refused += 1
    assert refused > 20


def test_certificate_of_other_nodes_speeds_or_costs_is_refused() -> None:
    refused = 0
    for case, plan in _planned():
        if not case.lengths:
            continue
        slower = Pool(case.pool.nodes, tuple(speed / 2 for speed in case.pool.speeds))
        costlier = case.cost.model_copy(update={"token_s": 2 * case.cost.token_s})
        for cost, pool in ((case.cost, slower), (costlier, case.pool)):
            with pytest.raises(PlanInvalid, match="but the plan takes"):
                verify_plan(plan, case.lengths, case.layout, cost=cost, pool=pool)
            refused += 1
    assert refused > 100


HEADS = CostModel(token_s=1e-5, pair_s=2e-8, ring_step_s=1e-3, ring_token_s=1e-4, head_token_s=1e-9)


@pytest.mark.parametrize("form", [{}, {"ep": 2}, {"pp": 2}])
def test_heads_divided_across_nodes_are_refused(form: dict[str, int]) -> None:
    layout = Layout.model_validate({"hdp": 4, "capacity": 1000, "ulysses": 4, **form})
    case = Case((3900, 200, 100), layout, HEADS, Pool.of(4))
    plan = case.plan()
    assert max(piece.heads for mbs in plan.ranks for mb in mbs for piece in mb.pieces) == 4
    verify_plan(plan, case.lengths, layout, pool=case.pool)
    for ranks in (plan.ranks, tuple(plan.ranks)):
        split = dataclasses.replace(plan, ranks=ranks)
        with pytest.raises(PlanInvalid, match=r"divide the heads of sequence 0, but are not in one node"):
            verify_plan(split, case.lengths, layout, pool=Pool.of(4, 2))
        verify_plan(split, case.lengths, layout)
    with pytest.raises(LayoutDoesNotFit, match="the pool has 3 ranks"):
        verify_plan(plan, case.lengths, layout, pool=Pool.of(3))


def _with_many_peers() -> tuple[Case, BatchPlan]:
    """Rings of any members: what a search over few ranks finds when peers are not bounded."""
    for seed in range(200):
        case = draw(seed, "free", most_ranks=16)
        if case.layout.ulysses > 1 or case.layout.hdp < 8:
            continue
        unbounded = case._replace(layout=case.layout.model_copy(update={"most_peers": None}))
        plan = unbounded.plan()
        bounded = unbounded._replace(layout=case.layout.model_copy(update={"most_peers": 4}))
        if not is_right(plan, bounded.layout, None):
            return bounded, plan
    raise AssertionError("no plan with many peers")


def test_too_many_peers_are_refused_and_the_planner_keeps_to_the_bound() -> None:
    case, plan = _with_many_peers()
    for ranks in (plan.ranks, tuple(plan.ranks)):
        with pytest.raises(PlanInvalid, match=r"passes keys and values around with \d+ ranks; layout.most_peers is 4"):
            verify_plan(dataclasses.replace(plan, ranks=ranks), case.lengths, case.layout)
    verify_plan(case.plan(), case.lengths, case.layout, cost=case.cost, pool=case.pool)


def test_peers_are_bounded_only_where_the_planner_bounds_them() -> None:
    with pytest.raises(ValidationError, match="may join any ranks"):
        Layout(hdp=4, pp=2, most_peers=4)
    with pytest.raises(ValidationError, match="may join any ranks"):
        Layout(hdp=4, ep=2, most_peers=4)
    with pytest.raises(ValidationError, match="4 x ulysses = 8"):
        Layout(hdp=4, ulysses=2, most_peers=4)
    with pytest.raises(ValidationError, match="gathers its keys and values exchanges messages with all ranks"):
        Layout(hdp=4, gathers_keys=True, most_peers=8)
    assert Layout(hdp=4, ulysses=2, most_peers=8).most_peers == 8


def test_an_empty_batch_has_a_certificate_of_nothing() -> None:
    case = Case((), Layout(hdp=3), HEADS, Pool.of(3))
    plan = case.plan()
    assert plan.certificate == Certificate(0.0, 0.0, "nothing")
    verify_plan(plan, (), case.layout, cost=case.cost, pool=case.pool)

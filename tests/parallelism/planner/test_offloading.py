"""Plans that choose what waits in host memory: proven, never slower than with one fraction for all or below their bound."""

import hashlib
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from evermesh.parallelism import BatchPlan, CostModel, Layout, MicroBatch, Piece, plan_batch, verify_plan
from evermesh.parallelism.cost import ModelShape, Sharing
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.planner import bound_for
from evermesh.parallelism.planner.fractions import with_fractions
from evermesh.parallelism.planner.pipelines import pipelines_s
from evermesh.parallelism.planner.replan import replan_batch
from evermesh.parallelism.planner.restated import RESTATED
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import Assignment
from evermesh.parallelism.simulator import Scenario, makespan_s, simulate_events
from evermesh.runtime.cost import cost_of_shape
from tests.benchmarks.parallelism.lengths import available_corpora, large_batch

LLAMA_7B = ModelShape(hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=11008, vocabulary=32_000)
GRID = (0.0, 0.25, 0.5, 0.75, 1.0)
ZERO_3 = {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"}
FORMS: tuple[dict[str, Any], ...] = ({}, {"sharding": ZERO_3}, {"pp": 2}, {"keep_capacity": 200})
COST = CostModel(
    token_s=3e-6,
    pair_s=5e-9,
    micro_batch_s=1e-4,
    recompute_token_s=1e-6,
    ring_token_s=2e-7,
    offload_saves_token_s=7e-7,
    host_token_s=3e-7,
    host_products_token_s=1.4e-6,
)
"""Copies of the products of short documents do not hide; those of long ones do."""


def _layout(offload: float | str, **values: Any) -> Layout:
    return Layout.model_validate({"activations": "offload", "offload": offload} | values)


def _drawn(seed: int, number: int) -> tuple[int, ...]:
    dice = random.Random(seed)
    return tuple(min(3500, int(dice.lognormvariate(4.5, 1.3)) + 1) for _ in range(number))


def _fractions(plan: BatchPlan) -> list[float]:
    return [mb.offload for of_rank in plan.ranks for mb in of_rank if mb.recompute == "block" and mb.pieces]


@pytest.mark.parametrize("corpus", available_corpora())
def test_no_fraction_for_all_is_faster_than_one_for_each(corpus: str) -> None:
    """Coefficients of LLaMA-7B on the nominal GPU; all times are those that the verifier replays."""
    pool = Pool.of(64, 8)
    lengths = large_batch(corpus, 0, 64 * 32_768, 131_072)
    seconds = {}
    for offload in (*GRID, "auto"):
        layout = _layout(offload, hdp=64, capacity=8192)
        cost = cost_of_shape(LLAMA_7B, layout, None, 2).model_copy(update={"micro_batch_s": 5e-3})
        plan = plan_batch(lengths, layout, cost, pool=pool)
        verify_plan(plan, lengths, layout, cost=cost, pool=pool)
        seconds[offload] = plan.certificate.makespan_s
        assert len(set(_fractions(plan))) > 10 if offload == "auto" else set(_fractions(plan)) == {offload}
    assert seconds["auto"] <= min(seconds[offload] for offload in GRID)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_of_plan_is_proven_replayed_and_written(form: dict[str, Any]) -> None:
    for seed in range(2):
        lengths, layout, pool = _drawn(seed, 60), _layout("auto", hdp=8, capacity=500, **form), Pool.of(8, 4)
        plan = plan_batch(lengths, layout, COST, pool=pool)
        verify_plan(plan, lengths, layout, cost=COST, pool=pool)
        replayed = simulate_events(plan, layout, COST, Scenario(pool)).timeline.makespan_s
        assert plan.certificate.makespan_s == pytest.approx(replayed, rel=1e-9)
        assert len(set(_fractions(plan))) > 3
        for payload in (plan.to_json(), plan.to_document()):
            again = BatchPlan.from_json(payload)
            assert again.ranks == plan.ranks
            verify_plan(again, lengths, layout, cost=COST, pool=pool)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_any_other_fraction_of_a_micro_batch_takes_no_less(form: dict[str, Any]) -> None:
    lengths, layout = _drawn(7, 40), _layout("auto", hdp=4, capacity=500, **form)
    plan = plan_batch(lengths, layout, COST)
    for of_rank in plan.ranks:
        for micro_batch in of_rank:
            if micro_batch.recompute == "none":
                continue
            work = COST.together(
                COST.work(lengths[p.sequence], Sharing(len(p.ring), p.heads)) for p in micro_batch.pieces
            )
            own = COST.offload_s(work, micro_batch.offload)
            assert own <= min(COST.offload_s(work, i / 200) for i in range(201)) + 1e-15


_TINY: tuple[tuple[tuple[int, ...], dict[str, Any]], ...] = (
    ((90, 60, 30), {"hdp": 2, "capacity": 60}),
    ((100, 40, 40), {"hdp": 2, "capacity": 100}),
    ((250, 30, 20), {"hdp": 3, "capacity": 100}),
    ((250, 20), {"hdp": 3, "capacity": 100, "keep_capacity": 30}),
    ((119, 110), {"hdp": 4, "capacity": 60}),
    ((90, 60, 30), {"hdp": 2, "capacity": 60, "sharding": ZERO_3}),
    ((250, 30), {"hdp": 2, "capacity": 200, "pp": 2}),
    ((60, 50, 40), {"hdp": 2, "capacity": 100, "pp": 2}),
)


@pytest.mark.parametrize(("lengths", "form"), _TINY, ids=str)
@pytest.mark.parametrize("offload", ["auto", *(pytest.param(fixed, marks=pytest.mark.parity) for fixed in (0.0, 0.6))])
def test_no_plan_of_a_tiny_batch_beats_the_bound(
    lengths: tuple[int, ...], form: dict[str, Any], offload: float | str
) -> None:
    """All rings, waves and contents of micro-batches, rings beside whole sequences too; copies that hide, or hardly any."""
    layout, pool = _layout(offload, **form), Pool.of(form["hdp"])
    for pair_s, host_s in ((3e-8, 1.4e-6), (0.0, 5e-7), (2e-7, 5e-6)):
        cost = COST.model_copy(update={"pair_s": pair_s, "host_products_token_s": host_s, "host_token_s": host_s / 4})
        best = min(
            _seconds(with_fractions(one, lengths, layout, cost), lengths, layout, cost, pool)
            for one in _all_plans(lengths, layout)
        )
        assert bound_for(lengths, layout, cost, pool).seconds <= best * (1 + 1e-9)
        assert plan_batch(lengths, layout, cost, pool=pool).certificate.makespan_s >= best * (1 - 1e-9)


def _seconds(ranks: Assignment, lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool) -> float:
    if layout.runs_in_waves:
        return pipelines_s(ranks, lengths, layout, cost, pool)
    return makespan_s(ranks, lengths, cost)


def _all_plans(lengths: Sequence[int], layout: Layout) -> Iterator[Assignment]:
    """Every choice of ranks and of one of as many waves as there are sequences, where memory suffices."""
    ranks, waves = range(layout.hdp), range(len(lengths))
    rings = [ring for size in ranks for ring in itertools.combinations(ranks, size + 1)]
    for chosen in itertools.product(itertools.product(rings, waves), repeat=len(lengths)):
        held: list[list[list[Piece]]] = [[[] for _ in waves] for _ in ranks]
        for sequence, (ring, wave) in enumerate(chosen):
            for index, rank in enumerate(ring):
                held[rank][wave].append(Piece(sequence, share_of(lengths[sequence], len(ring), index).ranges(), ring))
        if all(sum(p.num_tokens for p in pieces) <= layout.capacity for of_rank in held for pieces in of_rank):
            yield _assignment(held, layout)


def _assignment(held: list[list[list[Piece]]], layout: Layout) -> Assignment:
    """A wave keeps its activations where all of it may."""
    keep = layout.keep_capacity or 0
    waves = range(len(held[0]))
    fullest = [max(sum(p.num_tokens for p in of_rank[wave]) for of_rank in held) for wave in waves]
    used = [wave for wave in waves if fullest[wave]]
    every = bool(layout.lock_step_groups)
    return tuple(
        tuple(
            MicroBatch(
                tuple(of_rank[wave]),
                "none" if fullest[wave] <= keep else "block",
                lock_step=index if every else None,
            )
            for index, wave in enumerate(used)
            if every or layout.runs_in_waves or of_rank[wave]
        )
        for of_rank in held
    )


def test_a_plan_that_lost_a_rank_is_mended_with_fractions_of_its_own() -> None:
    lengths, layout, pool = _drawn(3, 200), _layout("auto", hdp=24, capacity=500), Pool.of(24, 4)
    plan = plan_batch(lengths, layout, COST, pool=pool)
    found = replan_batch(plan, layout, COST, pool=pool, lost={5})
    verify_plan(found.plan, lengths, found.layout, cost=COST, pool=found.pool)
    assert len(set(_fractions(found.plan))) > 3


def test_restated_planners_choose_fractions_too() -> None:
    lengths, layout, pool = _drawn(4, 60), _layout("auto", hdp=8, capacity=500), Pool.of(8)
    for baseline in RESTATED.values():
        chosen = baseline(lengths, layout, COST, pool)
        none = tuple(tuple(MicroBatch(mb.pieces, mb.recompute) for mb in of_rank) for of_rank in chosen)
        assert makespan_s(chosen, lengths, COST) < makespan_s(none, lengths, COST)


def digest() -> str:
    """Of plans of all planners that choose fractions."""
    cases: tuple[tuple[int, int, dict[str, Any]], ...] = (
        (24, 60, {}),
        (24, 60, {"keep_capacity": 200}),
        (4, 20, {"sharding": ZERO_3}),
        (2, 8, {"pp": 2}),
    )
    payloads = [
        plan_batch(
            _drawn(5, number), _layout("auto", hdp=hdp, capacity=900, **form), COST, pool=Pool.of(hdp, 4)
        ).to_json()
        for hdp, number, form in cases
    ]
    return hashlib.sha256(b"".join(payloads)).hexdigest()


def test_plain_python_gives_the_same_fractions() -> None:
    program = "from tests.parallelism.planner.test_offloading import digest; print(digest())"
    environment = {**os.environ, "EVERMESH_PLANNER": "python", "PYTHONHASHSEED": "7"}
    found = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=150, check=True
    )
    assert found.stdout.strip() == digest()

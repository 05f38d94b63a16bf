"""Plans for pipelines against an independent proof, a brute-force optimum and the replay of the simulator."""

import itertools
import os
import random
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.parallelism import BatchPlan, CostModel, Layout, MicroBatch, Piece, SequenceTooLong, verify_plan
from evermesh.parallelism.batch_plan import Certificate
from evermesh.parallelism.errors import LayoutDoesNotFit, PlanInvalid
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.pipeline.schedule import PipelineSchedule
from evermesh.parallelism.pipeline.simulator import StageSeconds, replay, replay_waves
from evermesh.parallelism.planner.bound import lower_bound
from evermesh.parallelism.planner.pipelines import pipeline_bound, pipelines_s, plan_pipelines, plan_pipelines_s
from evermesh.parallelism.planner.pipelines.replay import (
    Gangs,
    count_members,
    join,
    no_gangs,
    pack_orders,
    replay_ticks,
    together_ticks,
)
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import Assignment

COST = CostModel(
    token_s=1e-5, pair_s=2e-9, micro_batch_s=1e-3, recompute_token_s=2e-6, ring_token_s=1e-6, network_token_s=4e-6
)
CAPACITY = 500
LAYOUTS = (
    {"pp": 2},
    {"pp": 4, "schedule": "gpipe"},
    {"pp": 3, "schedule": "zero-bubble", "activations": "recompute"},
    {"pp": 2, "schedule": "interleaved-1f1b", "virtual_stages": 2},
    {"pp": 2, "schedule": "zero-bubble-v", "virtual_stages": 2, "activations": "recompute", "keep_capacity": 200},
    {"pp": 2, "ep": 2},
    {"pp": 4, "ulysses": 4, "gathers_keys": True},
    {"pp": 2, "ep": 4, "activations": "recompute", "keep_capacity": 300},
    {"pp": 2, "ep": 2, "sharding": {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"}},
    {"ep": 2},
)
SCHEDULES = (
    PipelineSchedule("gpipe", 3),
    PipelineSchedule("1f1b", 1),
    PipelineSchedule("1f1b", 4),
    PipelineSchedule("interleaved-1f1b", 2, 3),
    PipelineSchedule("zero-bubble", 4),
    PipelineSchedule("zero-bubble", 2, 2),
    PipelineSchedule("zero-bubble-v", 3, 2),
)


def _plan(assignment: Assignment, lengths: tuple[int, ...], capacity: int) -> BatchPlan:
    certificate = Certificate(1.0, 1.0, "work")
    return BatchPlan(lengths, capacity, assignment, certificate, planner="pipelines", cost_version=0, speeds_version=0)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 60), st.integers(1, 1900)), max_size=40).map(tuple),
    choice=st.sampled_from(LAYOUTS),
    hdp=st.sampled_from((4, 8)),
    ranks_per_node=st.sampled_from((None, 4, 3, 5)),
    slow=st.sampled_from(((), (0,), (1, 3))),
)
def test_any_batch_gets_a_plan_that_passes_the_proof_and_is_not_below_its_bound(
    lengths: tuple[int, ...], choice: dict[str, object], hdp: int, ranks_per_node: int | None, slow: tuple[int, ...]
) -> None:
    layout = Layout.model_validate({"hdp": hdp, "capacity": CAPACITY, **choice})
    pool = Pool.of(hdp, ranks_per_node, [0.7 if rank in slow else 1.0 for rank in range(hdp)])
    assignment, seconds = plan_pipelines_s(lengths, layout, COST, pool)
    verify_plan(_plan(assignment, lengths, layout.capacity), lengths, layout)
    assert pipelines_s(assignment, lengths, layout, COST, pool) == pytest.approx(seconds, rel=1e-9)
    assert seconds >= pipeline_bound(lengths, layout, COST, pool).seconds * (1 - 1e-9)
    for micro_batch in itertools.chain.from_iterable(assignment):
        if layout.recompute == "none" or micro_batch.num_tokens > (layout.keep_capacity or 0):
            assert micro_batch.recompute == layout.recompute
    in_ring = {r for mbs in assignment for mb in mbs for p in mb.pieces if len(p.ring) > 1 for r in p.ring}
    for rank in set(range(hdp)) - {member for group in layout.lock_step_groups for member in group}:
        assert not assignment[rank] or assignment[rank][-1].pieces  # nothing empty behind the last
        assert rank in in_ring or all(mb.pieces for mb in assignment[rank])


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 3000), min_size=1, max_size=40).map(tuple),
    ranks_per_node=st.sampled_from((3, 4, 5)),
)
def test_those_that_divide_heads_are_neighbours_in_one_node(lengths: tuple[int, ...], ranks_per_node: int) -> None:
    layout = Layout(hdp=8, pp=2, capacity=CAPACITY, ulysses=4, gathers_keys=True)
    pool = Pool.of(8, ranks_per_node)
    for micro_batch in itertools.chain.from_iterable(plan_pipelines(lengths, layout, COST, pool)):
        for piece in micro_batch.pieces:
            assert len(piece.ring) % piece.heads == 0
            for first in range(0, len(piece.ring), piece.heads):
                assert not pool.crosses_nodes(piece.ring[first : first + piece.heads])


@pytest.mark.parametrize("choice", LAYOUTS[:6], ids=str)
def test_the_time_is_that_of_the_simulator_where_it_knows_all(choice: dict[str, object]) -> None:
    """It knows neither nodes nor speeds."""
    generator = random.Random(repr(choice))
    layout = Layout.model_validate({"hdp": 4, "capacity": CAPACITY, **choice})
    for _ in range(5):
        lengths = tuple(generator.randint(1, 1500) for _ in range(30))
        assignment, seconds = plan_pipelines_s(lengths, layout, COST, Pool.of(4))
        assert replay_waves(assignment, lengths, layout, COST).makespan_s == pytest.approx(seconds, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name}-{s.ranks}x{s.virtual_stages}")
def test_the_compiled_replay_is_the_simulators(schedule: PipelineSchedule) -> None:
    generator = random.Random(repr(schedule))
    for _ in range(25):
        counts = [generator.randint(0, 9) for _ in range(4)]
        ticks = np.zeros((4, 9, 4), dtype=np.int64)
        ticks[..., [0, 2, 3]] = [[[generator.randint(0, 9) for _ in range(3)] for _ in range(9)] for _ in range(4)]
        ticks[..., 1] = ticks[..., 2] + ticks[..., 3]
        gangs = no_gangs(9, 4)
        root, following = gangs.root.copy(), gangs.following.copy()
        together = {}
        for index in range(max(counts)):
            present = [rank for rank, count in enumerate(counts) if index < count]
            members = tuple(sorted(generator.sample(present, generator.randint(1, len(present)))))
            together.update({(rank, index): members for rank in members if len(members) > 1})
            for one, other in itertools.pairwise(generator.sample(members, len(members))):
                join(root[index], following[index], one, other)
        gangs = Gangs(root, count_members(root), following)
        numbers = sorted(set(counts))
        found = replay_ticks(
            pack_orders(schedule, tuple(numbers)),
            np.array([numbers.index(count) for count in counts]),
            together_ticks(ticks, gangs),
            gangs,
        )
        seconds = [
            [[StageSeconds(*ticks[rank, index, [0, 2, 3]].tolist())] * schedule.num_stages for index in range(count)]
            for rank, count in enumerate(counts)
        ]
        assert found == replay(schedule, seconds, together).makespan_s


def test_pipelines_that_wait_for_each_other_are_refused() -> None:
    lengths = (100, 100)
    rings = [tuple(Piece(i, share_of(100, 2, rank).ranges(), (0, 1)) for i in range(2)) for rank in range(2)]
    crossed: Assignment = (
        (MicroBatch((rings[0][0],)), MicroBatch((rings[0][1],))),
        (MicroBatch((rings[1][0],)), MicroBatch(())),
    )
    orders = pack_orders(PipelineSchedule("1f1b", 2), (1, 2))
    gangs = no_gangs(2, 2)
    join(gangs.root[1], gangs.following[1], 0, 1)
    ticks = np.ones((2, 2, 4), dtype=np.int64)
    # one has the micro-batch that both should run together, the other has not
    assert (
        replay_ticks(orders, np.array([1, 0]), ticks, Gangs(gangs.root, count_members(gangs.root), gangs.following))
        == -1
    )
    with pytest.raises(PlanInvalid):
        verify_plan(_plan(crossed, lengths, 100), lengths, Layout(hdp=2, pp=2, capacity=100))


def _best_of_all(lengths: tuple[int, ...], layout: Layout, pool: Pool) -> float:
    """Least time over every micro-batch and ring that every sequence can have."""
    number, hdp = len(lengths), layout.hdp
    rings = [ring for size in range(1, hdp + 1) for ring in itertools.combinations(range(hdp), size)]
    least = float("inf")
    for places in itertools.product(itertools.product(range(number), rings), repeat=number):
        waves: list[list[list[Piece]]] = [[[] for _ in range(number)] for _ in range(hdp)]
        for sequence, (wave, ring) in enumerate(places):
            for index, rank in enumerate(ring):
                share = share_of(lengths[sequence], len(ring), index).ranges()
                waves[rank][wave].append(Piece(sequence, share, ring))
        if any(sum(p.num_tokens for p in pieces) > layout.capacity for rank in waves for pieces in rank):
            continue
        assignment = tuple(_without_empty_end(rank, layout) for rank in waves)
        least = min(least, pipelines_s(assignment, lengths, layout, COST, pool))
    return least


def _without_empty_end(waves: list[list[Piece]], layout: Layout) -> tuple[MicroBatch, ...]:
    number = max((index + 1 for index, pieces in enumerate(waves) if pieces), default=0)
    return tuple(MicroBatch(tuple(pieces), recompute=layout.recompute) for pieces in waves[:number])


@pytest.mark.parametrize(
    ("layout", "batches", "pool"),
    [
        (Layout(pp=2, capacity=300), ((300, 40, 30, 20), (100,) * 4, (200, 150, 10, 10)), Pool.of(1)),
        (Layout(pp=3, capacity=300, schedule="gpipe"), ((300, 40, 30), (100,) * 4), Pool.of(1)),
        (Layout(pp=2, capacity=300, schedule="zero-bubble"), ((300, 40, 30, 20), (90, 80, 10)), Pool.of(1)),
        (
            Layout(pp=2, capacity=300, schedule="interleaved-1f1b", virtual_stages=2, activations="recompute"),
            ((300, 40, 30, 20), (90, 80, 10)),
            Pool.of(1),
        ),
        (Layout(hdp=2, pp=2, capacity=300), ((500, 90, 40), (300, 300, 10), (60, 50, 40)), Pool.of(2)),
        (Layout(hdp=2, pp=4, capacity=300), ((550, 30), (290, 280), (200, 100)), Pool.of(2, speeds=(1.0, 0.5))),
    ],
    ids=str,
)
def test_no_plan_of_a_tiny_batch_beats_the_bound_and_ours_is_near_the_best(
    layout: Layout, batches: tuple[tuple[int, ...], ...], pool: Pool
) -> None:
    for lengths in batches:
        best = _best_of_all(lengths, layout, pool)
        assert pipeline_bound(lengths, layout, COST, pool).seconds <= best * (1 + 1e-9)
        # where ranks differ and sequences are few, it does not try to leave a slow rank out altogether
        most = 1.35 if len(set(pool.speeds)) == 1 else 3.0
        assert best * (1 - 1e-9) <= plan_pipelines_s(lengths, layout, COST, pool).seconds <= most * best


def _long_tailed(seed: int, number: int) -> tuple[int, ...]:
    generator = random.Random(seed)
    return tuple(min(1900, 1 + int(generator.lognormvariate(4.5, 1.2))) for _ in range(number))


def test_it_is_near_the_bound_which_is_above_that_without_pipelines() -> None:
    layout, pool = Layout(hdp=4, pp=4, capacity=CAPACITY), Pool.of(4)
    cost = COST.model_copy(update={"micro_batch_s": 1e-4})
    for seed in range(3):
        lengths = _long_tailed(seed, 300)
        seconds = plan_pipelines_s(lengths, layout, cost, pool).seconds
        bound = pipeline_bound(lengths, layout, cost, pool).seconds
        assert bound >= lower_bound(lengths, layout, cost).seconds / layout.pp
        assert seconds <= 1.12 * bound


def test_a_slow_rank_gets_less() -> None:
    layout, lengths = Layout(hdp=4, pp=4, capacity=CAPACITY), (100,) * 400
    assignment = plan_pipelines(lengths, layout, COST, Pool.of(4, speeds=(1.0, 1.0, 0.5, 1.0)))
    tokens = [sum(mb.num_tokens for mb in micro_batches) for micro_batches in assignment]
    assert tokens[2] < 0.65 * min(tokens[0], tokens[1], tokens[3])


def test_micro_batches_go_from_small_to_large_to_small() -> None:
    (order,) = plan_pipelines((20,) * 1000, Layout(pp=4, capacity=CAPACITY), COST, Pool.of(1))
    tokens = [micro_batch.num_tokens for micro_batch in order]
    largest = tokens.index(max(tokens))
    assert tokens[0] < 0.6 * tokens[largest]
    assert tokens[-1] < 0.6 * tokens[largest]
    assert tokens[:largest] == sorted(tokens[:largest])


def test_what_cannot_be_planned_is_refused_with_the_numbers() -> None:
    layout = Layout(hdp=2, pp=2, capacity=100)
    with pytest.raises(SequenceTooLong, match="2 HDP ranks"):
        plan_pipelines((201,), layout, COST, Pool.of(2))
    with pytest.raises(LayoutDoesNotFit, match="sequence 1 has 0 tokens"):
        pipeline_bound((5, 0), layout, COST, Pool.of(2))
    with pytest.raises(LayoutDoesNotFit, match=r"the pool has 3 HDP ranks, but layout\.hdp is 2"):
        plan_pipelines((5,), layout, COST, Pool.of(3))
    assert plan_pipelines((), layout, COST, Pool.of(2)) == ((), ())


_PROGRAM = """
import hashlib, sys
from evermesh.parallelism import Layout
from evermesh.parallelism.planner.pipelines import plan_pipelines
from evermesh.parallelism.pool import Pool
from tests.parallelism.planner.test_pipelines import COST, LAYOUTS, _long_tailed
for choice in (LAYOUTS[0], LAYOUTS[7]):
    layout = Layout.model_validate({"hdp": 4, "capacity": 500, **choice})
    plan = plan_pipelines(_long_tailed(1, 10), layout, COST, Pool.of(4, 2, (1.0, 0.9, 1.0, 1.0)))
    print(hashlib.sha256(repr(plan).encode()).hexdigest())
"""


def test_python_and_machine_code_give_one_plan_in_every_process() -> None:
    found = []
    for mode, seed in (("compiled", "0"), ("compiled", "1"), ("python", "2")):
        environment = {**os.environ, "EVERMESH_PLANNER": mode, "PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True, check=True
        )
        found.append(done.stdout)
    assert found[0].count("\n") == 2
    assert len(set(found)) == 1

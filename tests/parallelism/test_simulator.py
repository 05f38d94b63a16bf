"""The event simulator against the aggregate model, against definitions written down directly, and against closed forms."""

import dataclasses
import itertools
import json
import random
import time
from functools import cache

import pytest

from evermesh.parallelism import BatchPlan, Certificate, CostModel, Layout, MicroBatch, Piece, PlanInvalid, plan_batch
from evermesh.parallelism.cost import Sharing
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.pieces import share_of
from evermesh.parallelism.pipeline.simulator import timeline_of
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.simulator import (
    Lost,
    Scenario,
    SlowLink,
    SlowRank,
    Synchronization,
    chrome_trace,
    micro_batch_s,
    simulate,
    simulate_events,
)
from evermesh.parallelism.simulator.foreign import read_foreign

COST = CostModel(
    token_s=1e-5,
    pair_s=2e-9,
    micro_batch_s=1e-3,
    piece_s=1e-4,
    ring_step_s=1e-4,
    ring_token_s=3e-6,
    network_token_s=9e-6,
)
LAYOUT = Layout(hdp=6, capacity=1500)
Unit = tuple[int, tuple[int, ...]]
"""A sequence and its ring."""


def plan_of(lengths: tuple[int, ...], units: list[list[Unit]], ranks: int) -> BatchPlan:
    """A plan whose micro-batches are given as sequences with their rings, each run by all members."""
    found: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    for unit in units:
        for rank in range(ranks):
            pieces = tuple(
                Piece(sequence, share_of(lengths[sequence], len(ring), ring.index(rank)).ranges(), ring)
                for sequence, ring in unit
                if rank in ring
            )
            if pieces:
                found[rank].append(MicroBatch(pieces))
    return BatchPlan(lengths, 10**9, tuple(map(tuple, found)), Certificate(1.0, 1.0, "nothing"), "by hand", 0, 0)


def random_plan(draw: random.Random, ranks: int = 6) -> BatchPlan:
    """Rings of any size and packs in any order; a micro-batch may hold pieces of several rings."""
    lengths: list[int] = []
    units: list[list[Unit]] = []
    for _ in range(draw.randint(4, 14)):
        size = draw.choice([1, 1, 2, 3, ranks])
        members = tuple(draw.sample(range(ranks), size))
        unit = []
        for _ in range(draw.randint(1, 3)):
            unit.append((len(lengths), members if draw.random() < 0.7 else members[:1]))
            lengths.append(draw.randint(50, 3000))
        units.append(unit)
    return plan_of(tuple(lengths), units, ranks)


@pytest.mark.parametrize("seed", range(20))
def test_when_nothing_is_slow_the_spans_are_those_of_the_aggregate_model(seed: int) -> None:
    draw = random.Random(seed)
    lengths = tuple(draw.randint(10, 8000) for _ in range(draw.randint(1, 25)))
    for plan in (random_plan(draw), plan_batch(lengths, LAYOUT, COST)):
        found = simulate_events(plan, LAYOUT, COST, Scenario(Pool.of(6))).timeline
        assert [dataclasses.replace(span, waited_s=0.0) for span in found.spans] == list(simulate(plan, COST).spans)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(hdp=4, capacity=1500, pp=2),
        Layout(hdp=4, capacity=1500, pp=4, activations="recompute"),
        Layout(hdp=2, capacity=2000, pp=4, schedule="zero-bubble"),
        Layout(hdp=3, capacity=1500, pp=2, schedule="zero-bubble-v", virtual_stages=2),
        Layout(hdp=4, capacity=1500, pp=2, schedule="interleaved-1f1b", virtual_stages=3, ep=2),
        Layout(hdp=4, capacity=1500, ep=4),
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", range(4))
def test_when_nothing_is_slow_pipelines_and_experts_are_as_their_own_simulator_says(layout: Layout, seed: int) -> None:
    draw = random.Random(seed)
    plan = plan_batch(tuple(draw.randint(10, 3500) for _ in range(draw.randint(2, 20))), layout, COST)
    found = simulate_events(plan, layout, COST, Scenario(Pool.of(layout.hdp))).timeline
    expected = timeline_of(plan, layout, COST)
    assert found.labels == expected.labels
    plain = [dataclasses.replace(span, waited_s=0.0) for span in found.spans]
    assert sorted(plain, key=repr) == sorted(expected.spans, key=repr)


def _end_by_integration(start: float, work: float, rank: int, scenario: Scenario) -> float:
    """When ``work`` is done, adding up speed from change to change."""
    changes = sorted(
        {start, *(slow.from_s for slow in scenario.slow_ranks if slow.rank == rank and slow.from_s > start)}
    )
    for begin, end in zip(changes, [*changes[1:], float("inf")], strict=True):
        speed = scenario.pool.speeds[rank]
        for slow in scenario.slow_ranks:
            speed *= slow.factor if slow.rank == rank and slow.from_s <= begin else 1.0
        if begin + work / speed <= end:
            return begin + work / speed
        work -= (end - begin) * speed
    raise AssertionError


def _ends_by_definition(plan: BatchPlan, scenario: Scenario) -> dict[tuple[int, int], float]:
    """When every micro-batch ends: it and those that rings join it to begin when all before them have ended."""
    holders: dict[int, set[tuple[int, int]]] = {}
    for rank, micro_batches in enumerate(plan.ranks):
        for index, micro_batch in enumerate(micro_batches):
            for piece in micro_batch.pieces:
                holders.setdefault(piece.sequence, set()).add((rank, index))

    def joined(place: tuple[int, int]) -> set[tuple[int, int]]:
        found, more = {place}, [place]
        while more:
            rank, index = more.pop()
            for piece in plan.ranks[rank][index].pieces:
                more += holders[piece.sequence] - found
                found |= holders[piece.sequence]
        return found

    @cache
    def end(place: tuple[int, int]) -> float:
        together = joined(place)
        start = max(end((rank, index - 1)) if index else 0.0 for rank, index in together)
        works = {
            (rank, index): micro_batch_s(plan.ranks[rank][index], plan.lengths, COST, scenario.pool)
            for rank, index in together
        }
        stop = max(_end_by_integration(start, work, rank, scenario) for (rank, _), work in works.items())
        lost_s = min(
            (lost.at_s for lost in scenario.lost for rank, _ in together if rank == lost.rank), default=float("inf")
        )
        return stop if stop <= lost_s else float("inf")

    return {(rank, index): end((rank, index)) for rank, mbs in enumerate(plan.ranks) for index in range(len(mbs))}


@pytest.mark.parametrize("seed", range(30))
def test_slow_and_lost_ranks_end_what_they_can_when_the_definition_says(seed: int) -> None:
    draw = random.Random(seed)
    plan = random_plan(draw)
    makespan = simulate(plan, COST).makespan_s
    speeds = [draw.choice([1.0, 1.0, 0.7, 1.2]) for _ in range(6)]
    slow = tuple(SlowRank(draw.randrange(6), draw.choice([0.5, 0.3, 1.5]), draw.random() * makespan) for _ in range(3))
    lost = tuple(Lost(rank, draw.random() * makespan) for rank in draw.sample(range(6), seed % 3))
    scenario = Scenario(Pool.of(6, 2, speeds), slow, lost=lost)
    expected = _ends_by_definition(plan, scenario)
    outcome = simulate_events(plan, LAYOUT, COST, scenario)
    ended = {(s.rank, s.micro_batch): s.stop_s for s in outcome.timeline.spans if not s.is_cut_off}
    assert ended == pytest.approx({place: stop for place, stop in expected.items() if stop < float("inf")}, rel=1e-12)
    undone = [plan.ranks[rank][index].num_tokens for (rank, index), stop in expected.items() if stop == float("inf")]
    assert (outcome.undone_micro_batches, outcome.undone_tokens) == (len(undone), sum(undone))
    assert (outcome.step_s is None) == bool(outcome.lost)
    assert {blocked.rank for blocked in outcome.blocked} == (
        set(range(6)) - set(outcome.lost) if outcome.lost else set()
    )
    for blocked in outcome.blocked:
        assert blocked.root in outcome.lost


def test_ranks_that_are_blocked_name_whom_they_wait_for_and_who_is_behind_it() -> None:
    plan = plan_of((1000, 1000, 3000, 500), [[(0, (0, 1))], [(1, (1, 2))], [(2, (3,))], [(3, (2,))]], 4)
    end = simulate(plan, COST).spans[0].stop_s
    outcome = simulate_events(plan, LAYOUT, COST, Scenario(Pool.of(4), lost=(Lost(0, end / 2),)))
    found = [(blocked.rank, blocked.micro_batch, blocked.for_rank, blocked.root) for blocked in outcome.blocked]
    assert found == [(1, 0, 0, 0), (2, 0, 1, 0), (3, None, 0, 0)]
    assert [b.since_s for b in outcome.blocked] == [end / 2, 0.0, outcome.timeline.makespan_s]
    assert outcome.undone_tokens == 1000 + 1000 + 500


def test_a_rank_that_is_lost_behind_the_step_changes_nothing_and_one_lost_while_gradients_are_summed_does() -> None:
    plan = plan_of((1000, 900), [[(0, (0,))], [(1, (1,))]], 2)
    synchronization = Synchronization(num_bytes=1e6, bytes_per_s=1e8, step_s=1e-3)
    seconds = synchronization.seconds(2)
    assert seconds == pytest.approx(2 * 0.5 * 1e6 / 1e8 + 2e-3)
    clean = simulate_events(plan, LAYOUT, COST, Scenario(Pool.of(2), synchronization=synchronization))
    assert clean.step_s == clean.timeline.makespan_s + seconds
    for at_s, lost in ((clean.step_s + 1e-6, ()), (clean.step_s - 1e-6, (1,))):
        scenario = Scenario(Pool.of(2), lost=(Lost(1, at_s),), synchronization=synchronization)
        outcome = simulate_events(plan, LAYOUT, COST, scenario)
        assert outcome.lost == lost
        assert outcome.undone_micro_batches == 0


def test_a_slow_link_makes_every_step_of_its_ring_wait_and_no_other_ring() -> None:
    plan = plan_of((4000, 4000), [[(0, (0, 1, 2))], [(1, (3, 4, 5))]], 6)
    cost = COST.model_copy(update={"micro_batch_s": 0.0})
    parts = cost.parts(4000, Sharing(3))
    scenario = Scenario(Pool.of(6), slow_links=(SlowLink(1, 0, 0.1),))
    passed = 10 * parts.passed
    assert passed > parts.attention
    expected = parts.products + passed + parts.steps
    for layers in (None, 1, 16):
        found = simulate_events(plan, LAYOUT, cost, dataclasses.replace(scenario, layers=layers)).timeline
        assert [span.stop_s for span in found.spans[:3]] == pytest.approx(
            [expected] * 3, rel=0.02 if layers == 16 else 0.2
        )
        assert max(span.stop_s for span in found.spans[:3]) == pytest.approx(expected)
        assert [span.stop_s for span in found.spans[3:]] == pytest.approx([parts.seconds] * 3)
    # blocks travel down the ring: the other direction carries nothing
    other = Scenario(Pool.of(6), slow_links=(SlowLink(0, 1, 0.1),))
    assert simulate_events(plan, LAYOUT, cost, other).timeline.makespan_s == pytest.approx(parts.seconds)


def _ring_by_definition(
    begins: list[float], compute: list[float], link: list[float], step: float, steps: int
) -> list[float]:
    """Member i begins step k + 1 when it has computed step k, has received a block and has sent one; times of all members.

    A block travels when its sender has begun the step and its receiver has.
    """
    size = len(begins)

    @cache
    def begin(i: int, k: int) -> float:
        if k == 0:
            return begins[i]
        return max(begin(i, k - 1) + compute[i], arrives(i, k - 1), arrives((i - 1) % size, k - 1)) + step

    @cache
    def arrives(i: int, k: int) -> float:
        return max(begin(i, k), begin((i + 1) % size, k)) + link[i]

    return [begin(i, steps) for i in range(size)]


def test_the_steps_of_a_ring_are_those_of_the_recursion() -> None:
    draw = random.Random(0)
    for _ in range(20):
        size = draw.randint(2, 7)
        lengths = (draw.randint(2000, 9000), *(draw.randint(1, 3000) for _ in range(size)))
        ring = tuple(draw.sample(range(size), size))
        units: list[list[Unit]] = [[(1 + rank, (rank,))] for rank in range(size)]
        plan = plan_of(lengths, [*units, [(0, ring)]], size)
        speeds = [draw.choice([1.0, 0.8]) for _ in range(size)]
        pairs = [(ring[(i + 1) % size], ring[i]) for i in range(size)]
        factors = [draw.choice([1.0, 0.2]) for _ in range(size)]
        links = tuple(SlowLink(*pair, factor) for pair, factor in zip(pairs, factors, strict=True))
        cost = COST.model_copy(update={"micro_batch_s": 0.0, "ring_step_s": 0.0})
        # half a layer: one pass, whose products come first
        layout = Layout(hdp=size, capacity=9000)
        found = simulate_events(plan, layout, cost, Scenario(Pool.of(size, None, speeds), slow_links=links, layers=1))
        parts = cost.parts(lengths[0], Sharing(size))
        clock = [cost.whole_s(lengths[1 + rank]) / speeds[rank] for rank in ring]
        for _ in range(2):
            clock = _ring_by_definition(
                [at_s + parts.products / 2 / speeds[rank] for at_s, rank in zip(clock, ring, strict=True)],
                [parts.attention / 2 / (size - 1) / speeds[rank] for rank in ring],
                [
                    parts.passed / 2 / (size - 1) / factor / speeds[rank]
                    for factor, rank in zip(factors, ring, strict=True)
                ],
                0.0,
                size - 1,
            )
        stops = {span.rank: span.stop_s for span in found.timeline.spans if span.ring_size == size}
        assert [stops[rank] for rank in ring] == pytest.approx(clock, rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_with_more_layers_the_steps_of_rings_come_to_what_the_aggregate_model_says(seed: int) -> None:
    plan = random_plan(random.Random(seed))
    limit = simulate(plan, COST).makespan_s
    errors = []
    for layers in (2, 16, 256):
        outcome = simulate_events(plan, LAYOUT, COST, Scenario(Pool.of(6), layers=layers))
        errors.append(abs(outcome.timeline.makespan_s - limit) / limit)
    assert errors[2] < 0.01
    assert errors[2] <= errors[0] + 1e-12


@pytest.mark.parametrize(("heads", "gathers"), [(1, False), (2, False), (4, False), (2, True), (1, True)])
def test_members_that_begin_together_take_what_the_cost_model_says_in_every_scheme(heads: int, gathers: bool) -> None:
    cost = COST.model_copy(update={"head_token_s": 2e-6})
    ring = (0, 1, 2, 3)
    piece = MicroBatch((Piece(0, ((0, 1000),), ring, heads, gathers),))
    plan = BatchPlan((4000,), 1000, ((piece,),) * 4, Certificate(1.0, 1.0, "nothing"), "by hand", 0, 0)
    expected = cost.micro_batch_s + cost.shared_s(4000, Sharing(4, heads, gathers, True))
    for layers in (None, 3):
        found = simulate_events(plan, Layout(hdp=4, capacity=1000), cost, Scenario(Pool.of(4, 2), layers=layers))
        assert [span.stop_s for span in found.timeline.spans] == pytest.approx([expected] * 4, rel=1e-12)


@pytest.mark.parametrize(
    "layout", [LAYOUT, Layout(hdp=6, capacity=1500, pp=3), Layout(hdp=6, capacity=1500, ep=3)], ids=str
)
def test_work_and_waits_fill_the_time_of_every_rank(layout: Layout) -> None:
    plan = plan_batch((7000, 2500, 2400, 900, 900, 700, 100), layout, COST)
    slow = (SlowRank(1, 0.6), SlowRank(4, 0.5, 0.01))
    for layers in (None, 4):
        timeline = simulate_events(plan, layout, COST, Scenario(Pool.of(6, 3), slow, layers=layers)).timeline
        for rank in range(len(timeline.labels)):
            slices = [(s.start_s, s.stop_s) for s in timeline.spans if s.rank == rank]
            slices += [(w.start_s, w.stop_s) for w in timeline.waits if w.rank == rank]
            slices.sort()
            assert slices[0][0] == 0.0
            assert slices[-1][1] == timeline.makespan_s
            assert all(stop == start for (_, stop), (start, _) in itertools.pairwise(slices))
        waited = sum(timeline.waited_s().values())
        assert sum(timeline.busy_s()) + waited == pytest.approx(timeline.makespan_s * len(timeline.labels))
        causes = {wait.cause for wait in timeline.waits}
        assert ("pipeline" in causes) == (layout.pp > 1)
        assert "lock-step" not in causes or layout.ep > 1


def test_plans_that_cannot_run_and_scenarios_that_cannot_be_are_refused() -> None:
    circle = plan_of((1000, 1000), [[(0, (0, 1))], [(1, (0, 1))]], 2)
    ranks = (circle.ranks[0], circle.ranks[1][::-1])
    with pytest.raises(PlanInvalid, match="wait for each other in a circle"):
        simulate_events(dataclasses.replace(circle, ranks=ranks), LAYOUT, COST, Scenario(Pool.of(2)))
    with pytest.raises(PlanInvalid, match="has 2 ranks, but 1 micro-batches hold it"):
        simulate_events(dataclasses.replace(circle, ranks=(circle.ranks[0], ())), LAYOUT, COST, Scenario(Pool.of(2)))
    with pytest.raises(PlanInvalid, match="2 HDP ranks on a pool of 3"):
        simulate_events(circle, LAYOUT, COST, Scenario(Pool.of(3)))
    with pytest.raises(LayoutDoesNotFit, match="no rank 2 among 2 HDP ranks"):
        Scenario(Pool.of(2), lost=(Lost(2, 0.0),))
    with pytest.raises(LayoutDoesNotFit, match="give a positive number"):
        Scenario(Pool.of(2), slow_links=(SlowLink(0, 1, 0.0),))
    with pytest.raises(LayoutDoesNotFit, match="give 0 or more seconds"):
        Scenario(Pool.of(2), lost=(Lost(0, -1.0),))


def large_plan(ranks: int, capacity: int, draw: random.Random) -> BatchPlan:
    """Long-tailed sequences on blocks of neighbours, dealt out shelf by shelf: a plan of realistic shape, made fast."""
    lengths = sorted(
        int(min(2**21, 2 ** draw.uniform(8, 15) + draw.paretovariate(0.8) * 500)) for _ in range(3 * ranks)
    )
    found: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    first = 0
    for sequence in reversed(range(len(lengths))):
        size = -(-lengths[sequence] // capacity)
        first = first if first + size <= ranks else 0
        ring = tuple(range(first, first + size))
        for index, rank in enumerate(ring):
            found[rank].append(MicroBatch((Piece(sequence, share_of(lengths[sequence], size, index).ranges(), ring),)))
        first = (first + size) % ranks
    return BatchPlan(tuple(lengths), capacity, tuple(map(tuple, found)), Certificate(1.0, 1.0, "nothing"), "x", 0, 0)


def test_twelve_thousand_ranks_are_replayed_in_seconds() -> None:
    plan = large_plan(12_288, 8192, random.Random(0))
    scenario = Scenario(Pool.of(12_288, 8), (SlowRank(77, 0.7),), (SlowLink(9, 8, 0.5),))
    started = time.process_time()
    outcome = simulate_events(plan, Layout(hdp=12_288, capacity=8192), COST, scenario)
    seconds = time.process_time() - started
    print(f"{len(outcome.timeline.spans):,} micro-batches on 12,288 ranks: {seconds:.1f} s")
    assert seconds < 20


def test_the_same_plan_and_scenario_give_the_same_timeline_whatever_was_replayed_before() -> None:
    plan = large_plan(512, 8192, random.Random(0))
    scenario = Scenario(Pool.of(512, 8), (SlowRank(77, 0.7),), (SlowLink(9, 8, 0.5),), (Lost(3, 0.2),))
    first, second = (simulate_events(plan, Layout(hdp=512, capacity=8192), COST, scenario) for _ in range(2))
    assert first == second
    assert first.lost == (3,)


def test_the_trace_has_a_process_per_node_a_thread_per_rank_and_a_slice_per_micro_batch_and_wait() -> None:
    plan = plan_batch((7000, 2500, 2400, 900, 900, 700, 100), LAYOUT, COST)
    timeline = simulate_events(plan, LAYOUT, COST, Scenario(Pool.of(6, 4), (SlowRank(1, 0.6),))).timeline
    trace = json.loads(chrome_trace(timeline))
    assert set(trace) == {"traceEvents", "displayTimeUnit"}
    names = {(e["name"], e["pid"], e["tid"]): e["args"] for e in trace["traceEvents"] if e["ph"] == "M"}
    assert {name["name"] for (kind, _, _), name in names.items() if kind == "process_name"} == {"node 0", "node 1"}
    threads = {(pid, tid): name["name"] for (kind, pid, tid), name in names.items() if kind == "thread_name"}
    assert threads == {(1 + rank // 4, 1 + rank): f"rank {rank}" for rank in range(6)}
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(slices) + len(names) == len(trace["traceEvents"])
    for event in slices:
        assert isinstance(event["name"], str)
        assert isinstance(event["cat"], str)
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert (event["pid"], event["tid"]) in threads
    work = [event for event in slices if event["cat"] == "work"]
    assert sum(event["args"]["tokens"] for event in work) == plan.num_tokens
    assert sum(event["dur"] for event in work) == pytest.approx(1e6 * sum(timeline.busy_s()))
    waits = sum(event["dur"] for event in slices if event["cat"] == "wait")
    assert waits == pytest.approx(1e6 * sum(timeline.waited_s().values()))
    by_rank: dict[int, list[tuple[float, float]]] = {}
    for event in slices:
        by_rank.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for of_rank in by_rank.values():  # a viewer would nest slices that overlap
        of_rank.sort()
        assert all(start >= stop - 1e-3 for (_, stop), (start, _) in itertools.pairwise(of_rank))


def foreign_of(plan: BatchPlan) -> dict[str, object]:
    """A plan in the format for plans of other systems."""
    ranks = [
        [
            {"pieces": [{"sequence": p.sequence, "tokens": p.num_tokens, "ring": p.ring} for p in micro_batch.pieces]}
            for micro_batch in micro_batches
        ]
        for micro_batches in plan.ranks
    ]
    return {"format": "evermesh-replay-1", "system": "theirs", "ranks": ranks}


def test_a_plan_of_another_system_is_replayed_as_ours_is() -> None:
    plan = plan_batch((7000, 2500, 2400, 900, 900, 700, 100), LAYOUT, COST)
    foreign = read_foreign(json.dumps(foreign_of(plan)))
    assert (foreign.lengths, foreign.planner) == (plan.lengths, "theirs")
    assert simulate(foreign, COST) == simulate(plan, COST)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([[{"pieces": [{"sequence": 0, "tokens": 0}]}]], "ranks.0.0.pieces.0.tokens: Input should be greater than 0"),
        ([[{"pieces": [{"sequence": 1, "tokens": 5}]}]], "sequence 0 is nowhere"),
        (
            [[{"pieces": [{"sequence": 0, "tokens": 5, "ring": [0, 1]}]}], []],
            "rank 1 is in its ring, but holds no piece",
        ),
        ([[{"pieces": [{"sequence": 0, "tokens": 5}] * 2}]], "on rank 0 twice"),
        (
            [[{"pieces": [{"sequence": 0, "tokens": tokens, "ring": [0, 1]}]}] for tokens in (90, 10)],
            "a member holds 90 tokens, its even share is 50",
        ),
        ([[{"pieces": [{"sequence": 0, "tokens": 5, "ring": [0, 0]}]}]], "all members name one"),
    ],
)
def test_what_is_wrong_with_a_plan_of_another_system_is_named(ranks: object, message: str) -> None:
    with pytest.raises(PlanInvalid, match=message):
        read_foreign(json.dumps({"format": "evermesh-replay-1", "ranks": ranks}))

"""Links, the byte ledger and the formula of a plan's traffic, against totals from the literature and counting by hand."""

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evermesh.parallelism import ByteLedger, CollectiveRecord, Communicator, Layout, Moment, plan_batch
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.ledger import Traffic, add_up
from evermesh.parallelism.links import Operation, Tier, tiers_from, wire_bytes
from evermesh.parallelism.tiers_traffic import SetSizes
from evermesh.parallelism.traffic import StageSizes, TensorCalls, TrainedModel, plan_traffic, tensor_traffic
from tests.cluster import run_ranks

COST = CostModel(token_s=1e-5, pair_s=1e-7, micro_batch_s=1e-4)
HIDDEN, LAYERS, KEY_VALUE_ELEMENTS = 32, 3, 2 * 2 * 8


def _model(layout: Layout, num_parameters: int, bytes_per_element: int) -> TrainedModel:
    calls = TensorCalls(2 * LAYERS + 1, 2 * LAYERS + 1, 2 * LAYERS, LAYERS)
    padded = -(-num_parameters // layout.hdp) * layout.hdp
    stage = StageSizes(LAYERS, calls, has_head=True, sets=(SetSizes(padded),))
    return TrainedModel(layout, HIDDEN, KEY_VALUE_ELEMENTS, bytes_per_element, (stage,))


@given(payload=st.integers(0, 10**6), ranks=st.integers(1, 40))
def test_the_shares_of_all_ranks_add_up_exactly_and_differ_by_one_byte(payload: int, ranks: int) -> None:
    totals: dict[Operation, int] = {
        "all_reduce": 2 * (ranks - 1) * payload,
        "all_gather": ranks * (ranks - 1) * payload,
        "reduce_scatter": (ranks - 1) * payload,
        "broadcast": (ranks - 1) * payload,
        "barrier": 0,
    }
    shares = {op: [wire_bytes(op, payload, ranks, position) for position in range(ranks)] for op in totals}
    assert {op: sum(share) for op, share in shares.items()} == totals
    for operation in ("all_reduce", "reduce_scatter"):
        assert max(shares[operation]) - min(shares[operation]) <= 1


def test_a_link_has_the_tier_of_its_ends() -> None:
    assert tiers_from(1, (0, 0, 1, 1)) == ("node", "local", "network", "network")


def _record(call_site: str, operation: Operation, num_bytes: int, step: int, tier: Tier = "node") -> CollectiveRecord:
    return CollectiveRecord("g", 0, operation, num_bytes, "", (), call_site, step, "train", 0.0, "hdp", tier, 1)


def test_the_ledger_keeps_steps_and_tiers_apart_and_counts_a_message_once() -> None:
    ledger = ByteLedger()
    for record in (
        _record("ring", "send", 8, step=1),
        _record("ring", "receive", 8, step=1),
        _record("ring", "send", 5, step=1),
        _record("ring", "send", 7, step=1, tier="network"),
        _record("ring", "send", 100, step=2),
    ):
        ledger(record)
    assert ledger.take_step(1) == (
        Traffic("ring", "send", "hdp", "network", 7, 1, 1),
        Traffic("ring", "send", "hdp", "node", 13, 2, 2),
    )
    assert ledger.take() == {"ring": 100}
    assert ledger.take() == {}


def test_the_ledger_forgets_what_is_older_than_the_step_that_is_taken() -> None:
    ledger = ByteLedger()
    for step in (1, 2, 3):
        ledger(_record("ring", "send", 8, step=step))
    assert ledger.take_step(2)
    assert ledger.take() == {"ring": 8}


def _all_operations(rank: int, world_size: int, nodes: tuple[int, ...]) -> tuple[Traffic, ...]:
    import torch.distributed as dist

    communicator = Communicator(dist.group.WORLD, axis="hdp", nodes=nodes, moment=Moment(step=1, phase="train"))
    ledger = ByteLedger()
    with communicator.listen(ledger):
        communicator.all_reduce(torch.zeros(3, dtype=torch.uint8), "s")
        communicator.all_gather(torch.zeros(5 * world_size), torch.zeros(5), "s")
        communicator.reduce_scatter(torch.zeros(5), torch.zeros(5 * world_size), "s")
        communicator.broadcast(torch.zeros(7), 2, "s")
        rows, sent = [0, 1, 2, 3], [rank] * world_size  # every rank sends as many rows to each as its number
        output = torch.zeros(sum(rows), 3)
        communicator.all_to_all(output, torch.full((4 * rank, 3), float(rank)), "s", sent_rows=sent, received_rows=rows)
        assert output[:, 0].tolist() == [1, 2, 2, 3, 3, 3]
        communicator.barrier("s")
        to, source = (rank + 2) % world_size, (rank - 2) % world_size
        for work in communicator.exchange([(torch.zeros(9), to)], [(torch.zeros(9), source)], "s"):
            work.wait()
    return ledger.take_step(1)


def test_every_operation_of_real_ranks_is_counted_on_the_link_that_it_takes() -> None:
    ledgers = run_ranks(4, _all_operations, (0, 0, 1, 1))
    # in the ring 0-1-2-3, links 1 and 3 leave the node; a broadcast from 2 goes 2-3-0-1; messages go to the other node
    assert add_up(part for ledger in ledgers for part in ledger) == (
        Traffic("s", "all_gather", "hdp", "network", 2 * 20, 2 * 3 * 20, 2),
        Traffic("s", "all_gather", "hdp", "node", 2 * 20, 2 * 3 * 20, 2),
        Traffic("s", "all_reduce", "hdp", "network", 6, 5 + 5, 2),  # 2 x 3 x 3 = 18 bytes as 4, 5, 4, 5
        Traffic("s", "all_reduce", "hdp", "node", 6, 4 + 4, 2),
        Traffic("s", "all_to_all", "hdp", "network", 6 * 2 * 12, 6 * 2 * 12, 4),  # rows of 12 bytes, to two ranks
        Traffic("s", "all_to_all", "hdp", "node", 6 * 12, 6 * 12, 4),
        Traffic("s", "barrier", "hdp", "network", 0, 0, 2),
        Traffic("s", "barrier", "hdp", "node", 0, 0, 2),
        Traffic("s", "broadcast", "hdp", "network", 2 * 28, 28, 2),
        Traffic("s", "broadcast", "hdp", "node", 2 * 28, 2 * 28, 2),
        Traffic("s", "reduce_scatter", "hdp", "network", 2 * 80, 2 * 60, 2),
        Traffic("s", "reduce_scatter", "hdp", "node", 2 * 80, 2 * 60, 2),
        Traffic("s", "send", "hdp", "network", 4 * 36, 4 * 36, 4),
    )


def _totals(parts: list[Traffic]) -> Counter[tuple[str, str]]:
    totals: Counter[tuple[str, str]] = Counter()
    for part in parts:
        totals[part.call_site, "payload"] += part.payload_bytes
        totals[part.call_site, "wire"] += part.wire_bytes
        totals[part.call_site, "calls"] += part.calls
    return totals


@settings(deadline=None)  # the first plan of a process loads the planner
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=8),
    nodes=st.lists(st.integers(0, 3), min_size=1, max_size=6),
)
def test_where_the_ranks_live_changes_the_tiers_but_no_sum(lengths: list[int], nodes: list[int]) -> None:
    layout = Layout(hdp=len(nodes), capacity=400)
    plan, model = plan_batch(lengths, layout, COST), _model(layout, 1001, 4)
    spread = plan_traffic(plan, model, nodes)
    assert _totals(spread) == _totals(plan_traffic(plan, model, [0] * len(nodes)))
    assert all(part.wire_bytes == 0 for part in spread if part.tier == "local")


@pytest.mark.parametrize("ring", [2, 3, 5])
def test_a_ring_sends_three_quarters_of_a_full_one_and_gradients_once(ring: int) -> None:
    length = 2 * ring * 50  # all chunks alike
    layout = Layout(hdp=ring, capacity=100)
    plan = plan_batch([length], layout, COST)
    assert plan.ring_sizes() == {ring: 1}
    sent = _totals(plan_traffic(plan, _model(layout, 1, 2), [0] * ring))
    one_round = LAYERS * length * KEY_VALUE_ELEMENTS * 2
    assert sent["ring forward", "wire"] == sent["ring backward", "wire"] == (ring - 1) * one_round * 3 // 4
    # in float32, twice as wide; the first owner's tail, one of 2d chunks, stays at home
    assert sent["ring gradients", "wire"] * 2 * ring == 2 * (ring - 1) * one_round * (2 * ring - 1)


def test_a_layer_shared_by_ranks_gathers_twice_and_scatters_twice_each_way() -> None:
    """Korthikanti et al. (arXiv 2205.05198, section 4.2.2): 4 all-gathers and 4 reduce-scatters per layer."""
    model, tokens, tp = _model(Layout(tp=4), 1, 2), 10, 4
    stage = model.stages[0]
    sent = _totals([*tensor_traffic(tokens, model, stage, [0] * tp)])
    one_way = (tp - 1) * 12 * HIDDEN * 2  # 12 tokens after padding; all ranks together
    for call_site in ("tensor forward", "tensor backward"):
        assert sent[call_site, "wire"] == (4 * LAYERS + 2) * one_way
    assert sent["loss", "wire"] == 2 * (tp - 1) * 3 * tokens * 4  # three float32 numbers per token
    again = _totals([*tensor_traffic(tokens, model, stage, [0] * tp, recomputed=True)])
    assert again["tensor forward", "wire"] == (7 * LAYERS + 2) * one_way
    assert again["tensor backward", "wire"] == sent["tensor backward", "wire"]
    assert _totals([*tensor_traffic(0, model, stage, [0] * tp)]) == {}

"""What rank 0 says of a plan is what its pieces are, one by one."""

import pytest

from evermesh.launcher.agent.expecting import planned
from evermesh.launcher.watching.messages import PlannedStep
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner import plan_batch
from evermesh.parallelism.simulator import micro_batch_s

_COST = CostModel(token_s=1e-5, pair_s=1e-8, micro_batch_s=1e-4, ring_step_s=1e-5, ring_token_s=1e-9)


def test_what_a_plan_gives_every_rank_is_told_as_its_pieces_say() -> None:
    lengths = (900, 700, 130, 100, 90, 60, 40, 40, 30, 20, 10, 10)
    plan = plan_batch(lengths, Layout(hdp=4, capacity=256), _COST)
    told = PlannedStep.model_validate(planned(plan, _COST))
    ranks = [list(of_rank) for of_rank in plan.ranks]
    shared = [[any(len(piece.ring) > 1 for piece in one.pieces) for one in of_rank] for of_rank in ranks]
    assert list(told.micro_batches) == [len(of_rank) for of_rank in ranks]
    assert list(told.rings) == [sum(of_rank) for of_rank in shared]
    assert sum(told.rings) > 0
    assert list(told.tokens) == pytest.approx([sum(one.num_tokens for one in of_rank) for of_rank in ranks], abs=2)
    alone_s = [
        sum(
            micro_batch_s(one, lengths, _COST)
            for one, is_shared in zip(of_rank, of_shared, strict=True)
            if not is_shared
        )
        for of_rank, of_shared in zip(ranks, shared, strict=True)
    ]
    assert list(told.alone_s) == pytest.approx(alone_s)
    all_s = [sum(micro_batch_s(one, lengths, _COST) for one in of_rank) for of_rank in ranks]
    assert [sum(pair) for pair in zip(told.alone_s, told.in_rings_s, strict=True)] == pytest.approx(all_s, rel=0.05)
    assert told.makespan_s == plan.certificate.makespan_s

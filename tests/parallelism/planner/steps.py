"""How long a step of ranks that keep step takes."""

from collections.abc import Sequence

from evermesh.parallelism import CostModel, Layout
from evermesh.parallelism.pipeline.simulator import replay, run_together, stage_seconds
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import Assignment
from evermesh.parallelism.simulator import micro_batch_s


def lock_step_s(assignment: Assignment, lengths: Sequence[int], layout: Layout, cost: CostModel, pool: Pool) -> float:
    """Seconds until the last rank of a plan in waves is done, with the links and speeds of a pool; without pipeline."""
    seconds = [
        [[stage_seconds(micro_batch_s(one, lengths, cost, pool) / pool.speeds[rank], one)] for one in micro_batches]
        for rank, micro_batches in enumerate(assignment)
    ]
    return replay(layout.pipeline, seconds, run_together(assignment, layout)).makespan_s

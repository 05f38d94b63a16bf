"""What a batch plan expects of ranks, so that imbalance that was planned is nobody's fault."""

from collections.abc import Mapping, Sequence

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.cost import CostModel


def planned_work(
    plan: BatchPlan, cost: CostModel, step: int, ranks_of: Mapping[int, Sequence[int]]
) -> dict[tuple[int, int], float]:
    """For ``Context.work_s``: seconds that every rank computes in ``step``, at speed 1 and without waiting, by rank and step.

    ``ranks_of``: global ranks of every HDP rank, such as its tensor-parallel group in every stage. Ranks without work are
    left out: they are compared with nobody in that step.
    """
    from evermesh.parallelism.simulator import micro_batch_s

    seconds = (sum(micro_batch_s(one, plan.lengths, cost) for one in micro_batches) for micro_batches in plan.ranks)
    return {(rank, step): of for hdp, of in enumerate(seconds) if of > 0 for rank in ranks_of.get(hdp, ())}

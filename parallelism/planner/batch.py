"""Plans a batch, whatever its layout, and bounds what any plan of it can reach."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from evermesh.parallelism.batch_plan import BatchPlan, Certificate, MicroBatch
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner.bound import LowerBound, check_lengths, lower_bound
from evermesh.parallelism.planner.effort import effort_of
from evermesh.parallelism.planner.hybrid import plan_rings
from evermesh.parallelism.planner.lock_step import lock_step_bound, plan_lock_step
from evermesh.parallelism.planner.pipelines import pipeline_bound, pipelines_s, plan_pipelines_s
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.rank_work import PackedRanks


class Planner(Protocol):
    """Anything that turns the lengths of a batch into a plan; a pure function of them."""

    def plan(self, lengths: Sequence[int]) -> BatchPlan:
        """The plan of a batch with sequences of these lengths (tokens, at least 1)."""
        ...


def plan_batch(
    lengths: Sequence[int],
    layout: Layout,
    cost_model: CostModel,
    *,
    pool: Pool | None = None,
    speeds_version: int = 0,
    effort: float | None = None,
) -> BatchPlan:
    """Plan one batch on the ranks of ``pool`` (None: ``layout.hdp`` equal ranks on one node).

    Three planners share the work: for pipelines, for ranks that keep step with others, and for ranks that do neither.

    Args:
        lengths: tokens of every sequence, each at least 1.
        layout: degrees and the capacity of a micro-batch.
        cost_model: seconds per token, pair, micro-batch and ring step.
        pool: nodes and speeds of the HDP ranks, each of them a whole pipeline where ``layout.pp`` > 1.
        speeds_version: version of the speeds; recorded in the plan.
        effort: how long to search, as a part of the full search, which takes some 0.05 s on up to 16 ranks; 0: as little
            as can be; None: in proportion to what the step takes, in full from two seconds on (``planner/effort.py``).

    Raises:
        SequenceTooLong: a sequence exceeds the capacity of all ranks together.
        LayoutDoesNotFit: a length is not positive, or the pool has another number of ranks than the layout.
    """
    pool = pool or Pool.of(layout.hdp)
    array = _checked(lengths, layout, pool)
    own = tuple(array.tolist())
    ranks: Sequence[tuple[MicroBatch, ...]]
    if not layout.runs_in_waves:
        ranks, certificate = plan_rings(array, layout, cost_model, pool, effort)
    else:
        bound = bound_for(own, layout, cost_model, pool)
        effort = effort_of(bound.seconds) if effort is None else effort
        if layout.pp > 1:
            assignment, seconds = plan_pipelines_s(own, layout, cost_model, pool, effort)
        else:
            assignment = plan_lock_step(own, layout, cost_model, pool, effort)
            seconds = pipelines_s(assignment, own, layout, cost_model, pool)
        ranks, certificate = PackedRanks.of(assignment, own), Certificate(seconds, bound.seconds, bound.binding)
    return BatchPlan(
        lengths=own,
        capacity=layout.capacity,
        ranks=ranks,
        certificate=certificate,
        planner="hybrid",
        cost_version=cost_model.version,
        speeds_version=speeds_version,
    )


def bound_for(lengths: Sequence[int], layout: Layout, cost_model: CostModel, pool: Pool | None = None) -> LowerBound:
    """A time that no plan of a batch for this layout can beat; raises as ``plan_batch`` does."""
    pool = pool or Pool.of(layout.hdp)
    own = tuple(_checked(lengths, layout, pool).tolist())
    if layout.pp > 1:
        return pipeline_bound(own, layout, cost_model, pool)
    if layout.lock_step_groups:
        return lock_step_bound(own, layout, cost_model, pool)
    return lower_bound(own, layout, cost_model, pool)


def _checked(lengths: Sequence[int], layout: Layout, pool: Pool) -> np.ndarray:
    if len(pool) != layout.hdp:
        raise LayoutDoesNotFit(f"the pool has {len(pool)} ranks, but layout.hdp is {layout.hdp}. Make them equal.")
    array = np.array(lengths, np.int64) if isinstance(lengths, np.ndarray) else np.fromiter(lengths, np.int64)
    if len(array) and array.min() < 1:
        sequence = int(array.argmin())
        raise LayoutDoesNotFit(f"sequence {sequence} has {array[sequence]} tokens; every sequence has at least 1.")
    check_lengths(array, layout, len(pool))
    return array


class HybridPlanner:
    """``plan_batch`` with its layout, cost model and pool bound."""

    def __init__(self, layout: Layout, cost_model: CostModel, pool: Pool | None = None) -> None:
        self.layout, self.cost_model, self.pool = layout, cost_model, pool
        self.speeds_version = 0
        """Raised by whoever changes the speeds of the pool."""

    def plan(self, lengths: Sequence[int]) -> BatchPlan:
        """The plan of a batch; see ``plan_batch``."""
        return plan_batch(lengths, self.layout, self.cost_model, pool=self.pool, speeds_version=self.speeds_version)

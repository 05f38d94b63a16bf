"""Proves a certificate: replays the plan under the cost model on nodes and speeds, and bounds the batch once more."""

import math
from typing import get_args, get_type_hints

from evermesh.parallelism.batch_plan import BatchPlan, Certificate
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.proof.bound import valid_bound_s
from evermesh.parallelism.proof.columns import columns_of
from evermesh.parallelism.proof.durations import micro_batch_seconds
from evermesh.parallelism.proof.replay import replay_free_s, replay_waves_s

_EXACT = 1e-9
"""Relative; the planner counts in ticks of which a step has some 2^50."""
_WORDS = get_args(get_type_hints(Certificate)["binding"])


def check_promise(certificate: Certificate) -> None:
    """Raise ``PlanInvalid`` unless the certificate makes sense by itself."""
    makespan, bound, binding = certificate.makespan_s, certificate.lower_bound_s, certificate.binding
    if not (math.isfinite(makespan) and math.isfinite(bound) and bound >= 0):
        raise PlanInvalid(f"the certificate promises {makespan} s over a lower bound of {bound} s.")
    if makespan < bound * (1 - _EXACT):
        raise PlanInvalid(f"the certificate promises {makespan:.6g} s, less than its lower bound {bound:.6g} s.")
    if binding not in _WORDS:
        raise PlanInvalid(
            f"the certificate says that {binding!r} gives its bound, which is none of {', '.join(_WORDS)}."
        )


def check_certificate(plan: BatchPlan, layout: Layout, cost: CostModel, pool: Pool) -> None:
    """Raise ``PlanInvalid`` unless the certificate of a plan that is right otherwise is what ``cost`` and ``pool`` make it.

    The bound is held between what the verifier knows that no plan can beat, for ranks that hold the whole model and keep
    step with nobody, and what this plan itself achieves.
    """
    certificate, columns = plan.certificate, columns_of(plan)
    if plan.cost_version != cost.version:
        raise PlanInvalid(
            f"the plan was made with cost model {plan.cost_version}, but it is proved with {cost.version}."
        )
    seconds = micro_batch_seconds(columns, cost, pool)
    makespan = replay_waves_s(columns, seconds, layout) if layout.runs_in_waves else replay_free_s(columns, seconds)
    if makespan is None:
        raise PlanInvalid("micro-batches that rings join wait for each other in a circle; the plan cannot be timed.")
    if not math.isclose(certificate.makespan_s, makespan, rel_tol=_EXACT):
        raise PlanInvalid(
            f"the certificate promises {certificate.makespan_s:.12g} s, but the plan takes {makespan:.12g} s."
        )
    if certificate.lower_bound_s > makespan * (1 + _EXACT):
        raise PlanInvalid(
            f"the lower bound {certificate.lower_bound_s:.12g} s is no bound: this plan takes {makespan:.12g} s."
        )
    if (certificate.binding == "nothing") != (makespan == 0):
        raise PlanInvalid(f"{certificate.binding!r} is said to bind a plan of {makespan:.6g} s.")
    least = 0.0 if layout.runs_in_waves else valid_bound_s(columns.lengths, layout, cost, pool)
    if certificate.lower_bound_s < least * (1 - _EXACT):
        raise PlanInvalid(
            f"the lower bound {certificate.lower_bound_s:.12g} s is less than the {least:.12g} s that any plan takes."
        )

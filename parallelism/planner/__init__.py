"""Plans a batch from the lengths of its sequences."""

from evermesh.parallelism.planner.batch import HybridPlanner, Planner, bound_for, plan_batch
from evermesh.parallelism.planner.bound import LowerBound, lower_bound
from evermesh.parallelism.planner.replan import Replanned, replan_batch

__all__ = [
    "HybridPlanner",
    "LowerBound",
    "Planner",
    "Replanned",
    "bound_for",
    "lower_bound",
    "plan_batch",
    "replan_batch",
]

"""Plans a batch from the lengths of its sequences."""

from evermesh.parallelism.planner.batch import HybridPlanner, Planner, bound_for, plan_batch
from evermesh.parallelism.planner.bound import LowerBound, lower_bound

__all__ = ["HybridPlanner", "LowerBound", "Planner", "bound_for", "lower_bound", "plan_batch"]

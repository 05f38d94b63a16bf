"""Plans a batch from the lengths of its sequences."""

from evermesh.parallelism.planner.bound import lower_bound
from evermesh.parallelism.planner.hybrid import HybridPlanner, Planner, plan_batch

__all__ = ["HybridPlanner", "Planner", "lower_bound", "plan_batch"]

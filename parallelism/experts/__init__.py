"""Expert parallelism: the experts of a model shared by ranks, and the tokens that travel to them.

Names that need torch are in the modules; nothing here imports it.
"""

from evermesh.parallelism.experts.placement import HotBudget, HotDecision, Placement, choose_hot
from evermesh.parallelism.experts.sharding import ExpertSharding, GridCut

__all__ = ["ExpertSharding", "GridCut", "HotBudget", "HotDecision", "Placement", "choose_hot"]

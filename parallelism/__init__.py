"""Topology, layouts, batch plans, the cost model, the planner, and what applies parallelism to a model.

Names that need torch or the planner's compiler are imported when they are first used, so that the command line and the
controller start fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from evermesh.parallelism.batch_plan import BatchPlan, Certificate, MicroBatch, Piece
from evermesh.parallelism.collectives import CollectiveRecord, Communicator, Moment
from evermesh.parallelism.cost import CostModel, ModelShape
from evermesh.parallelism.errors import EvermeshError, LayoutDoesNotFit, PlanInvalid, SequenceTooLong
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.ledger import ByteLedger, Traffic
from evermesh.parallelism.pool import Pool
from evermesh.parallelism.simulator import Timeline, simulate
from evermesh.parallelism.topology import Topology
from evermesh.parallelism.verifier import verify_plan

if TYPE_CHECKING:
    from evermesh.parallelism.attention.ring import ring_attention
    from evermesh.parallelism.planner import HybridPlanner, Planner, plan_batch

_LATE = {
    "HybridPlanner": "evermesh.parallelism.planner",
    "Planner": "evermesh.parallelism.planner",
    "plan_batch": "evermesh.parallelism.planner",
    "ring_attention": "evermesh.parallelism.attention.ring",
}
"""Names that are imported when first used, and where from."""

__all__ = [
    "BatchPlan",
    "ByteLedger",
    "Certificate",
    "CollectiveRecord",
    "Communicator",
    "CostModel",
    "EvermeshError",
    "HybridPlanner",
    "Layout",
    "LayoutDoesNotFit",
    "MicroBatch",
    "ModelShape",
    "Moment",
    "Piece",
    "PlanInvalid",
    "Planner",
    "Pool",
    "SequenceTooLong",
    "Timeline",
    "Topology",
    "Traffic",
    "plan_batch",
    "ring_attention",
    "simulate",
    "verify_plan",
]


def __getattr__(name: str) -> Any:
    if name in _LATE:
        return getattr(importlib.import_module(_LATE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

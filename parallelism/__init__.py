"""Topology, layouts, batch plans, the cost model, the planner, and what applies parallelism to a model.

Names that need torch are imported when they are first used, so that the command line and the controller start fast.
"""

from typing import TYPE_CHECKING, Any

from evermesh.parallelism.batch_plan import BatchPlan, Certificate, MicroBatch, Piece
from evermesh.parallelism.collectives import CollectiveRecord, Communicator, Moment
from evermesh.parallelism.cost import CostModel, ModelShape
from evermesh.parallelism.errors import EvermeshError, LayoutDoesNotFit, PlanInvalid, SequenceTooLong
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.ledger import ByteLedger, Traffic
from evermesh.parallelism.planner import HybridPlanner, Planner, plan_batch
from evermesh.parallelism.simulator import Timeline, simulate
from evermesh.parallelism.topology import Topology
from evermesh.parallelism.verifier import verify_plan

if TYPE_CHECKING:
    from evermesh.parallelism.attention.ring import ring_attention

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
    if name == "ring_attention":
        from evermesh.parallelism.attention.ring import ring_attention

        return ring_attention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

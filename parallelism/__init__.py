"""Topology, layouts, batch plans, the cost model, the planner, and what applies parallelism to a model.

Names are imported when they are first used, so that keepers, the command line and the controller start fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evermesh.parallelism.attention.ring import ring_attention
    from evermesh.parallelism.batch_plan import BatchPlan, Certificate, MicroBatch, Piece
    from evermesh.parallelism.collectives import CollectiveRecord, Communicator, Moment
    from evermesh.parallelism.cost import CostModel, ModelShape
    from evermesh.parallelism.errors import EvermeshError, LayoutDoesNotFit, PlanInvalid, SequenceTooLong
    from evermesh.parallelism.layout import Layout
    from evermesh.parallelism.ledger import ByteLedger, Traffic
    from evermesh.parallelism.planner import HybridPlanner, Planner, plan_batch
    from evermesh.parallelism.pool import Pool
    from evermesh.parallelism.simulator import Timeline, simulate
    from evermesh.parallelism.topology import Topology
    from evermesh.parallelism.verifier import verify_plan

_MODULES = {
    "BatchPlan": "evermesh.parallelism.batch_plan",
    "ByteLedger": "evermesh.parallelism.ledger",
    "Certificate": "evermesh.parallelism.batch_plan",
    "CollectiveRecord": "evermesh.parallelism.collectives",
    "Communicator": "evermesh.parallelism.collectives",
    "CostModel": "evermesh.parallelism.cost",
    "EvermeshError": "evermesh.parallelism.errors",
    "HybridPlanner": "evermesh.parallelism.planner",
    "Layout": "evermesh.parallelism.layout",
    "LayoutDoesNotFit": "evermesh.parallelism.errors",
    "MicroBatch": "evermesh.parallelism.batch_plan",
    "ModelShape": "evermesh.parallelism.cost",
    "Moment": "evermesh.parallelism.collectives",
    "Piece": "evermesh.parallelism.batch_plan",
    "PlanInvalid": "evermesh.parallelism.errors",
    "Planner": "evermesh.parallelism.planner",
    "Pool": "evermesh.parallelism.pool",
    "SequenceTooLong": "evermesh.parallelism.errors",
    "Timeline": "evermesh.parallelism.simulator",
    "Topology": "evermesh.parallelism.topology",
    "Traffic": "evermesh.parallelism.ledger",
    "plan_batch": "evermesh.parallelism.planner",
    "ring_attention": "evermesh.parallelism.attention.ring",
    "simulate": "evermesh.parallelism.simulator",
    "verify_plan": "evermesh.parallelism.verifier",
}
"""Where names are imported from when they are first used."""

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
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

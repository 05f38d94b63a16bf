"""What small jobs exchange."""

from collections.abc import Sequence

from evermesh.parallelism import Layout
from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.cost import CostModel, ExpertShape, ModelShape
from evermesh.parallelism.fabric.exchanges import Exchange, plan_exchanges
from evermesh.parallelism.fabric.model import model_of
from evermesh.parallelism.planner import plan_batch
from evermesh.parallelism.topology import Topology

COST = CostModel(token_s=1e-5, pair_s=1e-8, micro_batch_s=1e-4)
DENSE = ModelShape(hidden=256, layers=4, heads=8, kv_heads=8, head_dim=32, ffn=512, vocabulary=1024)
MIXTURE = DENSE.model_copy(update={"experts": ExpertShape(layers=4, experts=8, active_ffn=256, top_k=2)})


def plan_of(layout: Layout, lengths: Sequence[int] | None = None) -> BatchPlan:
    """By default every HDP rank has four sequences of 256 tokens."""
    return plan_batch(lengths or [256] * (4 * layout.hdp), layout, COST)


def exchanges_of(
    layout: Layout, topology: Topology, shape: ModelShape = DENSE, lengths: Sequence[int] | None = None
) -> list[Exchange]:
    """Of a step on these nodes, in bfloat16."""
    devices = topology.nodes[0].devices
    nodes = [rank // devices for rank in range(topology.world_size)]
    return plan_exchanges(plan_of(layout, lengths), model_of(shape, layout, 2), nodes)

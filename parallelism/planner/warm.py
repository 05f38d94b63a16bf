"""Compiles the planner's loops before anybody waits for a plan."""

from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner.batch import plan_batch
from evermesh.parallelism.pool import Pool

_LENGTHS = (9000, 2500, *range(100, 900, 20))
_LAYOUTS = (
    Layout(hdp=4, capacity=3000),
    Layout(hdp=20, capacity=1000),
    Layout(hdp=4, capacity=3000, ep=2),
    Layout(hdp=4, capacity=3000, pp=2),
)
"""One for each planner; the first two differ in the number of ranks."""


def warm_up() -> None:
    """Plan small batches with every planner: compiles what is not in the cache, and loads the rest.

    Takes up to a minute the first time after the planner changed, and a second after that.
    """
    cost = CostModel(token_s=1e-5, pair_s=1e-9, micro_batch_s=1e-3, ring_token_s=1e-6, network_token_s=1e-6)
    for layout in _LAYOUTS:
        plan_batch(_LENGTHS, layout, cost, pool=Pool.of(layout.hdp, 2))

"""Loads the machine code of the planner's loops ahead of the first batch, as far as it was compiled before.

Loading takes half a second, compiling half a minute. A process from which workers are forked loads, so that no worker has to;
it never compiles, since it cannot know which of the planners its workers will need.
"""

from collections.abc import Iterator
from typing import Literal

from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner import compiling
from evermesh.parallelism.planner.batch import plan_batch
from evermesh.parallelism.planner.replan import replan_batch
from evermesh.parallelism.pool import Pool

Kind = Literal["rings", "lock-step", "pipelines"]

_LENGTHS = (100, 30, 20, 5)
_EFFORT = 0.05
"""Enough that a search begins, although so short a step would get none."""
_COST = CostModel(token_s=1e-6, pair_s=1e-9, micro_batch_s=1e-5, ring_step_s=1e-4, ring_token_s=1e-7)
_PLANNERS: tuple[tuple[Kind, str, Layout], ...] = (
    ("rings", "filling", Layout(hdp=2, capacity=64)),
    ("lock-step", "lock_step_loops", Layout(hdp=2, capacity=64, ep=2)),
    ("pipelines", "replay", Layout(hdp=2, capacity=64, pp=2)),
)
"""A planner, the module with loops that only it uses, and a layout that it plans."""


def load_compiled() -> set[Kind]:
    """Plan a tiny batch with every planner whose loops are compiled; returns which these are. Starts no thread."""
    return set(_loaded())


def compile_all() -> None:
    """Plan small batches with every planner, and mend a plan: compiles all loops that are not in the cache.

    Takes about a minute, once.
    """
    pool_cost = _COST.model_copy(update={"network_token_s": 1e-6})
    for _, _, layout in _PLANNERS:
        plan_batch(_LENGTHS, layout, pool_cost, pool=Pool.of(layout.hdp, 2), effort=_EFFORT)
    layout, pool = Layout(hdp=20, capacity=16), Pool.of(20, 2)
    plan = plan_batch(_LENGTHS, layout, pool_cost, pool=pool)
    replan_batch(plan, layout, pool_cost, pool=pool, lost={1})  # a fault is no time to compile


def _loaded() -> Iterator[Kind]:
    for kind, module, layout in _PLANNERS:
        if compiling.is_cached(module):
            plan_batch(_LENGTHS, layout, _COST, effort=_EFFORT)
            yield kind


__all__ = ["compile_all", "load_compiled"]

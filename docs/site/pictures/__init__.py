"""The pictures of the documentation, each drawn from what the code computes.

``python -m docs.site.pictures DIRECTORY`` writes them to look at; the site draws them while it is built.
"""

from collections.abc import Callable, Mapping

from docs.site.pictures import checkpoints, detectors, layouts, plans, rings, snapshots, states

PICTURES: Mapping[str, Callable[[], bytes]] = {
    "plan": plans.our_plan,
    "plan-static": plans.static_plan,
    "pipeline": plans.pipeline,
    "ring": rings.ring,
    "mesh": layouts.mesh,
    "memory": layouts.memory,
    "checkpoint": checkpoints.resharded,
    "stripes": snapshots.stripes,
    "survival": snapshots.survival,
    "states": states.states,
    "hang": detectors.hang,
    "slow-rank": detectors.slow_rank,
}
"""By name: what draws the picture, as PNG."""

__all__ = ["PICTURES"]

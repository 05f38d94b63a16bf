"""What offloading adds to a micro-batch, as the planner's loops see it.

A micro-batch of T tokens and P pairs takes, with fraction f of its tokens offloaded, ``CostModel.offload_s`` longer than
without. For a given f that is the largest of four planes in (T, P): copies out outlast the forward pass or not, copies back
the backward pass or not. With the best f it is so too, by duality of linear programs: planes are then the prices at which
no f gains anything. So

- time is convex in (T, P) and grows with both in proportion: documents that share a micro-batch never take longer than each
  in one of its own, because what one of them has to hide copies behind is there for all;
- any one plane, summed over documents, is a bound for all ways to put them into micro-batches.
"""

from typing import Literal

from evermesh.parallelism.cost import CostModel, Work

Plane = tuple[float, float]
"""Seconds per token and per pair."""
Planes = tuple[Plane, Plane, Plane, Plane]


def planes_of(cost: CostModel, offload: float | Literal["auto"]) -> Planes:
    """The four whose largest is ``CostModel.offload_s`` of a micro-batch, with that fraction or with the best.

    The first is that of copies which all hide.
    """
    saves, copy_s = cost.offload_saves_token_s, cost.host_products_token_s
    if offload != "auto":
        return (
            _plane(cost, 0.0, 0.0, offload),
            _plane(cost, 1.0, 0.0, offload),
            _plane(cost, 0.0, 1.0, offload),
            _plane(cost, 1.0, 1.0, offload),
        )
    out = saves / copy_s if saves < copy_s else 1.0
    back = (saves - copy_s) / (saves + copy_s) if saves > copy_s else 0.0
    return (
        _plane(cost, 0.0, 0.0, "auto"),
        _plane(cost, out, 0.0, "auto"),
        _plane(cost, 1.0, back, "auto"),
        _plane(cost, 1.0, 1.0, "auto"),
    )


def _plane(cost: CostModel, out: float, back: float, offload: float | Literal["auto"]) -> Plane:
    """Copies count ``out`` times in place of the forward pass, and ``back`` times in place of the backward pass."""
    of_token, of_pair = cost.passes_s(Work(1.0, 0.0)), cost.passes_s(Work(0.0, 1.0))
    moved = (out + back) * cost.host_products_token_s - (1.0 - back) * cost.offload_saves_token_s
    per_token = (out + back) * cost.host_token_s - out * of_token[0] - back * of_token[1]
    per_token += min(0.0, moved) if offload == "auto" else offload * moved
    return per_token, -out * of_pair[0] - back * of_pair[1]

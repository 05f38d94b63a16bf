"""Which nodes protect each other's memory, and what that survives."""

from collections.abc import Mapping
from typing import Any

from docs.site.pictures.drawing import COLOURS, INK, bare, box, figure, png, title
from evermesh.fault.snapshot.coding import Code
from evermesh.fault.snapshot.stripes.placement import Candidate, StripePlan, plan_stripes
from evermesh.fault.snapshot.stripes.survival import replicated, striped

_RACKS, _PER_RACK, _CODE = 8, 4, Code(6, 2)
_MOST_LOST = 6


def stripes() -> bytes:
    """The nodes of eight racks, coloured by stripe; one rack is lost."""
    nodes = [Candidate(f"node{at}", {"rack": f"rack {at // _PER_RACK}"}) for at in range(_RACKS * _PER_RACK)]
    plan = plan_stripes(nodes, _CODE)
    made, (axes,) = figure(10, 3.3)
    for number, node in enumerate(nodes):
        rack, shelf = divmod(number, _PER_RACK)
        stripe, _ = plan.stripe_of(node.node)
        box(axes, rack * 1.25, _PER_RACK - 1 - shelf, 1, 0.9, COLOURS[stripe], f"stripe {stripe}")
    lost = 2
    red: dict[str, Any] = {"edgecolor": "#c0392b", "linewidth": 2.5, "linestyle": "--"}
    box(axes, lost * 1.25 - 0.07, -0.1, 1.14, _PER_RACK + 0.1, "none", **red)
    for rack in range(_RACKS):
        axes.text(rack * 1.25 + 0.5, _PER_RACK + 0.12, "lost" if rack == lost else f"rack {rack}", ha="center", fontsize=9.5,
                  color="#c0392b" if rack == lost else INK)  # fmt: skip
    axes.text(0, -0.5, _told(plan), fontsize=9.5, color=INK, va="top")
    axes.set_xlim(-0.1, _RACKS * 1.25)
    axes.set_ylim(-1.0, _PER_RACK + 0.6)
    bare(axes)
    title(
        axes, f"{len(nodes)} nodes in {len(plan.stripes)} stripes, each with code {_CODE}: 6 parts of data, 2 of parity"
    )
    return png(made)


def survival() -> bytes:
    """The chance that so many lost nodes of 128 cost no read of storage, beside copies."""
    made, (axes,) = figure(10, 3.8)
    nodes = 128
    schemes = (
        striped([8] * (nodes // 8), 2, _MOST_LOST),
        striped([4] * (nodes // 4), 1, _MOST_LOST),
        replicated(nodes, 2, _MOST_LOST),
        replicated(nodes, 3, _MOST_LOST),
    )
    losses = range(1, _MOST_LOST + 1)
    for number, scheme in enumerate(schemes):
        values = [100 * scheme.survival(lost) for lost in losses]
        axes.plot(
            losses, values, marker="o", color=COLOURS[number], label=f"{scheme.name}: +{scheme.memory:.0%} memory"
        )
    axes.set_xlabel("nodes of 128 that are lost at once, any of them")
    axes.set_ylabel("recovered from memory, %")
    axes.legend(frameon=False, fontsize=9.5)
    axes.grid(axis="y", color="#e6e6e6")
    axes.spines[["top", "right"]].set_visible(False)
    title(axes, "what stripes survive, counted, beside copies of the whole state")
    return png(made)


def _told(plan: StripePlan) -> str:
    guarantees: Mapping[str, Any] = {each.kind: each for each in plan.guarantees}
    return "\n".join(str(each) for each in guarantees.values())

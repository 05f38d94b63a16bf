"""Says in sentences why a layout was found, and what the next one costs; imports no torch."""

from collections.abc import Sequence
from typing import Any

from evermesh.parallelism.layout.degrees import Layout
from evermesh.parallelism.layout.search import RankedLayout
from evermesh.parallelism.topology import Topology

_GIB = 2**30
_WORTH_NAMING = 0.003
"""Of a step: differences below it are left out."""


def degrees_of(layout: Layout) -> str:
    """The degrees in one line."""
    name = f"pp {layout.pp} x hdp {layout.hdp} x tp {layout.tp}"
    return name + (f", ep {layout.ep} x etp {layout.etp}" if layout.ep * layout.etp > 1 else "")


def choices_of(layout: Layout) -> str:
    """What else a layout says, in short."""
    schedule = ""
    if layout.pp > 1:
        schedule = layout.schedule + (f" x {layout.virtual_stages}" if layout.virtual_stages > 1 else "") + ", "
    tiers = layout.tiers
    held = f"sharding {tiers.parameters}/{tiers.gradients}/{tiers.states}"
    held += " per micro-batch" if tiers.in_lock_step else ""
    policy: str = layout.activations if isinstance(layout.activations, str) else "mixed"
    policy += f" {layout.offload}" if layout.offload else ""
    parts = f", tokens gathered in {layout.tp_chunks} parts" if layout.tp_chunks > 1 else ""
    return f"{schedule}{held}, {policy}, {layout.capacity:,} tokens{parts}"


def fields_of(layout: Layout) -> dict[str, Any]:
    """What ``train.layout`` of a job has to say for this layout; what is left out is the default."""
    fields = layout.model_dump(mode="json", exclude_defaults=True)
    return {"hdp": layout.hdp, "capacity": layout.capacity} | fields


def explain(ranked: Sequence[RankedLayout], topology: Topology) -> list[str]:
    """Sentences about the first: what its step consists of, what binds its memory, what the others cost."""
    best = ranked[0]
    sentences = [_time(best), _memory(best)]
    if (order := _order(best, topology)) is not None:
        sentences.append(order)
    sentences += [compare(best, other) for other in ranked[1:2]]
    return sentences


def compare(best: RankedLayout, other: RankedLayout) -> str:
    """What ``other`` costs against ``best``, and where."""
    total = best.step.total
    differences = {
        name: other.step.parts.get(name, 0.0) - best.step.parts.get(name, 0.0)
        for name in {**best.step.parts, **other.step.parts}
    }
    named = sorted(differences.items(), key=lambda part: -abs(part[1]))
    shown = [f"{name} {seconds:+.3g} s" for name, seconds in named if abs(seconds) >= _WORTH_NAMING * total]
    longer = other.step.total / total - 1.0
    return (
        f"{degrees_of(other.layout)} ({choices_of(other.layout)}) takes {other.step.total:.4g} s, {longer:.1%} longer: "
        f"{', '.join(shown) or 'by less than a part is worth naming'}."
    )


def _time(found: RankedLayout) -> str:
    total = found.step.total
    shown = sorted(found.step.parts.items(), key=lambda part: -part[1])
    parts = [f"{name} {seconds / total:.1%}" for name, seconds in shown if seconds >= _WORTH_NAMING * total]
    source = "planned" if found.is_planned else "by formula"
    return f"A step takes {total:.4g} s ({source}): {', '.join(parts)}. Most is {found.step.binding}."


def _memory(found: RankedLayout) -> str:
    memory, room = found.memory, found.memory_bytes / _GIB
    parts = sorted(memory.parts.items(), key=lambda part: -part[1])
    shown = ", ".join(f"{name} {size / _GIB:,.1f}" for name, size in parts if size >= 0.01 * memory.total)
    host = f" {memory.host / _GIB:,.1f} GiB of activations for each device wait in host memory." if memory.host else ""
    bound = "host memory" if found.host_binds else "device memory"
    return (
        f"Pipeline rank {memory.pp_rank} needs most memory, {memory.total / _GIB:,.1f} of {room:,.1f} GiB a device: {shown}."
        f"{host} Micro-batches of up to {found.largest_capacity:,} tokens would fit; {bound} bounds them."
    )


def _order(found: RankedLayout, topology: Topology) -> str | None:
    """Which nodes come first, where that matters."""
    if found.node_order == tuple(range(len(topology.nodes))):
        return None
    names = [topology.nodes[index].name for index in found.node_order]
    shown = ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:6])}, ..., {', '.join(names[-5:])}"
    split = f" Stages have {', '.join(map(str, found.layout.split))} layers." if found.layout.split != "flops" else ""
    return f"Number the nodes in this order, so that those alike share groups: {shown}.{split}"


__all__ = ["choices_of", "compare", "degrees_of", "explain", "fields_of"]

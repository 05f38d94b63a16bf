"""What a search for a layout has found, as a table, in sentences, as YAML to paste and as JSON."""

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from evermesh.launcher import job_yaml
from evermesh.parallelism.cost import ModelShape
from evermesh.parallelism.layout.explain import choices_of, degrees_of, explain, fields_of
from evermesh.parallelism.layout.options import SearchOptions
from evermesh.parallelism.layout.search import RankedLayout
from evermesh.parallelism.layout.sizes import num_parameters
from evermesh.parallelism.topology import Topology

_GIB = 2**30


def headline(shape: ModelShape, topology: Topology, lengths: Sequence[Sequence[int]], options: SearchOptions) -> str:
    """What was searched for, in one line."""
    kinds = " and ".join(dict.fromkeys(node.device_kind for node in topology.nodes))
    tokens = sum(map(sum, lengths)) / len(lengths)
    number, nodes = topology.world_size, len(topology.nodes)
    where = f"{number:,} {kinds} in {nodes:,} {'node' if nodes == 1 else 'nodes'}"
    memory = f"{options.device.memory_bytes / _GIB:,.4g} GiB each"
    return (
        f"[bold]{_count(num_parameters(shape))} parameters[/] on {where}, {memory}; "
        f"steps of {tokens:,.0f} tokens, sequences of up to {max(map(max, lengths)):,}"
    )


def _count(number: int) -> str:
    return f"{number / 1e9:,.4g} billion" if number >= 1e9 else f"{number / 1e6:,.3g} million"


def table_of(ranked: Sequence[RankedLayout]) -> Table:
    """One row for each."""
    mfu = f"MFU ({ranked[0].convention})"
    table = Table("", "step", "tokens/s", mfu, "memory", "layout", box=None, header_style="bold", pad_edge=False)
    for column in table.columns[:5]:
        column.justify, column.no_wrap = "right", True
    for number, found in enumerate(ranked, start=1):
        table.add_row(
            f"{number}",
            f"{found.step.total:.4g} s",
            f"{found.tokens_per_s:,.0f}",
            f"{found.mfu:.1%}",
            f"{found.memory.total / _GIB:,.1f} GiB",
            f"{degrees_of(found.layout)}\n[dim]{choices_of(found.layout)}[/]",
        )
    return table


def lines_of(ranked: Sequence[RankedLayout], topology: Topology, options: SearchOptions) -> list[str]:
    """Why the first is first, and the conventions of the figures."""
    device = options.device
    products, attention, peak = (
        f"{rate / 1e12:,.4g}" for rate in (device.flops_per_s, device.attention_flops_per_s, device.peak_flops_per_s)
    )
    counted = "all pairs of tokens" if options.convention == "full" else "the pairs that a causal mask leaves"
    rates = (
        f"Rates: {products} TFLOP/s in matrix products and {attention} in attention, sustained, of a peak of {peak}. "
        f"The MFU counts {counted}, backward as twice forward, and nothing that is computed again."
    )
    return [*explain(ranked, topology), rates]


def yaml_of(found: RankedLayout) -> str:
    """The ``train.layout`` of a job file."""
    return job_yaml.text_of({"train": {"layout": fields_of(found.layout)}})


def as_json(ranked: Sequence[RankedLayout], topology: Topology) -> str:
    """All that is known of each."""
    return json.dumps([_fields(found, topology) for found in ranked], indent=1)


def _fields(found: RankedLayout, topology: Topology) -> dict[str, Any]:
    return {
        "layout": fields_of(found.layout),
        "nodes": [topology.nodes[index].name for index in found.node_order],
        "step_s": found.step.total,
        "parts_s": dict(found.step.parts),
        "is_planned": found.is_planned,
        "tokens_per_s": found.tokens_per_s,
        "mfu": found.mfu,
        "convention": found.convention,
        "memory_bytes": found.memory.total,
        "memory_parts_bytes": found.memory.parts,
        "host_bytes": found.memory.host,
        "pipeline_rank": found.memory.pp_rank,
    }

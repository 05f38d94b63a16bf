"""From what every rank has written to the manifest of a checkpoint.

Needs nothing but the standard library, so that the writer can do it.
"""

from collections.abc import Mapping
from typing import Any

from evermesh.checkpoint.background.orders import SaveOrder, WriterPlan
from evermesh.checkpoint.encoding import FORMAT_VERSION


def merged_manifest(
    plan: WriterPlan, order: SaveOrder, records: Mapping[int, Mapping[str, Any]], time_s: float
) -> dict[str, Any]:
    """The manifest, from the records of all ranks that write, by rank.

    The plan proved that the parts of all ranks cover every tensor exactly once; here every part must have been written.

    Raises:
        ValueError: ranks saved different shard maps, or some elements twice or not at all.
    """
    assert plan.tensors is not None
    assert plan.num_elements is not None
    others = [rank for rank, record in records.items() if record["digest"] != plan.digest]
    if others:
        raise ValueError(f"ranks {others} saved another shard map than rank 0. Build it from the same inputs.")
    extents: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.tensors}
    for rank in plan.writers:
        for name, of_tensor in records[rank]["extents"].items():
            extents[name] += of_tensor
    for name, wanted in plan.num_elements.items():
        found = sum(extent["stop"] - extent["start"] for extent in extents[name])
        if found != wanted:
            raise ValueError(f"{found} of the {wanted} elements of {name} were written. Save again.")
    return {
        "step": order.step,
        "time_s": time_s,
        "world_size": plan.world_size,
        "description": order.description,
        "objects": order.objects,
        "tensors": {name: _tensor(entry, extents[name]) for name, entry in plan.tensors.items()},
        "files": {name: file for rank in plan.writers for name, file in records[rank]["files"].items()},
        "format_version": FORMAT_VERSION,
    }


def _tensor(entry: Mapping[str, Any], extents: list[dict[str, Any]]) -> dict[str, Any]:
    """With the fields in the order in which a manifest has them."""
    return {
        "dtype": entry["dtype"],
        "shape": entry["shape"],
        "extents": extents,
        "permutation": entry["permutation"],
        "padding": entry["padding"],
    }

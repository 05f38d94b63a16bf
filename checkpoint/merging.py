"""From what every rank has written to the manifest of a checkpoint.

Needs nothing but the standard library and xxhash, so that the process that writes in the background can do it. What it
reads of a rank is the first line of its index: it does not depend on the number of tensors.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evermesh.checkpoint.encoding import FORMAT_VERSION, IndexHead


@dataclass(frozen=True, slots=True)
class SavedMap:
    """What rank 0 must know of the shard map."""

    digest: str
    num_bytes: int
    """Of all tensors, each region once."""
    tensors: dict[str, Any]
    """As the manifest says it: types, shapes, and who holds what."""


def told_of(digest: str, tensor_bytes: int, bytes_written: int) -> dict[str, Any]:
    """What a rank tells in the first line of its index."""
    return {"shard_map": digest, "tensor_bytes": tensor_bytes, "bytes_written": bytes_written}


def merged_manifest(
    saved: SavedMap,
    heads: Sequence[IndexHead],
    values: Mapping[str, Any],
    parity: tuple[int, Sequence[IndexHead]] | None = None,
) -> dict[str, Any]:
    """The manifest, from the heads of the indexes of all ranks, by rank.

    The map proves that the parts of all ranks cover every tensor exactly once, and each rank has written its parts; here
    the maps must be one, and the bytes add up. ``values`` are the step, the time, the description and the objects;
    ``parity`` the ranks of a stripe and the heads of the indexes of parity.

    Raises:
        ValueError: ranks saved different shard maps, or some bytes twice or not at all.
    """
    others = [rank for rank, head in enumerate(heads) if head.told["shard_map"] != saved.digest]
    if others:
        raise ValueError(f"ranks {others} saved another shard map than rank 0. Build it from the same inputs.")
    found = sum(head.told["tensor_bytes"] for head in heads)
    if found != saved.num_bytes:
        raise ValueError(f"{found:,} of {saved.num_bytes:,} bytes of tensors were written. Save again.")
    return {
        **values,
        "tensors": saved.tensors,
        "ranks": list(map(_entry, heads)),
        "parity": None if parity is None else {"width": parity[0], "parts": list(map(_entry, parity[1]))},
        "format_version": FORMAT_VERSION,
    }


def _entry(head: IndexHead) -> dict[str, Any]:
    return {"xxh3_64": head.xxh3_64, "num_bytes": head.num_bytes, "files": head.files}

"""What no choice of spines can beat: lower bounds of the largest load of a link, in seconds."""

from typing import NamedTuple

import numpy as np

from evermesh.parallelism.fabric.paths import DIRECT, Loads, Paths
from evermesh.parallelism.fabric.wiring import Floats, Ints, Wiring

_MOST_DEEP = 64
"""Streams on one link up to which the bound of whole streams is looked for."""


class Bound(NamedTuple):
    """The largest of the bounds, and what it is of."""

    seconds: float
    binding: str


def lower_bound(paths: Paths, wiring: Wiring, others: Loads | None = None) -> Bound:
    """Of all choices of spines for these streams, whose ports are given.

    Ports carry what they carry. What a leaf sends to spines takes at least its bytes over the speed of all its links; and as
    streams are not cut, of the k largest some link gets ceil(k / links). Likewise what it receives.
    """
    fixed = Loads.of(paths.on(np.full(len(paths), DIRECT)), wiring, others)
    seconds = fixed.seconds(wiring)
    ports, trunks = (
        max(float(array.max(initial=0.0)) for array in arrays)
        for arrays in ((seconds.send, seconds.receive), (seconds.up, seconds.down))
    )
    found = Bound(ports, "a port") if ports >= trunks else Bound(trunks, "what other jobs send")
    crossing = paths.crossing(wiring)
    for port, base, word in ((paths.source_port, fixed.up, "sends"), (paths.target_port, fixed.down, "receives")):
        leaf, num_bytes = wiring.port_leaf[port[crossing]], paths.num_bytes[crossing]
        for one, of_leaf in _by_leaf(leaf, num_bytes):
            seconds_of = _of_leaf(of_leaf, base[one], wiring.trunk_bytes_per_s[one])
            found = max(
                found, Bound(seconds_of, f"what leaf {wiring.leaves[one]} {word}"), key=lambda bound: bound.seconds
            )
    return found


def _by_leaf(leaf: Ints, num_bytes: Floats) -> list[tuple[int, Floats]]:
    order = np.lexsort((-num_bytes, leaf))
    leaves, starts = np.unique(leaf[order], return_index=True)
    stops = np.append(starts[1:], len(leaf))
    return [
        (one, num_bytes[order[a:b]]) for one, a, b in zip(leaves.tolist(), starts, stops[: len(leaves)], strict=True)
    ]


def _of_leaf(descending: Floats, base: Floats, speeds: Floats) -> float:
    """Of the streams that leave one leaf over links with these speeds, that carry ``base`` already."""
    links = int((speeds > 0).sum())
    if not links:
        return 0.0
    fractional = float((descending.sum() + base[speeds > 0].sum()) / speeds.sum())
    depth = np.arange(min((len(descending) - 1) // links, _MOST_DEEP) + 1)
    sums = np.concatenate([[0.0], np.cumsum(descending)])
    last = depth * links + 1  # of so many streams one link gets depth + 1, at least the smallest
    whole = (sums[last] - sums[last - depth - 1]) / speeds.max()
    return max(fractional, float(whole.max(initial=0.0)))


__all__ = ["Bound", "lower_bound"]

"""Which spine carries which stream: the largest load of a link first, then the sum of squares. Deterministic.

Leaves that exchange nothing with each other are planned apart. Where all links of a leaf are alike, to the same spines and
without other jobs, streams are spread with a proof (``colouring``); else each goes where it hurts least, the largest
first. Then chains of moves relieve links (``repairing``). The certificate says how far from a lower bound the result is.
"""

from dataclasses import dataclass

import numpy as np

from evermesh.parallelism.fabric.bounds import Bound, lower_bound
from evermesh.parallelism.fabric.colouring import spread_evenly
from evermesh.parallelism.fabric.paths import Connections, Loads, Paths, split
from evermesh.parallelism.fabric.repairing import Repair
from evermesh.parallelism.fabric.wiring import Floats, Ints, Wiring

_UNSET = -2


@dataclass(frozen=True, slots=True)
class Assignment:
    """Paths, what they load together with other jobs, and what no choice of spines could beat."""

    paths: Paths
    loads: Loads
    """Seconds."""
    bound: Bound

    @property
    def is_optimal(self) -> bool:
        """Whether no choice of spines makes the largest load smaller, proven."""
        return self.loads.most <= self.bound.seconds * (1 + 1e-9)


def assign(connections: Connections, wiring: Wiring, *, parts: int = 1, others: Loads | None = None) -> Assignment:
    """Spread these connections over the network.

    Args:
        connections: what cards send to each other.
        wiring: the network, without its broken links.
        parts: streams of a connection on each port.
        others: bytes that other jobs send meanwhile.

    Raises:
        TrafficImpossible: broken links leave two cards without a path.
    """
    return choose_spines(split(connections, wiring, parts), wiring, others)


def choose_spines(paths: Paths, wiring: Wiring, others: Loads | None = None, kept: Ints | None = None) -> Assignment:
    """Spread streams whose ports are given; ``kept`` has the spine of those that have one already, -2 for the others."""
    base = others or Loads.none(wiring)
    bound = lower_bound(paths, wiring, others)
    crossing = paths.crossing(wiring)
    ends = wiring.port_leaf[paths.source_port[crossing]], wiring.port_leaf[paths.target_port[crossing]]
    spine = paths.spine.copy()
    for members in _components(*ends, len(wiring.leaves)):
        chosen = crossing[members]
        one = _Component((ends[0][members], ends[1][members]), paths.num_bytes[chosen], wiring, base, bound.seconds)
        spine[chosen] = one.chosen(None if kept is None else kept[chosen])
    found = paths.on(spine)
    return Assignment(found, Loads.of(found, wiring, others).seconds(wiring), bound)


def _components(source: Ints, target: Ints, leaves: int) -> list[Ints]:
    """Numbers of the streams between leaves that hang together."""
    root = np.arange(leaves)
    pairs = np.unique(np.stack([source, target]), axis=1)
    while True:  # the smallest number spreads; ends after at most as many rounds as leaves hang in a row
        least = np.minimum(root[pairs[0]], root[pairs[1]])
        before = root.copy()
        np.minimum.at(root, pairs[0], least)
        np.minimum.at(root, pairs[1], least)
        if (root == before).all():
            break
    of_stream = root[source]
    return [np.flatnonzero(of_stream == one) for one in np.unique(of_stream)]


class _Component:
    """Streams between leaves that hang together, numbered from 0 among themselves."""

    def __init__(self, ends: tuple[Ints, Ints], num_bytes: Floats, wiring: Wiring, base: Loads, bound: float) -> None:
        leaves, inverse = np.unique(np.concatenate(ends), return_inverse=True)
        self._ends = inverse[: len(num_bytes)], inverse[len(num_bytes) :]
        self._num_bytes = num_bytes
        self._speeds = wiring.trunk_bytes_per_s[leaves]
        self._base = np.stack([base.up[leaves], base.down[leaves]])
        self._bound = bound

    def chosen(self, kept: Ints | None) -> Ints:
        """The spine of every stream; where some are kept, no more is moved than the largest load asks for."""
        if kept is not None:
            start = self._greedy(kept)
        elif self._is_even():
            spines = np.flatnonzero(self._speeds[0])
            start = spines[spread_evenly(*self._ends, self._num_bytes, len(spines))]
        else:
            start = self._greedy(np.full(len(self._num_bytes), _UNSET))
        repair = Repair(self._ends, self._num_bytes, start, self._speeds, self._base)
        repair.lower_most(self._bound)
        if kept is None:
            repair.level()
        return np.array(repair.spine, np.int64)

    def _is_even(self) -> bool:
        usable = self._speeds > 0
        fastest = self._speeds.max(axis=1, keepdims=True)
        alike = (usable == usable[0]).all() and (self._speeds == np.where(usable, fastest, 0.0)).all()
        return bool(alike) and not self._base.any()

    def _greedy(self, kept: Ints) -> Ints:
        """Each where the larger of its two links is least, and then their sum; the largest streams first."""
        chosen, (source, target) = kept.copy(), self._ends
        with np.errstate(divide="ignore"):
            per_byte = np.where(self._speeds > 0, 1.0 / self._speeds, np.inf)
        up, down = self._base.copy()
        placed = np.flatnonzero(kept != _UNSET)
        np.add.at(up, (source[placed], kept[placed]), self._num_bytes[placed])
        np.add.at(down, (target[placed], kept[placed]), self._num_bytes[placed])
        waiting = np.flatnonzero(kept == _UNSET)
        for stream in waiting[np.argsort(-self._num_bytes[waiting], kind="stable")].tolist():
            a, b, size = source[stream], target[stream], self._num_bytes[stream]
            first, second = (up[a] + size) * per_byte[a], (down[b] + size) * per_byte[b]
            larger = np.maximum(first, second)
            near = np.flatnonzero(larger <= larger.min() * (1 + 1e-9))
            spine = near[(first[near] + second[near]).argmin()]
            chosen[stream] = spine
            up[a, spine] += size
            down[b, spine] += size
        return chosen


__all__ = ["Assignment", "assign", "choose_spines"]

"""After a link has failed: what it carried moves, and of the rest no more than the largest load asks for."""

from dataclasses import dataclass

import numpy as np

from evermesh.parallelism.fabric.assigning import Assignment, choose_spines
from evermesh.parallelism.fabric.hashing import drawn_spines
from evermesh.parallelism.fabric.paths import DIRECT, Connections, Loads, Paths, split
from evermesh.parallelism.fabric.wiring import Bools, Ints, Wiring

_UNSET = -2


@dataclass(frozen=True, slots=True)
class Replanned:
    """The paths of before on the network that is left."""

    assignment: Assignment
    cut: int
    """Streams whose path has broken."""
    moved: int
    """Others that took another spine, to make room."""


def replan(
    before: Paths,
    connections: Connections,
    wiring: Wiring,
    *,
    parts: int = 1,
    others: Loads | None = None,
    was: Connections | None = None,
) -> Replanned:
    """Give the streams of broken paths new ones; arguments as for ``assign``.

    ``before`` are the paths until now, ``was`` their connections where these were others: ranks whose card has no cable
    any more talk through another.

    Raises:
        TrafficImpossible: broken links leave two cards without a path.
    """
    paths = split(connections, wiring, parts)
    kept = _kept(before, was or connections, paths, connections, wiring)
    found = choose_spines(paths, wiring, others, kept)
    moved = (kept >= 0) & (found.paths.spine != kept)
    return Replanned(found, cut=int(_is_cut(before, wiring).sum()), moved=int(moved.sum()))


def rehashed(before: Paths, connections: Connections, wiring: Wiring, seed: int, *, parts: int = 1) -> Paths:
    """What switches do by themselves: streams of broken paths take those that a hash gives them, all others stay."""
    paths = split(connections, wiring, parts)
    kept = _kept(before, connections, paths, connections, wiring)
    lost = np.flatnonzero(kept == _UNSET)
    kept[lost] = drawn_spines(paths, lost, wiring, np.random.default_rng(seed))
    return paths.on(kept)


def _kept(before: Paths, was: Connections, paths: Paths, connections: Connections, wiring: Wiring) -> Ints:
    """The spine of every stream that still has its path; -2 for the others."""
    old = dict(zip(before.stream_keys(was), before.spine.tolist(), strict=True))
    found = np.array([old.get(key, _UNSET) for key in paths.stream_keys(connections)], np.int64)
    found[_is_cut(paths.on(found), wiring)] = _UNSET
    found[paths.spine == DIRECT] = DIRECT
    return found


def _is_cut(paths: Paths, wiring: Wiring) -> Bools:
    """Whether a port or a link of the path of each stream is broken."""
    cut, at = np.zeros(len(paths), bool), paths.spine >= 0
    for port in (paths.source_port, paths.target_port):
        cut |= wiring.port_bytes_per_s[port] == 0
        cut[at] |= wiring.trunk_bytes_per_s[wiring.port_leaf[port[at]], paths.spine[at]] == 0
    return cut


__all__ = ["Replanned", "rehashed", "replan"]

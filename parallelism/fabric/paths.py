"""The paths of streams, and what they load.

A *connection* joins two cards for one axis of the mesh; a *stream* is an equal part of one, on one path: source port, its
leaf, a spine, another leaf, target port; or one leaf alone where both ports are wired to it. NCCL calls it a queue pair.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from evermesh.parallelism.errors import TrafficImpossible
from evermesh.parallelism.fabric.flows import Flows
from evermesh.parallelism.fabric.wiring import Floats, Ints, Wiring

DIRECT = -1
"""In the place of a spine: both ports are wired to one leaf."""


@dataclass(frozen=True, slots=True)
class Connections:
    """Pairs of cards, each for one axis."""

    axes: tuple[str, ...]
    axis: Ints
    source: Ints
    target: Ints
    num_bytes: Floats

    @classmethod
    def of(cls, flows: Flows) -> "Connections":
        """Those that carry ``flows``: all calls of one axis between two cards share one."""
        axes = tuple(dict.fromkeys(label.axis for label in flows.labels))
        axis = np.array([axes.index(label.axis) for label in flows.labels], np.int64)[flows.label]
        size = 1 + int(max(flows.source.max(initial=0), flows.target.max(initial=0)))
        keys, inverse = np.unique((axis * size + flows.source) * size + flows.target, return_inverse=True)
        sums = np.bincount(inverse, flows.num_bytes, len(keys)).astype(np.float64)
        return cls(axes, keys // size // size, keys // size % size, keys % size, sums)

    def __len__(self) -> int:
        return len(self.axis)


@dataclass(frozen=True, slots=True)
class Paths:
    """Streams and the path of each."""

    connection: Ints
    source_port: Ints
    target_port: Ints
    num_bytes: Floats
    spine: Ints
    """Or ``DIRECT``."""

    def __len__(self) -> int:
        return len(self.connection)

    def on(self, spine: Ints) -> "Paths":
        """The same streams on other spines."""
        return replace(self, spine=spine)

    def crossing(self, wiring: Wiring) -> Ints:
        """Numbers of the streams whose ports are on two leaves."""
        return np.flatnonzero(wiring.port_leaf[self.source_port] != wiring.port_leaf[self.target_port])

    def stream_keys(self, connections: Connections) -> list[tuple[str, int, int, int]]:
        """What streams are known by: axis, ports, and a number among those that have these in common."""
        axes = (connections.axes[axis] for axis in connections.axis[self.connection].tolist())
        seen: dict[tuple[str, int, int], int] = {}
        found = []
        for key in zip(axes, self.source_port.tolist(), self.target_port.tolist(), strict=True):
            seen[key] = seen.get(key, -1) + 1
            found.append((*key, seen[key]))
        return found


@dataclass(frozen=True, slots=True)
class Loads:
    """Bytes on every link in a step."""

    send: Floats
    """By port, to its leaf."""
    receive: Floats
    up: Floats
    """By leaf, by spine."""
    down: Floats
    """By leaf, by spine: from the spine to the leaf."""

    @classmethod
    def none(cls, wiring: Wiring) -> "Loads":
        """An idle network."""
        ports, trunks = len(wiring.port_leaf), wiring.trunk_bytes_per_s.shape
        return cls(np.zeros(ports), np.zeros(ports), np.zeros(trunks), np.zeros(trunks))

    @classmethod
    def of(cls, paths: Paths, wiring: Wiring, others: "Loads | None" = None) -> "Loads":
        """Of these paths, and of ``others`` that the network carries besides."""
        base = others or cls.none(wiring)
        at = paths.spine != DIRECT
        leaves, spines = wiring.trunk_bytes_per_s.shape
        ends = (
            wiring.port_leaf[port[at]] * spines + paths.spine[at] for port in (paths.source_port, paths.target_port)
        )
        up, down = (np.bincount(key, paths.num_bytes[at], leaves * spines).reshape(leaves, spines) for key in ends)
        ports = len(wiring.port_leaf)
        return cls(
            base.send + np.bincount(paths.source_port, paths.num_bytes, ports),
            base.receive + np.bincount(paths.target_port, paths.num_bytes, ports),
            base.up + up,
            base.down + down,
        )

    def seconds(self, wiring: Wiring) -> "Loads":
        """What each link needs to carry its bytes; a broken one that carries nothing 0."""
        ports, trunks = wiring.port_bytes_per_s, wiring.trunk_bytes_per_s
        pairs = (self.send, ports), (self.receive, ports), (self.up, trunks), (self.down, trunks)
        with np.errstate(divide="ignore", invalid="ignore"):
            return Loads(*(np.where(load > 0, load / speed, 0.0) for load, speed in pairs))

    @property
    def most(self) -> float:
        """The largest of all links."""
        return max(float(array.max(initial=0.0)) for array in (self.send, self.receive, self.up, self.down))

    @property
    def sum_of_squares(self) -> float:
        """Over all links."""
        return sum(float((array**2).sum()) for array in (self.send, self.receive, self.up, self.down))

    def named(self, wiring: Wiring) -> dict[str, float]:
        """By name of the link, ``FROM>TO``; links that carry something."""
        names = wiring.port_names()
        leaf_of = [wiring.leaves[leaf] for leaf in wiring.port_leaf]
        found: dict[str, float] = {}
        for port in np.flatnonzero(self.send).tolist():
            found[f"{names[port]}>{leaf_of[port]}"] = float(self.send[port])
        for port in np.flatnonzero(self.receive).tolist():
            found[f"{leaf_of[port]}>{names[port]}"] = float(self.receive[port])
        for leaf, spine in np.argwhere(self.up).tolist():
            found[f"{wiring.leaves[leaf]}>{wiring.spines[spine]}"] = float(self.up[leaf, spine])
        for leaf, spine in np.argwhere(self.down).tolist():
            found[f"{wiring.spines[spine]}>{wiring.leaves[leaf]}"] = float(self.down[leaf, spine])
        return found

    @classmethod
    def from_names(cls, values: Mapping[str, float], wiring: Wiring) -> "Loads":
        """The other way round; what is no link of these nodes' network is of another part of the cluster, and left out."""
        found, names = cls.none(wiring), {name: port for port, name in enumerate(wiring.port_names())}
        leaves, spines = ({name: at for at, name in enumerate(known)} for known in (wiring.leaves, wiring.spines))
        for link, value in values.items():
            one, _, other = link.partition(">")
            if one in names:
                found.send[names[one]] += value
            elif other in names:
                found.receive[names[other]] += value
            elif one in leaves and other in spines:
                found.up[leaves[one], spines[other]] += value
            elif one in spines and other in leaves:
                found.down[leaves[other], spines[one]] += value
        return found


def split(connections: Connections, wiring: Wiring, parts: int = 1) -> Paths:
    """Streams of equal bytes: ``parts`` on every port of a connection, left to left and right to right, so that both ports of
    a bonded card carry what they send and what they receive evenly. Spines are not chosen yet: 0 where one is needed.

    Raises:
        TrafficImpossible: broken links leave two cards without a path.
    """
    usable = wiring.trunk_bytes_per_s > 0
    reach = (usable.astype(np.int64) @ usable.T.astype(np.int64)) > 0
    np.fill_diagonal(reach, val=True)
    known: dict[tuple[int, int], list[tuple[int, int]]] = {}
    rows: list[tuple[int, int, int, int]] = []
    for number, pair in enumerate(zip(connections.source.tolist(), connections.target.tolist(), strict=True)):
        if pair not in known:
            known[pair] = _port_pairs(*pair, wiring, reach)
        share = len(known[pair]) * parts
        rows += [(number, *ports, share) for ports in known[pair] for _ in range(parts)]
    columns = np.array(rows, np.int64).reshape(-1, 4)
    connection, source, target, shares = columns.T
    spine = np.where(wiring.port_leaf[source] == wiring.port_leaf[target], DIRECT, 0)
    return Paths(connection, source, target, connections.num_bytes[connection] / shares, spine)


def _port_pairs(source: int, target: int, wiring: Wiring, reach: np.ndarray) -> list[tuple[int, int]]:
    ends = wiring.cards[source].ports, wiring.cards[target].ports
    healthy = [[port for port in ports if wiring.port_bytes_per_s[port] > 0] for ports in ends]

    def connected(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return [(a, b) for a, b in pairs if reach[wiring.port_leaf[a], wiring.port_leaf[b]]]

    number = max(len(ends[0]), len(ends[1]))
    sides = [(ends[0][at % len(ends[0])], ends[1][at % len(ends[1])]) for at in range(number)]
    found = connected([(a, b) for a, b in sides if a in healthy[0] and b in healthy[1]])
    found = found or connected([(a, b) for a in healthy[0] for b in healthy[1]])[:1]
    if not found:
        names = [
            f"{wiring.nodes[wiring.cards[card].place].name}/{wiring.cards[card].nic.name}" for card in (source, target)
        ]
        bare = next((name for name, ports in zip(names, healthy, strict=True) if not ports), None)
        why = f"no port of {bare} has a cable" if bare else "no spine has links to a leaf of both"
        raise TrafficImpossible(
            f"no path is left from card {names[0]} to card {names[1]}: {why}. Repair a cable, add the missing links to the "
            "topology, or leave one of the two nodes out."
        )
    return found


__all__ = ["DIRECT", "Connections", "Loads", "Paths", "split"]

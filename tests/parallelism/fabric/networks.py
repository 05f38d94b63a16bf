"""Small networks and traffic for tests."""

import itertools
from collections.abc import Sequence

import numpy as np

from evermesh.parallelism.fabric.flows import Flows, Label
from evermesh.parallelism.fabric.paths import DIRECT, Connections, Loads, Paths
from evermesh.parallelism.fabric.wiring import Wiring

GRADIENTS = Label("hdp", "gradients", "all_reduce")


def connections(pairs: Sequence[tuple[int, int, float]]) -> Connections:
    """Of cards: sender, receiver, bytes."""
    source, target, num_bytes = (np.array(column) for column in zip(*pairs, strict=True))
    return Connections.of(Flows((GRADIENTS,), np.zeros(len(pairs), np.int64), source, target, num_bytes.astype(float)))


def ring(order: Sequence[int], rails: Sequence[int], cards: int, num_bytes: float) -> list[tuple[int, int, float]]:
    """A ring over nodes on each of some rails."""
    return [
        (one * cards + rail, other * cards + rail, num_bytes)
        for rail in rails
        for one, other in zip(order, (*order[1:], order[0]), strict=True)
    ]


def best_by_trying_all(paths: Paths, wiring: Wiring, others: Loads | None = None) -> tuple[float, float]:
    """The smallest largest load of a link, seconds, and with it the smallest sum of squares, over all choices of spines."""
    crossing = paths.crossing(wiring)
    usable, leaf = wiring.trunk_bytes_per_s > 0, wiring.port_leaf
    ends = [leaf[port[crossing]] for port in (paths.source_port, paths.target_port)]
    choices = [np.flatnonzero(usable[a] & usable[b]) for a, b in zip(*ends, strict=True)]
    fixed = Loads.of(paths.on(np.full(len(paths), DIRECT)), wiring, others)
    ports = fixed.seconds(wiring)
    loads = np.stack([fixed.up, fixed.down])
    speeds = np.where(usable, wiring.trunk_bytes_per_s, 1.0)
    best, of_ports = (np.inf, np.inf), float((ports.send**2).sum() + (ports.receive**2).sum())
    least = max(float(ports.send.max()), float(ports.receive.max()))
    for chosen in itertools.product(*choices):
        now = loads.copy()
        for side in (0, 1):
            np.add.at(now[side], (ends[side], np.array(chosen, np.int64)), paths.num_bytes[crossing])
        now /= speeds
        best = min(best, (round(max(least, float(now.max())), 12), round(of_ports + float((now**2).sum()), 12)))
    return best

"""What happens without a plan: every stream takes the path that a hash gives it (ECMP), simulated with a seed.

The bond of the card picks the port that sends, the leaf one of its spines, and that spine one of the leaves that the
receiving card is wired to. A leaf that is wired to the receiver delivers at once. Hashes know nothing of loads.
"""

from typing import Literal

import numpy as np
from numpy.random import Generator

from evermesh.parallelism.fabric.paths import DIRECT, Connections, Paths, split
from evermesh.parallelism.fabric.wiring import Bools, Ints, Wiring

Hashed = Literal["ports and spines", "spines"]


def hashed(
    connections: Connections, wiring: Wiring, seed: int, *, parts: int = 1, hashes: Hashed = "ports and spines"
) -> Paths:
    """As many streams as ``split`` makes, on paths that a hash chose.

    ``hashes``: what is left to it; with "spines" ports are pinned left to left and right to right.

    Raises:
        TrafficImpossible: broken links leave two cards without a path.
    """
    pinned, draw = split(connections, wiring, parts), np.random.default_rng(seed)
    if hashes == "spines":
        chosen = pinned.spine.copy()
        crossing = pinned.crossing(wiring)
        chosen[crossing] = drawn_spines(pinned, crossing, wiring, draw)
        return pinned.on(chosen)
    return _through_bonds(connections, pinned, wiring, draw)


def drawn_spines(paths: Paths, streams: Ints, wiring: Wiring, draw: Generator) -> Ints:
    """For each of these streams, whose ports are given, a spine that has links to both of its leaves."""
    ends = (wiring.port_leaf[port[streams]] for port in (paths.source_port, paths.target_port))
    one, other = (wiring.trunk_bytes_per_s[leaf] > 0 for leaf in ends)
    return _drawn(one & other, draw)


def _through_bonds(connections: Connections, pinned: Paths, wiring: Wiring, draw: Generator) -> Paths:
    ports, healthy = _ports_of_cards(wiring)
    senders, receivers = connections.source[pinned.connection], connections.target[pinned.connection]
    usable = wiring.trunk_bytes_per_s > 0
    leaf = wiring.port_leaf[ports]
    reached = np.asarray((usable[leaf] & healthy[..., None]).any(1))
    """By card, by spine: whether it can be reached through it."""
    can_send = healthy[senders] & _connected(leaf, healthy, usable, reached, senders, receivers)
    source_port = ports[senders, _drawn(can_send, draw)]
    source_leaf = wiring.port_leaf[source_port]
    is_direct = ((leaf[receivers] == source_leaf[:, None]) & healthy[receivers]).any(1)
    spine = np.full(len(pinned), DIRECT)
    around = np.flatnonzero(~is_direct)
    spine[around] = _drawn(usable[source_leaf[around]] & reached[receivers[around]], draw)
    arrives = healthy[receivers] & np.where(
        is_direct[:, None], leaf[receivers] == source_leaf[:, None], usable[leaf[receivers], spine[:, None]]
    )
    target_port = ports[receivers, _drawn(arrives, draw)]
    return Paths(pinned.connection, source_port, target_port, pinned.num_bytes, spine)


def _connected(leaf: Ints, healthy: Bools, usable: Bools, reached: Bools, senders: Ints, receivers: Ints) -> Bools:
    """By stream, by port of the sender: whether a path begins there."""
    found = (usable[leaf[senders]] & reached[receivers][:, None]).any(2)
    for side in range(leaf.shape[1]):
        found |= (leaf[senders] == leaf[receivers, side][:, None]) & healthy[receivers, side][:, None]
    return np.asarray(found)


def _ports_of_cards(wiring: Wiring) -> tuple[Ints, Bools]:
    """The ports of every card, padded with its first one; and which of them have a cable."""
    most = max(len(card.ports) for card in wiring.cards)
    ports = np.array([[*card.ports, *card.ports[:1] * (most - len(card.ports))] for card in wiring.cards], np.int64)
    is_own = np.arange(most) < np.array([len(card.ports) for card in wiring.cards])[:, None]
    return ports, np.asarray((wiring.port_bytes_per_s[ports] > 0) & is_own)


def _drawn(allowed: Bools, draw: Generator) -> Ints:
    """For every row one of the columns that are allowed, each as likely."""
    counts = allowed.sum(1)
    which = (draw.random(len(allowed)) * counts).astype(np.int64)
    return np.asarray((allowed.cumsum(1) > which[:, None]).argmax(1), np.int64)


__all__ = ["Hashed", "drawn_spines", "hashed"]

"""In which order nodes take the places of a job, so that as few bytes as can be leave the leaves that nodes share.

Places differ in what their ranks send each other, nodes in the leaves that they are wired to. Nodes wired to the same leaves
are one *block*; bytes between blocks go over spines, and between nodes whose fastest cards are of different classes over the
slower class that both have (Holmes, arXiv 2312.03549): each then counts as often as the fast cards are faster.

To put places into blocks of given sizes is graph partitioning: some orders to start from, the given one among them, then
exchanges of two places while one saves something (Kernighan and Lin 1970, without their sequences). The result is never worse
than the order that was given; where there are few ways to do it, all are tried, and none is better.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from evermesh.parallelism.fabric.exchanges import Collective, Exchange
from evermesh.parallelism.fabric.wiring import Floats
from evermesh.parallelism.topology import Node, Topology

_WORK = 5e7
"""Pairs of places that are looked at for exchanges, for each order that is improved."""
_MOST_TRIED = 5040
"""Ways to put blocks into places, up to which all are tried."""
_FEW_PLACES = 64
"""Up to which all orders are improved; of more places only the best two."""


class Order(NamedTuple):
    """Nodes by place, and the bytes of a step between blocks, those between classes of cards counted as said above."""

    nodes: tuple[int, ...]
    """Indices of the nodes of the topology."""
    crossing_bytes: float
    given_bytes: float
    """In the order that was given."""


def order_nodes(
    topology: Topology, exchanges: Sequence[Exchange], given: Sequence[int] | None = None, *, improves: bool = True
) -> Order:
    """An order of the nodes for a job with these exchanges, whose ranks are numbered node by node.

    ``given`` is the order to improve, by default that of the topology; with ``improves`` off it is only judged. The number
    of devices is the same in every node.
    """
    order = list(given if given is not None else range(len(topology.nodes)))
    devices = topology.nodes[order[0]].devices
    between = bytes_between(exchanges, len(order), devices)
    block_of = _blocks(topology)
    distances = _distances(topology, block_of)
    before = _crossing(between, order, block_of, distances)
    best, least = order, before
    if not improves or len({block_of[node] for node in order}) == 1:
        return Order(tuple(order), before, before)
    for tried in _candidates(order, block_of, between, distances):
        crossing = _crossing(between, tried, block_of, distances)
        if crossing < least * (1 - 1e-9):
            best, least = tried, crossing
    return Order(tuple(best), least, before)


def take_places(
    topology: Topology, exchanges: Sequence[Exchange], given: Sequence[int | None], spares: Sequence[int]
) -> tuple[int, ...]:
    """The nodes of ``given`` in their places, and in those that are None the spares that fit there best, one after the other.

    Raises:
        ValueError: there are fewer spares than free places.
    """
    devices = topology.nodes[0].devices
    between, block_of = bytes_between(exchanges, len(given), devices), _blocks(topology)
    distances, both = _distances(topology, block_of), between + between.T
    found, left = list(given), list(spares)
    for place in [place for place, node in enumerate(given) if node is None]:
        others = [(both[place, at], block_of[node]) for at, node in enumerate(found) if node is not None]
        if not left:
            raise ValueError(f"{len(spares)} spares for {list(given).count(None)} free places")
        best = min(left, key=lambda node: sum(size * distances[block_of[node], block] for size, block in others))
        found[place] = best
        left.remove(best)
    return tuple(node for node in found if node is not None)


def bytes_between(exchanges: Sequence[Exchange], places: int, devices: int) -> Floats:
    """By place, by place: what one sends to the other in a step, collectives as rings in rank order."""
    found = np.zeros((places, places))
    for one in exchanges:
        if isinstance(one, Collective):
            for position, (rank, after) in enumerate(zip(one.ranks, (*one.ranks[1:], one.ranks[0]), strict=True)):
                if rank // devices != after // devices:
                    found[rank // devices, after // devices] += one.wire_bytes(position)
        else:
            np.add.at(found, (one.senders // devices, one.receivers // devices), one.num_bytes)
    return found


def crossing_bytes(between: Floats, blocks: Sequence[int]) -> float:
    """Bytes between places in different blocks."""
    of_place = np.asarray(blocks)
    return float(between[of_place[:, None] != of_place[None, :]].sum())


def _crossing(between: Floats, order: Sequence[int], block_of: Sequence[int], distances: Floats) -> float:
    """The same of an order of nodes, each byte counted as often as its way is slower than within the fast class."""
    blocks = np.array([block_of[node] for node in order])
    return float((between * distances[blocks[:, None], blocks[None, :]]).sum())


def _blocks(topology: Topology) -> list[int]:
    """By node: the number of its block."""
    keys = [frozenset((nic.nic_class, nic.leaves) for nic in node.nics) for node in topology.nodes]
    numbers: dict[object, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def _distances(topology: Topology, block_of: Sequence[int]) -> Floats:
    """By block, by block: how often a byte between them counts."""
    of_block = [topology.nodes[block_of.index(block)] for block in range(1 + max(block_of))]
    speeds = [_speeds(node) for node in of_block]
    found = np.ones((len(of_block), len(of_block)))
    np.fill_diagonal(found, 0.0)
    for one, other in itertools.combinations(range(len(of_block)), 2):
        found[one, other] = found[other, one] = _times_slower(speeds[one], speeds[other])
    return found


def _speeds(node: Node) -> dict[str, float]:
    """Bytes per second of all its cards of each class."""
    found: dict[str, float] = {}
    for nic in node.nics:
        found[nic.nic_class] = found.get(nic.nic_class, 0.0) + nic.bytes_per_s
    return found


def _times_slower(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """Of the way between two nodes: than the fastest cards of the slower of them; 1 where these are of one class."""
    common = [min(one[name], other[name]) for name in one.keys() & other.keys()]
    if not one or not other or not common or _fastest(one) == _fastest(other):
        return 1.0
    return max(1.0, min(max(one.values()), max(other.values())) / max(common))


def _fastest(speeds: Mapping[str, float]) -> str:
    return max(speeds, key=lambda name: speeds[name])


def _candidates(
    order: Sequence[int], block_of: Sequence[int], between: Floats, distances: Floats
) -> Iterator[list[int]]:
    """Orders of which the best is taken; of equally good ones the first."""
    if _ways([block_of[node] for node in order]) <= _MOST_TRIED:
        yield from _arranged(order, block_of)
        return
    starts = list(dict.fromkeys(map(tuple, _starts(order, block_of, between))))
    starts.sort(key=lambda start: _crossing(between, start, block_of, distances))
    for start in starts if len(order) <= _FEW_PLACES else starts[:2]:
        yield _exchanged(start, block_of, between, distances)


def _ways(blocks: Sequence[int]) -> int:
    """In how many ways places can be given to blocks of these sizes."""
    return math.factorial(len(blocks)) // math.prod(map(math.factorial, Counter(blocks).values()))


def _arranged(order: Sequence[int], block_of: Sequence[int]) -> Iterator[list[int]]:
    """All of these ways, with the nodes of a block in the given order."""
    if not order:
        yield []
    firsts: dict[int, int] = {}
    for node in order:
        firsts.setdefault(block_of[node], node)
    for first in firsts.values():
        for rest in _arranged([node for node in order if node != first], block_of):
            yield [first, *rest]


def _starts(order: Sequence[int], block_of: Sequence[int], between: Floats) -> Iterator[list[int]]:
    """The given order, and such as fill one block after the other: in the order of places, or with what belongs together."""
    yield list(order)
    members: dict[int, list[int]] = {}
    for node in order:
        members.setdefault(block_of[node], []).append(node)
    for largest_first in (False, True):
        blocks = sorted(members.values(), key=lambda block: -len(block)) if largest_first else list(members.values())
        yield [node for block in blocks for node in block]
        yield _grown(blocks, between)


def _grown(blocks: Sequence[Sequence[int]], between: Floats) -> list[int]:
    """Fill block after block, each with the free place that exchanges most with those in it."""
    both = between + between.T
    free, found = np.ones(len(both), bool), [0] * len(both)
    for block in blocks:
        pull = np.zeros(len(both))
        for node in block:
            place = int(np.where(free, pull, -1.0).argmax())
            found[place] = node
            free[place] = False
            pull = pull + both[place]
    return found


def _exchanged(order: Sequence[int], block_of: Sequence[int], between: Floats, distances: Floats) -> list[int]:
    """Exchange the two places that save most, as long as some do."""
    both = between + between.T
    nodes, of_place = list(order), np.array([block_of[node] for node in order])
    places = np.arange(len(nodes))
    cost = both @ distances[of_place]
    """By place, by block: what it would cost there, with all others where they are."""
    for _ in range(1 + int(_WORK / len(nodes) ** 2)):
        gain = cost[places, of_place][:, None] - cost[:, of_place]  # if place i went to the block of j
        gain = gain + gain.T - 2 * both * distances[of_place[:, None], of_place[None, :]]
        gain[of_place[:, None] == of_place[None, :]] = -np.inf
        one, other = (int(at) for at in np.unravel_index(gain.argmax(), gain.shape))
        if not gain[one, other] > 1e-9 * both.sum():
            break
        a, b = of_place[one], of_place[other]
        cost += np.outer(both[:, other] - both[:, one], distances[a] - distances[b])
        of_place[one], of_place[other] = b, a
        nodes[one], nodes[other] = nodes[other], nodes[one]
    return nodes


__all__ = ["Order", "bytes_between", "crossing_bytes", "order_nodes", "take_places"]

"""In which order nodes take the places of a job, so that as few bytes as can be leave the leaves that nodes share.

Places differ in what their ranks send each other, nodes in the leaves that they are wired to. Nodes wired to the same leaves
are one *block*; bytes between blocks go over spines. To put places into blocks of given sizes is graph partitioning: some
orders to start from, the given one among them, then exchanges of two places while one saves something (Kernighan and Lin
1970, without their sequences). The result is never worse than the order that was given.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from evermesh.parallelism.fabric.exchanges import Collective, Exchange
from evermesh.parallelism.fabric.wiring import Floats, Ints
from evermesh.parallelism.topology import Topology

_WORK = 5e7
"""Pairs of places that are looked at for exchanges, for each order that is improved."""
_FEW_PLACES = 64
"""Up to which all orders are improved; of more places only the best two."""


class Order(NamedTuple):
    """Nodes by place, and the bytes of a step between blocks."""

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
    before = crossing_bytes(between, [block_of[node] for node in order])
    best, least = order, before
    if not improves or len({block_of[node] for node in order}) == 1:
        return Order(tuple(order), before, before)
    starts = list(dict.fromkeys(map(tuple, _starts(order, block_of, between))))
    starts.sort(key=lambda start: crossing_bytes(between, [block_of[node] for node in start]))
    for start in starts if len(order) <= _FEW_PLACES else starts[:2]:
        improved = _exchanged(start, block_of, between)
        crossing = crossing_bytes(between, [block_of[node] for node in improved])
        if crossing < least * (1 - 1e-9):
            best, least = improved, crossing
    return Order(tuple(best), least, before)


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


def _blocks(topology: Topology) -> list[int]:
    """By node: the number of its block."""
    keys = [tuple((nic.nic_class, nic.leaves) for nic in node.nics) for node in topology.nodes]
    numbers: dict[object, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


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


def _exchanged(order: Sequence[int], block_of: Sequence[int], between: Floats) -> list[int]:
    """Exchange the two places that save most, as long as some do."""
    both = between + between.T
    nodes, of_place = list(order), np.array([block_of[node] for node in order])
    places, blocks = np.arange(len(nodes)), 1 + int(of_place.max())
    pull = np.zeros((len(nodes), blocks))
    """By place, by block: bytes that it exchanges with places in it."""
    np.add.at(pull.T, of_place, both)
    for _ in range(1 + int(_WORK / len(nodes) ** 2)):
        gain = pull[:, of_place] - pull[places, of_place][:, None]  # if place i went to the block of j
        gain = gain + gain.T - 2 * both
        gain[of_place[:, None] == of_place[None, :]] = -np.inf
        one, other = (int(at) for at in np.unravel_index(gain.argmax(), gain.shape))
        if not gain[one, other] > 1e-9 * both.sum():
            break
        _move(pull, both, of_place, (one, other))
        nodes[one], nodes[other] = nodes[other], nodes[one]
    return nodes


def _move(pull: Floats, both: Floats, of_place: Ints, pair: tuple[int, int]) -> None:
    one, other = pair
    a, b = of_place[one], of_place[other]
    change = both[:, other] - both[:, one]
    pull[:, a] += change
    pull[:, b] -= change
    of_place[one], of_place[other] = b, a


__all__ = ["Order", "bytes_between", "crossing_bytes", "order_nodes"]

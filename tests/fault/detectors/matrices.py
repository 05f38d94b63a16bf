"""Delays as they are drawn where detectors of slow networks are compared: 25 % jitter, 10 % heterogeneity for good."""

import numpy as np

from evermesh.fault.detectors.delays import Delays

_JITTER, _HETEROGENEITY, _SAMPLES = 0.25, 0.1, 20


def rings(random: np.random.Generator, nodes: int, count: int) -> np.ndarray:
    """Array [edges, 2]: ``count`` rings over all nodes, in random order, without repeated edges."""
    edges: dict[tuple[int, int], None] = {}
    for _ in range(count):
        order = random.permutation(nodes)
        edges.update(dict.fromkeys(zip(order.tolist(), np.roll(order, -1).tolist(), strict=True)))
    return np.array(list(edges))


def drawn(
    random: np.random.Generator, edges: np.ndarray, what: str, factor: float, *, with_history: bool = False
) -> tuple[Delays, tuple[int, int], str]:
    """Delays of 20 steps in which one ``source``, ``destination``, ``link``, ``node``, or ``nothing``, is slow.

    With them the slow edge, or node twice, and ``what``.
    """
    usual = np.exp(_HETEROGENEITY * random.standard_normal(len(edges)))
    chosen = int(random.integers(len(edges)))
    source, target = edges[chosen].tolist()
    node = target if what == "destination" else source
    slow = {
        "source": edges[:, 0] == node,
        "destination": edges[:, 1] == node,
        "node": (edges == node).any(axis=1),
        "link": np.arange(len(edges)) == chosen,
        "nothing": np.zeros(len(edges), bool),
    }[what]
    seconds = _sampled(random, usual * np.where(slow, factor, 1.0))
    before = _sampled(random, usual) if with_history else None
    place = (source, target) if what == "link" else (node, node)
    return Delays(edges[:, 0], edges[:, 1], seconds, before), place, what


def _sampled(random: np.random.Generator, typical: np.ndarray) -> np.ndarray:
    jitter = np.maximum(1 + _JITTER * random.standard_normal((_SAMPLES, len(typical))), 0.1)
    samples: np.ndarray = typical * jitter
    return samples

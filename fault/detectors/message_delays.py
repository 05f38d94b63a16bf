"""Delays of messages: of every edge between ranks, and between nodes, in one clock.

Delays between nodes count only as far as they are longer than the clocks may be wrong.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors.context import Offset
from evermesh.fault.detectors.joining import Joined
from evermesh.fault.detectors.message_kernels import newest_messages, pair_messages
from evermesh.fault.recorder.trace import UNKNOWN_NODE

MOST_SAMPLES = 64
"""Of an edge."""
_MOST_MESSAGES = 96
"""Of a rank."""
_LEAST_SAMPLES = 6
_KEY, _TRACE, _ENTERED, _ENDED, _BYTES = 0, 2, 4, 5, 6
Edges = Mapping[tuple[int, int], np.ndarray]
"""By source and target, indices of traces: the newest delays, over the median of messages of their size."""


@dataclass(frozen=True, slots=True)
class NodeDelay:
    """How long messages of one node to another take."""

    source: str
    target: str
    ratio: float
    """Times as long as between nodes in the middle."""
    messages: int
    """That were compared."""


def delays_between_nodes(joined: Joined, edges: Edges) -> list[NodeDelay]:
    """Of the ways between nodes that messages took lately: how long these were on theirs, by the names of the nodes."""
    samples: dict[tuple[str, str], list[np.ndarray]] = defaultdict(list)
    for (source, target), of_usual in edges.items():
        nodes = joined.traces[source].node, joined.traces[target].node
        if nodes[0] != nodes[1]:
            samples[nodes].append(of_usual)
    levels = {nodes: float(np.median(np.concatenate(parts))) for nodes, parts in samples.items()}
    middle = float(np.median(list(levels.values()))) if levels else 1.0
    return [
        NodeDelay(source, target, levels[source, target] / middle, sum(map(len, parts)))
        for (source, target), parts in sorted(samples.items())
    ]


def edges_of(joined: Joined, offsets: Mapping[str, Offset]) -> Edges:
    """The edges that enough messages took; ``offsets``: of the clocks of nodes."""
    messages, errors_ns = _messages(joined, offsets)
    order = np.argsort(messages[:, _KEY], kind="stable")
    pairs = np.empty((len(order), 2), np.int64)
    pairs = pairs[: pair_messages(messages, order, pairs)]
    entered, ended = messages[:, _ENTERED], messages[:, _ENDED]
    ready = (entered[pairs[:, 1]] <= entered[pairs[:, 0]]) & (
        ended[pairs[:, 1]] > 0
    )  # else it may have come long before
    sent, received = messages[pairs[ready, 0]], messages[pairs[ready, 1]]
    if not len(sent):
        return {}
    seconds = np.maximum(received[:, _ENDED] - sent[:, _ENTERED], 1) / 1e9
    _, size = np.unique(received[:, _BYTES], return_inverse=True)
    usual = np.array([np.median(seconds[size == index]) for index in range(size.max() + 1)])
    of_usual = seconds / usual[size]
    sources, targets = sent[:, _TRACE], received[:, _TRACE]
    edge = sources * len(joined.traces) + targets
    by_edge = np.lexsort((received[:, _ENTERED], edge))
    found = {}
    for chosen in np.split(by_edge, np.flatnonzero(np.diff(edge[by_edge])) + 1):
        source, target = int(sources[chosen[0]]), int(targets[chosen[0]])
        is_near = joined.traces[source].node == joined.traces[target].node
        error_s = 0.0 if is_near else float(errors_ns[source] + errors_ns[target]) / 1e9
        if len(chosen) >= _LEAST_SAMPLES and (is_near or np.median(seconds[chosen]) > 3 * error_s):
            found[source, target] = of_usual[chosen][-MOST_SAMPLES:]
    return found


def _messages(joined: Joined, offsets: Mapping[str, Offset]) -> tuple[np.ndarray, np.ndarray]:
    """What all ranks sent and received lately, in one clock, and array [traces]: by what the clock of each may be wrong.

    Ranks whose clock is not known are left out, where there are several clocks.
    """
    is_one = len({trace.node for trace in joined.traces}) == 1 and joined.traces[0].node != UNKNOWN_NODE
    rows = np.empty((sum(min(_MOST_MESSAGES, len(trace.records)) for trace in joined.traces), 7), np.int64)
    errors_ns, count = np.zeros(len(joined.traces)), 0
    for trace, state in enumerate(joined.traces):
        offset = Offset(0, 0) if is_one else offsets.get(state.node)
        if offset is None:
            continue
        errors_ns[trace] = offset.error_ns
        local, places = joined.local_groups[trace], joined.places[trace]
        most = _MOST_MESSAGES
        words = joined.words(trace)
        count = newest_messages(words, local, places, joined.sizes, trace, offset.offset_ns, most, rows, count)
    return rows[:count], errors_ns

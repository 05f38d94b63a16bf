"""By how much the clocks of nodes differ, from the collectives themselves, as intervals that hold the truth.

Nobody leaves a two-sided collective before everybody has entered it. So with stamps s (entered) and e (ended) of node i
and j, ``s_i - e_j <= o_i - o_j <= e_i - s_j`` in every collective. A request and its answer bound the difference
likewise. Clocks drift, so the difference is a line over time that lies between all lower and all upper bounds; what
such lines reach at one moment is the interval. It holds the truth for as long as the drift is steady, whatever the
network does.
"""

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors.context import Offset
from evermesh.fault.detectors.joining import Joined
from evermesh.fault.detectors.line_kernels import reach_of_lines
from evermesh.fault.detectors.matching import Matched
from evermesh.fault.recorder.record import OPERATIONS, TWO_SIDED
from evermesh.fault.recorder.trace import UNKNOWN_NODE

MOST_DRIFT = 1e-3
"""Clocks of working machines drift less, by far."""
_MOST_ROWS, _LEAST_ROWS = 256, 4
_MOST_GROUPS = 2
"""Of the same nodes."""
_MANY_NODES = 256
_TWO_SIDED = np.array([OPERATIONS.index(name) for name in sorted(TWO_SIDED)])


@dataclass(frozen=True, slots=True)
class Bounds:
    """What is known of the difference of two clocks: at some moments it is between a lower and an upper bound."""

    at_ns: np.ndarray
    """Array [moments] of float64, in either clock: the difference hardly matters."""
    lower_ns: np.ndarray
    upper_ns: np.ndarray
    guess_ns: np.ndarray
    """Array [moments]: what the difference most likely was."""

    def joined_with(self, other: "Bounds") -> "Bounds":
        """What both say."""
        pairs = zip(
            (self.at_ns, self.lower_ns, self.upper_ns, self.guess_ns),
            (other.at_ns, other.lower_ns, other.upper_ns, other.guess_ns),
            strict=True,
        )
        return Bounds(*(np.concatenate(pair) for pair in pairs))


@dataclass(frozen=True, slots=True)
class Difference:
    """Difference of two clocks at one moment."""

    low_ns: float
    high_ns: float
    """The truth is not outside of these two."""
    point_ns: float
    drift: float
    """Seconds per second, as it seems."""


def bounds_of_collectives(
    entered_i_ns: np.ndarray, ended_i_ns: np.ndarray, entered_j_ns: np.ndarray, ended_j_ns: np.ndarray
) -> Bounds:
    """From two-sided collectives that both took part in, arrays [collectives], each in its own clock."""
    stamps = [np.asarray(stamp, np.int64) for stamp in (entered_i_ns, ended_i_ns, entered_j_ns, ended_j_ns)]
    entered_i, ended_i, entered_j, ended_j = stamps
    at, lower, upper = ended_j, entered_i - ended_j, ended_i - entered_j
    return Bounds(*(values.astype(np.float64) for values in (at, lower, upper, ended_i - ended_j)))


def bounds_of_round_trips(
    asked_i_ns: np.ndarray, got_j_ns: np.ndarray, answered_j_ns: np.ndarray, heard_i_ns: np.ndarray
) -> Bounds:
    """From requests that i sent and j answered, arrays [requests]: of clock i minus clock j."""
    stamps = [np.asarray(stamp, np.int64) for stamp in (asked_i_ns, got_j_ns, answered_j_ns, heard_i_ns)]
    asked, got, answered, heard = stamps
    lower, upper = asked - got, heard - answered
    return Bounds(*(values.astype(np.float64) for values in (got, lower, upper, (lower + upper) / 2)))


def difference(bounds: Bounds, at_ns: float) -> Difference | None:
    """Difference of the clocks at a moment; None if no line lies between the bounds: a clock was set meanwhile."""
    if not len(bounds.at_ns):
        return None
    times = bounds.at_ns - at_ns
    middle = float(np.median(bounds.guess_ns))
    lower, upper = bounds.lower_ns - middle, bounds.upper_ns - middle
    bottom, top, least, most = reach_of_lines(times, lower, upper, MOST_DRIFT)
    if bottom > top:
        return None
    slack = 2.0 + 4e-9 * (top - bottom)  # of the search, and of rounded stamps
    drift = min(max(_slope(times, bounds.guess_ns - middle), least), most)
    point = float(np.median(bounds.guess_ns - middle - drift * times))
    point = min(max(point, bottom), top)
    return Difference(bottom - slack + middle, top + slack + middle, point + middle, drift)


def _slope(times: np.ndarray, values: np.ndarray) -> float:
    """Slope through most of the values: the median of those between the first and the second half."""
    half = len(times) // 2
    if half == 0:
        return 0.0
    order = np.argsort(times, kind="stable")
    first, second = order[:half], order[-half:]
    spans = times[second] - times[first]
    spans[spans == 0] = np.inf
    return float(np.median((values[second] - values[first]) / spans))


def estimate_offsets(joined: Joined, matched: Matched) -> dict[str, Offset]:
    """Offsets of all nodes next to the first one, as far as collectives connect them; a node that none does is left out.

    ``matched`` holds the stamps as they are. The offset is that of the middle of the records; over them the clocks also drift
    apart, by what is part of the error.
    """
    nodes = list(dict.fromkeys(trace.node for trace in joined.traces))
    if not nodes or UNKNOWN_NODE in nodes:
        return {}
    index_of = {node: index for index, node in enumerate(nodes)}
    node_of = np.array([index_of[trace.node] for trace in joined.traces])
    edges: dict[int, dict[int, tuple[float, float]]] = defaultdict(dict)
    for (one, other), bounds in _bounds_of_nodes(joined, matched, node_of).items():
        middle = float((bounds.at_ns.min() + bounds.at_ns.max()) / 2)
        span = float(bounds.at_ns.max() - bounds.at_ns.min()) / 2
        found = difference(bounds, middle)
        if found is None:
            continue
        error = max(found.high_ns - found.point_ns, found.point_ns - found.low_ns) + abs(found.drift) * span
        edges[one][other] = (-found.point_ns, error)
        edges[other][one] = (found.point_ns, error)
    return {
        nodes[node]: Offset(round(offset), int(np.ceil(error))) for node, (offset, error) in _reached(edges).items()
    }


def _reached(edges: dict[int, dict[int, tuple[float, float]]]) -> dict[int, tuple[float, float]]:
    """Offset and error of every node that is connected with node 0, by the way with the least error."""
    found: dict[int, tuple[float, float]] = {}
    queue = [(0.0, 0, 0.0)]
    while queue:
        error, node, offset = heapq.heappop(queue)
        if node in found:
            continue
        found[node] = (offset, error)
        for other, (step, more) in edges[node].items():
            if other not in found:
                heapq.heappush(queue, (error + more, other, offset + step))
    return found


def _bounds_of_nodes(joined: Joined, matched: Matched, node_of: np.ndarray) -> dict[tuple[int, int], Bounds]:
    """Bounds of the first node of a group next to other nodes in it, from its last collectives.

    Groups of few nodes come first, since less noise is between their ranks; large ones only connect what is not connected.
    """
    found: dict[tuple[int, int], Bounds] = {}
    times_met: dict[tuple[int, ...], int] = defaultdict(int)
    different = [tuple(np.unique(node_of[members[members >= 0]]).tolist()) for members in joined.members]
    component = np.arange(int(node_of.max()) + 1)
    for group in sorted(range(len(different)), key=lambda group: (len(different[group]), group)):
        nodes = different[group]
        if len(nodes) < 2 or times_met[nodes] >= _MOST_GROUPS:
            continue
        if len(nodes) > _MANY_NODES:
            _, firsts = np.unique(component[list(nodes)], return_index=True)
            nodes = tuple(nodes[place] for place in sorted(firsts.tolist()))
        stamps = _stamps_of_nodes(joined, matched, node_of, group, nodes) if len(nodes) > 1 else None
        if stamps is None:
            continue
        times_met[different[group]] += 1
        first = nodes[0]
        for node in nodes[1:]:
            bounds = bounds_of_collectives(*stamps[first], *stamps[node])
            known = found.get((first, node))
            found[first, node] = bounds if known is None else known.joined_with(bounds)
        component[np.isin(component, component[list(nodes)])] = component[first]
    return found


def _stamps_of_nodes(
    joined: Joined, matched: Matched, node_of: np.ndarray, group: int, nodes: Sequence[int]
) -> dict[int, tuple[np.ndarray, np.ndarray]] | None:
    """By node, arrays [collectives]: when its last rank entered, and when its first one left; None: too little is known."""
    members = joined.members[group]
    present = np.flatnonzero(members >= 0)
    of = node_of[members[present]]
    chosen = np.isin(of, nodes)
    columns, of = present[chosen], of[chosen]
    entered, ended = (
        matched.cells(group, table)[-_MOST_ROWS:][:, columns] for table in (matched.entered_at, matched.ended_at)
    )
    operations = matched.operations(matched.rows(group))[-_MOST_ROWS:]
    usable = np.isin(operations, _TWO_SIDED) & (entered > 0).all(axis=1) & (ended > 0).all(axis=1)
    usable &= matched.flags[matched.rows(group)][-_MOST_ROWS:] == 0
    if usable.sum() < _LEAST_ROWS:
        return None
    entered, ended = entered[usable], ended[usable]
    return {node: (entered[:, of == node].max(axis=1), ended[:, of == node].min(axis=1)) for node in nodes}

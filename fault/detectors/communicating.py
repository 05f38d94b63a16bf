"""Communication that is slow: groups next to those of their like, and messages in a delay matrix.

How long a collective takes by itself is how long the last to enter was inside; that compares no clocks. Delays of messages between
nodes do, and count only as far as they are longer than the clocks may be wrong.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors import kinds
from evermesh.fault.detectors.context import Offset
from evermesh.fault.detectors.delays import Blamed, Delays, blame
from evermesh.fault.detectors.joining import Joined
from evermesh.fault.detectors.matching import Matched
from evermesh.fault.events import Finding
from evermesh.fault.recorder.record import OPERATIONS
from evermesh.fault.recorder.trace import UNKNOWN_NODE

_LEAST_ROWS = 6
_LEAST_GROUPS = 4
_LEAST_RATIO = 1.4
_LEAST_SCORE = 6.0
_SPREAD_FLOOR = 0.05
_COMMON = 0.3
_MOST_SAMPLES = 64
_LEAST_SAMPLES = 6
_LEAST_EDGES = 6
_SEND, _RECEIVE = OPERATIONS.index("send"), OPERATIONS.index("receive")


@dataclass(frozen=True, slots=True)
class _SlowGroup:
    group: int
    ratio: float
    score: float
    nodes: frozenset[str]


def find_slow_groups(joined: Joined, matched: Matched) -> list[Finding]:
    """Groups whose collectives take longer than those of other groups of the same axis that span as many nodes."""
    transfers = matched.transfers_ns()
    classes: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    nodes = [_nodes_of(joined, group) for group in range(len(joined.groups))]
    for group, of in enumerate(joined.groups):
        if of.axis and (joined.members[group] >= 0).all():
            classes[of.axis, len(of.ranks), len(nodes[group])].append(group)
    found: list[Finding] = []
    for alike in classes.values():
        if len(alike) < _LEAST_GROUPS:
            continue
        levels = _levels(matched, transfers, alike)
        known = ~np.isnan(levels)
        if known.sum() < _LEAST_GROUPS:
            continue
        middle = float(np.median(levels[known]))
        spread = max(1.4826 * float(np.median(np.abs(levels[known] - middle))), _SPREAD_FLOOR)
        slow = [
            _SlowGroup(group, float(np.exp(level - middle)), float((level - middle) / spread), nodes[group])
            for group, level in zip(alike, levels.tolist(), strict=True)
            if level - middle > max(np.log(_LEAST_RATIO), _LEAST_SCORE * spread)
        ]
        if slow and len(slow) <= max(1, _COMMON * known.sum()):
            usual = frozenset[str]().union(
                *(nodes[group] for group in alike if group not in {one.group for one in slow})
            )
            found += _placed(joined, slow, usual)
    return found


def _nodes_of(joined: Joined, group: int) -> frozenset[str]:
    return frozenset(joined.traces[trace].node for trace in joined.members[group].tolist() if trace >= 0)


def _levels(matched: Matched, transfers: np.ndarray, groups: list[int]) -> np.ndarray:
    """Array [groups]: how much longer, as a logarithm, collectives of a group take than those of all of the same kind."""
    by_kind: dict[tuple[int, int], dict[int, float]] = defaultdict(dict)
    for group in groups:
        rows = matched.rows(group)
        times = transfers[rows]
        keys = matched.reference[rows]
        usable = (times > 0) & (matched.flags[rows] == 0)
        for bytes_, what in np.unique(keys[usable], axis=0).tolist():
            chosen = usable & (keys[:, 0] == bytes_) & (keys[:, 1] == what)
            if chosen.sum() >= _LEAST_ROWS:
                by_kind[bytes_, what][group] = float(np.median(np.log(times[chosen])))
    collected: dict[int, list[float]] = defaultdict(list)
    for of_groups in by_kind.values():
        middle = float(np.median(list(of_groups.values())))
        for group, level in of_groups.items():
            collected[group].append(level - middle)
    return np.array([float(np.median(collected[group])) if group in collected else np.nan for group in groups])


def _placed(joined: Joined, slow: list[_SlowGroup], usual: frozenset[str]) -> Iterator[Finding]:
    """One finding for the one node that all slow groups share and no other group has, else one for every group."""
    shared = frozenset.intersection(*(one.nodes for one in slow)) - usual
    worst = max(slow, key=lambda one: one.score)
    names = ", ".join(joined.groups[one.group].name for one in slow[:4]) + (" and others" if len(slow) > 4 else "")
    if len(shared) == 1:
        [node] = shared
        yield Finding(
            kind=kinds.SLOW_NODE,
            node=node,
            text=f"collectives of {names} take {worst.ratio:.2f} times as long as those of other groups of their axis, although "
            f"nobody is late; of their nodes only {node} is in no other group",
            evidence={"ratio": round(worst.ratio, 3), "score": round(worst.score, 1), "groups": len(slow)},
            confidence=0.8,
        )
        return
    for one in slow:
        group = joined.groups[one.group]
        yield Finding(
            kind=kinds.SLOW_GROUP,
            group=group.name,
            text=f"collectives of group {group.name} take {one.ratio:.2f} times as long as those of other groups of axis "
            f"{group.axis}, although nobody is late",
            evidence={"ratio": round(one.ratio, 3), "score": round(one.score, 1), "nodes": sorted(one.nodes)[:64]},
            confidence=0.7,
        )


def find_slow_messages(joined: Joined, offsets: Mapping[str, Offset]) -> list[Finding]:
    """The source, destination or link whose messages are slow, among the ranks that send any."""
    edges = _edges(joined, offsets)
    if len(edges) < _LEAST_EDGES:
        return []
    sources, targets = np.array(list(edges)).T
    samples = np.full((_MOST_SAMPLES, len(edges)), np.nan)
    for column, values in enumerate(edges.values()):
        samples[: len(values), column] = values
    crosses = np.array([joined.traces[a].node != joined.traces[b].node for a, b in edges])
    for is_far in (False, True):
        chosen = crosses == is_far
        if chosen.sum() >= _LEAST_EDGES:
            found = blame(Delays(sources[chosen], targets[chosen], samples[:, chosen]))
            if found is not None:
                return [_of_messages(joined, found)]
    return []


def _edges(joined: Joined, offsets: Mapping[str, Offset]) -> dict[tuple[int, int], np.ndarray]:
    """By source and target, indices of traces: the newest delays, over the median of messages of their size."""
    found: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
    for target, trace in enumerate(joined.traces):
        records = trace.records
        received = records[(records["operation"] == _RECEIVE) & (records["ended_ns"] > 0)]
        for local, peer in np.unique(np.stack([received["group"], received["peer"]], axis=1), axis=0).tolist():
            group = int(joined.local_groups[target][local]) if local < len(joined.local_groups[target]) else -1
            if group < 0 or not 0 <= peer < len(joined.members[group]) or joined.members[group][peer] < 0:
                continue
            source = int(joined.members[group][peer])
            own = received[(received["group"] == local) & (received["peer"] == peer)][-_MOST_SAMPLES:]
            delays = _delays(joined, group, source, target, own, offsets)
            if delays is not None and len(delays[0]) >= _LEAST_SAMPLES:
                found[source, target] = delays
    sizes = np.concatenate([of[1] for of in found.values()]) if found else np.zeros(0)
    values = np.concatenate([of[0] for of in found.values()]) if found else np.zeros(0)
    usual = {size: float(np.median(values[sizes == size])) for size in np.unique(sizes).tolist()}
    return {
        edge: seconds / np.array([usual[size] for size in of_sizes.tolist()])
        for edge, (seconds, of_sizes) in found.items()
    }


def _delays(
    joined: Joined, group: int, source: int, target: int, received: np.ndarray, offsets: Mapping[str, Offset]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Delays in seconds and sizes of messages; None where the clocks of the two are not known well enough."""
    here, there = joined.traces[target].node, joined.traces[source].node
    shift_ns, error_ns = 0, 0
    if here != there or here == UNKNOWN_NODE:
        if here not in offsets or there not in offsets:
            return None
        shift_ns = offsets[here].offset_ns - offsets[there].offset_ns
        error_ns = offsets[here].error_ns + offsets[there].error_ns
    place = int(joined.places[target][joined.local_groups[target] == group][0])
    records = joined.traces[source].records
    local = np.flatnonzero(joined.local_groups[source] == group)
    sent = records[(records["operation"] == _SEND) & (records["peer"] == place) & np.isin(records["group"], local)]
    _, ours, theirs = np.intersect1d(received["number"], sent["number"], return_indices=True)
    began = np.maximum(
        received["entered_ns"][ours].astype(np.int64), sent["entered_ns"][theirs].astype(np.int64) + shift_ns
    )
    seconds = (received["ended_ns"][ours].astype(np.int64) - began) / 1e9
    was_there = received["entered_ns"][ours].astype(np.int64) <= sent["entered_ns"][theirs].astype(np.int64) + shift_ns
    seconds, sizes = seconds[was_there], received["num_bytes"][ours][was_there]  # else it may have come long before
    if not len(seconds) or float(np.median(seconds)) * 1e9 < 3 * error_ns:
        return None
    return np.maximum(seconds, 1e-9), sizes


def _of_messages(joined: Joined, found: Blamed) -> Finding:
    source, target = joined.traces[found.source], joined.traces[found.target]
    kind = {"source": kinds.SLOW_SOURCE, "destination": kinds.SLOW_DESTINATION, "node": kinds.SLOW_NODE}.get(
        found.what, kinds.SLOW_LINK
    )
    what = {
        "source": f"messages from {joined.where(found.source)}",
        "destination": f"messages to {joined.where(found.source)}",
        "node": f"messages from and to {joined.where(found.source)}",
        "link": f"messages from {joined.where(found.source)} to {joined.where(found.target)}",
    }[found.what]
    unclear = "; it sends to nobody else, so it may be either of the two" if found.is_ambiguous else ""
    is_link = found.what == "link"
    return Finding(
        kind=kind,
        rank=None if is_link else source.rank,
        node=None if is_link and source.node != target.node else joined.node(found.source),
        link=(min(source.rank, target.rank), max(source.rank, target.rank)) if is_link else None,
        text=f"{what} take {found.ratio:.2f} times as long as others of their size{unclear}",
        evidence={
            "ratio": round(found.ratio, 3),
            "score": round(found.score, 1),
            "edges": found.edges,
            "from": source.rank,
            "to": target.rank,
        },
        confidence=0.5 if found.is_ambiguous else 0.85,
    )

"""Communication that is slow: groups next to those of their like, and messages in a delay matrix.

How long a collective takes by itself is how long the last to enter was inside; that compares no clocks.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors import kinds
from evermesh.fault.detectors.delays import Blamed, Delays, blame
from evermesh.fault.detectors.joining import Joined
from evermesh.fault.detectors.matching import Matched
from evermesh.fault.detectors.message_delays import MOST_SAMPLES, Edges
from evermesh.fault.detectors.spreads import deviation
from evermesh.fault.events import Finding
from evermesh.fault.mixing import MIXER

_LEAST_ROWS, _MOST_ROWS = 6, 64
_LEAST_GROUPS = 4
_LEAST_RATIO = 1.4
_LEAST_SCORE = 6.0
_SPREAD_FLOOR, _SPREAD_OF_FEW = 0.05, 0.6
"""The second over the number of groups: of four nobody knows how much they differ by themselves, as on busy processors."""
_COMMON = 0.3
_LEAST_EDGES = 6


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
        spread = max(deviation(levels[known], middle), _SPREAD_FLOOR, _SPREAD_OF_FEW / known.sum())
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
    keys, logs = np.zeros((len(groups), _MOST_ROWS), np.uint64), np.zeros((len(groups), _MOST_ROWS))
    for index, group in enumerate(groups):
        rows = matched.rows(group)
        rows = slice(max(rows.start, rows.stop - _MOST_ROWS), rows.stop)
        count, usable = rows.stop - rows.start, (transfers[rows] > 0) & (matched.flags[rows] == 0)
        reference = matched.reference[rows]
        keys[index, :count] = np.where(usable, (reference[:, 0] * MIXER ^ reference[:, 1]) | np.uint64(1), 0)
        logs[index, :count] = np.log(np.maximum(transfers[rows], 1))
    of_kinds = []
    for kind in np.unique(keys[keys > 0]).tolist():
        chosen = keys == np.uint64(kind)
        counts = chosen.sum(axis=1)
        ordered = np.sort(np.where(chosen, logs, np.inf), axis=1)
        middles = ordered[np.arange(len(groups)), np.maximum(counts - 1, 0) // 2]
        known = counts >= _LEAST_ROWS
        if known.any():
            of_kinds.append(np.where(known, middles - np.median(middles[known]), np.nan))
    if not of_kinds:
        return np.full(len(groups), np.nan)
    table = np.sort(np.array(of_kinds), axis=0)  # not a number comes last
    counts = (~np.isnan(table)).sum(axis=0)
    levels: np.ndarray = table[np.maximum(counts - 1, 0) // 2, np.arange(len(groups))]
    return levels


def _placed(joined: Joined, slow: list[_SlowGroup], usual: frozenset[str]) -> Iterator[Finding]:
    """One finding for the one node that all slow groups share and no other group has, else one for every group; one of two
    ranks is the link between them."""
    shared = frozenset.intersection(*(one.nodes for one in slow)) - usual
    worst = max(slow, key=lambda one: one.score)
    names = ", ".join(joined.groups[one.group].name for one in slow[:4]) + (" and others" if len(slow) > 4 else "")
    if len(shared) == 1:
        [node] = shared
        yield Finding(
            kind=kinds.SLOW_NODE,
            node=node,
            text=f"collectives of {names} take {worst.ratio:.2f} times as long as those of other groups of their axis, "
            f"although nobody is late; of their nodes only {node} is in no other group",
            evidence={"ratio": round(worst.ratio, 3), "score": round(worst.score, 1), "groups": len(slow)},
            confidence=0.8,
        )
        return
    for one in slow:
        group = joined.groups[one.group]
        link = (min(group.ranks), max(group.ranks)) if len(group.ranks) == 2 else None
        where = f", and all that passes in it is between ranks {link[0]} and {link[1]}" if link else ""
        yield Finding(
            kind=kinds.SLOW_LINK if link else kinds.SLOW_GROUP,
            group=group.name,
            link=link,
            node=joined.node(int(joined.members[one.group][0])) if link and len(one.nodes) == 1 else None,
            text=f"collectives of group {group.name} take {one.ratio:.2f} times as long as those of other groups of axis "
            f"{group.axis}, although nobody is late{where}",
            evidence={"ratio": round(one.ratio, 3), "score": round(one.score, 1), "nodes": sorted(one.nodes)[:64]},
            confidence=0.7,
        )


def find_slow_messages(joined: Joined, edges: Edges) -> list[Finding]:
    """The source, destination or link whose messages are slow, among the ranks that send any."""
    if len(edges) < _LEAST_EDGES:
        return []
    sources, targets = np.array(list(edges)).T
    samples = np.full((MOST_SAMPLES, len(edges)), np.nan)
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

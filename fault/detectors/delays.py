"""The delay matrix: which source, destination or link is slow, from delays of messages between nodes or ranks.

A slow source makes a row of the matrix slow, a slow destination a column, a slow link a cell. Cells are pooled: the sum
of the scores of a row over the root of their number is a score too, and the highest of all rows, columns and cells is
the finding. What cells differ by for good is taken out by their own history, where there is one. In one ring every node
sends to one other, and the three cannot be told apart: ``second_permutation`` says which messages a probe has to send.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from evermesh.fault.detectors.spreads import deviation

_LEAST_SCORE, _LEAST_SCORE_OF_CELL = 4.6, 4.75
_LEAST_SCORE_OF_DIFFERENCES = 5.1
"""Next to their history cells differ by what both differ by chance, and what is slow stands out more."""
_LEAST_LOG = math.log(1.2)
_TRIMMED = 0.05
_USUAL, _OF_USUAL = 3.0, 1.0135
"""Standard deviations within which cells are usual, and by how much theirs is less than that of all."""
_SHARED = 0.6
"""Of the cells of a row that is to blame, at least so many are slow."""
_SLOW_CELL = 1.5


@dataclass(frozen=True, slots=True)
class Delays:
    """Delays of messages, by directed edge."""

    sources: np.ndarray
    """Array [edges]."""
    targets: np.ndarray
    seconds: np.ndarray
    """Array [samples, edges], divided by what is usual for the size; not a number where there is none."""
    before: np.ndarray | None = None
    """The same of a time when all was well."""


@dataclass(frozen=True, slots=True)
class Blamed:
    """What explains the delays best."""

    what: Literal["source", "destination", "link", "node"]
    source: int
    """Of a link its source; else the node itself."""
    target: int
    ratio: float
    score: float
    edges: int
    """That were measured of it."""
    is_ambiguous: bool
    """Source, destination and link cannot be told apart: too few edges were measured."""


def blame(delays: Delays) -> Blamed | None:
    """Say what is slow; None: nothing is, as far as can be told."""
    logs = _levels(delays.seconds)
    if delays.before is not None:
        logs = logs - _levels(delays.before)
    known = ~np.isnan(logs)
    sources, targets, logs = delays.sources[known], delays.targets[known], logs[known]
    if len(logs) < 4:
        return None
    logs = logs - np.median(logs)
    scores = logs / _spread(logs)
    least = _LEAST_SCORE if delays.before is None else _LEAST_SCORE_OF_DIFFERENCES
    size = int(max(sources.max(), targets.max())) + 1
    rows, columns = (_pooled(of, scores, size) for of in (sources, targets))
    best_row, best_column, best_cell = int(rows.argmax()), int(columns.argmax()), int(scores.argmax())
    found = max(
        (float(rows[best_row]), 2, "source"),
        (float(columns[best_column]), 1, "destination"),
        (float(scores[best_cell]), 3, "link"),
    )
    if found[0] < least:
        return None
    at = {"source": sources == best_row, "destination": targets == best_column}.get(found[2])
    if at is None or (scores[at] > _SLOW_CELL).mean() < _SHARED or at.sum() == 1:
        return _link(sources, targets, logs, scores, best_cell)
    node = best_row if found[2] == "source" else best_column
    ratio = float(np.exp(logs[at].mean()))
    if math.log(ratio) < _LEAST_LOG:
        return None
    other = columns[node] if found[2] == "source" else rows[node]
    if other >= _LEAST_SCORE:
        both = (sources == node) | (targets == node)
        return Blamed("node", node, node, float(np.exp(logs[both].mean())), found[0], int(both.sum()), False)
    what: Literal["source", "destination"] = "source" if found[2] == "source" else "destination"
    return Blamed(what, node, node, ratio, found[0], int(at.sum()), False)


def _link(sources: np.ndarray, targets: np.ndarray, logs: np.ndarray, scores: np.ndarray, cell: int) -> Blamed | None:
    if scores[cell] < _LEAST_SCORE_OF_CELL or logs[cell] < _LEAST_LOG:
        return None
    source, target = int(sources[cell]), int(targets[cell])
    alone = min(int((sources == source).sum()), int((targets == target).sum())) == 1
    return Blamed("link", source, target, float(np.exp(logs[cell])), float(scores[cell]), 1, alone)


def _levels(seconds: np.ndarray) -> np.ndarray:
    """Logarithm of the typical delay of every edge: of the mean without the extremes."""
    ordered = np.sort(seconds, axis=0)  # not a number comes last
    counts = (~np.isnan(ordered)).sum(axis=0)
    cut = (counts * _TRIMMED).astype(np.int64)
    place = np.arange(len(ordered))[:, None]
    inside = (place >= cut) & (place < counts - cut)
    with np.errstate(invalid="ignore", divide="ignore"):
        means: np.ndarray = np.where(inside, ordered, 0).sum(axis=0) / inside.sum(axis=0)
    return np.log(np.maximum(means, 1e-12))


def _spread(logs: np.ndarray) -> float:
    """Standard deviation of the cells that are not slow."""
    rough = deviation(logs, 0.0)
    usual = logs[np.abs(logs) <= _USUAL * rough]
    return max(float(usual.std()) * _OF_USUAL, 0.01)


def _pooled(of: np.ndarray, scores: np.ndarray, size: int) -> np.ndarray:
    counts = np.bincount(of, minlength=size)
    sums = np.bincount(of, weights=scores, minlength=size)
    found: np.ndarray = np.where(counts > 0, sums / np.sqrt(np.maximum(counts, 1)), -np.inf)
    return found


def second_permutation(ring: Sequence[int]) -> list[tuple[int, int]]:
    """Messages, from and to, of a probe that shares none with ``ring``: every member sends to one and receives from another.

    Two members have no other permutation; theirs is returned again.
    """
    size = len(ring)
    if size < 3:
        return [(ring[place], ring[(place + 1) % size]) for place in range(size)]
    wanted = max(2, round(size * 0.382))
    stride = min(range(2, size), key=lambda stride: (math.gcd(stride, size) > 1, abs(stride - wanted)))
    return [(ring[place], ring[(place + stride) % size]) for place in range(size)]

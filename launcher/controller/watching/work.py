"""How long plans let every rank compute, in the measure of this job: what they explain is nobody's fault.

A cost model that was not calibrated may be far off, and rank after rank in the same direction. So the coefficients are taken
from what all ranks have measured, the same ones for all ranks of a stage: seconds = a work alone + b work in rings (much of
which hides behind communication) + c tokens + d micro-batches + e rings + f. What no such coefficients explain is the rank's
own.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np

from evermesh.fault.detectors import kernels
from evermesh.fault.detectors.summaries import RankSummary
from evermesh.launcher.controller.watching.expected import Planned

_FEATURES = 6
_LEAST_STEPS = 6


class Work:
    """Of one generation of ``num_ranks`` ranks; used by one thread."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._seconds: dict[int, np.ndarray] = {}
        """By step: array [ranks], not a number where nobody has measured."""

    def note(self, summaries: Sequence[RankSummary]) -> None:
        """Take what ranks measured in the steps that they have behind them."""
        for summary in summaries:
            rows = np.flatnonzero(summary.of_step[:-1, kernels.COUNT] > 0)
            for row in rows.tolist():
                of_step = self._seconds.setdefault(summary.first_step + row, np.full(self._num_ranks, np.nan))
                of_step[summary.tail.rank] = summary.of_step[row, kernels.TRAIN_NS] / 1e9

    def explained_s(self, plans: Mapping[int, Planned]) -> dict[tuple[int, int], float]:
        """By rank and step: how long it is expected to compute; ranks without work are left out."""
        for step in [step for step in self._seconds if plans and step < min(plans)]:
            del self._seconds[step]
        steps = sorted(plans)
        if not steps:
            return {}
        features = np.stack([_features(plans[step]) for step in steps])
        seconds = np.stack([self._seconds.get(step, np.full(self._num_ranks, np.nan)) for step in steps])
        stages = np.arange(self._num_ranks) // plans[steps[-1]].mesh.stage_size
        expected = np.empty(seconds.shape)
        for stage in np.unique(stages).tolist():
            chosen = stages == stage
            expected[:, chosen] = _fitted(features[:, chosen], seconds[:, chosen])
        has_work = _work_s(features) > 0
        found = np.argwhere(has_work & (expected > 0)).tolist()
        return {(rank, steps[index]): float(expected[index, rank]) for index, rank in found}


def _features(plan: Planned) -> np.ndarray:
    """Array [ranks, features]."""
    of_hdp = np.array([*plan.step.columns, [1] * plan.mesh.hdp], np.float64).T
    hdp = [plan.mesh.coordinates(rank).hdp for rank in range(plan.mesh.size)]
    return of_hdp[hdp]


def _work_s(features: np.ndarray) -> np.ndarray:
    """Array [..., ranks]: by the plan."""
    work: np.ndarray = features[..., 0] + features[..., 1]
    return work


def _fitted(features: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Array [steps, ranks]: with the coefficients, none below 0, whose relative errors are least; ``features`` [steps, ranks,
    features], ``seconds`` [steps, ranks]. As long as little is known, the work of the plan."""
    known = (seconds > 0) & (_work_s(features) > 0)
    if int(known.any(axis=1).sum()) < _LEAST_STEPS:
        return _work_s(features)
    scale = np.maximum(np.abs(features[known]).max(axis=0), 1e-30)
    rows = features[known] / scale / seconds[known][:, None]
    gram, wanted = rows.T @ rows, rows.sum(axis=0)
    best, least = np.zeros(_FEATURES), np.inf
    for count in range(1, _FEATURES + 1):
        for chosen in map(list, combinations(range(_FEATURES), count)):
            found = np.linalg.lstsq(gram[np.ix_(chosen, chosen)], wanted[chosen], rcond=1e-9)[0]
            error = float(found @ gram[np.ix_(chosen, chosen)] @ found - 2 * found @ wanted[chosen])
            if (found >= 0).all() and error < least - 1e-9 * len(rows):
                least, best = error, np.zeros(_FEATURES)
                best[chosen] = found
    fitted: np.ndarray = features @ (best / scale)
    return fitted

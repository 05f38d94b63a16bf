"""Jobs all of whose ranks take longer than before although they do the same."""

import numpy as np

from evermesh.fault.detectors import kernels, kinds
from evermesh.fault.detectors.context import Context, is_noisy
from evermesh.fault.detectors.joining import Survey
from evermesh.fault.detectors.matching import Matched
from evermesh.fault.detectors.spreads import LEAST_SCORE, noise
from evermesh.fault.events import Finding

_GROWTH, _LEAST_STEPS = 1.25, 9


def find_slow_job(survey: Survey, matched: Matched, context: Context) -> list[Finding]:
    """All ranks together take longer than before, although they do the same, and other work on their nodes does not explain
    it."""
    if is_noisy(context):
        return []
    whole = survey.is_whole()
    steps = np.flatnonzero(whole.sum(axis=0) * 2 > len(whole))
    if len(steps) < _LEAST_STEPS:
        return []
    same = survey.signatures[:, steps] == survey.signatures[:, steps[-1:]]
    if same[whole[:, steps]].mean() < 0.9:
        return []
    times = {
        "computation": _of_steps(survey.of_step[:, :, kernels.TRAIN_NS], whole, steps),
        "waiting and communication": _of_steps(survey.of_step[:, :, kernels.INSIDE_NS], whole, steps),
    }
    total, third = sum(times.values()), len(steps) // 3
    logs = np.log(total)
    growth = float(np.median(logs[-third:]) - np.median(logs[:third]))
    changes = np.sort(np.abs(np.diff(logs)))[:-1]  # the greatest may be the one that is looked for
    chance = max(noise(logs), float(np.sqrt((changes**2).mean() / 2))) * np.sqrt(2 / third)
    if growth < np.log(_GROWTH) or growth / chance < LEAST_SCORE:
        return []
    more = {name: float(np.median(of[-third:]) - np.median(of[:third])) / 1e9 for name, of in times.items()}
    more["transfers"] = _more_in_transfers(survey, matched, steps[:third], steps[-third:])
    most = max(times, key=lambda name: more[name])
    if most != "computation":
        if more["transfers"] < more[most] / 2:
            return []  # they wait for somebody, who has to be found by himself
        most = "transfers"
    first = survey.first_step + int(steps[0])
    return [
        Finding(
            kind=kinds.SLOW_JOB,
            step=first,
            text=f"the job takes {np.exp(growth):.2f} times as long for a step as in step {first}, mostly for {most}; "
            "there is no rank, node or link that explains it",
            evidence={
                "ratio": round(float(np.exp(growth)), 3),
                **{f"more_{name.replace(' ', '_')}_s": round(value, 6) for name, value in more.items()},
            },
            confidence=0.8,
        )
    ]


def _of_steps(times_ns: np.ndarray, whole: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Array [steps]: median over the ranks that did all of it."""
    return np.array([np.median(times_ns[whole[:, step], step]) for step in steps.tolist()])


def _more_in_transfers(survey: Survey, matched: Matched, first: np.ndarray, last: np.ndarray) -> float:
    """Seconds that a rank of most groups spends more in transfers, waiting apart, in the steps ``last`` than in ``first``."""
    transfers, totals = matched.transfers_ns(), []
    for steps in (first, last):
        chosen = np.isin(matched.steps - survey.first_step, steps) & (transfers > 0)
        groups = np.searchsorted(matched.row_starts, np.flatnonzero(chosen), side="right") - 1
        of_groups = np.bincount(groups, weights=transfers[chosen], minlength=len(matched.sizes))
        ranks = float((of_groups * matched.sizes).sum())
        totals.append(ranks / max(len(survey.opened), 1) / max(len(steps), 1) / 1e9)
    return totals[1] - totals[0]

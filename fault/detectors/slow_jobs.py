"""Jobs all of whose ranks take longer than before although they do the same."""

from dataclasses import dataclass

import numpy as np

from evermesh.fault.detectors import kernels, kinds
from evermesh.fault.detectors.context import Context, is_noisy
from evermesh.fault.detectors.joining import Survey
from evermesh.fault.detectors.matching import Matched
from evermesh.fault.detectors.spreads import LEAST_SCORE, noise
from evermesh.fault.events import Finding

LEAST_STEPS = 9
_GROWTH = 1.25
_ALIKE = 0.1
"""By how much what was planned may differ, as a logarithm: how long more takes only a model knows."""
_SAME = 0.9
"""Of the steps of all ranks have to be alike before they are compared."""


@dataclass(frozen=True, slots=True)
class Pace:
    """What a rank did with its time, the median over the ranks, in steps one after another, or in blocks of some."""

    steps: np.ndarray
    """Array [steps]: numbers, ascending."""
    computing_s: np.ndarray
    inside_s: np.ndarray
    """Waiting and communication."""
    transfers_s: np.ndarray
    """Transfers alone, the mean over the ranks; not a number: nobody knows."""
    work: np.ndarray
    """What was planned, in any unit; 1: all do the same."""

    @property
    def columns(self) -> tuple[np.ndarray, ...]:
        """All of it."""
        return (self.steps, self.computing_s, self.inside_s, self.transfers_s, self.work)

    def part(self, chosen: slice | np.ndarray) -> "Pace":
        """Of some of the steps."""
        return Pace(*(of[chosen] for of in self.columns))

    def then(self, others: "Pace") -> "Pace":
        """These and later ones."""
        return Pace(*(np.concatenate(pair) for pair in zip(self.columns, others.columns, strict=True)))


def find_slow_job(survey: Survey, matched: Matched, context: Context) -> list[Finding]:
    """All ranks together take longer than before, although they do the same, and other work on their nodes does not explain
    it."""
    whole = survey.is_whole()
    pace = pace_of(survey, transfers_of(survey, matched))
    chosen = pace.steps - survey.first_step
    if is_noisy(context) or len(chosen) < LEAST_STEPS:
        return []
    same = survey.signatures[:, chosen] == survey.signatures[:, chosen[-1:]]
    return judge(pace, len(chosen) // 3, len(chosen) // 3) if same[whole[:, chosen]].mean() >= _SAME else []


def pace_of(survey: Survey, transfers_s: np.ndarray) -> Pace:
    """Of the steps that most ranks have done; ``transfers_s`` [steps of the survey]."""
    whole = survey.is_whole()
    steps = np.flatnonzero(whole.sum(axis=0) * 2 > len(whole))
    computing, inside = (
        _of_steps(survey.of_step[:, :, of], whole, steps) for of in (kernels.TRAIN_NS, kernels.INSIDE_NS)
    )
    return Pace(survey.first_step + steps, computing / 1e9, inside / 1e9, transfers_s[steps], np.ones(len(steps)))


def judge(pace: Pace, first: int, last: int) -> list[Finding]:
    """Compare the ``last`` steps with the ``first`` ones, in each of which the same is done, as far as ``work`` says."""
    logs = np.log((pace.computing_s + pace.inside_s) / pace.work)
    growth = float(np.median(logs[-last:]) - np.median(logs[:first]))
    changes = np.sort(np.abs(np.diff(logs)))[:-1]  # the greatest may be the one that is looked for
    chance = max(noise(logs), float(np.sqrt((changes**2).mean() / 2))) * np.sqrt(1 / first + 1 / last)
    more_work = abs(float(np.log(np.median(pace.work[-last:]) / np.median(pace.work[:first]))))
    if growth < np.log(_GROWTH) or growth / chance < LEAST_SCORE or more_work > _ALIKE:
        return []
    times = {"computation": pace.computing_s, "waiting and communication": pace.inside_s}
    more = {name: float(np.median(of[-last:]) - np.median(of[:first])) for name, of in times.items()}
    more["transfers"] = _mean(pace.transfers_s[-last:]) - _mean(pace.transfers_s[:first])
    most = max(times, key=lambda name: more[name])
    if most != "computation":
        if not more["transfers"] >= more[most] / 2:
            return []  # they wait for somebody, who has to be found by himself
        most = "transfers"
    step = int(pace.steps[0])
    return [
        Finding(
            kind=kinds.SLOW_JOB,
            step=step,
            text=f"the job takes {np.exp(growth):.2f} times as long for a step as in step {step}, mostly for {most}; "
            "there is no rank, node or link that explains it",
            evidence={
                "ratio": round(float(np.exp(growth)), 3),
                **{
                    f"more_{name.replace(' ', '_')}_s": round(value, 6)
                    for name, value in more.items()
                    if value == value
                },
            },
            confidence=0.8,
        )
    ]


def transfers_of(survey: Survey, matched: Matched) -> np.ndarray:
    """Array [steps of the survey]: seconds that a rank spends in transfers, waiting apart."""
    transfers, steps = matched.transfers_ns(), matched.steps - survey.first_step
    chosen = (transfers > 0) & (steps >= 0) & (steps < survey.num_steps)
    groups = np.searchsorted(matched.row_starts, np.flatnonzero(chosen), side="right") - 1
    of_ranks = transfers[chosen] * matched.sizes[groups]
    found: np.ndarray = np.bincount(steps[chosen], of_ranks, survey.num_steps) / max(len(survey.opened), 1) / 1e9
    return found


def _of_steps(times_ns: np.ndarray, whole: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """Array [steps]: median over the ranks that did all of it."""
    return np.array([np.median(times_ns[whole[:, step], step]) for step in steps.tolist()])


def _mean(values: np.ndarray) -> float:
    """Of those that are known; not a number if none is."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")

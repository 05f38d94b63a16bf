"""How long the steps of a job take since it began, in bounded memory: the newest one by one, the others ever coarser."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from evermesh.fault.detectors.joining import Survey
from evermesh.fault.detectors.slow_jobs import LEAST_STEPS, Pace, judge, pace_of
from evermesh.fault.events import Finding

_NEWEST, _BLOCKS = 48, 48
_RECENT = 16
_SAME = 0.9
_NO_STEPS = Pace(np.empty(0, np.int64), *(np.empty(0) for _ in range(4)))


class PaceWatch:
    """Of one job. Steps are compared that do the same: their signatures say so, or plans say what each has to do."""

    def __init__(self) -> None:
        self._kind = np.empty(0, np.uint64)
        self._taken = -1
        """The last step that is not to be taken again."""
        self._begin()

    def _begin(self) -> None:
        self._newest, self._blocks, self._waiting = _NO_STEPS, _NO_STEPS, _NO_STEPS
        self._block = 1
        """Steps in a block."""

    def look(self, survey: Survey, transfers_s: np.ndarray, planned_s: Mapping[int, float]) -> list[Finding]:
        """Take what is new of the newest steps, and say whether they take longer than the first ones.

        Args:
            survey: with the newest steps.
            transfers_s: array [steps of the survey], see ``Pace``.
            planned_s: by step, in any unit; empty: nobody plans.
        """
        found = pace_of(survey, transfers_s)
        found = found.part(slice(0, max(len(found.steps) - 1, 0)))  # summaries of the last may be under way
        found = self._alike(survey, found, planned_s)
        found = found.part(found.steps > self._taken)
        self._taken = max(self._taken, int(found.steps[-1]) if len(found.steps) else -1)
        self._add(found)
        series = self._blocks.then(self._newest)
        count = len(series.steps)
        return judge(series, count // 3, min(count // 3, _RECENT)) if count >= LEAST_STEPS else []

    def skip(self, survey: Survey) -> None:
        """The newest steps say nothing."""
        self._taken = max(self._taken, survey.first_step + survey.num_steps - 1)

    def _alike(self, survey: Survey, found: Pace, planned_s: Mapping[int, float]) -> Pace:
        """Those that can be compared with each other; with those before, too, else these are forgotten."""
        if planned_s:
            work = np.array([planned_s.get(step, np.nan) for step in found.steps.tolist()])
            return replace(found, work=work).part(work > 0)
        if not len(found.steps):
            return found
        kinds = survey.signatures[:, found.steps - survey.first_step]
        newest = kinds[:, -1]
        alike = (kinds == newest[:, None]).mean(axis=0) >= _SAME
        if len(self._kind) != len(newest) or (self._kind != newest).mean() > 1 - _SAME:
            self._begin()
            self._kind = newest
        return found.part(alike)

    def _add(self, found: Pace) -> None:
        self._newest = self._newest.then(found)
        old = max(len(self._newest.steps) - _NEWEST, 0)
        self._waiting = self._waiting.then(self._newest.part(slice(0, old)))
        self._newest = self._newest.part(slice(old, None))
        whole = len(self._waiting.steps) // self._block * self._block
        self._blocks = self._blocks.then(_coarser(self._waiting.part(slice(0, whole)), self._block))
        self._waiting = self._waiting.part(slice(whole, None))
        while len(self._blocks.steps) > _BLOCKS:
            even = len(self._blocks.steps) // 2 * 2
            self._blocks = _coarser(self._blocks.part(slice(0, even)), 2).then(self._blocks.part(slice(even, None)))
            self._block *= 2


def _coarser(pace: Pace, count: int) -> Pace:
    """The means of so many steps, or blocks, each."""

    def means(of: np.ndarray) -> np.ndarray:
        rows = of.reshape(-1, count)
        known = ~np.isnan(rows)
        with np.errstate(invalid="ignore"):
            found: np.ndarray = np.where(known, rows, 0).sum(axis=1) / known.sum(axis=1)
        return found

    return Pace(pace.steps[::count], *(means(of) for of in pace.columns[1:]))

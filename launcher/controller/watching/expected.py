"""What plans expect of the ranks, and how long a step is expected to take."""

from collections.abc import Mapping
from statistics import median

from evermesh.launcher.watching.messages import PlannedWork
from evermesh.parallelism.mesh import Mesh

_STEPS, _STEPS_OF_MANY, _MANY = 64, 16, 1024
"""Steps that are remembered, in large jobs fewer."""
_MEASURED = 32


class Expected:
    """Of one generation."""

    def __init__(self) -> None:
        self._work_s: dict[int, dict[int, float]] = {}
        """By step and rank."""
        self._makespan_s: dict[int, float] = {}
        self._measured_s: dict[int, float] = {}

    def take(self, told: PlannedWork, num_ranks: int) -> None:
        """Take the plans of some steps; those of another number of ranks say nothing."""
        for step, work_s in told.work_s.items():
            mesh = Mesh(hdp=len(work_s), tp=told.tp, pp=told.pp)
            if mesh.size != num_ranks:
                continue
            self._work_s[step] = {
                mesh.rank(hdp, tp, pp): of
                for hdp, of in enumerate(work_s)
                for tp in range(mesh.tp)
                for pp in range(mesh.pp)
            }
            self._makespan_s[step] = told.makespan_s.get(step, 0.0)
        _keep_newest(self._work_s, _STEPS if num_ranks < _MANY else _STEPS_OF_MANY)
        _keep_newest(self._makespan_s, 2 * _STEPS)

    def note(self, step: int, step_s: float) -> None:
        """A step has taken so long."""
        self._measured_s[step] = step_s
        _keep_newest(self._measured_s, _MEASURED)

    def work_s(self) -> Mapping[tuple[int, int], float]:
        """For the context of detectors, by rank and step."""
        return {(rank, step): of for step, of_ranks in self._work_s.items() for rank, of in of_ranks.items()}

    def step_s(self) -> float | None:
        """How long the step under way may take: as long as those before, and longer if its plan is; None: nobody knows."""
        if not self._measured_s:
            return None
        usual_s = median(self._measured_s.values())
        planned = {step: self._makespan_s[step] for step in self._measured_s if self._makespan_s.get(step, 0.0) > 0}
        under_way = [of for step, of in self._makespan_s.items() if step > max(self._measured_s)]
        if not planned or not under_way:
            return usual_s
        scale = median(self._measured_s[step] / of for step, of in planned.items())
        return max(usual_s, scale * max(under_way))


def _keep_newest(of_steps: dict[int, float] | dict[int, dict[int, float]], count: int) -> None:
    for step in sorted(of_steps)[:-count]:
        del of_steps[step]

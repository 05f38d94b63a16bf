"""What plans expect of the ranks, and how long a step is expected to take."""

from dataclasses import dataclass
from statistics import median

from evermesh.launcher.watching.messages import PlannedStep, PlannedWork
from evermesh.parallelism.mesh import Mesh

_STEPS, _STEPS_OF_MANY, _MANY = 64, 16, 1024
"""Steps that are remembered, in large jobs fewer."""
_MEASURED = 32


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan of one step, and which ranks it is about."""

    step: PlannedStep
    mesh: Mesh


class Expected:
    """Of one generation of ``num_ranks`` ranks."""

    def __init__(self, num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self.plans: dict[int, Planned] = {}
        """By step."""
        self._measured_s: dict[int, float] = {}

    def take(self, told: PlannedWork) -> None:
        """Take the plans of some steps; those of another number of ranks say nothing."""
        for number, step in told.steps.items():
            mesh = Mesh(hdp=len(step.tokens), tp=told.tp, pp=told.pp)
            if mesh.size == self._num_ranks and all(len(column) == mesh.hdp for column in step.columns):
                self.plans[number] = Planned(step, mesh)
        _keep_newest(self.plans, _STEPS if self._num_ranks < _MANY else _STEPS_OF_MANY)

    def note(self, step: int, step_s: float) -> None:
        """A step has taken so long."""
        self._measured_s[step] = step_s
        _keep_newest(self._measured_s, _MEASURED)

    def makespans_s(self) -> dict[int, float]:
        """What plans predict, by step."""
        return {number: plan.step.makespan_s for number, plan in self.plans.items() if plan.step.makespan_s > 0}

    def step_s(self) -> float | None:
        """How long the step under way may take: as long as those before, and longer if its plan is; None: nobody knows."""
        if not self._measured_s:
            return None
        usual_s = median(self._measured_s.values())
        makespan_s = self.makespans_s()
        planned = {number: of for number, of in makespan_s.items() if number in self._measured_s}
        under_way = [of for number, of in makespan_s.items() if number > max(self._measured_s)]
        if not planned or not under_way:
            return usual_s
        scale = median(self._measured_s[number] / of for number, of in planned.items())
        return max(usual_s, scale * max(under_way))


def _keep_newest(of_steps: dict[int, Planned] | dict[int, float], count: int) -> None:
    for step in sorted(of_steps)[:-count]:
        del of_steps[step]

"""What a restart and a regrouping take in this job, and what else a decision about a node depends on."""

import statistics
import time
from collections import deque
from collections.abc import Mapping

from evermesh.fault.isolation.costs import JobCosts, more_for_others
from evermesh.launcher.controller.job import Job
from evermesh.launcher.controller.status import JobState

_ASSUMED_S = 30.0
"""Until it was measured."""
_LOOKS = 32


class MeasuredCosts:
    """Measures while ``job`` runs; ``look`` is called as often as anything can have changed."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._before: JobState = job.state
        self._since_s: float | None = None
        self._is_planned = False
        self._restart_s: float | None = None
        self._regroup_s: float | None = None
        self._ratios: dict[str, deque[float]] = {}

    def look(self) -> None:
        """Note when training ends and begins again, and how long ranks compute."""
        state = self._job.state
        if state != self._before and self._before == "training":
            self._since_s, self._is_planned = time.monotonic(), state == "regrouping"
        elif state != self._before and state == "training" and self._since_s is not None:
            took_s, self._since_s = time.monotonic() - self._since_s, None
            if self._is_planned:
                self._regroup_s = took_s
            else:
                self._restart_s = took_s
        elif state == "recovering":
            self._is_planned = False
        self._before = state

    def note_computing(self) -> None:
        """Compare the last step of the ranks of each node with those of the others."""
        life = self._job.life
        if life is None or self._job.state != "training" or len(life.beats) < life.world_size:
            return
        slowest_s = {node: max(life.beats[rank].compute_s for rank in life.ranks_of(node)) for node in life.nodes}
        for node, usual_s in _medians_of_others(slowest_s).items():
            if usual_s > 0:
                self._ratios.setdefault(node, deque(maxlen=_LOOKS)).append(slowest_s[node] / usual_s)

    def forget_computing(self) -> None:
        """What ranks do has changed: another attempt, or other speeds."""
        self._ratios.clear()

    def residual_of(self, node: str, slowdown: float) -> float:
        """How many times as long a step takes as it would if the node, whose share is degraded by ``slowdown``, was not slow.

        Its ranks computed longer than others lately, and those had more to do for it. 1 where too little was seen.
        """
        ratios, life = self._ratios.get(node, ()), self._job.life
        if life is None or len(ratios) < _LOOKS // 2:
            return 1.0
        return max(1.0, statistics.median(ratios) * (1.0 + more_for_others(len(life.nodes), slowdown)))

    def now(self) -> JobCosts:
        """The costs as far as they are known."""
        job, report = self._job, self._job.last_report
        view, life = job.view(), job.life
        members = life.nodes if life is not None else ()
        usable = [node for node, state in view.usable.items() if state == "ready"]
        training = len([node for node in members if node in usable]) or min(len(usable), job.config.nodes)
        least = min((job.config.nodes, *job.fewer_nodes))
        return JobCosts(
            regroup_s=self._regroup_s or self._restart_s or _ASSUMED_S,
            restart_s=self._restart_s or self._regroup_s or _ASSUMED_S,
            lost_work_s=self._lost_work_s(),
            nodes=max(1, training),
            spares=max(0, len(usable) - job.config.nodes),
            can_shrink_by=max(0, min(training, job.config.nodes) - least),
            horizon_s=report.time_left_s if report is not None else None,
        )

    def _lost_work_s(self) -> float:
        """Half of what lies between two snapshots, or checkpoints where there are none."""
        report, every = self._job.last_report, self._job.config.train.checkpoint.every
        if report is None:
            return 0.0
        steps = report.snapshot.every or every or report.step
        return steps / 2 * report.step_s


def _medians_of_others(seconds: Mapping[str, float]) -> dict[str, float]:
    """Of every node: the median of all others; empty for one node. One sort, for there may be thousands."""
    ordered = sorted(seconds, key=seconds.__getitem__)
    others = len(ordered) - 1
    found = {}
    for place, node in enumerate(ordered if others > 0 else ()):
        low, high = ((others - 1) // 2, others // 2)
        middle = [seconds[ordered[at + (at >= place)]] for at in (low, high)]
        found[node] = sum(middle) / 2
    return found

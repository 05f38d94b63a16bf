"""What acting on a node costs, and what waiting does, in seconds of the job: a pure function.

Only what differs between actions is added up. With p that the node is at fault, s how many times as long it takes as others,
h the horizon, and n nodes:

    wait     p (s - 1) h  +  p f h (restart + lost work)  +  p' h
    degrade  p (d - 1) h  +  (1 - p)(e - 1) 2 hours  +  the failures and p' h as above,  e = n / (n - 1 + 1/s)
    drain    regroup + missing + (1 - p) false alarm + p' spoiled state
    replace  restart + lost work + missing + (1 - p) false alarm

with d = e until its share is degraded, and then what is measured; f failures per hour, p' that what it computes cannot be
trusted, and missing = min(h, replacement) / (n - 1) where no spare takes its place. A job that stands still because of the
node loses p h while it waits, however fast others are.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from evermesh.fault.isolation.config import IsolationConfig
from evermesh.fault.isolation.meanings import HOUR_S
from evermesh.fault.isolation.suspicion import Suspicion

Action = Literal["nothing", "watch", "degrade", "drain", "replace"]
_FAILURES_PER_H = 0.1
"""Of a node that is at fault, where fewer were seen."""
_SPOILED_STATE_S = HOUR_S
"""What it costs to go back behind a state that cannot be trusted."""
_DEGRADED_S = 2 * HOUR_S
"""For which a node that was only taken for slow gets less to do."""


@dataclass(frozen=True, slots=True)
class JobCosts:
    """Of the job, as measured, in seconds where nothing else is said."""

    regroup_s: float
    """From the decision to leave a node behind a step until ranks on the others have finished one."""
    restart_s: float
    """From a failure until the first step after it is finished, without the steps that are trained again."""
    lost_work_s: float
    """Of steps that are trained again after a failure, on average."""
    nodes: int
    """That train."""
    spares: int
    """That could take a place."""
    can_shrink_by: int
    """Nodes without which the job may go on."""
    horizon_s: float | None = None
    """To its end; None: not known."""

    @property
    def has_room(self) -> bool:
        """Whether it can do without one node more."""
        return self.spares > 0 or self.can_shrink_by > 0


@dataclass(frozen=True, slots=True)
class Performance:
    """How a node does now, as measured."""

    slowdown: float = 1.0
    """How many times as long its ranks take as others for the same work; 1: nothing was measured."""
    residual: float = 1.0
    """With its share degraded: how many times as long a step of the job takes as it would without the node being slow."""
    degraded_s: float | None = None
    """For how long its share has been degraded; None: it is not. To watch it then is to give it its whole share again."""
    is_used: bool = True
    """Ranks are there."""
    stands_still: bool = False
    """The job cannot finish a step because of it."""


def costs_of(
    suspicion: Suspicion, performance: Performance, job: JobCosts, config: IsolationConfig
) -> Mapping[Action, float]:
    """Expected cost of each action, seconds of the job."""
    horizon_s = _horizon_s(job, config)
    p, innocent = suspicion.probability, 1.0 - suspicion.probability
    failures = max(_FAILURES_PER_H, suspicion.failures_per_h) * horizon_s / HOUR_S
    staying_s = p * failures * (job.restart_s + job.lost_work_s) + suspicion.spoiled * horizon_s
    if performance.stands_still:
        staying_s += p * horizon_s
    share = more_for_others(job.nodes, performance.slowdown)
    still = share if performance.degraded_s is None else performance.residual - 1.0
    missing_s = 0.0 if job.spares else _missing_s(job, horizon_s, config)
    leaving_s = missing_s + innocent * config.false_alarm_s
    return {
        "watch": p * (performance.slowdown - 1.0) * horizon_s + staying_s,
        "degrade": p * still * horizon_s + innocent * share * min(_DEGRADED_S, horizon_s) + staying_s,
        "drain": leaving_s + (job.regroup_s + suspicion.spoiled * _SPOILED_STATE_S) * performance.is_used,
        "replace": leaving_s + (job.restart_s + job.lost_work_s) * performance.is_used,
    }


def still_lost_s(suspicion: Suspicion, performance: Performance, job: JobCosts, config: IsolationConfig) -> float:
    """What is expected to be lost, as measured, though the share of the node is degraded; seconds of the job."""
    return suspicion.probability * (performance.residual - 1.0) * _horizon_s(job, config)


def more_for_others(nodes: int, slowdown: float) -> float:
    """Share by which a step takes longer where the others take over what one of ``nodes`` nodes leaves them."""
    return nodes / (nodes - 1 + 1 / max(1.0, slowdown)) - 1.0


def _horizon_s(job: JobCosts, config: IsolationConfig) -> float:
    return config.horizon_s if job.horizon_s is None else min(job.horizon_s, config.horizon_s)


def _missing_s(job: JobCosts, horizon_s: float, config: IsolationConfig) -> float:
    return min(horizon_s, config.replacement_s) / max(1, job.nodes - 1)

"""What follows for nodes that evidence speaks against: pure functions, each decision with its numbers in one sentence.

The cheapest action is taken of those that are permitted:

* ``degrade`` (fewer tokens for its ranks) where it was measured to be slow, by a tenth or more; it is not undone while the
  node is late, however little it helps: what was measured with a degraded share says nothing about a whole one;
* ``drain`` and ``replace`` where something other than lateness says with a probability of a half that the node is at fault;
  or where it has been late for long *and* another source speaks against it; or where it has been degraded for long, and what
  the job still loses, as measured, is three times what leaving the node costs. Nobody is set aside for lateness alone;
* ``replace``, which gives up the step under way, only where the job stands still or what the node computes cannot be trusted;
* neither where no spare is left and the job cannot go on with fewer nodes, or where the budget is used up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evermesh.fault.cluster.records import Evidence
from evermesh.fault.isolation.config import IsolationConfig
from evermesh.fault.isolation.costs import Action, JobCosts, Performance, costs_of, still_lost_s
from evermesh.fault.isolation.suspicion import Suspicion, suspicion_of

_WORTH_TELLING = 0.02
_SLOW = 1.1
_AT_FAULT = 0.5
_GAIN = 3.0
_WINDOW_S = 3600.0


_USUAL = Performance()


@dataclass(frozen=True, slots=True)
class Observed:
    """One node as a decision sees it."""

    node: str
    evidence: tuple[Evidence, ...] = ()
    performance: Performance = _USUAL


@dataclass(frozen=True, slots=True)
class Choice:
    """What is to be done about one node, and why."""

    node: str
    action: Action
    reason: str
    """One sentence with the numbers."""
    suspicion: Suspicion
    costs: Mapping[Action, float]
    """Seconds of the job that each action is expected to cost."""
    held_back: str = ""
    """What was cheaper but is not permitted now, and why; empty: nothing."""

    @property
    def is_eviction(self) -> bool:
        """Whether the node is set aside."""
        return self.action in ("drain", "replace")


@dataclass(frozen=True, slots=True)
class Spent:
    """What of the budget was used by now."""

    times_s: tuple[float, ...] = ()
    """Wall clock: when nodes were set aside without a person."""
    aside: int = 0
    """Nodes that are set aside now without a person."""
    nodes: int = 1
    """Of the job, spares included."""

    def why_not(self, config: IsolationConfig, now_s: float) -> str:
        """Why no other node may be set aside; empty: one may."""
        recent = sum(now_s - time_s < _WINDOW_S for time_s in self.times_s)
        if recent >= config.per_hour:
            return f"{recent} of {config.per_hour} nodes that may be within an hour (per_hour) were set aside"
        most = max(1, int(config.share * self.nodes))
        if self.aside >= most:
            return (
                f"{self.aside} of {most} nodes that may be at a time ({config.share:.0%} of {self.nodes}) are set aside"
            )
        return ""


def is_suspected(choice: Choice) -> bool:
    """Whether a node had better not take a place, where another one can."""
    return choice.suspicion.probability >= _WORTH_TELLING


def decide(
    observed: Sequence[Observed], job: JobCosts, config: IsolationConfig, spent: Spent, now_s: float
) -> list[Choice]:
    """What to do about each node, the one where acting gains most first; never more than the budget and the job permit.

    ``now_s`` is the wall clock, as that of the evidence.
    """
    choices: list[Choice] = []
    for one, suspicion in _by_gain(observed, job, config, now_s):
        choice = _choose(one, suspicion, job, config, spent.why_not(config, now_s))
        choices.append(choice)
        if choice.is_eviction:
            spent = replace(spent, times_s=(*spent.times_s, now_s), aside=spent.aside + 1)
            job = _without_one(job)
    return choices


def _by_gain(
    observed: Sequence[Observed], job: JobCosts, config: IsolationConfig, now_s: float
) -> list[tuple[Observed, Suspicion]]:
    judged = [(one, suspicion_of(one.evidence, now_s)) for one in observed]

    def gain_s(pair: tuple[Observed, Suspicion]) -> float:
        costs = costs_of(pair[1], pair[0].performance, job, config)
        return costs["watch"] - min(costs.values())

    return sorted(judged, key=lambda pair: (-gain_s(pair), pair[0].node))


def _without_one(job: JobCosts) -> JobCosts:
    if job.spares:
        return replace(job, spares=job.spares - 1)
    return replace(job, can_shrink_by=job.can_shrink_by - 1, nodes=max(1, job.nodes - 1))


def _choose(one: Observed, suspicion: Suspicion, job: JobCosts, config: IsolationConfig, spent: str) -> Choice:
    performance = one.performance
    costs = costs_of(suspicion, performance, job, config)
    if suspicion.probability < _WORTH_TELLING:
        return Choice(one.node, "nothing", f"{one.node}: {suspicion.told()} that it is at fault", suspicion, costs)
    wanted: list[Action] = ["watch"]
    is_degraded = performance.degraded_s is not None  # which it stays between two attempts
    if (performance.is_used or is_degraded) and suspicion.is_late and performance.slowdown >= _SLOW:
        wanted = ["degrade"] if is_degraded else ["watch", "degrade"]
    permitted, held_back = list(wanted), ""
    lost_s = still_lost_s(suspicion, performance, job, config)
    if _may_leave(suspicion, performance, lost_s > _GAIN * costs["drain"], config):
        is_urgent = performance.stands_still or suspicion.spoiled >= _AT_FAULT
        leaving: list[Action] = ["replace"] if performance.stands_still else ["drain"]
        leaving += ["replace"] if is_urgent and not performance.stands_still else []
        wanted += leaving
        held_back = spent or ("" if job.has_room else "no spare is left, and the job cannot go on with fewer nodes")
        permitted += [] if held_back else leaving
    best, wished = (min(among, key=lambda action: costs[action]) for among in (permitted, wanted))
    held_back = f"{wished} is held back: {held_back}" if wished != best else ""
    return Choice(one.node, best, _told(one, best, suspicion, costs, held_back), suspicion, costs, held_back)


def _may_leave(suspicion: Suspicion, performance: Performance, still_loses: bool, config: IsolationConfig) -> bool:
    """Whether there is more against the node than that it is late; ``still_loses``: the job, more than leaving costs."""
    if suspicion.beside_lateness >= _AT_FAULT:
        return True
    is_persistent = suspicion.is_late and suspicion.late_for_s >= config.persist_s
    if is_persistent and suspicion.has_other_source:
        return True
    has_been_degraded = performance.degraded_s is not None and performance.degraded_s >= config.persist_s
    return is_persistent and has_been_degraded and still_loses


_DOES: dict[Action, str] = {
    "nothing": "nothing follows for",
    "watch": "watching",
    "degrade": "giving less work to",
    "drain": "going on without",
    "replace": "replacing at once",
}


def _told(one: Observed, action: Action, suspicion: Suspicion, costs: Mapping[Action, float], held_back: str) -> str:
    slow = f", {one.performance.slowdown:.2f} times as slow" if one.performance.slowdown > 1 else ""
    what = f"{_DOES[action]} {one.node}{slow}: {suspicion.told()} that it is at fault"
    others = [
        f"{_NAMES[other]} {costs[other]:,.0f} s"
        for other in ("watch", "degrade", "drain", "replace")
        if other != action and (other != "degrade" or one.performance.slowdown >= _SLOW)
    ]
    return f"{what}; this should cost {costs[action]:,.0f} s, {', '.join(others)}{held_back and '; '}{held_back}"


_NAMES: dict[Action, str] = {
    "watch": "waiting",
    "degrade": "less work for it",
    "drain": "a drain",
    "replace": "replacing it",
}

"""Simulates one step from the command line: what goes wrong in it, and what came out."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from evermesh.launcher.errors import ScenarioInvalid
from evermesh.launcher.planning import Case
from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.errors import LayoutDoesNotFit, SequenceTooLong
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner import plan_batch
from evermesh.parallelism.simulator import Lost, Outcome, Scenario, SlowLink, SlowRank, simulate_events

_NUMBER = r"(\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+)"
_SLOW = re.compile(rf"(\d+)={_NUMBER}(?:@{_NUMBER})?")
_SLOW_LINK = re.compile(rf"(\d+)-(\d+)={_NUMBER}")
_LOST = re.compile(rf"(\d+)@{_NUMBER}")


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, as the command line writes it."""

    slow: Sequence[str] = ()
    """``RANK=FACTOR`` or ``RANK=FACTOR@SECONDS``."""
    slow_links: Sequence[str] = ()
    """``A-B=FACTOR``."""
    lost: Sequence[str] = ()
    """``RANK@SECONDS``."""

    def __bool__(self) -> bool:
        return bool(self.slow or self.slow_links or self.lost)


@dataclass(frozen=True, slots=True)
class Simulated:
    """What became of a step."""

    case: Case
    undisturbed: Outcome
    """The same step when nothing goes wrong."""
    outcome: Outcome
    repeated_s: float | None
    """Where ranks were lost: seconds of the step when it is planned anew and run by the others; None: it cannot be."""
    lost_at_s: float | None

    @property
    def time_lost_s(self) -> float | None:
        """Seconds until the repeated step is done, more than undisturbed; detection and restart not counted."""
        if self.repeated_s is None or self.lost_at_s is None or self.undisturbed.step_s is None:
            return None
        return self.lost_at_s + self.repeated_s - self.undisturbed.step_s

    @property
    def picture(self) -> BatchPlan:
        """The plan with the makespan of the simulation, as the picture of it says."""
        certificate = dataclasses.replace(self.case.plan.certificate, makespan_s=self.outcome.timeline.makespan_s)
        return dataclasses.replace(self.case.plan, certificate=certificate)

    def as_json(self) -> dict[str, Any]:
        """All figures, by name."""
        timeline, certificate = self.outcome.timeline, self.case.plan.certificate
        busy = timeline.busy_s()
        return {
            "makespan_s": None if self.outcome.lost else timeline.makespan_s,
            "undisturbed_s": self.undisturbed.timeline.makespan_s,
            "bound_s": certificate.lower_bound_s,
            "binding": certificate.binding,
            "waiting_s": timeline.waited_s(),
            "ranks": [{"rank": label, "busy_s": seconds} for label, seconds in zip(timeline.labels, busy, strict=True)],
            "lost": [timeline.labels[rank] for rank in self.outcome.lost],
            "blocked": [
                {
                    "rank": timeline.labels[blocked.rank],
                    "since_s": blocked.since_s,
                    "micro_batch": blocked.micro_batch,
                    "for": timeline.labels[blocked.for_rank],
                    "root": timeline.labels[blocked.root],
                }
                for blocked in self.outcome.blocked
            ],
            "undone_tokens": self.outcome.undone_tokens,
            "repeated_s": self.repeated_s,
            "time_lost_s": self.time_lost_s,
        }


def run(case: Case, faults: Faults) -> Simulated:
    """Simulate a step with and without ``faults``.

    Raises:
        ScenarioInvalid, LayoutDoesNotFit: a fault is none, or names a rank that is not there.
    """
    clean = Scenario(case.pool)
    scenario = dataclasses.replace(clean, **_parsed(faults))
    undisturbed = simulate_events(case.plan, case.layout, case.cost, clean)
    outcome = simulate_events(case.plan, case.layout, case.cost, scenario) if faults else undisturbed
    lost = {rank // case.layout.pp for rank in outcome.lost}
    if not lost:
        return Simulated(case, undisturbed, outcome, None, None)
    lost_at_s = max(loss.at_s for loss in scenario.lost if loss.rank in lost)
    return Simulated(case, undisturbed, outcome, _repeated_s(case, scenario, lost), lost_at_s)


def _repeated_s(case: Case, scenario: Scenario, lost: set[int]) -> float | None:
    """Seconds of the same batch, planned for the ranks that are left."""
    kept = {rank: number for number, rank in enumerate(r for r in range(case.layout.hdp) if r not in lost)}
    slow_ranks = tuple(
        SlowRank(kept[slow.rank], slow.factor) for slow in scenario.slow_ranks if slow.rank in kept
    )  # by now they all are slow
    slow_links = tuple(
        SlowLink(kept[link.source], kept[link.target], link.factor)
        for link in scenario.slow_links
        if link.source in kept and link.target in kept
    )
    try:
        layout = Layout.model_validate({**case.layout.model_dump(), "hdp": len(kept)})
        plan = plan_batch(case.plan.lengths, layout, case.cost, pool=scenario.pool.without(lost))
    except (LayoutDoesNotFit, SequenceTooLong, ValidationError):
        return None
    rest = Scenario(scenario.pool.without(lost), slow_ranks, slow_links)
    return simulate_events(plan, layout, case.cost, rest).step_s


def _parsed(faults: Faults) -> dict[str, Any]:
    slow = [_match(_SLOW, text, "--slow", "RANK=FACTOR or RANK=FACTOR@SECONDS, such as 5=0.7") for text in faults.slow]
    links = [_match(_SLOW_LINK, text, "--slow-link", "A-B=FACTOR, such as 3-2=0.5") for text in faults.slow_links]
    lost = [_match(_LOST, text, "--lose", "RANK@SECONDS, such as 5@0.8") for text in faults.lost]
    return {
        "slow_ranks": tuple(SlowRank(int(rank), float(factor), float(at_s or 0)) for rank, factor, at_s in slow),
        "slow_links": tuple(SlowLink(int(source), int(target), float(factor)) for source, target, factor in links),
        "lost": tuple(Lost(int(rank), float(at_s)) for rank, at_s in lost),
    }


def _match(pattern: re.Pattern[str], text: str, option: str, form: str) -> tuple[str, ...]:
    found = pattern.fullmatch(text)
    if found is None:
        raise ScenarioInvalid(f"{option} {text}: write {form}.")
    return found.groups()

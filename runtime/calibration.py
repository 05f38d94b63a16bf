"""Online calibration in a run: times of micro-batches are gathered now and then, and rank 0 fits the cost model to them.

What a rank measured stays with it until the feed's thread takes it, behind the plan of a batch: neither the collective nor
the fit is on a step's way. What they find counts from the batch after that one on, for which all ranks know it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.calibration import Calibration, CalibrationPolicy, Proposal, observations
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.mesh import Mesh
from evermesh.parallelism.planner import HybridPlanner

_CALL_SITE = "calibration"
_MOST_GATHERED = 4096
"""Micro-batches of all HDP ranks whose times are gathered at once, but at least those of one step."""


class Measured(NamedTuple):
    """A step on this rank."""

    plan: BatchPlan
    seconds: tuple[float, ...]
    """Of this rank's micro-batches, forward and backward, in their order."""


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a batch brought about; the same on every rank but for ``proposal``."""

    cost: CostModel
    """The model that the batch was planned with."""
    state: dict[str, Any] = field(default_factory=dict)
    """Of the calibration after it; the model in it is that of the next batch."""
    proposal: Proposal | None = None
    """A new model that counts from the next batch on; on rank 0."""


class OnlineCalibration:
    """Calibrates the cost model of a planner. Every rank makes one.

    Args:
        planner: gets every new model; used by the thread that calls ``exchange`` only.
        layout: of the run; without a pipeline.
        policy: when to look, and when to change.
        control: all ranks; used by that thread only.
    """

    def __init__(
        self, planner: HybridPlanner, layout: Layout, policy: CalibrationPolicy, control: Communicator
    ) -> None:
        self._planner, self._layout, self._policy, self._control = planner, layout, policy, control
        self._hdp_rank = Mesh.of(layout).coordinates(control.rank).hdp
        self._start = planner.cost_model
        self._calibration = Calibration(self._start, policy)
        self._steps = 0
        self._measured: list[Measured] = []
        self._state = self._to_state()

    def restore(self, state: dict[str, Any]) -> bool:
        """Go on with what a run saved; before the first batch. False where it began with another model or layout."""
        if not state or (state["start"], state["groups"]) != (self._start.model_dump(mode="json"), self._groups):
            return False
        self._calibration = Calibration.from_state(state["calibration"], self._policy)
        self._planner.cost_model = self._calibration.model
        self._state = self._to_state()
        return True

    def note(self, plan: BatchPlan, seconds: Sequence[float]) -> None:
        """Take note of a step, on the training thread."""
        self._steps += 1
        if self._steps > self._policy.leaves_out:
            self._measured.append(Measured(plan, tuple(seconds)))

    def take(self) -> tuple[Measured, ...]:
        """What is to be exchanged behind the next batch, on the training thread; the same steps on every rank."""
        if len(self._measured) < self._policy.every:
            return ()
        taken, self._measured = self._measured, []
        sizes = accumulate(sum(map(len, step.plan.ranks)) for step in reversed(taken))
        number = max(1, sum(size <= _MOST_GATHERED for size in sizes))
        return tuple(taken[-number:])

    def exchange(self, measured: Sequence[Measured]) -> Calibrated:
        """Behind a batch that was just planned: what all ranks know from now on. Collective where there is something."""
        cost = self._planner.cost_model
        if not measured:
            return Calibrated(cost, self._state)
        gathered = self._gather(measured)
        payload, proposal = None, None
        if self._control.rank == 0:
            proposal = self._learn(measured, gathered)
            payload = json.dumps(self._calibration.to_state()).encode()
        payload = self._control.broadcast_bytes(payload, 0, _CALL_SITE)
        self._calibration = Calibration.from_state(json.loads(payload), self._policy)
        self._planner.cost_model = self._calibration.model
        self._state = self._to_state()
        return Calibrated(cost, self._state, proposal)

    def _gather(self, measured: Sequence[Measured]) -> list[list[float]]:
        """Seconds of every micro-batch of every step, rank by rank: the shortest time among the ranks that ran it together.
        Collective."""
        sizes = [sum(map(len, step.plan.ranks)) for step in measured]
        negative = torch.full((sum(sizes),), -math.inf, dtype=torch.float64)
        for step, of_step in zip(measured, negative.split(sizes), strict=True):
            first = sum(map(len, step.plan.ranks[: self._hdp_rank]))
            of_step[first : first + len(step.seconds)] = -torch.tensor(step.seconds, dtype=torch.float64)
        self._control.all_reduce(negative, _CALL_SITE, maximum=True)
        return [(-of_step).tolist() for of_step in negative.split(sizes)]

    def _learn(self, measured: Sequence[Measured], gathered: Sequence[Sequence[float]]) -> Proposal | None:
        for step, seconds in zip(measured, gathered, strict=True):
            self._calibration.observe(observations(step.plan, seconds, self._layout, self._calibration.model))
        return self._calibration.proposal()

    @property
    def _groups(self) -> list[int]:
        """What of the layout times depend on, next to what the first model is made from."""
        return [self._layout.tp, self._layout.ep, self._layout.etp]

    def _to_state(self) -> dict[str, Any]:
        start = self._start.model_dump(mode="json")
        return {"start": start, "groups": self._groups, "calibration": self._calibration.to_state()}


def event_of(proposal: Proposal) -> tuple[str, dict[str, Any]]:
    """The text and the fields of the event that says what changes."""
    fields = {
        "version": proposal.model.version,
        "old": proposal.old.model_dump(mode="json"),
        "new": proposal.model.model_dump(mode="json"),
        "error_before": proposal.error_before,
        "error_after": proposal.error_after,
        "standard_errors": proposal.fit.standard_errors,
        "undetermined": list(proposal.fit.undetermined),
    }
    return f"{proposal}", fields


__all__ = ["Calibrated", "Measured", "OnlineCalibration", "event_of"]

"""Rank 0 tells the controller what the plan of a step expects of every rank, when the step begins.

Only so can whoever watches tell a rank that is slow from one that was given more to do.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.simulator import micro_batch_s

if TYPE_CHECKING:
    from evermesh.runtime.trainer import Trainer

_EVERY_S = 0.1
_MOST_STEPS = 64


class Expecting:
    """Of the rank whose ``trainer`` this is; ``send`` takes messages to the agent. Steps that last milliseconds are told of
    together."""

    def __init__(self, trainer: "Trainer", send: Callable[[dict[str, Any]], None]) -> None:
        self._trainer, self._send = trainer, send
        self._sent_s = 0.0
        self._step = 0
        self._steps: dict[int, dict[str, Any]] = {}

    def tell(self) -> None:
        """Training goes on: of a step that begins now its plan is told, or kept for the next one."""
        step, plan = self._trainer.progress.step, self._trainer.plan
        if (
            plan is None or step == self._step or self._trainer.config.layout.ep > 1
        ):  # no plan knows how tokens are routed
            return
        self._step = step
        self._steps[step] = _planned(plan, self._trainer.cost)
        if time.monotonic() - self._sent_s >= _EVERY_S or len(self._steps) >= _MOST_STEPS:
            self._flush()

    def _flush(self) -> None:
        layout = self._trainer.config.layout
        self._send({"kind": "work", "values": {"pp": layout.pp, "tp": layout.tp, "steps": self._steps}})
        self._sent_s, self._steps = time.monotonic(), {}


def _planned(plan: BatchPlan, cost: CostModel) -> dict[str, Any]:
    """As ``PlannedStep`` has it."""
    shared = [[any(len(piece.ring) > 1 for piece in one.pieces) for one in of_rank] for of_rank in plan.ranks]
    seconds = [[micro_batch_s(one, plan.lengths, cost) for one in of_rank] for of_rank in plan.ranks]
    pairs = [list(zip(*of_rank, strict=True)) for of_rank in zip(seconds, shared, strict=True)]
    return {
        "alone_s": [sum(of for of, is_shared in of_rank if not is_shared) for of_rank in pairs],
        "in_rings_s": [sum(of for of, is_shared in of_rank if is_shared) for of_rank in pairs],
        "tokens": [sum(one.num_tokens for one in of_rank) for of_rank in plan.ranks],
        "micro_batches": [len(of_rank) for of_rank in plan.ranks],
        "rings": [sum(of_rank) for of_rank in shared],
        "makespan_s": plan.certificate.makespan_s,
    }

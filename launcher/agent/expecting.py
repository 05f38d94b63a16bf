"""Rank 0 tells the controller what the plan of a step expects of every rank, when the step begins.

Only so can whoever watches tell a rank that is slow from one that was given more to do.
"""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.rank_work import PackedRanks

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
        self._steps[step] = planned(plan, self._trainer.cost)
        if time.monotonic() - self._sent_s >= _EVERY_S or len(self._steps) >= _MOST_STEPS:
            self._flush()

    def _flush(self) -> None:
        layout = self._trainer.config.layout
        self._send({"kind": "work", "values": {"pp": layout.pp, "tp": layout.tp, "steps": self._steps}})
        self._sent_s, self._steps = time.monotonic(), {}


def planned(plan: BatchPlan, cost: CostModel) -> dict[str, Any]:
    """As ``PlannedStep`` has it, from the columns of a plan: with their objects thousands of sequences take a tenth of a
    second. Communication costs nothing here, and is no computation."""
    ranks = plan.ranks if isinstance(plan.ranks, PackedRanks) else PackedRanks.of(plan.ranks, plan.lengths)
    members = np.diff(ranks.ring_start)
    per_micro_batch, per_rank = np.diff(ranks.micro_batch_start), np.diff(ranks.rank_start)
    micro_batch_of = np.repeat(np.arange(len(per_micro_batch)), per_micro_batch)
    rank_of = np.repeat(np.arange(len(ranks)), per_rank)
    lengths, shares = ranks.lengths[ranks.sequence].astype(np.float64), members[ranks.sequence]
    again = ranks.recomputed[micro_batch_of]
    token_s = cost.token_s + cost.expert_token_s + again * cost.recompute_token_s
    pair_s = cost.pair_s + again * cost.recompute_pair_s
    seconds = cost.piece_s + (token_s * lengths + pair_s * lengths * (lengths + 1) / 2) / shares

    def of_ranks(of_micro_batches: np.ndarray) -> np.ndarray:
        return np.bincount(rank_of, of_micro_batches, len(ranks))

    def of_micro_batches(of_pieces: np.ndarray) -> np.ndarray:
        return np.bincount(micro_batch_of, of_pieces, len(per_micro_batch))

    work_s = cost.micro_batch_s + of_micro_batches(seconds)
    is_shared = of_micro_batches(shares > 1) > 0
    return {
        "alone_s": of_ranks(work_s * ~is_shared).tolist(),
        "in_rings_s": of_ranks(work_s * is_shared).tolist(),
        "tokens": np.rint(of_ranks(of_micro_batches(lengths / shares))).astype(int).tolist(),
        "micro_batches": per_rank.tolist(),
        "rings": of_ranks(is_shared).astype(int).tolist(),
        "makespan_s": plan.certificate.makespan_s,
    }

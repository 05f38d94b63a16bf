"""Brings tokens to their experts and the results back, over any grid of EP x ETP ranks.

The way of a row, the copy of a token for one of its experts (MoE Parallel Folding, arXiv 2504.14960, section 3.3)::

    sort by expert -> all-to-all over ep -> gather over etp -> experts, each rank a part of their width
                                                                    |
    weighted sum   <- all-to-all over ep <- sum over etp  <---------+

Shape legend: T tokens of this rank, K experts per token, R rows, C channels, H experts that a rank holds (at most).
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts.placement import Placement
from evermesh.parallelism.experts.rows import (
    RowOrder,
    gather_rows,
    reorder,
    rows_to_choices,
    send_rows,
    sum_rows,
    tokens_to_rows,
)

COUNTS = "expert counts"
"""Call site of the exchange of how many rows travel."""
Point = Literal[
    "before_dispatch", "after_dispatch", "before_experts", "after_experts", "before_combine", "after_combine"
]
"""Where a hook sees rows [R, C]: this rank's sorted by expert, and as they arrived over ep; all of the etp group sorted by
expert, and this rank's part of their outputs; summed outputs of the rows that arrived, and back where they started."""
Hook = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class _Trip:
    """How many rows go where, for one call."""

    sent: list[int]
    """Rows to each EP rank."""
    received: list[int]
    """Rows from each EP rank."""
    gathered: list[int]
    """Rows of each ETP rank."""
    counts: list[int]
    """Rows of each expert that this rank holds, over its ETP group."""
    order_R: Tensor
    """Sorts the gathered rows by expert."""
    inverse_R: Tensor


class Dispatcher(nn.Module):
    """Runs experts on the tokens that chose them. As made it is one rank alone and communicates nothing.

    ``apply_expert_parallel`` gives it groups; a ``Placement`` with copies of hot experts comes from ``HotExperts``.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hooks: defaultdict[Point, list[Hook]] = defaultdict(list)
        self.join(Communicator(name="ep"), Communicator(name="etp"))

    def join(self, ep: Communicator, etp: Communicator) -> None:
        """Share the experts with these ranks from now on: blocks of them over ``ep``, their width over ``etp``."""
        self.ep, self.etp = ep, etp
        self.place(Placement(self.num_experts, ep.size))

    def place(self, placement: Placement, copies: Mapping[str, Tensor] | None = None) -> None:
        """Send rows as ``placement`` says; ``copies`` are stacks of the experts that this rank holds and does not own."""
        targets = placement.targets(self.ep.rank, self.ep.nodes)
        slots = [placement.slot(target, expert) for expert, target in enumerate(targets)]
        self.placement, self._width = placement, placement.most_held
        self._bins = [target * self._width + slot for target, slot in zip(targets, slots, strict=True)]
        has_copies = len(placement.held[self.ep.rank]) > self.num_experts // self.ep.size
        self._copies = dict(copies or {}) if has_copies else {}

    def forward(self, x_TC: Tensor, chosen_TK: Tensor, weights_TK: Tensor, experts: nn.Module) -> Tensor:
        """Sum over a token's choices of weight times output of the expert, [T, C]; differentiable.

        Collective over EP x ETP, forward and backward; a rank may have no tokens.

        Args:
            x_TC: tokens of this rank.
            chosen_TK: their experts; -1: none, which adds nothing.
            weights_TK: weight of every choice.
            experts: from rows sorted by expert [R, C] and the number of rows of each to outputs [R, C]. It holds this
                rank's block, and its part of the width.
        """
        order, trip = self._plan(chosen_TK)
        rows = self._hooked("before_dispatch", tokens_to_rows(x_TC, order))
        rows = self._hooked("after_dispatch", send_rows(rows, trip.sent, trip.received, self.ep))
        rows = reorder(gather_rows(rows, trip.gathered, self.etp), trip.order_R, trip.inverse_R)
        rows = self._run(experts, self._hooked("before_experts", rows), trip.counts)
        rows = reorder(self._hooked("after_experts", rows), trip.inverse_R, trip.order_R)
        rows = self._hooked("before_combine", sum_rows(rows, trip.gathered, self.etp))
        rows = self._hooked("after_combine", send_rows(rows, trip.received, trip.sent, self.ep))
        out_TC = (rows_to_choices(rows, order) * weights_TK.unsqueeze(-1)).sum(1)
        return out_TC.to(x_TC.dtype)

    def _plan(self, chosen_TK: Tensor) -> tuple[RowOrder, _Trip]:
        """Collective: exchanges the counts."""
        ranks, width, device = self.ep.size, self._width, chosen_TK.device
        bins_E = torch.tensor([*self._bins, ranks * width], device=device)  # the last one, at -1, is for no expert
        bins_TK = bins_E[chosen_TK]
        sent_PH = torch.bincount(bins_TK.flatten(), minlength=ranks * width + 1)[:-1].view(ranks, width)
        received_PH = self._exchanged(sent_PH)
        gathered_QPH = self._gathered(received_PH)
        sums = sent_PH.sum(1), received_PH.sum(1), gathered_QPH.sum((1, 2)), gathered_QPH.sum((0, 1))
        of_all = torch.cat(sums).tolist()  # at once: on a GPU this waits for the router
        ends = list(accumulate(len(part) for part in sums))
        sent, received, gathered, counts = (of_all[end - len(part) : end] for part, end in zip(sums, ends, strict=True))
        slots_X = torch.arange(width, device=device).repeat(self.etp.size * ranks)
        slots_R = slots_X.repeat_interleave(gathered_QPH.flatten(), output_size=sum(gathered))
        order_R = slots_R.argsort(stable=True)
        inverse_R = torch.empty_like(order_R)
        inverse_R[order_R] = torch.arange(len(order_R), device=device)
        held = len(self.placement.held[self.ep.rank])
        trip = _Trip(sent, received, gathered, counts[:held], order_R, inverse_R)
        return RowOrder.of(bins_TK, sum(sent)), trip

    def _exchanged(self, sent_PH: Tensor) -> Tensor:
        if self.ep.size == 1:
            return sent_PH
        received_PH = torch.empty_like(sent_PH)
        each = [1] * self.ep.size
        self.ep.all_to_all(received_PH, sent_PH, COUNTS, sent_rows=each, received_rows=each)
        return received_PH

    def _gathered(self, received_PH: Tensor) -> Tensor:
        if self.etp.size == 1:
            return received_PH.unsqueeze(0)
        gathered_QPH = received_PH.new_empty(self.etp.size, *received_PH.shape)
        self.etp.all_gather(gathered_QPH.flatten(0, 1), received_PH, COUNTS)
        return gathered_QPH

    def _run(self, experts: nn.Module, rows_RC: Tensor, counts: list[int]) -> Tensor:
        if not self._copies:
            return experts(rows_RC, counts)
        owned = self.num_experts // self.ep.size
        own_RC, hot_RC = rows_RC.split([sum(counts[:owned]), sum(counts[owned:])])
        hot_RC = functional_call(experts, self._copies, (hot_RC, counts[owned:]))
        return torch.cat([experts(own_RC, counts[:owned]), hot_RC])

    def _hooked(self, point: Point, rows_RC: Tensor) -> Tensor:
        for hook in self.hooks[point]:
            rows_RC = hook(rows_RC)
        return rows_RC

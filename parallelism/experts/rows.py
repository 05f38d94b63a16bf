"""Rows on their way: differentiable collectives with uneven sizes, and the order in which tokens become rows.

Shape legend: T tokens of this rank, K experts per token, R rows (one per token and chosen expert), C channels.

Every forward has the mirrored communication as its backward. All sums are taken in the order of ranks, or of a token's
choices, in at least float32: the same ranks give the same bits. Nothing adds atomically.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evermesh.parallelism.collectives import Communicator

FORWARD, BACKWARD = "expert forward", "expert backward"
"""Call sites."""


@dataclass(frozen=True, slots=True)
class RowOrder:
    """Which rows the tokens of this rank become, sorted by bin."""

    pairs_R: Tensor
    """Index into the flattened [T, K] of the choice that a row stands for."""
    rows_TK: Tensor
    """The row of every choice; R where it has none."""
    num_choices: int
    """K."""

    @classmethod
    def of(cls, bins_TK: Tensor, num_rows: int) -> "RowOrder":
        """The rows of choices by their bin; those in the last bins, beyond ``num_rows``, get none. Stable."""
        pairs_R = bins_TK.flatten().argsort(stable=True)[:num_rows]
        rows_P = torch.full_like(bins_TK.flatten(), num_rows)
        rows_P[pairs_R] = torch.arange(num_rows, device=rows_P.device)
        return cls(pairs_R, rows_P.view_as(bins_TK), bins_TK.shape[1])


def tokens_to_rows(x_TC: Tensor, order: RowOrder) -> Tensor:
    """[R, C]: a copy of its token for every row; differentiable."""
    return _TokensToRows.apply(x_TC, order)


def rows_to_choices(rows_RC: Tensor, order: RowOrder) -> Tensor:
    """[T, K, C]: every choice its row, zero where it has none; differentiable."""
    return _RowsToChoices.apply(rows_RC, order)


def reorder(rows_RC: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """``rows_RC[order_R]`` for a permutation and its inverse; differentiable."""
    return _Reorder.apply(rows_RC, order_R, inverse_R)


def send_rows(rows_RC: Tensor, sent: Sequence[int], received: Sequence[int], communicator: Communicator) -> Tensor:
    """Send ``sent[r]`` rows to each rank r; return those that came, by rank. Collective, forward and backward."""
    return rows_RC if communicator.size == 1 else _Send.apply(rows_RC, sent, received, communicator)


def gather_rows(rows_RC: Tensor, sizes: Sequence[int], communicator: Communicator) -> Tensor:
    """The rows of all ranks, by rank; ``sizes[r]`` of rank r. Collective, forward and backward.

    Every rank sends its rows to each other one as they are: no padding to the longest, and no copies in memory.
    """
    return rows_RC if communicator.size == 1 else _Gather.apply(rows_RC, sizes, communicator)


def sum_rows(rows_RC: Tensor, sizes: Sequence[int], communicator: Communicator) -> Tensor:
    """This rank's part of the sum over ranks of what ``gather_rows`` gives all of them. Collective, both ways.

    Each rank sends every other one its part and adds what comes: as many bytes as a ring of uneven parts.
    """
    return rows_RC if communicator.size == 1 else _Sum.apply(rows_RC, sizes, communicator)


class _TokensToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TC: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return x_TC[order.pairs_R // order.num_choices]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad_TKC = _with_zero_row(grads[0])[ctx.order.rows_TK]
        return grad_TKC.sum(1, dtype=_accumulating(grad_TKC)).to(grad_TKC.dtype), None


class _RowsToChoices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RC: Tensor, order: RowOrder) -> Tensor:
        ctx.order = order
        return _with_zero_row(rows_RC)[order.rows_TK]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].flatten(0, 1)[ctx.order.pairs_R], None


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RC: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        ctx.inverse_R = inverse_R
        return rows_RC[order_R]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0][ctx.inverse_R], None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RC: Tensor, sent: Sequence[int], received: Sequence[int], group: Communicator) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _send(rows_RC, sent, received, group, FORWARD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _send(grads[0], ctx.received, ctx.sent, ctx.group, BACKWARD), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RC: Tensor, sizes: Sequence[int], group: Communicator) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _gather(rows_RC, sizes, group, FORWARD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _sum(grads[0], ctx.sizes, ctx.group, BACKWARD), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RC: Tensor, sizes: Sequence[int], group: Communicator) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        return _sum(rows_RC, sizes, group, FORWARD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grads[0], ctx.sizes, ctx.group, BACKWARD), None, None


def _send(x_RC: Tensor, sent: Sequence[int], received: Sequence[int], group: Communicator, call_site: str) -> Tensor:
    output_RC = x_RC.new_empty(sum(received), *x_RC.shape[1:])
    group.all_to_all(output_RC, x_RC.contiguous(), call_site, sent_rows=sent, received_rows=received)
    return output_RC


def _gather(x_RC: Tensor, sizes: Sequence[int], group: Communicator, call_site: str) -> Tensor:
    own_RC = x_RC.contiguous()
    output_RC = x_RC.new_empty(sum(sizes), *x_RC.shape[1:])
    parts = list(output_RC.split(list(sizes)))
    parts[group.rank].copy_(own_RC)
    _exchange(group, lambda _: own_RC, lambda peer: parts[peer], call_site)
    return output_RC


def _sum(x_RC: Tensor, sizes: Sequence[int], group: Communicator, call_site: str) -> Tensor:
    parts = x_RC.contiguous().split(list(sizes))
    came = [torch.empty_like(parts[group.rank]) for _ in range(group.size)]
    came[group.rank] = parts[group.rank]
    _exchange(group, lambda peer: parts[peer], lambda peer: came[peer], call_site)
    total = came[0].to(_accumulating(x_RC), copy=True)
    for part in came[1:]:
        total += part
    return total.to(x_RC.dtype)


def _exchange(
    group: Communicator, sent_to: Callable[[int], Tensor], came_from: Callable[[int], Tensor], call_site: str
) -> None:
    """Messages to and from every other rank; empty ones are not sent."""
    peers = [peer for peer in range(group.size) if peer != group.rank]
    sends = [(sent_to(peer), peer) for peer in peers if sent_to(peer).numel()]
    receives = [(came_from(peer), peer) for peer in peers if came_from(peer).numel()]
    if sends or receives:
        for work in group.exchange(sends, receives, call_site):
            work.wait()


def _with_zero_row(x_RC: Tensor) -> Tensor:
    return torch.cat([x_RC, x_RC.new_zeros(1, *x_RC.shape[1:])])


def _accumulating(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)

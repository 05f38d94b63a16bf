"""Attention of one micro-batch: whole documents packed one after the other, and shares of long ones on their rings.

Shape legend: T tokens of the micro-batch, H query heads, K key/value heads, D head size, L all log-sum-exps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from evermesh.parallelism.attention.kernels import AttentionKernel, Forward, Gradients
from evermesh.parallelism.attention.shared import SharedSequence
from evermesh.parallelism.batch_plan import MicroBatch
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.errors import PlanInvalid
from evermesh.parallelism.pieces import share_of


class Kept(NamedTuple):
    """What the backward pass of a micro-batch takes.

    Of segments whose ranks divide heads it is either what they computed with, in ``exchanged``, or, where that is empty, what
    this rank has outside of attention, like that of all others.
    """

    q_THD: Tensor
    """Of the segments that are not in ``exchanged``, one behind the other; likewise keys and values."""
    k_TKD: Tensor
    v_TKD: Tensor
    out_THD: Tensor
    """Of all."""
    lse_L: Tensor
    """Of all, each with the tokens and heads that its kernels saw."""
    exchanged: tuple[Tensor, ...] = ()
    """Four tensors of each segment: queries, keys, values, output."""


@dataclass(frozen=True, slots=True)
class _Segment:
    """Consecutive tokens of the micro-batch: a pack of whole documents, or this rank's share of one on a ring."""

    tokens: slice
    rows: slice
    """Its tokens among those of segments that divide no heads; empty where it does."""
    lengths: tuple[int, ...] = ()
    shared: SharedSequence | None = None
    window: int | None = None

    @property
    def divides_heads(self) -> bool:
        return self.shared is not None and self.shared.group is not None

    def with_window(self, window: int | None) -> "_Segment":
        if window is None:
            return self
        return replace(self, shared=self.shared and self.shared.with_window(window), window=window)

    def lse_shape(self, heads: int) -> tuple[int, int]:
        """Heads and tokens of its log-sum-exp, where this rank has ``heads``."""
        if self.shared is None or self.shared.group is None:
            return heads, self.tokens.stop - self.tokens.start
        return heads // len(self.shared.group.members), self.shared.group.num_tokens


class MicroBatchAttention:
    """Attention for the tokens of one micro-batch, in the order of its pieces.

    Call it with q [T, H, D], k and v [T, K, D]; it returns [T, H, D] and is differentiable. With a ``window`` every token
    attends to so many tokens, itself included, else to all before it in its document. Where the micro-batch holds
    shares of rings the call, forward and backward, is collective over the members of each.

    Raises:
        PlanInvalid: a piece is not cut as ``pieces.share_of`` does.
    """

    def __init__(
        self, micro_batch: MicroBatch, lengths: Sequence[int], kernel: AttentionKernel, communicator: Communicator
    ) -> None:
        self.kernel, self.communicator = kernel, communicator
        self.segments = _segments(micro_batch, lengths, communicator.rank)

    def __call__(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, /, *, window: int | None = None) -> Tensor:
        return _Attention.apply(q_THD, k_TKD, v_TKD, self, window, None)

    def with_result(
        self,
        q_THD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        result: tuple[Tensor, Tensor],
        *,
        window: int | None = None,
    ) -> Tensor:
        """As a call, but for the forward pass, which gave ``result`` before (see ``forward``): it sends nothing.

        Where heads are divided, its backward pass sends queries, keys, values and outputs again.
        """
        return _Attention.apply(q_THD, k_TKD, v_TKD, self, window, result)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Output [T, H, D] and log-sum-exps [L]."""
        kept = self.run(q, k, v, window)
        return kept.out_THD, kept.lse_L

    def run(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Kept:
        """The output, with what the backward pass takes."""
        outputs, lses, exchanged = [], [], list[Tensor]()
        for part in self.segments:
            at = part.tokens
            out, done = self._segment_forward(part.with_window(window), q[at], k[at], v[at])
            outputs.append(out)
            lses.append(done.lse_HT.flatten())
            if part.divides_heads:
                exchanged += done[:4]
        out, lse = (torch.cat(outputs), torch.cat(lses)) if outputs else (torch.empty_like(q), q.new_empty(0))
        if exchanged:  # so that what they were made from need not be kept
            q, k, v = (self._unexchanged(x) for x in (q, k, v))
        return Kept(q, k, v, out, lse, tuple(exchanged))

    def backward(self, grad: Tensor, kept: Kept, window: int | None = None) -> Gradients:
        """Gradients of q, k and v."""
        (num_tokens, heads, size), kv_heads = grad.shape, kept.k_TKD.shape[1]
        dq, dk, dv = (grad.new_empty(num_tokens, number, size) for number in (heads, kv_heads, kv_heads))
        exchanged, first = iter(kept.exchanged), 0
        for part in self.segments:
            at, (of_rank, tokens) = part.tokens, part.lse_shape(heads)
            lse = kept.lse_L[first : first + of_rank * tokens].view(of_rank, tokens)
            first += of_rank * tokens
            if kept.exchanged and part.divides_heads:
                done = Forward(next(exchanged), next(exchanged), next(exchanged), next(exchanged), lse)
            else:
                rows = part.rows if kept.exchanged else at
                done = Forward(kept.q_THD[rows], kept.k_TKD[rows], kept.v_TKD[rows], kept.out_THD[at], lse)
            part = part.with_window(window)
            if part.shared is None:
                gradients = self.kernel.backward_packed(grad[at], done, part.lengths, window)
            else:
                gradients = self._shared_backward(part.shared, grad[at], done, kv_heads, sends_all=not kept.exchanged)
            dq[at], dk[at], dv[at] = gradients
        return dq, dk, dv

    def _segment_forward(self, part: _Segment, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Forward]:
        if part.shared is not None:
            return part.shared.forward((q, k, v), self.kernel, self.communicator)
        out, lse = self.kernel.forward_packed(q, k, v, part.lengths, part.window)
        return out, Forward(q, k, v, out, lse)

    def _shared_backward(
        self, shared: SharedSequence, grad: Tensor, done: Forward, kv_heads: int, *, sends_all: bool
    ) -> Gradients:
        heads = grad.shape[1], kv_heads
        if sends_all:
            grad, done = shared.exchanged(grad, done, self.communicator)
        else:
            grad = shared.exchanged_gradient(grad, self.communicator)
        return shared.backward(grad, done, heads, self.kernel, self.communicator)

    def _unexchanged(self, x: Tensor) -> Tensor:
        """A copy of the rows of segments that divide no heads."""
        rows = [x[part.tokens] for part in self.segments if not part.divides_heads]
        return torch.cat(rows) if rows else x.new_empty(0, *x.shape[1:])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention: MicroBatchAttention,
        window: int | None,
        result: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        kept = attention.run(q, k, v, window) if result is None else Kept(q, k, v, *result)
        ctx.save_for_backward(*kept[:5], *kept.exchanged)
        ctx.attention, ctx.window = attention, window
        return kept.out_THD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, *exchanged = ctx.saved_tensors
        kept = Kept(q, k, v, out, lse, tuple(exchanged))
        return *ctx.attention.backward(grads[0], kept, ctx.window), None, None, None


def _segments(micro_batch: MicroBatch, lengths: Sequence[int], rank: int) -> tuple[_Segment, ...]:
    segments: list[_Segment] = []
    first, row = 0, 0
    for piece in micro_batch.pieces:
        length = lengths[piece.sequence]
        share = share_of(length, len(piece.ring), piece.ring.index(rank))
        if piece.ranges != share.ranges():
            raise PlanInvalid(
                f"rank {rank} is to hold {piece.ranges} of sequence {piece.sequence}, but the executor cuts "
                f"{length} tokens over {len(piece.ring)} ranks as {share.ranges()}."
            )
        tokens = slice(first, first + piece.num_tokens)
        first = tokens.stop
        rows = slice(row, row if piece.heads > 1 else row + piece.num_tokens)
        row = rows.stop
        if len(piece.ring) > 1:
            segments.append(_Segment(tokens, rows, shared=SharedSequence.of(piece, length, rank)))
        elif segments and segments[-1].shared is None:
            pack = segments.pop()
            tokens, rows = slice(pack.tokens.start, tokens.stop), slice(pack.rows.start, rows.stop)
            segments.append(_Segment(tokens, rows, (*pack.lengths, length)))
        else:
            segments.append(_Segment(tokens, rows, (length,)))
    return tuple(segments)

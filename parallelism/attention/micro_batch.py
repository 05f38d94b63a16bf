"""Attention of one micro-batch: whole documents packed one after the other, and shares of long ones on their rings."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from evermesh.parallelism.attention.kernels import AttentionKernel, Forward, Gradients
from evermesh.parallelism.attention.ring import Ring, ring_backward, ring_forward
from evermesh.parallelism.batch_plan import MicroBatch
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.errors import PlanInvalid


@dataclass(frozen=True, slots=True)
class _Segment:
    """Consecutive tokens of the micro-batch: a pack of whole documents, or this rank's share of one on a ring."""

    tokens: slice
    lengths: tuple[int, ...] = ()
    ring: Ring | None = None
    window: int | None = None

    def with_window(self, window: int | None) -> "_Segment":
        if window is None:
            return self
        return replace(self, ring=self.ring and replace(self.ring, window=window), window=window)


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
        """As a call, but for the forward pass, which gave ``result`` before (see ``forward``): it sends nothing."""
        return _Attention.apply(q_THD, k_TKD, v_TKD, self, window, result)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> tuple[Tensor, Tensor]:
        """Output [T, H, D] and log-sum-exp [H, T]."""
        segments = [part.with_window(window) for part in self.segments]
        parts = [self._segment_forward(part, q[part.tokens], k[part.tokens], v[part.tokens]) for part in segments]
        if not parts:
            return torch.empty_like(q), q.new_empty(q.shape[1], 0)
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)

    def backward(self, grad: Tensor, done: Forward, window: int | None = None) -> Gradients:
        """Gradients of q, k and v."""
        q, k, v, out, lse = done
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for part in self.segments:
            at = part.tokens
            own = Forward(q[at], k[at], v[at], out[at], lse[:, at])
            dq[at], dk[at], dv[at] = self._segment_backward(part.with_window(window), grad[at], own)
        return dq, dk, dv

    def _segment_forward(self, part: _Segment, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if part.ring is None:
            return self.kernel.forward_packed(q, k, v, part.lengths, part.window)
        return ring_forward(q, k, v, part.ring, self.kernel, self.communicator)

    def _segment_backward(self, part: _Segment, grad: Tensor, done: Forward) -> Gradients:
        if part.ring is None:
            return self.kernel.backward_packed(grad, done, part.lengths, part.window)
        return ring_backward(grad, done, part.ring, self.kernel, self.communicator)


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
        out, lse = attention.forward(q, k, v, window) if result is None else result
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.attention, ctx.window = attention, window
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.attention.backward(grads[0], Forward(*ctx.saved_tensors), ctx.window), None, None, None


def _segments(micro_batch: MicroBatch, lengths: Sequence[int], rank: int) -> tuple[_Segment, ...]:
    segments: list[_Segment] = []
    first = 0
    for piece in micro_batch.pieces:
        tokens = slice(first, first + piece.num_tokens)
        first = tokens.stop
        ring = Ring(piece.ring, lengths[piece.sequence], piece.ring.index(rank))
        if piece.ranges != ring.share(ring.index).ranges():
            raise PlanInvalid(
                f"rank {rank} is to hold {piece.ranges} of sequence {piece.sequence}, but the executor cuts "
                f"{ring.length} tokens over {len(piece.ring)} ranks as {ring.share(ring.index).ranges()}."
            )
        if len(piece.ring) > 1:
            segments.append(_Segment(tokens, ring=ring))
        elif segments and segments[-1].ring is None:
            pack = segments.pop()
            segments.append(_Segment(slice(pack.tokens.start, tokens.stop), (*pack.lengths, ring.length)))
        else:
            segments.append(_Segment(tokens, (ring.length,)))
    return tuple(segments)

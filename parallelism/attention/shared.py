"""The attention of one sequence that several ranks hold, by the scheme that the plan chose for it.

Shape legend: T tokens of this rank, H query heads, K key/value heads, D head size.

Of the ring of a piece, ``heads`` neighbours at a time divide the heads (``by_heads``). What remains are as many rings as
neighbours, one for each run of heads, whose members hold the tokens of a whole group of neighbours: keys and values are
passed around it (``ring``), or gathered (``gathered``), or, when one group is the whole ring, neither. With one head group
per rank this is ring attention, with one in all DeepSpeed Ulysses, between them the two-dimensional scheme (Fang and Zhao,
USP, arXiv 2405.07719).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor

from evermesh.parallelism.attention.by_heads import BACKWARD, FORWARD, HeadGroup
from evermesh.parallelism.attention.gathered import gathered_backward, gathered_forward
from evermesh.parallelism.attention.kernels import AttentionKernel, Forward, Gradients
from evermesh.parallelism.attention.ring import Ring, ring_backward, ring_forward
from evermesh.parallelism.batch_plan import Piece
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.pieces import share_of


@dataclass(frozen=True, slots=True)
class SharedSequence:
    """One sequence, and how the ranks that hold it share its attention."""

    ring: Ring
    """The ranks with the same heads as this one, one of every group; one rank where a group is the whole ring."""
    group: HeadGroup | None
    """The neighbours of this rank that divide heads; None: nobody does."""
    gathers: bool

    @classmethod
    def of(cls, piece: Piece, length: int, rank: int) -> Self:
        """What ``rank`` has to do with its piece of a sequence of ``length`` tokens."""
        members, ways = piece.ring, piece.heads
        number, place = divmod(members.index(rank), ways)
        ring = Ring(members[place::ways], length, number, together=ways)
        if ways == 1:
            return cls(ring, None, piece.gathers)
        shares = tuple(share_of(length, len(members), number * ways + i) for i in range(ways))
        return cls(ring, HeadGroup(members[number * ways : (number + 1) * ways], place, shares), piece.gathers)

    def with_window(self, window: int | None) -> Self:
        """The same, where a token sees so many tokens, itself included."""
        return replace(self, ring=replace(self.ring, window=window))

    def forward(
        self, inputs: Sequence[Tensor], kernel: AttentionKernel, communicator: Communicator
    ) -> tuple[Tensor, Forward]:
        """Output [T, H, D] for q, k and v, and what ``backward`` takes. Collective over the ring.

        Where heads are divided the latter has the tokens of all neighbours, and the heads of this rank.
        """
        q, k, v = inputs if self.group is None else self.group.to_heads(inputs, communicator, FORWARD)
        out, lse = self._attend(q, k, v, kernel, communicator)
        done = Forward(q, k, v, out, lse)
        if self.group is None:
            return out, done
        (out_THD,) = self.group.to_tokens([out], [inputs[0].shape[1]], communicator, FORWARD)
        return out_THD, done

    def exchanged(self, grad_THD: Tensor, done: Forward, communicator: Communicator) -> tuple[Tensor, Forward]:
        """``grad`` and ``done`` as ``backward`` takes them, from own tokens and all heads; the log-sum-exp is there already.

        Collective where heads are divided.
        """
        if self.group is None:
            return grad_THD, done
        grad, q, k, v, out = self.group.to_heads([grad_THD, *done[:4]], communicator, BACKWARD)
        return grad, Forward(q, k, v, out, done.lse_HT)

    def exchanged_gradient(self, grad_THD: Tensor, communicator: Communicator) -> Tensor:
        """``grad`` as ``backward`` takes it. Collective where heads are divided."""
        if self.group is None:
            return grad_THD
        return self.group.to_heads([grad_THD], communicator, BACKWARD)[0]

    def backward(
        self, grad: Tensor, done: Forward, heads: tuple[int, int], kernel: AttentionKernel, communicator: Communicator
    ) -> Gradients:
        """Gradients of q, k and v for own tokens and all heads, H and K. Collective over the ring."""
        gradients = self._attend_backward(grad, done, kernel, communicator)
        if self.group is None:
            return gradients
        of_q, of_kv = heads
        dq, dk, dv = self.group.to_tokens(gradients, (of_q, of_kv, of_kv), communicator, BACKWARD)
        return dq, dk, dv

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, kernel: AttentionKernel, communicator: Communicator
    ) -> tuple[Tensor, Tensor]:
        if len(self.ring.members) == 1:
            return kernel.forward_packed(q, k, v, (self.ring.length,), self.ring.window)
        run = gathered_forward if self.gathers else ring_forward
        return run(q, k, v, self.ring, kernel, communicator)

    def _attend_backward(
        self, grad: Tensor, done: Forward, kernel: AttentionKernel, communicator: Communicator
    ) -> Gradients:
        if len(self.ring.members) == 1:
            return kernel.backward_packed(grad, done, (self.ring.length,), self.ring.window)
        run = gathered_backward if self.gathers else ring_backward
        return run(grad, done, self.ring, kernel, communicator)


__all__ = ["SharedSequence"]

"""Ring attention over one communicator, exact and balanced, for rings of any size.

Shape legend: T tokens of this rank, H query heads, K key/value heads, D head size.

Keys and values travel *down* the ring (member m sends to m-1). The block of member j first visits the members before it,
whose tails see all of it, and after the wrap-around the members behind it, which see only its head: from there on the
tail is left out, a quarter of the forward traffic of a causal ring. In the backward pass the gradients of a block follow
it around and end at its owner. The next block is on its way while the current one is computed.

With a sliding window a member computes only the parts of a block that its queries can see, which may be none. Blocks
travel as without one.

Source: Liu et al., Ring Attention with Blockwise Transformers (arXiv 2310.01889); zig-zag order as in
``evermesh.parallelism.pieces``.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evermesh.parallelism.attention.blocks import (
    Mask,
    Softmax,
    accumulation_dtype,
    block_backward,
    block_forward,
    wait,
)
from evermesh.parallelism.attention.kernels import AttentionKernel, Forward, Gradients, kernel_for
from evermesh.parallelism.attention.window import band_blocks
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.pieces import Share, joint_share

if TYPE_CHECKING:
    import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Ring:
    """One sequence and the ranks that share it; every member builds the same one."""

    members: tuple[int, ...]
    """Ranks of the communicator, in ring order."""
    length: int
    """Tokens of the sequence."""
    index: int
    """Position of this rank in ``members``."""
    window: int | None = None
    """Tokens that a token attends to, itself included; None: all before it."""
    together: int = 1
    """So many consecutive ranks, of whom one is a member here, hold together what a member holds."""

    def share(self, index: int) -> Share:
        """What member ``index`` holds."""
        return joint_share(self.length, len(self.members) * self.together, index * self.together, self.together)

    @property
    def previous(self) -> int:
        """The rank that this one sends to."""
        return self.members[self.index - 1]

    @property
    def next(self) -> int:
        """The rank that this one receives from."""
        return self.members[(self.index + 1) % len(self.members)]

    def owner(self, step: int, index: int | None = None) -> int:
        """Member whose block is with member ``index`` (default: this one) at ``step``; at step 0 its own."""
        return ((self.index if index is None else index) + step) % len(self.members)

    def visible_tokens(self, owner: int, index: int) -> int:
        """Tokens of the block of ``owner`` that member ``index`` needs: all, or the head when the owner comes before."""
        share = self.share(owner)
        return share.num_tokens if owner > index else share.head_tokens


def ring_attention(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    *,
    length: int,
    members: Sequence[int],
    communicator: Communicator,
    window: int | None = None,
) -> Tensor:
    """Causal attention of one sequence that ``members`` share, differentiable; returns [T, H, D].

    With a ``window`` every token attends to so many tokens, itself included.

    Collective over ``members`` (ranks of ``communicator``), forward and backward: all of them call it, in an order that
    agrees with every other ring they share. Each passes its own tokens, head then tail, as ``pieces.share_of`` cuts
    them; a member may hold none.
    """
    ring = Ring(tuple(members), length, tuple(members).index(communicator.rank), window)
    kernel = kernel_for(q_THD.device, q_THD.dtype)
    return _RingAttention.apply(q_THD, k_TKD, v_TKD, ring, kernel, communicator)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ring: Ring, kernel: AttentionKernel, communicator: Communicator
    ) -> Tensor:
        out, lse = ring_forward(q, k, v, ring, kernel, communicator)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.ring, ctx.kernel, ctx.communicator = ring, kernel, communicator
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ring_backward(grads[0], Forward(*ctx.saved_tensors), ctx.ring, ctx.kernel, ctx.communicator)
        return *gradients, None, None, None


def ring_forward(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, ring: Ring, kernel: AttentionKernel, communicator: Communicator
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and log-sum-exp [H, T] of this member's queries over the whole sequence. Collective."""
    own = ring.share(ring.index)
    assert own.num_tokens == q_THD.shape[0], f"{q_THD.shape[0]} tokens given, the share of this member is {own}"
    softmax = Softmax(q_THD)
    block = torch.stack([k_TKD, v_TKD])
    for step in range(len(ring.members)):
        arriving, works = _pass_on(block, ring, step, communicator, "ring forward")
        for queries, keys, mask in _visible(ring, step):
            softmax.join(queries, *block_forward(kernel, q_THD[queries], block[0, keys], block[1, keys], mask))
        wait(works)
        block = arriving
    return softmax.out_THD.to(q_THD.dtype), softmax.lse_HT


def ring_backward(
    grad_THD: Tensor, done: Forward, ring: Ring, kernel: AttentionKernel, communicator: Communicator
) -> Gradients:
    """Gradients of this member's q, k and v. Collective, like ``ring_forward``."""
    q_THD, k_TKD, v_TKD, out_THD, lse_HT = done
    accumulate = accumulation_dtype(q_THD.dtype)
    dq_THD = torch.zeros_like(q_THD, dtype=accumulate)
    block = torch.stack([k_TKD, v_TKD])
    own_gradient = torch.zeros_like(block, dtype=accumulate)
    carried = _CarriedGradients(ring, own_gradient, communicator)
    for step in range(len(ring.members)):
        arriving, works = _pass_on(block, ring, step, communicator, "ring backward")
        gradient = torch.zeros_like(block, dtype=accumulate)
        for queries, keys, mask in _visible(ring, step):
            part = Forward(q_THD[queries], block[0, keys], block[1, keys], out_THD[queries], lse_HT[:, queries])
            dq, dk, dv = block_backward(kernel, grad_THD[queries], part, mask)
            dq_THD[queries] += dq
            gradient[0, keys] += dk
            gradient[1, keys] += dv
        if step == 0:
            own_gradient += gradient
        else:
            carried.add(step, gradient)
        wait(works)
        block = arriving
    own_gradient += carried.come_home()
    dk_TKD, dv_TKD = own_gradient.to(k_TKD.dtype)
    return dq_THD.to(q_THD.dtype), dk_TKD, dv_TKD


class _CarriedGradients:
    """The gradients of a travelling block: each member adds its part and hands the sum to the previous member."""

    def __init__(self, ring: Ring, own_gradient: Tensor, communicator: Communicator) -> None:
        self.ring, self.like, self.communicator = ring, own_gradient, communicator
        self.received: Tensor | None = None
        self.works: list[dist.Work] = []
        self.sent: Tensor | None = None

    def add(self, step: int, gradient: Tensor) -> None:
        """Add this member's gradient of the block it holds at ``step`` and send the sum on."""
        wait(self.works)
        total = self.received
        if total is None:
            total = self.like.new_zeros(2, self._tokens(self.ring.owner(step)), *self.like.shape[2:])
        total[:, : gradient.shape[1]] += gradient
        # what member m+1 sends now is its block of this step, one further up the ring than ours
        next_index = (self.ring.index + 1) % len(self.ring.members)
        arriving_tokens = self._tokens(self.ring.owner(step, next_index))
        self.received = self.like.new_empty(2, arriving_tokens, *self.like.shape[2:])
        sends = [(total, self.ring.previous)] if total.numel() else []
        receives = [(self.received, self.ring.next)] if self.received.numel() else []
        self.sent = total  # stays alive until the message is out
        self.works = self.communicator.exchange(sends, receives, "ring gradients") if sends or receives else []

    def come_home(self) -> Tensor:
        """The sum of all other members' gradients of this member's own block, padded with zeros to its size."""
        wait(self.works)
        home = torch.zeros_like(self.like)
        if self.received is not None:
            home[:, : self.received.shape[1]] = self.received
        return home

    def _tokens(self, owner: int) -> int:
        share = self.ring.share(owner)
        # nobody but its owner sees the tail of member 0: it is the end of the sequence
        return share.num_tokens if owner > 0 else share.head_tokens


def _pass_on(
    block: Tensor, ring: Ring, step: int, communicator: Communicator, call_site: str
) -> "tuple[Tensor, list[dist.Work]]":
    """Start sending the block of this step to the previous member and receiving the next step's."""
    size = len(ring.members)
    if step == size - 1:
        return block[:, :0], []
    receiver = (ring.index - 1) % size
    leaving = block[:, : ring.visible_tokens(ring.owner(step), receiver)].contiguous()
    arriving_tokens = ring.visible_tokens(ring.owner(step + 1), ring.index)
    arriving = block.new_empty(2, arriving_tokens, *block.shape[2:])
    sends = [(leaving, ring.previous)] if leaving.numel() else []
    receives = [(arriving, ring.next)] if arriving.numel() else []
    works = communicator.exchange(sends, receives, call_site) if sends or receives else []
    return arriving, works


def _visible(ring: Ring, step: int) -> Iterator[tuple[slice, slice, Mask]]:
    """Which local queries see which keys of the block of this step, and how; nothing where they see none."""
    own, owner = ring.share(ring.index), ring.share(ring.owner(step))
    is_behind = ring.owner(step) > ring.index
    if ring.window is not None:
        yield from band_blocks(own, owner if step == 0 or is_behind else owner[:1], ring.window)
        return
    # all queries, or only the tail when the owner comes behind
    queries = slice(own.head_tokens if is_behind else 0, own.num_tokens)
    keys = slice(0, own.num_tokens if step == 0 else ring.visible_tokens(ring.owner(step), ring.index))
    if queries.start < queries.stop and keys.stop:
        # local tokens ascend, so the causal mask of the local block is the plain one
        yield queries, keys, "causal" if step == 0 else "all"

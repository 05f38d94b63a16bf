"""Attention that gathers the keys and values of a ring at once instead of passing them around, exact and balanced.

Shape legend: T tokens of this rank, S tokens of the sequence that its queries see, H query heads, K key/value heads, D head
size; the dim of size 2 holds keys and values.

Every member sends its chunks straight to the members whose queries see them, in one batch of messages, and attends to a
prefix of the sequence: so there are two kernel calls for each of its chunks, however many members there are. In the backward
pass keys and values are gathered again, and the gradients of every chunk are sent straight to its owner, who adds them up in
ring order: an all-gather and a reduce-scatter of what causal attention needs (Dubey et al., The Llama 3 Herd of Models, arXiv
2407.21783, section 3.3.2). Nothing hides the messages.
"""

from collections.abc import Iterator

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
from evermesh.parallelism.attention.kernels import AttentionKernel, Forward, Gradients
from evermesh.parallelism.attention.ring import Ring
from evermesh.parallelism.attention.window import Range, band_blocks
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.pieces import Share


def gathered_forward(
    q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, ring: Ring, kernel: AttentionKernel, communicator: Communicator
) -> tuple[Tensor, Tensor]:
    """Output [T, H, D] and log-sum-exp [H, T] of this member's queries. Collective over the members of the ring."""
    own = ring.share(ring.index)
    seen_S2KD = _gather(torch.stack([k_TKD, v_TKD], dim=1), ring, communicator, "gather forward")
    softmax = Softmax(q_THD)
    for queries, keys, mask in _visible(own, ring.window):
        k, v = seen_S2KD[keys].unbind(1)
        softmax.join(queries, *block_forward(kernel, q_THD[queries], k, v, mask))
    return softmax.out_THD.to(q_THD.dtype), softmax.lse_HT


def gathered_backward(
    grad_THD: Tensor, done: Forward, ring: Ring, kernel: AttentionKernel, communicator: Communicator
) -> Gradients:
    """Gradients of this member's q, k and v. Collective, like ``gathered_forward``."""
    q_THD, k_TKD, v_TKD, out_THD, lse_HT = done
    accumulate = accumulation_dtype(q_THD.dtype)
    seen_S2KD = _gather(torch.stack([k_TKD, v_TKD], dim=1), ring, communicator, "gather backward")
    dq_THD = torch.zeros_like(q_THD, dtype=accumulate)
    gradient_S2KD = torch.zeros_like(seen_S2KD, dtype=accumulate)
    for queries, keys, mask in _visible(ring.share(ring.index), ring.window):
        k, v = seen_S2KD[keys].unbind(1)
        part = Forward(q_THD[queries], k, v, out_THD[queries], lse_HT[:, queries])
        dq, dk, dv = block_backward(kernel, grad_THD[queries], part, mask)
        dq_THD[queries] += dq
        gradient_S2KD[keys, 0] += dk
        gradient_S2KD[keys, 1] += dv
    del seen_S2KD
    own_T2KD = _scatter(gradient_S2KD, ring, communicator)
    dk_TKD, dv_TKD = own_T2KD.to(k_TKD.dtype).unbind(1)
    return dq_THD.to(q_THD.dtype), dk_TKD, dv_TKD


def _gather(own_T2KD: Tensor, ring: Ring, communicator: Communicator, call_site: str) -> Tensor:
    """What this member's queries see, in the order of the sequence."""
    seen_S2KD = own_T2KD.new_empty(_end(ring, ring.index), *own_T2KD.shape[1:])
    for rows, (start, stop) in _wanted(ring, ring.index, ring.index):
        seen_S2KD[start:stop] = own_T2KD[rows]
    sends, receives = [], []
    for index, rank in _others(ring):
        sends += [(own_T2KD[rows], rank) for rows, _ in _wanted(ring, ring.index, index)]
        receives += [(seen_S2KD[start:stop], rank) for _, (start, stop) in _wanted(ring, index, ring.index)]
    wait(communicator.exchange(sends, receives, call_site) if sends or receives else [])
    return seen_S2KD


def _scatter(gradient_S2KD: Tensor, ring: Ring, communicator: Communicator) -> Tensor:
    """The gradients of this member's own keys and values, added up over all members: its own first, then in ring order."""
    tokens = ring.share(ring.index).num_tokens
    total_T2KD = gradient_S2KD.new_empty(tokens, *gradient_S2KD.shape[1:])
    for rows, (start, stop) in _wanted(ring, ring.index, ring.index):
        total_T2KD[rows] = gradient_S2KD[start:stop]
    sends, receives = [], []
    arriving: list[tuple[slice, Tensor]] = []
    for index, rank in _others(ring):
        sends += [(gradient_S2KD[start:stop], rank) for _, (start, stop) in _wanted(ring, index, ring.index)]
        parts = [(rows, torch.empty_like(total_T2KD[rows])) for rows, _ in _wanted(ring, ring.index, index)]
        receives += [(part, rank) for _, part in parts]
        arriving += parts
    wait(communicator.exchange(sends, receives, "gather gradients") if sends or receives else [])
    for rows, part in arriving:
        total_T2KD[rows] += part
    return total_T2KD


def _others(ring: Ring) -> Iterator[tuple[int, int]]:
    """Index and rank of every other member."""
    return ((index, rank) for index, rank in enumerate(ring.members) if index != ring.index)


def _end(ring: Ring, index: int) -> int:
    """How many tokens of the sequence the queries of a member see: up to its last."""
    own = ring.share(index).ranges()
    return own[-1][1] if own else 0


def _wanted(ring: Ring, owner: int, index: int) -> Iterator[tuple[slice, Range]]:
    """The chunks of ``owner`` that queries of member ``index`` see, as rows of the owner's share and as positions.

    A chunk is seen whole or not at all, because members hold whole chunks.
    """
    first, end = 0, _end(ring, index)
    for start, stop in ring.share(owner):
        if start < min(stop, end):
            yield slice(first, first + stop - start), (start, stop)
        first += stop - start


def _visible(own: Share, window: int | None) -> Iterator[tuple[slice, slice, Mask]]:
    """Which queries of a share see which keys of the sequence, and how."""
    ranges = own.ranges()
    if window is not None:
        yield from band_blocks(ranges, ((0, ranges[-1][1]),) if ranges else (), window)
        return
    first = 0
    for start, stop in ranges:
        queries = slice(first, first + stop - start)
        if start > 0:
            yield queries, slice(0, start), "all"
        yield queries, slice(start, stop), "causal"
        first = queries.stop


__all__ = ["gathered_backward", "gathered_forward"]

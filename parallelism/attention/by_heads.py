"""Neighbours in a ring exchange tokens for heads: outside of attention each has its own tokens and all heads, inside it
the tokens of all of them and some heads.

Shape legend: T tokens that a rank holds, N tokens that all the neighbours hold together, D head size.

Source: Jacobs et al., DeepSpeed Ulysses (arXiv 2309.14509). The neighbours of a plan change with every sequence, so they
exchange by messages inside the group of all ranks rather than by a collective of a group of their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evermesh.parallelism.attention.blocks import accumulation_dtype, wait
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.heads import heads_of
from evermesh.parallelism.pieces import Share

FORWARD, BACKWARD = "heads forward", "heads backward"
"""Call sites."""


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """Neighbours that divide the heads of one sequence; each builds the same one, but for its index."""

    members: tuple[int, ...]
    """Ranks of the communicator, in ring order."""
    index: int
    """Position of this rank in ``members``."""
    shares: tuple[Share, ...]
    """What each of them holds of the sequence; heads ascend, tails descend."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return sum(share.num_tokens for share in self.shares)

    def to_heads(self, tensors: Sequence[Tensor], communicator: Communicator, call_site: str) -> list[Tensor]:
        """From own tokens with all heads to all tokens, in the order of the sequence, with the heads of this rank.

        Collective over the members. Tensors are [T, heads, D], with any numbers of heads that ``heads_of`` can divide.
        """
        ways = len(self.members)
        leaving = [torch.cat([x[:, heads_of(x.shape[1], ways, i)] for x in tensors], dim=1) for i in range(ways)]
        arriving = [leaving[self.index].new_empty(share.num_tokens, *leaving[0].shape[1:]) for share in self.shares]
        arriving[self.index] = leaving[self.index]
        self._exchange(leaving, arriving, communicator, call_site)
        leaving.clear()  # or they would live beside what arrived and what is made of it
        sizes = [max(1, x.shape[1] // ways) for x in tensors]
        by_member = [part.split(sizes, dim=1) for part in arriving]
        return [self._in_order([parts[number] for parts in by_member]) for number in range(len(tensors))]

    def to_tokens(
        self, tensors: Sequence[Tensor], heads: Sequence[int], communicator: Communicator, call_site: str
    ) -> list[Tensor]:
        """The way back: own tokens with all heads, ``heads`` of each tensor; of a head that several have, the sum.

        Collective over the members.
        """
        ways = len(self.members)
        leaving = [torch.cat([self._rows(x, member) for x in tensors], dim=1) for member in range(ways)]
        arriving = [torch.empty_like(leaving[self.index]) for _ in range(ways)]
        arriving[self.index] = leaving[self.index]
        self._exchange(leaving, arriving, communicator, call_site)
        by_member = [part.split([x.shape[1] for x in tensors], dim=1) for part in arriving]
        return [_joined([parts[number] for parts in by_member], all_heads) for number, all_heads in enumerate(heads)]

    def _exchange(
        self, leaving: Sequence[Tensor], arriving: Sequence[Tensor], communicator: Communicator, call_site: str
    ) -> None:
        """Send to every other member what leaves for it, and receive what arrives from it; empty messages are not sent."""
        others = [(index, rank) for index, rank in enumerate(self.members) if index != self.index]
        sends = [(leaving[index], rank) for index, rank in others if leaving[index].numel()]
        receives = [(arriving[index], rank) for index, rank in others if arriving[index].numel()]
        wait(communicator.exchange(sends, receives, call_site) if sends or receives else [])

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """The tokens of all members, which each has sent head before tail, in the order of the sequence."""
        by_share = [*zip(parts, self.shares, strict=True)]
        heads = [part[: share.head_tokens] for part, share in by_share]
        tails = [part[share.head_tokens :] for part, share in reversed(by_share)]
        return torch.cat(heads + tails)

    def _rows(self, x_NHD: Tensor, member: int) -> Tensor:
        """The tokens of a member, head before tail."""
        share = self.shares[member]
        head = sum(other.head_tokens for other in self.shares[:member])
        tail = x_NHD.shape[0] - sum(other.tail_tokens for other in self.shares[: member + 1])
        return torch.cat([x_NHD[head : head + share.head_tokens], x_NHD[tail : tail + share.tail_tokens]])


def _joined(parts: Sequence[Tensor], heads: int) -> Tensor:
    """All heads [T, heads, D] of what every member has of them; what several have is added up in their order."""
    ways = len(parts)
    if heads % ways == 0:
        return torch.cat(list(parts), dim=1)
    tokens, _, size = parts[0].shape
    total = parts[0].new_zeros(tokens, heads, size, dtype=accumulation_dtype(parts[0].dtype))
    for index, part in enumerate(parts):
        total[:, heads_of(heads, ways, index)] += part
    return total.to(parts[0].dtype)


__all__ = ["BACKWARD", "FORWARD", "HeadGroup"]

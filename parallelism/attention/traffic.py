"""What the attention of shared sequences sends, by formula; nothing here looks at the code that communicates.

Sizes are elements of one token on one rank. Of the d members of a ring, u neighbours at a time divide the heads:

- each sends its T tokens to each of the u - 1 others, with what that one computes of queries, keys and values, 1/u of them
  (but at least one head of keys and values), and gets T tokens of output back, 1/u wide; backward likewise, output gradients
  there, gradients of queries, keys and values back. Where the output waited on the host, so did nothing else that attention
  needs: queries, keys, values and outputs go along with the gradients;
- the d/u ranks with the same heads, each for the tokens of its group, pass keys and values around: the block of an owner
  visits all others. Those before it need all of it, those behind it only its head. Its gradient starts at the member before
  the owner and is handed on until it is home; that of the first owner is only ever the head's, because nobody else sees its
  tail;
- or they gather them: every chunk goes straight to those who hold a later one, and its gradients come straight back.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from evermesh.parallelism.batch_plan import Piece
from evermesh.parallelism.ledger import Traffic
from evermesh.parallelism.links import tiers_from
from evermesh.parallelism.pieces import share_of

_AXIS = "hdp"


class AttentionSizes(NamedTuple):
    """Of the layers of one rank."""

    layers: int
    repeated: int
    """Layers whose attention is computed again in the backward pass."""
    offloaded: int
    """Layers where nothing of attention is computed again, because its output waits on the host."""
    query_elements: int
    """Of the queries of one token, and so of its output."""
    key_value_elements: int
    """Of its keys and values."""
    head_elements: int
    """Of one head of keys and values."""
    bytes_per_element: int

    @property
    def gradient_bytes(self) -> int:
        """Of an element of a gradient that adds up."""
        return max(4, self.bytes_per_element)


def sequence_traffic(
    length: int, piece: Piece, sizes: AttentionSizes, nodes: Sequence[int], *, recomputed: bool
) -> Iterator[Traffic]:
    """What all members of the ring of ``piece`` send for a sequence of ``length`` tokens, in all layers.

    Args:
        length: tokens of the sequence.
        piece: of any member.
        sizes: of the layers.
        nodes: index of the node of every rank that a ring may name.
        recomputed: whether its micro-batches do with activations as the layers say; otherwise they keep all.
    """
    for message in sequence_messages(length, piece, sizes, recomputed=recomputed):
        num_bytes = message.layers * message.num_bytes
        tier = tiers_from(message.sender, nodes)[message.receiver]
        yield Traffic(message.call_site, "send", _AXIS, tier, num_bytes, num_bytes, message.layers)


class Message(NamedTuple):
    """Between two ranks, once in each of some layers."""

    call_site: str
    sender: int
    receiver: int
    num_bytes: int
    layers: int


def sequence_messages(length: int, piece: Piece, sizes: AttentionSizes, *, recomputed: bool) -> Iterator[Message]:
    """Who sends what to whom; arguments as for ``sequence_traffic``."""
    if not recomputed:
        sizes = sizes._replace(repeated=0, offloaded=0)
    for message in _messages(length, piece, sizes):
        if message.layers * message.num_bytes:  # empty messages are not sent
            yield message


def _messages(length: int, piece: Piece, sizes: AttentionSizes) -> Iterator[Message]:
    ways, members = piece.heads, len(piece.ring)
    shares = [share_of(length, members, index) for index in range(members)]
    own = sizes
    if ways > 1:
        key_values = max(sizes.key_value_elements // ways, sizes.head_elements)
        own = sizes._replace(query_elements=sizes.query_elements // ways, key_value_elements=key_values)
        for first in range(0, members, ways):
            tokens = {piece.ring[i]: shares[i].num_tokens for i in range(first, first + ways)}
            yield from _by_heads(tokens, own)
    groups = [shares[first : first + ways] for first in range(0, members, ways)]
    chunks = [(sum(s.head_tokens for s in group), sum(s.tail_tokens for s in group)) for group in groups]
    for place in range(ways):
        around = _gathered if piece.gathers else _passed
        yield from around(piece.ring[place::ways], chunks, own)


def _by_heads(tokens: dict[int, int], sizes: AttentionSizes) -> Iterator[Message]:
    """Between neighbours; ``tokens`` are those of each rank."""
    queries, key_values = sizes.query_elements, sizes.key_value_elements
    forward, kept = sizes.layers + sizes.repeated, sizes.layers - sizes.offloaded
    for sender, receiver in itertools.permutations(tokens, 2):
        own, theirs = (tokens[rank] * sizes.bytes_per_element for rank in (sender, receiver))
        yield Message("heads forward", sender, receiver, own * (queries + key_values), forward)
        yield Message("heads forward", sender, receiver, theirs * queries, forward)
        yield Message("heads backward", sender, receiver, own * queries, kept)
        yield Message("heads backward", sender, receiver, own * (3 * queries + key_values), sizes.offloaded)
        yield Message("heads backward", sender, receiver, theirs * (queries + key_values), sizes.layers)


def _passed(ring: Sequence[int], chunks: Sequence[tuple[int, int]], sizes: AttentionSizes) -> Iterator[Message]:
    """Around a ring whose members hold ``chunks``: tokens of head and tail."""
    size, forward = len(ring), sizes.layers + sizes.repeated
    for owner, receiver in itertools.product(range(size), repeat=2):
        head, tail = chunks[owner]
        link = ring[(receiver + 1) % size], ring[receiver]
        if receiver != owner:
            visible = (head + tail if receiver < owner else head) * sizes.key_value_elements * sizes.bytes_per_element
            yield Message("ring forward", *link, visible, forward)
            yield Message("ring backward", *link, visible, sizes.layers)
        if receiver != (owner - 1) % size:
            carried = (head + tail if owner else head) * sizes.key_value_elements * sizes.gradient_bytes
            yield Message("ring gradients", *link, carried, sizes.layers)


def _gathered(ring: Sequence[int], chunks: Sequence[tuple[int, int]], sizes: AttentionSizes) -> Iterator[Message]:
    """Straight between members that hold ``chunks``; in the order of the sequence all heads, then all tails backward."""
    size, forward = len(ring), sizes.layers + sizes.repeated
    for owner, receiver in itertools.permutations(range(size), 2):
        head, tail = chunks[receiver]
        last = 2 * size - 1 - receiver if tail else receiver if head else -1
        for chunk, tokens in zip((owner, 2 * size - 1 - owner), chunks[owner], strict=True):
            if chunk < last:
                elements = tokens * sizes.key_value_elements
                num_bytes = elements * sizes.bytes_per_element
                yield Message("gather forward", ring[owner], ring[receiver], num_bytes, forward)
                yield Message("gather backward", ring[owner], ring[receiver], num_bytes, sizes.layers)
                wide = elements * sizes.gradient_bytes
                yield Message("gather gradients", ring[receiver], ring[owner], wide, sizes.layers)


__all__ = ["AttentionSizes", "Message", "sequence_messages", "sequence_traffic"]

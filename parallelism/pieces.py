"""How a sequence is cut over a ring: balanced head and tail chunks, for any length and any ring size.

A sequence of L tokens over d ranks is cut into 2d consecutive chunks; member k gets chunk k (its *head*) and chunk
2d-1-k (its *tail*), so that early tokens, which see little, are paired with late tokens, which see much (zig-zag, as in
ring-flash-attention and ByteScale's dist-attn). When 2d does not divide L, the chunks d, d+1, ..., 2d-1, then
0, 1, ... get one token more. With that order members differ by at most one token and by at most L (query, key) pairs.
"""

from typing import NamedTuple


class Share(NamedTuple):
    """The token ranges [start, stop) of one ring member; either may be empty."""

    head: tuple[int, int]
    tail: tuple[int, int]

    @property
    def head_tokens(self) -> int:
        """Tokens of the head."""
        return self.head[1] - self.head[0]

    @property
    def tail_tokens(self) -> int:
        """Tokens of the tail."""
        return self.tail[1] - self.tail[0]

    @property
    def num_tokens(self) -> int:
        """Tokens of both."""
        return self.head_tokens + self.tail_tokens

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The ranges that hold tokens, ascending, merged where they touch."""
        (head_start, head_stop), (tail_start, tail_stop) = self
        if head_stop == tail_start and head_start < tail_stop:
            return ((head_start, tail_stop),)
        return tuple(part for part in self if part[0] < part[1])

    def num_pairs(self) -> int:
        """(query, key) pairs that a causal mask leaves to these queries."""
        return sum((stop * (stop + 1) - start * (start + 1)) // 2 for start, stop in self)


def share_of(length: int, ring_size: int, index: int) -> Share:
    """What member ``index`` of a ring of ``ring_size`` holds of a sequence of ``length`` tokens."""
    return Share(_chunk(length, ring_size, index), _chunk(length, ring_size, 2 * ring_size - 1 - index))


def joint_share(length: int, ring_size: int, first: int, number: int) -> Share:
    """What ``number`` consecutive members hold together, from member ``first`` on: again one head and one tail.

    In the order of the sequence the heads lie in the order of the members, the tails in the opposite one.
    """
    outer, inner = share_of(length, ring_size, first), share_of(length, ring_size, first + number - 1)
    return Share((outer.head[0], inner.head[1]), (inner.tail[0], outer.tail[1]))


def _chunk(length: int, ring_size: int, chunk: int) -> tuple[int, int]:
    return _chunk_start(length, ring_size, chunk), _chunk_start(length, ring_size, chunk + 1)


def _chunk_start(length: int, ring_size: int, chunk: int) -> int:
    size, remainder = divmod(length, 2 * ring_size)
    longer_tails = min(remainder, ring_size)
    longer_heads = remainder - longer_tails
    return chunk * size + min(chunk, longer_heads) + min(max(chunk - ring_size, 0), longer_tails)

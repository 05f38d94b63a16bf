"""The double binary tree of NCCL: two trees over n members, each for half of the bytes, no member inside of both.

As its source computes them (``src/graph/trees.cc``): the first is a binary tree in the order of the numbers; the second is
its mirror image, or where n is odd the same shifted by one.
"""


def parents(number: int) -> tuple[tuple[int | None, ...], tuple[int | None, ...]]:
    """By tree, by member: the member above it; None for the root."""
    first = tuple(_parent(member, number) for member in range(number))
    if number % 2:
        shifted = (first[(member - 1) % number] for member in range(number))
        return first, tuple(None if up is None else (up + 1) % number for up in shifted)
    mirrored = (first[number - 1 - member] for member in range(number))
    return first, tuple(None if up is None else number - 1 - up for up in mirrored)


def _parent(member: int, number: int) -> int | None:
    if member == 0:
        return None
    bit = member & -member
    up = (member ^ bit) | (bit << 1)
    return up if up < number else member ^ bit


__all__ = ["parents"]

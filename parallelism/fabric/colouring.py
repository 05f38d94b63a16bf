"""Spreading streams between leaves over equal spines, with a proof; the theory of Clos networks.

The streams are the edges of a bipartite multigraph, from leaves that send to leaves that receive. The edges of each leaf are
put in order of their bytes and cut into groups of m, and each group becomes a vertex of its own. No vertex has more
than m edges then, so m colours are enough to colour them so that no two edges of a vertex are alike (König 1916). The
colour is the spine.

What a leaf with B bytes in streams of at most w sends over one spine is then at most one stream of each of its groups. The
largest of a group is no larger than the mean of the group before it, so this is at most **B / m + w**. And where all streams
are alike, it is ceil(number / m) streams, which nobody can beat.
"""

from collections.abc import Sequence

import numpy as np

from evermesh.parallelism.fabric.wiring import Floats, Ints


def spread_evenly(source: Ints, target: Ints, num_bytes: Floats, spines: int) -> list[int]:
    """The spine, 0 to ``spines`` - 1, of every stream from leaf ``source`` to leaf ``target``; see the head of this file."""
    vertices = _groups(source, num_bytes, spines), _groups(target, num_bytes, spines)
    edges = list(zip(vertices[0].tolist(), vertices[1].tolist(), strict=True))
    return colour_edges(edges, spines)


def _groups(leaf: Ints, num_bytes: Floats, size: int) -> Ints:
    """A vertex for every edge: the edges of a leaf, largest first, in groups of ``size``."""
    order = np.lexsort((np.arange(len(leaf)), -num_bytes, leaf))
    ordered = leaf[order]
    starts = np.flatnonzero(np.diff(ordered, prepend=-1))
    counts = np.diff(np.append(starts, len(leaf)))
    within = np.arange(len(leaf)) - np.repeat(starts, counts)
    groups = -(-counts // size)
    found = np.empty(len(leaf), np.int64)
    found[order] = np.repeat(np.cumsum(groups) - groups, counts) + within // size
    return found


def colour_edges(edges: Sequence[tuple[int, int]], colours: int) -> list[int]:
    """A colour for every edge of a bipartite multigraph, so that no two at a vertex are alike.

    ``edges`` have a vertex on the left and one on the right, no vertex more than ``colours`` edges. Where two ends have no
    free colour in common, the path from the right end that alternates between a colour free on the left and one free on
    the right changes them: it cannot lead to the left end.
    """
    all_free = (1 << colours) - 1
    free: tuple[dict[int, int], dict[int, int]] = ({}, {})
    held: tuple[dict[tuple[int, int], int], dict[tuple[int, int], int]] = ({}, {})
    chosen = [-1] * len(edges)

    def paint(edge: int, colour: int) -> None:
        chosen[edge] = colour
        for side in (0, 1):
            vertex = edges[edge][side]
            held[side][vertex, colour] = edge
            free[side][vertex] = free[side].get(vertex, all_free) & ~(1 << colour)

    def strip(edge: int) -> None:
        for side in (0, 1):
            vertex = edges[edge][side]
            del held[side][vertex, chosen[edge]]
            free[side][vertex] |= 1 << chosen[edge]

    for edge, (left, right) in enumerate(edges):
        on_left, on_right = free[0].get(left, all_free), free[1].get(right, all_free)
        assert on_left, "no vertex has more edges than there are colours"
        assert on_right, "no vertex has more edges than there are colours"
        common = on_left & on_right
        if not common:
            one, other = _lowest(on_left), _lowest(on_right)
            path, vertex, side, colour = [], right, 1, one
            while (found := held[side].get((vertex, colour))) is not None:
                path.append(found)
                side = 1 - side
                vertex, colour = edges[found][side], one + other - colour
            swapped = [one + other - chosen[found] for found in path]
            for found in path:
                strip(found)
            for found, colour in zip(path, swapped, strict=True):
                paint(found, colour)
            common = 1 << one
        paint(edge, _lowest(common))
    return chosen


def _lowest(mask: int) -> int:
    return (mask & -mask).bit_length() - 1


__all__ = ["colour_edges", "spread_evenly"]

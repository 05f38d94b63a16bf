"""Dealing out nodes so that two kinds of domains that cross each other are both spread as far as can be.

A node is an edge between its rack and its rail, a stripe is a colour. Cut every rack and every rail into vertices of at
most as many edges as there are colours; then a colouring in which no vertex has a colour twice gives no stripe more
than ceil(c / n) nodes of a domain of c. It exists because the graph is bipartite (D. König, 1916), and its proof is how
it is found here. Classes are then made equally large: in the edges of two colours, some path has more of the larger
class, and is recoloured.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import TypeAlias

Vertex: TypeAlias = tuple[int, Hashable, int]


class _Colouring:
    def __init__(self, edges: Sequence[tuple[Vertex, Vertex]], colours: int) -> None:
        self._edges, self._colours = edges, colours
        self.colour_of: dict[int, int] = {}
        self._edge_at: dict[tuple[Vertex, int], int] = {}

    def colour(self, edge: int) -> None:
        """Give an edge a colour that is free at both its ends, after recolouring a path where there is none."""
        first, second = self._edges[edge]
        here, there = self._free(first), self._free(second)
        if (second, here) in self._edge_at:
            self._swap(self._path(second, here, there), here, there)
        self._set(edge, here)

    def balance(self) -> None:
        """Make the numbers of edges per colour differ by one at most."""
        while True:
            sizes = [0] * self._colours
            for colour in self.colour_of.values():
                sizes[colour] += 1
            most, least = sizes.index(max(sizes)), sizes.index(min(sizes))
            if sizes[most] - sizes[least] < 2:
                return
            self._swap(self._longer_in(most, least), most, least)

    def _longer_in(self, most: int, least: int) -> list[int]:
        """A path that begins and ends with the colour ``most``, of two colours of which that has more edges."""
        for (vertex, colour), _ in list(self._edge_at.items()):
            if colour == most and (vertex, least) not in self._edge_at:
                path = self._path(vertex, most, least)
                if len(path) % 2:
                    return path
        raise AssertionError("the larger of two colours has a path of its own")

    def _free(self, vertex: Vertex) -> int:
        return next(colour for colour in range(self._colours) if (vertex, colour) not in self._edge_at)

    def _path(self, vertex: Vertex, colour: int, other: int) -> list[int]:
        """Edges from ``vertex`` on whose colours alternate, the first with ``colour``."""
        path = []
        while (edge := self._edge_at.get((vertex, colour))) is not None:
            path.append(edge)
            first, second = self._edges[edge]
            vertex = second if vertex == first else first
            colour, other = other, colour
        return path

    def _swap(self, path: list[int], colour: int, other: int) -> None:
        before = {edge: self.colour_of.pop(edge) for edge in path}
        for edge, old in before.items():
            for vertex in self._edges[edge]:
                del self._edge_at[vertex, old]
        for edge, old in before.items():
            self._set(edge, other if old == colour else colour)

    def _set(self, edge: int, colour: int) -> None:
        self.colour_of[edge] = colour
        for vertex in self._edges[edge]:
            self._edge_at[vertex, colour] = edge


def deal_crossing(domains: Sequence[tuple[Hashable, Hashable]], number: int) -> list[int]:
    """A stripe of ``number`` for every node, given its two domains; the order of nodes decides between equals."""
    seen: dict[tuple[int, Hashable], int] = defaultdict(int)
    edges = []
    for pair in domains:
        ends = []
        for side, domain in enumerate(pair):
            ends.append((side, domain, seen[side, domain] // number))
            seen[side, domain] += 1
        edges.append((ends[0], ends[1]))
    colouring = _Colouring(edges, number)
    for edge in range(len(edges)):
        colouring.colour(edge)
    colouring.balance()
    return [colouring.colour_of[edge] for edge in range(len(edges))]

"""Moving streams from one spine to another until no link can be relieved.

A stream that leaves spine s for spine t relieves s at both its leaves, and burdens t. Where that is too much for t, another
stream goes from t to s instead, and so on along a chain between these two spines: the argument by which König colours
edges, for streams of any size, links of any speed, and links that are missing. A chain that does not make the
loads better is taken back, so they never get worse.
"""

from collections.abc import Iterator

import numpy as np

from evermesh.parallelism.fabric.wiring import Floats, Ints

_TINY = 1e-9
"""Relative; loads that differ by less are equal."""
_MOST_STARTS = 8
"""Streams of different size with which a chain from a link is tried."""
_LONGEST = (4, 32, None)
"""Streams of a chain: short ones are tried first, so that little moves; None: any number. Only the largest load is worth
more than a short one."""

Link = tuple[int, int, int]
"""Side (0 up, 1 down), leaf, spine."""
_Vertex = tuple[int, int]


class Repair:
    """Streams between leaves and the spine of each, ``spine``, which it changes.

    Args:
        ends: leaf that sends, leaf that receives, by stream.
        num_bytes: by stream.
        spine: by stream.
        speeds: of the links, by leaf, by spine; 0: there is none.
        base: bytes of others, by side, by leaf, by spine.
    """

    def __init__(self, ends: tuple[Ints, Ints], num_bytes: Floats, spine: Ints, speeds: Floats, base: Floats) -> None:
        self.spine: list[int] = spine.tolist()
        self._ends = tuple(zip(ends[0].tolist(), ends[1].tolist(), strict=True))
        self._num_bytes: list[float] = num_bytes.tolist()
        with np.errstate(divide="ignore"):
            self._per_byte = np.where(speeds > 0, 1.0 / speeds, np.inf)
        loads = base.copy()
        for side in (0, 1):
            np.add.at(loads[side], (ends[side], spine), num_bytes)
        self.seconds = np.where(loads > 0, loads * np.where(speeds > 0, self._per_byte, 0.0), 0.0)
        """By side, by leaf, by spine."""
        self._members: dict[Link, dict[int, None]] = {}
        for stream, (leaves, at) in enumerate(zip(self._ends, self.spine, strict=True)):
            for side in (0, 1):
                self._members.setdefault((side, leaves[side], at), {})[stream] = None

    def lower_most(self, bound: float) -> None:
        """Relieve the link with the largest load until one cannot be, or none has more than ``bound`` seconds."""
        while (most := float(self.seconds.max(initial=0.0))) > bound * (1 + _TINY):
            side, leaf, spine = (int(at) for at in np.unravel_index(self.seconds.argmax(), self.seconds.shape))
            link = side, leaf, spine
            if not any(self._relieve(link, most, longest, all_spines=True) for longest in _LONGEST):
                return

    def level(self, rounds: int = 2) -> None:
        """Lower the sum of squares: of every leaf, from the link with the largest load to that with the smallest."""
        for _ in range(rounds):
            changed = False
            for side, leaf in np.ndindex(self.seconds.shape[:2]):
                if self.seconds[side, leaf].any():
                    row = self.seconds[side, leaf]
                    while self._relieve((side, leaf, int(row.argmax())), None, _LONGEST[0], all_spines=False):
                        changed = True
            if not changed:
                return

    def _relieve(self, link: Link, most: float | None, longest: int | None, *, all_spines: bool) -> bool:
        side, leaf, spine = link
        row = self.seconds[side, leaf]
        members = self._members.get(link, {})
        targets = [at for at in np.argsort(row, kind="stable").tolist() if row[at] < row[spine] * (1 - _TINY)]
        targets = [at for at in targets if np.isfinite(self._per_byte[leaf, at])]
        for other in targets if all_spines else targets[:1]:
            for stream in _different(members, self._num_bytes):
                if np.isfinite(self._per_byte[self._ends[stream][1 - side], other]) and self._try(
                    stream, (spine, other), (side, leaf), most, longest
                ):
                    return True
        return False

    def _try(self, start: int, pair: tuple[int, int], vertex: _Vertex, most: float | None, longest: int | None) -> bool:
        """Move ``start`` from one spine to the other and whatever has to follow; False: it was all taken back."""
        before: dict[_Vertex, tuple[float, float]] = {}
        moved: dict[int, int] = {}
        queue = self._move(start, pair, before, moved)
        while queue:
            at = queue.pop()
            limit = max(before[at])
            if at == vertex:
                limit = limit * (1 - _TINY)
            if most is not None:
                limit = max(limit, most * (1 - _TINY)) if at != vertex else most * (1 - _TINY)
            over = next((one for one in pair if self.seconds[(*at, one)] > limit * (1 + _TINY / 10)), None)
            if over is None:
                continue
            follower = self._best(at, over, sum(pair) - over, moved)
            if follower is None or (longest is not None and len(moved) >= longest):
                self._take_back(moved)
                return False
            queue += self._move(follower, pair, before, moved)
        if self._is_better(before, pair, most):
            return True
        self._take_back(moved)
        return False

    def _move(
        self, stream: int, pair: tuple[int, int], before: dict[_Vertex, tuple[float, float]], moved: dict[int, int]
    ) -> list[_Vertex]:
        """Put a stream on the other spine of ``pair``; its two leaves."""
        vertices = [(side, self._ends[stream][side]) for side in (0, 1)]
        for at in vertices:
            if at not in before:
                before[at] = float(self.seconds[(*at, pair[0])]), float(self.seconds[(*at, pair[1])])
        moved[stream] = self.spine[stream]
        self._put(stream, pair[0] + pair[1] - self.spine[stream])
        return vertices

    def _put(self, stream: int, spine: int) -> None:
        old, size = self.spine[stream], self._num_bytes[stream]
        for side in (0, 1):
            leaf = self._ends[stream][side]
            del self._members[side, leaf, old][stream]
            self._members.setdefault((side, leaf, spine), {})[stream] = None
            self.seconds[side, leaf, old] -= size * self._per_byte[leaf, old]
            self.seconds[side, leaf, spine] += size * self._per_byte[leaf, spine]
        self.spine[stream] = spine

    def _take_back(self, moved: dict[int, int]) -> None:
        for stream, spine in moved.items():
            self._put(stream, spine)

    def _best(self, at: _Vertex, over: int, other: int, moved: dict[int, int]) -> int | None:
        """Of the streams on the spine that carries too much, the one that leaves the two most alike."""
        side, leaf = at
        best, least = None, np.inf
        high, low = float(self.seconds[(*at, over)]), float(self.seconds[(*at, other)])
        rates = float(self._per_byte[leaf, over]), float(self._per_byte[leaf, other])
        for stream in self._members.get((side, leaf, over), ()):
            if stream in moved or not np.isfinite(self._per_byte[self._ends[stream][1 - side], other]):
                continue
            size = self._num_bytes[stream]
            result = max(high - size * rates[0], low + size * rates[1])
            if result < least * (1 - _TINY):
                best, least = stream, result
        return best

    def _is_better(self, before: dict[_Vertex, tuple[float, float]], pair: tuple[int, int], most: float | None) -> bool:
        old = [value for values in before.values() for value in values]
        new = [float(self.seconds[(*at, spine)]) for at in before for spine in pair]
        if max(new) > max(old) * (1 + _TINY):
            return False
        if most is not None:
            top = most * (1 - _TINY)
            return sum(value >= top for value in new) < sum(value >= top for value in old)
        return sum(value**2 for value in new) < sum(value**2 for value in old) * (1 - _TINY)


def _different(members: dict[int, None], num_bytes: list[float]) -> Iterator[int]:
    """Streams of different sizes, largest first."""
    sizes: dict[float, int] = {}
    for stream in members:
        sizes.setdefault(num_bytes[stream], stream)
    for size in sorted(sizes, reverse=True)[:_MOST_STARTS]:
        yield sizes[size]


__all__ = ["Repair"]

"""What agents tell of the connections of their ranks, as the whole job at about one moment."""

from collections.abc import Iterator

from evermesh.fault.connections import Connection
from evermesh.launcher.watching.messages import Connections

Seen = dict[int, list[Connection]]
"""By rank: connections that hold something, and those that are new."""
_OWN = ("127.", "[::1]", "[::ffff:127.", "::1")
"""Begin addresses that mean another machine on every machine."""


class Ways:
    """Of one generation on so many nodes."""

    def __init__(self, num_nodes: int) -> None:
        self._num_nodes = num_nodes
        self._told: dict[str, Seen] = {}
        self._news: Seen = {}

    def take(self, node: str, told: Connections) -> None:
        """Take what an agent tells."""
        for rank, ends in (told.ends or {}).items():
            known = (Connection(_at(told, local), _at(told, remote), 0, 0, 0) for local, remote in ends)
            self._news[rank] = list(known)
        self._told[node] = {rank: list(_held(told, rank)) for rank in told.held}

    def seen(self) -> Seen | None:
        """What all nodes have told since the last call; None: some have not."""
        if len(self._told) < self._num_nodes:
            return None
        seen, self._news = self._news, {}
        for of_node in self._told.values():
            for rank, held in of_node.items():
                seen.setdefault(rank, []).extend(held)
        self._told = {}
        return seen


def _held(told: Connections, rank: int) -> Iterator[Connection]:
    for one in told.held[rank]:
        ends = _at(told, one.local), _at(told, one.remote)
        yield Connection(*ends, one.waiting_bytes, one.resent, one.segment_bytes)


def _at(told: Connections, end: str) -> str:
    return f"{told.host}/{end}" if end.startswith(_OWN) else end

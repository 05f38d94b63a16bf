"""The byte ledger: what was sent, counted from the records of the tap."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from evermesh.parallelism.collectives import CollectiveRecord, Phase
from evermesh.parallelism.links import Operation, Tier, tiers_from, wire_bytes

Cell = tuple[str, Operation, str, Tier]
"""What bytes are counted by: call site, operation, mesh axis, tier of the link."""


@dataclass(frozen=True, slots=True, order=True)
class Traffic:
    """What went through one cell; payload and wire bytes as ``evermesh.parallelism.links`` defines them."""

    call_site: str
    operation: Operation
    axis: str
    tier: Tier
    payload_bytes: int
    """Bytes of the buffers that ranks handed in."""
    wire_bytes: int
    """Bytes that ranks sent."""
    calls: int
    """Operations that ranks issued: one per message, and for a collective one per rank."""

    @property
    def cell(self) -> Cell:
        """Where it is counted."""
        return self.call_site, self.operation, self.axis, self.tier

    @property
    def counts(self) -> tuple[int, int, int]:
        """Payload bytes, wire bytes, calls."""
        return self.payload_bytes, self.wire_bytes, self.calls


def add_up(parts: Iterable[Traffic]) -> tuple[Traffic, ...]:
    """One ``Traffic`` per cell, sorted."""
    counts: dict[Cell, tuple[int, int, int]] = {}
    for part in parts:
        payload_bytes, sent_bytes, calls = counts.get(part.cell, (0, 0, 0))
        counts[part.cell] = payload_bytes + part.payload_bytes, sent_bytes + part.wire_bytes, calls + part.calls
    return tuple(sorted(Traffic(*cell, *count) for cell, count in counts.items()))


class ByteLedger:
    """Counts what this process sends, by step and phase, until it is taken; a sink for taps.

    Threads may share it as long as each has axes of its own: they never change the same cell, and what touches the
    dictionaries as a whole is atomic. A lock would cost as much as the counting.
    """

    def __init__(self) -> None:
        self._counts: defaultdict[tuple[int, Phase], dict[Cell, list[int]]] = defaultdict(dict)

    def __call__(self, record: CollectiveRecord) -> None:
        """Add one record."""
        if record.operation == "receive":
            return  # the sender has counted it
        counts = self._counts[record.step, record.phase]
        cell = (record.call_site, record.operation, record.axis, record.tier)
        count = counts.get(cell)
        if count is None:
            count = counts[cell] = [0, 0, 0]
        count[0] += record.num_bytes
        count[1] += record.wire_bytes
        count[2] += 1

    def take(self) -> dict[str, int]:
        """Payload bytes by call site since the last call."""
        taken, self._counts = self._counts, defaultdict(dict)
        sites: Counter[str] = Counter()
        for counts in taken.values():
            for (call_site, *_), (payload_bytes, _, _) in counts.items():
                sites[call_site] += payload_bytes
        return dict(sites)

    def take_step(self, step: int, phase: Phase = "train") -> tuple[Traffic, ...]:
        """What was sent in this phase of ``step``. It is forgotten, and so are all earlier steps."""
        counts = self._counts.pop((step, phase), {})
        for moment in [moment for moment in list(self._counts) if moment[0] < step]:
            del self._counts[moment]
        return tuple(sorted(Traffic(*cell, *count) for cell, count in counts.items()))


def collective_traffic(
    call_site: str, operation: Operation, axis: str, payload_bytes: int, nodes: Sequence[int]
) -> Iterator[Traffic]:
    """What each rank sends in one collective, from rank 0 where it has a source; ``payload_bytes`` of every rank.

    One rank alone communicates with nobody.
    """
    ranks = len(nodes)
    for rank in range(ranks if ranks > 1 else 0):
        tier = tiers_from(rank, nodes)[(rank + 1) % ranks]
        sent = wire_bytes(operation, payload_bytes, ranks, rank)
        yield Traffic(call_site, operation, axis, tier, payload_bytes, sent, 1)

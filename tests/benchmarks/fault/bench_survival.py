"""The odds to recover from lost nodes: stripes, and copies in the same memory and in more; counted and simulated."""

from evermesh.fault.snapshot.stripes.survival import replicated, replicated_within, simulated, striped
from tests.benchmarks.harness import Row

_TRIALS = 20_000
_LOSSES = 4


def run() -> list[Row]:
    """Stripes of 6+2 and of 3+1 on 16, 128 and 1024 nodes."""
    rows = []
    for nodes in (16, 128, 1024):
        for data, parity in ((6, 2), (3, 1)):
            sizes = [data + parity] * (nodes // (data + parity))
            ours = striped(sizes, parity, _LOSSES)
            others = (
                replicated(nodes, 2, _LOSSES),
                replicated_within(nodes, ours.memory, _LOSSES),
            )
            for losses in range(2, _LOSSES + 1):
                drawn = simulated(sizes, parity, losses, _TRIALS)
                counted = ours.survival(losses)
                assert drawn.low <= counted <= drawn.high, f"{counted} is not in {drawn}"
                for other in others:
                    what = f"{nodes} nodes, {losses} lost: {data}+{parity} (+{ours.memory:.0%}), recovered"
                    peer = f"{other.name} (+{other.memory:.0%})"
                    rows.append(Row(what, counted, "share", peer=peer, peer_value=other.survival(losses)))
    return rows

"""Which links the bytes of an operation take, and how many bytes that are.

A *link* goes from the rank that sends to the rank that receives, and has a tier: ``local`` within one process (nothing
is sent), ``node`` between two ranks of one node, ``network`` between two nodes.

*Payload* is the buffer that a rank hands to an operation. *Wire bytes* are what the rank then sends:

- a message: its payload, over the link from sender to receiver; the receiver sends nothing;
- ``all_to_all``: what goes to other ranks, each part over the link to its receiver. The operation counts once for every
  tier that these links have, with the bytes on links of that tier; what a rank keeps is no payload;
- a collective: what the bandwidth-optimal ring in rank order sends, the count behind the bus bandwidth of NCCL's tests
  (Patarasuk and Yuan, JPDC 2009). On it a rank sends to the next one only, so all its bytes take that one link. With n
  ranks and a payload of S bytes all ranks together send

  - ``all_reduce`` 2 (n-1) S, cut into n parts that differ by at most one byte, so that integers add up exactly;
  - ``all_gather`` n (n-1) S, every rank (n-1) S;
  - ``reduce_scatter`` (n-1) S, S being the buffer that is reduced, cut into parts like an ``all_reduce``;
  - ``broadcast`` (n-1) S, every rank S but the one before the source;
  - ``barrier`` nothing.

This counts what an operation needs, the same on every machine. A library may choose another algorithm: gloo and NCCL
send small tensors along trees, which takes more bytes and fewer hops.
"""

from collections.abc import Sequence
from typing import Literal

Operation = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "barrier", "send", "receive"
]
Tier = Literal["local", "node", "network"]
TIERS: tuple[Tier, ...] = ("local", "node", "network")


def tiers_from(rank: int, nodes: Sequence[int]) -> tuple[Tier, ...]:
    """Tier of the link from ``rank`` to every rank; ``nodes`` holds the node index of each."""
    return tuple(
        "local" if peer == rank else "node" if node == nodes[rank] else "network" for peer, node in enumerate(nodes)
    )


def wire_bytes(operation: Operation, payload_bytes: int, ranks: int, position: int) -> int:
    """Bytes that one rank sends; ``position`` counts from the source of a broadcast, otherwise from rank 0."""
    if operation in ("send", "all_to_all"):
        return payload_bytes
    if operation in ("all_reduce", "reduce_scatter"):
        total = (2 if operation == "all_reduce" else 1) * (ranks - 1) * payload_bytes
        return (position + 1) * total // ranks - position * total // ranks
    if operation == "all_gather":
        return (ranks - 1) * payload_bytes
    if operation == "broadcast" and position < ranks - 1:
        return payload_bytes
    return 0


__all__ = ["TIERS", "Operation", "Tier", "tiers_from", "wire_bytes"]

"""Members of a stripe for tests: real processes with sockets over loopback, and what they hold."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from evermesh.fault.snapshot.coding import Code
from evermesh.fault.snapshot.stripes import Address, Membership, StripeRecord, StripeTransfer, listen, parity_bytes

SECRET = b"known to this job only"


@dataclass
class Node:
    """What the keeper of a member has."""

    data: bytearray
    parity: bytearray
    record: StripeRecord | None = None

    def lose(self) -> None:
        """Forget everything; what memory holds is garbage."""
        self.record = None
        self.data[:] = b"\xa5" * len(self.data)
        self.parity[:] = b"\x5a" * len(self.parity)

    def state(self) -> tuple[bytes, bytes, bytes]:
        """All that must be the same again."""
        assert self.record is not None
        return bytes(self.data), bytes(self.parity), self.record.to_bytes()


def random_node(seed: int, rank: int, num_bytes: int, code: Code, longest: int) -> Node:
    """A member with random data, and room for its parity."""
    data = np.random.default_rng((seed, rank)).integers(0, 256, num_bytes, np.uint8)
    return Node(bytearray(data.tobytes()), bytearray(parity_bytes(code, longest)))


def membership(rank: int, code: Code, port: int, **changes: object) -> Membership:
    """Of a member whose port is known to it alone: all others learn it. Collective."""
    ports: list[int] = [0] * code.parts
    dist.all_gather_object(ports, port)
    addresses = tuple(Address("127.0.0.1", port) for port in ports)
    return Membership(**{"rank": rank, "addresses": addresses, "code": code} | _COMMON | changes)  # type: ignore[arg-type]


_COMMON = {"stripe": "0", "generation": 7, "secret": SECRET}


def protect(rank: int, code: Code, node: Node, step: int, **options: object) -> StripeTransfer:
    """Open a transfer and protect a node; collective."""
    with closing(listen("127.0.0.1")) as listener:
        transfer = StripeTransfer(membership(rank, code, listener.getsockname()[1]), listener, **options)  # type: ignore[arg-type]
    node.record = transfer.protect(step, [memoryview(node.data)], memoryview(node.parity))
    return transfer


def open_transfer(rank: int, code: Code, absent: Iterable[int] = ()) -> StripeTransfer | None:
    """A new transfer of those that are not absent; collective."""
    with closing(listen("127.0.0.1")) as listener:
        mine = membership(rank, code, listener.getsockname()[1])
        return None if rank in absent else StripeTransfer(mine, listener, absent=absent, timeout_s=20)

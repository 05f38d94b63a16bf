"""The place of a node in a stripe, as its keeper is told."""

from typing import Any, NamedTuple

from evermesh.fault.snapshot.coding import Code
from evermesh.fault.snapshot.stripes import Address, Membership


class Place(NamedTuple):
    """The place of this node in its stripe."""

    mine: Membership
    """Its generation is the epoch: later ones replace earlier ones, also within an attempt."""
    ranks: tuple[int, ...]
    """Of this node."""
    bytes_per_s: float | None

    @classmethod
    def told(cls, order: dict[str, Any]) -> "Place":
        """As the order says. Raises ``LookupError``, ``TypeError`` or ``ValueError``."""
        addresses = tuple(Address(host, port) for host, port in order["addresses"])
        code, secret = Code.parse(order["code"]), bytes.fromhex(order["secret"])
        mine = Membership(order["member"], addresses, code, order["stripe"], order["epoch"], secret)
        return cls(mine, tuple(order["ranks"]), order["bytes_per_s"])

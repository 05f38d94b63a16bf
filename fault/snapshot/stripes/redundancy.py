"""What must be coded: data-parallel copies on other nodes are redundancy already, and are not protected a second
time."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Generic, TypeVar

Region = TypeVar("Region", bound=Hashable)
Node = TypeVar("Node", bound=Hashable)


@dataclass(frozen=True, slots=True)
class CodingNeed(Generic[Region, Node]):
    """Which node brings which regions into its stripe."""

    coded: Mapping[Node, tuple[Region, ...]]
    """Every region of too few holders once, at one of them."""
    copied: tuple[Region, ...]
    """Regions whose copies are protection enough."""
    coded_bytes: Mapping[Node, int]


def what_to_code(
    holders: Mapping[Region, AbstractSet[Node]],
    num_bytes: Mapping[Region, int],
    tolerance: int,
    domain: Callable[[Node], Hashable] | None = None,
) -> CodingNeed[Region, Node]:
    """Divide regions into those that survive the loss of any ``tolerance`` nodes as they are, and those that must be
    coded.

    A region survives if more than ``tolerance`` nodes hold it (with ``domain``: nodes of more than ``tolerance``
    failure domains). Any other is coded at one of its holders, that with the fewest bytes so far, the largest region
    first: then the bytes of holders that could share differ by one region at most.

    Args:
        holders: nodes that hold a copy of the region in their snapshot, at least one.
    """
    coded: dict[Node, list[Region]] = defaultdict(list)
    load: dict[Node, int] = dict.fromkeys(sorted(set().union(*holders.values()), key=repr), 0)
    copied = []
    for region in sorted(holders, key=lambda region: -num_bytes[region]):
        nodes = holders[region]
        if len({domain(node) if domain else node for node in nodes}) > tolerance:
            copied.append(region)
            continue
        owner = min(sorted(nodes, key=repr), key=lambda node: load[node])
        coded[owner].append(region)
        load[owner] += num_bytes[region]
    return CodingNeed({node: tuple(regions) for node, regions in coded.items()}, tuple(copied), load)

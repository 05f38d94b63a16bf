"""Networks of leaves and spines as they are built, to start a description of one's own from."""

from evermesh.parallelism.topology import Leaf, Nic, Node, Topology

_SIDES = "lrxyzuvw"


def leaf_spine(
    nodes: int,
    *,
    cards: int = 8,
    devices: int | None = None,
    ports: int = 2,
    port_bytes_per_s: float = 25e9,
    nodes_per_block: int = 16,
    spines: int = 8,
    uplink_bytes_per_s: float = 50e9,
    rails_per_leaf: int = 1,
) -> Topology:
    """Blocks of nodes under leaves of their own, every leaf with a link to each spine.

    Card i of a node is on rail i; a leaf serves ``rails_per_leaf`` rails of a block, on one port of each card.
    """
    leaves, made = dict[str, Leaf](), list[Node]()
    names = tuple(f"spine{number}" for number in range(spines))
    for number in range(nodes):
        block, nics = number // nodes_per_block, list[Nic]()
        for card in range(cards):
            wired = [
                f"leaf{block}.{card // rails_per_leaf}{_SIDES[side] if ports > 1 else ''}" for side in range(ports)
            ]
            for name in wired:
                leaves.setdefault(name, Leaf(name=name, spines=names, bytes_per_s=uplink_bytes_per_s))
            speed = ports * port_bytes_per_s
            nics.append(Nic(name=f"mlx5_{card}", nic_class="roce", bytes_per_s=speed, rail=card, leaves=tuple(wired)))
        made.append(
            Node(
                name=f"node{number}",
                devices=devices or cards,
                device_kind="h100",
                nics=tuple(nics),
                rack=f"rack{block}",
                intra_bytes_per_s=300e9,
            )
        )
    return Topology(nodes=tuple(made), leaves=tuple(leaves.values()))


__all__ = ["leaf_spine"]

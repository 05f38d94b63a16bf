"""Environments by node as text, and what is honest to say of them."""

import pytest

from evermesh.parallelism.errors import TrafficImpossible
from evermesh.parallelism.fabric.building import leaf_spine
from evermesh.parallelism.fabric.settings import env_text, environments, hostfile, what_holds
from evermesh.parallelism.fabric.wiring import Wiring
from evermesh.parallelism.topology import Leaf, Nic, Node, Topology

ETHERNET = Nic(name="eth0", nic_class="ethernet", bytes_per_s=1e9)


def _with_sockets(topology: Topology) -> Topology:
    nodes = tuple(node.model_copy(update={"nics": (*node.nics, ETHERNET)}) for node in topology.nodes)
    return topology.model_copy(update={"nodes": nodes})


def test_the_environment_of_bonded_cards_is_this() -> None:
    wiring = Wiring.of(_with_sockets(leaf_spine(2, cards=2)), (1, 0)).without(["node0/mlx5_1/0", "node0/mlx5_1/1"])
    found = environments(wiring, parts=2)
    assert env_text(found["node1"]) == (
        "NCCL_IB_HCA==mlx5_0,mlx5_1\n"
        "NCCL_IB_QPS_PER_CONNECTION=4\n"
        "NCCL_IB_SPLIT_DATA_ON_QPS=1\n"
        "NCCL_SOCKET_IFNAME==eth0\n"
        "GLOO_SOCKET_IFNAME=eth0\n"
        "NCCL_CROSS_NIC=0\n"
        "NCCL_P2P_PXN_LEVEL=2\n"
    )
    assert found["node0"] == found["node1"] | {"NCCL_IB_HCA": "=mlx5_0"}
    assert hostfile(wiring) == "node1 slots=2\nnode0 slots=2\n"


def test_a_path_and_a_port_are_never_said_to_be_enforced() -> None:
    holds = {part.part: part for part in what_holds(Wiring.of(leaf_spine(2)))}
    needs = [name for name, part in holds.items() if part.how == "needs a NCCL net plugin"]
    assert needs == [
        "half of them on each port of a bonded card, left to left and right to right",
        "the spine of each stream",
    ]
    variables = {name for of_node in environments(Wiring.of(leaf_spine(2))).values() for name in of_node}
    enforced = " ".join(part.by for part in holds.values() if part.how == "enforced")
    assert all(name in enforced for name in variables), "every variable that is written brings a part about"


def test_other_rails_in_one_node_are_not_said_to_be_kept() -> None:
    topology = leaf_spine(2, cards=2)
    swapped = tuple(nic.model_copy(update={"rail": 1 - nic.rail}) for nic in topology.nodes[1].nics)
    nodes = topology.nodes[0], topology.nodes[1].model_copy(update={"nics": swapped})
    wiring = Wiring.of(topology.model_copy(update={"nodes": nodes}))
    assert "NCCL_CROSS_NIC" not in environments(wiring, pxn=False)["node0"]
    assert environments(wiring, pxn=False)["node0"]["NCCL_PXN_DISABLE"] == "1"
    assert [part.how for part in what_holds(wiring) if part.part.startswith("rings")] == ["advisory"]


def _node(name: str, *nics: Nic) -> Node:
    return Node(name=name, devices=2, nics=nics)


def test_nodes_with_different_fast_cards_use_the_one_that_all_have() -> None:
    wired = ETHERNET.model_copy(update={"leaves": ("leaf",)})
    fast = [Nic(name="mlx5_0", nic_class=kind, bytes_per_s=5e9, leaves=("leaf",)) for kind in ("infiniband", "roce")]
    leaves = (Leaf(name="leaf", bytes_per_s=1e9),)
    topology = Topology(nodes=(_node("a", fast[0], wired), _node("b", fast[1], wired)), leaves=leaves)
    wiring = Wiring.of(topology)
    assert wiring.nic_class == "ethernet"
    assert environments(wiring)["a"]["NCCL_IB_DISABLE"] == "1"
    assert environments(wiring)["a"]["NCCL_SOCKET_IFNAME"] == "=eth0"
    with pytest.raises(TrafficImpossible, match=r"in all nodes \(a: infiniband; b: roce\)"):
        Wiring.of(topology.model_copy(update={"nodes": (_node("a", fast[0]), _node("b", fast[1]))}))


def test_what_a_topology_does_not_say_or_says_twice_is_refused_with_a_way_out() -> None:
    good = leaf_spine(2, cards=1)
    bare = Topology(nodes=(_node("a", ETHERNET), _node("b", ETHERNET)))
    with pytest.raises(TrafficImpossible, match=r"where card eth0 of node a is wired to\. Give it leaves"):
        Wiring.of(bare)
    uneven = good.model_copy(update={"nodes": (good.nodes[0], good.nodes[1].model_copy(update={"devices": 3}))})
    with pytest.raises(TrafficImpossible, match="node node1 has 3 devices, node node0 has 1"):
        Wiring.of(uneven)
    values = good.model_dump()
    for broken, message in (
        ({**values, "leaves": []}, r"wired to leaf leaf0\.0l, which leaves does not have"),
        ({**values, "leaves": [*values["leaves"], values["leaves"][0]]}, r"two leaves leaf0\.0l"),
        ({**values, "leaves": [{**leaf, "spines": ["leaf0.0r"]} for leaf in values["leaves"]]}, "a leaf and a spine"),
        ({**values, "leaves": [{**leaf, "spines": ["s", "s"]} for leaf in values["leaves"]]}, "names spine s twice"),
    ):
        with pytest.raises(ValueError, match=message):
            Topology.model_validate(broken)
    assert Topology.model_validate_json(good.model_dump_json()) == good

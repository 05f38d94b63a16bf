"""Which nodes take which places on a network that agents, a topology or the job file tell, and what NCCL is told."""

import itertools
from collections.abc import Sequence

import pytest

from evermesh.fault.events import read_events
from evermesh.fault.hardware.model import FoundNic, NodeHardware
from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.network import Network, told_settings
from evermesh.launcher.controller.nodes import Nodes
from evermesh.launcher.controller.racks import most_in_rack
from evermesh.launcher.controller.recovery import Group, groups_of
from evermesh.launcher.controller.reporting import job_status
from evermesh.launcher.controller.seats import Asked, seat_nodes
from evermesh.launcher.messages import Hello
from evermesh.parallelism.topology import Leaf, Nic, Node, Topology
from tests.launcher.controller.worlds import world

MODEL = {"hidden": 64, "layers": 4, "heads": 4, "kv_heads": 4, "ffn": 128}
ALONE = (Group(0, (0,), None),)


def config(nodes: int = 4, per_node: int = 2, **layout: int) -> JobConfig:
    train = {
        "steps": 1,
        "model": MODEL,
        "data": {"sources": [{"kind": "stdlib"}], "context": 256, "batch_tokens": 4096},
        "layout": {"capacity": 256, **layout},
    }
    return JobConfig.model_validate({"workers": nodes * per_node, "nodes": nodes, "train": train})


def hardware(number: int, nic_class: str, rack: str | None) -> NodeHardware:
    """An interface for sockets, a second one, and two fast cards of which the second is down; or none."""
    address = f"10.0.0.{number}"
    nics = [FoundNic("eth0", "ethernet", True, 3e9, (address,)), FoundNic("eth1", "ethernet", True, 3e9, ("10.1.0.1",))]
    if nic_class != "ethernet":
        nics += [FoundNic(f"ib{at}", nic_class, at == 0, 50e9, (), f"mlx5_{at}", 1) for at in range(2)]
    return NodeHardware(tuple(nics), (), rack, "EVERMESH_RACK" if rack else "")


def nodes_of(classes: Sequence[str], racks: Sequence[str | None]) -> Nodes:
    found = Nodes()
    for number, (nic_class, rack) in enumerate(zip(classes, racks, strict=True)):
        name = f"node-{number}"
        found.expect(name)
        told = hardware(number, nic_class, rack)
        found.greet(Hello(node=name, host=f"host{number}", address=f"10.0.0.{number}", pid=7, hardware=told))
    return found


def names(number: int) -> tuple[str, ...]:
    return tuple(f"node-{at}" for at in range(number))


def test_data_parallel_groups_stay_in_one_class_of_cards_and_stages_meet_between() -> None:
    network = Network(config(pp=2), nodes_of(["infiniband", "roce"] * 2, [None] * 4))
    found = network.order(names(4))
    assert found is not None
    assert found.nodes == ("node-0", "node-2", "node-1", "node-3")
    assert "nodes take places in the order node-0, node-2, node-1, node-3" in found.told
    assert "MiB of a step go between racks or classes of cards" in found.told


def test_pipeline_neighbours_are_in_other_racks_rather_than_data_parallel_groups() -> None:
    network = Network(config(pp=2), nodes_of(["ethernet"] * 4, ["a", "b", "a", "b"]))
    found = network.order(names(4))
    assert found is not None
    assert found.nodes == ("node-0", "node-2", "node-1", "node-3")


@pytest.mark.parametrize("racks", [["a"] * 4, [None] * 4])
def test_where_all_nodes_are_alike_nothing_is_ordered(racks: list[str | None]) -> None:
    assert Network(config(pp=2), nodes_of(["roce"] * 4, racks)).order(names(4)) is None


def test_what_a_topology_says_of_a_host_counts_more_than_what_its_agent_tells() -> None:
    nics = {rack: (Nic(name="x", bytes_per_s=1e9, leaves=(rack,)),) for rack in "ab"}
    described = tuple(Node(name=f"host{at}", devices=8, nics=nics["ab"[at % 2]], rack="ab"[at % 2]) for at in range(4))
    given = Topology(nodes=described, leaves=tuple(Leaf(name=rack, bytes_per_s=1e9) for rack in "ab"))
    network = Network(config(pp=2), nodes_of(["roce"] * 4, ["z"] * 4), given)
    found = network.order(names(4))
    assert found is not None
    assert found.nodes == ("node-0", "node-2", "node-1", "node-3")
    assert network.racks == {"node-0": "a", "node-1": "b", "node-2": "a", "node-3": "b"}


def test_a_topology_of_racks_alone_leaves_cards_to_what_agents_tell() -> None:
    described = tuple(Node(name=f"host{at}", devices=8, rack="ab"[at % 2]) for at in range(4))
    network = Network(config(pp=2), nodes_of(["roce"] * 4, [None] * 4), Topology(nodes=described))
    found = network.order(names(4))
    assert found is not None
    assert found.nodes == ("node-0", "node-2", "node-1", "node-3")
    assert {one.name: one.value for one in network.settings(names(4))["node-1"]}["NCCL_IB_HCA"] == "=mlx5_0"


def test_a_lost_node_is_replaced_by_the_spare_of_its_class_and_all_others_stay() -> None:
    nodes = nodes_of(["infiniband", "infiniband", "roce", "roce", "roce", "infiniband"], [None] * 6)
    network, before = Network(config(pp=2), nodes), names(4)
    for lost, spare in (("node-1", "node-5"), ("node-2", "node-4")):
        ready = [name for name in names(6) if name != lost]
        first = tuple("node-4" if name == lost else name for name in before)
        found = seat_nodes(Asked(first, before, ready), network, ALONE).nodes
        assert found == tuple(spare if name == lost else name for name in before)
        suspected = {spare: 0.4}  # another is better than one that may be at fault
        other = next(name for name in ("node-4", "node-5") if name != spare)
        ready = sorted(ready, key=lambda name: suspected.get(name, 0.0))
        found = seat_nodes(Asked(first, before, ready, suspected), network, ALONE).nodes
        assert found == tuple(other if name == lost else name for name in before)


@pytest.mark.parametrize("code", ["none", "1+1", "3+1"])
def test_stripes_stay_as_far_apart_as_they_can_be_and_then_as_little_as_can_be_is_sent_over_slow_ways(
    code: str,
) -> None:
    groups = groups_of(4, code)
    for labels in itertools.product("ab", repeat=4):
        network = Network(config(pp=2), nodes_of(["ethernet"] * 4, list(labels)))
        found = seat_nodes(Asked(names(4), (), names(4)), network, groups).nodes
        racks = network.racks
        least = min(most_in_rack(order, racks, groups) for order in itertools.permutations(names(4)))
        if code != "none":
            assert most_in_rack(found, racks, groups) == least
        else:
            in_stages = [len({racks[name] for name in found[first : first + 2]}) for first in (0, 2)]
            assert sum(in_stages) == (2 if labels.count("a") in (0, 2, 4) else 3), "as few as any order has"


def settings(classes: Sequence[str], racks: Sequence[str | None] | None = None) -> dict[str, dict[str, str]]:
    nodes = nodes_of(classes, racks or [None] * len(classes))
    found = Network(config(len(classes)), nodes).settings(names(len(classes)))
    return {node: {one.name: one.value for one in of_node} for node, of_node in found.items()}


def test_settings_name_the_cards_that_are_up_and_the_interface_of_the_nodes_address() -> None:
    expected = {"NCCL_IB_HCA": "=mlx5_0", "NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    assert settings(["infiniband"] * 2) == dict.fromkeys(names(2), expected)


def test_where_nodes_have_no_fast_class_in_common_it_is_switched_off_and_said_why() -> None:
    sockets = {"NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"}
    assert settings(["infiniband", "ethernet"]) == {"node-0": sockets | {"NCCL_IB_DISABLE": "1"}, "node-1": sockets}
    found = Network(config(2), nodes_of(["infiniband", "roce"], [None] * 2)).settings(names(2))
    [why] = [one.because for one in found["node-0"] if one.name == "NCCL_IB_DISABLE"]
    assert why == "not all nodes have infiniband: the fastest class that all have is ethernet"
    assert told_settings(found) == "NCCL_IB_DISABLE=1, NCCL_SOCKET_IFNAME==eth0, GLOO_SOCKET_IFNAME=eth0"


def test_nodes_that_tell_nothing_are_told_nothing() -> None:
    nodes = nodes_of(["roce"], [None])
    nodes["node-0"].hardware = None
    assert Network(config(1), nodes).settings(names(1)) == {}


def test_tensor_parallelism_that_leaves_nodes_is_told_with_bytes_and_a_way_out() -> None:
    wide = Network(config(2, tp=4), nodes_of(["roce"] * 2, [None] * 2)).tensor_warning(2)
    assert wide.startswith("train.layout.tp is 4, but a node has 2 workers: tensor parallelism sends ")
    assert " MiB of a step between nodes" in wide
    assert wide.endswith("Set train.layout.tp to 2, or use nodes with 4 workers.")
    assert not wide.startswith("0.0", wide.index("sends ") + 6)
    for layout in ({"tp": 2}, {"tp": 1}, {"pp": 2}):
        assert Network(config(2, **layout), nodes_of(["roce"] * 2, [None] * 2)).tensor_warning(2) == ""


def test_a_controller_starts_ranks_in_the_order_of_the_network_with_the_settings_of_their_nodes() -> None:
    train = config(pp=2).train.model_dump(mode="json") | {"snapshot": None}
    with world(workers=8, nodes=4, spares=0, train=train) as job:
        for number, agent in enumerate(job.agents.values()):
            agent.hardware, agent.address = (
                hardware(number, ("infiniband", "roce")[number % 2], None),
                f"10.0.0.{number}",
            )
        job.settle(2.0)
        assert job.controller.life is not None
        assert job.controller.life.nodes == ("node-0", "node-2", "node-1", "node-3")
        ranks = {name: agent.ranks for name, agent in job.agents.items() if agent.ranks is not None}
        assert [ranks[name].place.first_rank for name in names(4)] == [0, 4, 2, 6]
        expected = {"NCCL_IB_DISABLE": "1", "NCCL_SOCKET_IFNAME": "=eth0", "GLOO_SOCKET_IFNAME": "eth0"}
        assert all(of_node.settings == expected for of_node in ranks.values())
        [told] = [node for node in job_status(job.controller).nodes if node.node == "node-3"]
        assert told.hardware == job.agents["node-3"].hardware
        assert {one.name: one.value for one in told.settings} == expected
        texts = {event.kind: event.text for event in read_events(job.run.events)}
        assert "order node-0, node-2, node-1, node-3" in texts["nodes ordered"]
        assert texts["settings"].startswith("NCCL and gloo: NCCL_IB_DISABLE=1")

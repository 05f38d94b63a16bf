"""The search finds what trying everything finds, only layouts that are valid and fit, and says why."""

import itertools
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from evermesh.parallelism import Layout, LayoutDoesNotFit, ModelShape, Topology
from evermesh.parallelism.cost import ExpertShape
from evermesh.parallelism.layout.device import DEVICES
from evermesh.parallelism.layout.explain import compare, explain, fields_of
from evermesh.parallelism.layout.memory import Occupancy, fullest, layout_memory
from evermesh.parallelism.layout.network import Network, node_orders
from evermesh.parallelism.layout.options import ActivationChoice, SearchOptions
from evermesh.parallelism.layout.search import RankedLayout, estimate_layout, search_layouts
from evermesh.parallelism.layout.sizes import balanced_layers
from evermesh.parallelism.tiers import Degree, Tiers
from evermesh.parallelism.topology import Nic, Node
from tests.parallelism.layout.shapes import LLAMA3_8B, LLAMA3_70B, LLAMA3_405B, SMALL

LENGTHS = [[3000, 800, 1200, 500, 500, 700, 1500, 2500, 4000, 900, 1100, 600] * 4]
EXPERTS = SMALL.model_copy(
    update={"experts": ExpertShape(layers=8, experts=4, active_ffn=2 * 352, top_k=2), "ffn": 352, "layers": 8}
)
CAPACITIES = (1024, 4096, 8192)
FEW = SearchOptions(
    device=DEVICES["a100"].model_copy(update={"memory_bytes": 400 * 2**20, "reserve_bytes": 0}),
    schedules=(("1f1b", 1), ("interleaved-1f1b", 2), ("zero-bubble", 1)),
    activations=(ActivationChoice(policy="keep"), ActivationChoice(policy="recompute")),
    capacities=CAPACITIES,
    planned=0,
    top=3,
)


def _node(name: str, nic_class: str, gigabytes_per_s: float, devices: int = 2) -> Node:
    nics = (
        Nic(name="fast", nic_class=nic_class, bytes_per_s=gigabytes_per_s * 1e9),
        Nic(name="eth0", nic_class="ethernet", bytes_per_s=1e9),
    )
    return Node(name=name, devices=devices, nics=nics, intra_bytes_per_s=50e9)


MIXED = Topology(
    nodes=(
        _node("a", "infiniband", 25),
        _node("b", "roce", 20),
        _node("c", "infiniband", 25),
        _node("d", "roce", 20),
    ),
    speeds=(1.0, 1.0, 0.6, 0.6, 1.0, 1.0, 0.6, 0.6),
)


def _every_layout(shape: ModelShape, topology: Topology, options: SearchOptions) -> Iterator[tuple[Layout, Network]]:
    """All that the search may choose from, on every order of the nodes, without any cleverness."""
    world = topology.world_size
    degrees = [
        (pp, hdp, tp, ep, etp)
        for pp, hdp, tp, ep, etp in itertools.product(range(1, world + 1), repeat=5)
        if pp * hdp * tp == world and tp <= topology.nodes[0].devices
    ]
    alike = len({node.model_copy(update={"name": ""}) for node in topology.nodes}) == 1 and not topology.speeds
    orders = itertools.permutations(range(len(topology.nodes)))
    for order in itertools.islice(orders, 1) if alike else orders:
        network = Network(topology, order)
        for (pp, hdp, tp, ep, etp), (name, virtual), activations, capacity in itertools.product(
            degrees, options.schedules, options.activations, options.capacities
        ):
            if (pp == 1 and (name, virtual) != ("1f1b", 1)) or etp > topology.nodes[0].devices:
                continue
            fields = {
                "pp": pp, "hdp": hdp, "tp": tp, "ep": ep, "etp": etp, "schedule": name, "virtual_stages": virtual,
                "activations": activations.policy, "capacity": capacity,
            }  # fmt: skip
            layout = Layout.model_validate(fields)
            if options.supports is not None and not options.supports(layout):
                continue
            splits = _splits(shape, layout) if pp > 1 and not network.is_even else ("flops",)
            parts = options.tp_chunks if tp > 1 and activations.policy != "offload" else (1,)
            held = [*options.tiers, *_within_nodes(layout, topology)]
            for split, tiers, chunks in itertools.product(splits, held, parts):
                yield layout.model_copy(update={"split": split, "sharding": tiers, "tp_chunks": chunks}), network


def _within_nodes(layout: Layout, topology: Topology) -> list[Tiers]:
    """What is divided among the ranks of a node, where there are several and they divide all."""
    near = topology.nodes[0].devices // layout.tp
    if near == 1 or near >= layout.hdp or layout.hdp % near:
        return []
    gradients: list[Degree] = [near, "all"]
    return [Tiers(parameters=near, gradients=degree, keep_for="micro_batch") for degree in gradients]


def _splits(shape: ModelShape, layout: Layout) -> Iterator[tuple[int, ...]]:
    """Of the layers into stages, every one."""
    for cuts in itertools.combinations(range(1, shape.layers), layout.pipeline.num_stages - 1):
        yield tuple(stop - start for start, stop in itertools.pairwise((0, *cuts, shape.layers)))


def _fits(shape: ModelShape, layout: Layout, options: SearchOptions) -> bool:
    use = Occupancy(options.device.reserve_bytes, longest=max(LENGTHS[0]), imbalance=options.imbalance)
    memory = fullest(layout_memory(shape, layout, options.precision, use))
    return memory.total <= options.device.memory_bytes and max(LENGTHS[0]) <= layout.capacity * layout.hdp


def _brute_force(shape: ModelShape, topology: Topology, options: SearchOptions) -> float:
    best = float("inf")
    for layout, network in _every_layout(shape, topology, options):
        try:
            found = estimate_layout(shape, topology, LENGTHS, layout, options, network.order)
            fits = _fits(shape, layout, options)
        except LayoutDoesNotFit:
            continue
        if fits:
            best = min(best, found.step.total)
    return best


@pytest.mark.parametrize(
    ("shape", "topology"),
    [
        (SMALL, DEVICES["a100"].topology(2, 2)),
        (SMALL, DEVICES["a100"].topology(1, 8)),
        (EXPERTS, DEVICES["a100"].topology(2, 2)),
    ],
    ids=["2 nodes of 2", "1 node of 8", "experts"],
)
def test_nothing_is_faster_than_what_the_search_finds(shape: ModelShape, topology: Topology) -> None:
    ranked = search_layouts(shape, topology, LENGTHS, FEW)
    assert ranked[0].step.total == pytest.approx(_brute_force(shape, topology, FEW), rel=1e-12)
    assert ranked[0].step.total <= ranked[1].step.total <= ranked[2].step.total


@pytest.mark.parity
@pytest.mark.parametrize("seed", range(24))
def test_nothing_is_faster_on_any_hardware(seed: int) -> None:
    """Rates, links, memory and fixed costs drawn over orders of magnitude; some draws leave nothing that fits."""
    draw = random.Random(seed)
    drawn = {
        "flops_per_s": 10 ** draw.uniform(12, 15),
        "attention_flops_per_s": 10 ** draw.uniform(12, 15),
        "memory_bytes": int(10 ** draw.uniform(7.3, 8.7)),
        "memory_bytes_per_s": 10 ** draw.uniform(10, 12),
        "link_bytes_per_s": 10 ** draw.uniform(8, 11),
        "network_bytes_per_s": 10 ** draw.uniform(7, 10),
        "layer_s": 10 ** draw.uniform(-6, -3),
        "hop_s": 10 ** draw.uniform(-7, -4),
    }
    device = FEW.device.model_copy(update=drawn)
    options = FEW.model_copy(update={"device": device})
    shape, topology = draw.choice([SMALL, EXPERTS]), device.topology(*draw.choice([(2, 2), (4, 1), (1, 4), (3, 2)]))
    best = _brute_force(shape, topology, options)
    if best == float("inf"):
        with pytest.raises(LayoutDoesNotFit, match="no layout fits"):
            search_layouts(shape, topology, LENGTHS, options)
    else:
        assert search_layouts(shape, topology, LENGTHS, options)[0].step.total == pytest.approx(best, rel=1e-12)


def test_no_order_of_mixed_nodes_with_any_split_is_faster() -> None:
    topology = MIXED.model_copy(update={"nodes": MIXED.nodes[:3], "speeds": MIXED.speeds[:6]})
    few = FEW.model_copy(
        update={
            "capacities": (4096,),
            "schedules": (("1f1b", 1), ("interleaved-1f1b", 2)),
            "activations": FEW.activations[:1],
            "tiers": FEW.tiers[:2],
            "supports": lambda layout: layout.pp > 1,
        }
    )
    found = search_layouts(SMALL, topology, LENGTHS, few)[0]
    best = _brute_force(SMALL, topology, few)
    print(f"\nfound {found.step.total:.6g} s, best of all {best:.6g} s, {found.layout}")
    assert found.step.total == pytest.approx(best, rel=1e-12)


def test_with_little_memory_something_is_given_up_for_it() -> None:
    topology = DEVICES["a100"].topology(1, 8)
    tight = FEW.model_copy(update={"device": FEW.device.model_copy(update={"memory_bytes": 60 * 2**20})})
    roomy, found = (search_layouts(SMALL, topology, LENGTHS, options)[0] for options in (FEW, tight))
    assert found.memory.total <= 60 * 2**20 < roomy.memory.total
    assert found.step.total > roomy.step.total
    assert found.step.total == pytest.approx(_brute_force(SMALL, topology, tight), rel=1e-12)


def test_what_never_fits_is_refused_with_what_comes_nearest() -> None:
    device = FEW.device.model_copy(update={"memory_bytes": 2**20})
    with pytest.raises(LayoutDoesNotFit, match=r"nearest needs .* Use more nodes"):
        search_layouts(SMALL, DEVICES["a100"].topology(1, 2), LENGTHS, FEW.model_copy(update={"device": device}))


def test_what_the_runtime_cannot_run_is_left_out() -> None:
    topology = DEVICES["a100"].topology(1, 8)
    only = FEW.model_copy(update={"supports": lambda layout: layout.pp == 4})
    assert {found.layout.pp for found in search_layouts(SMALL, topology, LENGTHS, only)} == {4}


def test_the_finalists_are_planned_and_ranked_by_their_plans() -> None:
    topology = DEVICES["a100"].topology(1, 8)
    ranked = search_layouts(SMALL, topology, LENGTHS, FEW.model_copy(update={"planned": 4}))
    assert all(found.is_planned for found in ranked)
    assert [found.step.total for found in ranked] == sorted(found.step.total for found in ranked)


# Holmes (arXiv 2312.03549)


@pytest.mark.parametrize(
    ("layers", "speeds", "expected"),
    [
        (30, (197.0, 160.0), (17, 13)),
        (36, (197.0, 160.0, 122.0), (15, 12, 9)),
        (48, (197.0, 197.0, 122.0, 122.0), (15, 15, 9, 9)),
    ],
)
def test_stages_have_layers_in_proportion_to_their_speed(
    layers: int, speeds: tuple[float, ...], expected: tuple[int, ...]
) -> None:
    shape = SMALL.model_copy(update={"layers": layers, "vocabulary": 1})
    split = tuple(map(len, balanced_layers(shape, len(speeds), speeds)))
    slowest = max(number / speed for number, speed in zip(split, speeds, strict=True))
    cuts = itertools.combinations(range(1, layers), len(speeds) - 1)
    every = (tuple(b - a for a, b in itertools.pairwise((0, *cut, layers))) for cut in cuts)
    best = min(max(n / v for n, v in zip(one, speeds, strict=True)) for one in every)
    assert slowest == pytest.approx(best)
    assert sorted(split) == sorted(expected)


def test_data_parallel_groups_stay_on_one_kind_of_network() -> None:
    """Nodes come interleaved; the search puts those alike side by side, and only pipeline edges between them."""
    found = search_layouts(SMALL, MIXED, LENGTHS, FEW.model_copy(update={"supports": lambda layout: layout.pp == 2}))[0]
    assert found.node_order in {(0, 2, 1, 3), (1, 3, 0, 2)}
    assert isinstance(found.layout.split, tuple)
    first, second = found.layout.split
    fast_first = found.node_order[0] == 0
    assert (first > second) == fast_first
    interleaved = estimate_layout(SMALL, MIXED, LENGTHS, found.layout, FEW)
    assert interleaved.step.total > 1.2 * found.step.total
    assert any("a, c, b, d" in line or "b, d, a, c" in line for line in explain([found], MIXED))


def test_alike_nodes_have_one_order() -> None:
    assert list(node_orders(DEVICES["h100"].topology(4, 8))) == [(0, 1, 2, 3)]
    assert len(list(node_orders(MIXED))) == 2


def test_nodes_without_a_common_network_are_refused() -> None:
    nodes = tuple(node.model_copy(update={"nics": node.nics[:1]}) for node in MIXED.nodes[:2])
    with pytest.raises(LayoutDoesNotFit, match="share no class of network cards"):
        search_layouts(SMALL, Topology(nodes=nodes), LENGTHS, FEW)


def test_nodes_of_different_size_are_refused() -> None:
    nodes = (_node("a", "roce", 20), _node("b", "roce", 20, devices=4))
    with pytest.raises(LayoutDoesNotFit, match="equally many"):
        search_layouts(SMALL, Topology(nodes=nodes), LENGTHS, FEW)


# what is said of it


def _big(shape: ModelShape, nodes: int, tokens: int, **options: object) -> list[RankedLayout]:
    draw, lengths, total = random.Random(0), list[int](), 0
    while total < tokens:
        lengths.append(max(1, min(32_768, int(draw.lognormvariate(7, 1.5)))))
        total += lengths[-1]
    given = SearchOptions.model_validate({"planned": 0} | options)
    return search_layouts(shape, DEVICES["h100"].topology(nodes, 8), [lengths], given)


def test_explanations_carry_the_numbers() -> None:
    ranked = _big(LLAMA3_70B, 16, 1_000_000)
    of_time, memory, next_one = explain(ranked, DEVICES["h100"].topology(16, 8))
    assert f"{ranked[0].step.total:.4g} s" in of_time
    assert "matrix products" in of_time
    assert f"{ranked[0].memory.total / 2**30:,.1f} of 80.0 GiB" in memory
    assert f"{ranked[1].step.total / ranked[0].step.total - 1:.1%} longer" in next_one
    assert next_one == compare(ranked[0], ranked[1])


def test_what_is_to_paste_is_the_layout() -> None:
    for found in _big(LLAMA3_8B, 4, 500_000):
        assert Layout.model_validate(fields_of(found.layout)) == found.layout


def test_tensor_parallel_groups_never_leave_their_node() -> None:
    """On MI250X nodes of 8 a trillion parameters were trained so (Dash et al., arXiv 2312.12705)."""
    assert all(found.layout.tp <= 8 for found in _big(LLAMA3_405B, 128, 4_000_000))


@pytest.mark.parametrize(
    ("shape", "nodes"),
    [(LLAMA3_70B, 128), pytest.param(LLAMA3_405B, 1536, marks=pytest.mark.parity)],
    ids=["1,024 devices", "12,288 devices"],
)
def test_thousands_of_devices_take_seconds(shape: ModelShape, nodes: int) -> None:
    began_s = time.thread_time()
    ranked = _big(shape, nodes, 16_000_000)
    took_s = time.thread_time() - began_s
    print(f"\n{8 * nodes:,} devices: {took_s:.1f} s, {ranked[0].layout}")
    assert 0.3 < ranked[0].mfu < 0.62
    assert took_s < nodes / 50 + 10  # some 1 and 4 s alone


def test_results_are_the_same_in_every_process() -> None:
    program = (
        "from evermesh.parallelism.layout.search import search_layouts;"
        "from evermesh.parallelism.layout.device import DEVICES;"
        "from evermesh.parallelism.layout.options import SearchOptions;"
        "from evermesh.parallelism import ModelShape;"
        f"shape = ModelShape.model_validate_json('{EXPERTS.model_dump_json()}');"
        f"lengths = {LENGTHS!r};"
        "found = search_layouts(shape, DEVICES['h100'].topology(1, 4), lengths, SearchOptions(planned=1, top=1));"
        "print([(one.layout.model_dump_json(), one.step.total) for one in found])"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "7")
    }
    assert len(seen) == 1

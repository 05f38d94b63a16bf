"""What a layout is said to take: against published step times, the traffic that ranks really send, and replayed pipelines."""

import itertools
from collections.abc import Sequence

import pytest

from evermesh.parallelism import Layout, Pool, Topology, plan_batch
from evermesh.parallelism.cost import FlopConvention, ModelShape
from evermesh.parallelism.layout.activations import Precision
from evermesh.parallelism.layout.device import DEVICES, Device
from evermesh.parallelism.layout.exchange import exchange
from evermesh.parallelism.layout.flops import model_flops, utilisation
from evermesh.parallelism.layout.network import Network
from evermesh.parallelism.layout.options import SearchOptions
from evermesh.parallelism.layout.rates import Hardware
from evermesh.parallelism.layout.sample import Batch
from evermesh.parallelism.layout.search import estimate_layout
from evermesh.parallelism.layout.sizes import rank_sets
from evermesh.parallelism.layout.throughput import Setup, bubble, estimate, planned
from evermesh.parallelism.pipeline.schedule import ScheduleName
from evermesh.parallelism.pipeline.simulator import StageSeconds, replay
from evermesh.parallelism.tiers import Tiers
from evermesh.parallelism.tiers_traffic import Rounds, owners_traffic
from tests.parallelism.layout.shapes import GPT3, LLAMA3_8B, MIXTRAL_8X7B, MT_NLG, SMALL

A100_PEAK = 312e12
_Row = tuple[int, int, float, float]
"""GPUs, sequences, seconds of a step, MFU in percent."""
MEGATRON: tuple[_Row, ...] = (
    (256, 768, 40.0, 53.0),
    (512, 768, 21.2, 49.9),
    (768, 768, 15.2, 46.7),
    (1024, 768, 11.9, 44.7),
    (3072, 6144, 29.02, 48.7),
    (6144, 6144, 14.78, 47.8),
    (8192, 6144, 12.24, 43.3),
    (12288, 6144, 8.57, 41.2),
)
MEGASCALE: tuple[_Row, ...] = (
    (256, 768, 32.0, 65.3),
    (512, 768, 16.5, 63.5),
    (768, 768, 11.5, 61.3),
    (1024, 768, 8.9, 59.0),
    (3072, 6144, 23.66, 59.1),
    (6144, 6144, 12.21, 57.3),
    (8192, 6144, 9.56, 54.9),
    (12288, 6144, 6.34, 55.2),
)
"""MegaScale (Jiang et al., NSDI 2024, table 2): 175B, sequences of 2,048 tokens, A100."""


@pytest.mark.parametrize(
    ("rows", "convention", "wrong"), [(MEGATRON, "full", 0), (MEGASCALE, "causal", 1)], ids=["Megatron-LM", "MegaScale"]
)
def test_published_utilisation_follows_from_the_step_time(
    rows: Sequence[_Row], convention: FlopConvention, wrong: int
) -> None:
    """The two halves of the table count differently; one row of MegaScale's does not follow from its own step time."""
    misses = []
    for gpus, sequences, seconds, percent in rows:
        flops = model_flops(GPT3, [2048] * sequences, convention)
        ours = 100 * utilisation(flops, seconds, gpus, A100_PEAK)
        print(f"\n{gpus:6} GPUs: {ours:.1f} %, published {percent} % ({convention})", end="")
        misses.append(abs(ours - percent) > 0.26)
    assert sum(misses) == wrong


def test_full_recomputation_gives_the_published_throughput_of_mt_nlg() -> None:
    """Smith et al. (arXiv 2201.11990): 126, 121, 113 TFLOP/s on 280, 350, 420 DGX A100."""
    for nodes, seconds, published in ((280, 60.1, 126), (350, 50.2, 121), (420, 44.4, 113)):
        ours = model_flops(MT_NLG, [2048] * 1920, "full", recomputed=True) / seconds / (8 * nodes) / 1e12
        print(f"\n{nodes} nodes: {ours:.1f} TFLOP/s, published {published}: {ours / published - 1:+.1%}", end="")
        assert ours == pytest.approx(published, rel=0.01)


def _calibrated(
    shape: ModelShape, layouts: Sequence[Layout], batches: Sequence[int], published_s: Sequence[float]
) -> list[float]:
    """Deviations of all rows, after the rate of the device is set so that the first is right."""
    device, deviations = DEVICES["a100"], list[float]()
    for layout, sequences, seconds in zip(layouts, batches, published_s, strict=True):
        topology, lengths = device.topology(layout.world_size // 8, 8), [[2048] * sequences]
        if not deviations:
            device = _matching(device, shape, topology, lengths, layout, seconds)
        ours = _step_s(device, shape, topology, lengths, layout)
        deviations.append(ours / seconds - 1)
        print(f"\n{layout.world_size:6} GPUs: {ours:.2f} s, published {seconds} s: {deviations[-1]:+.1%}", end="")
    print(f"\ncalibrated rate: {device.flops_per_s / 1e12:.0f} TFLOP/s")
    return deviations


def _step_s(device: Device, shape: ModelShape, topology: Topology, lengths: list[list[int]], layout: Layout) -> float:
    return estimate_layout(shape, topology, lengths, layout, SearchOptions(device=device)).step.total


def _matching(
    device: Device, shape: ModelShape, topology: Topology, lengths: list[list[int]], layout: Layout, seconds: float
) -> Device:
    low, high = 50e12, 312e12
    for _ in range(40):
        rate = (low + high) / 2
        device = device.model_copy(update={"flops_per_s": rate, "attention_flops_per_s": 0.7 * rate})
        if _step_s(device, shape, topology, lengths, layout) > seconds:
            low = rate
        else:
            high = rate
    return device


@pytest.mark.parametrize("rows", [MEGATRON, MEGASCALE], ids=["Megatron-LM", "MegaScale"])
def test_strong_scaling_of_the_175b_model_is_predicted_from_one_row(rows: Sequence[_Row]) -> None:
    """TP 8, PP 8, six virtual stages, micro-batches of one sequence (MegaScale, table 1)."""
    layouts = [
        Layout(tp=8, pp=8, hdp=gpus // 64, schedule="interleaved-1f1b", virtual_stages=6, capacity=2048)
        for gpus, *_ in rows
    ]
    deviations = _calibrated(GPT3, layouts, [row[1] for row in rows], [row[2] for row in rows])
    assert max(map(abs, deviations)) < 0.1


def test_scaling_of_mt_nlg_is_predicted_from_one_row() -> None:
    """TP 8, PP 35, data parallel 8, 10, 12, full recomputation, micro-batches of one sequence."""
    layouts = [Layout(tp=8, pp=35, hdp=hdp, capacity=2048, activations="recompute") for hdp in (8, 10, 12)]
    deviations = _calibrated(MT_NLG, layouts, [1920] * 3, [60.1, 50.2, 44.4])
    assert max(map(abs, deviations)) < 0.05


TIERS = (
    Tiers(),
    Tiers(gradients="all"),
    Tiers(parameters="all", gradients="all"),
    Tiers(parameters=2, gradients=2),
    Tiers(parameters=2, gradients=4, states="all"),
)


@pytest.mark.parametrize("tiers", TIERS)
@pytest.mark.parametrize("shape", [SMALL, MIXTRAL_8X7B], ids=["dense", "experts"])
def test_seconds_of_an_exchange_are_the_bytes_that_ranks_send_over_the_links_they_use(
    tiers: Tiers, shape: ModelShape
) -> None:
    """On one node every link has one speed, so seconds x speed are the wire bytes of a rank."""
    layout = Layout(hdp=8, ep=2 if shape.experts else 1, sharding=tiers)
    network = Network(DEVICES["h100"].topology(1, 8))
    sets = rank_sets(shape, layout, 0)
    found = exchange(sets, layout, network, 2)
    sent = 0
    for sizes in sets:
        division = layout.expert_division if sizes.of_experts else layout.division
        groups = 8 // division.ranks
        traffic = owners_traffic(sizes, division, Rounds(1, 1, 1), "hdp", [0] * division.ranks, 2)
        sent += groups * sum(part.wire_bytes for part in traffic)
    assert sum(found) * network.intra_bytes_per_s == pytest.approx(sent / 8, rel=1e-6)


_SCHEDULES: list[tuple[ScheduleName, int]] = [
    ("1f1b", 1),
    ("interleaved-1f1b", 2),
    ("interleaved-1f1b", 4),
    ("zero-bubble", 1),
    ("zero-bubble", 2),
    ("zero-bubble-v", 2),
]


@pytest.mark.parametrize(("name", "virtual"), _SCHEDULES)
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_bubble_is_that_of_the_replayed_pipeline(name: ScheduleName, virtual: int, activations: str) -> None:
    for ranks, number in itertools.product((2, 4, 8), (1, 2, 5, 8, 16, 32)):
        layout = Layout.model_validate(
            {"pp": ranks, "schedule": name, "virtual_stages": virtual, "activations": activations}
        )
        again = activations == "recompute"
        one = 1.0 / (3 + again) / virtual
        stages = [StageSeconds(one, one * (1 + again), one)] * layout.pipeline.num_stages
        idle = replay(layout.pipeline, [[stages] * number]).makespan_s - number
        assert idle >= bubble(layout) - 1e-9
        if number % ranks == 0 and number >= 2 * ranks:
            assert idle == pytest.approx(bubble(layout))


def _setup(layout: Layout, nodes: int) -> Setup:
    return Setup.of(
        LLAMA3_8B, layout, Hardware(Network(DEVICES["h100"].topology(nodes, 8)), DEVICES["h100"], Precision())
    )


LENGTHS = [3000, 800, 12_000, 500, 500, 7000, 1500, 2500, 40_000, 900, 1100, 5000] * 6


@pytest.mark.parametrize(
    "degrees", [{"hdp": 16}, {"hdp": 8, "tp": 2}, {"hdp": 4, "pp": 2, "tp": 2, "schedule": "zero-bubble"}], ids=str
)
def test_a_planned_step_is_the_makespan_of_the_plan_and_what_is_exchanged(degrees: dict[str, object]) -> None:
    layout = Layout.model_validate(degrees | {"capacity": 16_384})
    setup, batch = _setup(layout, 2), Batch(LENGTHS)
    step = planned(setup, [batch])
    plan = plan_batch(LENGTHS, layout, setup.rates.cost_model(), pool=Pool.of(layout.hdp, 8 // layout.tp))
    uneven = setup.unevenness(batch.pairs / batch.tokens)
    exchanged = sum(setup.traffic.once.values())
    messages = step.parts["messages"]
    assert step.total == pytest.approx(plan.certificate.makespan_s * uneven + exchanged + messages)
    # the formula takes equal micro-batches; plans of pipelines begin and end with small ones
    assert estimate(setup, [batch]).total <= step.total * (1.02 if layout.pp == 1 else 1.05)


def test_parts_of_a_step_add_up_and_none_is_negative() -> None:
    for degrees in ({"hdp": 16}, {"hdp": 2, "pp": 4, "tp": 2}):
        step = estimate(_setup(Layout.model_validate(degrees | {"capacity": 32_768}), 2), [Batch(LENGTHS)])
        assert sum(step.parts.values()) == step.total
        assert min(step.parts.values()) >= 0


@pytest.mark.parametrize("offload", ["auto", 0.0, 0.5, 1.0])
def test_a_step_that_offloads_is_that_of_its_plan_and_auto_is_never_slower(offload: float | str) -> None:
    """The formula takes all micro-batches as one, so it is never above the plan; its parts add up."""
    fields = {"hdp": 16, "capacity": 16_384, "activations": "offload"}
    layout = Layout.model_validate(fields | {"offload": offload})
    setup, batch = _setup(layout, 2), Batch(LENGTHS)
    found, planned_step = estimate(setup, [batch]), planned(setup, [batch])
    assert sum(found.parts.values()) == found.total
    assert min(found.parts.values()) >= 0
    assert setup.least([batch], layout.capacity) <= found.total * (1 + 1e-12) <= planned_step.total * 1.02
    plan = plan_batch(LENGTHS, layout, setup.rates.cost_model(), pool=Pool.of(layout.hdp, 8))
    assert planned_step.total >= plan.certificate.makespan_s
    chosen = _setup(Layout.model_validate(fields | {"offload": "auto"}), 2)
    assert estimate(chosen, [batch]).total <= found.total * (1 + 1e-12)
    assert planned(chosen, [batch]).total <= planned_step.total


def test_rates_of_a_block_that_offloads_are_those_of_its_matrices_and_bytes() -> None:
    """Of LLaMA 3 8B on an H100, by hand: what is computed again at a fraction of 0 is what a fraction of 1 saves."""
    rates = _setup(Layout(hdp=16, activations="offload", offload="auto"), 2).rates
    elements = 32 * 4096 * ((32 + 16) * 128 + 2 * 14_336)
    assert rates.saved == rates.recompute == pytest.approx(2 * elements / 600e12)
    assert rates.host == pytest.approx(32 * (3 * 4096 * 2 + 32 * 4) / 50e9)
    assert rates.host_products == pytest.approx(32 * 2 * ((32 + 16) * 128 + 2 * 14_336) / 50e9)


def test_a_group_across_nodes_is_as_fast_as_its_share_of_the_cards() -> None:
    device = DEVICES["h100"]
    network = Network(device.topology(4, 8))
    assert network.group_bytes_per_s(8, 1) == device.link_bytes_per_s
    assert network.group_bytes_per_s(32, 1) == min(device.link_bytes_per_s, 8 * device.network_bytes_per_s)
    assert network.group_bytes_per_s(4, 8) == device.network_bytes_per_s
    assert network.group_bytes_per_s(16, 2) == 4 * device.network_bytes_per_s

"""The memory of a layout by formula: against published figures, the orders of schedules, and what autograd really keeps."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from evermesh.parallelism import Communicator, Layout, LayoutDoesNotFit, MicroBatch, ModelShape, Piece
from evermesh.parallelism.attention.kernels import kernel_for
from evermesh.parallelism.attention.micro_batch import MicroBatchAttention
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.parallelism.layout.activations import Precision, block_tokens
from evermesh.parallelism.layout.memory import Occupancy, fullest, layout_memory, stages_in_flight
from evermesh.parallelism.layout.sizes import num_parameters, rank_sets
from evermesh.parallelism.layout.states import state_memory
from evermesh.parallelism.pipeline.schedule import PipelineSchedule, ScheduleName, peak_activations
from evermesh.runtime.memory.policy import recompute_activations
from evermesh.runtime.memory.sizes import offloaded_bytes
from evermesh.runtime.model.config import ModelConfig, MoeConfig
from evermesh.runtime.model.decoder import Decoder, keep_activations
from tests.parallelism.layout.shapes import (
    GPT3,
    GPT_7B,
    LLAMA3_8B,
    LLAMA3_70B,
    LLAMA3_405B,
    MIXTRAL_8X7B,
    MT_NLG,
    SMALL,
)

BF16 = Precision()
MODEL = ModelConfig(hidden=64, layers=3, heads=4, kv_heads=2, ffn=176, vocabulary=96)
MOE = MODEL.model_copy(update={"moe": MoeConfig(experts=4, top_k=2, ffn=48, shared_ffn=32)})
VOCABULARY, TOKENS = 96, 64


@pytest.mark.parametrize(
    ("shape", "billions"),
    [
        (LLAMA3_8B, 8.03),
        (LLAMA3_70B, 70.55),
        (LLAMA3_405B, 405.85),
        (MIXTRAL_8X7B, 46.70),
        (GPT3, 174.6),
        (MT_NLG, 530.0),
    ],
)
def test_known_models_have_as_many_parameters_as_published(shape: ModelShape, billions: float) -> None:
    assert num_parameters(shape) / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize(("shape", "gib"), [(LLAMA3_8B, 105), (LLAMA3_70B, 912), (LLAMA3_405B, 5.29 * 1000)])
def test_parameters_and_states_are_the_checkpoints_of_mlperf_storage(shape: ModelShape, gib: float) -> None:
    """14 bytes per parameter: bfloat16 values, float32 masters and two moments (MLPerf Storage v2, checkpoint sizes)."""
    memory = state_memory(rank_sets(shape, Layout(), 0), Layout(), 2)
    ours = (memory.parameters + memory.states) / 2**30
    print(f"\n{ours:,.0f} GiB, published {gib:,.0f}: {ours / gib - 1:+.1%}")
    assert ours == pytest.approx(gib, rel=0.03)


def test_states_take_the_published_sixteen_bytes_and_two_more_for_gradients_in_float32() -> None:
    elements = num_parameters(GPT_7B)
    whole = state_memory(rank_sets(GPT_7B, Layout(), 0), Layout(), 2)
    assert whole.peak == pytest.approx((16 + 2) * elements)
    divided = Layout(hdp=8)
    zero_1 = state_memory(rank_sets(GPT_7B, divided, 0), divided, 2)  # published: 4 + 12/N
    assert zero_1.peak == pytest.approx((4 + 2 + 12 / 8) * elements, rel=1e-6)


def test_a_gpt_block_keeps_what_was_published() -> None:
    """16 b s h (MEMO); with the masks of two dropouts 34 s h (Korthikanti et al.), FlexSP's 4.48 MB per token for 7B."""
    kept = block_tokens(GPT_7B, Layout(), 0, BF16).kept - GPT_7B.heads * 4  # log-sums of fused attention
    assert kept == 16 * 2 * 4096
    with_masks = (kept + 2 * 4096) * 32 / 1e6
    print(f"\n{with_masks:.2f} MB per token, FlexSP 4.48: {with_masks / 4.48 - 1:+.1%}")
    assert with_masks == pytest.approx(4.48, rel=0.01)


def test_inputs_of_all_blocks_of_mt_nlg_take_the_published_terabytes() -> None:
    """Smith et al. (arXiv 2201.11990): 16.9 TB for 1,920 sequences of 2,048 tokens."""
    layout = Layout(activations="recompute")
    kept = sum(block_tokens(MT_NLG, layout, layer, BF16).kept for layer in range(MT_NLG.layers))
    assert kept * 1920 * 2048 / 1e12 == pytest.approx(16.9, rel=0.002)


_ORDERS: list[tuple[ScheduleName, int]] = [
    ("gpipe", 1),
    ("1f1b", 1),
    ("interleaved-1f1b", 2),
    ("interleaved-1f1b", 4),
    ("zero-bubble", 1),
    ("zero-bubble", 2),
    ("zero-bubble-v", 2),
]


@pytest.mark.parametrize(("name", "virtual"), _ORDERS)
def test_no_order_has_more_in_flight_than_the_formula_says(name: ScheduleName, virtual: int) -> None:
    for ranks, number in itertools.product((2, 3, 4, 8), (1, 2, 4, 8, 32)):
        schedule = PipelineSchedule(name, ranks, virtual)
        for rank in range(ranks):
            peak, said = peak_activations(schedule.actions(rank, number)), stages_in_flight(schedule, rank, number)
            assert peak <= said
            if number == 32 and name != "gpipe":
                assert peak == stages_in_flight(schedule, rank)


@pytest.mark.parametrize(
    "layout",
    [
        {"hdp": 4},
        {"hdp": 2, "tp": 2},
        {"hdp": 2, "pp": 2, "sharding": {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"}},
        {"hdp": 4, "tp": 2, "pp": 2, "sharding": {"gradients": "all"}},
    ],
)
@pytest.mark.parametrize("model", [MODEL, MOE], ids=["dense", "experts"])
def test_sets_are_those_that_the_runtime_makes(layout: dict[str, object], model: ModelConfig) -> None:
    from evermesh.runtime.model.building import held_sets
    from evermesh.runtime.model.stages import nominal_costs, stage_parts
    from tests.runtime.parity import train_config

    degrees = Layout.model_validate(layout)
    if model.moe is not None:
        degrees = degrees.model_copy(update={"ep": 2})
    config = train_config("float32", model, degrees)
    parts = stage_parts(model, degrees, nominal_costs(model, VOCABULARY))
    for pp in range(degrees.pp):
        held = held_sets(config, VOCABULARY, parts, pp)
        ours = rank_sets(model.shape(VOCABULARY), degrees, pp)
        assert sorted(sizes.padded for sizes in ours) == sorted(one.layout.padded for one in held)


@contextmanager
def _kept(model: torch.nn.Module) -> Iterator[dict[int, int]]:
    """Bytes of the storages that autograd keeps, parameters apart, by address."""
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        alive.append(storage)  # an address is not used twice while its storage lives
        if storage.data_ptr() not in parameters:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield found


def _kept_by_blocks(model: ModelConfig, dtype: torch.dtype, policy: str) -> float:
    """Bytes per token and block: what three layers keep more than one does."""
    totals = []
    for layers in (1, 3):
        decoder = Decoder(model.model_copy(update={"layers": layers}), VOCABULARY).to(dtype)
        micro_batch = MicroBatch((Piece(0, ((0, TOKENS),), (0,)),))
        attend = MicroBatchAttention(micro_batch, (TOKENS,), kernel_for(torch.device("cpu"), dtype), Communicator())
        context = TokenContext(micro_batch, (TOKENS,), ("one",), TOKENS)
        run_block = recompute_activations if policy == "recompute" else keep_activations
        positions = torch.arange(TOKENS)
        with _kept(decoder) as found:
            out = decoder(positions % VOCABULARY, positions, attend, run_block=run_block, context=context)
        assert out.requires_grad
        totals.append(sum(found.values()))
    return (totals[1] - totals[0]) / 2 / TOKENS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["keep", "recompute"])
def test_blocks_of_our_decoder_keep_what_the_formula_says(dtype: torch.dtype, policy: str) -> None:
    measured = _kept_by_blocks(MODEL, dtype, policy)
    layout = Layout.model_validate({"activations": policy})
    formula = block_tokens(MODEL.shape(VOCABULARY), layout, 0, Precision(dtype.itemsize, fused_norms=False)).kept
    print(f"\n{policy} {dtype}: measured {measured:,.0f} bytes per token, formula {formula:,.0f}")
    assert formula == pytest.approx(measured, rel=0.01)


def test_a_mixture_of_our_decoder_keeps_what_the_formula_says() -> None:
    measured = _kept_by_blocks(MOE, torch.float32, "keep")
    formula = block_tokens(MOE.shape(VOCABULARY), Layout(), 0, Precision(4, fused_norms=False)).kept
    print(f"\nmeasured {measured:,.0f} bytes per token, formula {formula:,.0f}: {formula / measured - 1:+.1%}")
    assert formula == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_host_memory_is_what_the_runtime_moves(fraction: float) -> None:
    layout = Layout(tp=2, hdp=2, activations="offload", offload=fraction)
    expected = offloaded_bytes(MODEL, 0, TOKENS, fraction, tp=2, bytes_per_element=2)
    ours = block_tokens(MODEL.shape(VOCABULARY), layout, 0, BF16).host * TOKENS
    assert ours == expected


def test_the_first_pipeline_rank_is_the_fullest_and_recomputing_makes_room() -> None:
    keeps = Layout(pp=4, hdp=8, tp=4, capacity=4096)
    recomputes = keeps.model_copy(update={"activations": "recompute"})
    full = [fullest(layout_memory(LLAMA3_70B, layout, BF16)) for layout in (keeps, recomputes)]
    assert full[0].pp_rank == 0
    assert full[1].parts["activations kept"] < 0.1 * full[0].parts["activations kept"]
    assert sum(full[0].parts.values()) == full[0].total


def test_the_largest_capacity_fits_and_one_more_token_does_not() -> None:
    memory = 80 * 2**30
    layout = Layout(pp=8, hdp=8, tp=8, activations="recompute")
    for rank in layout_memory(LLAMA3_70B, layout, BF16, Occupancy(reserve_bytes=2**30)):
        capacity = rank.largest_capacity(memory)
        assert rank.at(capacity).total <= memory < rank.at(capacity + 1).total


def test_a_stage_that_keeps_every_micro_batch_needs_to_know_how_many() -> None:
    layout = Layout(pp=2, schedule="gpipe")
    with pytest.raises(LayoutDoesNotFit, match="say how many"):
        layout_memory(SMALL, layout, BF16)
    few, many = (layout_memory(SMALL, layout, BF16, Occupancy(micro_batches=number))[0] for number in (2, 6))
    assert many.parts["activations kept"] == 3 * few.parts["activations kept"]

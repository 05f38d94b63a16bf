"""What becomes of activations never changes a gradient, and as many bytes wait on the host as the formula says."""

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evermesh.parallelism import BatchPlan, Layout, MicroBatch, PlanInvalid, plan_batch, verify_plan
from evermesh.parallelism.attention.micro_batch import MicroBatchAttention
from evermesh.parallelism.errors import LayoutDoesNotFit
from evermesh.parallelism.tensor.tokens import without_padding
from evermesh.runtime import process_group
from evermesh.runtime.layout import check_model
from evermesh.runtime.memory import offloaded_bytes, step_offloaded_bytes
from evermesh.runtime.micro_batch import MicroBatchRunner
from evermesh.runtime.model.building import build_model, build_runner
from evermesh.runtime.model.config import ModelConfig
from tests.cluster import run_ranks
from tests.oracle import gradient, relative_error
from tests.runtime.parity import (
    COST,
    MODEL,
    VOCABULARY,
    Case,
    local_batch,
    plan_by_hand,
    train_config,
    worst_errors,
)

LENGTHS = (37, 20, 5)
MODELS = {
    "dense": MODEL,
    "options": MODEL.model_copy(update={"qk_norm": True, "qkv_bias": True, "sliding_window": 9}),
    "parallel blocks": MODEL.model_copy(update={"parallel_block": True}),
    "experts": ModelConfig.model_validate(
        MODEL.model_dump() | {"moe": {"experts": 4, "ffn": 16, "shared_ffn": 16, "first_dense_layers": 1}}
    ),
}
EXACT = {"dense": 0.0, "options": 1e-14, "parallel blocks": 1e-14, "experts": 0.0}
"""Of float64: biases are added, and the norm of parallel blocks computed, in another order than where all is kept."""


def _runner(dtype: str, config: ModelConfig, layout: Layout) -> MicroBatchRunner:
    groups = process_group.communicators(60.0, layout, experts=config.moe is not None)
    built = build_model(train_config(dtype, config, layout), VOCABULARY, groups, torch.device("cpu"))
    return build_runner(built, layout, groups)


def _alone(**layout: Any) -> tuple[Layout, BatchPlan]:
    """One rank, and everything in one micro-batch."""
    whole = Layout.model_validate({"capacity": 100} | layout)
    return whole, plan_batch(LENGTHS, whole, COST)


def _gradients(dtype: str, config: ModelConfig, layout: Layout, plan: BatchPlan) -> tuple[dict[str, Tensor], int]:
    """Gradients of a step, and bytes that were moved to the host; as many came back."""
    runner = _runner(dtype, config, layout)
    runner.accumulate(local_batch(plan, 0))
    assert runner.memory is not None
    host = runner.memory.host
    assert host.bytes_in == host.bytes_out
    return {name: gradient(parameter) for name, parameter in runner.model.named_parameters()}, host.bytes_out


@pytest.mark.parametrize("fraction", [0.0, 0.125, 0.5, 1.0])
@pytest.mark.parametrize(("name", "dtype"), [*itertools.product(MODELS, ["float64"]), ("dense", "float32")])
def test_gradients_and_bytes_of_every_policy(name: str, dtype: str, fraction: float) -> None:
    config, size = MODELS[name], torch.finfo(getattr(torch, dtype)).bits // 8
    kept, nothing = _gradients(dtype, config, *_alone())
    assert nothing == 0
    for activations in ("offload", ("recompute", "offload"), ("offload", "keep")):
        layout, plan = _alone(activations=activations, offload=fraction)
        moved, num_bytes = _gradients(dtype, config, layout, plan)
        assert num_bytes == step_offloaded_bytes(plan, layout, config, size) > 0
        # a product of some rows may round otherwise than the same rows of a product of all
        tolerance = EXACT[name] if fraction in (0.0, 1.0) else {"float64": 1e-12, "float32": 1e-5}[dtype]
        for parameter, expected in kept.items():
            assert relative_error(moved[parameter], expected) <= tolerance, parameter


def test_the_formula_of_the_paper() -> None:
    """A block of LLaMA's shape moves 3 b s h always (and the log-sum-exp), and all its products with a fraction of 1."""
    config = ModelConfig(hidden=4096, layers=32, heads=32, kv_heads=32, ffn=11008)
    tokens, lse = 1 << 20, 4 * 32 * (1 << 20)
    for fraction, of_hidden, of_ffn in ((0.0, 3.0, 0.0), (0.5, 4.5, 1.0), (1.0, 6.0, 2.0)):
        wanted = 2 * tokens * (of_hidden * 4096 + of_ffn * 11008) + lse
        assert offloaded_bytes(config, 0, tokens, fraction, tp=1, bytes_per_element=2) == wanted
        of_eight = offloaded_bytes(config, 0, tokens, fraction, tp=8, bytes_per_element=2)
        assert 8 * of_eight == wanted


class _Storages(TorchDispatchMode):
    """Remembers the storages of everything that is computed, without keeping them; parameters are not computed."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self.parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self.sizes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.parameters:
                    self.sizes[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def living_bytes(self) -> int:
        return sum(size for ref, size in self.sizes.values() if not ref.expired())


@contextmanager
def _forward(layers: int, **layout: Any) -> Iterator[tuple[int, int]]:
    """Bytes that live between forward and backward of a micro-batch, all of them and those that wait on the host."""
    whole, plan = _alone(**layout)
    runner = _runner("float64", MODEL.model_copy(update={"layers": layers}), whole)
    local = local_batch(plan, 0).micro_batches[0]
    assert runner.memory is not None

    attention = MicroBatchAttention(local.plan, LENGTHS, runner.kernel, runner.hdp)
    with _Storages(runner.model.parameters()) as storages:
        y = runner.model(
            local.tokens_T,
            local.positions_T,
            without_padding(attention, local.plan.num_tokens),
            run_block=runner.memory.blocks_of(local.plan, attention),
        )
        living = storages.living_bytes()
        y.sum().backward()
    yield living, runner.memory.host.bytes_out


def _bytes_of_a_layer(**layout: Any) -> tuple[int, int]:
    with _forward(3, **layout) as (more, more_host), _forward(2, **layout) as (less, less_host):
        return more - less, more_host - less_host


@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_a_block_that_offloads_keeps_nothing_on_the_device(fraction: float) -> None:
    living, on_host = _bytes_of_a_layer(activations="offload", offload=fraction)
    assert living == on_host == offloaded_bytes(MODEL, 0, sum(LENGTHS), fraction, tp=1, bytes_per_element=8)


def test_a_block_that_is_computed_again_keeps_its_input_and_others_much_more() -> None:
    of_input = sum(LENGTHS) * MODEL.hidden * 8
    assert _bytes_of_a_layer(activations="recompute") == (of_input, 0)
    living, on_host = _bytes_of_a_layer()
    assert on_host == 0
    assert living > 10 * of_input


def _bytes_on_rank(rank: int, ranks: int, cases: list[Case]) -> list[int]:
    moved = []
    for case in cases:
        runner = _runner(case.dtype, case.config, case.layout)
        runner.accumulate(local_batch(case.plan, rank % (case.layout.hdp * case.layout.tp) // case.layout.tp))
        assert runner.memory is not None
        moved.append(runner.memory.host.bytes_out)
    return moved


ODD = (97, 40, 13, 2, 61, 29, 7)
EXPERTS = {"experts": 4, "ffn": 16, "shared_ffn": 16, "shared_gate": True, "first_dense_layers": 1}
SIZES = {"hidden": 32, "layers": 4, "heads": 4, "kv_heads": 2, "ffn": 48, "initial_std": 0.2}


CHOOSING = COST.model_copy(
    update={"recompute_token_s": 3e-6, "offload_saves_token_s": 3e-6, "host_products_token_s": 2e-5}
)
"""Copies of a few documents' products hide, those of others do not."""


def _cases(*choices: tuple[dict[str, Any], dict[str, Any]]) -> list[Case]:
    cases = []
    for model, values in choices:
        layout = Layout.model_validate({"activations": "offload", "capacity": 60} | values)
        cases.append(
            Case(plan_batch(ODD, layout, CHOOSING), "float64", ModelConfig.model_validate(SIZES | model), layout)
        )
    return cases


FOUR_RANKS = _cases(
    ({}, {"hdp": 4, "offload": 0.5}),
    ({}, {"hdp": 4, "offload": "auto"}),
    ({"sliding_window": 20}, {"hdp": 2, "tp": 2, "offload": 0.4}),
    ({"qkv_bias": True}, {"pp": 2, "hdp": 2, "schedule": "zero-bubble", "offload": 0.3}),
    (
        {"moe": EXPERTS},
        {"hdp": 2, "tp": 2, "ep": 4, "offload": 0.7, "activations": ["keep", "offload", "recompute", "offload"]},
    ),
)


def test_gradients_on_four_ranks_equal_one_process_without_parallelism() -> None:
    assert max(size for case in FOUR_RANKS for size in case.plan.ring_sizes()) > 1
    chosen = {
        mb.offload
        for case in FOUR_RANKS
        if case.layout.offload == "auto"
        for of_rank in case.plan.ranks
        for mb in of_rank
    }
    assert len(chosen) > 2
    assert max(worst_errors(FOUR_RANKS)) <= 1e-9


def test_all_ranks_together_move_what_the_formula_says() -> None:
    moved = [sum(of_ranks) for of_ranks in zip(*run_ranks(4, _bytes_on_rank, FOUR_RANKS), strict=True)]
    assert moved == [step_offloaded_bytes(case.plan, case.layout, case.config, 8) for case in FOUR_RANKS]


@pytest.mark.parity
@pytest.mark.parametrize("policy", ["offload", ["offload", "keep", "recompute", "offload"]])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(
    "model", [{}, {"parallel_block": True}, {"moe": EXPERTS}, {"qk_norm": True, "tied_embeddings": True}], ids=str
)
def test_offloading_on_the_wide_matrix(model: dict[str, Any], fraction: float, policy: Any) -> None:
    layouts: list[dict[str, Any]] = [
        {"hdp": 4},
        {"hdp": 2, "tp": 2},
        {"tp": 4, "hdp": 1, "capacity": 97},
        {"pp": 2, "hdp": 2},
        {"pp": 2, "tp": 2, "hdp": 1, "capacity": 97, "schedule": "zero-bubble", "virtual_stages": 2},
    ]
    if "moe" in model:
        layouts += [{"hdp": 4, "ep": 2, "etp": 2}, {"pp": 2, "hdp": 2, "ep": 2, "hot_experts": 1}]
    sizes = {"heads": 8, "kv_heads": 4} | model
    cases = _cases(*((sizes, layout | {"offload": fraction, "activations": policy}) for layout in layouts))
    assert max(worst_errors(cases)) <= 1e-9


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"offload": 0.5}, "layout.offload is 0.5, but no block offloads: layout.activations is keep. Set"),
        ({"offload": "auto"}, "layout.offload is auto, but no block offloads: layout.activations is keep. Set"),
        ({"offload": 0.5, "activations": ["keep", "recompute"]}, "but no block offloads"),
    ],
)
def test_a_fraction_that_nobody_uses_is_refused(values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Layout.model_validate(values)


def test_as_many_policies_as_layers() -> None:
    with pytest.raises(LayoutDoesNotFit, match="names 3 blocks, but the model has 2 layers") as error:
        check_model(Layout(activations=("keep", "offload", "keep")), MODEL)
    assert error.value.axis == "activations"


def test_a_plan_offloads_only_where_the_layout_does() -> None:
    plan = plan_by_hand((9,), [[(0, (0,))]], ranks=1)
    (micro_batch,) = plan.ranks[0]
    for layout, offload in ((Layout(capacity=10_000), 0.5), (Layout(capacity=10_000, activations="offload"), 1.5)):
        moving = BatchPlan(
            **{name: getattr(plan, name) for name in ("lengths", "capacity", "certificate", "planner")},
            ranks=((MicroBatch(micro_batch.pieces, recompute="block", offload=offload),),),
            cost_version=0,
            speeds_version=0,
        )
        with pytest.raises(PlanInvalid, match=f"offloads {offload} of its tokens"):
            verify_plan(moving, (9,), layout)

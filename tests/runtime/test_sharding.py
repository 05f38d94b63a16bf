"""What ranks divide among them: how much of it they hold, and when it is on its way."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evermesh.parallelism import Layout, plan_batch
from evermesh.parallelism.collectives import CollectiveRecord
from evermesh.parallelism.gradients import gradient_of
from evermesh.parallelism.layout.states import StateMemory, state_memory
from evermesh.runtime import process_group
from evermesh.runtime.model.building import build_model, build_runner
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.optimizer import ShardedAdamW
from evermesh.runtime.optimizer_config import AdamWConfig
from evermesh.runtime.parameter_set import GATHER, ParameterSet
from evermesh.runtime.traffic import trained_model
from tests.cluster import run_ranks
from tests.runtime.parity import COST, OPTIMIZER, VOCABULARY, local_batch, train_config
from tests.runtime.watched import WatchedSets, state_bytes

LENGTHS = (97, 40, 13, 2, 61, 29, 7, 22, 5, 33)
MODEL = ModelConfig(hidden=32, layers=4, heads=4, kv_heads=2, ffn=64, initial_std=0.2)
EXPERTS = ModelConfig.model_validate(MODEL.model_dump() | {"moe": {"experts": 4, "ffn": 32}})


def _stepped(
    rank: int, workers: int, layout: Layout, model: ModelConfig, dtype: str
) -> tuple[Counter[str], StateMemory]:
    groups = process_group.communicators(60.0, layout, experts=model.moe is not None)
    config = train_config(dtype, model, layout)
    built = build_model(config, VOCABULARY, groups, torch.device("cpu"))
    optimizer = ShardedAdamW(built.sets, OPTIMIZER)
    runner, watched = build_runner(built, layout, groups), WatchedSets(built.sets)
    plan = plan_batch(LENGTHS, layout, COST)
    for _ in range(2):
        built.begin_step()
        runner.accumulate(local_batch(plan, groups.place.hdp))
        built.sum_gradients()
        optimizer.step(0.1, 1.0)
        built.end_step()
    watched.most["states"] = state_bytes(optimizer)
    sizes = trained_model(config, VOCABULARY, built.stages, built.held).stages[groups.place.pp].sets
    return watched.most, state_memory(sizes, layout, getattr(torch, dtype).itemsize)


@pytest.mark.parametrize(
    ("layout", "model", "dtype"),
    [
        ({}, MODEL, "float32"),
        ({"sharding": {"gradients": "all"}}, MODEL, "bfloat16"),
        ({"sharding": {"parameters": "all", "gradients": "all"}}, MODEL, "float32"),
        ({"sharding": {"parameters": "all", "gradients": "all", "keep_for": "micro_batch"}}, MODEL, "float32"),
        ({"sharding": {"parameters": 2, "gradients": 2, "keep_for": "micro_batch"}}, MODEL, "bfloat16"),
        ({"ep": 2, "sharding": {"parameters": 2, "gradients": "all", "keep_for": "micro_batch"}}, EXPERTS, "float32"),
    ],
    ids=["zero-1", "zero-2 for a step", "zero-3 for a step", "zero-3", "hybrid", "experts"],
)
def test_a_rank_holds_what_the_formula_says(layout: dict[str, Any], model: ModelConfig, dtype: str) -> None:
    degrees = Layout.model_validate({"hdp": 4, "capacity": 41} | layout)
    for most, expected in run_ranks(4, _stepped, degrees, model, dtype):
        for kind in ("parameters", "gathered", "gradients", "states"):
            assert most[kind] == getattr(expected, kind), kind
        assert most["passing"] <= expected.passing


def _traced(rank: int, workers: int, layout: Layout) -> list[str]:
    """What happens in a step, in order: gathers as they are issued, and blocks as they begin and end."""
    groups = process_group.communicators(60.0, layout)
    built = build_model(train_config("float64", MODEL, layout), VOCABULARY, groups, torch.device("cpu"))
    runner, events = build_runner(built, layout, groups), list[str]()
    for name, block in built.model.blocks.items():
        attention = block.get_submodule("attention")
        attention.register_forward_pre_hook(_noting(events, f"forward of {name}"))
        attention.register_full_backward_hook(_noting(events, f"backward of {name}"))

    def note(record: CollectiveRecord) -> None:
        if record.call_site == GATHER:
            events.append("gather")

    with groups.owners.parameters.listen(note):
        built.begin_step()
        runner.accumulate(local_batch(plan_batch((20, 20), layout, COST), groups.place.hdp))
    return events


def _noting(events: list[str], text: str) -> Any:
    def note(_: nn.Module, *__: Any) -> None:
        events.append(text)

    return note


@pytest.mark.parametrize("keep_for", ["step", "micro_batch"])
def test_parameters_of_a_block_are_on_their_way_while_the_one_before_it_computes(keep_for: str) -> None:
    sharding = {"parameters": "all", "gradients": "all", "keep_for": keep_for}
    layout = Layout.model_validate({"hdp": 2, "capacity": 20, "sharding": sharding})
    forward = [f"forward of {layer}" for layer in range(4)]
    backward = [f"backward of {layer}" for layer in reversed(range(4))]
    for events in run_ranks(2, _traced, layout):
        if keep_for == "step":  # embedding, blocks, norm and head: all of them before anything computes
            assert events == ["gather"] * 6 + forward + backward
            continue
        in_forward = ["gather", "gather", *(step for name in forward for step in ("gather", name))]
        # the head stayed; block 3 and 2 before the backward pass of 3, and nothing before that of 0
        in_backward = ["gather", "gather", *backward[:1], "gather", *backward[1:2], "gather", *backward[2:]]
        assert events == in_forward + in_backward


def test_gradients_of_many_micro_batches_add_up_in_float32() -> None:
    """A sum of 256 gradients in bfloat16 would be wrong by a hundredth."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 16, generator=generator, dtype=torch.bfloat16) for _ in range(256)]
    layer = nn.Linear(16, 8, bias=False, dtype=torch.bfloat16)
    alone: list[Tensor] = []
    for x in inputs:
        layer.weight.grad = None
        layer(x).square().sum().backward()
        assert layer.weight.grad is not None
        alone.append(layer.weight.grad.double())
    layer.weight.grad = None
    parameters = ParameterSet.whole(layer)
    for x in inputs:
        layer(x).square().sum().backward()
    expected = torch.stack(alone).sum(0)
    error = (gradient_of(layer.weight).double() - expected).norm() / expected.norm()
    assert parameters.gradients.dtype == torch.float32
    assert error < 1e-6
    in_bfloat16 = torch.zeros(8, 16, dtype=torch.bfloat16)
    for gradient in alone:
        in_bfloat16 += gradient.to(torch.bfloat16)
    assert (in_bfloat16.double() - expected).norm() / expected.norm() > 1e-3


def test_updates_too_small_for_bfloat16_add_up_in_the_master_parameters() -> None:
    layer = nn.Linear(4, 4, bias=False, dtype=torch.bfloat16)
    with torch.no_grad():
        layer.weight.fill_(1.0)
    parameters = ParameterSet.whole(layer)
    optimizer = ShardedAdamW([parameters], AdamWConfig(lr=1e-3, weight_decay=0.0))
    seen = []
    for _ in range(8):  # each by the rate; bfloat16 has steps of 1/256 below 1
        parameters.begin_step()
        gradient_of(layer.weight).fill_(1.0)
        parameters.sum_gradients()
        optimizer.step(1e-3, 1.0)
        seen.append(layer.weight[0, 0].item())
    assert seen[0] == 1.0
    assert seen[-1] == pytest.approx(1.0 - 8e-3, abs=1 / 512)

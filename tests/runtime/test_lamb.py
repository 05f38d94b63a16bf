"""LAMB on shared and divided parameters against the algorithm written out for whole tensors in one process."""

from typing import Any

import pytest
import torch
from torch import Tensor

from evermesh.parallelism import Layout
from evermesh.parallelism.gradients import gradient_of
from evermesh.runtime import LambConfig, process_group
from evermesh.runtime.flat import AnyCut
from evermesh.runtime.lamb import build_optimizer
from evermesh.runtime.model.building import build_model
from evermesh.runtime.model.config import ModelConfig
from tests.cluster import run_ranks
from tests.oracle import relative_error
from tests.runtime.parity import VOCABULARY, Held, joined, small_model, train_config

SIZES: dict[str, Any] = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48, "initial_std": 0.2}
DENSE = ModelConfig(**SIZES)
TIED = ModelConfig(**SIZES, tied_embeddings=True)
EXPERTS = ModelConfig.model_validate(SIZES | {"moe": {"experts": 4, "ffn": 16, "shared_ffn": 16}})
CONFIG = LambConfig(betas=(0.8, 0.95), weight_decay=0.3)
RATES = (0.01, 0.02, 0.03)
GRADIENT_SCALE = 0.5


def _initial(config: ModelConfig) -> dict[str, Tensor]:
    """Whole parameters. Two layers start from zero: a norm, and one expert."""
    model = small_model("float64", config)
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parameters["norm.weight"].zero_()
    for name in parameters:
        if _is_stack(name):
            parameters[name][1].zero_()
    return parameters


def _is_stack(name: str) -> bool:
    return ".experts." in name


def _gradients(config: ModelConfig, step: int) -> dict[str, Tensor]:
    """Whole gradients; one expert has none: nobody chose it."""
    generator = torch.Generator().manual_seed(step)
    gradients = {
        name: torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        for name, parameter in _initial(config).items()
    }
    for name, gradient in gradients.items():
        if _is_stack(name):
            gradient[2].zero_()
    return gradients


def _lamb_of_a_layer(weights: Tensor, gradients: list[Tensor], weight_decay: float) -> Tensor:
    """Algorithm 2 of the paper."""
    first, second = CONFIG.betas
    m, v = torch.zeros_like(weights), torch.zeros_like(weights)
    for t, (rate, gradient) in enumerate(zip(RATES, gradients, strict=True), start=1):
        m = first * m + (1 - first) * gradient
        v = second * v + (1 - second) * gradient**2
        r = (m / (1 - first**t)) / ((v / (1 - second**t)).sqrt() + CONFIG.eps)
        update = r + weight_decay * weights
        weight_norm, update_norm = weights.square().sum().sqrt(), update.square().sum().sqrt()
        ratio = weight_norm / update_norm if weight_norm > 0 and update_norm > 0 else 1.0
        weights = weights - rate * ratio * update
    return weights


def _expected(config: ModelConfig) -> dict[str, Tensor]:
    gradients = [_gradients(config, step) for step in range(len(RATES))]
    expected = {}
    for name, weights in _initial(config).items():
        of_steps = [GRADIENT_SCALE * of_step[name] for of_step in gradients]
        decay = CONFIG.weight_decay if weights.dim() >= 2 else 0.0
        if _is_stack(name):
            experts = [_lamb_of_a_layer(weights[e], [g[e] for g in of_steps], decay) for e in range(len(weights))]
            expected[name] = torch.stack(experts)
        else:
            expected[name] = _lamb_of_a_layer(weights, of_steps, decay)
    return expected


def _part(whole: Tensor, cut: AnyCut, sharer: int) -> Tensor:
    for dim, (start, size) in enumerate(zip(cut.offsets(sharer), cut.local_shape(sharer), strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole


def _stepped(rank: int, world_size: int, config: ModelConfig, layout: Layout) -> list[Held]:
    groups = process_group.communicators(60.0, layout, experts=config.moe is not None, tied=config.tied_embeddings)
    built = build_model(train_config("float64", config, layout), VOCABULARY, groups, torch.device("cpu"))
    named = dict(built.model.named_parameters())
    sets = [(f"{groups.place.pp} {number}", parameters) for number, parameters in enumerate(built.sets)]
    entries = [(owner, parameters, entry) for owner, parameters in sets for entry in parameters.flat.entries]
    initial = _initial(config)
    for _, parameters, entry in entries:
        named[entry.name].data.copy_(_part(initial[entry.name], entry.cut, parameters.sharers.number))
    optimizer = build_optimizer(built.sets, CONFIG, built.tied)
    for step, rate in enumerate(RATES):
        gradients = _gradients(config, step)
        for _, parameters, entry in entries:
            gradient_of(named[entry.name]).copy_(_part(gradients[entry.name], entry.cut, parameters.sharers.number))
        optimizer.step(rate, GRADIENT_SCALE)
    return [
        Held(entry.name, entry.cut, (owner, p.owners.rank), p.sharers.number, named[entry.name].detach())
        for owner, p, entry in entries
    ]


@pytest.mark.parametrize(
    ("config", "layout"),
    [
        (DENSE, {}),
        (DENSE, {"hdp": 3}),
        (TIED, {"pp": 2, "hdp": 2, "tp": 2}),
        (EXPERTS, {"hdp": 4, "ep": 2}),
        (EXPERTS, {"hdp": 4, "tp": 2, "ep": 2, "etp": 2}),
        pytest.param(EXPERTS, {"pp": 2, "hdp": 2, "tp": 2, "ep": 4}, marks=pytest.mark.parity),
        pytest.param(EXPERTS, {"hdp": 3}, marks=pytest.mark.parity),
        pytest.param(DENSE, {"hdp": 2, "tp": 2}, marks=pytest.mark.parity),
    ],
)
def test_updates_on_ranks_equal_those_of_whole_layers_in_one_process(
    config: ModelConfig, layout: dict[str, Any]
) -> None:
    on_ranks = Layout.model_validate(layout)
    results = run_ranks(on_ranks.world_size, _stepped, config, on_ranks)
    whole = joined([held for of_rank in results for held in of_rank])
    expected = _expected(config)
    assert {name for _, name in whole} == expected.keys()
    assert max(relative_error(whole[owner, name], expected[name]) for owner, name in whole) <= 1e-12

"""A layout never changes the mathematics: loss, gradients and their norm on any factorisation equal one process."""

from typing import Any

import pytest

from evermesh.parallelism import Layout, plan_batch
from evermesh.runtime.config import ModelConfig, MoeConfig
from tests.runtime.parity import COST, recomputed, worst_error

LENGTHS = (1, 97, 40, 13, 2, 61, 29, 7, 22, 5)
SIZES = {"hidden": 32, "layers": 5, "heads": 8, "kv_heads": 4, "ffn": 48, "initial_std": 0.2}
DENSE = ModelConfig.model_validate(SIZES)
TIED = ModelConfig.model_validate(SIZES | {"tied_embeddings": True})
EXPERTS = ModelConfig.model_validate(SIZES | {"moe": MoeConfig(experts=8, ffn=16, shared_ffn=16, first_dense_layers=1)})
MODELS = {"dense": DENSE, "tied": TIED, "experts": EXPERTS}


def _error(model: str, degrees: dict[str, Any], *, recompute: bool = False) -> float:
    layout = Layout.model_validate(degrees)
    layout = layout.model_copy(update={"capacity": max(41, -(-97 // layout.hdp))})
    plan = plan_batch(LENGTHS, layout, COST)
    return worst_error(recomputed(plan) if recompute else plan, "float64", MODELS[model], layout=layout)


@pytest.mark.parametrize(
    ("model", "degrees"),
    [
        ("dense", {"pp": 2}),
        ("dense", {"pp": 2, "hdp": 2, "schedule": "interleaved-1f1b", "virtual_stages": 2}),
        ("tied", {"pp": 2, "hdp": 2, "tp": 2, "schedule": "zero-bubble"}),
        ("tied", {"pp": 2, "hdp": 2, "schedule": "zero-bubble-v", "virtual_stages": 2}),
        ("experts", {"hdp": 2, "ep": 2}),
        ("experts", {"pp": 2, "hdp": 2, "tp": 2, "ep": 4}),
        ("experts", {"pp": 2, "hdp": 4, "ep": 2, "etp": 2}),
        ("experts", {"hdp": 4, "tp": 2, "ep": 8}),
    ],
)
def test_gradients_equal_one_process(model: str, degrees: dict[str, Any]) -> None:
    assert _error(model, degrees) <= 1e-9

"""Which layers make up which pipeline stage: by FLOPs, by measured time, or as it is said."""

from typing import Any

import torch

from evermesh.parallelism import Communicator, Layout
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.measuring import layer_costs
from evermesh.runtime.model.stages import LayerCosts, nominal_costs, stage_parts

HEAVY_AT_THE_END = {"experts": 4, "top_k": 4, "ffn": 512, "first_dense_layers": 4}


def _model(**changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"hidden": 64, "layers": 6, "ffn": 64, "vocabulary": 128} | changes)


def _sizes(model: ModelConfig, layout: Layout, costs: LayerCosts) -> list[int]:
    parts = stage_parts(model, layout, costs)
    assert [part.is_first for part in parts] == [True, *[False] * (len(parts) - 1)]
    assert [part.is_last for part in parts] == [*[False] * (len(parts) - 1), True]
    assert [layer for part in parts for layer in part.layers] == list(range(model.layers))
    return [len(part.layers) for part in parts]


def test_a_large_head_leaves_the_last_stage_fewer_layers() -> None:
    small, large = _model(), _model(vocabulary=4096)
    assert _sizes(small, Layout(pp=2), nominal_costs(small, 128)) == [3, 3]
    assert _sizes(large, Layout(pp=2), nominal_costs(large, 4096)) == [5, 1]


def test_costly_layers_leave_their_stage_fewer_of_them() -> None:
    model = _model(moe=HEAVY_AT_THE_END)
    assert _sizes(model, Layout(pp=2), nominal_costs(model, 128)) == [5, 1]


def test_measured_times_show_which_layers_are_costly() -> None:
    data = {"sources": [{"kind": "corpus", "path": "nowhere"}]}
    config = TrainConfig.model_validate(
        {
            "model": _model(moe=HEAVY_AT_THE_END | {"ffn": 4096}),
            "data": data,
            "layout": {"pp": 2, "split": "measured", "capacity": 512},
        }
    )
    costs = layer_costs(config, 128, Communicator(), torch.device("cpu"))
    dense, experts = costs.layers[0], costs.layers[-1]
    assert costs.layers == (*[dense] * 4, *[experts] * 2)
    assert experts > 2 * dense > 0
    assert _sizes(config.model, config.layout, costs)[0] >= 4


def test_a_split_may_be_given() -> None:
    model = _model()
    assert _sizes(model, Layout(pp=3, split=(1, 4, 1)), nominal_costs(model, 128)) == [1, 4, 1]

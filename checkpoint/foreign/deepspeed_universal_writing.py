"""Writes universal checkpoints of DeepSpeed, which its engine loads in every stage of ZeRO and on any number of ranks.

The library's own converter writes what one stage loads: files of the model are named after it, and the settings of the
optimizer are where the other stage does not look. Here both are there. What its loader leaves unread in any case,
buffers and frozen weights, is in the files of the model all the same: ``open_checkpoint`` reads them.
"""

from collections.abc import Iterator
from typing import Any

from evermesh.checkpoint.foreign.deepspeed_writing import (
    VERSION,
    Model,
    kinds_of,
    model_states,
    numbers_of,
    scaler_of,
    settings_of,
)
from evermesh.checkpoint.foreign.torch_writing import TorchFile

_MODELS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
"""Of stages 1 and 2, and of stage 3."""
_MASTER = "float32"


def universal_files(model: Model) -> Iterator[tuple[str, TorchFile]]:
    """Names and contents of all files of a universal folder."""
    training = model.training
    states = model_states(model, model.shapes(0), 0, 0)
    yield _MODELS[0], TorchFile(states)
    yield _MODELS[1], TorchFile(states | {"module": {}, "frozen_param_fragments": None, "frozen_param_shapes": None})
    yield "zero/optimizer_state.pt", TorchFile(_settings(model))
    for group in training.groups:
        kinds = kinds_of(training, group)
        for name in group.names:
            tensors = {"fp32": training.parameters[name]} | {kind: training.states[kind][name] for kind in kinds}
            for kind, tensor in tensors.items():
                yield f"zero/{name}/{kind}.pt", TorchFile({"param": model.content(tensor, _MASTER)})
            for key, value in numbers_of(group).items():
                yield f"zero/{name}/{key}.pt", TorchFile(value)


def _settings(model: Model) -> dict[str, Any]:
    """Groups as stages 1 and 2 ask for them, and as stage 3 does."""
    groups = [settings_of(group, [index]) for index, group in enumerate(model.training.groups)]
    numbers = {index: numbers_of(group) for index, group in enumerate(model.training.groups)}
    # the loader of stage 3 gives every group the settings of the first: those that differ stay as the engine was told
    common = {key: value for key, value in groups[0].items() if all(group.get(key) == value for group in groups)}
    inner = {"state": numbers, "param_groups": [common | {"params": [0]}]}
    return scaler_of(model.training) | {
        "param_groups": groups,
        "optimizer_state_dict": inner,
        "ds_version": VERSION,
    }

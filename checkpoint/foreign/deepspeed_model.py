"""What DeepSpeed keeps in its files ``*_model_states.pt``, beside native partitions and universal atoms alike.

Imports no torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import JsonValue

from evermesh.checkpoint.foreign.fragments import Fragment, Slice
from evermesh.checkpoint.foreign.patterns import Shape
from evermesh.checkpoint.foreign.pickle_machine import Class, Constant, Maker
from evermesh.checkpoint.foreign.torch_files import Part, read_torch_file
from evermesh.checkpoint.foreign.values import Values
from evermesh.checkpoint.stores.places import Place

PARAMETER, BUFFER = "parameter.", "buffer."
AGAIN = "A save may have been interrupted: load an earlier checkpoint, or copy this one again."
Slicing = tuple[str, int, int, int]
"""Name of a parameter, first element in a flat tensor, first element of the parameter, length."""
SCALER = ("loss_scaler", "dynamic_loss_scale", "overflow", "clip_grad")
"""Of the state of an optimizer."""
_OWN = frozenset(
    """module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments lr_scheduler
    data_sampler random_ltd sparse_tensor_module_names skipped_steps global_steps global_samples dp_world_size
    mp_world_size checkpoint_parallel_dimensions ds_config ds_version num_experts ds_autoep_layers folding""".split()  # noqa: SIM905
)
"""Keys that the library writes; all others are the client's."""
_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
_MAKERS: dict[str, Maker | Constant] = {
    "deepspeed.runtime.zero.config.ZeroStageEnum": lambda value: value,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": Class("LossScaler"),
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": Class("DynamicLossScaler"),
    "deepspeed.utils.tensor_fragment.fragment_address": Class("fragment_address"),
    "argparse.Namespace": Class("argparse.Namespace"),
}


def read(file: Place) -> Any:
    """The contents of a file of the library. Objects of unknown classes, which clients save, do nothing."""
    return read_torch_file(Part(file), _MAKERS, refuse_unknown=False)


def even(shapes: Mapping[str, tuple[int, ...]], rank: int, ranks: int) -> Iterator[Slicing]:
    """ZeRO 3 cuts every parameter evenly, rounded up; the pieces of a rank lie end to end."""
    first = 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        piece = -(-size // ranks)
        start = min(rank * piece, size)
        yield name, first, start, min(piece, size - start)
        first += piece


class ModelStates:
    """The model of one model-parallel rank, by data-parallel rank where they differ."""

    def __init__(self, files: Sequence[Place]) -> None:
        self.first = read(files[0])
        self.num_files = len(files)
        self.is_partitioned = files[0].name.startswith("zero_pp_rank_")
        self.ranks = [self.first]
        if self.is_partitioned and self.first.get("frozen_param_shapes"):  # pieces of it are in all files
            self.ranks += [read(file) for file in files[1:]]
        shapes = self.first["param_shapes"] or []
        self.shapes = [{name: tuple(shape) for name, shape in group.items()} for group in shapes]
        """Of trained parameters, by group (ZeRO 3: sub-group), in the order in which they are laid end to end."""
        self.aliases: dict[str, str] = self.first.get("shared_params") or {}
        """Names of tied parameters that are stored under another one."""
        self.module: dict[str, Any] = self.first["module"] or {}
        """Empty where layers have files of their own."""
        self.buffer_names: list[str] = list(self.first["buffer_names"])

    def frozen_pieces(self) -> Iterator[tuple[str, Shape, list[Fragment]]]:
        """Weights that no optimizer has, which data-parallel ranks divided."""
        for name, shape in (self.first.get("frozen_param_shapes") or {}).items():
            pieces: list[Fragment] = []
            for rank, model in enumerate(self.ranks):
                ((_, first, start, length),) = even({name: tuple(shape)}, rank, len(self.ranks))
                pieces.append(Slice(model["frozen_param_fragments"][name], first, start, length))
            yield name, tuple(shape), pieces

    @property
    def step(self) -> int | None:
        """Updates made."""
        step = self.first.get("global_steps")
        return step if isinstance(step, int) else None

    def objects(self, values: Values) -> dict[str, JsonValue]:
        """Counters, schedule, the client's state and the configuration."""
        model = self.first
        return {
            "counters": values.objects({key: model.get(key) for key in _COUNTERS}, ""),
            "lr_scheduler": values.json(model.get("lr_scheduler"), "lr_scheduler"),
            "client": values.objects({key: value for key, value in model.items() if key not in _OWN}, "client."),
            "config": values.json(model.get("ds_config"), "ds_config"),
        }

    def description(self, values: Values) -> dict[str, JsonValue]:
        """What wrote it."""
        return {"library": "deepspeed", "version": values.json(self.first.get("ds_version"), "ds_version")}


def settings_of(groups: list[dict[str, Any]], shapes: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Groups of an optimizer: names of their parameters, and their hyper-parameters. ``params`` of a group are the
    numbers of its partitions."""
    for group in groups:
        members = [index for index in group["params"] if index < len(shapes)]
        yield {
            "names": [name for index in members for name in shapes[index]],
            "settings": {key: value for key, value in group.items() if key != "params"},
        }

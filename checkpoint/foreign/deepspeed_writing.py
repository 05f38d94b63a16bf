"""What native and universal checkpoints of DeepSpeed have in common when they are written: the files of the model.

The library's own classes are named in its files, never imported. Which keys its loader asks for was found by loading
into its unmodified engine, version 0.19.8.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evermesh.checkpoint.contents import Content, Piece, whole
from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.foreign.deepspeed_layout import Partition, dealt, even_partition
from evermesh.checkpoint.foreign.deepspeed_model import PARAMETER, SCALER
from evermesh.checkpoint.foreign.pickle_writing import Call, Global, Instance, Ordered
from evermesh.checkpoint.foreign.training import Group, Training
from evermesh.checkpoint.regions import Interval

VERSION = "0.19.8"
_SIZE = Global("torch", "Size")
_SCALERS = {
    dynamic: Global("deepspeed.runtime.fp16.loss_scaler", name)
    for dynamic, name in ((False, "LossScaler"), (True, "DynamicLossScaler"))
}
_STAGE = Global("deepspeed.runtime.zero.config", "ZeroStageEnum")
_OBJECTS = frozenset(("counters", "lr_scheduler", "scaler", "client", "config", "aliases", "zero_stage"))
"""Of a training state that have a place in the library's files."""
OURS = "evermesh"
"""Key of the client's state under which all other objects are kept."""
_FLOAT32 = "float32"


@dataclass(frozen=True, slots=True)
class Model:
    """A training state as the library is to find it."""

    training: Training
    ranks: int
    dtype: str
    """Type of the weights that the model computes with."""

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run that saved it, if it was one of the library."""
        return self.training.objects.get("config") or {}

    @property
    def zero(self) -> dict[str, Any]:
        """Its part about ZeRO."""
        return self.config.get("zero_optimization") or {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a weight."""
        return self.training.source.tensors[self.training.parameters[name]].shape

    def shapes(self, stage: int) -> list[dict[str, tuple[int, ...]]]:
        """Of trained weights by group, in the order in which an engine lays them end to end."""
        return [{name: self.shape(name) for name in self._ordered(group, stage)} for group in self.training.groups]

    def _ordered(self, group: Group, stage: int) -> Sequence[str]:
        is_dealt = stage in (1, 2) and self.zero.get("round_robin_gradients")
        return dealt(group.names, self.ranks) if is_dealt else group.names

    def content(self, tensor: str, dtype: str | None = None) -> Content:
        """A tensor of the source."""
        return whole(self.training.source, tensor, dtype)


def check(training: Training) -> None:
    """Raise ``ForeignUnusable`` if the training state lacks what an engine needs to go on."""
    source = training.source
    if not training.groups:
        raise ForeignUnusable(
            source.path,
            "it does not say which weights the groups of the optimizer have, nor their settings",
            "Give them with --groups, or convert it to safetensors, which has weights only.",
        )
    for kind, of_kind in training.states.items():
        for group in training.groups:
            lacking = [name for name in group.names if name not in of_kind]
            if lacking and len(lacking) < len(group.names):
                fact = f"{kind}.{lacking[0]} is missing, which other weights of its group have"
                raise ForeignUnusable(source.path, fact, "Write groups whose weights have the same states.")
    for name in training.trained:
        if source.tensors[PARAMETER + name].dtype not in ("float32", "bfloat16", "float16"):
            fact = f"{name} is {source.tensors[PARAMETER + name].dtype}"
            raise ForeignUnusable(source.path, fact, "DeepSpeed keeps masters of float32 only.")


def kinds_of(training: Training, group: Group) -> list[str]:
    """What the optimizer keeps of the weights of a group."""
    return [kind for kind, of_kind in training.states.items() if group.names and group.names[0] in of_kind]


def numbers_of(group: Group) -> dict[str, Any]:
    """States of a group that are numbers: torch keeps floating ones as tensors, and leaves integers what they are."""
    import torch

    return {
        key: Content(_FLOAT32, (), values=torch.tensor(value)) if isinstance(value, float) else value
        for key, value in group.numbers.items()
    }


def settings_of(group: Group, members: Sequence[int]) -> dict[str, Any]:
    """A group of an optimizer: arrays are tuples, as torch has them."""
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in group.settings.items()}
    return settings | {"params": list(members)}


def stage_of(stage: int) -> Call:
    """The library's number of a stage."""
    return Call(_STAGE, (stage,))


def scaler_of(training: Training) -> dict[str, Any]:
    """The state of the loss scaler, that of training without scaling if the source has none."""
    saved = training.objects.get("scaler") or {}
    found = {key: saved[key] for key in SCALER if key in saved}
    state = found.get("loss_scaler") or {"cur_scale": 1.0, "dynamic": False}
    scaler = Instance(_SCALERS[bool(state.get("dynamic"))], state)
    return {"dynamic_loss_scale": False, "overflow": False} | found | {"loss_scaler": scaler}


def model_states(
    model: Model, shapes: Sequence[Mapping[str, tuple[int, ...]]], stage: int, rank: int
) -> dict[str, Any]:
    """The contents of a file of the model. ``shapes`` of trained weights are by group, or by sub-group in stage 3; stage 0
    stands for the universal form."""
    training = model.training
    counters = training.objects.get("counters") or {}
    step = training.source.step or 0
    frozen = training.frozen
    fragments = Ordered({name: _frozen(model, name, stage, rank) for name in frozen})
    return {
        "module": _module(model, stage),
        "buffer_names": list(training.buffers),
        "optimizer": None,
        "param_shapes": [Ordered({name: _size(shape) for name, shape in group.items()}) for group in shapes],
        "frozen_param_shapes": Ordered({name: _size(model.shape(name)) for name in frozen}),
        "frozen_param_fragments": fragments,
        "shared_params": dict(training.aliases),
        "lr_scheduler": training.objects.get("lr_scheduler"),
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
        "skipped_steps": counters.get("skipped_steps", 0),
        "global_steps": counters.get("global_steps", step),
        **({"global_samples": counters["global_samples"]} if "global_samples" in counters else {}),
        "dp_world_size": model.ranks,
        "mp_world_size": 1,
        "ds_config": model.config | ({"zero_optimization": model.zero | {"stage": stage}} if stage else {}),
        "ds_version": VERSION,
        **client_of(training),
    }


def client_of(training: Training) -> dict[str, Any]:
    """The client's state, with all that the library has no place for."""
    others = {key: value for key, value in training.objects.items() if key not in _OBJECTS}
    tensors = {
        name: whole(training.source, tensor) for name, tensor in training.client.items() if is_at_top(training, name)
    }
    client = dict(training.objects.get("client") or {})
    return client | tensors | ({OURS: client.get(OURS, {}) | others} if others else {})


def is_at_top(training: Training, name: str) -> bool:
    """Whether a tensor of the client's state is a value of it, not in a list or dict below."""
    return name.partition(".")[0].partition("[")[0] == name and name not in (training.objects.get("client") or {})


def _module(model: Model, stage: int) -> Ordered:
    """Weights in the type that the model computes with, frozen ones and buffers as they are."""
    training = model.training
    trained = set(training.trained)
    found = Ordered()
    for name, tensor in training.parameters.items():
        dtype = model.dtype if name in trained else training.source.tensors[tensor].dtype
        found[name] = Content(dtype, (0,)) if stage == 3 else model.content(tensor, dtype)
    found |= {name: model.content(tensor) for name, tensor in training.buffers.items()}
    return Ordered(found | {alias: found[name] for alias, name in training.aliases.items()})


def _frozen(model: Model, name: str, stage: int, rank: int) -> Content:
    tensor = model.training.parameters[name]
    content = model.content(tensor)
    if stage < 3:
        return content
    part = even_partition({name: model.shape(name)}, rank, model.ranks)
    return partition_of(part, {name: tensor}, content.dtype)


def partition_of(partition: Partition, tensors: Mapping[str, str], dtype: str, length: int | None = None) -> Content:
    """What a rank holds of a state, given the tensor of every parameter in a source; up to ``length`` elements."""
    pieces = (
        Piece(tensors[name], Interval(start, start + size), first)
        for name, first, start, size in partition.slices
        if size
    )
    return Content(dtype, (partition.length if length is None else length,), tuple(pieces))


def _size(shape: tuple[int, ...]) -> Call:
    return Call(_SIZE, (shape,))

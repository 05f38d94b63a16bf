"""Checkpoints of a model of transformers and its optimizer: any layout loads what any other saved.

A tensor is named ``parameter.NAME``, ``buffer.NAME`` or ``optimizer.KEY.NAME`` with NAME as transformers says it; what a rank
holds is a box of it: its part over tp, and of that its rows over hdp.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evermesh import checkpoint
from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.errors import CheckpointMismatch, CheckpointNotFound
from evermesh.checkpoint.regions import Box
from evermesh.checkpoint.rules import DimCut, RankGrid, ShardingRule
from evermesh.checkpoint.shard_map import ShardMap, TensorShards
from evermesh.checkpoint.stores.places import Place, place_of
from evermesh.parallelism.tensor.sharding import Cut
from evermesh.runtime.own_model.tensor import TensorParallelModel
from evermesh.runtime.process_group import Groups

_GROUPS, _SCALARS = "optimizer groups", "optimizer scalars"


def rule(cut: Cut, hdp: int, tp: int) -> ShardingRule:
    """Who holds what of a parameter that tensor-parallel ranks cut so. FSDP2 cuts dim 0 of what they have as
    ``torch.chunk`` does."""
    over_tp = () if cut.dim is None else (DimCut(cut.dim, (1,)),)
    return ShardingRule(RankGrid(0, ((hdp, tp), (tp, 1))), (*over_tp, DimCut(0, (0,), "up")))


class SavedState(NamedTuple):
    """What a checkpoint is made of: who holds what of every tensor, this rank's parts, and values beside them."""

    shard_map: ShardMap
    tensors: dict[str, Tensor]
    objects: dict[str, Any]

    def add(self, name: str, local: Tensor, shape: tuple[int, ...], placement: ShardingRule) -> None:
        dtype = str(local.dtype).removeprefix("torch.")
        self.shard_map.tensors[name] = TensorShards(dtype, shape, placement)
        if local.numel():
            self.tensors[name] = local


def state_to_save(
    parameters: Mapping[str, nn.Parameter],
    tensor: TensorParallelModel,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    groups: Groups,
) -> SavedState:
    """What a checkpoint holds of a model and its optimizer as they are now; the tensors are the live ones. Not collective."""
    held = _held(parameters, tensor, model, groups)
    if optimizer is not None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        held.objects[_SCALARS] = _add_optimizer(held, names, optimizer, tensor, groups)
        held.objects[_GROUPS] = [_as_json(group) for group in optimizer.param_groups]
    return held


def load_state(
    directory: Place,
    parameters: Mapping[str, nn.Parameter],
    tensor: TensorParallelModel,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    groups: Groups,
) -> int:
    """Take over the newest checkpoint; see ``ParallelModule.load``. Each rank reads the bytes of its own parts."""
    path = _newest(directory)
    held = _held(parameters, tensor, model, groups)
    states: dict[str, dict[str, Any]] = {}
    if optimizer is not None:
        states = _empty_states(path, parameters)
        for name, state in states.items():
            for key, value in state.items():
                _add(held, f"optimizer.{key}.{name}", value, tensor.cut(name), groups)
    wanted = checkpoint.wanted_regions(held.shard_map, groups.host.rank, held.tensors)
    loaded = checkpoint.load(
        path, wanted, shard_map=held.shard_map, strict=optimizer is not None, communicator=groups.host
    )
    if optimizer is not None:
        _restore_optimizer(optimizer, parameters, states, loaded.objects)
    assert loaded.step is not None, "ours says it"
    return loaded.step


def read_weights(directory: Place | str, model: nn.Module) -> int:
    """Read the weights of the newest checkpoint below ``directory`` into a whole model, in one process; returns its step.

    Not collective. ``model.save_pretrained`` then writes them as transformers does.

    Raises:
        CheckpointNotFound, CheckpointMismatch, CheckpointCorrupt: see ``evermesh.checkpoint.load``.
    """
    named = {f"parameter.{name}": parameter.detach() for name, parameter in model.named_parameters()}
    named |= {f"buffer.{name}": buffer for name, buffer in _persistent_buffers(model)}
    wanted = {name: (Box((0,) * value.dim(), tuple(value.shape)), value) for name, value in named.items()}
    step = checkpoint.load(_newest(place_of(directory)), wanted, strict=False).step
    assert step is not None, "ours says it"
    return step


def _newest(directory: Place) -> Place:
    found = checkpoint.latest(directory)
    if found is None:
        raise CheckpointNotFound(directory, "no step is complete there")
    return found


def _held(
    parameters: Mapping[str, nn.Parameter], tensor: TensorParallelModel, model: nn.Module, groups: Groups
) -> SavedState:
    held = SavedState(ShardMap({}), {}, {})
    for name, parameter in parameters.items():
        _add(held, f"parameter.{name}", parameter, tensor.cut(name), groups)
    everybody = ShardingRule(RankGrid(0, ((groups.host.size, 1),)))
    for name, buffer in _persistent_buffers(model):
        held.add(f"buffer.{name}", buffer, tuple(buffer.shape), everybody)
    return held


def _add(held: SavedState, name: str, value: Any, cut: Cut, groups: Groups) -> None:
    local: Tensor = value.detach().to_local()
    held.add(name, local, cut.shape, rule(cut, groups.hdp.size, groups.tp.size))
    own = sum(region.num_elements for region in held.shard_map.tensors[name].of_rank(groups.host.rank))
    assert own == local.numel(), f"{name}: {own} elements expected, {local.numel()} held"


def _add_optimizer(
    held: SavedState,
    names: Mapping[int, str],
    optimizer: torch.optim.Optimizer,
    tensor: TensorParallelModel,
    groups: Groups,
) -> dict[str, dict[str, float]]:
    """Add what the optimizer keeps of every parameter; returns its numbers, such as steps, by parameter."""
    scalars: dict[str, dict[str, float]] = {}
    for parameter, state in optimizer.state.items():
        name = names[id(parameter)]
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                _add(held, f"optimizer.{key}.{name}", value, tensor.cut(name), groups)
            else:
                scalars.setdefault(name, {})[key] = float(value)
    return scalars


def _empty_states(path: Place, parameters: Mapping[str, nn.Parameter]) -> dict[str, dict[str, Any]]:
    """Tensors for what the checkpoint has of an optimizer, by parameter; a new optimizer has none yet.

    Raises:
        CheckpointMismatch: it has nothing.
    """
    states: dict[str, dict[str, Any]] = {}
    manifest = read_manifest(path)
    for stored, entry in manifest.tensors.items():
        kind, _, rest = stored.partition(".")
        key, _, name = rest.partition(".")
        if kind == "optimizer" and name in parameters:
            like = torch.zeros_like(parameters[name].detach(), dtype=getattr(torch, entry.dtype))
            states.setdefault(name, {})[key] = like
    if _GROUPS not in manifest.objects:
        raise CheckpointMismatch(path, ["missing in the checkpoint: the state of an optimizer; load without one"])
    return states


def _restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    states: Mapping[str, dict[str, Any]],
    objects: Mapping[str, Any],
) -> None:
    for group, saved in zip(optimizer.param_groups, objects[_GROUPS], strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in saved.items()})
    # where torch wants steps beside the parameters
    fused = [group for group in optimizer.param_groups if group.get("fused") or group.get("capturable")]
    on_device = {id(parameter) for group in fused for parameter in group["params"]}
    optimizer.state.clear()
    for name, parameter in parameters.items():
        device = parameter.device if id(parameter) in on_device else torch.device("cpu")
        scalars = {key: torch.tensor(value, device=device) for key, value in objects[_SCALARS].get(name, {}).items()}
        if name in states or scalars:
            optimizer.state[parameter] = scalars | states.get(name, {})


def _persistent_buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in model.named_modules():
        for own, buffer in module.named_buffers(recurse=False):
            if own not in module._non_persistent_buffers_set:
                yield f"{prefix}.{own}" if prefix else own, buffer


def _as_json(group: Mapping[str, Any]) -> dict[str, Any]:
    """The rates of a parameter group; what is no number, text or list of them is left out."""
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in group.items()}
    return {
        key: value
        for key, value in plain.items()
        if all(isinstance(part, int | float | str | None) for part in (value if isinstance(value, list) else [value]))
    }

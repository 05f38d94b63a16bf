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
from evermesh.checkpoint.shard_map import Shard, ShardMap, TensorShards
from evermesh.checkpoint.stores.places import Place, place_of
from evermesh.parallelism.tensor.sharding import Cut
from evermesh.runtime.own_model.tensor import TensorParallelModel
from evermesh.runtime.process_group import Groups

_GROUPS, _SCALARS = "optimizer groups", "optimizer scalars"


class Holders(NamedTuple):
    """Who holds what of every parameter."""

    hdp: int
    tp: int

    def shards(self, cut: Cut) -> tuple[Shard, ...]:
        """Of one parameter, given how tensor-parallel ranks cut it; empty parts are left out."""
        shards = []
        for hdp in range(self.hdp):
            boxes: dict[Box, list[int]] = {}
            for tp in range(self.tp):
                box = _rows(cut, tp, hdp, self.hdp)
                if box.num_elements:
                    boxes.setdefault(box, []).append(hdp * self.tp + tp)
            shards += [Shard(box, tuple(ranks)) for box, ranks in boxes.items()]
        return tuple(shards)


def _rows(cut: Cut, tp: int, hdp: int, ranks: int) -> Box:
    """What one rank holds. FSDP2 cuts dim 0 as ``torch.chunk``: equal parts, rounded up, until nothing is left."""
    offsets, sizes = cut.offsets(tp) if cut.dim is not None else (0,) * len(cut.shape), cut.local_shape(tp)
    each = -(-sizes[0] // ranks)
    start, stop = min(hdp * each, sizes[0]), min((hdp + 1) * each, sizes[0])
    return Box((offsets[0] + start, *offsets[1:]), (stop - start, *sizes[1:]))


class _Held(NamedTuple):
    """Tensors as a checkpoint sees them: who holds what, and this rank's part."""

    shard_map: ShardMap
    tensors: dict[str, Tensor]

    def add(self, name: str, local: Tensor, shape: tuple[int, ...], shards: tuple[Shard, ...]) -> None:
        dtype = str(local.dtype).removeprefix("torch.")
        self.shard_map.tensors[name] = TensorShards(dtype, shape, shards)
        if local.numel():
            self.tensors[name] = local


def save_state(
    directory: Place,
    step: int,
    parameters: Mapping[str, nn.Parameter],
    tensor: TensorParallelModel,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    groups: Groups,
) -> Place:
    """Write a checkpoint; see ``ParallelModule.save``. Collective."""
    held = _held(parameters, tensor, model, groups)
    objects: dict[str, Any] = {}
    if optimizer is not None:
        names = {id(parameter): name for name, parameter in parameters.items()}
        objects[_SCALARS] = _add_optimizer(held, names, optimizer, tensor, groups)
        objects[_GROUPS] = [_as_json(group) for group in optimizer.param_groups]
    phase, groups.moment.phase = groups.moment.phase, "checkpoint"
    path = checkpoint.save(directory, step, held.shard_map, held.tensors, objects, communicator=groups.host)
    groups.moment.phase = phase
    return path


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
    loaded = checkpoint.load(path, wanted, shard_map=held.shard_map, strict=optimizer is not None)
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
) -> _Held:
    held = _Held(ShardMap({}), {})
    for name, parameter in parameters.items():
        _add(held, f"parameter.{name}", parameter, tensor.cut(name), groups)
    everybody = tuple(range(groups.host.size))
    for name, buffer in _persistent_buffers(model):
        shape = tuple(buffer.shape)
        held.add(f"buffer.{name}", buffer, shape, (Shard(Box((0,) * len(shape), shape), everybody),))
    return held


def _add(held: _Held, name: str, value: Any, cut: Cut, groups: Groups) -> None:
    local: Tensor = value.detach().to_local()
    shards = Holders(groups.hdp.size, groups.tp.size).shards(cut)
    own = sum(shard.region.num_elements for shard in shards if groups.host.rank in shard.ranks)
    assert own == local.numel(), f"{name}: {own} elements expected, {local.numel()} held"
    held.add(name, local, cut.shape, shards)


def _add_optimizer(
    held: _Held,
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

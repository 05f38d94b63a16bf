"""The training state in a checkpoint of any format, under one set of names, and taken apart for those who write it anew.

The names are ``parameter.NAME``, ``STATE.NAME`` for what an optimizer keeps per element, ``buffer.NAME`` and
``client.NAME``; ``objects["groups"]`` has names, settings and numbers of the optimizer's groups. Ours and DeepSpeed's
checkpoints have them already; torch.distributed and safetensors have their own, which ``in_our_names`` replaces.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from pydantic import JsonValue

from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.filling import fill
from evermesh.checkpoint.foreign.deepspeed_layout import undealt
from evermesh.checkpoint.foreign.deepspeed_model import BUFFER, PARAMETER
from evermesh.checkpoint.format import StoredTensor
from evermesh.checkpoint.regions import Interval
from evermesh.checkpoint.sources import Source, find

CLIENT = "client."
MODEL, STATE, GROUPS = "model.", "optimizer.state.", "optimizer.param_groups."
"""How torch.distributed is used by convention: ``get_state_dict(model, optimizer)`` under these names."""
BUFFER_NAMES = "buffer_names"
"""An object that tells buffers from weights where both are called alike."""
AS_THEY_ARE = "names_as_they_are"
"""An object of a checkpoint that we have written for torch.distributed: names do not follow the convention."""


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters that share the settings of an optimizer."""

    names: tuple[str, ...]
    """In the order of the optimizer."""
    settings: Mapping[str, Any]
    numbers: Mapping[str, Any]
    """States that are numbers, such as the step."""


@dataclass(frozen=True, eq=False)
class Training:
    """A training state taken apart. Tensors are named as in ``source``."""

    source: Source
    parameters: Mapping[str, str]
    """By name of the weight, tied ones once."""
    aliases: Mapping[str, str]
    """Further names of tied weights, and the names they are stored under."""
    states: Mapping[str, Mapping[str, str]]
    """By kind and name of the weight."""
    buffers: Mapping[str, str]
    client: Mapping[str, str]
    others: tuple[str, ...]
    """Tensors that are none of these."""
    groups: tuple[Group, ...] = ()
    """Of the optimizer; none: the checkpoint does not say."""
    objects: Mapping[str, Any] = field(default_factory=dict)
    """Without the groups."""

    @property
    def trained(self) -> list[str]:
        """Names of weights that the optimizer updates, group by group."""
        return [name for group in self.groups for name in group.names]

    @property
    def frozen(self) -> list[str]:
        """Names of weights that it does not."""
        trained = set(self.trained)
        return [name for name in self.parameters if name not in trained]


def training_of(source: Source, groups: Sequence[Mapping[str, Any]] | None = None) -> Training:
    """Take apart the training state in ``source``, whatever its format.

    ``groups`` are those of the optimizer where the checkpoint does not tell them; their names may be patterns
    (``fnmatch``), of which the first that matches a weight takes it.

    Raises:
        ForeignUnusable: groups name a weight that is not there, or twice, or numbers of one group differ.
    """
    source = in_our_names(source)
    parameters = _below(source, PARAMETER)
    aliases = _aliases(source, parameters)
    parameters = {name: tensor for name, tensor in parameters.items() if name not in aliases}
    states: dict[str, dict[str, str]] = {}
    others = []
    for tensor in source.tensors:
        kind, _, name = tensor.partition(".")
        if tensor.startswith((PARAMETER, BUFFER, CLIENT)):
            continue
        if name in parameters:
            states.setdefault(kind, {})[name] = tensor
        elif name not in aliases:
            others.append(tensor)
    objects = {key: value for key, value in source.objects.items() if key != "groups"}
    told = groups if groups is not None else source.objects.get("groups")
    return Training(
        source,
        parameters,
        aliases,
        states,
        _below(source, BUFFER),
        _below(source, CLIENT),
        tuple(others),
        tuple(_groups(source, told, parameters, aliases)) if isinstance(told, list) else (),
        objects,
    )


def in_our_names(source: Source) -> Source:
    """``source`` under the names above, if its format has others by convention; else as it is."""
    if source.kind == "torch-distributed" and AS_THEY_ARE in source.objects:
        objects = {key: value for key, value in source.objects.items() if key not in (AS_THEY_ARE, "step")}
        return replace(source, objects=objects, step=_step(source.objects.get("step")))
    if source.kind == "torch-distributed" and any(name.startswith(MODEL) for name in source.tensors):
        return _of_torch_distributed(source)
    if source.kind == "deepspeed":
        return _in_order(source)
    if source.kind == "safetensors" and not any(name.startswith(PARAMETER) for name in source.tensors):
        return replace(source, tensors={PARAMETER + name: tensor for name, tensor in source.tensors.items()})
    return source


def _in_order(source: Source) -> Source:
    """Stages 1 and 2 deal parameters out to ranks if told to; their order before that is what others can use."""
    objects: Any = source.objects
    zero = (objects.get("config") or {}).get("zero_optimization") or {}
    if objects.get("zero_stage") not in (1, 2) or not zero.get("round_robin_gradients") or source.world_size is None:
        return source
    groups: JsonValue = [group | {"names": undealt(group["names"], source.world_size)} for group in objects["groups"]]
    return replace(source, objects={**source.objects, "groups": groups})


def _of_torch_distributed(source: Source) -> Source:
    objects = dict(source.objects)
    buffers = objects.pop(BUFFER_NAMES, [])
    assert isinstance(buffers, list) or buffers is None
    tensors, numbers = dict[str, StoredTensor](), dict[str, dict[str, Any]]()
    scalars: list[str] = []
    for name, tensor in source.tensors.items():
        weight, _, kind = name.removeprefix(STATE).rpartition(".")
        if name.startswith(MODEL):
            weight = name.removeprefix(MODEL)
            tensors[(BUFFER if weight in (buffers or ()) else PARAMETER) + weight] = tensor
        elif not name.startswith(STATE):
            tensors[name] = tensor
        elif tensor.shape == () and (kind == "step" or source.tensors.get(MODEL + weight, tensor).shape != ()):
            scalars.append(name)
        else:
            tensors[f"{kind}.{weight}"] = tensor
    for name, value in _scalars(source, scalars).items():
        weight, _, kind = name.removeprefix(STATE).rpartition(".")
        numbers.setdefault(weight, {})[kind] = value
    for name in [name for name in objects if name.startswith(STATE)]:
        weight, _, kind = name.removeprefix(STATE).rpartition(".")
        numbers.setdefault(weight, {})[kind] = objects.pop(name)
    groups: list[JsonValue] = list(_torch_groups(source, objects, numbers))
    step = _step(objects.pop("step", None))
    return replace(source, tensors=tensors, objects={**objects, "groups": groups} if groups else objects, step=step)


def _step(found: JsonValue) -> int | None:
    return found if isinstance(found, int) else None


def _scalars(source: Source, names: Sequence[str]) -> dict[str, Any]:
    """Values of tensors without dims."""
    found = {name: torch.empty((), dtype=getattr(torch, source.tensors[name].dtype)) for name in names}
    whole, _ = find(source, None)
    fill(source, whole, {name: [(Interval(0, 1), tensor)] for name, tensor in found.items()}, {})
    return {name: tensor.item() for name, tensor in found.items()}


def _torch_groups(
    source: Source, objects: dict[str, JsonValue], numbers: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Groups as torch writes them, taken out of ``objects``."""
    found: dict[int, dict[str, Any]] = {}
    for key in [key for key in objects if key.startswith(GROUPS)]:
        index, _, setting = key.removeprefix(GROUPS).partition(".")
        if index.isdecimal():
            found.setdefault(int(index), {})[setting] = objects.pop(key)
    groups = []
    for _, group in sorted(found.items()):
        names = group.pop("params", [])
        of_group = [numbers.get(name, {}) for name in names]
        if any(values != of_group[0] for values in of_group):
            fact = f"numbers of the parameters of a group differ: {of_group[0]} and others"
            raise ForeignUnusable(source.path, fact, "Only states that are the same in a group can be converted.")
        groups.append({"names": names, "settings": group, "numbers": dict(of_group[0]) if of_group else {}})
    return groups


def _below(source: Source, prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): name for name in source.tensors if name.startswith(prefix)}


def _aliases(source: Source, parameters: Mapping[str, str]) -> dict[str, str]:
    """Weights that are the same bytes as one before them, or that the checkpoint says are."""
    told: Any = source.objects.get("aliases") or {}
    first: dict[Any, str] = {}
    found = {alias: name for alias, name in told.items() if alias in parameters and name in parameters}
    for name, tensor in parameters.items():
        stored = source.tensors[tensor]
        if name in found or not stored.extents:
            continue
        known = first.setdefault((stored.shape, stored.extents), name)
        if known != name:
            found[name] = known
    return found


def _groups(
    source: Source, told: Sequence[Any], parameters: Mapping[str, str], aliases: Mapping[str, str]
) -> list[Group]:
    left = dict.fromkeys(parameters)
    groups = []
    for group in told:
        names: list[str] = []
        for pattern in group["names"]:
            exact = aliases.get(pattern, pattern)
            matching = [exact] if exact in left else [name for name in left if fnmatchcase(name, pattern)]
            if not matching:
                fact = f"a group of the optimizer names {pattern!r}, which is no weight, or one of another group"
                raise ForeignUnusable(source.path, fact, f"Its weights are {', '.join(list(parameters)[:5])} ...")
            names += matching
            for name in matching:
                del left[name]
        groups.append(Group(tuple(names), group.get("settings", {}), group.get("numbers", {})))
    return groups

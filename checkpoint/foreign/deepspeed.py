"""Checkpoints as DeepSpeed writes them with ZeRO 1, 2 and 3, and one model-parallel rank. Imports no torch.

Tensors are called ``parameter.NAME`` (the float32 masters of trained weights, frozen weights as they are),
``buffer.NAME``, and ``STATE.NAME`` for whatever the optimizer keeps per element, such as ``exp_avg.NAME``; tensors in the
client's state ``client.NAME``. Format: as found in files of version 0.19.8.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.foreign.deepspeed_layout import flat_partition
from evermesh.checkpoint.foreign.deepspeed_model import (
    AGAIN,
    PARAMETER,
    SCALER,
    ModelStates,
    Slicing,
    even,
    find_models,
    read,
    settings_of,
)
from evermesh.checkpoint.foreign.fragments import Fragment, Slice, assemble, whole
from evermesh.checkpoint.foreign.pickle_machine import Record
from evermesh.checkpoint.foreign.torch_files import TorchTensor
from evermesh.checkpoint.foreign.values import Values, number
from evermesh.checkpoint.sources import Source, plain_files

_OPTIMIZER = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt")
_OTHER = re.compile(r"(layer_|expert_|expp_).*\.pt")


@dataclass(frozen=True, slots=True)
class Partition:
    """What one rank holds of the parameters of a group or sub-group, laid end to end, and of their states."""

    slices: Sequence[Slicing]
    master: TorchTensor
    states: Mapping[str, Any]


def open_deepspeed(path: Path) -> Source:
    """Index the folder of one tag.

    Raises:
        ForeignUnusable: files are missing or damaged, of another layout, or were not saved together.
    """
    models, optimizers = _files(path)
    try:
        values = Values(path)
        shards = [read(file)["optimizer_state_dict"] for file in optimizers]
        return _Reader(ModelStates(path, models, values), shards, len(models)).source()
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, ForeignUnusable):
            raise
        fact = f"its files are not as DeepSpeed writes them ({type(error).__name__}: {str(error)[:100]})"
        raise ForeignUnusable(path, fact, AGAIN) from error


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """Files of the model and of the optimizer, each by data-parallel rank."""
    names = sorted(entry.name for entry in path.iterdir())
    others = [name for name in names if _OTHER.fullmatch(name)]
    optimizers = sorted((int(m[2]), int(m[1]), path / m[0]) for name in names if (m := _OPTIMIZER.fullmatch(name)))
    models = find_models(path)
    if others or any(mp for mp, _, _ in (*optimizers, *models)):
        fact = f"it has {others[0]}" if others else "it has several model-parallel ranks"
        raise ForeignUnusable(path, f"{fact}, which this version does not read", "Convert it with ds_to_universal.")
    for found, what in ((models, "model"), (optimizers, "optimizer, as without ZeRO")):
        if not found:
            raise ForeignUnusable(path, f"it has no files of the {what}", AGAIN)
        if [rank for _, rank, _ in found] != list(range(len(found))):
            fact = f"of ranks 0 to {found[-1][1]} some lack their files of the {what.partition(',')[0]}"
            raise ForeignUnusable(path, fact, AGAIN)
    return [file for *_, file in models], [file for *_, file in optimizers]


class _Reader:
    """The contents of all files of a tag."""

    def __init__(self, model: ModelStates, shards: list[dict[str, Any]], num_models: int) -> None:
        self.path, self.model, self.shards, self.values = model.path, model, shards, model.values
        self.stage = int(shards[0]["zero_stage"])
        ranks = [max(n) if isinstance(n := shard["partition_count"], list) else n for shard in shards]
        if any(count != len(shards) for count in ranks):
            fact = f"it was saved by {max(ranks)} ranks, of which the files of {len(shards)} are here"
            raise ForeignUnusable(self.path, fact, AGAIN)
        if self.stage == 3 and num_models != len(shards):
            fact = f"it has {num_models} files of the model for {len(shards)} ranks"
            raise ForeignUnusable(self.path, fact, AGAIN)

    def source(self) -> Source:
        slices = self._slices()
        ranks = [list(self._partitions(rank, slices[rank])) for rank in range(len(self.shards))]
        fragments: dict[tuple[str, str], list[Fragment]] = {}
        for partition in (partition for of_rank in ranks for partition in of_rank):
            for kind, tensor in self._kinds(partition):
                for name, first, start, length in partition.slices:
                    fragments.setdefault((kind, name), []).append(Slice(tensor, first, start, length))
        shapes = {name: shape for group in self.model.shapes for name, shape in group.items()}
        tensors = {k + n: assemble(self.path, k + n, shapes[n], found) for (k, n), found in fragments.items()}
        tensors |= {PARAMETER + name: tensor for name, tensor in self.model.frozen().items()}
        tensors = self.model.with_aliases(tensors, {kind for kind, _ in fragments}) | self.model.buffers()
        objects = self._objects(ranks)
        tensors |= {place: whole(self.path, place, tensor) for place, tensor in self.values.tensors.items()}
        return Source(
            self.path,
            "deepspeed",
            tensors,
            plain_files(self.path, tensors),
            objects,
            self.model.description(),
            self.model.step,
            len(self.shards),
            tuple(self.values.left_out),
        )

    def _slices(self) -> list[list[list[Slicing]]]:
        """By rank and group: where parameters are in a partition.

        Stages 1 and 2 say it; what comes before in a parameter is on the ranks before. Stage 3 follows a rule. So do
        stages 1 and 2 with ``round_robin_gradients``: what they say then is wrong in version 0.19.8, which lays the
        parameters in one order, that of ``param_shapes``, and counts in another.
        """
        shapes, ranks = self.model.shapes, len(self.shards)
        if self.stage < 3 and self._is_dealt():
            return [[list(flat_partition(group, rank, ranks).slices) for group in shapes] for rank in range(ranks)]
        if self.stage == 3:
            return [[list(even(group, rank, ranks)) for group in shapes] for rank in range(ranks)]
        if any("param_slice_mappings" not in shard for shard in self.shards):
            fact = "its partitions do not say which parameters they hold, as those of versions before 0.8"
            raise ForeignUnusable(self.path, fact, "Load and save it with a later version.")
        found: list[list[list[Slicing]]] = []
        reached: list[dict[str, int]] = [{} for _ in shapes]
        for shard in self.shards:
            found.append([])
            for before, mapping in zip(reached, shard["param_slice_mappings"], strict=True):
                places = [(name, place.get("start"), place.get("numel")) for name, place in mapping.items()]
                found[-1].append([(name, start, before.get(name, 0), length) for name, start, length in places])
                before |= {name: before.get(name, 0) + length for name, _, length in places}
        return found

    def _is_dealt(self) -> bool:
        """Whether parameters were dealt out to ranks, one after the other, without gaps."""
        zero = (self.model.first.get("ds_config") or {}).get("zero_optimization") or {}
        gaps = (gap for shard in self.shards for group in shard.get("param_alignment_paddings") or () for gap in group)
        return bool(zero.get("round_robin_gradients")) and not any(gaps)

    def _partitions(self, rank: int, slices: list[list[Slicing]]) -> Iterator[Partition]:
        """What a rank holds of the optimizer."""
        shard = self.shards[rank]
        if self.stage == 3:
            states, masters = shard["optimizer_state_dict"]["state"], shard["fp32_flat_groups"]
        else:
            states, masters = shard["base_optimizer_state"], shard["single_partition_of_fp32_groups"]
            # saved with elastic_checkpoint it is a list
            states = dict(enumerate(states)) if isinstance(states, list) else states["state"]
        if len(masters) != len(slices):
            raise ForeignUnusable(self.path, f"rank {rank} has {len(masters)} of {len(slices)} groups", AGAIN)
        for index, (of_group, master) in enumerate(zip(slices, masters, strict=True)):
            yield Partition(of_group, master, states.get(index, {}))

    def _kinds(self, partition: Partition) -> Iterator[tuple[str, TorchTensor]]:
        """What there is for every element of a partition, by kind."""
        yield PARAMETER, partition.master
        for key, value in partition.states.items():
            if not isinstance(value, TorchTensor) or _is_number(value, partition):
                continue
            if len(value.shape) != 1 or value.num_elements < partition.master.num_elements:
                fact = f"the state {key} is of {list(value.shape)} in a partition of {partition.master.num_elements:,}"
                way_out = "This version reads optimizers whose states are numbers, or as long as the parameters."
                raise ForeignUnusable(self.path, fact, way_out)
            yield f"{key}.", value

    def _objects(self, ranks: list[list[Partition]]) -> dict[str, JsonValue]:
        numbers = [[_numbers(partition) for partition in partitions] for partitions in ranks]
        for rank, of_rank in enumerate(numbers):
            if of_rank != numbers[0]:
                fact = f"the optimizers of ranks 0 and {rank} differ in {_difference(numbers[0], of_rank)}"
                raise ForeignUnusable(self.path, fact, AGAIN)
        shard = self.shards[0]
        optimizer = shard["optimizer_state_dict"] if self.stage == 3 else shard["base_optimizer_state"]
        if isinstance(optimizer, list):  # without hyper-parameters
            optimizer = {"param_groups": [{"params": [index]} for index in range(len(optimizer))]}
        groups = []
        for group, settings in zip(
            optimizer["param_groups"], settings_of(optimizer["param_groups"], self.model.shapes), strict=True
        ):
            members = [index for index in group["params"] if index < len(numbers[0])]
            groups.append(settings | {"numbers": numbers[0][members[0]] if members else {}})
        return self.model.objects() | {
            "groups": [self.values.json(group, f"groups[{index}]") for index, group in enumerate(groups)],
            "scaler": self.values.objects({key: shard[key] for key in SCALER if key in shard}, ""),
            "zero_stage": self.stage,
        }


def _is_number(state: TorchTensor, partition: Partition) -> bool:
    return not state.shape or (state.num_elements == 1 != partition.master.num_elements)


def _numbers(partition: Partition) -> dict[str, Any]:
    """States of a partition that are one number, such as the step."""
    found: dict[str, Any] = {}
    for key, value in partition.states.items():
        if isinstance(value, TorchTensor):
            if _is_number(value, partition):
                found[key] = number(value)
        elif not isinstance(value, Record):
            found[key] = value
    return found


def _difference(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> str:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                return f"{key} of group {index}: {str(a.get(key))[:40]} and {str(b.get(key))[:40]}"
    return "the number of groups"

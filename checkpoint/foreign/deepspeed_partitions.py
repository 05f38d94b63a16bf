"""What the optimizers of the ranks that share one part of a model hold with ZeRO 1, 2 and 3. Imports no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evermesh.checkpoint.errors import ForeignUnusable
from evermesh.checkpoint.foreign.deepspeed_experts import Experts
from evermesh.checkpoint.foreign.deepspeed_layout import flat_partition
from evermesh.checkpoint.foreign.deepspeed_model import AGAIN, PARAMETER, ModelStates, Slicing, even, settings_of
from evermesh.checkpoint.foreign.fragments import Slice
from evermesh.checkpoint.foreign.patterns import Shape
from evermesh.checkpoint.foreign.pickle_machine import Record
from evermesh.checkpoint.foreign.torch_files import TorchTensor
from evermesh.checkpoint.foreign.values import number
from evermesh.checkpoint.stores.places import Place


@dataclass(frozen=True, slots=True)
class Partition:
    """What one rank holds of the parameters of a group or sub-group, laid end to end, and of their states."""

    slices: Sequence[Slicing]
    master: TorchTensor
    states: Mapping[str, Any]


class Partitions:
    """The optimizer files of one model-parallel rank, by data-parallel rank."""

    def __init__(self, path: Place, model: ModelStates, shards: Sequence[dict[str, Any]]) -> None:
        self.path, self.model, self.shards = path, model, shards
        self.stage = int(shards[0]["zero_stage"])
        counts = [max(n) if isinstance(n := shard["partition_count"], list) else n for shard in shards]
        if any(count != len(shards) for count in counts):
            fact = f"it was saved by {max(counts)} ranks, of which the files of {len(shards)} are here"
            raise ForeignUnusable(path, fact, AGAIN)
        if self.stage == 3 and model.num_files != len(shards):
            fact = f"it has {model.num_files} files of the model for {len(shards)} ranks"
            raise ForeignUnusable(path, fact, AGAIN)
        if any(shard.get("ds_zero_partition_groups") for shard in shards):
            raise ForeignUnusable(path, "its groups of ranks divide different parameters", "Convert it first.")
        self.experts = Experts(path, model, len(shards))
        self.holders = [self._holders(index) for index in range(len(model.shapes))]
        slices = self._slices()
        self.partitions = [list(self._of_rank(rank, slices[rank])) for rank in range(len(shards))]

    def fragments(self) -> Iterator[tuple[str, str, Slice]]:
        """What makes up every parameter and its states: kind, name, and place in it."""
        for partition in (partition for of_rank in self.partitions for partition in of_rank):
            for kind, tensor in self._kinds(partition):
                for name, first, start, length in partition.slices:
                    yield kind, name, Slice(tensor, first, start, length)

    def shapes(self) -> dict[str, Shape]:
        """Of trained parameters, all experts among them."""
        return {
            called: shape
            for group, holders in zip(self.model.shapes, self.holders, strict=True)
            for name, shape in group.items()
            for called in self.experts.names(name, holders)
        }

    def groups(self) -> list[dict[str, Any]]:
        """Names, settings and numbers of the groups of parameters. Raises ``ForeignUnusable`` where ranks differ."""
        numbers = [[_numbers(partition) for partition in partitions] for partitions in self.partitions]
        for rank, of_rank in enumerate(numbers):
            if of_rank != numbers[0]:
                fact = f"the optimizers of ranks 0 and {rank} differ in {_difference(numbers[0], of_rank)}"
                raise ForeignUnusable(self.path, fact, AGAIN)
        names = [
            {called: None for name in group for called in self.experts.names(name, holders)}
            for group, holders in zip(self.model.shapes, self.holders, strict=True)
        ]
        found = []
        for group, settings in zip(self._settings(), settings_of(self._settings(), names), strict=True):
            members = [index for index in group["params"] if index < len(numbers[0])]
            found.append(settings | {"numbers": numbers[0][members[0]] if members else {}})
        return found

    def _settings(self) -> list[dict[str, Any]]:
        """Groups of the optimizer; one saved with elastic_checkpoint has no hyper-parameters."""
        shard = self.shards[0]
        optimizer = shard["optimizer_state_dict"] if self.stage == 3 else shard["base_optimizer_state"]
        if isinstance(optimizer, list):
            return [{"params": [index]} for index in range(len(optimizer))]
        groups: list[dict[str, Any]] = optimizer["param_groups"]
        return groups

    def _holders(self, index: int) -> int:
        """Different sets of parameters that ranks hold in a group: of experts, else one."""
        counts = self.shards[0]["partition_count"]
        if self.stage == 3 or not isinstance(counts, list):
            return 1
        of_group = next((group for group in self._settings() if index in group["params"]), {})
        return self.experts.holders(of_group, counts[index])

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
        for rank, shard in enumerate(self.shards):
            found.append([])
            for before, mapping, holders in zip(reached, shard["param_slice_mappings"], self.holders, strict=True):
                holder = self.experts.of_rank(rank, holders)
                places = [
                    (self.experts.name(name, holder, holders), place.get("start"), place.get("numel"))
                    for name, place in mapping.items()
                ]
                found[-1].append([(name, start, before.get(name, 0), length) for name, start, length in places])
                before |= {name: before.get(name, 0) + length for name, _, length in places}
        return found

    def _is_dealt(self) -> bool:
        """Whether parameters were dealt out to ranks, one after the other, without gaps."""
        zero = (self.model.first.get("ds_config") or {}).get("zero_optimization") or {}
        gaps = (gap for shard in self.shards for group in shard.get("param_alignment_paddings") or () for gap in group)
        return bool(zero.get("round_robin_gradients")) and not any(gaps) and max(self.holders, default=1) == 1

    def _of_rank(self, rank: int, slices: list[list[Slicing]]) -> Iterator[Partition]:
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

"""Writes checkpoints as DeepSpeed keeps them with ZeRO 1, 2 and 3, for any number of ranks and one model-parallel rank.

An unmodified engine loads them with ``load_checkpoint``, on that number of ranks and in that stage, with the same groups
of parameters; its ``zero_to_fp32`` consolidates them. Format: ``docs/decisions/0036``; geometry: ``deepspeed_layout``.
"""

from collections.abc import Iterator
from typing import Any

from evermesh.checkpoint.foreign.deepspeed_layout import (
    SUB_GROUP_SIZE,
    Partition,
    even_partition,
    flat_partition,
    sub_groups,
)
from evermesh.checkpoint.foreign.deepspeed_writing import (
    VERSION,
    Model,
    kinds_of,
    model_states,
    numbers_of,
    partition_of,
    scaler_of,
    settings_of,
    stage_of,
)
from evermesh.checkpoint.foreign.pickle_writing import Global, Instance, Ordered
from evermesh.checkpoint.foreign.torch_writing import TorchFile
from evermesh.checkpoint.foreign.training import Group

_ADDRESS = Global("deepspeed.utils.tensor_fragment", "fragment_address")
_MASTER = "float32"


def native_files(model: Model, stage: int) -> Iterator[tuple[str, TorchFile]]:
    """Names and contents of all files of a tag."""
    shapes = model.shapes(stage)
    before = "bf16_" if model.dtype == "bfloat16" else ""
    if stage < 3:
        yield "mp_rank_00_model_states.pt", TorchFile(model_states(model, shapes, stage, 0))
    else:
        most = model.zero.get("sub_group_size") or SUB_GROUP_SIZE
        cut = [list(sub_groups(group, model.ranks, int(most))) for group in shapes]
    for rank in range(model.ranks):
        if stage < 3:
            state = _flat_state(model, stage, [flat_partition(group, rank, model.ranks) for group in shapes])
        else:
            of_rank = model_states(model, [part for group in cut for part in group], stage, rank)
            yield f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt", TorchFile(of_rank)
            state = _even_state(model, [[even_partition(part, rank, model.ranks) for part in group] for group in cut])
        file = TorchFile({"optimizer_state_dict": state, "ds_config": model.config, "ds_version": VERSION})
        yield f"{before}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", file


def _flat_state(model: Model, stage: int, partitions: list[Partition]) -> dict[str, Any]:
    """Stages 1 and 2; a group is one partition."""
    groups = model.training.groups
    states = {
        index: _states(model, group, partition)
        for index, (group, partition) in enumerate(zip(groups, partitions, strict=True))
    }
    return scaler_of(model.training) | {
        "base_optimizer_state": {
            "state": {index: state for index, state in states.items() if state},
            "param_groups": [settings_of(group, [index]) for index, group in enumerate(groups)],
        },
        "single_partition_of_fp32_groups": [
            partition_of(partition, model.training.parameters, _MASTER, partition.length - partition.padding)
            for partition in partitions
        ],
        "zero_stage": stage_of(stage),
        "group_paddings": [partition.padding for partition in partitions],
        "param_alignment_paddings": [[0] * len(group.names) for group in groups],
        "partition_count": [model.ranks] * len(groups),
        "ds_version": VERSION,
        "param_slice_mappings": [
            Ordered({name: Instance(_ADDRESS, {"numel": size, "start": at}) for name, at, _, size in partition.slices})
            for partition in partitions
        ],
    }


def _even_state(model: Model, partitions: list[list[Partition]]) -> dict[str, Any]:
    """Stage 3; a group is one partition or several."""
    states: dict[int, dict[str, Any]] = {}
    groups = []
    for group, of_group in zip(model.training.groups, partitions, strict=True):
        members = range(len(states), len(states) + len(of_group))
        states |= {index: _states(model, group, part) for index, part in zip(members, of_group, strict=True)}
        groups.append(settings_of(group, members))
    return scaler_of(model.training) | {
        "zero_stage": stage_of(3),
        "partition_count": model.ranks,
        "optimizer_state_dict": {
            "state": {index: state for index, state in states.items() if state},
            "param_groups": groups,
        },
        "fp32_flat_groups": [
            partition_of(partition, model.training.parameters, _MASTER)
            for of_group in partitions
            for partition in of_group
        ],
    }


def _states(model: Model, group: Group, partition: Partition) -> dict[str, Any]:
    """What the optimizer of a rank keeps of a partition."""
    kinds = kinds_of(model.training, group)
    tensors = {kind: partition_of(partition, model.training.states[kind], _MASTER) for kind in kinds}
    return numbers_of(group) | tensors if kinds or group.numbers else {}

"""Who would hold what of a run that was not started: its shard map, from the configuration alone."""

import itertools

import torch

from evermesh.checkpoint.shard_map import ShardMap
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.errors import UnsupportedModel
from evermesh.runtime.model.building import held_sets
from evermesh.runtime.model.stages import nominal_costs, stage_parts
from evermesh.runtime.optimizer import shard_map


def planned_shard_map(config: TrainConfig, vocabulary: int) -> ShardMap:
    """The map that all ranks of a run with this configuration would compute. Not collective; makes no tensors.

    Where ``layout.split`` is to be measured, layers are taken to cost what they nominally do.

    Raises:
        UnsupportedModel: the engine of DeepSpeed is to train it.
        LayoutDoesNotFit: the model has fewer layers than there are stages.
    """
    if config.layout.deepspeed is not None:
        raise UnsupportedModel("layout.deepspeed leaves it to that library which rank holds what. Plan without it.")
    parts = stage_parts(config.model, config.layout, nominal_costs(config.model, vocabulary))
    held = itertools.chain.from_iterable(held_sets(config, vocabulary, parts, pp) for pp in range(config.layout.pp))
    return shard_map(list(held), getattr(torch, config.dtype))

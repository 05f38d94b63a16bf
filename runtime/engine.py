"""What holds and updates the parameters of a rank: our own sharding, or that of a library."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from evermesh.checkpoint.shard_map import ShardMap
from evermesh.parallelism.layout.states import StateMemory, state_memory
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.lamb import build_optimizer
from evermesh.runtime.micro_batch import MicroBatchRunner
from evermesh.runtime.model.building import BuiltModel, build_model, build_runner
from evermesh.runtime.optimizer import ShardedOptimizer, shard_map
from evermesh.runtime.process_group import Groups
from evermesh.runtime.traffic import trained_model


class Engine(ABC):
    """One rank's model, and what trains it.

    Args:
        built: the model.
        optimizer: steps this rank's part of it.
        runner: leaves the gradients of micro-batches with it.
        shards: which rank holds which part of everything that must survive; the same on every rank.
    """

    def __init__(
        self, built: BuiltModel, optimizer: ShardedOptimizer, runner: MicroBatchRunner, shards: ShardMap
    ) -> None:
        self.built, self.optimizer, self.runner, self.shards = built, optimizer, runner, shards

    @abstractmethod
    def begin_step(self) -> None:
        """Before a step: whatever gradients the last one left, committed or not, are gone. Collective."""

    def end_step(self) -> None:
        """Behind a step: give memory back that is needed only in one."""
        self.built.end_step()

    @property
    def memory(self) -> StateMemory | None:
        """Bytes of parameters, gradients and optimizer states that this rank needs; None: nobody knows."""
        return None

    @abstractmethod
    def sum_gradients(self) -> Tensor:
        """Sum those of all ranks; returns this rank's part of the square of their norm, a float64 scalar. Collective."""


class OwnEngine(Engine):
    """Our own: what it holds is in the sets of the model."""

    def __init__(
        self,
        built: BuiltModel,
        optimizer: ShardedOptimizer,
        runner: MicroBatchRunner,
        shards: ShardMap,
        memory: StateMemory,
    ) -> None:
        super().__init__(built, optimizer, runner, shards)
        self._memory = memory

    def begin_step(self) -> None:
        """See ``Engine``."""
        self.built.begin_step()

    @property
    def memory(self) -> StateMemory | None:
        """See ``Engine``."""
        return self._memory

    def sum_gradients(self) -> Tensor:
        """See ``Engine``."""
        return self.built.sum_gradients()


def build_engine(
    config: TrainConfig, vocabulary: int, groups: Groups, device: torch.device, *, initialize: bool = True
) -> Engine:
    """The engine that the layout asks for; arguments as for ``build_model``. Collective."""
    if config.layout.deepspeed is not None:
        from evermesh.runtime.deepspeed_engine.building import build  # the library is optional

        return build(config, vocabulary, groups, device)
    built = build_model(config, vocabulary, groups, device, initialize=initialize)
    optimizer = build_optimizer(built.sets, config.optimizer, built.tied)
    runner = build_runner(built, config.layout, groups, config.buckets)
    held = [of for of_rank in built.held for of in of_rank]
    trained = trained_model(config, vocabulary, built.stages, built.held)
    memory = state_memory(trained.stages[groups.place.pp].sets, config.layout, trained.bytes_per_element)
    return OwnEngine(built, optimizer, runner, shard_map(held, getattr(torch, config.dtype)), memory)

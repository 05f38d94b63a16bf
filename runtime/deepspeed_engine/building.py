"""The model of one rank inside an engine of DeepSpeed, and how micro-batches run through it."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from evermesh.parallelism.batch_plan import MicroBatch
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.parallelism.sharding import DeepSpeed
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.deepspeed_engine.library import start_library
from evermesh.runtime.deepspeed_engine.optimizer import EngineAdamW, Partitioned, Stage3, Stage12, square_of
from evermesh.runtime.deepspeed_engine.partitions import fragments, groups_of, shard_map
from evermesh.runtime.deepspeed_engine.settings import library_config
from evermesh.runtime.engine import Engine
from evermesh.runtime.memory.policy import ActivationMemory
from evermesh.runtime.memory.products import Products
from evermesh.runtime.micro_batch import LocalBatch, LocalMicroBatch, MicroBatchRunner
from evermesh.runtime.model.building import BuiltModel
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.stages import Part
from evermesh.runtime.optimizer_config import AdamWConfig
from evermesh.runtime.process_group import Groups


class DeepSpeedEngine(Engine):
    """DeepSpeed: its hooks sum while the backward passes run, and nothing is left to sum."""

    parts: Partitioned

    def begin_step(self) -> None:
        """See ``Engine``."""
        self.parts.clear()

    def sum_gradients(self) -> Tensor:
        """See ``Engine``."""
        return square_of(self.parts.gradients()).to(self.runner.device)


class DeepSpeedRunner(MicroBatchRunner):
    """Runs micro-batches through an engine.

    The library divides what it sums by the number of ranks; our loss is weighted for a sum, so it is multiplied by them.
    """

    def __init__(self, engine: Any, model: Decoder, hdp: Communicator, memory: ActivationMemory) -> None:
        super().__init__(model, hdp, memory=memory)
        self.engine, self.call = engine, engine

    def accumulate(self, batch: LocalBatch) -> tuple[Tensor, list[TokenContext]]:
        """See ``MicroBatchRunner``. Leaves the gradients summed, with the library."""
        if not batch.micro_batches:  # a rank without any has to join the sum too, which follows the last one
            batch = dataclasses.replace(batch, micro_batches=(_nothing(),))
        return super().accumulate(batch)

    def _backward(self, loss: Tensor, *, is_last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(is_last)
        self.engine.backward(loss * self.hdp.size, scale_wrt_gas=False)


def build(config: TrainConfig, vocabulary: int, groups: Groups, device: torch.device) -> Engine:
    """Hand the model to DeepSpeed. Collective."""
    sharding, optimizer = config.layout.deepspeed, config.optimizer
    assert sharding is not None
    assert isinstance(optimizer, AdamWConfig), "refused with the configuration"
    tap = start_library(config, groups.hdp)
    import deepspeed

    model = Decoder(config.model, vocabulary)
    model.initialize(config.seed)
    model = model.to(device, getattr(torch, config.dtype))
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    adamw = _adamw(sharding, optimizer, [[parameters[name] for name in names] for names in groups_of(shapes)])
    num_parameters = sum(parameter.numel() for parameter in parameters.values())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=adamw,
        config=library_config(config, sharding, num_parameters),
        dist_init_required=False,
    )
    parts: Partitioned = Stage3(engine.optimizer) if sharding.stage == 3 else Stage12(engine.optimizer)
    ranks, stage = groups.hdp.size, sharding.stage
    own = [fragment for fragment in fragments(shapes, stage, ranks) if fragment.rank == groups.hdp.rank]
    part = Part(range(config.model.layers))
    memory = ActivationMemory(config.layout, Products(), device)
    built = BuiltModel(
        model, (part,), {0: part}, sets=[], held=[], tied=None, deferred=None, memory=memory, gathers_for_step=False
    )
    result = DeepSpeedEngine(
        built,
        EngineAdamW(engine, parts, parameters, own, optimizer, tap),
        DeepSpeedRunner(engine, model, groups.hdp, memory),
        shard_map(shapes, stage, ranks),
    )
    result.parts = parts
    return result


def _adamw(sharding: DeepSpeed, config: AdamWConfig, groups: list[list[nn.Parameter]]) -> torch.optim.Optimizer:
    """Over groups of parameters, of which matrices decay."""
    of_groups = [
        {"params": parameters, "weight_decay": config.weight_decay if parameters[0].dim() >= 2 else 0.0}
        for parameters in groups
    ]
    settings: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    if sharding.adam == "deepspeed":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        adamw: torch.optim.Optimizer = DeepSpeedCPUAdam(of_groups, adamw_mode=True, **settings)
        return adamw
    return torch.optim.AdamW(of_groups, fused=True, **settings)


def _nothing() -> LocalMicroBatch:
    """A micro-batch without tokens."""
    none = torch.empty(0, dtype=torch.int64)
    return LocalMicroBatch(MicroBatch(()), none, none, none, torch.empty(0))

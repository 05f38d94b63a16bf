"""Optimizers on flat buffers, their state sharded over the ranks that hold the same parameters (ZeRO-1, Rajbhandari et
al., arXiv 1910.02054).

The parameters of a set lie in one flat buffer, matrices first (they decay), vectors behind; every owner steps one equal
part of it, and publishes it. AdamW works element by element, so the number of ranks changes nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from evermesh.checkpoint.shard_map import ShardMap, TensorShards
from evermesh.runtime.flat import HeldSet
from evermesh.runtime.model.tied import TiedHead
from evermesh.runtime.optimizer_config import AdamWConfig, OptimizerConfig
from evermesh.runtime.parameter_set import ParameterSet

KINDS = ("parameter", "exp_avg", "exp_avg_sq")
"""What there is of every parameter in a checkpoint."""


class ShardedOptimizer(ABC):
    """The optimizer of one rank's part of the parameters. Every rank makes one and calls ``step`` together.

    Args:
        sets: the parameters and gradients of this rank's model, and the ranks they are divided among.
        config: rates and decay.
        tied: a copy of a parameter, or what is copied; None: there is none.
    """

    def __init__(self, sets: Sequence[ParameterSet], config: OptimizerConfig, tied: TiedHead | None = None) -> None:
        self.config, self.tied = config, tied
        self.shards = [OwnedShard(parameters) for parameters in sets]
        """What this rank steps of every set."""

    @abstractmethod
    def restore(self, steps: int) -> None:
        """Continue after ``steps`` updates with what the shards hold now."""

    @abstractmethod
    def update(self, lr: float, gradient_scale: float) -> None:
        """Update this rank's part with its gradients times ``gradient_scale``. Collective."""

    @torch.no_grad()
    def step(self, lr: float, gradient_scale: float) -> None:
        """Update this rank's part with its gradients times ``gradient_scale``, then publish it. Collective."""
        self.update(lr, gradient_scale)
        self.publish()

    def publish(self) -> None:
        """Let all ranks compute with the parameters that each of them holds of. Collective."""
        for shard in self.shards:
            shard.set.publish(shard.master)
        if self.tied is not None:
            self.tied.copy()

    def owned_state(self) -> dict[str, list[Tensor]]:
        """This rank's part of every tensor that must survive, by checkpoint name: its regions in the order of the map,
        as views of the live state."""
        return {name: tensors for shard in self.shards for name, tensors in shard.owned_state() if tensors}


class ShardedAdamW(ShardedOptimizer):
    """AdamW of one rank's part of the parameters; the arithmetic is torch's."""

    def __init__(self, sets: Sequence[ParameterSet], config: AdamWConfig, tied: TiedHead | None = None) -> None:
        super().__init__(sets, config, tied)
        self._parameters = [[nn.Parameter(shard.master[part]) for part in shard.parts] for shard in self.shards]
        self._adamw = torch.optim.AdamW(
            [
                {"params": [parameter], "weight_decay": config.weight_decay if decayed else 0.0}
                for parameters in self._parameters
                for parameter, decayed in zip(parameters, (True, False), strict=True)
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self.restore(steps=0)

    def restore(self, steps: int) -> None:
        """Continue after ``steps`` updates with what the shards hold now."""
        for shard, parameters in zip(self.shards, self._parameters, strict=True):
            for parameter, part in zip(parameters, shard.parts, strict=True):
                self._adamw.state[parameter] = {
                    "step": torch.tensor(float(steps), device=parameter.device),
                    "exp_avg": shard.exp_avg[part],
                    "exp_avg_sq": shard.exp_avg_sq[part],
                }

    def update(self, lr: float, gradient_scale: float) -> None:
        """Update this rank's part with its gradients times ``gradient_scale``."""
        for shard, parameters in zip(self.shards, self._parameters, strict=True):
            gradient = shard.gradient(gradient_scale)
            for parameter, part in zip(parameters, shard.parts, strict=True):
                parameter.grad = gradient[part]
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()


class OwnedShard:
    """What one rank owns of a set: master parameters and moments."""

    def __init__(self, parameters: ParameterSet) -> None:
        self.set = parameters
        flat, values = parameters.flat, parameters.owned_values
        self.master = values.to(state_dtype(values.dtype))
        """Of at least float32; the values themselves, where these are."""
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        decayed = min(max(flat.num_decayed - parameters.owned.start, 0), flat.shard_size)
        self.parts = (slice(0, decayed), slice(decayed, flat.shard_size))
        """What decays, and what does not."""

    def gradient(self, scale: float) -> Tensor:
        """The summed gradient times ``scale``, in the type of the master parameters."""
        return self.set.owned_gradient.to(self.master.dtype) * scale

    def owned_state(self) -> Iterator[tuple[str, list[Tensor]]]:
        """By checkpoint name."""
        flat, owners = self.set.flat, self.set.owners
        states = (self.master, self.exp_avg, self.exp_avg_sq)
        for part in flat.owned_parts(owners.rank):
            regions = part.entry.regions(self.set.sharers.number, part.start, part.stop)
            sizes = [region.num_elements for region in regions]
            for kind, state in zip(KINDS, states, strict=True):
                # a slot may be longer than what this rank holds
                yield f"{kind}.{part.entry.name}", list(state[part.local][: sum(sizes)].split(sizes)) if sizes else []


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of master parameters and moments: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def shard_map(sets: Sequence[HeldSet], dtype: torch.dtype) -> ShardMap:
    """Which rank holds which part of which tensor, given the sets of all stages; the same on every rank.

    ``dtype`` is that of the parameters. Makes no tensors.
    """
    name = str(state_dtype(dtype)).removeprefix("torch.")
    rules = {entry.name: (entry.cut.shape, rule) for held in sets for entry, rule in held.rules()}
    return ShardMap(
        tensors={
            f"{kind}.{parameter}": TensorShards(name, shape, rule)
            for kind in KINDS
            for parameter, (shape, rule) in rules.items()
        }
    )

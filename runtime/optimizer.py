"""AdamW on flat buffers, its state sharded over the HDP ranks (ZeRO-1, Rajbhandari et al., arXiv 1910.02054).

All parameters lie in one flat buffer, matrices first (they decay), vectors behind; every rank owns one equal part of it,
steps that part, and gathers the rest. AdamW works element by element, so the number of ranks changes nothing.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evermesh.checkpoint.shard_map import Interval, Shard, ShardMap, TensorShards
from evermesh.parallelism.collectives import Communicator
from evermesh.runtime.config import OptimizerConfig


class FlatEntry(NamedTuple):
    """Where one parameter lies in the flat buffer."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int


class FlatParameters:
    """The parameters and gradients of a model as views of two flat buffers, padded to a multiple of the ranks."""

    def __init__(self, model: nn.Module, ranks: int) -> None:
        named = sorted(model.named_parameters(), key=lambda item: item[1].dim() < 2)  # stable: matrices first
        self.entries: list[FlatEntry] = []
        position = 0
        for name, parameter in named:
            self.entries.append(FlatEntry(name, tuple(parameter.shape), position, position + parameter.numel()))
            position += parameter.numel()
        self.num_elements = position
        self.num_decayed = sum(parameter.numel() for _, parameter in named if parameter.dim() >= 2)
        self.shard_size = -(-position // ranks)
        like = named[0][1]
        self.values = torch.zeros(self.shard_size * ranks, dtype=like.dtype, device=like.device)
        self.gradients = torch.zeros_like(self.values)
        for entry, (_, parameter) in zip(self.entries, named, strict=True):
            view = self.values[entry.start : entry.stop].view(entry.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self.gradients[entry.start : entry.stop].view(entry.shape)

    def owned(self, rank: int) -> slice:
        """The part of the flat buffers that ``rank`` steps (for the last ranks it may reach into the padding)."""
        return slice(rank * self.shard_size, (rank + 1) * self.shard_size)

    def owned_intervals(self, rank: int) -> Iterator[tuple[FlatEntry, Interval, slice]]:
        """For every parameter that ``rank`` owns a part of: the entry, the part, and where it lies in the shard."""
        owned = self.owned(rank)
        for entry in self.entries:
            start, stop = max(entry.start, owned.start), min(entry.stop, owned.stop)
            if start < stop:
                local = slice(start - owned.start, stop - owned.start)
                yield entry, Interval(start=start - entry.start, stop=stop - entry.start), local


class ShardedAdamW:
    """AdamW of one rank's part of the parameters. Every rank makes one and calls ``step`` together."""

    def __init__(self, flat: FlatParameters, config: OptimizerConfig, communicator: Communicator) -> None:
        self.flat, self.config, self.communicator = flat, config, communicator
        owned = flat.owned(communicator.rank)
        state_dtype = torch.promote_types(flat.values.dtype, torch.float32)
        self.master = flat.values[owned].to(state_dtype, copy=True)
        self.exp_avg = torch.zeros_like(self.master)
        self.exp_avg_sq = torch.zeros_like(self.master)
        decayed = min(max(flat.num_decayed - owned.start, 0), flat.shard_size)
        self._adamw = torch.optim.AdamW(
            [
                {"params": [nn.Parameter(self.master[:decayed])], "weight_decay": config.weight_decay},
                {"params": [nn.Parameter(self.master[decayed:])], "weight_decay": 0.0},
            ],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )
        self._parts = (slice(0, decayed), slice(decayed, flat.shard_size))
        self.restore(steps=0)

    def restore(self, steps: int) -> None:
        """Continue after ``steps`` updates with what ``master``, ``exp_avg`` and ``exp_avg_sq`` hold now."""
        for group, part in zip(self._adamw.param_groups, self._parts, strict=True):
            self._adamw.state[group["params"][0]] = {
                "step": torch.tensor(float(steps), device=self.master.device),
                "exp_avg": self.exp_avg[part],
                "exp_avg_sq": self.exp_avg_sq[part],
            }

    @torch.no_grad()
    def step(self, lr: float, gradient_scale: float) -> None:
        """Update this rank's part with its gradients times ``gradient_scale``, then gather all parts. Collective."""
        gradient = self.flat.gradients[self.flat.owned(self.communicator.rank)].to(self.master.dtype) * gradient_scale
        for group, part in zip(self._adamw.param_groups, self._parts, strict=True):
            group["lr"] = lr
            group["params"][0].grad = gradient[part]
        self._adamw.step()
        self.gather()

    @torch.no_grad()
    def gather(self) -> None:
        """Copy every rank's part into the parameters of all. Collective."""
        part = self.master.to(self.flat.values.dtype)
        self.communicator.all_gather(self.flat.values, part, "parameters")

    def owned_state(self) -> dict[str, Tensor]:
        """This rank's part of every tensor that must survive, by checkpoint name; views of the live state."""
        states = {"parameter": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {
            f"{kind}.{entry.name}": state[local]
            for entry, _, local in self.flat.owned_intervals(self.communicator.rank)
            for kind, state in states.items()
        }

    def shard_map(self) -> ShardMap:
        """Which rank holds which part of which tensor; the same on every rank, without communication."""
        dtype = str(self.master.dtype).removeprefix("torch.")
        shards: dict[str, list[Shard]] = {}
        for rank in range(self.communicator.size):
            for entry, interval, _ in self.flat.owned_intervals(rank):
                shards.setdefault(entry.name, []).append(Shard(region=interval, ranks=(rank,)))
        return ShardMap(
            tensors={
                f"{kind}.{entry.name}": TensorShards(dtype=dtype, shape=entry.shape, shards=tuple(shards[entry.name]))
                for kind in ("parameter", "exp_avg", "exp_avg_sq")
                for entry in self.flat.entries
            }
        )


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of update ``step`` (from 1) of ``steps``: linear warm-up, then a cosine down to the final ratio."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)

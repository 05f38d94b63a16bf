"""AdamW on flat buffers, its state sharded over the HDP ranks (ZeRO-1, Rajbhandari et al., arXiv 1910.02054).

All parameters of a rank lie in one flat buffer, matrices first (they decay), vectors behind; every HDP rank owns one equal
part of it, steps that part, and gathers the rest. AdamW works element by element, so the number of ranks changes nothing.
"""

import math

import torch
from torch import Tensor, nn

from evermesh.checkpoint.shard_map import Shard, ShardMap, TensorShards
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.mesh import Mesh
from evermesh.runtime.config import OptimizerConfig
from evermesh.runtime.flat import FlatParameters, OwnedPart


class ShardedAdamW:
    """AdamW of one rank's part of the parameters. Every rank makes one and calls ``step`` together.

    Args:
        flat: the parameters and gradients of this rank's model.
        config: rates and decay.
        communicator: the HDP ranks that hold the same model as this one.
        tensor: the ranks that share one model with this one; None: nobody does.
    """

    def __init__(
        self,
        flat: FlatParameters,
        config: OptimizerConfig,
        communicator: Communicator,
        tensor: Communicator | None = None,
    ) -> None:
        self.flat, self.config, self.communicator = flat, config, communicator
        self.tensor = tensor or Communicator()
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

    def owned_state(self) -> dict[str, list[Tensor]]:
        """This rank's part of every tensor that must survive, by checkpoint name: its regions in the order of the map,
        as views of the live state."""
        states = {"parameter": self.master, "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        held: dict[str, list[Tensor]] = {}
        for part in self.flat.owned_parts(self.communicator.rank):
            regions = part.entry.regions(self.tensor.rank, part.start, part.stop)
            sizes = [region.num_elements for region in regions]
            for kind, state in states.items():
                # a slot may be longer than what this rank holds
                held[f"{kind}.{part.entry.name}"] = list(state[part.local][: sum(sizes)].split(sizes)) if sizes else []
        return {name: tensors for name, tensors in held.items() if tensors}

    def shard_map(self) -> ShardMap:
        """Which rank holds which part of which tensor; the same on every rank, without communication."""
        dtype = str(self.master.dtype).removeprefix("torch.")
        shards: dict[str, list[Shard]] = {entry.name: [] for entry in self.flat.entries}
        for hdp_rank in range(self.communicator.size):
            for part in self.flat.owned_parts(hdp_rank):
                shards[part.entry.name] += self._shards(part, hdp_rank)
        return ShardMap(
            tensors={
                f"{kind}.{entry.name}": TensorShards(dtype, entry.cut.shape, tuple(shards[entry.name]))
                for kind in ("parameter", "exp_avg", "exp_avg_sq")
                for entry in self.flat.entries
            }
        )

    def _shards(self, part: OwnedPart, hdp_rank: int) -> list[Shard]:
        """Who holds what of a part that an HDP rank owns: every tensor-parallel rank its own, or all of them the same."""
        row = tuple(Mesh(self.communicator.size, self.tensor.size).row(hdp_rank))
        holders = [row] if part.entry.cut.dim is None else [(rank,) for rank in row]
        return [
            Shard(region, ranks)
            for tp_rank, ranks in enumerate(holders)
            for region in part.entry.regions(tp_rank, part.start, part.stop)
        ]


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of update ``step`` (from 1) of ``steps``: linear warm-up, then a cosine down to the final ratio."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.final_lr_ratio + (1 - config.final_lr_ratio) * cosine)

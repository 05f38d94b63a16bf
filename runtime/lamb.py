"""LAMB on flat buffers: Adam's update of every layer, scaled to the norm of its weights (You et al., arXiv 1904.00962,
algorithm 2, with the identity as its function of the norm of the weights).

A layer is one parameter of the whole model, wherever its parts are; of a stack of experts every expert is one, because it
is trained by the tokens that chose it. So no norm depends on how many ranks share the experts, nor crosses stages.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from evermesh.parallelism.experts import GridCut
from evermesh.runtime.flat import FlatEntry
from evermesh.runtime.model.tied import TiedHead
from evermesh.runtime.optimizer import OwnedShard, ShardedAdamW, ShardedOptimizer
from evermesh.runtime.optimizer_config import LambConfig, OptimizerConfig
from evermesh.runtime.parameter_set import ParameterSet

CALL_SITE = "norms"


class ShardedLamb(ShardedOptimizer):
    """LAMB of one rank's part of the parameters. Its state is that of AdamW, and is kept under the same names."""

    config: LambConfig

    def __init__(self, sets: Sequence[ParameterSet], config: LambConfig, tied: TiedHead | None = None) -> None:
        super().__init__(sets, config, tied)
        self._layers = [LayerNorms(parameters) for parameters in sets]
        self.restore(steps=0)

    def restore(self, steps: int) -> None:
        """Continue after ``steps`` updates with what the shards hold now."""
        self._updates = steps

    def update(self, lr: float, gradient_scale: float) -> None:
        """Update this rank's part with its gradients times ``gradient_scale``. Collective."""
        self._updates += 1
        for shard, layers in zip(self.shards, self._layers, strict=True):
            update = self._adam_update(shard, shard.gradient(gradient_scale))
            ratios_L = layers.trust_ratios(shard.master, update).to(update.dtype)
            for layer, local, _ in layers.held:
                update[local] *= ratios_L[layer]
            shard.master.sub_(update, alpha=lr)

    def _adam_update(self, shard: OwnedShard, gradient: Tensor) -> Tensor:
        """What Adam subtracts from the parameters at a rate of 1, with the decay of the weights."""
        first, second = self.config.betas
        shard.exp_avg.lerp_(gradient, 1 - first)
        shard.exp_avg_sq.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        denominator = (shard.exp_avg_sq / (1 - second**self._updates)).sqrt_().add_(self.config.eps)
        update = (shard.exp_avg / (1 - first**self._updates)).div_(denominator)
        decayed, _ = shard.parts
        update[decayed] += self.config.weight_decay * shard.master[decayed]
        return update


def build_optimizer(
    sets: Sequence[ParameterSet], config: OptimizerConfig, tied: TiedHead | None = None
) -> ShardedOptimizer:
    """The optimizer that ``config`` chooses; arguments as for ``ShardedOptimizer``."""
    if isinstance(config, LambConfig):
        return ShardedLamb(sets, config, tied)
    return ShardedAdamW(sets, config, tied)


class HeldLayer(NamedTuple):
    """What a rank owns of a layer."""

    layer: int
    """Its number in the set."""
    local: slice
    """In the rank's own part of the flat buffers."""
    counts: bool
    """Whether this rank is the one that counts these elements."""


class LayerNorms:
    """The norms of the layers of a set, of which every rank owns some elements."""

    def __init__(self, parameters: ParameterSet) -> None:
        owners, sharers = parameters.owners, parameters.sharers
        self._owners = owners.all
        self._parts = sharers.all if sharers.parts is None else sharers.parts
        self.num_layers = sum(num_layers(entry, sharers.number) for entry in parameters.flat.entries)
        self._counts = owners.division.is_first_replica(owners.rank)
        self.held = list(_held(parameters, is_first=self._parts.rank == 0))

    def trust_ratios(self, weights: Tensor, update: Tensor) -> Tensor:
        """Norm of the weights over that of their update, of every layer, shape [L], float64; 1 where either is 0.

        ``weights`` and ``update`` are this rank's own part. Collective: two ``all_reduce`` of 2 L numbers.
        """
        squares_L2 = torch.zeros(self.num_layers, 2, dtype=torch.float64, device=weights.device)
        for layer, local, counts in self.held:
            if counts and self._counts:
                squares_L2[layer] += torch.stack([_square(weights[local]), _square(update[local])])
        self._owners.all_reduce(squares_L2, CALL_SITE)
        self._parts.all_reduce(
            squares_L2, CALL_SITE
        )  # last, as the gradients: the same bits for what these ranks share
        weights_L, updates_L = squares_L2.sqrt().unbind(1)
        return torch.where((weights_L > 0) & (updates_L > 0), weights_L / updates_L, 1.0)


def num_layers(entry: FlatEntry, sharer: int = 0) -> int:
    """How many layers a sharer holds (a part) of in one parameter: its experts, or one."""
    return entry.cut.local_shape(sharer)[0] if isinstance(entry.cut, GridCut) else 1


def _held(parameters: ParameterSet, *, is_first: bool) -> Iterator[HeldLayer]:
    """What this rank owns of every layer; ``is_first``: it counts what the ranks with parts of a layer hold alike."""
    flat, rank, sharer = parameters.flat, parameters.owners.rank, parameters.sharers.number
    owned = {part.entry.name: part for part in flat.owned_parts(rank)}
    first = 0
    for entry in flat.entries:
        layers = num_layers(entry, sharer)
        part = owned.get(entry.name)
        size = entry.cut.num_elements(sharer) // layers
        counts = is_first or entry.cut.dim is not None
        for layer in range(layers if part is not None else 0):
            assert part is not None
            start, stop = max(layer * size, part.start), min((layer + 1) * size, part.stop)
            if start < stop:
                offset = part.local.start - part.start
                yield HeldLayer(first + layer, slice(start + offset, stop + offset), counts)
        first += layers


def _square(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()

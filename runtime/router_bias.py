"""The biases that keep the experts of all layers evenly loaded, the same on every rank whatever layers it holds."""

from collections.abc import Iterable

import torch

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts.balance import CALL_SITE, moved_bias
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.runtime.config import BiasBalancing, ModelConfig
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.experts import mixtures_of


class RouterBiases:
    """Moves the bias of every router once per step, by the tokens of the whole batch that chose each expert.

    Source: DeepSeek-V3 (arXiv 2412.19437, section 2.1.2).
    """

    def __init__(self, model: Decoder, config: ModelConfig) -> None:
        self.model, self.moe = model, config.moe
        self.layers = [layer for layer in range(config.layers) if config.has_experts(layer)]
        experts = config.moe.experts if config.moe is not None else 0
        self._bias_LE = torch.zeros(len(self.layers), experts, dtype=torch.float64)

    @property
    def is_needed(self) -> bool:
        """Whether the model balances its experts this way."""
        return self.moe is not None and isinstance(self.moe.balancing, BiasBalancing)

    def loads(self, contexts: Iterable[TokenContext], world: Communicator, device: torch.device) -> torch.Tensor:
        """How many tokens of the batch chose each expert of each layer, [L, E]. Collective over all ranks."""
        rows = {layer: row for row, layer in enumerate(self.layers)}
        loads_LE = torch.zeros(self._bias_LE.shape, dtype=torch.int64, device=device)
        for context in contexts:
            for layer, load_E in context.loads.items():
                loads_LE[rows[layer]] += load_E
        world.all_reduce(loads_LE, CALL_SITE)
        return loads_LE.cpu()

    def move(self, loads_LE: torch.Tensor) -> None:
        """Towards the mean load of every layer; all ranks move alike."""
        assert self.moe is not None
        assert isinstance(self.moe.balancing, BiasBalancing)
        rate = self.moe.balancing.rate
        moved = [moved_bias(bias_E, load_E, rate) for bias_E, load_E in zip(self._bias_LE, loads_LE, strict=True)]
        self.state = [bias_E.tolist() for bias_E in moved]

    @property
    def state(self) -> list[list[float]]:
        """By layer with experts, by expert; setting it tells the routers of this rank."""
        return self._bias_LE.tolist()

    @state.setter
    def state(self, biases: list[list[float]]) -> None:
        self._bias_LE = torch.tensor(biases, dtype=torch.float64).view_as(self._bias_LE)
        rows = dict(zip(self.layers, self._bias_LE, strict=True))
        for mixture in mixtures_of(self.model):
            mixture.router.bias_E = rows[mixture.layer].to(mixture.router.bias_E.device)

"""What a run learns about the load of its experts, and does about it: biases of routers, and copies of hot experts."""

from collections.abc import Iterable

import torch

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts.balance import ExpertLoads, moved_bias
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.parallelism.experts.hot import HotExperts
from evermesh.parallelism.experts.placement import HotBudget, Placement, choose_hot
from evermesh.runtime.model.building import BuiltModel
from evermesh.runtime.model.config import BiasBalancing, ModelConfig
from evermesh.runtime.model.experts import mixtures_of
from evermesh.runtime.state import Progress

WINDOW = 5
"""Steps whose loads decide which experts are hot."""


class ExpertBalance:
    """Keeps the experts of all layers evenly loaded; the same on every rank, whatever layers it holds.

    Biases move once per step against the load of the whole batch (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). Copies of
    hot experts (Hecate, arXiv 2502.02581) live for a step, and never change the result.

    Args:
        built: this rank's model.
        config: of the whole model.
        ep: the ranks that share the experts.
        most_copies: copies that a rank may hold of the experts of one layer; 0: no expert is copied.
        progress: keeps the biases and the loads of recent steps.
    """

    def __init__(
        self, built: BuiltModel, config: ModelConfig, ep: Communicator, most_copies: int, progress: Progress
    ) -> None:
        self._built, self._mixtures = built, mixtures_of(built.model)
        self._moe, self._ep, self._progress = config.moe, ep, progress
        self._layers = [layer for layer in range(config.layers) if config.has_experts(layer)]
        self._most_copies = most_copies if ep.size > 1 else 0
        self._hot = HotExperts(built.model, ep)
        self.placements: dict[int, Placement] = {}
        """By layer: who holds which experts in the step under way, where any has copies."""
        if self._moves_bias and not progress.router_biases:
            progress.router_biases = [[0.0] * self._num_experts for _ in self._layers]

    @property
    def is_needed(self) -> bool:
        """Whether anything depends on how tokens choose."""
        return self._moves_bias or self._most_copies > 0

    def tell_routers(self) -> None:
        """Give the routers of this rank the biases of ``progress``; without any they stay zero.

        A run that moves no biases may have some: those of the weights it started from.
        """
        if self._progress.router_biases:
            biases = dict(zip(self._layers, self._progress.router_biases, strict=True))
            for mixture in self._mixtures:
                router = mixture.router
                router.bias_E = torch.tensor(biases[mixture.layer], dtype=torch.float64, device=router.bias_E.device)

    def begin_step(self) -> None:
        """Copy the experts that were hot in the last steps. Collective over the ranks that share them."""
        if self._most_copies and self._progress.expert_loads:
            rows = {layer: row for row, layer in enumerate(self._layers)}
            self.placements = {mixture.layer: self._placement(rows[mixture.layer]) for mixture in self._mixtures}
            by_name = dict(zip(self._hot.names, (mixture.layer for mixture in self._mixtures), strict=True))
            with self._built.gathered_experts(self._copied_layers):
                self._hot.begin_step({name: self.placements[layer] for name, layer in by_name.items()})

    def end_step(self) -> None:
        """Bring the gradients of copies home, before any other sum. Collective over the ranks that share the experts."""
        if self._most_copies:
            self._hot.end_step()
            self._built.reduce_experts(self._copied_layers)

    def learn(self, contexts: Iterable[TokenContext], world: Communicator, device: torch.device) -> None:
        """Take note of how the tokens of a committed step chose. Collective over all ranks, if ``is_needed``."""
        if not self.is_needed:
            return
        loads = ExpertLoads(self._layers, self._num_experts, device)
        for context in contexts:
            loads.add(context)
        loads_LE = loads.take(world)
        if self._most_copies:
            self._progress.expert_loads = [*self._progress.expert_loads, loads_LE.tolist()][-WINDOW:]
        if self._moe is not None and isinstance(self._moe.balancing, BiasBalancing):
            bias_LE = torch.tensor(self._progress.router_biases, dtype=torch.float64)
            pairs, rate = zip(bias_LE, loads_LE, strict=True), self._moe.balancing.rate
            self._progress.router_biases = [moved_bias(bias_E, load_E, rate).tolist() for bias_E, load_E in pairs]
            self.tell_routers()

    @property
    def _copied_layers(self) -> list[int]:
        return [layer for layer, placement in self.placements.items() if placement.copies]

    @property
    def _moves_bias(self) -> bool:
        return self._moe is not None and isinstance(self._moe.balancing, BiasBalancing)

    @property
    def _num_experts(self) -> int:
        return self._moe.experts if self._moe is not None else 0

    def _placement(self, row: int) -> Placement:
        """By the number of copies alone: they do not travel behind anything here."""
        budget = HotBudget(
            expert_bytes=1,
            memory_bytes=2 * self._most_copies,
            hidden_s=float(self._most_copies * (self._ep.size - 1)),
            bytes_per_s=1.0,
        )
        loads = [step[row] for step in self._progress.expert_loads]
        return choose_hot(loads, self._ep.size, self._ep.nodes, budget, WINDOW).placement

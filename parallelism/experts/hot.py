"""Copies of hot experts for the length of a step: weights go out to other ranks, gradients come home.

Sharding stays as it is: the owner of an expert holds its weights and its optimizer state, and steps it with the gradients of
all copies. So copies never change the result, only where tokens are computed.

Source: Hecate (FSSDP), arXiv 2502.02581, section 4: the sparse all-gather and reduce-scatter. Here copies live for a whole
step, over all its micro-batches, forward and backward, so the weights travel once.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts.apply import mixtures
from evermesh.parallelism.experts.dispatch import Dispatcher
from evermesh.parallelism.experts.placement import Placement
from evermesh.parallelism.gradients import gradient_of, keep_gradient

WEIGHTS, GRADIENTS = "expert copies", "expert copy gradients"
"""Call sites."""


@dataclass
class _Layer:
    dispatcher: Dispatcher
    experts: nn.Module
    placement: Placement
    copies: dict[str, Tensor] = field(default_factory=dict)
    """By parameter: a stack of the copies that this rank holds."""


class HotExperts:
    """Makes and ends copies for the mixtures of a model, after ``apply_expert_parallel``.

    Args:
        model: holds dispatchers with ``experts`` beside them.
        ep: the ranks that share the experts.
    """

    def __init__(self, model: nn.Module, ep: Communicator) -> None:
        self.ep = ep
        self._layers = {
            name: _Layer(dispatcher, experts, dispatcher.placement) for name, dispatcher, experts in mixtures(model)
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the mixtures, in the order of the model."""
        return tuple(self._layers)

    def begin_step(self, placements: Mapping[str, Placement]) -> None:
        """Copy weights as ``placements`` say, by mixture; from now on tokens go to the copies. Collective.

        Every rank passes the same. A mixture that is not named has none.
        """
        for name, placement in placements.items():
            layer = self._layers[name]
            layer.placement, layer.copies = placement, self._received(layer.experts, placement)
            layer.dispatcher.place(placement, layer.copies)

    def end_step(self) -> None:
        """Add the gradients of all copies to those of the owners, and forget the copies. Collective.

        The owner adds them in the order of ranks: the same placement gives the same bits.
        """
        for layer in self._layers.values():
            if layer.placement.copies:
                self._return_gradients(layer)
                layer.placement, layer.copies = Placement(layer.placement.experts, self.ep.size), {}
                layer.dispatcher.place(layer.placement)

    def _received(self, experts: nn.Module, placement: Placement) -> dict[str, Tensor]:
        """Stacks of the copies for this rank. Collective."""
        held = placement.held[self.ep.rank]
        own = placement.experts // placement.ranks
        parameters = {name: parameter.detach() for name, parameter in experts.named_parameters()}
        copies = {name: stack.new_empty(len(held) - own, *stack.shape[1:]) for name, stack in parameters.items()}
        sends, receives = [], []
        for expert, owner, holder in _trips(placement):
            for name, stack in parameters.items():
                if owner == self.ep.rank:
                    sends.append((stack[expert % own], holder))
                elif holder == self.ep.rank:
                    receives.append((copies[name][held.index(expert) - own], owner))
        self._exchange(sends, receives, WEIGHTS)
        for stack in copies.values():
            stack.requires_grad_()
            if (wide := torch.promote_types(stack.dtype, torch.float32)) != stack.dtype:
                keep_gradient(stack, torch.zeros_like(stack, dtype=wide))
        return copies

    @torch.no_grad()
    def _return_gradients(self, layer: _Layer) -> None:
        placement, held = layer.placement, layer.placement.held[self.ep.rank]
        own = placement.experts // placement.ranks
        sends, receives, sums = [], [], []
        for expert, owner, holder in _trips(placement):
            for name, parameter in layer.experts.named_parameters():
                if holder == self.ep.rank:
                    sends.append((gradient_of(layer.copies[name])[held.index(expert) - own], owner))
                elif owner == self.ep.rank:
                    target = gradient_of(parameter)[expert % own]
                    came = torch.empty_like(target)
                    receives.append((came, holder))
                    sums.append((target, came))
        self._exchange(sends, receives, GRADIENTS)
        for target, came in sums:
            target += came

    def _exchange(self, sends: list[tuple[Tensor, int]], receives: list[tuple[Tensor, int]], call_site: str) -> None:
        if sends or receives:
            for work in self.ep.exchange(sends, receives, call_site):
                work.wait()


def _trips(placement: Placement) -> Iterator[tuple[int, int, int]]:
    """(expert, owner, holder) of every copy, in the order in which all ranks send and receive."""
    for expert, holders in sorted(placement.copies.items()):
        for holder in holders:
            yield expert, placement.owner(expert), holder


__all__ = ["GRADIENTS", "WEIGHTS", "HotExperts"]

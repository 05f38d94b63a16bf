"""Finds hardware that computes wrongly without saying so: a block is computed a second time, and all bits are compared.

The backward pass of attention computed twice in place is LongCat-Flash's check (arXiv 2509.01322); here it is a whole block,
its forward and its backward pass, on every rank and for every micro-batch of a step. What communicates in a block
communicates again, right behind the block's backward pass on all the ranks that take part: nothing of theirs is in between,
so the order that was proven for the step holds. A fault that repeats itself bit for bit in the second computation is not
found.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from evermesh.parallelism.collectives import Moment
from evermesh.parallelism.pipeline.deferred import DeferredWeights
from evermesh.runtime.model.building import BuiltModel

_NOWHERE = torch.iinfo(torch.int64).max
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Probed(NamedTuple):
    """What a rank found in a step."""

    layer: int
    differing: int
    """Elements whose bits differ between the two computations."""
    compared: int
    place: int
    """Where they begin to differ, in the order of computation: 0 in the output, then in the gradients. A rank that gets
    wrong numbers from another begins behind it."""


@dataclass(slots=True)
class _Call:
    """One computation of the block: what went in, and what came out the first time."""

    inputs: tuple[Any, ...]
    output: Tensor | None = None
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Of parameters, of this micro-batch alone, as they were computed; those that are put off are not among them."""


class BlockProbe:
    """Computes one block of this rank's model twice while a step runs.

    Every rank makes one and probes the same steps. Parameters, their gradients, random numbers and whatever else training
    goes on from stay as they are; memory for the block's input, output and gradients is needed once more.

    Args:
        built: the model. Activations are kept or computed again, never moved to the host: a product of some of its tokens
            need not have the bits of the product of all.
        moment: is in the phase "probe" while a block is computed again.
    """

    def __init__(self, built: BuiltModel, moment: Moment) -> None:
        self._blocks, self._moment = built.model.blocks, moment
        self._deferred = built.deferred or DeferredWeights()
        self._block: nn.Module = nn.Identity()
        self._parameters: dict[str, nn.Parameter] = {}
        self._calls: list[_Call] = []
        self._current: _Call | None = None
        """That the backward pass is in."""
        self._forget()

    @contextmanager
    def watching(self, number: int) -> Iterator[None]:
        """Probe a block of the step that runs in this block; ``number`` chooses it, one after the other. Collective."""
        layers = list(self._blocks)
        layer = layers[number % len(layers)]
        self._layer, self._block = int(layer), self._blocks[layer]
        self._parameters = {n: p for n, p in self._block.named_parameters() if p.requires_grad}
        self._forget()
        hooks = [
            self._block.register_forward_pre_hook(self._before),  # behind, and before, those that gather parameters
            self._block.register_forward_hook(self._behind, prepend=True),
            *(parameter.register_hook(self._keep(name)) for name, parameter in self._parameters.items()),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._calls.clear()
            self._current = None

    def take(self) -> Probed:
        """What the last probe found on this rank. Waits for the device."""
        return Probed(self._layer, int(self._differing), self._compared, int(self._place))

    def _forget(self) -> None:
        like = next(self._blocks.parameters())
        self._differing, self._compared = torch.zeros((), dtype=torch.int64, device=like.device), 0
        self._place = torch.full_like(self._differing, _NOWHERE)

    def _before(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        if self._is_first_computation:
            self._calls.append(_Call(arguments))

    def _behind(self, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        if not self._is_first_computation:
            return
        call = self._calls.pop()
        x_TC = call.inputs[0]
        call.inputs, call.output = (x_TC.detach(), *call.inputs[1:]), output.detach()
        output.register_hook(lambda gradient: self._begin_backward(call, gradient))
        x_TC.register_hook(lambda gradient: self._end_backward(call, gradient))

    @property
    def _is_first_computation(self) -> bool:
        """Not that of an evaluation, nor that of a checkpoint within its backward pass."""
        return torch.is_grad_enabled() and self._current is None

    def _keep(self, name: str) -> Any:
        def keep(gradient: Tensor | None) -> None:  # none is there where it is put off
            if self._current is not None and gradient is not None:
                self._current.gradients[name] = gradient.detach().clone()  # it may become the place where they add up

        return keep

    def _begin_backward(self, call: _Call, gradient: Tensor) -> None:
        self._current, self._output_gradient = call, gradient.detach()

    def _end_backward(self, call: _Call, gradient: Tensor) -> None:
        """The first computation is complete: do it again."""
        assert self._current is call, "the backward passes of two micro-batches run one after the other"
        self._current = None
        before, self._moment.phase = self._moment.phase, "probe"
        try:
            with self._deferred.suspended(), torch.enable_grad():
                output, again = self._compute(call)
        finally:
            self._moment.phase = before
        assert call.output is not None
        pairs = [(call.output, output), *((first, again[name]) for name, first in call.gradients.items())]
        for place, (first, second) in enumerate([*pairs, (gradient, again["input"])]):
            self._compare(place, first, second)
        call.output = None

    def _compute(self, call: _Call) -> tuple[Tensor, dict[str, Tensor]]:
        """Output of the block, and the gradients of its input and its parameters; adds to none of theirs."""
        x_TC = call.inputs[0].requires_grad_()
        output = self._block.forward(x_TC, *call.inputs[1:])  # not the module's own hooks: those that gather, and ours
        of = {"input": x_TC} | self._parameters
        gradients = torch.autograd.grad(output, list(of.values()), self._output_gradient, allow_unused=True)
        found = zip(of, gradients, strict=True)
        return output.detach(), {name: gradient for name, gradient in found if gradient is not None}

    @torch.no_grad()
    def _compare(self, place: int, first: Tensor, second: Tensor) -> None:
        differing = (bits(first) != bits(second)).sum()
        self._differing += differing
        self._compared += first.numel()
        self._place = torch.where(differing > 0, self._place.clamp(max=place), self._place)


def bits(tensor: Tensor) -> Tensor:
    """The same bits as integers: equal exactly if they are, also for what is not a number and for zeros with a sign."""
    return tensor.detach().contiguous().view(_INTEGERS[tensor.element_size()])


__all__ = ["BlockProbe", "Probed", "bits"]

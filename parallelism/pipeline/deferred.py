"""Gradients of weights that are computed later than those of the input: what fills the bubbles of a pipeline.

Most of what the backward pass of a block can put off are the products that give the gradients of its linear layers. So the
backward pass runs as always, every node of the graph once, with all that communicates in it (rings, tensor-parallel
collectives, experts, and what recomputation repeats), and each linear layer leaves a note instead of its product: its input
and the gradient of its output. The rest of the graph is freed at once. (Qi et al., arXiv 2401.10241, section 2, split the
backward pass this way.)

torch's own helpers (``torch.distributed.pipelining._backward``) walk the graph a second time instead. That keeps the
whole graph until then; with recomputation it repeats every block, and its communication, a second time; and it gives
the first stage, which has no input, no first part at all.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evermesh.parallelism.gradients import gradient_of


class _Note(NamedTuple):
    """What the gradient of one weight [O, I] needs: the input [T, I] and the gradient of the output [T, O]."""

    weight: Tensor
    x_TI: Tensor
    grad_TO: Tensor


class DeferredWeights:
    """Where the linear layers of a model leave notes, while ``collecting``; outside it they do as they always do.

    One for each rank; its model runs one backward pass at a time.
    """

    def __init__(self) -> None:
        self._notes: list[_Note] | None = None

    def apply(self, model: nn.Module) -> None:
        """Let every ``nn.Linear`` in ``model`` use this; changes no parameter and no value that it computes."""
        for module in model.modules():
            if type(module) is nn.Linear:
                module.forward = _forward(module, self)  # type: ignore[method-assign]

    @contextmanager
    def collecting(self) -> Iterator[list[_Note]]:
        """Put off the gradients of weights in the backward passes of this block; pass the list to ``accumulate``."""
        assert self._notes is None, "a backward pass within another"
        notes: list[_Note] = []
        self._notes = notes
        try:
            yield notes
        finally:
            self._notes = None

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Put nothing off in the backward passes of this block, which may be within one that does."""
        notes, self._notes = self._notes, None
        try:
            yield
        finally:
            self._notes = notes

    def take_note(self, module: nn.Linear, x: Tensor, grad: Tensor) -> bool:
        """Put off the gradient of the module's weight; false if it is to be computed now."""
        if self._notes is None:
            return False
        self._notes.append(_Note(module.weight, x.flatten(0, -2), grad.flatten(0, -2)))
        return True


@torch.no_grad()
def accumulate(notes: list[_Note]) -> None:
    """Add the gradients that were put off to those of the parameters, in place, and forget the notes."""
    while notes:
        weight, x_TI, grad_TO = notes.pop()
        gradient = gradient_of(weight)
        if gradient.dtype == x_TI.dtype:
            gradient.addmm_(grad_TO.T, x_TI)
        else:
            gradient.add_(grad_TO.T @ x_TI)


def linear(
    x: Tensor, module: nn.Linear, deferred: DeferredWeights | None = None, known: Tensor | None = None
) -> Tensor:
    """The product of ``module`` without its bias, [T, O] of [T, I], differentiable; its gradient may be put off.

    ``known`` are its first rows, if somebody has kept them: only the others are computed.
    """
    return _Linear.apply(x, module.weight, module, deferred, known)


def _forward(module: nn.Linear, deferred: DeferredWeights) -> Any:
    def forward(x: Tensor) -> Tensor:
        y = linear(x, module, deferred)
        return y if module.bias is None else y + module.bias

    return forward


class _Linear(torch.autograd.Function):
    """y = x W^T, whose backward pass may put off the gradient of W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        module: nn.Linear,
        deferred: DeferredWeights | None,
        known: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        # the module holds the parameter itself; what is saved may come back as another tensor, under recomputation
        ctx.module, ctx.deferred = module, deferred
        if known is None:
            return F.linear(x, weight)
        return torch.cat([known, F.linear(x[known.shape[0] :], weight)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = None
        is_put_off = ctx.deferred is not None and ctx.deferred.take_note(ctx.module, x, grad)
        if ctx.needs_input_grad[1] and not is_put_off:
            grad_weight = grad.flatten(0, -2).T @ x.flatten(0, -2)
        return grad_x, grad_weight, None, None, None


__all__ = ["DeferredWeights", "accumulate", "linear"]

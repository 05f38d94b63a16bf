"""Gradients of a sharded model: what tensor-parallel ranks still have to sum, their norm, and its limit."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from evermesh.runtime.errors import UnsupportedModel
from evermesh.runtime.own_model.examining import first_few
from evermesh.runtime.own_model.tensor import TensorParallelModel
from evermesh.runtime.process_group import Groups

_ALIKE = 1e-2
"""Part of a norm by which ranks may differ that compute the same in another order, bfloat16 included."""


class Gradients:
    """The gradients of this rank's shards. Every rank makes one.

    Args:
        parameters: the shards, by name.
        tensor: which of them are cut over tensor-parallel ranks.
        groups: of all ranks.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], tensor: TensorParallelModel, groups: Groups) -> None:
        self.parameters, self.groups = parameters, groups
        self.partial = [parameters[name] for name in tensor.partial]
        self.whole = [name for name in parameters if name not in tensor.dims and name not in tensor.partial]
        """Parameters of which tensor-parallel ranks compute the same gradient."""
        self.counted = [p for name, p in parameters.items() if name in tensor.dims or groups.tp.rank == 0]
        """Parameters whose gradients this rank counts in the norm, so that each counts once."""
        self._summed: list[Tensor | None] = []
        self._is_checked = groups.tp.size == 1

    def begin_step(self) -> None:
        """Before a batch: what was summed before must not be summed again."""
        self._summed = [parameter.grad for parameter in self.partial]
        for parameter in self.partial:
            parameter.grad = None

    def end_step(self) -> None:
        """Behind a batch: sum what every tensor-parallel rank has of its own heads only. Collective over them.

        Raises:
            UnsupportedModel: ranks differ in a gradient that the model's plan says is the same; on every rank.
        """
        gradients = [local_gradient(parameter) for parameter in self.partial]
        found = [gradient for gradient in gradients if gradient is not None]
        if found:
            flat = torch.cat([gradient.flatten() for gradient in found])
            self.groups.tp.all_reduce(flat, "gradients")
            for gradient, total in zip(found, flat.split([gradient.numel() for gradient in found]), strict=True):
                gradient.copy_(total.view_as(gradient))
        for parameter, before in zip(self.partial, self._summed, strict=True):
            if before is not None:
                parameter.grad = before if parameter.grad is None else parameter.grad + before
        if not self._is_checked:
            self._check_alike()
            self._is_checked = True

    @torch.no_grad()
    def norm(self) -> Tensor:
        """The norm of all gradients of all ranks, a float64 scalar that is the same on every rank. Collective."""
        gradients = [gradient for parameter in self.counted if (gradient := local_gradient(parameter)) is not None]
        squares = [torch.linalg.vector_norm(gradient, dtype=torch.float64).square() for gradient in gradients]
        device = next(iter(self.parameters.values())).device
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=device)
        self.groups.world.all_reduce(total, "scalars")
        return total.sqrt()

    @torch.no_grad()
    def clip_(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most ``max_norm``, as torch's function of that name does.

        Returns the norm before. Collective.
        """
        norm = self.norm()
        scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in self.parameters.values():
            if (gradient := local_gradient(parameter)) is not None:
                gradient.mul_(scale.to(gradient.dtype))
        return norm

    @torch.no_grad()
    def _check_alike(self) -> None:
        """A plan that forgets a parameter, as of a norm of heads, would train on a part of its gradient."""
        gradients = [local_gradient(self.parameters[name]) for name in self.whole]
        zero = torch.zeros((), dtype=torch.float64, device=next(iter(self.parameters.values())).device)
        norms = torch.stack(
            [zero, *(zero if g is None else torch.linalg.vector_norm(g, dtype=torch.float64) for g in gradients)]
        )
        extremes = torch.cat([norms, -norms])
        self.groups.tp.all_reduce(extremes, "scalars", maximum=True)
        largest, smallest = extremes[: len(norms)], -extremes[len(norms) :]
        differs = (largest - smallest > _ALIKE * largest).to(torch.float64)
        self.groups.world.all_reduce(differs, "scalars", maximum=True)
        names = [name for name, found in zip(self.whole, differs[1:].tolist(), strict=True) if found]
        if names:
            raise UnsupportedModel(
                f"tensor-parallel ranks have different gradients of {first_few(names)}, "
                "which the model's plan does not say how to sum. Add them to it as 'replicated_with_grad_allreduce', or set "
                "layout.tp to 1."
            )


def local_gradient(parameter: Any) -> Tensor | None:
    """This rank's part of a gradient, as it lies in memory; None: there is none."""
    gradient = parameter.grad
    return None if gradient is None else gradient.to_local()

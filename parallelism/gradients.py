"""Where the gradient of a parameter adds up: in a precision that a sum over many micro-batches needs."""

import torch
from torch import Tensor


def gradient_of(parameter: Tensor) -> Tensor:
    """The tensor that a parameter's gradient adds up in, at least float32 where ``keep_gradient`` gave it one.

    Whoever adds something to a gradient beside the backward pass adds it here. Zeros, where nothing has been added yet.
    """
    kept: Tensor | None = getattr(parameter, "main_grad", None)
    if kept is not None:
        return kept
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def keep_gradient(parameter: Tensor, kept: Tensor) -> None:
    """Let the gradient of ``parameter`` add up in ``kept``, of its shape, over all backward passes to come.

    In the parameter's own type it is its ``grad``; otherwise every backward pass adds what it computed to it and forgets
    that.
    """
    parameter.main_grad = kept  # type: ignore[attr-defined]
    if kept.dtype == parameter.dtype:
        parameter.grad = kept
    else:
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(_add)


@torch.no_grad()
def _add(parameter: Tensor) -> None:
    if parameter.grad is not None:
        gradient_of(parameter).add_(parameter.grad)
        parameter.grad = None


__all__ = ["gradient_of", "keep_gradient"]

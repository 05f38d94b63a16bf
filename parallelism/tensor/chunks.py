"""Runs a module some tokens at a time, so that its matrix products hide the communication around it.

While one chunk is computed, the tokens of the next are on their way, and so is what the one before gave (MegaScale, arXiv
2402.15627, section 3.2; Wang et al., ASPLOS 2023, decompose the collective likewise). Backward it is the same the other
way round. Shape legend: T tokens on n ranks, t = T / n of them on each; C channels.

A collective has two nodes in the graph of autograd: one that begins it and one that waits for it, and in the backward pass
the second begins what the first waits for. The engine runs what is ready in the reverse of the order in which it was made,
so the order of the forward pass, mirrored, is that of the backward pass: the gradient of one chunk is gathered while
another is computed. It is the same on all ranks, because they make the same nodes. Being ordinary nodes, they know
nothing of recomputation, of gradients that are put off, or of parameters that are gathered.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.tensor.sharding import chunk_lengths
from evermesh.parallelism.tensor.tokens import BACKWARD, FORWARD


def run_in_chunks(module: Callable[[Tensor], Tensor], x_tC: Tensor, communicator: Communicator, chunks: int) -> Tensor:
    """This rank's tokens [t, C] of the sum over the ranks of ``module``, of which each rank computes a part for all tokens.

    Collective, forward and backward; all ranks hold the same number of tokens. ``module`` takes any number of tokens, in
    any order, and computes each by itself; it runs for at most ``chunks`` chunks (``chunk_lengths``). At most two chunks
    are on their way in each direction.
    """
    under_way: list[_Flight] = []

    def begin(x: Tensor, *, gathers: bool) -> tuple[Tensor, _Flight]:
        under_way.append(_Flight(communicator, gathers=gathers))
        return _Begin.apply(x, under_way[-1]), under_way[-1]

    parts = x_tC.split(chunk_lengths(x_tC.shape[0], chunks))
    own: list[Tensor] = []
    leaving: tuple[Tensor, _Flight] | None = None
    try:
        arriving = begin(parts[0], gathers=True)
        for number in range(len(parts)):
            here = arriving
            if number + 1 < len(parts):
                arriving = begin(parts[number + 1], gathers=True)
            left, leaving = leaving, begin(module(_End.apply(*here)), gathers=False)
            if (
                left is not None
            ):  # behind the next chunk: earlier it would not be hidden, later it would only hold memory
                own.append(_End.apply(*left))
        assert leaving is not None
        own.append(_End.apply(*leaving))
    finally:
        for flight in under_way:  # torch ends the repetition of a block in its midst, when nothing more is needed
            flight.wait()
    return torch.cat(own)


class _Flight:
    """A collective between its beginning and its end: one of the forward pass, then its adjoint of the backward pass."""

    def __init__(self, communicator: Communicator, *, gathers: bool) -> None:
        self.gathers, self._communicator = gathers, communicator
        self._work: Any = None
        self._kept: tuple[Tensor, Tensor] | None = None
        """The result and what it is made of; both stay until the end."""

    def begin(self, x: Tensor, call_site: str, *, gathers: bool) -> Tensor:
        """Begin to gather [t, C] to [T, C], or to sum and scatter the other way. Without tokens nothing is sent."""
        x, ranks = x.contiguous(), self._communicator.size
        num_tokens = x.shape[0] * ranks if gathers else x.shape[0] // ranks
        result = x.new_empty(num_tokens, *x.shape[1:])
        self._kept = result, x
        if result.numel():
            start = self._communicator.start_all_gather if gathers else self._communicator.start_reduce_scatter
            self._work = start(result, x, call_site)
        return result

    def wait(self) -> None:
        """Return when it is done, if it has begun."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def end(self) -> Tensor:
        """The result."""
        self.wait()
        assert self._kept is not None, "waits for what nobody began"
        (result, _), self._kept = self._kept, None
        return result


class _Begin(torch.autograd.Function):
    """Its output stands for its input, with its shape, and says only that the collective was begun."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.begin(x, FORWARD, gathers=flight.gathers)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.flight.end(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.end()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # nobody reads it before the node that began the forward collective has waited for it
        return ctx.flight.begin(grads[0], BACKWARD, gathers=not ctx.flight.gathers), None


__all__ = ["run_in_chunks"]

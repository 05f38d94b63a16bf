"""Runs half of a block twice: once forward, once for its backward pass, the second time without what the first one kept.

torch's checkpoint decides what is computed again and when it is enough. The *tape* of a half holds, in host memory, what
need not be: the output of attention with its log-sum-exp, and the products of linear layers for the first tokens.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from evermesh.parallelism.attention.micro_batch import MicroBatchAttention
from evermesh.parallelism.pipeline.deferred import DeferredWeights, linear
from evermesh.runtime.memory.host import HostCopy, HostMemory
from evermesh.runtime.memory.sizes import offloaded_tokens


class Tape:
    """What one half of a block left in host memory, in the order in which it was computed.

    Args:
        host: where it waits.
        fraction: of the tokens, whose products it holds.
        before: the tape of the half that ran before it, which the backward pass needs after it.
    """

    def __init__(self, host: HostMemory, fraction: float, before: "Tape | None") -> None:
        self.fraction = fraction
        self._host, self._before = host, before
        self._input: HostCopy | None = None
        self._copies: deque[HostCopy] = deque()
        self.is_played = False

    def put_input(self, x_TC: Tensor) -> HostCopy:
        """Move the input of the half to the host. It comes back by itself."""
        self._input = self._host.put(x_TC)
        return self._input

    def write(self, *tensors: Tensor) -> None:
        """Add ``tensors``."""
        self._copies.extend(map(self._host.put, tensors))

    def read(self) -> Tensor:
        """The next of them."""
        return self._copies.popleft().take()

    def play(self) -> None:
        """From now on it is read; what the backward pass needs next is fetched meanwhile."""
        self.is_played, self._input = True, None
        if self._before is not None:
            self._before.prefetch()
            self._before = None

    def prefetch(self) -> None:
        """Start to bring everything back."""
        for copy in (*([self._input] if self._input else []), *self._copies):
            copy.prefetch()


class Products:
    """The linear layers of a model whose products a tape may hold. One for each rank."""

    def __init__(self) -> None:
        self._tape: Tape | None = None

    def apply(self, model: nn.Module, patterns: Sequence[str], deferred: DeferredWeights | None) -> None:
        """Let the linear layers of these names use this; changes no parameter. After ``deferred`` has been applied."""
        for name, module in model.named_modules():
            if any(fnmatchcase(name, pattern) for pattern in patterns):
                assert isinstance(module, nn.Linear), name
                module.forward = self._forward(module, deferred)  # type: ignore[method-assign]

    @contextmanager
    def on(self, tape: Tape, *, play: bool) -> Iterator[None]:
        """Within the block products are written on ``tape``, or read from it."""
        before, self._tape = self._tape, tape
        if play:
            tape.play()
        try:
            yield
        finally:
            self._tape = before

    def attend(self, attention: MicroBatchAttention, tape: Tape) -> Any:
        """``attention`` that runs once: its result is written on ``tape``, and read from it."""

        def attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, /, *, window: int | None = None) -> Tensor:
            if tape.is_played:
                result = tape.read(), tape.read()
            else:
                with torch.no_grad():
                    result = attention.forward(q_THD, k_TKD, v_TKD, window)
                tape.write(*result)
            return attention.with_result(q_THD, k_TKD, v_TKD, result, window=window)

        return attend

    def _forward(self, module: nn.Linear, deferred: DeferredWeights | None) -> Any:
        plain = module.forward

        def forward(x_TI: Tensor) -> Tensor:
            tape = self._tape
            if tape is None:
                return plain(x_TI)
            y_TO = linear(x_TI, module, deferred, tape.read() if tape.is_played else None)
            if not tape.is_played:
                tape.write(y_TO[: offloaded_tokens(tape.fraction, y_TO.shape[0])])
            return y_TO if module.bias is None else y_TO + module.bias

        return forward


__all__ = ["Products", "Tape"]

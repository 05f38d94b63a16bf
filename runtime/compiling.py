"""Compiles what blocks do with tokens one by one, for few numbers of tokens, and counts what is compiled.

Norms, projections with their rotation, and feed-forwards are functions of a module and its tokens: each is compiled once for
every number of tokens and shared by all layers, whose parameters are its inputs. Attention, collectives and experts stay
as they are: they depend on the plan. Numbers of tokens come from buckets, to which micro-batches are padded; without
buckets every micro-batch would be compiled anew, or for sizes that may change, which is slower.
"""

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.collectives import Moment
from evermesh.parallelism.tensor import padded_length
from evermesh.runtime.errors import CannotCompile
from evermesh.runtime.model.blocks import Attention, FeedForward

_UNITS = 3
"""Functions that are compiled: norm, projections, feed-forward."""


class Compiled:
    """What one process has compiled."""

    def __init__(self) -> None:
        self.graphs = 0
        """Graphs compiled so far; those of a backward pass are compiled with their forward pass, and not counted."""
        self.seconds = 0.0
        self.token_counts: set[int] = set()
        """Numbers of tokens that they are for."""

    def apply(self, model: nn.Module, buckets: Sequence[int], moment: Moment) -> None:
        """Compile the blocks of ``model`` from now on, when they meet a bucket for the first time.

        ``moment`` is where the thread that trains stands; it is in the phase "compile" meanwhile.
        Changes no parameter. Without gradients, and without tokens, blocks run as they are.

        Raises:
            CannotCompile: there is no compiler for the device.
        """
        _check_compiler(next(model.parameters()).device)
        import torch._dynamo
        import torch._inductor.config

        # one graph for every bucket, norms of heads apart: torch's limit would silently end compiling
        limit = 8 + _UNITS * len(buckets)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
        torch._inductor.config.compile_threads = 1  # a pool of processes for every worker would outgrow the node
        functions: dict[type[nn.Module], tuple[Callable[..., Any], str]] = {
            Attention: (Attention.project, "project"),
            FeedForward: (FeedForward.forward, "forward"),
            nn.RMSNorm: (nn.RMSNorm.forward, "forward"),
        }
        compiled = {kind: self._compiled(function, moment) for kind, (function, _) in functions.items()}
        for name, module in model.named_modules():
            if type(module) in functions and _is_of_block(name):
                function, attribute = functions[type(module)]
                setattr(module, attribute, self._chosen(module, function, compiled[type(module)]))

    def _compiled(self, function: Callable[..., Any], moment: Moment) -> Callable[..., Any]:
        backend = functools.partial(self._compile, moment)
        return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)

    def _chosen(self, module: nn.Module, plain: Callable[..., Any], compiled: Callable[..., Any]) -> Any:
        counts = self.token_counts if isinstance(module, Attention) else set[int]()

        def forward(x_TC: Tensor, *others: Any) -> Any:
            if not torch.is_grad_enabled() or not x_TC.shape[0]:
                return plain(module, x_TC, *others)
            counts.add(x_TC.shape[0])
            return compiled(module, x_TC, *others)

        return forward

    def _compile(self, moment: Moment, graph: Any, inputs: Sequence[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        before, moment.phase = moment.phase, "compile"
        began_s = time.monotonic()
        try:
            return compile_fx(graph, inputs)
        finally:
            moment.phase = before
            self.graphs += 1
            self.seconds += time.monotonic() - began_s


def padding_of(plan: BatchPlan, tp: int, buckets: Sequence[int]) -> int:
    """Tokens that the micro-batches of a plan are padded with to fit ``buckets``, over all HDP ranks."""
    counts = [micro_batch.num_tokens for micro_batches in plan.ranks for micro_batch in micro_batches]
    return sum(padded_length(count, tp, buckets) - count for count in counts) if buckets else 0


def _is_of_block(name: str) -> bool:
    """Norms, attention and feed-forward; norms of heads are compiled with the projections."""
    *_, parent, own = ("", *name.split("."))
    return parent.isdigit() and (own in ("attention", "feed_forward") or own.endswith("_norm"))


@functools.cache
def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise CannotCompile(
                "train.compile needs Triton to compile for a GPU, and there is none. Install triton, or leave "
                "train.compile out."
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise CannotCompile(
            "train.compile needs a C++ compiler, and there is none (g++ or clang++ on PATH, or CXX). Install one, or leave "
            "train.compile out."
        ) from error

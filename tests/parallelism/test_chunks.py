"""A module that runs in chunks: what hides behind what, as the tap and the module saw it, and what it computes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evermesh.parallelism import Communicator
from evermesh.parallelism.tensor import chunk_lengths
from evermesh.parallelism.tensor.chunks import run_in_chunks
from evermesh.parallelism.tensor.tokens import gather_tokens, scatter_tokens
from tests.cluster import run_ranks
from tests.oracle import gradient

WIDTH = 3
Event = tuple[str, int]
"""What happens, and to which chunk."""


@given(num_tokens=st.integers(0, 200), chunks=st.integers(1, 12))
def test_chunks_cover_all_tokens_and_none_is_empty(num_tokens: int, chunks: int) -> None:
    lengths = chunk_lengths(num_tokens, chunks)
    assert sum(lengths) == num_tokens
    assert len(lengths) == max(1, min(chunks, num_tokens))
    assert max(lengths) - min(lengths) <= 1


class _Handle:
    def __init__(self, work: Any, events: list[Event], event: Event) -> None:
        self.work, self.events, self.event = work, events, event

    def wait(self) -> None:
        self.events.append(self.event)
        self.work.wait()


class _Watched(Communicator):
    """Tells when a collective begins and when somebody waits for it; the chunk is the first number that it sends."""

    def __init__(self, group: Any) -> None:
        super().__init__(group)
        self.events: list[Event] = []

    def start_all_gather(self, output: Tensor, tensor: Tensor, call_site: str) -> Any:
        return self._watched(super().start_all_gather(output, tensor, call_site), "gather", tensor)

    def start_reduce_scatter(self, output: Tensor, tensor: Tensor, call_site: str) -> Any:
        return self._watched(super().start_reduce_scatter(output, tensor, call_site), "scatter", tensor)

    def _watched(self, work: Any, operation: str, tensor: Tensor) -> _Handle:
        chunk = int(tensor[0, 0])
        self.events.append((f"{operation} begins", chunk))
        return _Handle(work, self.events, (f"waits for {operation}", chunk))


class _Compute(torch.autograd.Function):
    """Returns what it gets, tells when, and keeps its input, as a linear layer does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, events: list[Event]) -> Tensor:
        ctx.events = events
        events.append(("computes", int(x[0, 0])))
        ctx.save_for_backward(x)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        assert ctx.saved_tensors[0].shape == grads[0].shape
        ctx.events.append(("computes", int(grads[0][0, 0])))
        return grads[0].clone(), None


def _traced(rank: int, ranks: int, cases: list[tuple[int, bool]]) -> list[tuple[list[Event], list[Event]]]:
    """Events of the forward and of the backward pass of every number of chunks, with recomputation or without."""
    import torch.distributed as dist

    results = []
    for chunks, recompute in cases:
        communicator = _Watched(dist.group.WORLD)
        events = communicator.events
        numbers = torch.arange(chunks, dtype=torch.float64).repeat_interleave(2).unsqueeze(1).expand(-1, WIDTH)
        x = numbers.clone().requires_grad_()

        def run(x: Tensor, communicator: _Watched = communicator, chunks: int = chunks) -> Tensor:
            return run_in_chunks(lambda x: _Compute.apply(x, communicator.events), x, communicator, chunks)

        y = checkpoint(run, x, use_reentrant=False) if recompute else run(x)
        forward = events.copy()
        events.clear()
        y.backward(numbers)
        assert torch.equal(y, ranks * numbers)  # every rank computes the same for all tokens
        assert torch.equal(gradient(x), ranks * numbers)
        results.append((forward, events))
    return results


THREE_CHUNKS = [
    ("gather begins", 0),
    ("gather begins", 1),
    ("waits for gather", 0),
    ("computes", 0),
    ("scatter begins", 0),
    ("gather begins", 2),
    ("waits for gather", 1),
    ("computes", 1),
    ("scatter begins", 1),
    ("waits for scatter", 0),
    ("waits for gather", 2),
    ("computes", 2),
    ("scatter begins", 2),
    ("waits for scatter", 1),
    ("waits for scatter", 2),
]


def _mirrored(events: list[Event], chunks: int) -> list[Event]:
    return [(what, chunks - 1 - chunk) for what, chunk in events]


@pytest.fixture(scope="module")
def traces() -> dict[tuple[int, bool], tuple[list[Event], list[Event]]]:
    cases = [(chunks, recompute) for chunks in (1, 2, 3, 5) for recompute in (False, True)]
    results = run_ranks(2, _traced, cases)
    assert results[0] == results[1], "ranks would wait for each other"
    return dict(zip(cases, results[0], strict=True))


def test_three_chunks_hide_their_communication_behind_each_other(traces: Any) -> None:
    forward, backward = traces[3, False]
    assert forward == THREE_CHUNKS
    assert backward == _mirrored(THREE_CHUNKS, 3)


@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_what_a_chunk_needs_is_on_its_way_while_another_is_computed(traces: Any, chunks: int) -> None:
    forward, backward = traces[chunks, False]
    for events in (forward, _mirrored(backward, chunks)):
        assert len(events) == len(set(events)) == 5 * chunks
        at = {event: index for index, event in enumerate(events)}
        for chunk in range(chunks - 1):
            assert at["gather begins", chunk + 1] < at["computes", chunk] < at["waits for gather", chunk + 1]
            assert at["scatter begins", chunk] < at["computes", chunk + 1] < at["waits for scatter", chunk]
        for chunk in range(chunks - 2):  # no more than two on their way, so memory does not grow with the chunks
            assert at["waits for gather", chunk] < at["gather begins", chunk + 2]
            assert at["waits for scatter", chunk] < at["scatter begins", chunk + 2]


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
def test_recomputation_hides_it_too_and_leaves_nothing_under_way(traces: Any, chunks: int) -> None:
    """It starts when the first chunk of the backward pass is about to compute, and stops in its own last chunk."""
    forward, backward = traces[chunks, True]
    assert forward == traces[chunks, False][0]
    stop = forward.index(("computes", chunks - 1)) + 1
    repeated = forward[:stop] + [("waits for scatter", chunks - 2)] * (chunks > 1)
    begin = traces[chunks, False][1].index(("computes", chunks - 1))
    assert backward == traces[chunks, False][1][:begin] + repeated + traces[chunks, False][1][begin:]


def _values(rank: int, ranks: int, tokens: int, chunks: int) -> list[tuple[Tensor, ...]]:
    """Output and gradients: in chunks, and with all tokens gathered at once."""
    import torch.distributed as dist

    communicator = Communicator(dist.group.WORLD)
    results: list[tuple[Tensor, ...]] = []
    weight = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    own = torch.randn(tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(10 + rank))
    for in_chunks in (True, False):
        x, w = own.clone().requires_grad_(), weight.clone().requires_grad_()

        def module(x: Tensor, w: Tensor = w) -> Tensor:
            return (x @ w).tanh()

        if in_chunks:
            y = run_in_chunks(module, x, communicator, chunks)
        else:
            y = scatter_tokens(module(gather_tokens(x, communicator)), communicator)
        (y * own.cos()).sum().backward()
        results.append((y.detach(), gradient(x), gradient(w)))
    return results


@pytest.mark.parametrize(("ranks", "tokens", "chunks"), [(2, 7, 3), (2, 0, 3), (3, 2, 4)])
def test_chunks_change_no_value(ranks: int, tokens: int, chunks: int) -> None:
    for in_chunks, at_once in run_ranks(ranks, _values, tokens, chunks):
        for ours, expected in zip(in_chunks, at_once, strict=True):
            assert torch.allclose(ours, expected, rtol=1e-13, atol=1e-15)

"""Sliding windows against attention with a mask written out."""

import itertools

import pytest
import torch
from torch import Tensor

from evermesh.parallelism import Communicator, ring_attention
from evermesh.parallelism.attention import kernels
from evermesh.parallelism.attention.kernels import AttentionKernel, CpuFlash, CudaEfficient, CudaFlash, Forward
from evermesh.parallelism.attention.ring import Ring, ring_forward
from evermesh.parallelism.attention.window import Band, Range, band_blocks
from evermesh.parallelism.errors import UnsupportedKernel
from evermesh.parallelism.pieces import share_of
from tests.cluster import run_ranks
from tests.oracle import gradient, plain_attention

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def _document(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, grad = (torch.randn(length, h, HEAD_DIM, dtype=torch.float64, generator=generator) for h in heads)
    return q, k, v, grad


def _expected(length: int, window: int) -> list[Tensor]:
    q, k, v, grad = _document(length)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = plain_attention(*leaves, window=window)
    out.backward(grad)
    return [out.detach(), *map(gradient, leaves)]


def _error(actual: Tensor, expected: Tensor) -> float:
    """Relative, but where nothing is expected: a token that sees only itself has no gradients of query and key."""
    return ((actual - expected).norm() / expected.norm().clamp_min(1.0)).item()


def _seen(queries: list[Range], keys: list[Range], window: int) -> Tensor:
    """How often each pair of tokens is in a block and its band."""
    times = torch.zeros(sum(b - a for a, b in queries), sum(b - a for a, b in keys), dtype=torch.int64)
    for block in band_blocks(queries, keys, window):
        part = times[block.queries, block.keys]
        assert min(block.band) >= 0
        rows, columns = part.shape
        from_diagonal = torch.arange(columns) - (torch.arange(rows).unsqueeze(1) + columns - rows)
        visible = (from_diagonal >= -block.band.before) & (from_diagonal <= block.band.after)
        assert visible.any(1).all(), "a query that sees nothing"
        assert visible.any(0).all(), "a key that nobody sees"
        part += visible
    return times


def test_bands_hold_every_pair_within_the_window_once_and_no_other() -> None:
    length, checked = 13, 0
    for ring_size, window in itertools.product((1, 2, 3, 4), (1, 2, 3, 7, 12, 13, 40)):
        for member, owner in itertools.product(range(ring_size), repeat=2):
            queries, keys = (list(share_of(length, ring_size, index)) for index in (member, owner))
            at_Q, at_K = (
                torch.tensor([i for a, b in ranges for i in range(a, b)], dtype=torch.int64)
                for ranges in (queries, keys)
            )
            expected = (at_K <= at_Q.unsqueeze(1)) & (at_K > at_Q.unsqueeze(1) - window)
            assert torch.equal(_seen(queries, keys, window), expected.long())
            checked += int(expected.any())
    assert checked > 100


@pytest.mark.parametrize("window", [1, 5, 33, 100])
def test_packed_documents_equal_a_mask_written_out(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_BAND_QUERIES", 16)  # several masks per document
    lengths = [1, 70, 33, 7]
    parts = [_document(length) for length in lengths]
    q, k, v, grad = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    kernel = CpuFlash()
    out, lse = kernel.forward_packed(q, k, v, lengths, window)
    actual = [out, *kernel.backward_packed(grad, Forward(q, k, v, out, lse), lengths, window)]
    documents = [_expected(length, window) for length in lengths]
    for tensor, expected in zip(actual, (torch.cat(each) for each in zip(*documents, strict=True)), strict=True):
        assert _error(tensor, expected) <= 1e-13


def _ring_member(rank: int, world_size: int, cases: list[tuple[int, int]]) -> list[list[Tensor]]:
    import torch.distributed as dist

    results = []
    for length, window in cases:
        share = share_of(length, world_size, rank)
        rows = [row for start, stop in share.ranges() for row in range(start, stop)]
        q, k, v, grad = (tensor[rows] for tensor in _document(length))
        leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
        communicator = Communicator(dist.group.WORLD)
        out = ring_attention(
            *leaves, length=length, members=range(world_size), communicator=communicator, window=window
        )
        out.backward(grad)
        results.append([torch.tensor(rows, dtype=torch.int64), out.detach(), *map(gradient, leaves)])
    return results


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_rings_equal_a_mask_written_out(world_size: int) -> None:
    cases = [(length, window) for length in (5, 61, 96) for window in (1, 2, 9, 30, 95)]
    results = run_ranks(world_size, _ring_member, cases)
    for case, (length, window) in enumerate(cases):
        expected = _expected(length, window)
        actual = [torch.zeros_like(tensor) for tensor in expected]
        for rows, *tensors in (of_rank[case] for of_rank in results):
            for whole, part in zip(actual, tensors, strict=True):
                whole[rows] = part
        errors = [_error(a, e) for a, e in zip(actual, expected, strict=True)]
        assert max(errors) <= 1e-12, (length, window, errors)


class _CountingKernel(CpuFlash):
    """Counts the scores that are computed."""

    scores = 0

    def _forward(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, causal: bool = False, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.scores += q_THD.shape[0] * k_TKD.shape[0]
        return super()._forward(q_THD, k_TKD, v_TKD, causal=causal, mask=mask)


def _counted(rank: int, world_size: int, length: int, window: int) -> int:
    import torch.distributed as dist

    kernel, ring = _CountingKernel(), Ring(tuple(range(world_size)), length, rank, window)
    q, k, v = (torch.randn(ring.share(rank).num_tokens, h, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    ring_forward(q, k, v, ring, kernel, Communicator(dist.group.WORLD))
    return kernel.scores


def test_blocks_outside_the_window_are_not_computed() -> None:
    length, ranks, window = 4096, 4, 16
    scores = run_ranks(ranks, _counted, length, window)
    # a mask covers 256 queries and the keys they see; chunks of 512 tokens have 15 keys in the chunk before them
    per_rank = 2 * (256 * 256 + 256 * 271) + 2 * 15 * 15
    assert max(scores) <= per_rank
    assert sum(scores) < length * length / 15  # without a window half of all pairs, and more in whole blocks


@pytest.mark.parametrize("after", [0, 3])
def test_flash_on_cuda_is_called_with_a_window_that_torch_takes(after: int) -> None:
    """The meta device checks signatures and shapes, and computes nothing."""
    q, grad = (torch.empty(40, HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta") for _ in range(2))
    k, v = (torch.empty(24, KV_HEADS, HEAD_DIM, dtype=torch.bfloat16, device="meta") for _ in range(2))
    kernel, band = CudaFlash(), Band(20, after)
    out, lse = kernel.forward_band(q, k, v, band)
    assert (out.shape, lse.shape) == (q.shape, (HEADS, 40))
    gradients = kernel.backward_band(grad, Forward(q, k, v, out, lse), band)
    assert [tensor.shape for tensor in gradients] == [q.shape, k.shape, v.shape]


def test_float32_on_cuda_has_no_window_and_says_what_to_set() -> None:
    kernel: AttentionKernel = CudaEfficient()
    q, k, v, _ = _document(9)
    with pytest.raises(UnsupportedKernel, match=r"Set train\.dtype to bfloat16"):
        kernel.forward_packed(q, k, v, [9], 4)

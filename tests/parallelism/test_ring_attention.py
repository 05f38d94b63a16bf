"""Ring attention against attention written out in one process."""

import pytest
import torch
from torch import Tensor

from evermesh.parallelism import ByteLedger, Communicator, ring_attention
from evermesh.parallelism.attention.kernels import CpuFlash
from evermesh.parallelism.attention.ring import Ring, ring_forward
from evermesh.parallelism.pieces import share_of
from tests.benchmarks.parallelism.bench_ring_memory import measure
from tests.cluster import run_ranks
from tests.oracle import gradient, plain_attention, relative_error

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8


def _document(length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    q, k, v, grad = (torch.randn(length, h, HEAD_DIM, dtype=torch.float64, generator=generator) for h in heads)
    return q.to(dtype), k.to(dtype), v.to(dtype), grad.to(dtype)


def _ring_member(rank: int, world_size: int, length: int, members: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    import torch.distributed as dist

    if rank not in members:
        return []
    rows = [
        row
        for start, stop in share_of(length, len(members), members.index(rank)).ranges()
        for row in range(start, stop)
    ]
    q, k, v, grad = (tensor[rows] for tensor in _document(length, dtype))
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    out = ring_attention(*leaves, length=length, members=members, communicator=Communicator(dist.group.WORLD))
    out.backward(grad)
    return [torch.tensor(rows, dtype=torch.int64), out.detach(), *map(gradient, leaves)]


def _errors(length: int, members: tuple[int, ...], world_size: int, dtype: torch.dtype) -> list[float]:
    results = run_ranks(world_size, _ring_member, length, members, dtype)
    q, k, v, grad = _document(length, torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    expected_out = plain_attention(*leaves)
    expected_out.backward(grad)
    expected = [expected_out.detach(), *map(gradient, leaves)]
    actual = [torch.zeros_like(tensor) for tensor in expected]
    for rows, *tensors in (results[member] for member in members):
        for whole, part in zip(actual, tensors, strict=True):
            whole[rows] = part.to(torch.float64)
    return [relative_error(a, e) for a, e in zip(actual, expected, strict=True)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
def test_outputs_and_gradients_equal_plain_attention_in_float64(world_size: int) -> None:
    for length in (world_size * 2, 61, 128):
        errors = _errors(length, tuple(range(world_size)), world_size, torch.float64)
        assert max(errors) <= 1e-12, (length, errors)


def test_outputs_and_gradients_equal_plain_attention_in_float32() -> None:
    assert max(_errors(301, (0, 1, 2), 3, torch.float32)) <= 1e-5


def test_ring_of_some_ranks_in_any_order() -> None:
    assert max(_errors(97, (3, 0, 2), 4, torch.float64)) <= 1e-12


@pytest.mark.parametrize("length", [1, 2, 3, 5, 7])
def test_members_without_head_tail_or_any_token(length: int) -> None:
    assert max(_errors(length, (0, 1, 2, 3), 4, torch.float64)) <= 1e-12


def _counted(rank: int, world_size: int, length: int) -> dict[str, int]:
    import torch.distributed as dist

    communicator, ledger = Communicator(dist.group.WORLD), ByteLedger()
    tokens = share_of(length, world_size, rank).num_tokens
    q, k, v = (torch.randn(tokens, h, HEAD_DIM, requires_grad=True) for h in (HEADS, KV_HEADS, KV_HEADS))
    with communicator.listen(ledger):
        ring_attention(q, k, v, length=length, members=range(world_size), communicator=communicator).sum().backward()
    return ledger.take()


def test_forward_sends_three_quarters_of_the_keys_and_values() -> None:
    world_size, length = 4, 800
    ledgers = run_ranks(world_size, _counted, length)
    kv_bytes = length * 2 * KV_HEADS * HEAD_DIM * 4
    full_ring = (world_size - 1) * kv_bytes
    # the block of member j goes whole to its j predecessors and without its tail (half of it) to the rest
    expected = full_ring * 3 // 4
    assert sum(ledger["ring forward"] for ledger in ledgers) == expected
    assert sum(ledger["ring backward"] for ledger in ledgers) == expected


class _NotedKernel(CpuFlash):
    """Notes in a shared list when a block is computed."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        self.notes.append("compute")
        return super().forward(q_THD, k_TKD, v_TKD, causal=causal)


def _order_of_work(rank: int, world_size: int) -> list[str]:
    import torch.distributed as dist

    notes: list[str] = []
    communicator, length = Communicator(dist.group.WORLD), 96
    ring = Ring(tuple(range(world_size)), length, rank)
    q, k, v = (torch.randn(ring.share(rank).num_tokens, h, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
    with communicator.listen(lambda record: notes.append(record.operation)):
        ring_forward(q, k, v, ring, _NotedKernel(notes), communicator)
    return notes


def test_the_next_block_is_on_its_way_before_the_current_one_is_computed() -> None:
    for notes in run_ranks(3, _order_of_work):
        step = ["receive", "send", "compute"]
        assert notes == [*step, *step, "compute"]


def test_no_rank_ever_holds_the_scores_of_its_queries() -> None:
    length, ranks = 16_384, 4
    peaks = run_ranks(ranks, measure, length)
    scores = 2 * (length // ranks) * length * 4  # two heads
    assert max(peaks) < scores / 8

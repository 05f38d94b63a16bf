"""Memory of a document of 64K tokens on 4 ranks: what ring attention adds to its inputs, against the score matrix."""

import torch

from evermesh.parallelism import Communicator, ring_attention
from evermesh.parallelism.pieces import share_of
from tests.benchmarks.harness import Row, exact_row
from tests.cluster import peak_memory, run_ranks

RANKS, LENGTH, HEADS, KV_HEADS, HEAD_DIM = 4, 65_536, 2, 1, 32


def run() -> list[Row]:
    """Bytes that forward and backward of one attention layer need on the busiest rank."""
    peaks = run_ranks(RANKS, measure, LENGTH, timeout_s=900)
    own_tokens = LENGTH // RANKS
    inputs = own_tokens * HEAD_DIM * 4 * (HEADS + 2 * KV_HEADS)
    scores = HEADS * own_tokens * LENGTH * 4
    return [
        exact_row(
            "peak of forward and backward, busiest rank",
            max(peaks),
            "bytes",
            peer="scores of its queries (computed, not run)",
            peer_value=scores,
        ),
        exact_row("q, k and v of one rank", inputs, "bytes"),
    ]


def measure(rank: int, world_size: int, length: int) -> int:
    """Peak bytes of one forward and backward over those in use before, on this rank."""
    import torch.distributed as dist

    communicator = Communicator(dist.group.WORLD)
    _attend(64, rank, world_size, communicator)
    with peak_memory() as peak:
        _attend(length, rank, world_size, communicator)
    return peak.num_bytes


def _attend(length: int, rank: int, world_size: int, communicator: Communicator) -> None:
    tokens = share_of(length, world_size, rank).num_tokens
    q, k, v = (torch.randn(tokens, heads, HEAD_DIM, requires_grad=True) for heads in (HEADS, KV_HEADS, KV_HEADS))
    out = ring_attention(q, k, v, length=length, members=range(world_size), communicator=communicator)
    out.backward(torch.ones_like(out))

"""What only a GPU can show: fused blocks, NCCL, streams, and the memory of a rank of a large layout."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from evermesh.parallelism import Communicator, Layout, MicroBatch, Piece
from evermesh.parallelism.attention.kernels import AttentionKernel, CudaEfficient, CudaFlash, Forward, kernel_for
from evermesh.parallelism.attention.micro_batch import MicroBatchAttention
from evermesh.parallelism.attention.ring import Ring, ring_backward, ring_forward
from evermesh.parallelism.attention.window import band_blocks
from evermesh.parallelism.errors import UnsupportedKernel
from evermesh.runtime import process_group
from evermesh.runtime.config import CudaDevice
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.optimizer import ShardedAdamW
from evermesh.runtime.optimizer_config import AdamWConfig
from evermesh.runtime.parameter_set import ParameterSet
from tests.oracle import gradient, plain_attention, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run `make gpu` on a machine with one"),
]
HEADS, KV_HEADS, HEAD_DIM = 8, 2, 64


@pytest.fixture
def nccl() -> Iterator[Communicator]:
    """A group of one rank on NCCL, initialised as the trainer does."""
    with tempfile.TemporaryDirectory() as folder:
        process_group.start(CudaDevice(), 0, 1, dist.FileStore(str(Path(folder) / "rendezvous"), 1), timeout_s=60)
        yield process_group.communicators(60, Layout()).hdp
        process_group.stop()


def _document(length: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(length)
    heads = (HEADS, KV_HEADS, KV_HEADS, HEADS)
    return [torch.randn(length, h, HEAD_DIM, device="cuda", dtype=dtype) for h in heads]


def _expected(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor, *, window: int | None = None
) -> list[torch.Tensor]:
    leaves = [x.double().cpu().requires_grad_() for x in (q, k, v)]
    out = plain_attention(*leaves, window=window)
    out.backward(grad.double().cpu())
    return [out.detach(), *map(gradient, leaves)]


@pytest.mark.parametrize(
    ("kernel", "dtype", "tolerance"),
    [(CudaFlash(), torch.bfloat16, 1.5e-2), (CudaFlash(), torch.float16, 3e-3), (CudaEfficient(), torch.float32, 1e-3)],
)
@pytest.mark.parametrize("lengths", [[257], [1, 130, 64, 7]])
def test_packed_documents_equal_plain_attention(
    kernel: AttentionKernel, dtype: torch.dtype, tolerance: float, lengths: list[int]
) -> None:
    q, k, v, grad = _document(sum(lengths), dtype)
    out, lse = kernel.forward_packed(q, k, v, lengths)
    actual = [out, *kernel.backward_packed(grad, Forward(q, k, v, out, lse), lengths)]
    parts = [
        _expected(*(x[start : start + length] for x in (q, k, v, grad)))
        for start, length in zip((sum(lengths[:i]) for i in range(len(lengths))), lengths, strict=True)
    ]
    for index, tensor in enumerate(actual):
        assert relative_error(tensor.double().cpu(), torch.cat([part[index] for part in parts])) <= tolerance


@pytest.mark.parametrize("window", [1, 17, 64])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 3e-3)])
def test_windows_of_packed_documents_equal_a_mask_written_out(
    window: int, dtype: torch.dtype, tolerance: float
) -> None:
    lengths = [1, 130, 64, 7]
    q, k, v, grad = _document(sum(lengths), dtype)
    kernel = CudaFlash()
    out, lse = kernel.forward_packed(q, k, v, lengths, window)
    actual = [out, *kernel.backward_packed(grad, Forward(q, k, v, out, lse), lengths, window)]
    parts = [
        _expected(*(x[start : start + length] for x in (q, k, v, grad)), window=window)
        for start, length in zip((sum(lengths[:i]) for i in range(len(lengths))), lengths, strict=True)
    ]
    for index, tensor in enumerate(actual):
        expected = torch.cat([part[index] for part in parts])
        error = (tensor.double().cpu() - expected).norm() / expected.norm().clamp_min(1.0)
        assert error <= tolerance


def test_bands_of_a_ring_with_a_window_joined_by_hand_equal_a_mask_written_out() -> None:
    """The bands of two chunks of a document, computed one after the other by the kernel that a ring uses."""
    length, window, cut = 301, 70, 120
    q, k, v, grad = _document(length, torch.bfloat16)
    expected, kernel = _expected(q, k, v, grad, window=window), CudaFlash()
    chunks = [(0, cut), (cut, length)]
    out = torch.zeros(q.shape, device="cuda")
    lse = torch.full((HEADS, length), float("-inf"), device="cuda")
    for keys in chunks:
        for block in band_blocks([(0, length)], [keys], window):
            at = slice(block.keys.start + keys[0], block.keys.stop + keys[0])
            part, part_lse = kernel.forward_band(q[block.queries], k[at], v[at], block.band)
            joined = torch.logaddexp(lse[:, block.queries], part_lse)
            old, new = (torch.exp(x - joined).T.unsqueeze(-1) for x in (lse[:, block.queries], part_lse))
            out[block.queries] = out[block.queries] * old + part * new
            lse[:, block.queries] = joined
    assert relative_error(out.double().cpu(), expected[0]) <= 1.5e-2
    dq, dk, dv = (torch.zeros(x.shape, device="cuda") for x in (q, k, v))
    for keys in chunks:
        for block in band_blocks([(0, length)], [keys], window):
            at = slice(block.keys.start + keys[0], block.keys.stop + keys[0])
            queries = block.queries
            done = Forward(q[queries], k[at], v[at], out[queries].to(q.dtype), lse[:, queries])
            part_q, part_k, part_v = kernel.backward_band(grad[queries], done, block.band)
            dq[queries] += part_q
            dk[at] += part_k
            dv[at] += part_v
    for actual, wanted in zip((dq, dk, dv), expected[1:], strict=True):
        assert relative_error(actual.double().cpu(), wanted) <= 1.5e-2


def test_ring_blocks_in_bfloat16_joined_by_hand_equal_plain_attention() -> None:
    """The blocks of a ring of three, computed one after the other by the kernel that a ring uses."""
    length, size = 301, 3
    q, k, v, grad = _document(length, torch.bfloat16)
    kernel, expected = kernel_for(q.device, q.dtype), _expected(q, k, v, grad)
    for index in range(size):
        ring = Ring(tuple(range(size)), length, index)
        rows = [row for start, stop in ring.share(index).ranges() for row in range(start, stop)]
        outs, lses = [], []
        for row_start, row_stop in ring.share(index).ranges():
            before, own = slice(0, row_start), slice(row_start, row_stop)
            blocks = [kernel.forward(q[own], k[own], v[own], causal=True)]
            if row_start:
                blocks.append(kernel.forward(q[own], k[before], v[before], causal=False))
            lse = torch.stack([block_lse for _, block_lse in blocks]).logsumexp(0)
            weights = [torch.exp(block_lse - lse).T.unsqueeze(-1) for _, block_lse in blocks]
            outs.append(sum(out.float() * weight for (out, _), weight in zip(blocks, weights, strict=True)))
            lses.append(lse)
        assert (
            relative_error(torch.cat([torch.as_tensor(out) for out in outs]).double().cpu(), expected[0][rows])
            <= 1.5e-2
        )


def test_ring_of_one_on_nccl_equals_plain_attention(nccl: Communicator) -> None:
    q, k, v, grad = _document(190, torch.bfloat16)
    ring, kernel = Ring((0,), 190, 0), kernel_for(q.device, q.dtype)
    out, lse = ring_forward(q, k, v, ring, kernel, nccl)
    actual = [out, *ring_backward(grad, Forward(q, k, v, out, lse), ring, kernel, nccl)]
    for tensor, expected in zip(actual, _expected(q, k, v, grad), strict=True):
        assert relative_error(tensor.double().cpu(), expected) <= 1.5e-2


def test_collectives_of_the_step_run_on_nccl(nccl: Communicator) -> None:
    values = torch.arange(8.0, device="cuda")
    gathered = torch.empty_like(values)
    nccl.all_reduce(values, "gradients")
    nccl.all_gather(gathered, values, "parameters")
    nccl.barrier("end")
    assert torch.equal(gathered, torch.arange(8.0, device="cuda"))


def test_micro_batch_in_bfloat16_is_near_the_same_in_float32(nccl: Communicator) -> None:
    config = ModelConfig(hidden=128, layers=2, heads=4, kv_heads=2, ffn=256)
    lengths = (100, 33, 1)
    plan = MicroBatch(tuple(Piece(i, ((0, length),), (0,)) for i, length in enumerate(lengths)))
    tokens = torch.randint(500, (sum(lengths),), device="cuda")
    positions = torch.cat([torch.arange(length) for length in lengths]).cuda()
    logits = []
    for dtype in (torch.bfloat16, torch.float32):
        model = Decoder(config, 500)
        model.initialize(0)
        model.to("cuda", dtype)
        attend = MicroBatchAttention(plan, lengths, kernel_for(tokens.device, dtype), nccl)
        logits.append(model(tokens, positions, attend).double().cpu())
    assert relative_error(*logits) <= 2e-2


def test_float64_has_no_fused_attention_and_says_what_to_set() -> None:
    with pytest.raises(UnsupportedKernel, match=r"Set train\.dtype to bfloat16"):
        kernel_for(torch.device("cuda"), torch.float64)


def test_pinned_copies_on_a_side_stream_overlap_with_computing() -> None:
    """Event times: a copy to pinned memory beside a matrix product takes less than both one after the other."""
    data = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    host = torch.empty(data.shape, dtype=torch.uint8, pin_memory=True)
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    stream = torch.cuda.Stream()

    def timed(copies: bool, computes: bool) -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        stream.wait_stream(torch.cuda.current_stream())
        if copies:
            with torch.cuda.stream(stream):
                host.copy_(data, non_blocking=True)
        if computes:
            for _ in range(8):
                matrix @ matrix
        torch.cuda.current_stream().wait_stream(stream)
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop)

    timed(True, True)
    both, alone = timed(True, True), timed(True, False) + timed(False, True)
    print(f"copy and compute together {both:.2f} ms, one after the other {alone:.2f} ms")
    assert both < alone


def test_memory_of_rank_0_of_a_large_layout_is_what_its_buffers_say() -> None:
    """A thousand ranks on torch's fake backend: one rank holds parameters, gradients and a thousandth of the state."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = 1024
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        config = ModelConfig(hidden=1024, layers=8, heads=16, kv_heads=4, ffn=2816)
        model = Decoder(config, 32_000).to("cuda", torch.bfloat16)
        parameters = ParameterSet.whole(model, Communicator(dist.group.WORLD))
        optimizer = ShardedAdamW([parameters], AdamWConfig())
        used = torch.cuda.memory_allocated() - before
    finally:
        dist.destroy_process_group()
    # values in bfloat16, gradients in float32
    expected = parameters.flat.padded * (2 + 4) + 3 * optimizer.shards[0].master.numel() * 4
    print(f"{parameters.flat.num_elements:,} parameters: {used / 2**20:.0f} MiB, formula {expected / 2**20:.0f} MiB")
    assert used <= 1.02 * expected

"""Fused kernels: values on CPU, calls and shapes of the CUDA ones on the meta device."""

import pytest
import torch

from evermesh.parallelism.attention.kernels import (
    AttentionKernel,
    CpuFlash,
    CudaEfficient,
    CudaFlash,
    Forward,
    kernel_for,
)
from evermesh.parallelism.errors import UnsupportedKernel
from tests.oracle import gradient, plain_attention, relative_error

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16


def test_packed_documents_on_cpu_equal_plain_attention() -> None:
    lengths = [1, 33, 7]
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(41, heads, HEAD_DIM, dtype=torch.float64) for heads in (4, 2, 2, 4))
    kernel = CpuFlash()
    out, lse = kernel.forward_packed(q, k, v, lengths)
    actual = [out, *kernel.backward_packed(grad, Forward(q, k, v, out, lse), lengths)]
    leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
    expected_out = torch.cat(
        [plain_attention(*parts) for parts in zip(*(x.split(lengths) for x in leaves), strict=True)]
    )
    expected_out.backward(grad)
    for tensor, expected in zip(actual, [expected_out.detach(), *map(gradient, leaves)], strict=True):
        assert relative_error(tensor, expected) <= 1e-13


@pytest.mark.parametrize(("kernel", "dtype"), [(CudaFlash(), torch.bfloat16), (CudaEfficient(), torch.float32)])
def test_cuda_kernels_are_called_with_arguments_that_torch_takes(kernel: AttentionKernel, dtype: torch.dtype) -> None:
    """The meta device checks signatures and shapes, and computes nothing."""
    q, grad = (torch.empty(40, HEADS, HEAD_DIM, dtype=dtype, device="meta") for _ in range(2))
    k, v = (torch.empty(24, KV_HEADS, HEAD_DIM, dtype=dtype, device="meta") for _ in range(2))
    out, lse = kernel.forward(q, k, v, causal=False)
    assert (out.shape, lse.shape) == (q.shape, (HEADS, 40))
    gradients = kernel.backward(grad, Forward(q, k, v, out, lse), causal=False)
    assert [tensor.shape for tensor in gradients] == [q.shape, k.shape, v.shape]


def test_device_without_a_fused_kernel_is_refused_with_what_to_set() -> None:
    with pytest.raises(UnsupportedKernel, match=r"Set train\.dtype to bfloat16"):
        kernel_for(torch.device("cuda"), torch.float64)

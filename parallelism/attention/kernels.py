"""Fused attention blocks that return the log-sum-exp, one class per device and dtype, behind one interface.

Shape legend: T tokens, H query heads, K key/value heads (H is a multiple of K), D head size.

A block is attention of some queries over some keys. Blocks of one softmax are joined by their log-sum-exp, and the
backward of a block takes the *joined* output and log-sum-exp, so that every block alone gives its exact share of the
gradients (Liu et al., Ring Attention; Dao, FlashAttention-2). Empty blocks never reach a kernel: torch's CPU kernel
divides by the number of queries.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from evermesh.parallelism.errors import UnsupportedKernel

_aten = torch.ops.aten
Gradients = tuple[Tensor, Tensor, Tensor]


class Forward(NamedTuple):
    """A forward pass, as its backward needs it; with blocks of one softmax, output and log-sum-exp are the joined ones."""

    q_THD: Tensor
    k_TKD: Tensor
    v_TKD: Tensor
    out_THD: Tensor
    lse_HT: Tensor


class AttentionKernel(Protocol):
    """One device's fused attention. Tensors are [T, heads, D]; the log-sum-exp is [H, T]."""

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Output [T, H, D] and log-sum-exp [H, T] of one block. ``causal`` needs as many keys as queries."""
        ...

    def backward(self, grad_THD: Tensor, done: Forward, *, causal: bool) -> Gradients:
        """Gradients of q, k and v of one block, given what its forward pass took and the whole softmax gave."""
        ...

    def forward_packed(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of whole documents that lie one after the other; lengths are at least 1."""
        ...

    def backward_packed(self, grad_THD: Tensor, done: Forward, lengths: Sequence[int]) -> Gradients:
        """Gradients of ``forward_packed``."""
        ...


def kernel_for(device: torch.device, dtype: torch.dtype) -> AttentionKernel:
    """The fused attention of ``device`` for ``dtype``.

    Raises:
        UnsupportedKernel: there is none.
    """
    if device.type == "cpu":
        return CpuFlash()
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return CudaFlash()
    if device.type == "cuda" and dtype == torch.float32:
        return CudaEfficient()
    raise UnsupportedKernel(
        f"no fused attention for {dtype} on {device.type}. Set train.dtype to bfloat16 (or float32) on cuda, "
        "or train.device.kind to cpu."
    )


class _PerDocument:
    """Packed documents as one kernel call per document: faster on CPU than a dense mask (3.5x at 4 documents)."""

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def backward(self, grad_THD: Tensor, done: Forward, *, causal: bool) -> Gradients:
        raise NotImplementedError

    def forward_packed(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        outputs, lses = [], []
        for q, k, v in zip(*(x.split(list(lengths)) for x in (q_THD, k_TKD, v_TKD)), strict=True):
            out, lse = self.forward(q, k, v, causal=True)
            outputs.append(out)
            lses.append(lse)
        return torch.cat(outputs), torch.cat(lses, dim=1)

    def backward_packed(self, grad_THD: Tensor, done: Forward, lengths: Sequence[int]) -> Gradients:
        tokens_first = [x.split(list(lengths)) for x in (grad_THD, *done[:4])]
        parts = [
            self.backward(grad, Forward(q, k, v, out, lse), causal=True)
            for grad, q, k, v, out, lse in zip(*tokens_first, done.lse_HT.split(list(lengths), dim=1), strict=True)
        ]
        dq, dk, dv = (torch.cat(gradients) for gradients in zip(*parts, strict=True))
        return dq, dk, dv


def _heads_first(x_THD: Tensor) -> Tensor:
    return x_THD.transpose(0, 1).unsqueeze(0)


def _tokens_first(x_1HTD: Tensor) -> Tensor:
    return x_1HTD.squeeze(0).transpose(0, 1)


class CpuFlash(_PerDocument):
    """torch's flash attention for CPU: grouped queries, float64, float32 and bfloat16."""

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = _heads_first(q_THD), _heads_first(k_TKD), _heads_first(v_TKD)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        return _tokens_first(out), lse.squeeze(0)

    def backward(self, grad_THD: Tensor, done: Forward, *, causal: bool) -> Gradients:
        grad, q, k, v, out = (_heads_first(x) for x in (grad_THD, *done[:4]))
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, done.lse_HT.unsqueeze(0), 0.0, causal
        )
        dq, dk, dv = (_tokens_first(x) for x in gradients)
        return dq, dk, dv


class CudaFlash:
    """FlashAttention-2 as shipped with torch: bfloat16 and float16, grouped queries, packed documents in one call."""

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        queries, keys = q_THD.shape[0], k_TKD.shape[0]
        return self._forward(q_THD, k_TKD, v_TKD, [queries], [keys], causal)

    def backward(self, grad_THD: Tensor, done: Forward, *, causal: bool) -> Gradients:
        return self._backward(grad_THD, done, [done.q_THD.shape[0]], [done.k_TKD.shape[0]], causal)

    def forward_packed(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        return self._forward(q_THD, k_TKD, v_TKD, lengths, lengths, causal=True)

    def backward_packed(self, grad_THD: Tensor, done: Forward, lengths: Sequence[int]) -> Gradients:
        return self._backward(grad_THD, done, lengths, lengths, causal=True)

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int], causal: bool
    ) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _aten._flash_attention_forward(
            q,
            k,
            v,
            _boundaries(queries, q.device),
            _boundaries(keys, q.device),
            max(queries),
            max(keys),
            0.0,
            causal,
            False,
        )
        return out, lse

    def _backward(
        self, grad: Tensor, done: Forward, queries: Sequence[int], keys: Sequence[int], causal: bool
    ) -> Gradients:
        q, k, v, out, lse = done
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, device=q.device)
        dq, dk, dv = _aten._flash_attention_backward(
            grad.contiguous(),
            q,
            k,
            v,
            out.contiguous(),
            lse.contiguous(),
            _boundaries(queries, q.device),
            _boundaries(keys, q.device),
            max(queries),
            max(keys),
            0.0,
            causal,
            no_dropout,
            unused,
        )
        return dq, dk, dv


class CudaEfficient(_PerDocument):
    """The memory-efficient kernel of torch for float32; it knows no grouped queries, so keys and values are repeated."""

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        q, k, v = self._expand(q_THD, k_TKD, v_TKD)
        out, lse, *_ = _aten._efficient_attention_forward(
            q, k, v, None, None, None, None, None, 0.0, int(causal), compute_log_sumexp=True
        )
        return out.squeeze(0), lse.squeeze(0)[:, : q_THD.shape[0]]  # the kernel pads the log-sum-exp to 32 queries

    def backward(self, grad_THD: Tensor, done: Forward, *, causal: bool) -> Gradients:
        q, k, v = self._expand(done.q_THD, done.k_TKD, done.v_TKD)
        queries, keys = done.q_THD.shape[0], done.k_TKD.shape[0]
        lse = torch.nn.functional.pad(done.lse_HT, (0, -queries % 32), value=float("inf")).unsqueeze(0)
        no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)
        dq, dk, dv, _ = _aten._efficient_attention_backward(
            grad_THD.unsqueeze(0),
            q,
            k,
            v,
            None,
            done.out_THD.unsqueeze(0),
            None,
            None,
            queries,
            keys,
            lse,
            0.0,
            no_dropout,
            no_dropout,
            int(causal),
            False,
        )
        dk_TKD, dv_TKD = (x.squeeze(0).unflatten(1, (done.k_TKD.shape[1], -1)).sum(2) for x in (dk, dv))
        return dq.squeeze(0), dk_TKD, dv_TKD

    @staticmethod
    def _expand(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Gradients:
        group = q_THD.shape[1] // k_TKD.shape[1]
        k, v = (x.repeat_interleave(group, dim=1).unsqueeze(0) for x in (k_TKD, v_TKD))
        return q_THD.unsqueeze(0), k, v


def _boundaries(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

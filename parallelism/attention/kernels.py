"""Fused attention blocks that return the log-sum-exp, one class per device and dtype, behind one interface.

Shape legend: T tokens, H query heads, K key/value heads (H is a multiple of K), D head size.

A block is attention of some queries over some keys. Blocks of one softmax are joined by their log-sum-exp, and the
backward of a block takes the *joined* output and log-sum-exp, so that every block alone gives its exact share of the
gradients (Liu et al., Ring Attention; Dao, FlashAttention-2). Empty blocks never reach a kernel: torch's CPU kernel
divides by the number of queries.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from evermesh.parallelism.attention.window import Band, packed_band
from evermesh.parallelism.errors import UnsupportedKernel

_aten = torch.ops.aten
_BAND_QUERIES = 256
"""Queries of a band that share one mask on CPU: it has so many rows, and as many columns more than the band is wide."""
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

    def forward_band(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, band: Band) -> tuple[Tensor, Tensor]:
        """As ``forward``, with the keys of ``band`` only; every query sees at least one."""
        ...

    def backward_band(self, grad_THD: Tensor, done: Forward, band: Band) -> Gradients:
        """Gradients of ``forward_band``."""
        ...

    def forward_packed(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: Sequence[int], window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Causal attention of whole documents that lie one after the other; lengths are at least 1.

        With a ``window`` every token sees so many tokens, itself included.
        """
        ...

    def backward_packed(
        self, grad_THD: Tensor, done: Forward, lengths: Sequence[int], window: int | None = None
    ) -> Gradients:
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

    def forward_band(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, band: Band) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def backward_band(self, grad_THD: Tensor, done: Forward, band: Band) -> Gradients:
        raise NotImplementedError

    def forward_packed(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: Sequence[int], window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        outputs, lses = [], []
        for q, k, v in zip(*(x.split(list(lengths)) for x in (q_THD, k_TKD, v_TKD)), strict=True):
            if window is None or q.shape[0] <= window:
                out, lse = self.forward(q, k, v, causal=True)
            else:
                out, lse = self.forward_band(q, k, v, packed_band(window))
            outputs.append(out)
            lses.append(lse)
        return torch.cat(outputs), torch.cat(lses, dim=1)

    def backward_packed(
        self, grad_THD: Tensor, done: Forward, lengths: Sequence[int], window: int | None = None
    ) -> Gradients:
        tokens_first = [x.split(list(lengths)) for x in (grad_THD, *done[:4])]
        parts = []
        for grad, q, k, v, out, lse in zip(*tokens_first, done.lse_HT.split(list(lengths), dim=1), strict=True):
            document = Forward(q, k, v, out, lse)
            if window is None or q.shape[0] <= window:
                parts.append(self.backward(grad, document, causal=True))
            else:
                parts.append(self.backward_band(grad, document, packed_band(window)))
        dq, dk, dv = (torch.cat(gradients) for gradients in zip(*parts, strict=True))
        return dq, dk, dv


def _heads_first(x_THD: Tensor) -> Tensor:
    return x_THD.transpose(0, 1).unsqueeze(0)


def _tokens_first(x_1HTD: Tensor) -> Tensor:
    return x_1HTD.squeeze(0).transpose(0, 1)


class CpuFlash(_PerDocument):
    """torch's flash attention for CPU: grouped queries, float64, float32 and bfloat16."""

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        return self._forward(q_THD, k_TKD, v_TKD, causal=causal)

    def backward(self, grad_THD: Tensor, done: Forward, *, causal: bool) -> Gradients:
        return self._backward(grad_THD, done, causal=causal)

    def forward_band(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, band: Band) -> tuple[Tensor, Tensor]:
        """Some queries at a time, with the keys that they can see and a mask; the work is linear in the queries."""
        outputs, lses = [], []
        for queries, keys, mask in _band_parts(q_THD, k_TKD, band):
            out, lse = self._forward(q_THD[queries], k_TKD[keys], v_TKD[keys], mask=mask)
            outputs.append(out)
            lses.append(lse)
        return torch.cat(outputs), torch.cat(lses, dim=1)

    def backward_band(self, grad_THD: Tensor, done: Forward, band: Band) -> Gradients:
        q, k, v, out, lse = done
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys, mask in _band_parts(q, k, band):
            part = Forward(q[queries], k[keys], v[keys], out[queries], lse[:, queries])
            dq[queries], dk_part, dv_part = self._backward(grad_THD[queries], part, mask=mask)
            dk[keys] += dk_part
            dv[keys] += dv_part
        return dq, dk, dv

    def _forward(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, causal: bool = False, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        q, k, v = _heads_first(q_THD), _heads_first(k_TKD), _heads_first(v_TKD)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask)
        return _tokens_first(out), lse.squeeze(0)

    def _backward(
        self, grad_THD: Tensor, done: Forward, *, causal: bool = False, mask: Tensor | None = None
    ) -> Gradients:
        grad, q, k, v, out = (_heads_first(x) for x in (grad_THD, *done[:4]))
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, done.lse_HT.unsqueeze(0), 0.0, causal, attn_mask=mask
        )
        dq, dk, dv = (_tokens_first(x) for x in gradients)
        return dq, dk, dv


class CudaFlash:
    """FlashAttention-2 as shipped with torch: bfloat16 and float16, grouped queries, packed documents in one call."""

    def forward(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, *, causal: bool) -> tuple[Tensor, Tensor]:
        return self._forward(q_THD, k_TKD, v_TKD, [q_THD.shape[0]], [k_TKD.shape[0]], _band(causal, None))

    def backward(self, grad_THD: Tensor, done: Forward, *, causal: bool) -> Gradients:
        return self._backward(grad_THD, done, [done.q_THD.shape[0]], [done.k_TKD.shape[0]], _band(causal, None))

    def forward_band(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, band: Band) -> tuple[Tensor, Tensor]:
        return self._forward(q_THD, k_TKD, v_TKD, [q_THD.shape[0]], [k_TKD.shape[0]], band)

    def backward_band(self, grad_THD: Tensor, done: Forward, band: Band) -> Gradients:
        return self._backward(grad_THD, done, [done.q_THD.shape[0]], [done.k_TKD.shape[0]], band)

    def forward_packed(
        self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, lengths: Sequence[int], window: int | None = None
    ) -> tuple[Tensor, Tensor]:
        return self._forward(q_THD, k_TKD, v_TKD, lengths, lengths, _band(True, window))

    def backward_packed(
        self, grad_THD: Tensor, done: Forward, lengths: Sequence[int], window: int | None = None
    ) -> Gradients:
        return self._backward(grad_THD, done, lengths, lengths, _band(True, window))

    def _forward(
        self, q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int], band: "_FlashBand"
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
            band == _CAUSAL,
            False,
            **_window_arguments(band),
        )
        return out, lse

    def _backward(
        self, grad: Tensor, done: Forward, queries: Sequence[int], keys: Sequence[int], band: "_FlashBand"
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
            band == _CAUSAL,
            no_dropout,
            unused,
            **_window_arguments(band),
        )
        return dq, dk, dv


_FlashBand = Band | Literal["causal", "all"]
_CAUSAL: Literal["causal"] = "causal"


def _band(causal: bool, window: int | None) -> _FlashBand:
    if window is not None:
        return packed_band(window)
    return "causal" if causal else "all"


def _window_arguments(band: _FlashBand) -> dict[str, int]:
    """FlashAttention counts its window from the same diagonal as ``Band`` does."""
    return {"window_size_left": band.before, "window_size_right": band.after} if isinstance(band, Band) else {}


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

    def forward_band(self, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, band: Band) -> tuple[Tensor, Tensor]:
        raise _no_window()

    def backward_band(self, grad_THD: Tensor, done: Forward, band: Band) -> Gradients:
        raise _no_window()

    @staticmethod
    def _expand(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Gradients:
        group = q_THD.shape[1] // k_TKD.shape[1]
        k, v = (x.repeat_interleave(group, dim=1).unsqueeze(0) for x in (k_TKD, v_TKD))
        return q_THD.unsqueeze(0), k, v


def _no_window() -> UnsupportedKernel:
    return UnsupportedKernel(
        "no fused attention with a sliding window for torch.float32 on cuda. Set train.dtype to bfloat16, or "
        "train.model.sliding_window to null, which makes another model."
    )


def _band_parts(q_THD: Tensor, k_TKD: Tensor, band: Band) -> Iterator[tuple[slice, slice, Tensor]]:
    """Some queries, the keys that they can see, and the mask to add to their scores."""
    num_queries, num_keys = q_THD.shape[0], k_TKD.shape[0]
    diagonal = num_keys - num_queries
    for start in range(0, num_queries, _BAND_QUERIES):
        stop = min(start + _BAND_QUERIES, num_queries)
        first, last = max(0, start + diagonal - band.before), min(num_keys, stop + diagonal + band.after)
        at_Q1 = torch.arange(start, stop, device=q_THD.device).unsqueeze(1) + diagonal
        keys_K = torch.arange(first, last, device=q_THD.device)
        hidden_QK = (keys_K < at_Q1 - band.before) | (keys_K > at_Q1 + band.after)
        mask_QK = q_THD.new_zeros(hidden_QK.shape).masked_fill(hidden_QK, float("-inf"))
        yield slice(start, stop), slice(first, last), mask_QK


def _boundaries(lengths: Sequence[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

"""Plain torch that does what an axis of ours does: the peers of ``bench_axes``. Nothing of our parallelism is in here."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from evermesh.parallelism.links import Operation, wire_bytes
from evermesh.runtime.model.config import ModelConfig
from evermesh.runtime.model.decoder import Decoder
from evermesh.runtime.model.stages import Part
from evermesh.runtime.optimizer_config import AdamWConfig

Peer = Literal["DDP", "FSDP2", "FSDP2, resharded per step", "DTensor", "Schedule1F1B"]
Step = Callable[[], float]


def attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor, /, *, window: int | None = None) -> Tensor:
    """Causal attention of one document."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_THD, k_TKD, v_TKD))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)


def build_peer(
    peer: Peer, config: ModelConfig, vocabulary: int, optimizer: AdamWConfig, documents: Tensor
) -> tuple[Step, Callable[[], int]]:
    """A step on ``documents`` [N, T + 1], which returns this rank's part of the mean loss, and the bytes of state that this
    rank holds. Collective; every rank passes all documents."""
    if peer == "Schedule1F1B":
        return _pipeline(config, vocabulary, optimizer, documents)
    model = Decoder(config, vocabulary)
    model.initialize(0)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    total = documents.shape[0] * (documents.shape[1] - 1)
    if peer == "DTensor":
        _share(model)
        adamw = _adamw(model, optimizer)
        return _tensor_step(model, adamw, documents, total), lambda: _state_bytes(model, adamw)
    own = documents[rank::ranks]
    if peer == "DDP":
        replica = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        adamw = _adamw(model, optimizer)
        return _replica_step(replica, adamw, own, total, ranks), lambda: _state_bytes(model, adamw)
    per_step = peer != "FSDP2"
    for module in (*model.blocks.values(), model):
        fully_shard(module, reshard_after_forward=not per_step and module is not model)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)  # the loss is divided already
        module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
    adamw = _adamw(model, optimizer)
    step = _sharded_step(model, adamw, own, total, per_step=per_step)
    return step, lambda: _state_bytes(model, adamw)


def _adamw(model: nn.Module, config: AdamWConfig) -> torch.optim.AdamW:
    matrices, vectors = ([p for p in model.parameters() if (p.dim() >= 2) == is_matrix] for is_matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _loss(model: nn.Module, document: Tensor, total: int) -> Tensor:
    logits = model(document[:-1], torch.arange(document.shape[0] - 1), attend)
    return F.cross_entropy(logits, document[1:], reduction="sum") / total


def _replica_step(
    model: nn.parallel.DistributedDataParallel, adamw: torch.optim.AdamW, own: Tensor, total: int, ranks: int
) -> Step:
    def step() -> float:
        adamw.zero_grad()
        loss = 0.0
        for number, document in enumerate(own):
            part = _loss(model, document, total)
            if number < len(own) - 1:
                with model.no_sync():
                    part.backward()
            else:
                part.backward()
            loss += part.item()
        for parameter in model.parameters():  # DDP takes the mean
            assert parameter.grad is not None
            parameter.grad.mul_(ranks)
        adamw.step()
        return loss

    return step


def _sharded_step(model: Any, adamw: torch.optim.AdamW, own: Tensor, total: int, *, per_step: bool) -> Step:
    def step() -> float:
        adamw.zero_grad()
        loss = 0.0
        for number, document in enumerate(own):
            is_last = number == len(own) - 1
            if per_step:  # parameters stay, and gradients are summed once
                model.set_requires_gradient_sync(is_last)
                model.set_reshard_after_backward(is_last)
            part = _loss(model, document, total)
            part.backward()
            loss += part.item()
        adamw.step()
        return loss

    return step


def _share(model: Decoder) -> None:
    """Tensor and sequence parallelism, with the vocabulary divided too."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    tokens = Shard(0)
    whole: dict[str, Any] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=tokens),
        "norm": SequenceParallel(sequence_dim=0),
        "head": ColwiseParallel(input_layouts=tokens, output_layouts=Shard(-1), use_local_output=False),
    }
    parallelize_module(model, mesh, whole)
    for block in model.blocks.values():
        plan: dict[str, Any] = {
            "attention_norm": SequenceParallel(sequence_dim=0),
            "attention": PrepareModuleInput(
                input_layouts=(tokens, None, None), desired_input_layouts=(Replicate(), None, None)
            ),
            "attention.query": ColwiseParallel(),
            "attention.key": ColwiseParallel(),
            "attention.value": ColwiseParallel(),
            "attention.output": RowwiseParallel(output_layouts=tokens),
            "feed_forward_norm": SequenceParallel(sequence_dim=0),
            "feed_forward": PrepareModuleInput(input_layouts=(tokens,), desired_input_layouts=(Replicate(),)),
            "feed_forward.gate": ColwiseParallel(),
            "feed_forward.up": ColwiseParallel(),
            "feed_forward.down": RowwiseParallel(output_layouts=tokens),
        }
        parallelize_module(block, mesh, plan)


def _tensor_step(model: nn.Module, adamw: torch.optim.AdamW, documents: Tensor, total: int) -> Step:
    def step() -> float:
        adamw.zero_grad()
        loss = 0.0
        for document in documents:
            with loss_parallel():
                part = _loss(model, document, total)
                part.backward()
            loss += part.full_tensor().item() if isinstance(part, DTensor) else part.item()
        adamw.step()
        return loss if dist.get_rank() == 0 else 0.0

    return step


class _Stage(nn.Module):
    """A part of the decoder, for documents of one length."""

    def __init__(self, config: ModelConfig, vocabulary: int, part: Part, tokens: int) -> None:
        super().__init__()
        self.decoder, self.part = Decoder(config, vocabulary, [part]), part
        self.decoder.initialize(0)
        self.positions_T = torch.arange(tokens)

    def forward(self, x: Tensor) -> Tensor:
        inputs = {} if self.part.is_first else {"x_TC": x}
        tokens_T = x if self.part.is_first else self.positions_T
        return self.decoder(tokens_T, self.positions_T, attend, part=self.part, **inputs)


def _pipeline(
    config: ModelConfig, vocabulary: int, optimizer: AdamWConfig, documents: Tensor
) -> tuple[Step, Callable[[], int]]:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    each = config.layers // ranks
    tokens, total = documents.shape[1] - 1, documents.shape[0] * (documents.shape[1] - 1)
    module = _Stage(config, vocabulary, Part.of(config, range(rank * each, (rank + 1) * each)), tokens)
    adamw = _adamw(module, optimizer)

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, reduction="sum") / total

    stage = PipelineStage(module, rank, ranks, torch.device("cpu"))
    schedule = Schedule1F1B(stage, len(documents), loss_fn=loss, scale_grads=False)

    def step() -> float:
        adamw.zero_grad()
        first = (documents[:, :-1].flatten(),) if rank == 0 else ()
        losses: list[Tensor] = []
        last: dict[str, Any] = {"target": documents[:, 1:].flatten(), "losses": losses} if rank == ranks - 1 else {}
        schedule.step(*first, **last)
        adamw.step()
        return sum(part.item() for part in losses)

    return step, lambda: _state_bytes(module, adamw)


def _local(tensors: Iterator[Tensor]) -> int:
    return sum((tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes for tensor in tensors)


def _state_bytes(model: nn.Module, adamw: torch.optim.AdamW) -> int:
    """Of parameters, gradients and moments between two steps; what FSDP2 gathers meanwhile is not in it."""
    parameters = list(model.parameters())
    moments = (state for of_one in adamw.state.values() for name, state in of_one.items() if name != "step")
    gradients = (parameter.grad for parameter in parameters if parameter.grad is not None)
    return _local(iter(parameters)) + _local(gradients) + _local(moments)


_OPERATIONS: dict[str, tuple[Operation, int]] = {
    "c10d.allreduce_": ("all_reduce", 0),
    "c10d._allgather_base_": ("all_gather", 1),
    "c10d._reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d.send": ("send", 0),
    "_c10d_functional.all_reduce": ("all_reduce", 0),
    "_c10d_functional.all_reduce_": ("all_reduce", 0),
    "_c10d_functional.all_gather_into_tensor": ("all_gather", 0),
    "_c10d_functional.reduce_scatter_tensor": ("reduce_scatter", 0),
}
"""By name of torch's operation: ours, and which argument is the payload."""
_SILENT = {"c10d.recv_", "c10d.barrier", "_c10d_functional.wait_tensor", "_c10d_functional._wrap_tensor_autograd"}


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends, as the byte ledger does (``parallelism/links.py``)."""

    def __init__(self) -> None:
        super().__init__()
        self.wire_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
        """Count, and go on."""
        name = str(function).rsplit(".", 1)[0]
        if "c10d" in name and name not in _SILENT:
            operation, position = _OPERATIONS[name]
            payload = arguments[position]
            tensor = payload[0] if isinstance(payload, list) else payload
            sent = wire_bytes(operation, tensor.nbytes, dist.get_world_size(), dist.get_rank())
            self.wire_bytes += sent
        return function(*arguments, **(named or {}))

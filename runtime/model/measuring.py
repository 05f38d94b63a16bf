"""How long the layers of a model take here and now; what splits them into pipeline stages."""

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evermesh.parallelism.attention.kernels import kernel_for
from evermesh.parallelism.attention.micro_batch import MicroBatchAttention
from evermesh.parallelism.batch_plan import MicroBatch, Piece
from evermesh.parallelism.collectives import Communicator
from evermesh.parallelism.experts.documents import TokenContext
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.model.blocks import Block, ParallelBlock
from evermesh.runtime.model.rotary import rotation
from evermesh.runtime.model.stages import LayerCosts, nominal_costs

_ROUNDS = 5
_MOST_TOKENS = 2048


def layer_costs(config: TrainConfig, vocabulary: int, world: Communicator, device: torch.device) -> LayerCosts:
    """What ``config.layout.split`` divides evenly; the same on all ranks. Collective, if it is measured."""
    if config.layout.split != "measured" or config.layout.pipeline.num_stages == 1:
        return nominal_costs(config.model, vocabulary)
    costs = torch.zeros(config.model.layers + 2, dtype=torch.float64, device=device)
    if world.rank == 0:
        costs.copy_(torch.tensor(_measured(config, vocabulary, device), dtype=torch.float64))
    world.broadcast(costs, 0, "layer costs")
    *layers, embedding, head = costs.tolist()
    return LayerCosts(tuple(layers), embedding, head)


def _measured(config: TrainConfig, vocabulary: int, device: torch.device) -> list[float]:
    """Seconds of every layer, of the embedding, and of the head with its loss, forward and backward, for one micro-batch.

    Layers of the same kind are measured once, whole: tensor and expert parallelism divide all of them alike.
    """
    model, dtype = config.model, getattr(torch, config.dtype)
    num_tokens = min(config.layout.capacity, _MOST_TOKENS)
    micro_batch = MicroBatch((Piece(0, ((0, num_tokens),), (0,)),))
    attend = MicroBatchAttention(micro_batch, (num_tokens,), kernel_for(device, dtype), Communicator())
    x_TC = torch.randn(num_tokens, model.hidden, device=device).to(dtype).requires_grad_()
    tokens_T = torch.arange(num_tokens, device=device) % vocabulary
    rotation_TD = rotation(model, tokens_T, dtype)
    kinds: dict[tuple[bool, int | None], float] = {}
    for layer in range(model.layers):
        kind = model.has_experts(layer), model.window_of(layer)
        if kind not in kinds:
            block = (ParallelBlock if model.parallel_block else Block)(model, layer).to(device, dtype)
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=model.initial_std)

            def run(block: Block | ParallelBlock = block) -> Tensor:
                context = TokenContext(micro_batch, (num_tokens,), ("measured",), num_tokens)
                return block(x_TC, rotation_TD, attend, context)

            kinds[kind] = _seconds(run, block.parameters(), device)
    embedding = nn.Embedding(vocabulary, model.hidden).to(device, dtype)
    norm, head = (
        nn.RMSNorm(model.hidden).to(device, dtype),
        nn.Linear(model.hidden, vocabulary, bias=False).to(device, dtype),
    )
    at_the_end = [*norm.parameters(), *head.parameters()]
    return [
        *(kinds[model.has_experts(layer), model.window_of(layer)] for layer in range(model.layers)),
        _seconds(lambda: embedding(tokens_T), embedding.parameters(), device),
        _seconds(lambda: F.cross_entropy(head(norm(x_TC)).float(), tokens_T), at_the_end, device),
    ]


def _seconds(run: Callable[[], Tensor], parameters: Iterable[nn.Parameter], device: torch.device) -> float:
    """Least time of forward and backward, after one that warms up: others on the machine only make it longer."""
    held, times = list(parameters), []
    for _ in range(_ROUNDS + 1):
        _wait(device)
        began_s = time.perf_counter()
        run().sum().backward()
        _wait(device)
        times.append(time.perf_counter() - began_s)
        for parameter in held:
            parameter.grad = None
    return min(times[1:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

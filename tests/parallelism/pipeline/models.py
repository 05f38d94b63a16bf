"""A small model in stages, the ranks of a pipeline that train it, and the same model in one process."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from evermesh.parallelism.collectives import Communicator, Moment
from evermesh.parallelism.ledger import ByteLedger, Traffic
from evermesh.parallelism.pipeline import PipelineSchedule
from evermesh.parallelism.pipeline.deferred import DeferredWeights
from evermesh.parallelism.pipeline.executor import PipelineExecutor
from evermesh.parallelism.pipeline.links import Activations, Links, open_links

WIDTH, VOCABULARY = 6, 11


class Block(nn.Module):
    """A norm, two linear layers, one with a bias, and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=True)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(self.norm(x))))


class Model(nn.Module):
    """Embedding, one block for each stage, head; float64, the same values everywhere."""

    def __init__(self, num_stages: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(num_stages))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.double()


class ModelStage:
    """One stage of ``Model`` for one step."""

    def __init__(self, model: Model, stage: int, tokens: list[Tensor], recompute: bool = False) -> None:
        self.model, self.stage, self.tokens, self.recompute = model, stage, tokens, recompute

    def forward(self, micro_batch: int, x_tC: Tensor | None, /) -> Tensor:
        tokens = self.tokens[micro_batch]
        x = self.model.embedding(tokens) if x_tC is None else x_tC
        block = self.block(micro_batch)
        x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        if self.stage < len(self.model.blocks) - 1:
            return x
        return F.cross_entropy(self.model.head(x), (tokens * 3 + 1) % VOCABULARY, reduction="sum")

    def block(self, micro_batch: int) -> Callable[[Tensor], Tensor]:
        """What the stage does with one micro-batch."""
        return self.model.blocks[self.stage]


def batches(sizes: tuple[tuple[int, ...], ...]) -> list[list[Tensor]]:
    """Token ids of every micro-batch of every step."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randint(VOCABULARY, (size,), generator=generator) for size in step] for step in sizes]


def links_of(schedule: PipelineSchedule, rank: int, moment: Moment) -> Links:
    """This rank's links, over the whole default group, as one pipeline on two nodes. Collective."""
    import torch.distributed as dist

    links: dict[tuple[int, int], Communicator] = {}
    for link in schedule.links():
        group = dist.new_group(sorted(link))
        if rank in link:
            nodes = tuple(2 * member // schedule.ranks for member in sorted(link))
            links[link] = Communicator(group, name=f"pp {link}", axis="pp", nodes=nodes, moment=moment)
    open_links(links, torch.device("cpu"))
    return links


def activations_of(step: list[Tensor]) -> Activations:
    """Sizes of the messages of a step."""
    return Activations(tuple(len(tokens) for tokens in step), WIDTH, torch.float64, torch.device("cpu"))


def gradients(model: Model) -> dict[str, Tensor]:
    """Gradients by name, of the parameters that have one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def in_one_process(num_stages: int, sizes: tuple[tuple[int, ...], ...]) -> list[tuple[float, dict[str, Tensor]]]:
    """Loss and gradients of every step, without a pipeline; gradients start from one, as if they were added to."""
    results = []
    for step in batches(sizes):
        model = Model(num_stages)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        total = 0.0
        stages = [ModelStage(model, stage, step) for stage in range(num_stages)]
        for micro_batch in range(len(step)):
            x: Tensor | None = None
            for stage in stages:
                x = stage.forward(micro_batch, x)
            assert x is not None
            x.backward()
            total += x.item()
        results.append((total, gradients(model)))
    return results


def on_a_pipeline(
    rank: int,
    _world_size: int,
    schedules: tuple[PipelineSchedule, ...],
    sizes: tuple[tuple[int, ...], ...],
    recompute: bool,
) -> list[list[Mapping[str, Any]]]:
    """For every schedule and step: loss, gradients of this rank's stages, peak, and what was sent."""
    return [_train(rank, schedule, sizes, recompute) for schedule in schedules]


def _train(
    rank: int, schedule: PipelineSchedule, sizes: tuple[tuple[int, ...], ...], recompute: bool
) -> list[Mapping[str, Any]]:
    moment = Moment()
    links, ledger = links_of(schedule, rank, moment), ByteLedger()
    model, deferred = Model(schedule.num_stages), DeferredWeights()
    deferred.apply(model)
    executor = PipelineExecutor(schedule, rank, links, deferred if schedule.splits_backward else None)
    buffers = {parameter: torch.empty_like(parameter) for parameter in model.parameters()}
    results: list[Mapping[str, Any]] = []
    for number, step in enumerate(batches(sizes)):
        moment.begin_step(number)
        for parameter, buffer in buffers.items():
            parameter.grad = buffer.fill_(1.0)
        stages = {stage: ModelStage(model, stage, step, recompute) for stage in schedule.stages_of(rank)}
        with listening(links, ledger):
            outcome = executor.run(stages, activations_of(step))
        assert all(parameter.grad is buffer for parameter, buffer in buffers.items()), "a gradient was replaced"
        sent: tuple[Traffic, ...] = ledger.take_step(number)
        results.append(
            {"loss": outcome.loss.item(), "peak": outcome.peak_activations, "sent": sent, "grads": gradients(model)}
        )
    return results


def listening(links: Links, ledger: ByteLedger) -> ExitStack:
    """Count what goes through all links, until the block ends."""
    stack = ExitStack()
    for communicator in links.values():
        stack.enter_context(communicator.listen(ledger))
    return stack

"""Our pipeline with micro-batches of their true sizes against torch's own, which pads every one to the capacity.

1F1B with the same blocks, the same ranks and the same documents; in every round each way runs one forward and backward
pass of all micro-batches, and both must leave the same gradients. The blocks are linear layers only, so that a padded
token costs what a real one does; attention over padding would cost torch more. Where every micro-batch is full, nothing
is padded, and what is left is the cost of our executor.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evermesh.parallelism import ByteLedger, CostModel, Layout, Moment, plan_batch
from evermesh.parallelism.pipeline import PipelineSchedule
from evermesh.parallelism.pipeline.executor import PipelineExecutor
from evermesh.parallelism.pipeline.links import Activations
from tests.benchmarks.harness import Row, exact_row, paired_row
from tests.cluster import run_ranks
from tests.parallelism.pipeline.models import links_of, listening

ROUNDS, RANKS = 8, (2, 4)
CAPACITY, WIDTH, FFN, LAYERS = 512, 192, 768, 4
COST = CostModel(token_s=1e-5, pair_s=0.0, micro_batch_s=1e-3)
PEER = "torch Schedule1F1B, padded to the capacity"


def run() -> list[Row]:
    """Seconds of a step and bytes sent, for batches that are packed, that are not, and that need no padding."""
    documents = np.random.default_rng(0).lognormal(5.0, 0.8, 24).clip(8, CAPACITY).astype(int).tolist()
    return [
        row
        for ranks in RANKS
        for name, sizes in (
            ("every micro-batch full", [CAPACITY] * 12),
            ("planned packs", _planned(documents, ranks)),
            ("a document each", documents),
        )
        for row in _compare(name, sizes, ranks)
    ]


def _planned(documents: Sequence[int], ranks: int) -> list[int]:
    """What one of two HDP ranks gets of twice the documents."""
    plan = plan_batch([*documents, *documents], Layout(hdp=2, pp=ranks, capacity=CAPACITY), COST)
    return [micro_batch.num_tokens for micro_batch in plan.ranks[0]]


def _compare(name: str, sizes: list[int], ranks: int) -> list[Row]:
    results = run_ranks(ranks, _measure, sizes, timeout_s=300)
    name = f"{name} ({sum(sizes) / len(sizes) / CAPACITY:.0%} filled), {ranks} ranks"
    ours, theirs = ([max(result[way][i] for result in results) for i in range(ROUNDS)] for way in (0, 1))
    sent = sum(result[2] for result in results)
    padded = 2 * (ranks - 1) * len(sizes) * CAPACITY * WIDTH * 4
    return [
        paired_row(f"seconds of a step: {name}", ours, "s", peer=PEER, peer_values=theirs),
        exact_row(f"bytes of a step: {name}", sent, "bytes", peer=PEER, peer_value=padded),
    ]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, FFN, bias=False), nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x_TC: Tensor) -> Tensor:
        return x_TC + self.down(F.silu(self.up(self.norm(x_TC))))


class _Stage:
    def __init__(self, blocks: nn.Module, inputs: list[Tensor], *, last: bool) -> None:
        self.blocks, self.inputs, self.last = blocks, inputs, last

    def forward(self, micro_batch: int, x_tC: Tensor | None, /) -> Tensor:
        y = self.blocks(self.inputs[micro_batch] if x_tC is None else x_tC)
        return _loss(y, self.inputs[micro_batch]) if self.last else y


def _loss(y_TC: Tensor, target_TC: Tensor) -> Tensor:
    """Squares of what a target is not zero for; it is zero in padding only."""
    return ((y_TC - target_TC.roll(1, -1)) * (target_TC != 0)).square().sum()


def _measure(rank: int, ranks: int, sizes: list[int]) -> tuple[list[float], list[float], int]:
    """Seconds of every round, of ours and of torch's, and the bytes that this rank sent in a step of ours."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    torch.manual_seed(rank)
    blocks = nn.Sequential(*(_Block() for _ in range(LAYERS // ranks)))
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(size, WIDTH, generator=generator) for size in sizes]
    padded = torch.cat([F.pad(x_TC, (0, 0, 0, CAPACITY - len(x_TC))) for x_TC in inputs])
    schedule, ledger = PipelineSchedule("1f1b", ranks), ByteLedger()
    links = links_of(schedule, rank, Moment())
    executor = PipelineExecutor(schedule, rank, links)
    stages = {rank: _Stage(blocks, inputs, last=rank == ranks - 1)}
    activations = Activations(tuple(sizes), WIDTH, torch.float32, torch.device("cpu"))
    theirs = Schedule1F1B(
        PipelineStage(blocks, rank, ranks, torch.device("cpu")), len(sizes), loss_fn=_loss, scale_grads=False
    )

    def our_step() -> None:
        executor.run(stages, activations)

    def their_step() -> None:
        first = (padded,) if rank == 0 else ()
        last: dict[str, Any] = {"target": padded, "losses": []} if rank == ranks - 1 else {}
        theirs.step(*first, **last)

    times: dict[Any, list[float]] = {our_step: [], their_step: []}
    with listening(links, ledger):
        for number in range(ROUNDS + 1):
            gradients = []
            for step in (our_step, their_step) if number % 2 else (their_step, our_step):
                blocks.zero_grad(set_to_none=False)
                dist.barrier()
                started = time.monotonic()
                step()
                dist.barrier()
                times[step].append(time.monotonic() - started)
                gradients.append([p.grad.clone() for p in blocks.parameters() if p.grad is not None])
            for one, other in zip(*gradients, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item())
    sent = sum(ledger.take().values()) // (ROUNDS + 1)
    return times[our_step][1:], times[their_step][1:], sent  # the first round warms up

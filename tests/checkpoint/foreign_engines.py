"""Unmodified engines of DeepSpeed that load a checkpoint and go on: the judges of what is written for them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.checkpoint.foreign_saves import Case, engine_of, import_deepspeed, live_state, save_deepspeed, states_of

MORE_STEPS = 3


class Job(NamedTuple):
    """What an engine is to load."""

    case: Case
    """How the engine is made."""
    directory: str
    universal: bool = False


class Outcome(NamedTuple):
    """What an engine held after loading, and what it did then."""

    live: dict[str, Tensor]
    """Masters and states of the optimizer."""
    module: dict[str, Tensor]
    """Buffers and frozen weights."""
    settings: list[dict[str, Any]]
    """Of the groups."""
    counters: tuple[int, int, int]
    scheduler: dict[str, Any]
    client: dict[str, Any]
    losses: list[float]
    """Of further steps, in which all ranks see the same batch: independent of their number up to rounding."""


def continue_jobs(rank: int, ranks: int, jobs: Sequence[Job]) -> list[Outcome]:
    """Load every job and train on."""
    deepspeed = import_deepspeed(0)
    return [_continue(deepspeed, job) for job in jobs]


def save_and_continue(rank: int, ranks: int, folder: str, cases: Sequence[Case]) -> list[Outcome]:
    """Train and save every case in ``folder`` under its name, load it with another engine, and train on."""
    save_deepspeed(rank, ranks, folder, cases)
    return continue_jobs(rank, ranks, [Job(case, f"{folder}/{case.name}") for case in cases])


def _continue(deepspeed: Any, job: Job) -> Outcome:
    engine = engine_of(deepspeed, job.case, checkpoint={"load_universal": job.universal})
    path, client = engine.load_checkpoint(job.directory)
    assert path is not None
    live = live_state(engine, states_of(job.case), job.case.stage)
    settings = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.optimizer.param_groups]
    counters = (engine.global_steps, engine.global_samples, engine.skipped_steps)
    scheduler = dict(engine.lr_scheduler.state_dict())
    with deepspeed.zero.GatheredParameters([engine.module.frozen.weight]):
        module = {"frozen.weight": engine.module.frozen.weight.detach().clone()}
    module |= {name: tensor.clone() for name, tensor in engine.module.named_buffers()}
    tokens = torch.Generator().manual_seed(77)
    losses = []
    for _ in range(MORE_STEPS):
        loss = engine(torch.randint(13, (2, 3), generator=tokens))
        losses.append(loss.item())
        engine.backward(loss)
        engine.step()
    kept = {key: client[key] for key in ("iteration", "random", "evermesh") if key in client}
    return Outcome(live, module, settings, counters, scheduler, kept, losses)

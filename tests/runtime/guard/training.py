"""Small runs whose data, gradients or parameters go bad at given places."""

import dataclasses
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch

from evermesh.runtime import TrainConfig
from evermesh.runtime.data import Batch
from evermesh.runtime.micro_batch import LocalBatch, LocalMicroBatch
from evermesh.runtime.trainer import Trainer

MODEL = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 48}
SPIKES = {"window": 16, "armed_after": 8}


def config_of(corpus: Path, layout: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
    """Twenty-odd steps of some ten sequences each; the guard looks from the ninth on."""
    values: dict[str, Any] = {
        "model": MODEL,
        "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 1500},
        "layout": {"capacity": 600} | (layout or {}),
        "optimizer": {"warmup_steps": 2},
        "checkpoint": {"every": None},
        "guard": {"spikes": SPIKES},
        "dtype": "float64",
        "steps": 24,
    }
    return TrainConfig.model_validate(values | changes)


@dataclasses.dataclass
class Run:
    """What a rank has seen."""

    committed: list[Batch]
    skipped: dict[int, Batch]
    """By step."""
    set_aside: list[str]
    waiting: list[str]
    parameters: bytes
    """All bits of those that this rank holds."""


def recorded(trainer: Trainer) -> Run:
    """Train to the end, and tell what happened."""
    run = Run([], {}, [], [], b"")
    train_step = trainer.train_step

    def watched(batch: Any) -> Any:
        outcome = train_step(batch)
        if outcome.committed:
            run.committed.append(batch.batch)
        else:
            run.skipped[trainer.progress.step] = batch.batch
        return outcome

    trainer.train_step = watched  # type: ignore[method-assign]
    trainer.fit()
    retries = trainer.guard.retries
    run.set_aside = [sequence.identity for sequence in retries.set_aside]
    run.waiting = [sequence.identity for group in retries.groups for sequence in group.sequences]
    run.parameters = b"".join(p.detach().numpy().tobytes() for p in trainer.built.model.parameters())
    return run


def poison(trainer: Trainer, steps: Collection[int], sequences: Collection[str] = (), factor: float = 1e4) -> None:
    """Multiply the loss by ``factor``: of all tokens in some steps, and of some sequences whenever they are trained."""
    accumulate = trainer.runner.accumulate

    def poisoned(batch: LocalBatch) -> Any:
        bad = [trainer.progress.step in steps or name in sequences for name in batch.identities]
        parts = tuple(_poisoned(part, bad, factor) for part in batch.micro_batches)
        return accumulate(dataclasses.replace(batch, micro_batches=parts))

    trainer.runner.accumulate = poisoned  # type: ignore[method-assign]


def _poisoned(part: LocalMicroBatch, bad: list[bool], factor: float) -> LocalMicroBatch:
    factors = [
        torch.full((sum(stop - start for start, stop in piece.ranges),), factor if bad[piece.sequence] else 1.0)
        for piece in part.plan.pieces
    ]
    return dataclasses.replace(part, counts_T=part.counts_T * torch.cat([torch.ones(0), *factors]))


def feed_with(trainer: Trainer, batches: Iterable[Batch]) -> None:
    """Let ``trainer`` draw these batches, one after the other, then its own."""
    given = iter(batches)
    draw = trainer.sampler.next_batch

    def next_batch(**options: Any) -> Batch:
        batch = next(given, None)
        return draw(**options) if batch is None else dataclasses.replace(batch, num_again=0)

    trainer.sampler.next_batch = next_batch  # type: ignore[method-assign]

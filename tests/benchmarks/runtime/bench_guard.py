"""What the step guard costs per step, what a probe adds to a step, and how fast copies are hashed, on one process.

All times are of the processor, of the thread that trains: they hold beside other work.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from evermesh.parallelism.tensor import Cut
from evermesh.runtime.data import Batch, SequenceRef
from evermesh.runtime.guard import GuardConfig
from evermesh.runtime.guard.replicas import replicas_of
from evermesh.runtime.guard.step_guard import StepGuard
from evermesh.runtime.parameter_set import Owners, ParameterSet
from evermesh.runtime.state import Progress
from evermesh.runtime.trainer import Trainer
from tests.benchmarks.harness import Row, exact_row, paired_row
from tests.runtime.conftest import make_corpus
from tests.runtime.guard.training import config_of

LAYERS, STEPS = 8, 12
HASHED_BYTES = 1 << 28


def run() -> list[Row]:
    """The figures of decision 0045."""
    with tempfile.TemporaryDirectory() as name:
        corpus = make_corpus(Path(name))
        plain, probed = (_step_seconds(corpus, probe) for probe in (None, {"every": 1}))
    what = f"a step in which one block of {LAYERS} is computed twice"
    return [
        exact_row("step guard, window of 64, nothing waits", _judge_us(0), "us per step"),
        exact_row("step guard, window of 64, 20,000 sequences wait", _judge_us(20_000), "us per step"),
        paired_row(what, probed, "s", peer="the same step without", peer_values=plain),
        exact_row("hash of parameters that ranks hold alike", HASHED_BYTES / _seconds(_hashing()) / 1e9, "GB/s"),
    ]


def _judge_us(waiting: int) -> float:
    guard = StepGuard(GuardConfig(), 10, Progress(), seed=0, steps=10**6)
    batch = Batch(tuple(SequenceRef(0, number, 0, 10, 10) for number in range(waiting)))
    for step in range(1, 65):
        guard.judge(step, 2.0 + step % 7 / 100, 1.0, batch)
    if waiting:
        guard.retries.failed(10**5, batch)

    def thousand() -> None:
        for step in range(100, 1100):
            assert guard.judge(step, 2.0 + step % 7 / 100, 1.0, batch).commits

    return _seconds(thousand) * 1e3


def _step_seconds(corpus: Path, probe: dict[str, int] | None) -> list[float]:
    """Of every step but the first two, the same batches in both runs."""
    model = {"hidden": 256, "layers": LAYERS, "heads": 8, "kv_heads": 4, "ffn": 512}
    values: dict[str, Any] = {"model": model, "dtype": "float32", "steps": STEPS, "guard": {"probe": probe}}
    trainer, seconds = Trainer(config_of(corpus, **values)), []
    step = trainer.train_step

    def timed(batch: Any) -> Any:
        began_s = time.thread_time()
        outcome = step(batch)
        seconds.append(time.thread_time() - began_s)
        return outcome

    trainer.train_step = timed  # type: ignore[method-assign]
    trainer.fit()
    return seconds[2:]


def _hashing() -> Callable[[], object]:
    shape = (HASHED_BYTES // 4 // 1024, 1024)
    held = ParameterSet({"weight": torch.nn.Parameter(torch.randn(shape))}, {"weight": Cut(shape)}, Owners())
    return lambda: replicas_of([held], 0)


def _seconds(work: Callable[[], object], rounds: int = 5) -> float:
    """Median of some rounds."""
    times = []
    for _ in range(rounds):
        began_s = time.thread_time()
        work()
        times.append(time.thread_time() - began_s)
    return statistics.median(times)

"""DeepSpeed under our trainer against our own sharding: time of a step, and memory of a rank, on two gloo ranks.

The same model, batches and plans (from stage 2 on in lock-step). Every round trains with every engine once, in fresh
processes, so that the load of the machine hits all alike and each has its own peak of memory. On CPU nothing is hidden
behind computation and "the host" is where everything is anyway, so this says what the engines cost, not what offload saves.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from evermesh.runtime import StepReport, TrainConfig
from tests.benchmarks.harness import Row, paired_row
from tests.cluster import peak_memory, run_ranks
from tests.runtime.conftest import make_corpus

ROUNDS, STEPS, WARM_UP = 3, 6, 2
OWN = "our own sharding"
ENGINES: dict[str, dict[str, Any] | None] = {
    OWN: None,
    "DeepSpeed, stage 1": {"stage": 1},
    "DeepSpeed, stage 2": {"stage": 2},
    "DeepSpeed, stage 3": {"stage": 3},
    "DeepSpeed, stage 3, states on the host": {"stage": 3, "offload": "optimizer"},
}


class Measured(NamedTuple):
    """One run on one rank."""

    step_s: float
    """Median of the steps behind the warm-up."""
    peak_bytes: int
    """Resident memory at the peak, over that of a process that has imported everything."""
    loss: float
    """Of the last step."""


def run() -> list[Row]:
    """Step time and peak memory of our own sharding, next to every way of the library."""
    with tempfile.TemporaryDirectory() as folder:
        corpus = make_corpus(Path(folder), vocabulary=1000)
        rounds = [{name: _measured(corpus, name) for name in ENGINES} for _ in range(ROUNDS)]
    for measured in rounds:
        losses = [of_engine.loss for of_engine in measured.values()]
        assert max(losses) - min(losses) <= 1e-4 * losses[0], losses
    return [
        paired_row(what, values[OWN], unit, peer=name, peer_values=values[name])
        for what, unit, field in (("time of a step", "s", "step_s"), ("peak memory of a rank", "bytes", "peak_bytes"))
        for values in [{name: [getattr(measured[name], field) for measured in rounds] for name in ENGINES}]
        for name in ENGINES
        if name != OWN
    ]


def _measured(corpus: Path, name: str) -> Measured:
    """The slowest rank's time, the largest rank's memory."""
    results = run_ranks(2, _measure, _config(corpus, name), timeout_s=600)
    return Measured(max(r.step_s for r in results), max(r.peak_bytes for r in results), results[0].loss)


def _config(corpus: Path, name: str) -> TrainConfig:
    layout: dict[str, Any] = {"hdp": 2, "capacity": 1024}
    if (sharding := ENGINES[name]) is not None:
        layout["sharding"] = {"kind": "deepspeed"} | sharding
    return TrainConfig.model_validate(
        {
            "model": {"hidden": 256, "layers": 6, "heads": 8, "kv_heads": 4, "ffn": 704},
            "data": {"sources": [{"kind": "corpus", "path": str(corpus)}], "context": 512, "batch_tokens": 4096},
            "layout": layout,
            "checkpoint": {"every": None},
            "steps": STEPS,
        }
    )


def _measure(rank: int, workers: int, config: TrainConfig) -> Measured:
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    if config.layout.deepspeed is not None:
        import deepspeed  # noqa: F401  # before the measurement: a library that is loaded is no memory of a step
    from evermesh.runtime.trainer import Trainer

    reports: list[StepReport] = []
    times_s: list[float] = []
    with peak_memory() as peak:
        trainer = Trainer(config, report=reports.append, beat=lambda step, step_s, compute_s: times_s.append(step_s))
        trainer.fit()
    return Measured(statistics.median(times_s[WARM_UP:]), peak.num_bytes, reports[-1].loss if reports else 0.0)

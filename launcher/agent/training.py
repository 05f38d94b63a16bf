"""What a training worker runs. The warm process loads this module, and with it torch and the trainer, before it forks."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evermesh.fault.recorder.native import building, tap  # noqa: F401  loaded before any worker is forked
from evermesh.fault.recorder.recorder import Recorder
from evermesh.fault.snapshot.snapshots import Keeping
from evermesh.launcher.agent.expecting import Expecting
from evermesh.launcher.agent.worker import Worker
from evermesh.parallelism.batch_plan import BatchPlan
from evermesh.parallelism.collectives import Point
from evermesh.parallelism.cost import CostModel
from evermesh.parallelism.layout import Layout
from evermesh.parallelism.planner.loading import load_compiled
from evermesh.parallelism.simulator import simulate
from evermesh.runtime import process_group
from evermesh.runtime.config import TrainConfig
from evermesh.runtime.determinism import prepare_environment
from evermesh.runtime.telemetry import StepReport
from evermesh.runtime.trainer import Trainer

if TYPE_CHECKING:
    from evermesh.fault.injection.hook import Injector

# the first optimizer of a process loads much of torch, about a second: done here, it is there before any worker is forked
torch.optim.AdamW([torch.zeros(1)], fused=True)
load_compiled()  # half a second of the first plan


def train(
    worker: Worker,
    *,
    config: dict[str, Any],
    directory: str,
    newest: int | None,
    faults: Sequence[dict[str, Any]] = (),
    failures: int = 0,
    running_s: float = 0.0,
) -> dict[str, Any]:
    """Train until the run ends, is stopped, or the controller asks to stop. Collective over all workers.

    ``newest`` is the step of the newest checkpoint, None without one; ``faults`` are the shots that this run was given when
    it was launched, if it was given any. The controller has seen ``failures`` attempts fail in
    ``running_s`` seconds.
    """
    train_config = TrainConfig.model_validate(config)
    if train_config.deterministic:
        # before the first use of CUDA and NCCL; the warm process, which this one is a copy of, has not used them
        found = prepare_environment()
        worker.log(f"deterministic, with {' '.join(f'{name}={value}' for name, value in found.items())}")
    recorder = _recorder(worker)
    store = worker.store(train_config.timeout_s)
    times = process_group.start(train_config.device, worker.rank, worker.world_size, store, train_config.timeout_s)
    met_s = time.monotonic()
    trainer = Trainer(
        train_config,
        directory=Path(directory),
        resume=newest is not None,
        report=lambda report: _report(worker, trainer, report),
        beat=worker.beat,
        asked=worker.asked,
        faults=_injector(worker, Path(directory), faults) if faults else None,
        keeping=_keeping(worker, newest, failures, running_s),
    )
    _tell_start(trainer, times, time.monotonic() - met_s)
    expecting = Expecting(trainer, worker.send) if worker.rank == 0 and worker.ring is not None else None
    trainer.groups.moment.watch = worker.reach if expecting is None else lambda point: _reach(worker, expecting, point)
    trainer.speeds.told = worker.speeds
    if recorder is not None:
        recorder.follow(trainer.groups.moment)
    result = trainer.fit()
    # only after success: after a failure it would wait for ranks that are gone
    process_group.stop()
    checkpoint = str(result.checkpoint) if result.checkpoint else None
    return {"step": result.step, "reason": result.reason, "checkpoint": checkpoint}


def _reach(worker: Worker, expecting: Expecting, point: Point) -> None:
    worker.reach(point)
    if point == "train":
        expecting.tell()


def _recorder(worker: Worker) -> Recorder | None:
    """What records the collectives of this rank; without room for its ring it trains all the same."""
    if worker.ring is None:
        return None
    try:
        recorder = Recorder(worker.ring)
    except OSError as error:
        worker.log(f"collectives are not recorded: {error}")
        return None
    worker.log(f"collectives are recorded by the tap: {recorder.chosen}")
    return recorder


def _keeping(worker: Worker, newest: int | None, failures: int, running_s: float) -> Keeping | None:
    if worker.keeper is None:
        return None
    return Keeping(worker.keeper, worker.generation, newest, failures, running_s, worker.keepers)


def _injector(worker: Worker, directory: Path, faults: Sequence[dict[str, Any]]) -> "Injector":
    from evermesh.fault.injection import Shot
    from evermesh.fault.injection.hook import Injector

    return Injector([Shot.model_validate(shot) for shot in faults], worker.rank, directory / "events.jsonl")


def _tell_start(trainer: Trainer, times: process_group.StartTimes, trainer_s: float) -> None:
    """On rank 0: what was spent before the first step, apart from each other, for only some of it is ours."""
    text = (
        f"device {times.device_s:.2f} s, process group {times.group_s:.2f} s, model, groups and state {trainer_s:.2f} s"
    )
    trainer.reporter.log("start-up", text, **times._asdict(), trainer_s=trainer_s)


def _report(worker: Worker, trainer: Trainer, report: StepReport) -> None:
    worker.report(json.loads(report.to_json()))
    plan = trainer.plan
    if plan is not None:
        worker.show_plan(lambda: _plan_values(plan, report.step, trainer.config.layout, trainer.cost))


def _plan_values(plan: BatchPlan, step: int, layout: Layout, cost: CostModel) -> dict[str, Any]:
    """The plan, and, where each rank runs a micro-batch at once, when it is predicted to."""
    spans = None if layout.runs_in_waves else [asdict(span) for span in simulate(plan, cost).spans]
    return {"step": step, "plan": json.loads(plan.to_json()), "spans": spans}

"""What the ranks of a training run are to do, and what its directory tells of their progress."""

import json
import os
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from evermesh import checkpoint
from evermesh.checkpoint.directory import read_manifest
from evermesh.checkpoint.errors import CheckpointNotFound
from evermesh.fault.events import read_events
from evermesh.fault.injection import Injection, Shot, Target
from evermesh.launcher.chaos.record import read_injection
from evermesh.launcher.config import JobConfig
from evermesh.launcher.messages import KeeperAt, TrainingWork
from evermesh.launcher.run_directory import Run
from evermesh.parallelism.layout import Layout
from evermesh.runtime.telemetry import StepReport

ENTRY = "evermesh.launcher.agent.training:train"


def training_work(
    run: Run,
    config: JobConfig,
    since_s: float,
    layout: Layout,
    keepers: Sequence[KeeperAt] = (),
    ranks_of: Callable[[str], Sequence[int]] = lambda _: (),
) -> TrainingWork:
    """Train on in this layout from the newest checkpoint or snapshot, or from the beginning where there is none.

    ``since_s`` is when the job was launched, or resumed, with ``config``; ``keepers`` whom ranks may ask for snapshots;
    ``ranks_of`` tells which ranks a node has.
    """
    train, newest = config.train.model_copy(update={"layout": layout}), newest_step(run)
    arguments: dict[str, Any] = {
        "config": train.model_dump(mode="json"),
        "directory": str(run.directory.absolute()),
        "newest": newest,
    }
    injection = read_injection(run)
    if injection is not None:
        arguments["faults"] = [shot.model_dump(mode="json") for shot in _inside(injection, ranks_of)]
    launch = None if train.snapshot is None else launch_of(since_s)
    logs = str(run.logs.absolute())
    return TrainingWork(
        entry=ENTRY, arguments=arguments, logs=logs, launch=launch, keepers=tuple(keepers), records=config.record
    )


def _inside(injection: Injection, ranks_of: Callable[[str], Sequence[int]]) -> list[Shot]:
    """The shots that ranks fire at themselves; those at a node once for each rank that it has now."""
    found: list[Shot] = []
    for shot in injection.shots:
        if not shot.is_inside or shot.victim is None:
            continue
        if shot.victim.of == "node":
            victims = [Target(of="rank", which=rank) for rank in ranks_of(f"node-{shot.victim.which}")]
            found += [shot.model_copy(update={"victim": victim}) for victim in victims]
        else:
            found.append(shot)
    return found


def launch_of(since_s: float) -> str:
    """What keepers know a launch by: a run that is resumed, or made anew in its place, finds nothing of the one before."""
    return f"{since_s:.6f}"


def layout_of_newest(run: Run, given: Layout, since_s: float, remembered: int | None = None) -> Layout:
    """The layout of the newest checkpoint, or snapshot (step ``remembered``); ``given`` where none was made since then.

    So a job that has moved goes on where it was, unless it failed before the new layout has proved itself.
    """
    newest = max(newest_step(run) or 0, remembered or 0)
    events = read_events(run.events) if run.events.is_file() else []
    told = [
        event.fields["layout"]
        for event in events
        if event.kind in ("started", "layout moved") and event.time_s >= since_s and (event.step or 0) < newest
    ]
    return Layout.model_validate(told[-1]) if told else given


def newest_step(run: Run) -> int | None:
    """Step of the newest complete checkpoint; ranks may save others, and remove this one, meanwhile."""
    while (newest := checkpoint.latest(run.checkpoints)) is not None:
        with suppress(CheckpointNotFound):
            return read_manifest(newest).step
    return None


def last_step(run: Run) -> int:
    """The step that was trained last."""
    report = last_report(run)
    return report.step if report else 0


def last_report(run: Run) -> StepReport | None:
    """The report of the step that was trained last."""
    if not run.telemetry.is_file():
        return None
    with run.telemetry.open("rb") as lines:
        whole = deque((line for line in lines if line.endswith(b"\n")), maxlen=1)
    return StepReport.from_json(whole[0]) if whole else None


def drop_unfinished_line(path: Path) -> None:
    """Cut off what a killed writer left, so that the next line does not continue it."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def report_of(values: dict[str, Any]) -> StepReport:
    """The report that rank 0 sent."""
    return StepReport.from_json(json.dumps(values))

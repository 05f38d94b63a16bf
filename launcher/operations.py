"""What the commands do with runs: launch a job, resume a run, and close either with a summary and a picture."""

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console

from evermesh import checkpoint
from evermesh.checkpoint.errors import StoreUnusable
from evermesh.launcher.admission import (
    check_devices,
    check_longest,
    check_place,
    check_store,
    check_topology,
    check_trackers,
    resumed_config,
)
from evermesh.launcher.chaos.record import forget_injection
from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.submission import end_with_this_process
from evermesh.launcher.corpora import open_corpora
from evermesh.launcher.errors import RunAlive, RunUnusable, StoppedAtOnce, WorkersFailed
from evermesh.launcher.following import Follower, JobResult, Watch
from evermesh.launcher.placement.choosing import placed
from evermesh.launcher.placement.ray_here import is_submission
from evermesh.launcher.processes import start_controller, start_controller_apart
from evermesh.launcher.run_directory import Run, RunState
from evermesh.launcher.summary import summary_table
from evermesh.runtime.data.corpus import Corpus
from evermesh.runtime.telemetry import read_telemetry


@dataclass(frozen=True, slots=True)
class Trained:
    """A run after a launch that did not fail."""

    run: Run
    result: JobResult


def launch_job(
    config: JobConfig,
    console: Console,
    *,
    detach: bool = False,
    watch: Watch | None = None,
    prepare: Callable[[Run], None] | None = None,
) -> Trained:
    """Make a run for ``config`` and train it; ``watch`` sees every step and the workers' processes.

    ``prepare`` is called with the run before anything of it is started.

    Returns when it has ended, or with ``detach`` as soon as it has a controller: ``evermesh status`` and ``Client`` find
    it then.

    Raises:
        EvermeshError: of the devices, of the data (nothing was started), or of the workers.
        StoppedAtOnce: by a second signal.
    """
    config = placed(config)
    check_place(config)
    check_topology(config)
    check_trackers(config)
    check_devices(config)
    vocabulary = open_data(config, console)[0].vocabulary
    run = Run.create(config)
    try:
        check_store(run)
    except (StoreUnusable, RunUnusable):
        shutil.rmtree(run.directory)
        raise
    if prepare is not None:
        prepare(run)
    return _train(run, run.config(), vocabulary, Follower(run, console, watch), resume=False, detach=detach)


def resume_job(
    run: Run, console: Console, *, workers: int | None = None, overrides: Sequence[str] = (), detach: bool = False
) -> Trained:
    """Train ``run`` on from its newest checkpoint, on as many workers as asked for; returns as ``launch_job`` does.

    Raises:
        RunAlive: another launcher trains it.
        ResumeRefused: there is nothing left to do, no checkpoint, or a change that would make it another run.
        StoppedAtOnce: by a second signal.
    """
    if run.is_alive():
        raise RunAlive(run.directory, run.state().pid)
    config = placed(resumed_config(run, workers, overrides))
    check_place(config)
    check_topology(config)
    check_trackers(config)
    check_devices(config)
    vocabulary = open_data(config, console)[0].vocabulary
    forget_injection(run)
    return _train(run, config, vocabulary, Follower(run, console), resume=True, detach=detach)


def open_data(config: JobConfig, console: Console) -> list[Corpus]:
    """The corpora of a job, prepared now if they are not there yet, so that no worker waits for another to do it.

    Raises:
        LayoutDoesNotFit: all workers together cannot hold the longest sequence.
        VocabularyTooSmall: the tokenizer has more entries than the model has rows.
        EvermeshError: of the data.
    """
    corpora = open_corpora(config.train.data, console)
    config.train.model.rows(corpora[0].vocabulary)
    check_longest(config, corpora)
    return corpora


def _train(run: Run, config: JobConfig, vocabulary: int, follower: Follower, *, resume: bool, detach: bool) -> Trained:
    console = follower.console
    verb = "resuming" if resume else "training"
    nodes = f" of {config.nodes} nodes" if config.nodes > 1 else ""
    console.print(
        f"{verb} [bold]{run.name}[/] on {config.workers} workers{nodes} in {run.directory}",
        highlight=False,
        soft_wrap=True,
    )
    with run.locked():  # nobody controls it now
        run.write_config(config)
        run.write_state(RunState(state="created", workers=config.workers, attempt=run.state().attempt))
    try:
        result = follower.follow(_controlled(run, detach=detach), until_controlled=detach)
    except WorkersFailed as error:
        error.add_note(_way_on(run, str(error)))
        draw_loss(run, vocabulary, console)
        raise
    except StoppedAtOnce as error:
        error.add_note(_way_on(run))
        raise
    if result.reason != "left":
        draw_loss(run, vocabulary, console)
        console.print(summary_table(run, vocabulary=vocabulary))
        console.print(_closing_line(run, result), highlight=False, soft_wrap=True)
    return Trained(run, result)


def _controlled(run: Run, *, detach: bool) -> subprocess.Popen[bytes] | None:
    """Start the controller; as nobody's child, and None, where Ray would kill it three seconds after this process."""
    if not is_submission():
        return start_controller(run)
    if not detach:
        end_with_this_process()
    start_controller_apart(run)
    return None


def _way_on(run: Run, error: str = "") -> str:
    """What to do with a run that ended too early; an error that names the newest checkpoint is about that."""
    found = checkpoint.checkpoints(run.checkpoints)
    if not found:
        return f"There is no checkpoint yet; start again with: evermesh launch {run.directory / 'job.yaml'}"
    newest = found[-1].path.name
    # one that could not save names it too, as what is left
    if newest not in error.replace(f"the newest is {newest}", ""):
        return f"The newest checkpoint is {newest}; go on from there with: evermesh resume {run.directory}"
    if len(found) == 1:
        return f"There is no checkpoint but {newest}; start again with: evermesh launch {run.directory / 'job.yaml'}"
    return f"To go on from {found[-2].path.name}, move {newest} out of {run.checkpoints} and resume the run again."


def _closing_line(run: Run, result: JobResult) -> str:
    if result.reason == "finished":
        return f"[green]finished[/]: {result.step} steps; loss over steps: {run.loss_png}"
    if not result.checkpoint:
        return f"[yellow]stopped[/] before the first step. {_way_on(run)}"
    why = "stop_at" if result.reason == "stop_at" else "as asked"
    return f"[yellow]stopped[/] after step {result.step} ({why}); go on with: evermesh resume {run.directory}"


def draw_loss(run: Run, vocabulary: int | None, console: Console) -> None:
    """Write the picture of the loss, if there is any; a full disk costs the picture, and nothing else."""
    from evermesh.fault.events import read_events
    from evermesh.launcher.plots import loss_png, marks

    reports = read_telemetry(run.telemetry) if run.telemetry.is_file() else []
    if not reports:
        return
    events = read_events(run.events) if run.events.is_file() else []
    new = run.loss_png.with_suffix(".new")
    try:
        loss_png(reports, marks(events, reports), new, title=f"run {run.name}", vocabulary=vocabulary)
        os.replace(new, run.loss_png)
    except OSError as error:
        new.unlink(missing_ok=True)
        console.print(f"[yellow]no picture of the loss[/]: {error}", highlight=False, soft_wrap=True)

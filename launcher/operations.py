"""What the commands do with runs: launch a job, resume a run, and close either with a summary and a picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as FileProgress

from evermesh import checkpoint
from evermesh.launcher.attempt import AttemptResult, run_attempt
from evermesh.launcher.config import JobConfig
from evermesh.launcher.errors import ResumeRefused, RunAlive
from evermesh.launcher.job_file import load_job
from evermesh.launcher.run_directory import Run
from evermesh.launcher.summary import summary_table
from evermesh.parallelism.errors import EvermeshError, LayoutDoesNotFit
from evermesh.runtime.data.corpus import Corpus
from evermesh.runtime.telemetry import read_telemetry

_FIXED = ("model", "data", "seed", "dtype")
"""Parts of ``train`` that a run keeps for life: its weights and its order of data depend on them."""
_PLACES = {"path", "cache"}
"""Where data lies may change; that it is the same data is checked against the checkpoint."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A run after an attempt that did not fail."""

    run: Run
    result: AttemptResult


def launch_job(config: JobConfig, console: Console) -> Trained:
    """Make a run for ``config`` and train it.

    Raises:
        EvermeshError: of the data (nothing was started), or of the workers.
    """
    vocabulary = open_data(config, console)[0].vocabulary
    run = Run.create(config)
    return _train(run, run.config(), vocabulary, console, resume=False)


def resume_job(run: Run, console: Console, *, workers: int | None = None, overrides: Sequence[str] = ()) -> Trained:
    """Train ``run`` on from its newest checkpoint, on as many workers as asked for.

    Raises:
        RunAlive: another launcher trains it.
        ResumeRefused: there is nothing left to do, no checkpoint, or a change that would make it another run.
    """
    if run.is_alive():
        raise RunAlive(run.directory, run.state().pid)
    config = resumed_config(run, workers, overrides)
    vocabulary = open_data(config, console)[0].vocabulary
    return _train(run, config, vocabulary, console, resume=True)


def open_data(config: JobConfig, console: Console) -> list[Corpus]:
    """The corpora of a job, prepared now if they are not there yet, so that no worker waits for another to do it.

    Raises:
        LayoutDoesNotFit: all workers together cannot hold the longest sequence.
        EvermeshError: of the data.
    """
    from evermesh.runtime.data import open_sources

    columns = (TextColumn("preparing data"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with FileProgress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task: Any = None

        def show(done: int, total: int, name: str) -> None:
            nonlocal task
            task = progress.add_task(name, total=total) if task is None else task
            progress.update(task, completed=done, total=total)

        corpora = open_sources(config.train.data, progress=show)
    _check_longest(config, corpora)
    return corpora


def _check_longest(config: JobConfig, corpora: Sequence[Corpus]) -> None:
    layout, context = config.train.layout, config.train.data.context
    longest = min(context, max(int(corpus.lengths.max()) for corpus in corpora))
    if longest > layout.hdp * layout.capacity:
        raise LayoutDoesNotFit(
            f"the data has sequences of {longest:,} tokens, but {layout.hdp} HDP ranks with a capacity of "
            f"{layout.capacity:,} tokens hold {layout.hdp * layout.capacity:,}. Set train.layout.capacity to at least "
            f"{-(-longest // layout.hdp):,}, use at least {-(-longest // layout.capacity)} workers, or lower data.context."
        )


def resumed_config(run: Run, workers: int | None, overrides: Sequence[str]) -> JobConfig:
    """The configuration of the next attempt: the run's own, without its ``stop_at``, with what is asked to change.

    Raises:
        ResumeRefused: the change would make it another run, or leaves nothing to do.
    """
    before = run.config()
    changes = ["train.stop_at=null"]
    if workers is not None:
        hdp = before.train.layout.fitted_to(workers).hdp
        changes += [f"workers={workers}", f"train.layout.hdp={hdp}"]
    after = load_job(run.directory / "job.yaml", [*changes, *overrides])
    _check_same_run(before, after)
    _check_work_left(run, after)
    return after


def _check_same_run(before: JobConfig, after: JobConfig) -> None:
    changed = [f"train.{part}" for part in _FIXED if _content(before, part) != _content(after, part)]
    changed += [key for key in ("name", "runs") if getattr(before, key) != getattr(after, key)]
    if changed:
        raise ResumeRefused(
            f"{', '.join(changed)} cannot change when run {before.name} is resumed. Leave it as it is, or start a new "
            f"run with `evermesh launch`. What may change: --workers, and train.steps, stop_at, checkpoint, layout, "
            f"device, optimizer, cost, timeout_s, max_skipped_steps."
        )


def _content(config: JobConfig, part: str) -> Any:
    return _without_places(config.train.model_dump(mode="json")[part])


def _without_places(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_places(child) for key, child in value.items() if key not in _PLACES}
    return [_without_places(child) for child in value] if isinstance(value, list) else value


def _check_work_left(run: Run, config: JobConfig) -> None:
    found = checkpoint.checkpoints(run.checkpoints)
    newest = next((info for info in found if info.is_latest), None)
    if newest is None:
        raise ResumeRefused(
            f"run {run.name} has no checkpoint in {run.checkpoints}; there is nothing to resume. "
            f"Start again: evermesh launch {run.directory / 'job.yaml'}"
        )
    done, steps, stop_at = newest.step, config.train.steps, config.train.stop_at
    if done >= steps:
        raise ResumeRefused(
            f"run {run.name} has finished: {done} of {steps} steps. To train it longer, set more steps: "
            f"evermesh resume {run.directory} --set train.steps={2 * done}"
        )
    if stop_at is not None and stop_at <= done:
        raise ResumeRefused(
            f"train.stop_at is {stop_at}, but run {run.name} is at step {done} already. Set a later step."
        )


def _train(run: Run, config: JobConfig, vocabulary: int, console: Console, *, resume: bool) -> Trained:
    verb = "resuming" if resume else "training"
    console.print(
        f"{verb} [bold]{run.name}[/] on {config.workers} workers in {run.directory}", highlight=False, soft_wrap=True
    )
    try:
        result = run_attempt(run, config, resume=resume, console=console)
    except EvermeshError:
        draw_loss(run, vocabulary)
        raise
    draw_loss(run, vocabulary)
    console.print(summary_table(run, vocabulary=vocabulary))
    console.print(_closing_line(run, result), highlight=False, soft_wrap=True)
    return Trained(run, result)


def _closing_line(run: Run, result: AttemptResult) -> str:
    if result.reason == "finished":
        return f"[green]finished[/]: {result.step} steps; loss over steps: {run.loss_png}"
    why = "stop_at" if result.reason == "stop_at" else "as asked"
    return f"[yellow]stopped[/] after step {result.step} ({why}); go on with: evermesh resume {run.directory}"


def draw_loss(run: Run, vocabulary: int | None) -> Path | None:
    """Write the picture of the loss, if there is any; returns its path."""
    from evermesh.fault.events import read_events
    from evermesh.launcher.plots import loss_png, marks

    reports = read_telemetry(run.telemetry) if run.telemetry.is_file() else []
    if not reports:
        return None
    events = read_events(run.events) if run.events.is_file() else []
    loss_png(reports, marks(events, reports), run.loss_png, title=f"run {run.name}", vocabulary=vocabulary)
    return run.loss_png

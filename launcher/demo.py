"""The demo: the main job end to end, and the proof that what was promised happened.

Every check reads what the trainer wrote down (``telemetry.jsonl``), not what was printed.
"""

import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from evermesh.fault.events import read_events
from evermesh.launcher.commands.data import print_stats
from evermesh.launcher.config import JobConfig
from evermesh.launcher.errors import DemoFailed
from evermesh.launcher.job_file import load_job
from evermesh.launcher.operations import launch_job, open_data, resume_job
from evermesh.launcher.plots import loss_text, marks
from evermesh.launcher.progress import duration
from evermesh.launcher.run_directory import Run
from evermesh.runtime.data import Corpus, Sampler
from evermesh.runtime.telemetry import StepReport, read_telemetry

_MIN_GAIN = 1.0
"""Nats below the uniform guess that count as clearly below."""
_MAX_JUMP = 0.5
"""Nats by which the loss may differ before and after the resume; losing the weights costs more than that."""
_WINDOW = 3
"""Steps that a loss is averaged over: batches differ."""


@dataclass(frozen=True, slots=True)
class Check:
    """One promise of the demo and what was found."""

    promise: str
    found: str
    holds: bool


def quickstart() -> Path:
    """The job file of the demo, which the package and the checkout keep in the same place."""
    return Path(__file__).resolve().parents[1] / "deploy" / "jobs" / "quickstart.yaml"


def run_demo(console: Console, *, runs: Path, resume_workers: int) -> int:
    """Prepare, launch, stop, resume on other workers, check; returns the exit code of a stop by Ctrl-C, else 0.

    Raises:
        DemoFailed: a check does not hold; the table of all checks has been printed.
    """
    started_s = time.monotonic()
    config = load_job(quickstart(), [f"runs={runs}"])
    console.rule("1. prepare the corpus", align="left")
    corpora = open_data(config, console)
    print_stats(corpora[0], config.train.data.context, console)
    prepared_s = time.monotonic()
    stop_at = config.train.stop_at or config.train.steps
    console.rule(f"2. train on {config.workers} workers up to step {stop_at}; one of them is killed", align="left")
    first = launch_job(config, console, watch=_Killer(rank=config.workers // 2, step=stop_at - 3))
    if first.result.exit_code:
        return first.result.exit_code
    console.rule(f"3. resume on {resume_workers} workers", align="left")
    second = resume_job(first.run, console, workers=resume_workers)
    if second.result.exit_code:
        return second.result.exit_code
    console.rule("4. check what was written down", align="left")
    found = checks(first.run, config, corpora)
    console.print(_table(found))
    _print_loss(first.run, console)
    took = f"prepared in {duration(prepared_s - started_s)}, trained in {duration(time.monotonic() - prepared_s)}"
    console.print(f"{took}, {duration(time.monotonic() - started_s)} in all", highlight=False)
    _raise_failed(found)
    return 0


def checks(run: Run, config: JobConfig, corpora: Sequence[Corpus]) -> list[Check]:
    """What the demo promises, held against the telemetry of ``run``."""
    reports = read_telemetry(run.telemetry)
    stop_at = config.train.stop_at or config.train.steps
    return [
        _every_step(reports, config.train.steps),
        _killed_worker(run),
        _two_numbers_of_workers(reports, stop_at),
        _all_ring_sizes(reports, config.workers),
        _uneven_micro_batches(reports),
        _loss_fell(reports, corpora[0].vocabulary),
        _loss_is_continuous(reports, stop_at),
        _same_batches(reports, Sampler(corpora, config.train.data, config.train.seed)),
    ]


class _Killer:
    """Kills a worker once, after a step."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step
        self._done = False

    def __call__(self, report: StepReport, processes: Mapping[int, int]) -> None:
        if report.step == self.step and not self._done:
            self._done = True
            os.kill(processes[self.rank], signal.SIGKILL)


def _killed_worker(run: Run) -> Check:
    promise = "after a worker was killed the run went on where it was, and steps trained again have the same losses"
    kinds = [event.kind for event in read_events(run.events)]
    losses: dict[int, list[float]] = {}
    for line in run.telemetry.read_text().splitlines():
        report = StepReport.from_json(line)
        losses.setdefault(report.step, []).append(report.loss)
    again = {step: found for step, found in losses.items() if len(found) > 1}
    same = all(len(set(found)) == 1 for found in again.values())
    steps = f"steps {', '.join(map(str, again))} trained again, losses {'equal' if same else 'differ'}"
    found = steps if again else "no step was lost: the newest was in memory" if "restarted" in kinds else "it was not"
    return Check(promise, found, "restarted" in kinds and same)


def _every_step(reports: Sequence[StepReport], steps: int) -> Check:
    done = sum(report.committed for report in reports)
    holds = [report.step for report in reports] == list(range(1, steps + 1)) and done == steps
    return Check(f"steps 1 to {steps} were trained, none skipped", f"{len(reports)} steps, {done} committed", holds)


def _two_numbers_of_workers(reports: Sequence[StepReport], stop_at: int) -> Check:
    before = {report.workers for report in reports if report.step <= stop_at}
    after = {report.workers for report in reports if report.step > stop_at}
    found = f"{sorted(before)} up to step {stop_at}, {sorted(after)} after it"
    return Check(
        "the run went on with another number of workers", found, len(before) == len(after) == 1 and before != after
    )


def _all_ring_sizes(reports: Sequence[StepReport], workers: int) -> Check:
    sizes = sorted({size for report in reports for size in report.plan.ring_sizes})
    wanted = list(range(1, workers + 1))
    return Check(f"rings of {', '.join(map(str, wanted))} ranks occurred", f"rings of {sizes}", sizes == wanted)


def _uneven_micro_batches(reports: Sequence[StepReport]) -> Check:
    uneven = [report for report in reports if len(set(report.plan.micro_batches)) > 1]
    example = f", at step {uneven[0].step}: {list(uneven[0].plan.micro_batches)}" if uneven else ""
    found = f"in {len(uneven)} of {len(reports)} steps{example}"
    return Check("ranks ran different numbers of micro-batches in one step", found, bool(uneven))


def _loss_fell(reports: Sequence[StepReport], vocabulary: int) -> Check:
    guess, first, last = math.log(vocabulary), reports[0].loss, _mean_loss(reports[-_WINDOW:])
    found = f"{first:.3f} to {last:.3f} (mean of {_WINDOW} steps), uniform guess {guess:.3f}"
    return Check(f"the loss fell by more than {_MIN_GAIN} below ln(vocabulary)", found, last < guess - _MIN_GAIN)


def _loss_is_continuous(reports: Sequence[StepReport], stop_at: int) -> Check:
    before = _mean_loss([report for report in reports if stop_at - _WINDOW < report.step <= stop_at])
    after = _mean_loss([report for report in reports if stop_at < report.step <= stop_at + _WINDOW])
    found = f"{before:.3f} before, {after:.3f} after (mean of {_WINDOW} steps)"
    return Check("the loss is continuous across the resume", found, abs(after - before) < _MAX_JUMP)


def _mean_loss(reports: Sequence[StepReport]) -> float:
    return sum(report.loss for report in reports) / len(reports) if reports else math.nan


def _same_batches(reports: Sequence[StepReport], sampler: Sampler) -> Check:
    different = [report.step for report in reports if report.batch != sampler.next_batch().digest]
    found = f"steps {different} differ" if different else f"all {len(reports)} are equal"
    return Check("the batches are those of an uninterrupted run", found, bool(reports) and not different)


def _table(found: Sequence[Check]) -> Table:
    table = Table("", "promise", "found in telemetry.jsonl", box=None, header_style="bold", pad_edge=False)
    for check in found:
        table.add_row("[green]yes[/]" if check.holds else "[red]NO[/]", check.promise, check.found)
    return table


def _print_loss(run: Run, console: Console) -> None:
    reports = read_telemetry(run.telemetry)
    console.print()
    picture = loss_text(reports, marks(read_events(run.events), reports), width=min(console.width, 100))
    console.print(picture, highlight=False, markup=False)
    console.print(f"the same as a picture: {run.loss_png}", highlight=False, soft_wrap=True)


def _raise_failed(found: Sequence[Check]) -> None:
    failed = [check for check in found if not check.holds]
    if failed:
        lines = "; ".join(f"{check.promise}: {check.found}" for check in failed)
        raise DemoFailed(f"{len(failed)} of {len(found)} checks do not hold: {lines}. The table above has all of them.")

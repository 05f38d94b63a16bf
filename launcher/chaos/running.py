"""Runs a job with faults, beside it perhaps one without, and judges what became of it."""

import signal
from contextlib import ExitStack

from rich.console import Console

from evermesh.fault.errors import ScheduleInvalid
from evermesh.fault.injection import Injection, RunShape
from evermesh.launcher.chaos.comparing import compare
from evermesh.launcher.chaos.conductor import Conductor
from evermesh.launcher.chaos.record import write_injection
from evermesh.launcher.chaos.report import ChaosReport, Comparison, FaultReport, History, fault_reports
from evermesh.launcher.chaos.victims import leaked_memory, orphans, processes_of
from evermesh.launcher.config import JobConfig
from evermesh.launcher.controller.journal import read_journal
from evermesh.launcher.errors import ControllerLost, Interrupted, StoppedAtOnce, WorkersFailed
from evermesh.launcher.operations import launch_job
from evermesh.launcher.run_directory import Run

_ORPHANS_AFTER_S = 5.0
"""How long processes may take to end when their job has."""
_ENDED = (WorkersFailed, StoppedAtOnce, ControllerLost)
"""How a job ends that did not do what it was to do."""


def shape_of(config: JobConfig) -> RunShape:
    """What a schedule for this job must fit."""
    steps = min(config.train.steps, config.train.stop_at or config.train.steps)
    return RunShape(config.workers, config.nodes, steps, config.train.checkpoint.every)


def run_chaos(config: JobConfig, injection: Injection, console: Console, *, compared: bool) -> ChaosReport:
    """Train ``config`` with these faults, then, to compare, without; returns when nothing of either is left.

    Raises:
        ScheduleInvalid: the job is not on this machine, and neither would the faults be.
        Interrupted: somebody has stopped it.
        EvermeshError: the job cannot be started at all, or the clean one failed.
    """
    _check_reach(config, injection)
    with _Job(config, injection) as job:
        code = job.launch(console)
        if job.was_stopped:
            raise Interrupted("the job was stopped before its faults were over; there is no report", code)
    left, memory = _leftovers(job.run)
    history = History.of(job.run, job.conductor.controllers)
    faults = fault_reports(injection, history)
    problems = _problems(injection, code, faults, [*left, *memory])
    comparison = None
    if compared and code == injection.schedule.expect_exit == 0:
        try:
            comparison = compare(job.run, _clean_run(config, console))
            problems += _differences(injection, comparison, config.train.dtype)
        except _ENDED as error:  # what is known of the faults is not lost for that
            problems.append(f"the run without faults ended with {error.exit_code}: {error}")
    return ChaosReport(
        run=str(job.run.directory),
        passed=not problems,
        problems=tuple(problems),
        exit_code=code,
        expected_exit=injection.schedule.expect_exit,
        faults=faults,
        attempts=history.attempts,
        steps=len(history.reports),
        steps_lost=history.steps_trained - len(history.reports),
        wall_s=history.wall_s,
        goodput=history.goodput,
        orphans=tuple(left),
        leaked_memory=tuple(memory),
        parameters=history.parameters,
        comparison=comparison,
    )


class _Job:
    """A job with faults, from the moment its run exists. A context manager."""

    def __init__(self, config: JobConfig, injection: Injection) -> None:
        self._config, self._injection = config, injection
        self._stack = ExitStack()
        self.run: Run
        self.conductor: Conductor

    def __enter__(self) -> "_Job":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def launch(self, console: Console) -> int:
        """Train it to its end; returns the exit code."""
        try:
            return launch_job(self._config, console, prepare=self._prepare).result.exit_code
        except _ENDED as error:
            _say(console, f"the job ended with {error.exit_code}: {error}")
            if isinstance(error, WorkersFailed) and error.traceback:
                _say(console, error.traceback.rstrip())
            return error.exit_code

    @property
    def was_stopped(self) -> bool:
        """Whether somebody has asked the job to end, and no fault did."""
        asked = any(entry.kind == "stop" for entry in read_journal(self.run.journal))
        return asked and not self.conductor.asked_launcher

    def _prepare(self, run: Run) -> None:
        write_injection(run, self._injection)
        self.run = run
        self.conductor = self._stack.enter_context(Conductor(run, self._injection))


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _check_reach(config: JobConfig, injection: Injection) -> None:
    outside = [shot for shot in injection.shots if not shot.is_inside]
    if config.on != "local" and outside:
        text = f"{outside[0]} is done from outside, to processes of this machine, but the job is on {config.on}"
        raise ScheduleInvalid(
            [(f"faults.{outside[0].of_fault}", f"{text}. Hit ranks at a step, or run it with --on local")]
        )


def _clean_run(config: JobConfig, console: Console) -> Run:
    console.print("\nthe same job without faults:", highlight=False)
    trained = launch_job(config.model_copy(update={"name": f"{config.name}-clean"}), console)
    if trained.result.exit_code:
        raise Interrupted("the clean run was stopped; there is nothing to compare with", trained.result.exit_code)
    return trained.run


def _leftovers(run: Run) -> tuple[list[str], list[str]]:
    """What is left of a run that has ended: processes, which are ended now, and shared memory."""
    left = orphans(run, _ORPHANS_AFTER_S)
    for process in processes_of(run):
        process.send_signal(signal.SIGKILL)
    return left, leaked_memory(run)


def _problems(injection: Injection, code: int, faults: tuple[FaultReport, ...], left: list[str]) -> list[str]:
    """Why the run has not passed."""
    found = []
    if code != injection.schedule.expect_exit:
        found.append(f"the job ended with {code}, not with {injection.schedule.expect_exit}")
    found += [f"not injected: {fault.fault}" for fault in faults if fault.outcome == "not injected"]
    found += [f"left behind: {one}" for one in left]
    return found


def _differences(injection: Injection, comparison: Comparison, dtype: str) -> list[str]:
    """Why it has not passed beside a run without faults."""
    allowed = ("bit-equal", "within 1e-9") if dtype == "float64" else ("bit-equal",)
    if comparison.verdict in allowed or any(shot.alters_numbers for shot in injection.shots):
        return []
    where = f", losses from step {comparison.differing_step} on" if comparison.differing_step else ""
    return [f"the run is {comparison.verdict} from one without faults{where}"]

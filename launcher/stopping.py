"""Ending a job from elsewhere."""

import os
import signal
import time
from contextlib import suppress

from evermesh.launcher import registry
from evermesh.launcher.client import Client
from evermesh.launcher.errors import ControllerLost, RunNotFound
from evermesh.launcher.finding import FoundJob
from evermesh.launcher.following import DEAD_AFTER_S
from evermesh.launcher.run_directory import Run
from evermesh.launcher.succession.office import election_s
from evermesh.launcher.summary import last_report

_LOOK_S = 0.05


def stop_job(job: FoundJob, *, at_once: bool, grace_s: float | None, wait: bool) -> str:
    """End ``job``; returns what to tell about it.

    Raises:
        RunNotFound: it does not live.
        ControllerLost: its controller does not answer.
    """
    if job.run is None:
        return _stop_script(job, at_once=at_once, wait=wait)
    if not job.run.is_alive() and job.run.state().state != "running":
        raise RunNotFound(f"run {job.name} does not live: it is {job.run.status()}.")
    Client(job.run).stop(signal.SIGTERM, at_once=at_once, grace_s=grace_s)
    if not wait:
        return f"asked {job.name} to stop; evermesh status {job.directory} tells when it has"
    _wait_ended(job.run)
    return _told(job.run)


def _wait_ended(run: Run) -> None:
    """Return when the job has ended and its controller is gone: the run can be resumed then."""
    alive_s, dead_after_s = time.monotonic(), DEAD_AFTER_S + election_s(run.config())
    while run.is_alive() or run.state().state == "running":
        if run.is_alive():
            alive_s = time.monotonic()
        elif time.monotonic() - alive_s > dead_after_s:
            raise ControllerLost(
                f"the controller of run {run.name} is gone, and nobody starts it again. Its log: "
                f"{run.logs / 'controller.log'}. Go on with: evermesh resume {run.directory}"
            )
        time.sleep(_LOOK_S)


def _stop_script(job: FoundJob, *, at_once: bool, wait: bool) -> str:
    """A script's supervisor gives its ranks their grace after the first signal, and none after the second."""
    assert job.pid is not None
    started = registry.start_ticks(job.pid)
    for _ in range(2 if at_once else 1):
        with suppress(ProcessLookupError):
            os.kill(job.pid, signal.SIGTERM)
    while wait and started is not None and registry.start_ticks(job.pid) == started:
        time.sleep(_LOOK_S)
    return f"{job.name} has been stopped" if wait else f"asked {job.name} to stop"


def _told(run: Run) -> str:
    report = last_report(run.telemetry)
    step = f" after step {report.step}" if report else " before its first step"
    return f"{run.name}: {run.state().state}{step}; go on with: evermesh resume {run.directory}"

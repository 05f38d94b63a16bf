"""A job that was submitted to Ray ends with its submission: the command that shows it may be killed before it can say so."""

import asyncio
import os
import signal
from contextlib import suppress

import psutil

from evermesh.launcher.controller.limit import Stoppable

_VARIABLE = "EVERMESH_SUBMITTED_BY"
"""Tells a controller which process shows its job: number and start."""
_LOOK_S = 0.5


def end_with_this_process() -> None:
    """Have controllers that this process starts from now on stop their job when it is gone."""
    here = psutil.Process()
    os.environ[_VARIABLE] = f"{here.pid} {here.create_time()}"


async def stop_with_submission(controller: Stoppable, grace_s: float) -> None:
    """Stop the job, as SIGTERM would, when who shows it is gone; return then, or at once where the job may do without."""
    told = os.environ.get(_VARIABLE)
    if told is None:
        return
    pid, _, create_time = told.partition(" ")
    while _lives(int(pid), float(create_time)):
        await asyncio.sleep(_LOOK_S)
    print("the submission is over: stopping", flush=True)
    controller.stop(signal.SIGTERM, at_once=False, grace_s=grace_s)


def _lives(pid: int, create_time: float) -> bool:
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return process.create_time() == create_time and process.status() != psutil.STATUS_ZOMBIE
    return False

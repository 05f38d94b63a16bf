"""Processes beside the job that tell experiment trackers of it: started with the job, and given time at its end."""

import asyncio
import time

from evermesh.launcher.config import JobConfig
from evermesh.launcher.processes import start_tracker
from evermesh.launcher.run_directory import Run, is_held
from evermesh.launcher.tracking.following import FOLDER

_LAST_S = 10.0
"""How long the end of a job waits for them. Whoever takes longer goes on by itself."""
_LOOK_S = 0.05


def begin(run: Run, config: JobConfig) -> None:
    """Start one for every tracker of the job; where one lives, of a controller before this one, the new one ends at once."""
    for number in range(len(config.trackers)):
        start_tracker(run, number)


async def end(run: Run, config: JobConfig) -> None:
    """Wait until all have told what there was, for a while."""
    until_s = time.monotonic() + _LAST_S
    for tracker in config.trackers:
        lock = run.directory / FOLDER / f"{tracker.kind}.lock"
        while is_held(lock) and time.monotonic() < until_s:
            await asyncio.sleep(_LOOK_S)
        if is_held(lock):
            print(f"the tracker {tracker.kind} has not been told all after {_LAST_S:.0f} s; it goes on", flush=True)

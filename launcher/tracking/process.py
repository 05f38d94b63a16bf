"""The process of one tracker of a run."""

import fcntl
import signal
import threading

from evermesh.launcher.errors import RunTracked
from evermesh.launcher.run_directory import Run
from evermesh.launcher.tracking.config import AnyTracker
from evermesh.launcher.tracking.following import FOLDER, Following


def track_run(run: Run, config: AnyTracker) -> int:
    """Pass on what the run tells until it has ended, or until SIGINT or SIGTERM; returns the exit code. Called from the
    main thread.

    Raises:
        RunTracked: another process does it.
    """
    asked = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: asked.set())
    (run.directory / FOLDER).mkdir(exist_ok=True)
    with (run.directory / FOLDER / f"{config.kind}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunTracked(f"another process tells {config.kind} of the run {run.name} already.") from None
        following = Following(run, config, lambda text: print(text, flush=True))
        return 0 if following.follow(asked.is_set) else 1

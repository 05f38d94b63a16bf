"""The faults that a run was given when it was launched: RUN/faults.json. No other run has any."""

import os

from evermesh.fault.events import EventLog
from evermesh.fault.injection import Injection
from evermesh.launcher.run_directory import Run

_FILE = "faults.json"


def write_injection(run: Run, injection: Injection) -> None:
    """Record what is to be injected into ``run``; nothing of it has been started yet."""
    path = run.directory / _FILE
    new = path.with_suffix(".new")
    new.write_text(injection.model_dump_json(indent=1) + "\n")
    os.replace(new, path)
    count = len(injection.shots)
    text = f"{count} fault{'s' * (count != 1)} will be injected into this run, seed {injection.schedule.seed}"
    with EventLog(run.events) as events:
        events.write("faults given", text, step=0, shots=[str(shot) for shot in injection.shots])


def read_injection(run: Run) -> Injection | None:
    """What this run was given; None: nothing."""
    try:
        return Injection.model_validate_json((run.directory / _FILE).read_bytes())
    except FileNotFoundError:
        return None


def forget_injection(run: Run) -> None:
    """Who resumes a run gives it no faults."""
    (run.directory / _FILE).unlink(missing_ok=True)

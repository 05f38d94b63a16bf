"""Training runs on a disk that is too small: one that has nothing in memory, and its resume after making room; and one
that has.

unshare -Urm python -m tests.launcher.filling JOB.yaml MOUNTPOINT ends|goes-on
"""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from evermesh.fault.events import Event, read_events
from evermesh.launcher import Run
from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.jobs import launched
from tests.launcher.test_cli import evermesh

TMPFS_BYTES = 4 << 20
FREE_BYTES = 336 << 10
"""Room for the first checkpoint of 160 kB and what is written beside it, but not for the second."""


def main(job: str, mountpoint: str, what: str) -> None:
    """Print what was said and what the run was like."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "none", mountpoint], check=True)
    ballast = Path(mountpoint) / "ballast"
    ballast.write_bytes(bytes(TMPFS_BYTES - FREE_BYTES))
    print(json.dumps({"ends": _ends, "goes-on": _goes_on}[what](Path(job), ballast)))


def _ends(job: Path, ballast: Path) -> dict[str, Any]:
    failed = evermesh("launch", job, "--set", f"runs={ballast.parent}", "--set", "train.snapshot=off")
    run = Run.open(ballast.parent / "small")
    told = {
        "code": failed.returncode,
        "error": failed.stderr,
        "status": run.status(),
        "checkpoints": sorted(path.name for path in (run.directory / "checkpoints").iterdir()),
        "verified": evermesh("checkpoint", "verify", run.directory).returncode,
        "steps": [report.step for report in read_telemetry(run.telemetry)],
    }
    ballast.unlink()
    resumed = evermesh("resume", run.directory)
    return told | {"resumed": resumed.returncode, "said": resumed.stdout + resumed.stderr}


def _goes_on(job: Path, ballast: Path) -> dict[str, Any]:
    """Only checkpoints go to that disk."""
    endless = ("train.steps=100000", "train.snapshot.every=1", f"train.checkpoint.store={ballast.parent}")
    with launched(job, *endless) as running:

        def events(kind: str) -> list[Event]:
            return [event for event in read_events(running.run.events) if event.kind == kind]

        running.wait(lambda: "checkpoint failed" in running.events and len(events("checkpoint failed")) == 3)
        left = sorted(path.name for path in (ballast.parent / "small").iterdir())
        made = len(events("checkpoint"))
        ballast.unlink()
        running.wait(lambda: len(events("checkpoint")) > made)
        again = [events("checkpoint")[-1].step, events("checkpoint failed")[-1].step]
        running.process.send_signal(signal.SIGTERM)
        code, stdout, _ = running.end()
        return {
            "code": code,
            "said": stdout,
            "left": left,
            "failed": [(event.step, event.fields["in_a_row"], event.text) for event in events("checkpoint failed")],
            "again": again,
            "attempt": running.run.state().attempt,
            "losses": running.losses,
            "verified": evermesh("checkpoint", "verify", ballast.parent / "small").returncode,
        }


if __name__ == "__main__":
    main(*sys.argv[1:])

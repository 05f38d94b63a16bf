"""A training run on a disk that is too small, and its resume after making room.

unshare -Urm python -m tests.launcher.filling JOB.yaml MOUNTPOINT
"""

import json
import subprocess
import sys
from pathlib import Path

from evermesh.launcher import Run
from evermesh.runtime.telemetry import read_telemetry
from tests.launcher.test_cli import evermesh

TMPFS_BYTES = 4 << 20
FREE_BYTES = 336 << 10
"""Room for the first checkpoint of 160 kB and what is written beside it, but not for the second."""


def main(job: str, mountpoint: str) -> None:
    """Print what was said, what the run was like after it failed, and how the resume ended."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={TMPFS_BYTES}", "none", mountpoint], check=True)
    ballast = Path(mountpoint) / "ballast"
    ballast.write_bytes(bytes(TMPFS_BYTES - FREE_BYTES))
    failed = evermesh("launch", job, "--set", f"runs={mountpoint}")
    run = Run.open(Path(mountpoint) / "small")
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
    print(json.dumps(told | {"resumed": resumed.returncode, "said": resumed.stdout + resumed.stderr}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

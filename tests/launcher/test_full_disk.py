"""A full disk in the middle of a run; needs a tmpfs in a user namespace (util-linux ``unshare -Urm``), else it skips."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def can_mount(mountpoint: Path) -> bool:
    """Whether a tmpfs may be mounted in a user namespace here."""
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", str(mountpoint)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_a_run_on_a_full_disk_fails_with_the_numbers_keeps_what_it_had_and_goes_on_after_making_room(
    job_file: Path, tmp_path: Path
) -> None:
    mountpoint = tmp_path / "small-disk"
    mountpoint.mkdir()
    if not can_mount(mountpoint):
        pytest.skip("mounting a tmpfs in a user namespace is not permitted here (unshare -Urm)")
    command = ["unshare", "-Urm", sys.executable, "-m", "tests.launcher.filling", str(job_file), str(mountpoint)]
    told = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
    assert (told["code"], told["status"]) == (1, "failed")
    assert "the checkpoint of step 4 was not saved" in told["error"]
    assert "No space left on device. It needs " in told["error"]
    assert "The newest checkpoint is step-00000002; go on from there with: evermesh resume" in told["error"]
    assert "Traceback" not in told["error"]
    assert (told["checkpoints"], told["verified"]) == (["latest", "step-00000002"], 0)
    assert told["steps"] == [1, 2, 3, 4]
    assert told["resumed"] == 0, told["said"]
    assert "finished: 6 steps" in told["said"]

"""A full disk in the middle of a run; needs a tmpfs in a user namespace (util-linux ``unshare -Urm``), else it skips."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.jobs import clean_losses


def can_mount(mountpoint: Path) -> bool:
    """Whether a tmpfs may be mounted in a user namespace here."""
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", str(mountpoint)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _fill(job_file: Path, mountpoint: Path, what: str) -> dict[str, Any]:
    mountpoint.mkdir()
    if not can_mount(mountpoint):
        pytest.skip("mounting a tmpfs in a user namespace is not permitted here (unshare -Urm)")
    command = ["unshare", "-Urm", sys.executable, "-m", "tests.launcher.filling", str(job_file), str(mountpoint), what]
    told = subprocess.run(command, capture_output=True, check=False, text=True)
    assert told.returncode == 0, told.stderr
    found: dict[str, Any] = json.loads(told.stdout)
    return found


def test_f17_without_memory_a_run_on_a_full_disk_fails_with_the_numbers_keeps_what_it_had_and_goes_on_after_making_room(
    job_file: Path, tmp_path: Path
) -> None:
    told = _fill(job_file, tmp_path / "small-disk", "ends")
    assert (told["code"], told["status"]) == (1, "failed")
    assert "the checkpoint of step 4 was not saved" in told["error"]
    assert "No space left on device. It needs " in told["error"]
    assert "The newest checkpoint is step-00000002; go on from there with: evermesh resume" in told["error"]
    assert "Traceback" not in told["error"]
    assert (told["checkpoints"], told["verified"]) == (["latest", "step-00000002"], 0)
    assert told["steps"] == [1, 2, 3, 4]
    assert told["resumed"] == 0, told["said"]
    assert "finished: 6 steps" in told["said"]


def test_f17_with_its_state_in_memory_a_run_goes_on_while_storage_is_full_and_tries_again_ever_more_rarely(
    job_file: Path, tmp_path: Path
) -> None:
    told = _fill(job_file, tmp_path / "small-disk", "goes-on")
    assert told["code"] == 143
    assert told["attempt"] == 1
    steps, in_a_row, texts = zip(*told["failed"], strict=True)
    assert in_a_row[:3] == (1, 2, 3)
    # the next one that is due, then one is left out; one more where a failure is seen only when the next is due
    assert steps[1] - steps[0] in (2, 4)
    assert steps[2] - steps[1] in (4, 6)
    assert all("No space left on device. It needs " in text for text in texts)
    assert all("is in memory" in text for text in texts)
    assert told["said"].count("was not saved") == len(steps), "it is shown among the steps"
    assert told["left"] == ["latest", "step-00000002"], "nothing unfinished, and the older one is whole"
    assert told["again"][0] > told["again"][1]
    assert told["verified"] == 0
    assert told["losses"] == clean_losses(job_file, 100_000, f"train.stop_at={len(told['losses'])}")

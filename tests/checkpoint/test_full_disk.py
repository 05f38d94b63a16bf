"""A full disk: all ranks raise, the previous checkpoint stays and no temporary directory is left.

One test fills a real tmpfs of 2 MiB, mounted without privileges in a user namespace (util-linux ``unshare -Urm``); where
the kernel forbids that it skips. The other needs nothing: one rank has a limit on the size of its files
(``RLIMIT_FSIZE``), and the system refuses its write.
"""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from evermesh.checkpoint import latest
from tests.checkpoint.filling import TMPFS_BYTES, save_on_rank
from tests.checkpoint.states import load_and_compare, save_step, shard_map
from tests.cluster import run_ranks

LEFT = ["latest", "step-00000001"]


def can_mount(mountpoint: Path) -> bool:
    """Whether this machine lets tests mount file systems."""
    command = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", str(mountpoint)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def test_a_full_disk_is_told_by_all_ranks_and_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    if not can_mount(tmp_path):
        pytest.skip("mounting a tmpfs in a user namespace is not permitted here (unshare -Urm)")
    command = ["unshare", "-Urm", sys.executable, "-m", "tests.checkpoint.filling", str(tmp_path)]
    told = json.loads(subprocess.run(command, capture_output=True, check=True, text=True).stdout.splitlines()[-1])
    assert told["latest"] == "step-00000001"
    assert len(told["answers"]) == 3
    for answer in told["answers"]:
        assert answer["errno"] == errno.ENOSPC
        assert answer["names"] == LEFT
        assert answer["needed"] == shard_map(3).num_bytes
        assert 0 < answer["free"] < TMPFS_BYTES - shard_map(1).num_bytes
        assert "No space left on device" in answer["text"]
        assert f"{answer['needed']:,} bytes and {answer['free']:,} are free" in answer["text"]


def test_a_write_that_one_rank_is_refused_is_told_by_all_ranks(tmp_path: Path) -> None:
    path = save_step(tmp_path, 1)
    answers = run_ranks(4, save_on_rank, str(tmp_path), 2)
    for answer in answers:
        assert (answer["rank"], answer["errno"]) == (2, errno.EFBIG)
        assert answer["names"] == LEFT
        assert "rank 2: OSError: [Errno 27] File too large" in answer["text"]
    assert latest(tmp_path) == path
    load_and_compare(path, 1, 2)

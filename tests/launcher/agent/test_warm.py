"""When the warm process may be forked, and what happens when it may not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evermesh.launcher.agent import warm
from tests.launcher.agent.test_worker_group import running

THREADED = (
    "import threading, time; threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); "
    "print(flush=True); time.sleep(60)"
)
QUIET = "import time; print(flush=True); time.sleep(60)"


@pytest.mark.parametrize(("program", "reason"), [(QUIET, None), (THREADED, "has 2 tasks")])
def test_a_process_with_threads_is_not_forked(program: str, reason: str | None) -> None:
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            found = warm.unfit_to_fork(process.pid)
            assert found is None if reason is None else reason in (found or "")
        finally:
            process.kill()


def test_a_process_that_opened_cuda_is_not_forked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evermesh.launcher.agent.warm.os.readlink", lambda link: "/dev/nvidia0")
    with subprocess.Popen([sys.executable, "-c", QUIET], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            assert "has opened CUDA (/dev/nvidia0)" in (warm.unfit_to_fork(process.pid) or "")
        finally:
            process.kill()


def test_a_process_that_is_gone_is_not_forked() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert "cannot be looked at" in (warm.unfit_to_fork(process.pid) or "")


def test_workers_start_as_fresh_interpreters_and_say_so_where_the_warm_process_is_unfit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm, "unfit_to_fork", lambda pid: "the warm process has 3 tasks")
    with running("succeed", 2, tmp_path) as job:
        outcome = job.until(lambda seen: seen.is_over)
    assert sorted(outcome.done) == [0, 1]
    assert job.group.fresh_because == "the warm process has 3 tasks"


def test_a_long_name_of_the_folder_for_temporary_files_is_no_reason_to_fail(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    program = """
import tempfile
from multiprocessing import util
from evermesh.launcher.agent import warm

if __name__ == "__main__":
    warm.warm_up("evermesh.launcher.agent.warm_process", 1)
    print(tempfile.gettempdir())
    print(util.get_temp_dir())
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py")]
    variables = os.environ | {"TMPDIR": str(folder)}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    temporary, sockets = done.stdout.split()
    assert temporary == str(folder), "all else stays there"
    assert sockets.startswith("/tmp/pymp-")
    assert not Path(sockets).exists(), "nothing is left"

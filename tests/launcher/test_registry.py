"""The list of living jobs: who is on it, and who never was, or is no more."""

import json
import os
import stat
import subprocess
from pathlib import Path

import pytest

from evermesh.launcher import registry


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def only_file() -> Path:
    (file,) = registry.folder().iterdir()
    return file


def rewrite(**fields: object) -> None:
    """Change what the only file says."""
    only_file().write_text(json.dumps(json.loads(only_file().read_text()) | fields))


def test_a_job_is_listed_while_it_lives_and_only_for_its_owner(tmp_path: Path) -> None:
    with registry.register("run", "small", tmp_path / "runs/small", ["evermesh", "launch", "job.yaml"]):
        (found,) = registry.living()
        assert (found.kind, found.name, found.pid) == ("run", "small", os.getpid())
        assert found.directory == str(tmp_path / "runs/small")
        assert found.command == ("evermesh", "launch", "job.yaml")
        assert stat.S_IMODE(only_file().stat().st_mode) == 0o600
    assert registry.living() == []
    assert not list(registry.folder().iterdir())


def test_a_job_whose_process_is_gone_is_taken_off_the_list(tmp_path: Path) -> None:
    process = subprocess.Popen(["true"])
    with registry.register("script", "train.py", tmp_path):
        process.wait()
        rewrite(pid=process.pid)
        assert registry.living() == []
        assert not list(registry.folder().iterdir())


def test_a_zombie_does_not_live() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert registry.start_ticks(process.pid) is None
    process.wait()


def test_another_process_with_the_same_number_does_not_count(tmp_path: Path) -> None:
    with registry.register("script", "train.py", tmp_path):
        rewrite(start_ticks=(registry.start_ticks(os.getpid()) or 0) - 1)
        assert registry.living() == []
        assert not list(registry.folder().iterdir())


def test_the_jobs_of_other_machines_and_containers_are_left_alone(tmp_path: Path) -> None:
    for other in ({"host": "elsewhere"}, {"pid_namespace": "pid:[1]"}):
        with registry.register("script", "train.py", tmp_path):
            rewrite(pid=1, **other)
            assert registry.living() == []
            assert only_file().exists()


def test_a_job_from_before_a_reboot_is_taken_off_the_list(tmp_path: Path) -> None:
    with registry.register("script", "train.py", tmp_path):
        rewrite(boot="an earlier one")
        assert registry.living() == []
        assert not list(registry.folder().iterdir())


def test_half_a_file_is_not_a_job(tmp_path: Path) -> None:
    with registry.register("script", "train.py", tmp_path):
        only_file().write_text('{"kind": "scr')
        assert registry.living() == []


def test_a_folder_that_cannot_be_written_ends_nothing_and_is_said_once(tmp_path: Path, state: Path) -> None:
    (state / "evermesh").write_text("a file where the folder should be")
    said: list[str] = []
    with registry.register("script", "train.py", tmp_path, say=said.append):
        assert registry.living() == []
    (text,) = said
    assert "train.py cannot be listed among the living jobs" in text

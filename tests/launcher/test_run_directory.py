"""Run directories: names, locks, and what a run says about itself."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evermesh.launcher import JobConfig, Run, RunState, load_job
from evermesh.launcher.errors import RunAlive, RunNotFound, RunUnusable
from evermesh.launcher.run_directory import now


@pytest.fixture
def job(job_file: Path) -> JobConfig:
    return load_job(job_file)


def test_a_name_that_is_taken_gets_a_number(job: JobConfig) -> None:
    runs = [Run.create(job) for _ in range(3)]
    assert [run.name for run in runs] == ["small", "small-2", "small-3"]
    assert [run.config().name for run in runs] == ["small", "small-2", "small-3"]


def test_the_latest_run_is_the_one_started_last(job: JobConfig) -> None:
    first, second = Run.create(job), Run.create(job)
    for run in (second, first):
        run.write_state(RunState(state="stopped", workers=2, started=now()))
    assert Run.latest(job.runs) == first
    assert Run.all(job.runs) == [second, first]


def test_a_run_is_found_by_name_and_by_path(job: JobConfig) -> None:
    run = Run.create(job)
    assert Run.find("small", job.runs) == Run.find(str(run.directory), Path("elsewhere")) == run


def test_a_run_that_is_not_there_lists_those_that_are(job: JobConfig) -> None:
    Run.create(job)
    with pytest.raises(RunNotFound, match=r"there is no run large in .* Runs in .*: small"):
        Run.find("large", job.runs)


def test_without_any_run_the_error_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(RunNotFound, match="Start one with `evermesh launch`"):
        Run.latest(tmp_path)


def test_a_second_launcher_is_refused_and_told_who_holds_the_run(job: JobConfig) -> None:
    run = Run.create(job)
    run.write_state(RunState(state="running", pid=os.getpid(), workers=2, started=now()))
    with run.locked():
        assert run.is_alive()
        with pytest.raises(RunAlive, match=f"is being trained by process {os.getpid()}"), run.locked():
            pass
    assert not run.is_alive()


def test_a_run_whose_launcher_was_killed_is_shown_as_died_and_can_be_locked(job: JobConfig) -> None:
    run = Run.create(job)
    program = (
        "import os, sys; from pathlib import Path; from evermesh.launcher import Run, RunState\n"
        "run = Run.open(Path(sys.argv[1]))\n"
        "with run.locked():\n"
        "    run.write_state(RunState(state='running', pid=os.getpid(), workers=2))\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(run.directory)], check=False)
    assert run.state().state == "running"
    assert run.status() == "died"
    with run.locked():
        assert run.status() == "running"


def test_a_damaged_run_does_not_hide_the_others(job: JobConfig) -> None:
    damaged, whole = Run.create(job), Run.create(job)
    (damaged.directory / "state.json").write_text("{")
    assert set(Run.all(job.runs)) == {damaged, whole}
    with pytest.raises(RunNotFound, match="is not the state of a run"):
        damaged.state()


def test_the_state_is_json_that_other_programs_can_read(job: JobConfig) -> None:
    run = Run.create(job)
    values = json.loads((run.directory / "state.json").read_text())
    assert values["state"] == "created"
    assert values["workers"] == 2


def test_a_damaged_state_says_how_to_go_on(job: JobConfig) -> None:
    run = Run.create(job)
    (run.directory / "state.json").write_text("{}")
    with pytest.raises(RunNotFound, match="To go on from its checkpoints write into it: ") as caught:
        run.state()
    (run.directory / "state.json").write_text(str(caught.value).partition("write into it: ")[2].partition(";")[0])
    assert run.state().state == "stopped"


def test_a_run_that_lost_its_configuration_says_so(job: JobConfig) -> None:
    run = Run.create(job)
    (run.directory / "job.yaml").unlink()
    with pytest.raises(RunNotFound, match=r"run small has lost its job.yaml\. Put one back in"):
        run.config()


def test_a_folder_of_runs_that_is_none_is_refused_with_the_reason(job_file: Path) -> None:
    job = load_job(job_file, [f"runs={job_file}"])
    with pytest.raises(RunUnusable, match=rf"no run can be made in {job_file}: File exists\. Give another folder"):
        Run.create(job)


def test_a_disk_that_is_full_when_a_run_is_made_leaves_nothing_of_it(
    job: JobConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Run, state: RunState) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Run, "write_state", full)
    with pytest.raises(RunUnusable, match="No space left on device"):
        Run.create(job)
    assert list(job.runs.iterdir()) == []


def test_an_elected_controller_holds_the_lock_although_a_stopped_one_still_has_its_own(job: JobConfig) -> None:
    run = Run.create(job)
    with run.locked() as check_lock:
        check_lock()
        with run.taken_over():
            assert run.is_alive()
            with pytest.raises(RunAlive):
                check_lock()
            with pytest.raises(RunAlive), run.locked():
                pass
        assert not run.is_alive()  # what the old one holds is no lock of the run any more

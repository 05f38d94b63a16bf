"""Worker processes: what they report, whose error is shown, and that none of them outlives the launcher."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from evermesh.launcher import workers
from evermesh.launcher.errors import WorkersFailed
from evermesh.launcher.interrupts import SIGNALS
from evermesh.launcher.workers import Failure, WorkerGroup, root_cause

FUNCTIONS = "tests.launcher.worker_functions"


def run(function: str, size: int, logs: Path, **arguments: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What rank 0 returned, and the reports."""
    reports: list[dict[str, Any]] = []
    with WorkerGroup(f"{FUNCTIONS}:{function}", arguments, workers=size, logs=logs) as group:
        return group.wait(reports.append, lambda: None), reports


def test_workers_report_and_return_what_rank_0_found(tmp_path: Path) -> None:
    result, reports = run("succeed", 3, tmp_path, steps=4)
    assert result["rank"] == 0
    assert [report["step"] for report in reports] == [0, 1, 2, 3]


def test_what_a_worker_prints_is_in_its_own_log(tmp_path: Path) -> None:
    run("succeed", 2, tmp_path)
    for rank, other in ((0, 1), (1, 0)):
        log = (tmp_path / f"rank-{rank}.log").read_text()
        assert f"rank {rank} was here\n" in log
        assert f"rank {other}" not in log


def test_the_first_error_wins_over_ranks_that_only_lost_their_peer(tmp_path: Path) -> None:
    with pytest.raises(WorkersFailed, match="worker 2 failed: the disk of rank 2 is full: 0 bytes left") as caught:
        run("first_error_wins", 4, tmp_path)
    assert caught.value.rank == 2
    assert caught.value.traceback is None


def test_a_bug_in_a_worker_keeps_its_traceback_and_ends_the_others_at_once(tmp_path: Path) -> None:
    start_s = time.monotonic()
    with pytest.raises(WorkersFailed, match="worker 1 failed: KeyError: 'no such thing'") as caught:
        run("programming_error", 2, tmp_path)
    assert "programming_error" in (caught.value.traceback or "")
    assert time.monotonic() - start_s < 10


def test_a_killed_worker_is_the_cause_and_its_last_words_are_shown(tmp_path: Path) -> None:
    with pytest.raises(WorkersFailed, match=r"worker 1 failed: it was killed by signal 9 \(SIGKILL\)") as caught:
        run("killed", 2, tmp_path)
    assert "last words of rank 1" in str(caught.value)


def test_where_ranks_only_lost_their_peer_the_silent_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "_ROOT_CAUSE_WAIT_S", 0.5)
    with pytest.raises(WorkersFailed, match="Not a word came from rank 1: stopped, or hanging") as caught:
        run("stopped", 2, tmp_path)
    assert caught.value.traceback is None
    assert "stopped" in (tmp_path / "rank-0.log").read_text()  # the traceback, for those who want it


def test_a_log_tells_when_a_worker_began_what_it_does_on_sigusr1_and_that_it_was_asked_to_stop(tmp_path: Path) -> None:
    with WorkerGroup(f"{FUNCTIONS}:wait_for_stop", {"look": True}, workers=1, logs=tmp_path) as group:
        group.wait(lambda report: group.ask_stop(), lambda: None)
    log = (tmp_path / "rank-0.log").read_text()
    marks = ["of 1 workers", "most recent call first", "wait_for_stop", "asked to save and stop", "done: {'reason': "]
    places = [log.find(mark) for mark in marks]
    assert -1 not in places
    assert sorted(places) == places


def test_the_root_cause_is_the_earliest_failure_that_is_not_a_lost_peer() -> None:
    lost, late, early = Failure(0, 1.0, "reset", peer_lost=True), Failure(1, 3.0, "late"), Failure(2, 2.0, "early")
    assert root_cause([lost, late, early]) is early
    assert root_cause([lost]) is lost


def test_workers_hear_the_request_to_stop(tmp_path: Path) -> None:
    with WorkerGroup(f"{FUNCTIONS}:wait_for_stop", {}, workers=2, logs=tmp_path) as group:
        assert group.wait(lambda report: group.ask_stop(), lambda: None) == {"reason": "asked"}


def test_leaving_the_group_ends_every_worker(tmp_path: Path) -> None:
    started: list[int] = []
    with (
        pytest.raises(KeyboardInterrupt),
        WorkerGroup(f"{FUNCTIONS}:wait_for_stop", {}, workers=2, logs=tmp_path) as group,
    ):
        group.wait(lambda report: started.append(report["pid"]), lambda: _interrupt_when(len(started) == 2))
    assert not [pid for pid in started if psutil.pid_exists(pid)]


def _interrupt_when(condition: bool) -> None:
    if condition:
        raise KeyboardInterrupt


LAUNCHER = """
import sys
from pathlib import Path
from evermesh.launcher.workers import WorkerGroup
with WorkerGroup(sys.argv[1], {}, workers=3, logs=Path(sys.argv[2])) as group:
    group.wait(lambda report: print("ready", flush=True), lambda: None)
"""


@contextmanager
def launcher(logs: Path, function: str = "wait_for_stop") -> Iterator[subprocess.Popen[str]]:
    """A launcher in a process of its own, whose three workers are running."""
    command = [sys.executable, "-c", LAUNCHER, f"{FUNCTIONS}:{function}", str(logs)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        assert [process.stdout.readline() for _ in range(3)] == ["ready\n"] * 3
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("function", ["wait_for_stop", "hold_the_interpreter_lock"])
def test_no_process_is_left_3_s_after_the_launcher_was_killed(tmp_path: Path, function: str) -> None:
    with launcher(tmp_path, function) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4  # three workers and the fork server
        process.kill()
        _, alive = psutil.wait_procs(family, timeout=3)
        assert alive == []
        assert process.stderr
        assert process.stderr.read() == ""


def test_workers_ignore_signals_that_reach_the_whole_process_group(tmp_path: Path) -> None:
    with launcher(tmp_path) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        for number in SIGNALS:
            for member in family:
                member.send_signal(number)
        time.sleep(0.3)
        assert all(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in family)

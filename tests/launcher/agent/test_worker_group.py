"""The workers of a node: what they report, how their failures are told, and that none of them outlives its agent."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from evermesh.launcher.agent import warm
from evermesh.launcher.agent.loop import Loop
from evermesh.launcher.agent.shared_memory import POINTS, Board, SharedArea
from evermesh.launcher.agent.standby import Standbys
from evermesh.launcher.agent.worker_group import Hooks, WorkerGroup
from evermesh.launcher.interrupts import SIGNALS
from evermesh.launcher.messages import Outcome, Place, Store, TrainingWork
from evermesh.launcher.policy import Failure, root_cause
from tests.processes import lives, still_alive

FUNCTIONS = "tests.launcher.agent.worker_functions"
WAIT_S = 30.0
NO_STORE = Store(host="127.0.0.1", port=1)


class Running:
    """A group in a loop of its own."""

    def __init__(
        self,
        function: str,
        size: int,
        logs: Path,
        *,
        board: Path | None = None,
        generation: int = 1,
        store: Store = NO_STORE,
        waiting: int = 0,
        standbys: Standbys | None = None,
        **arguments: Any,
    ) -> None:
        self.loop, self.reports = Loop(), list[dict[str, Any]]()
        warm.warm_up(FUNCTIONS, threads=1)
        place = Place(first_rank=0, ranks=size, world_size=size, node_rank=0, nodes=1)
        hooks = Hooks(lambda: None, self._report, lambda plan: None, lambda work: None)
        self.on_report: Callable[[], None] = lambda: None
        self.standbys = standbys or Standbys()
        self.standbys.fill(waiting)
        self.group = WorkerGroup(self.loop, generation, place, logs, hooks, self.standbys)
        work = TrainingWork(entry=f"{FUNCTIONS}:{function}", arguments=arguments, logs=str(logs))
        self.group.start(store, work, board, {})

    def until(self, holds: Callable[[Outcome], bool]) -> Outcome:
        """Serve until the outcome is so."""
        assert self.loop.run_until(lambda: holds(self.group.outcome), WAIT_S), self.group.outcome
        return self.group.outcome

    def close(self) -> None:
        self.group.kill()
        self.group.wait_gone()
        self.standbys.close()
        self.loop.close()

    def _report(self, values: dict[str, Any]) -> None:
        self.reports.append(values)
        self.on_report()


@contextmanager
def running(function: str, size: int, logs: Path, **arguments: Any) -> Iterator[Running]:
    """A group that is gone at the end of the block."""
    found = Running(function, size, logs, **arguments)
    try:
        yield found
    finally:
        found.close()


def test_workers_report_and_return_what_they_found(tmp_path: Path) -> None:
    with running("succeed", 3, tmp_path, steps=4) as job:
        outcome = job.until(lambda seen: seen.is_over)
    assert outcome.done == {rank: {"rank": rank, "threads": "1"} for rank in range(3)}
    assert [report["step"] for report in job.reports] == [0, 1, 2, 3]
    assert outcome.failures == ()
    assert job.group.fresh_because is None


def test_what_a_worker_prints_is_in_its_own_log(tmp_path: Path) -> None:
    with running("succeed", 2, tmp_path) as job:
        job.until(lambda seen: seen.is_over)
    for rank, other in ((0, 1), (1, 0)):
        log = (tmp_path / f"rank-{rank}.log").read_text()
        assert f"rank {rank} was here\n" in log
        assert f"rank {other}" not in log


def test_an_error_that_names_the_way_out_is_told_without_its_traceback(tmp_path: Path) -> None:
    with running("first_error_wins", 4, tmp_path) as job:
        failures = job.until(lambda seen: len(seen.failures) == 4).failures
    first = root_cause(failures)
    assert (first.rank, first.cause, first.has_traceback) == (2, "refused", False)
    assert first.how == "failed: the disk of rank 2 is full: 0 bytes left. Free some."
    assert sum(failure.peer_lost for failure in failures) == 3


def test_a_bug_keeps_its_traceback_and_the_others_write_down_what_they_were_doing(tmp_path: Path) -> None:
    with running("programming_error", 2, tmp_path) as job:
        failure = job.until(lambda seen: bool(seen.failures)).failures[0]
        job.group.end("rank 1 failed")
        job.until(lambda seen: seen.is_over)
    assert (failure.rank, failure.cause, failure.how) == (1, "raised", "failed: KeyError: 'no such thing'")
    assert "programming_error" in failure.text
    stacks = (tmp_path / "rank-0.stacks").read_text()
    assert "generation 1, rank 0: rank 1 failed" in stacks
    assert "time.sleep" in stacks or "programming_error" in stacks


def test_a_killed_worker_is_noticed_at_once_and_its_last_words_are_told(tmp_path: Path) -> None:
    with running("wait_for_stop", 2, tmp_path) as job:
        job.loop.run_until(lambda: len(job.reports) == 2, WAIT_S)
        psutil.Process(job.group.pids[1]).kill()
        killed_s = time.monotonic()
        failure = job.until(lambda seen: bool(seen.failures)).failures[0]
        assert (failure.rank, failure.cause, failure.code) == (1, "died", -signal.SIGKILL)
        assert failure.time_s - killed_s < 1  # 0.01 on an idle machine
        assert "one of 2 workers" in failure.text


def test_a_stopped_worker_is_ended_with_the_others_and_tells_before_where_it_was(tmp_path: Path) -> None:
    with running("stopped", 2, tmp_path) as job:
        assert job.until(lambda seen: bool(seen.failures)).failures[0].peer_lost
        stopped, until = psutil.Process(job.group.pids[1]), time.monotonic() + WAIT_S
        while stopped.status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < until
        assert 1 not in job.group.write_stacks("asked for")  # it is not woken for that
        job.group.end("rank 0 failed")
        job.until(lambda seen: seen.is_over)
    assert "worker_functions.py" in (tmp_path / "rank-1.stacks").read_text()


def test_a_worker_whose_end_nobody_has_noted_yet_is_not_asked_what_it_is_doing(tmp_path: Path) -> None:
    with running("wait_for_stop", 2, tmp_path) as job:
        job.loop.run_until(lambda: len(job.reports) == 2, WAIT_S)
        killed = psutil.Process(job.group.pids[1])
        killed.kill()
        psutil.wait_procs([killed], WAIT_S)  # reaped by the warm process; the loop does not run meanwhile
        job.group.end("rank 1 failed")
        job.until(lambda seen: seen.is_over)


def test_what_ends_because_it_was_ended_is_no_failure(tmp_path: Path) -> None:
    with running("wait_for_stop", 2, tmp_path) as job:
        job.group.end()
        assert job.until(lambda seen: seen.is_over).failures == ()


def test_a_log_tells_when_a_worker_began_and_that_it_was_asked_to_stop(tmp_path: Path) -> None:
    with running("wait_for_stop", 1, tmp_path, look=True) as job:
        job.on_report = lambda: job.group.ask("stop")
        assert job.until(lambda seen: seen.is_over).done == {0: {"reason": "asked"}}
    log = (tmp_path / "rank-0.log").read_text()
    marks = ["one of 1 workers", "asked to stop", "done: {'reason': "]
    places = [log.find(mark) for mark in marks]
    assert -1 not in places
    assert sorted(places) == places
    assert "wait_for_stop" in (tmp_path / "rank-0.stacks").read_text()


def test_how_far_a_worker_is_can_be_read_from_outside_though_it_is_wedged(tmp_path: Path) -> None:
    with (
        SharedArea(f"test-{tmp_path.name}", slots=2) as area,
        running("stop_after_7", 2, tmp_path, board=area.board) as job,
    ):
        job.loop.run_until(lambda: len(job.reports) == 2, WAIT_S)
        until, board = time.monotonic() + WAIT_S, Board(area.board)
        while any(psutil.Process(pid).status() != psutil.STATUS_STOPPED for pid in job.group.pids.values()):
            assert time.monotonic() < until
        for place, pid in enumerate(job.group.pids[rank] for rank in range(2)):
            assert board.read(place) == (1, pid, 7, 0.5, 0.25, 0.5, POINTS.index("sum"))
        board.close()


def test_the_root_cause_is_the_earliest_failure_that_is_not_a_lost_peer() -> None:
    lost = Failure(rank=0, time_s=1.0, how="reset", peer_lost=True)
    late, early = Failure(rank=1, time_s=3.0, how="late"), Failure(rank=2, time_s=2.0, how="early")
    assert root_cause([lost, late, early]) is early
    assert root_cause([lost]) is lost


AGENT = """
import sys
from pathlib import Path
from tests.launcher.agent.test_worker_group import Running
job = Running(sys.argv[1], 3, Path(sys.argv[2]), waiting=int(sys.argv[3]))
job.loop.run_until(lambda: len(job.reports) == 3)
print("ready", flush=True)
job.until(lambda seen: seen.is_over)
"""


@contextmanager
def owner(logs: Path, function: str = "wait_for_stop", waiting: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A process of its own whose three workers are running."""
    command = [sys.executable, "-c", AGENT, function, str(logs), str(waiting)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("function", ["wait_for_stop", "hold_the_interpreter_lock"])
def test_no_process_is_left_2_s_after_their_owner_was_killed(tmp_path: Path, function: str) -> None:
    with owner(tmp_path, function) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 4  # three workers and the warm process
        process.kill()
        assert still_alive(family, 2) == []
        assert process.stderr
        assert process.stderr.read() == ""


def test_workers_ignore_signals_that_reach_the_whole_process_group(tmp_path: Path) -> None:
    with owner(tmp_path) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        for number in SIGNALS:
            for member in family:
                member.send_signal(number)
        time.sleep(0.3)
        assert all(map(lives, family))

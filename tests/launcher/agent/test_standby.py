"""Workers that wait to be told their rank."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from evermesh.launcher.agent import warm
from evermesh.launcher.agent.standby import Standbys
from tests.launcher.agent.test_worker_group import FUNCTIONS, owner, running
from tests.processes import still_alive


@contextmanager
def _standbys(number: int) -> Iterator[tuple[Standbys, list[psutil.Process]]]:
    warm.warm_up(FUNCTIONS, threads=1)
    before = set(psutil.Process().children(recursive=True))
    standbys = Standbys()
    try:
        standbys.fill(number)
        yield standbys, [found for found in psutil.Process().children(recursive=True) if found not in before]
    finally:
        standbys.close()


def test_who_waits_becomes_a_rank_and_who_has_died_meanwhile_is_left_out(tmp_path: Path) -> None:
    with running("wait_for_stop", 3, tmp_path, waiting=2) as job:
        job.loop.run_until(lambda: len(job.reports) == 3)
        reported = {report["pid"] for report in job.reports}
        assert set(job.group.pids.values()) == reported
        job.group.ask("stop")
        assert sorted(job.until(lambda seen: seen.is_over).done) == [0, 1, 2]
        assert job.group.fresh_because is None


def test_as_many_wait_as_are_wanted_and_the_dead_are_replaced() -> None:
    with _standbys(2) as (standbys, first):
        assert len(first) == 2
        first[0].kill()
        psutil.wait_procs(first[:1], 5)
        time.sleep(0.1)  # until the warm process has said so
        standbys.fill(2)
        assert still_alive(first[1:], 0) == first[1:]
        standbys.close()
        assert still_alive(first, 5) == []


def test_one_that_died_unseen_is_no_rank(tmp_path: Path) -> None:
    with _standbys(1) as (standbys, (waiting,)):
        waiting.kill()
        psutil.wait_procs([waiting], 5)
        with running("succeed", 1, tmp_path, standbys=standbys) as job:
            assert job.until(lambda seen: seen.is_over).failures == ()


def test_nobody_waits_where_the_warm_process_must_not_be_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    warm.warm_up(FUNCTIONS, threads=1)
    monkeypatch.setattr(warm, "unfit_to_fork", lambda pid: "the warm process has 3 tasks")
    with _standbys(2) as (_, found):
        assert found == []


def test_who_waits_ends_with_the_process_that_forked_it(tmp_path: Path) -> None:
    with owner(tmp_path, waiting=4) as process:
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 5  # three workers, one that waits, and the warm process
        process.kill()
        assert still_alive(family, 2) == []

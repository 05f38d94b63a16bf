"""The process beside an agent that looks at its node: what is told of it, also when it hangs or dies."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from evermesh.fault.health.verdicts import Verdict
from evermesh.launcher.agent import health
from evermesh.launcher.agent.health import NodeHealth
from evermesh.launcher.agent.loop import Loop
from evermesh.launcher.agent.spec import AgentSpec
from tests.processes import still_alive

WAIT_S = 60.0


class Looked:
    """A node that is looked at, and what was told."""

    def __init__(self, run: Path, preflight: str, every_s: float | None) -> None:
        spec = AgentSpec.model_validate(
            {
                "run": run,
                "node": "node-0",
                "address": "127.0.0.1",
                "slots": 1,
                "warm_module": "json",
                "preflight": preflight,
                "health_every_s": every_s,
            }
        )
        self.loop = Loop()
        self.told: list[tuple[Verdict, ...]] = []
        self.health = NodeHealth(self.loop, spec, lambda verdicts: self.told.append(tuple(verdicts)))

    @property
    def child(self) -> psutil.Process:
        found = self.health._child
        assert found is not None
        return psutil.Process(found.pid)

    def of(self, check: str) -> list[Verdict]:
        return [verdict for verdict in self.health.verdicts if verdict.check == check]


@contextmanager
def looked_at(run: Path, preflight: str = "quick", every_s: float | None = 0.05) -> Iterator[Looked]:
    looked = Looked(run, preflight, every_s)
    try:
        yield looked
    finally:
        looked.health.close()
        looked.loop.close()


def test_all_is_known_after_the_first_look_and_nothing_is_told_while_nothing_changes(tmp_path: Path) -> None:
    with looked_at(tmp_path) as looked:
        looked.health.begin()
        child = looked.child
        looked.health.finish_first()
        assert [verdict.state for verdict in looked.of("disk of the run")] == ["ok"]
        looked.loop.run_until(lambda: False, timeout_s=0.5)
        assert not [verdict for told in looked.told for verdict in told if verdict.check == "health checks"]
    assert still_alive([child], 0.0) == []


def test_without_later_looks_the_process_ends_and_that_is_no_event(tmp_path: Path) -> None:
    with looked_at(tmp_path, every_s=None) as looked:
        looked.health.begin()
        child = looked.child
        looked.health.finish_first()
        assert looked.of("memory")
        assert still_alive([child], WAIT_S) == []
        looked.loop.run_until(lambda: looked.health._child is None, timeout_s=WAIT_S)
        assert looked.of("health checks") == []
        assert looked.told == []


def test_a_full_look_runs_the_short_tests_first(tmp_path: Path) -> None:
    with looked_at(tmp_path, preflight="full", every_s=None) as looked:
        looked.health.begin()
        looked.health.finish_first()
        tests = ("collectives", "memory test", "loopback", "arithmetic on cpu")
        assert [verdict.state for check in tests for verdict in looked.of(check)] == ["ok"] * len(tests)
        assert looked.of("collectives")[0].numbers["ranks"] == 2
        assert looked.of("memory")


def test_a_first_look_that_hangs_makes_the_node_unfit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_FIRST_WAIT_S", 0.2)
    with looked_at(tmp_path) as looked:
        looked.health.begin()
        looked.child.send_signal(signal.SIGSTOP)
        looked.health.finish_first()
        [found] = looked.of("health checks")
        assert (found.state, found.reason) == ("bad", "did not get past its own start")
        looked.child.send_signal(signal.SIGCONT)  # it was only slow: the node is fit again
        looked.loop.run_until(lambda: bool(looked.told), timeout_s=WAIT_S)
        assert looked.of("health checks") == []
        assert looked.of("memory")


def test_a_process_that_falls_silent_or_dies_costs_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_SILENT_S", 0.3)
    with looked_at(tmp_path) as looked:
        looked.health.begin()
        looked.health.finish_first()
        looked.child.send_signal(signal.SIGSTOP)
        until = time.monotonic() + WAIT_S
        while not looked.of("health checks") and time.monotonic() < until:
            looked.loop.run_until(lambda: False, timeout_s=0.05)
            looked.health.look()
        assert looked.told[-1] == looked.health.verdicts
        assert looked.of("health checks")[0].reason.startswith("have been looking at")
        looked.child.kill()
        looked.loop.run_until(lambda: looked.health._child is None, timeout_s=WAIT_S)
        [found] = looked.of("health checks")
        assert (found.state, "ended with -9" in found.reason) == ("warn", True)
        assert looked.of("memory"), "what was known stays"


def test_nobody_looks_where_that_is_off(tmp_path: Path) -> None:
    with looked_at(tmp_path, preflight="off", every_s=None) as looked:
        looked.health.begin()
        looked.health.finish_first()
        assert looked.health._child is None
        assert looked.health.verdicts == ()


def test_it_ends_with_the_agent(tmp_path: Path) -> None:
    with looked_at(tmp_path, every_s=30.0) as looked:
        looked.health.begin()
        looked.health.finish_first()
        child = looked.child
        assert looked.health._child is not None
        assert looked.health._child.stdin is not None
        looked.health._child.stdin.close()  # as the kernel does when the agent is killed
        assert still_alive([child], WAIT_S) == []

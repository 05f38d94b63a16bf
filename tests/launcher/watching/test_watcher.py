"""The watcher of a job: a process that is told what agents say, and says what detectors conclude."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import pytest

from evermesh.fault.detectors.summaries import RankWatch
from evermesh.fault.process_state import ProcessState
from evermesh.fault.synthetic import JobShape, generate
from evermesh.fault.synthetic.faults import Hang
from evermesh.launcher.controller.watching.lines import Begin, FromWatcher, Problem, Said
from evermesh.launcher.controller.watching.watch import is_for_watcher
from evermesh.launcher.controller.watching.watcher_process import WatcherProcess
from evermesh.launcher.watching.messages import Window
from evermesh.launcher.watching.packing import pack_summary

_SHAPE = JobShape(dp=2, tp=2, ranks_per_node=2)
_WAIT_S = 60.0


@contextmanager
def _watching() -> Iterator[WatcherProcess]:
    watcher = WatcherProcess()
    try:
        yield watcher
    finally:
        watcher.end()
    assert not psutil.pid_exists(watcher.pid)


def _until(watcher: WatcherProcess, kind: type[FromWatcher]) -> FromWatcher:
    until_s = time.monotonic() + _WAIT_S
    while time.monotonic() < until_s:
        for line in watcher.heard():
            assert isinstance(line, kind)
            return line
        time.sleep(0.01)
    pytest.fail(f"no {kind.__name__} was said")


def _said(watcher: WatcherProcess) -> Said:
    said = _until(watcher, Said)
    assert isinstance(said, Said)
    return said


def _windows(generation: int) -> dict[str, str]:
    """Of both nodes, while rank 1 hangs."""
    summaries = [RankWatch().summarise(trace) for trace in generate(_SHAPE, [Hang(1, 6)]).traces]
    packed = [pack_summary(one, ProcessState("S", 3, False), with_groups=True) for one in summaries]
    halves = {"node-0": packed[:2], "node-1": packed[2:]}
    return {
        node: Window(generation=generation, summaries=tuple(half)).model_dump_json() for node, half in halves.items()
    }


def test_it_says_of_the_generation_that_it_was_told_of_who_hangs_and_what_it_does_not_understand() -> None:
    with _watching() as watcher:
        watcher.say(Begin(generation=3, num_ranks=4, num_nodes=2))
        for node, text in _windows(2).items():
            watcher.pass_on(node, text)  # of an older generation: that says nothing
        watcher.pass_on("node-0", '{"kind":"window","generation":3}')
        problem = _until(watcher, Problem)
        assert isinstance(problem, Problem)
        assert problem.text.startswith("not understood of node-0")
        for node, text in _windows(3).items():
            assert is_for_watcher(text)
            watcher.pass_on(node, text)
        said = _said(watcher)
        assert [(one.kind, one.rank, one.node) for one in said.findings] == [("hang", 1, "node-0")]
        assert said.generation == 3


def test_what_an_agent_says_speaks_for_nobody_else() -> None:
    with _watching() as watcher:
        watcher.say(Begin(generation=3, num_ranks=4, num_nodes=2))
        forged = Begin(generation=9, num_ranks=1, num_nodes=1).model_dump_json()
        watcher.pass_on("node-0", f'{{"kind":"window",}}\n{forged}\r\n{forged}')
        _until(watcher, Problem)
        for node, text in _windows(3).items():
            watcher.pass_on(node, text)
        assert _said(watcher).generation == 3


def test_one_that_has_ended_is_known_to_have() -> None:
    with _watching() as watcher:
        assert watcher.is_alive
        psutil.Process(watcher.pid).kill()
        until_s = time.monotonic() + _WAIT_S
        while watcher.is_alive:
            assert time.monotonic() < until_s
            time.sleep(0.01)
        watcher.say(Begin(generation=3, num_ranks=4, num_nodes=2))

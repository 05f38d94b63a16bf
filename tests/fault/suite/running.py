"""Runs one case: starts its ranks, watches them from outside, and ends them."""

import json
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evermesh.fault.detectors import diagnose
from evermesh.fault.detectors.streaming import JobWatch
from evermesh.fault.detectors.summaries import RankWatch
from evermesh.fault.events import Finding
from evermesh.fault.recorder.trace import RankTrace
from evermesh.fault.synthetic import JobShape, generate
from tests.fault.recorder.recording import rings
from tests.fault.suite import links
from tests.fault.suite.cases import Case
from tests.fault.suite.faults import Fault, note
from tests.fault.suite.ranks import RankSpec, burn, run_rank
from tests.fault.suite.watching import PERIOD_S, Seen, Watcher
from tests.launcher.hosts import Host

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "tests.fault.suite.ranks"])
_START_S = 90.0
_HURTS_ALONE = ("slow rank", "pauses", "slow link", "clock jump")
"""Kinds that make nobody wait for good: seconds count from the moment at which it happens."""


class NotStarted(Exception):
    """The machine was too busy to start a job; nothing is known of the case."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was said of a case."""

    case: Case
    seen: tuple[Finding, ...]
    """By the watcher, in the first look that found something."""
    by: str
    after: tuple[Finding, ...]
    """By ``diagnose`` on the rings right behind that."""
    waited_s: float | None
    """From the moment at which others begin to wait, or at which it happens, to the finding."""
    is_early: bool
    """It was said before anything had happened."""
    is_noted: bool
    """What had to be noted was, or nothing had to be."""
    logs: str = ""

    @property
    def right(self) -> tuple[Finding, ...]:
        if self.is_early:
            return ()
        return tuple(one for one in self.seen if self.case.expected.is_right(one, self.case.job))

    @property
    def wrong(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.seen if one not in self.right)

    @property
    def is_found(self) -> bool:
        return bool(self.right) if self.case.expected.kinds else self.is_noted

    @property
    def is_found_after(self) -> bool:
        if not self.case.expected.kinds:
            return not self.after and self.is_noted
        return any(self.case.expected.is_right(one, self.case.job) for one in self.after)


def warm_up() -> None:
    """Load what watches, as it is in an agent and a controller that run for long."""
    traces = generate(JobShape(dp=2, tp=2, pp=2, ranks_per_node=2)).traces
    diagnose(traces)
    JobWatch().join([RankWatch().summarise(trace) for trace in traces])


def run(case: Case) -> Outcome:
    """Run a case in real processes; nothing of it is left."""
    with rings() as folder, ExitStack() as stack:
        hosts = stack.enter_context(links.hosts_of(case.job.world_size)) if case.is_on_hosts else ()
        if case.kind == "slow link" and case.fault is not None:
            links.lay_cable(hosts[case.fault.rank], hosts[case.fault.peer])
        processes = stack.enter_context(_started(case, folder, hosts))
        stack.enter_context(_noise(case.burners))
        specs = [RankSpec(case.job, rank, folder) for rank in range(case.job.world_size)]
        paths = [spec.ring.path for spec in specs]
        _await_ready(folder, case, processes)
        return _watch(case, folder, Watcher(paths, case.context, _bend(case, folder)), hosts)


def _watch(case: Case, folder: Path, watcher: Watcher, hosts: Sequence[Host]) -> Outcome:
    until, begun = time.monotonic() + _START_S, False
    if case.fault is None or case.kind in ("long sequence", "unbalanced stage", "evaluation"):
        until, begun = time.monotonic() + case.watched_s, True
    seen = Seen((), "")
    while time.monotonic() < until:
        started = time.monotonic()
        seen = watcher.look()
        if seen.findings:
            break
        if hosts and not begun and case.fault is not None and watcher.step >= case.fault.step:
            _strike(case.fault, folder, hosts)
        if not begun and injected_ns(folder) is not None:
            until, begun = time.monotonic() + case.watched_s, True
        time.sleep(max(0.01, PERIOD_S - (time.monotonic() - started)))
    found_ns = time.monotonic_ns()
    diagnosis = watcher.diagnose()
    at_ns = injected_ns(folder)
    traces, _ = watcher.read()
    began_ns = at_ns
    if at_ns is not None and case.kind not in _HURTS_ALONE:
        began_ns = _begin_of_waits(traces, at_ns)
    is_early = bool(seen.findings) and (at_ns is None or at_ns > found_ns)
    note, rank = case.expected.note, case.expected.rank
    is_noted = not note or any(note in one and f"rank {rank}" in one for one in diagnosis.exonerated)
    return Outcome(
        case,
        seen.findings,
        seen.by,
        diagnosis.findings,
        max(found_ns - began_ns, 0) / 1e9 if seen.findings and began_ns is not None and not is_early else None,
        is_early,
        is_noted,
        _logs(folder),
    )


def _strike(fault: Fault, folder: Path, hosts: Sequence[Host]) -> None:
    """What happens to the network."""
    note(folder, fault)
    if fault.kind == "slow link":
        links.slow_down(hosts[fault.rank], hosts[fault.peer], round(fault.amount))
    else:
        links.lose(hosts[fault.rank], hosts[fault.peer])


def injected_ns(folder: Path) -> int | None:
    """When it happened, monotonic clock; None: it has not."""
    with suppress(OSError):
        return int(json.loads((folder / "injected.json").read_text())["at_ns"])
    return None


def _begin_of_waits(traces: Sequence[RankTrace], injected_ns: int) -> int:
    """When the first rank entered, after it happened, what it has not left; else when it happened."""
    begins = [
        int(record["entered_ns"])
        for trace in traces
        for record in trace.records[-64:]
        if record["ended_ns"] == 0 and record["entered_ns"] > injected_ns
    ]
    return min(begins, default=injected_ns)


def _bend(case: Case, folder: Path) -> Any:
    """For a clock that jumps: the stamps of a node as its own clock would have made them. All ranks share one clock here."""
    fault = case.fault
    if fault is None or case.kind != "clock jump":
        return None

    def bend(trace: RankTrace) -> RankTrace:
        if trace.node != case.job.node(fault.rank) or injected_ns(folder) is None:
            return trace
        return replace(trace, wall_offset_ns=trace.wall_offset_ns + round(fault.amount * 1e9))

    return bend


@contextmanager
def _started(case: Case, folder: Path, hosts: Sequence[Host]) -> Iterator[list[Any]]:
    specs = [
        RankSpec(case.job, rank, folder, case.fault, namespace=hosts[rank].name if hosts else "")
        for rank in range(case.job.world_size)
    ]
    processes = [CONTEXT.Process(target=run_rank, args=(spec,), daemon=True) for spec in specs]
    try:
        for process in processes:
            process.start()
        yield processes
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


@contextmanager
def _noise(number: int) -> Iterator[None]:
    burners = [CONTEXT.Process(target=burn, args=(120.0,), daemon=True) for _ in range(number)]
    try:
        for process in burners:
            process.start()
        yield
    finally:
        for process in burners:
            process.kill()
            process.join()


def _await_ready(folder: Path, case: Case, processes: Sequence[Any]) -> None:
    until = time.monotonic() + _START_S
    while not all((folder / f"{rank}.ready").exists() for rank in range(case.job.world_size)):
        if time.monotonic() > until or any(process.exitcode is not None for process in processes):
            raise NotStarted(f"its ranks did not start: {_logs(folder) or f'not within {_START_S:.0f} s'}")
        time.sleep(0.02)


def _logs(folder: Path) -> str:
    """The last line of every rank."""
    found = []
    for path in sorted(folder.glob("*.log")):
        lines = path.read_text(errors="replace").strip().splitlines()
        if lines:
            found.append(f"{path.stem}: {lines[-1][:200]}")
    return "; ".join(found)

"""The processes of a run on this machine, found by where their output goes; and what must not be left of them.

Every process of a run writes into its folder ``logs``, its children too: no process can hide by being forked twice, and none
of another run is taken for one of this.
"""

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from evermesh.fault.injection import Target
from evermesh.fault.snapshot.keeper.area import area_of
from evermesh.launcher.controller.journal import read_journal
from evermesh.launcher.run_directory import Run
from evermesh.launcher.succession.office import read_views

_LOOK_S = 0.05
_SHARED_MEMORY = Path("/dev/shm")


def processes_of(run: Run) -> dict[psutil.Process, str]:
    """Every living process of ``run`` but who shows it, with the name of the log that it writes."""
    logs = f"{run.logs.resolve()}/"
    found = {}
    for pid in psutil.pids():
        with suppress(OSError, psutil.NoSuchProcess):
            output = os.readlink(f"/proc/{pid}/fd/2")
            process = psutil.Process(pid) if output.startswith(logs) else None
            if process is not None and process.status() != psutil.STATUS_ZOMBIE:
                found[process] = output.removeprefix(logs)
    return found


def victims(run: Run, target: Target) -> list[psutil.Process]:
    """The processes that are meant, parents first; none while they are being started."""
    found = processes_of(run)
    match target.of:
        case "rank":
            return _first_of(found, f"rank-{target.which}.log")
        case "agent":
            return _first_of(found, f"agent-node-{target.which}.log")
        case "keeper":
            return _first_of(found, f"keeper-node-{target.which}.log")
        case "controller":
            return _first_of(found, "controller.log")
        case "node":
            return _node(found, f"node-{target.which}")
        case "head":
            views = read_views(run.directory)
            first = _first_of(found, "controller.log")  # it would start another agent there
            return [*first, *_node(found, (views.view.leader if views else None) or "node-0")] if first else []
        case "job":
            first = _first_of(found, "controller.log")  # it would start others in their place
            return [*first, *(process for process in found if process not in first)] if first else []
        case "launcher":
            return [psutil.Process()]


def orphans(run: Run, patience_s: float) -> list[str]:
    """The processes that are left of a run that has ended, after so many seconds at most, in words."""
    until = time.monotonic() + patience_s
    while (left := processes_of(run)) and time.monotonic() < until:
        time.sleep(_LOOK_S)
    return [f"process {process.pid}, which writes {log}" for process, log in left.items()]


def leaked_memory(run: Run) -> list[str]:
    """What agents and keepers of a run that has ended have left in shared memory."""
    name = f"evermesh-{os.getuid()}-{run.directory.resolve().name}-"
    known = [entry.fields for entry in read_journal(run.journal) if entry.kind == "node"]
    agents = {str(fields["pid"]) for fields in known}
    left = [p for p in _SHARED_MEMORY.glob(f"{name}*") if p.name.removeprefix(name).split("-")[0] in agents]
    left += [area_of(run.directory, node) for node in {str(fields["node"]) for fields in known}]
    return sorted(path.name for path in left if path.exists())


def _first_of(found: Mapping[psutil.Process, str], log: str) -> list[psutil.Process]:
    """The process that a log is named after: of those that write it, the one whose parent does not."""
    writers = [process for process, name in found.items() if name == log]
    return [process for process in writers if _parent(process) not in writers]


def _node(found: Mapping[psutil.Process, str], node: str) -> list[psutil.Process]:
    agents = _first_of(found, f"agent-{node}.log")
    return [process for agent in agents for process in (agent, *_below(agent))]


def _below(process: psutil.Process) -> Iterator[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        yield from process.children(recursive=True)


def _parent(process: psutil.Process) -> psutil.Process | None:
    with suppress(psutil.NoSuchProcess):
        return process.parent()
    return None

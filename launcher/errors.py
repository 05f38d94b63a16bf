"""Errors of the launcher.

    EvermeshError
    └── LauncherError
        ├── JobFileInvalid   (ValueError)       a job file or an override breaks a rule; names key and line
        ├── LengthsInvalid   (ValueError)       a file of sequence lengths cannot be read
        ├── ScenarioInvalid  (ValueError)       what is to be simulated cannot be read, or contradicts itself
        ├── LayoutRequestInvalid (ValueError)   a model, topology or device to find a layout for is wrong or missing
        ├── TrafficRequestInvalid (ValueError)  a job and a topology whose paths are to be planned do not go together
        ├── CheckpointRequestInvalid (ValueError) what is to be done with a checkpoint contradicts itself
        ├── RunNotFound      (LookupError)      there is no such run, or none at all
        ├── JobAmbiguous     (LookupError)      several jobs could be meant
        ├── RunAlive         (RuntimeError)     another launcher holds the run
        ├── ResumeRefused    (ValueError)       a run cannot go on the way it was asked to
        ├── RelayoutRefused  (ValueError)       a running job cannot go on with another layout
        ├── ListenInvalid    (ValueError)       nothing can be served at an address
        ├── ClusterRequestInvalid (ValueError)  what is asked of the cluster store is wrong, or not known there
        ├── DrainRefused     (ValueError)       a job cannot go on without a node
        ├── RunUnusable      (OSError)          the directory of a run cannot be made
        ├── DevicesMissing   (RuntimeError)     the machine has fewer devices than the job has workers
        ├── StoppedAtOnce    (RuntimeError)     a second signal came before the first was answered
        ├── ClusterMissing   (ConnectionError)  there is no Ray cluster to place the nodes in
        ├── AllocationMissing (ConnectionError) there is no Slurm allocation to place the nodes in
        ├── SlurmSilent      (OSError)          a command of Slurm failed
        ├── RunNotSeen       (LookupError)      a node does not see the directory of the run
        ├── WorkersFailed    (RuntimeError)     a worker raised, or died
        ├── WarmProcessLost  (RuntimeError)     the process that forks workers ended
        ├── SharedMemoryMissing (OSError)       a node has no room for its shared-memory area
        ├── ControllerLost   (RuntimeError)     the controller of a run does not answer
        ├── NotReplicated    (OSError)          too few agents answer their controller
        ├── Superseded       (RuntimeError)     agents obey another controller
        ├── Interrupted      (RuntimeError)     somebody stopped a run before it could be judged
        └── DemoFailed       (AssertionError)   the demo ran, but something it promises did not happen

``exit_code`` is what the command line ends with: 2 for a wrong request, 1 for work that failed, 128 + signal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evermesh.parallelism.errors import EvermeshError


class LauncherError(EvermeshError):
    """Something the user asked the launcher for cannot be done."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a job file."""

    where: str
    """``FILE:LINE``, or the override that set the value."""
    key: str
    """Dotted path of the key; empty for the file as a whole."""
    text: str
    """What was found and what is allowed."""

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


class JobFileInvalid(LauncherError, ValueError):
    """A job file or an override breaks a rule."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


class LengthsInvalid(LauncherError, ValueError):
    """A file of sequence lengths cannot be read; the message names the line."""


class ScenarioInvalid(LauncherError, ValueError):
    """What is to be simulated cannot be read, or contradicts itself; names the option or the file."""


class TrafficRequestInvalid(LauncherError, ValueError):
    """Paths of a job cannot be planned as asked; says what does not go together."""


class LayoutRequestInvalid(LauncherError, ValueError):
    """A model, a topology or a device to find a layout for is wrong or missing."""


class CheckpointRequestInvalid(LauncherError, ValueError):
    """What is to be done with a checkpoint contradicts itself, or a file that says it cannot be read."""


class RunNotFound(LauncherError, LookupError):
    """There is no such run."""


class JobAmbiguous(LauncherError, LookupError):
    """Several jobs could be meant."""


class RunAlive(LauncherError, RuntimeError):
    """Another launcher holds the lock of the run."""

    def __init__(self, directory: Path, pid: int | None) -> None:
        self.directory, self.pid = directory, pid
        holder = f"process {pid}" if pid else "another process"
        super().__init__(
            f"run {directory.name} is being trained by {holder}. Wait for it, stop it with "
            f"`evermesh stop {directory}` (it saves a checkpoint first), or give another --name."
        )


class ResumeRefused(LauncherError, ValueError):
    """A run cannot go on the way it was asked to."""


class RelayoutRefused(LauncherError, ValueError):
    """A running job cannot go on with the layout that was asked for; it goes on with the one it has."""


class ListenInvalid(LauncherError, ValueError):
    """Nothing can be served at an address."""


class ClusterRequestInvalid(LauncherError, ValueError):
    """What is asked of the cluster store is wrong, or nothing is known there of what it is about."""


class DrainRefused(LauncherError, ValueError):
    """A running job cannot go on without the node that it is to leave; it goes on as it is."""


class RunUnusable(LauncherError, OSError):
    """The directory of a run cannot be made."""


class DevicesMissing(LauncherError, RuntimeError):
    """The machine has fewer devices than the job has workers."""


class RunTracked(LauncherError, RuntimeError):
    """Another process tells a tracker of the run."""


class TrackerMissing(LauncherError, ImportError):
    """The package of an experiment tracker is not installed."""


class ClusterMissing(LauncherError, ConnectionError):
    """There is no Ray cluster, or Ray itself is not installed."""


class AllocationMissing(LauncherError, ConnectionError):
    """This process is in no Slurm allocation, or in one that is too small."""


class SlurmSilent(LauncherError, OSError):
    """A command of Slurm failed, or gave no answer."""

    exit_code = 1


class RunNotSeen(LauncherError, LookupError):
    """A node does not see the directory of the run: it is not on storage that all nodes share."""


class StoppedAtOnce(LauncherError, RuntimeError):
    """A second signal ended the workers before they had saved; what to do now is in the message."""

    def __init__(self, text: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(text)


class Interrupted(LauncherError, RuntimeError):
    """Somebody has stopped a run before it could be judged."""

    def __init__(self, text: str, exit_code: int) -> None:
        self.exit_code = exit_code
        super().__init__(text)


class WorkersFailed(LauncherError, RuntimeError):
    """A worker raised or died; the others were stopped. The message is about the first one that failed."""

    def __init__(self, text: str, *, traceback: str | None = None, exit_code: int = 1) -> None:
        self.traceback, self.exit_code = traceback, exit_code
        super().__init__(text)


class WarmProcessLost(LauncherError, RuntimeError):
    """The process that forks workers ended."""

    exit_code = 1


class SharedMemoryMissing(LauncherError, OSError):
    """A node has no room for its shared-memory area."""

    exit_code = 1


class ControllerLost(LauncherError, RuntimeError):
    """The controller of a run does not answer; says where its log is."""

    exit_code = 1


class DemoFailed(LauncherError, AssertionError):
    """A check of the demo did not hold."""

    exit_code = 1


class NotReplicated(LauncherError, OSError):
    """Too few agents answer their controller: another may have been elected, so nothing is decided."""

    exit_code = 75


class Superseded(LauncherError, RuntimeError):
    """Another controller has been elected."""

    exit_code = 1

    def __init__(self, term: int, promised: int) -> None:
        self.term, self.promised = term, promised
        super().__init__(f"the agents obey the controller of term {promised}; this one, of term {term}, ends")

"""The errors of this room.

EvermeshError
├── ClusterUnusable     (OSError)       the cluster store cannot be read or written
├── EventLogUnusable    (OSError)       the event log cannot be opened or written
├── KeeperRefused       (OSError)       a keeper cannot be reached, or has no memory for snapshots
├── RecordsUnreadable   (ValueError)    a file of records of collectives is damaged, or of no known form
└── ScheduleInvalid     (ValueError)    a schedule of faults breaks a rule, or does not fit the run

RuntimeError
└── InjectedFault                       raised by a rank because the schedule of its run says so
"""

from collections.abc import Sequence
from pathlib import Path

from evermesh.checkpoint.stores.places import Place
from evermesh.parallelism.errors import EvermeshError


class ClusterUnusable(EvermeshError, OSError):
    """The cluster store cannot be used. A job goes on without it, and tries again."""

    def __init__(self, place: Place, what: str, error: OSError) -> None:
        super().__init__(
            f"the cluster store {place} cannot be {what}: {error}. Make it reachable from here, or name another one with "
            "EVERMESH_CLUSTER, or cluster in the job file."
        )
        self.place, self.errno = place, error.errno


class EventLogUnusable(EvermeshError, OSError):
    """The event log cannot be opened or written."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"the event log {path} cannot be written: {error}. Free space there, or choose another path.")
        self.path, self.errno = path, error.errno


class ScheduleInvalid(EvermeshError, ValueError):
    """A schedule of faults breaks a rule, or does not fit the run that it is for. Nothing was started."""

    def __init__(self, problems: Sequence[tuple[str, str]]) -> None:
        """``problems``: key and text of each."""
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{key}: {text}." for key, text in self.problems))


class InjectedFault(RuntimeError):
    """Raised by a rank because a schedule of its run says so; it stands for any bug, so it is no expected error."""


class KeeperRefused(EvermeshError, OSError):
    """A rank gets no memory for snapshots, so none is made on any; raised on all of them. Training can go on without."""

    def __init__(self, rank: int, cause: str) -> None:
        super().__init__(
            f"rank {rank} has no memory for snapshots: {cause}. Give the job more (docker run --shm-size, a volume of medium "
            "Memory on /dev/shm in Kubernetes), use more ranks, or set train.snapshot to off."
        )
        self.rank, self.cause = rank, cause


class RecordsUnreadable(EvermeshError, ValueError):
    """A file of records of collectives cannot be read."""

    def __init__(self, where: str, fact: str) -> None:
        """``where``: file, and line if it has lines."""
        super().__init__(
            f"{where}: {fact}. Give records as JSON lines, rings, or dumps of torch's flight recorder (pickle or JSON) whose "
            "names end in the rank."
        )
        self.where = where

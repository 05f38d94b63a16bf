"""What detectors are told besides records, all of it optional: what was planned, what the processes do, how clocks differ."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from evermesh.fault.process_state import ProcessState
from evermesh.parallelism.collectives import Phase

FOREVER_S = float("inf")
_NOISY = 0.05
"""Share of the time in which a rank waits for a processor, beyond which short times say little."""
_PATIENCE_S: dict[Phase, float] = {
    "start-up": FOREVER_S,
    "compile": FOREVER_S,
    "checkpoint": 600.0,
    "evaluate": 600.0,
    "probe": 60.0,
}


@dataclass(frozen=True, slots=True)
class Offset:
    """What the clock of a node is ahead of that of the first node."""

    offset_ns: int
    error_ns: int
    """The truth is not farther away than this."""


@dataclass(frozen=True, slots=True)
class Context:
    """What is known besides the records."""

    work_s: Mapping[tuple[int, int], float] = field(default_factory=dict)
    """By rank and step: planned computation, in any unit; what it explains is nobody's fault. Where it is given at all, ranks
    are compared only in steps in which it says what they had to do."""
    planned_s: Mapping[int, float] = field(default_factory=dict)
    """By step: what was planned for all ranks together, in any unit; steps are compared by it where it is given."""
    step_s: float | None = None
    """Expected time of a step; else it is taken from the records."""
    processes: Mapping[int, ProcessState | None] = field(default_factory=dict)
    """By rank; None: it does not run. A rank that is missing is one of which nobody knows."""
    offsets: Mapping[str, Offset] = field(default_factory=dict)
    """By node; else they are taken from the records."""
    starved: Mapping[int, float] = field(default_factory=dict)
    """By rank: share of the last second in which its process waited for a processor that others had; see ``processors``."""
    cut_links: Set[tuple[int, int]] = frozenset()
    """From and to: ranks between which nothing passes, as their connections say; see ``links``."""
    floor_s: float = 0.5
    """No shorter wait is a hang."""
    first_step_s: float = 60.0
    """The same before a step was seen: much is compiled and allocated in the first."""
    skew_s: float = 0.25
    """By how much the moments at which rings of different nodes were read may differ."""
    patience_s: Mapping[Phase, float] = field(default_factory=lambda: dict(_PATIENCE_S))
    """How long a rank may be in a phase that it declared before others that wait for it are a hang."""


def is_noisy(context: Context) -> bool:
    """Whether processors are known not to be enough for all that would run."""
    return max(context.starved.values(), default=0.0) > _NOISY

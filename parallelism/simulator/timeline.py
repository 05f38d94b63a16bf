"""What a simulation says: who runs what when, and who waits for whom."""

from dataclasses import dataclass
from typing import Literal

Cause = Literal["ring partner", "lock-step", "pipeline", "end of step"]
"""What a rank waits for: a member of a ring (directly or through others), a rank that shares experts or parameters with it, a
message of the stage before or behind, or the slowest rank before gradients are summed."""


@dataclass(frozen=True, slots=True)
class Span:
    """One micro-batch on one rank."""

    rank: int
    micro_batch: int
    """Index in the rank's list."""
    start_s: float
    stop_s: float
    sequences: tuple[int, ...]
    ring_size: int
    """Largest ring among its pieces."""
    num_tokens: int
    is_backward: bool = False
    """It is only the backward pass; then another span is the forward pass."""
    waited_s: float = 0.0
    """Of its time, what the rank waits inside it for others that run it too."""
    is_cut_off: bool = False
    """It did not end: a rank was lost."""


@dataclass(frozen=True, slots=True)
class Wait:
    """A rank with nothing to do."""

    rank: int
    start_s: float
    stop_s: float
    cause: Cause
    for_rank: int
    """Who comes last."""


@dataclass(frozen=True, slots=True)
class Timeline:
    """The spans of all ranks, by rank and in order."""

    spans: tuple[Span, ...]
    labels: tuple[str, ...]
    """What the ranks are called."""
    waits: tuple[Wait, ...] = ()
    """Between the spans, and behind the last; empty where nobody recorded them."""
    nodes: tuple[int, ...] = ()
    """Of every rank; empty: all are in one."""

    @property
    def makespan_s(self) -> float:
        """When the last span ends, seconds."""
        return max((span.stop_s for span in self.spans), default=0.0)

    def waited_s(self) -> dict[Cause, float]:
        """Seconds of all ranks together, by cause; what is waited inside spans counts as for ring partners."""
        found: dict[Cause, float] = {"ring partner": sum(span.waited_s for span in self.spans)}
        for wait in self.waits:
            found[wait.cause] = found.get(wait.cause, 0.0) + wait.stop_s - wait.start_s
        return {cause: seconds for cause, seconds in found.items() if seconds > 0}

    def busy_s(self) -> list[float]:
        """Seconds that every rank computes or communicates."""
        found = [0.0] * len(self.labels)
        for span in self.spans:
            found[span.rank] += span.stop_s - span.start_s - span.waited_s
        return found

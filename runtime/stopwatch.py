"""Times of what follows each other on a device."""

import itertools
import time

import torch


class Stopwatch:
    """Takes the time between marks; on a GPU by events on the current stream, since the host is far ahead of it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[float | torch.cuda.Event] = []

    def start(self) -> None:
        """The first mark; what was not taken is forgotten."""
        self._marks = [self._mark()]

    def lap(self) -> None:
        """The next mark."""
        self._marks.append(self._mark())

    def take(self) -> list[float]:
        """Seconds between every two marks. On a GPU it waits for the last one."""
        marks, self._marks = self._marks, []
        if marks and isinstance(marks[-1], torch.cuda.Event):
            marks[-1].synchronize()
        return [_seconds(before, after) for before, after in itertools.pairwise(marks)]

    def _mark(self) -> "float | torch.cuda.Event":
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(before: "float | torch.cuda.Event", after: "float | torch.cuda.Event") -> float:
    if isinstance(before, torch.cuda.Event) and isinstance(after, torch.cuda.Event):
        return before.elapsed_time(after) / 1e3
    assert isinstance(before, float)
    assert isinstance(after, float)
    return after - before


__all__ = ["Stopwatch"]

"""What the files of a run add up to, read on from where they were read last."""

import json
from collections import Counter
from typing import Any

from evermesh.launcher.lines import Lines
from evermesh.launcher.run_directory import Run

_WAITS = {"plan wait": "plan_wait_s", "checkpoint": "checkpoint_stop_s"}


class Totals:
    """Counts of a run since its launch; attempts and controllers come and go. Not for several threads at once."""

    def __init__(self, run: Run) -> None:
        self._steps, self._events = (Lines(path, from_start=True) for path in (run.telemetry, run.events))
        self.steps = self.skipped_steps = self.tokens = 0
        self.seconds: Counter[str] = Counter()
        """By what rank 0 spent the wall time of its steps on."""
        self.bytes: Counter[str] = Counter()
        """By tier of the link."""
        self.events: Counter[str] = Counter()
        """By kind."""

    def read_on(self) -> None:
        """Take what was written since the last time."""
        for line in self._steps.new():
            self._take_step(json.loads(line))
        for line in self._events.new():
            kind = _kind(line)
            if kind is not None:
                self.events[kind] += 1

    def _take_step(self, report: dict[str, Any]) -> None:
        self.steps += 1
        self.skipped_steps += not report["committed"]
        self.tokens += report["num_tokens"]
        waits = {part: report.get(name, 0.0) for part, name in _WAITS.items()}
        waits["snapshot"] = report.get("snapshot", {}).get("stop_s", 0.0)
        waits["training"] = max(0.0, report["step_s"] - sum(waits.values()))
        self.seconds.update(waits)
        for part in report.get("traffic", ()):
            self.bytes[part["tier"]] += part["wire_bytes"]


def _kind(line: bytes) -> str | None:
    try:
        return str(json.loads(line)["kind"])
    except (ValueError, KeyError, TypeError):  # what a killed writer left torn
        return None

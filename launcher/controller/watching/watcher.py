"""What the watcher of a job does with what it is told: it is a process of its own, so the controller never waits for it."""

from collections.abc import Callable

from evermesh.launcher.controller.status import DelayStatus
from evermesh.launcher.controller.watching.lines import Begin, LastStep, Problem, Said, Step, ToWatcher
from evermesh.launcher.controller.watching.thinking import Thinking
from evermesh.launcher.watching.messages import Connections, PlannedWork, ReadRings, RingPart, Window

AgentTells = Window | RingPart | PlannedWork | Connections
Heard = ToWatcher | tuple[str, AgentTells] | Problem
"""A line; a node with what its agent said; or what was wrong with that."""
_MOST_DELAYS = 1024
"""The longest that are told."""


class Watcher:
    """Of one job. ``say`` sends a line to the controller."""

    def __init__(self, say: Callable[[Said | ReadRings | Problem], None]) -> None:
        self._say = say
        self._thinking: Thinking | None = None
        self._last_step_s = 0.0

    def take(self, heard: Heard) -> None:
        """Take what was heard."""
        thinking = self._thinking
        match heard:
            case Begin():
                self._thinking = Thinking(heard.generation, heard.num_ranks, heard.num_nodes, self._say)
                self._last_step_s = 0.0
            case Step() if thinking is not None:
                thinking.expected.note(heard.step, heard.step_s)
            case LastStep():
                self._last_step_s = heard.step_s
            case (str() as node, message) if thinking is not None and message.generation == thinking.generation:
                try:
                    thinking.tell(node, message)
                except ValueError as error:
                    self._say(Problem(text=f"not understood of {node}: {error}"))
            case Problem():
                self._say(heard)

    def think(self) -> None:
        """Conclude what can be concluded now."""
        thinking = self._thinking
        if thinking is None:
            return
        try:
            findings = thinking.think(self._last_step_s)
        except Exception as error:  # noqa: BLE001  the boundary: detectors that fail cost findings, not the job
            self._say(Problem(text=f"nothing is concluded of this window: {type(error).__name__}: {error}"))
            return
        if findings is not None:
            delays = sorted(thinking.delays, key=lambda one: -one.ratio)[:_MOST_DELAYS]
            told = tuple(
                DelayStatus(source=of.source, target=of.target, ratio=round(of.ratio, 2), messages=of.messages)
                for of in delays
            )
            self._say(Said(generation=thinking.generation, findings=tuple(findings), delays=told))

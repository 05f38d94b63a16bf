"""Whether a worker gets on, seen from outside: by what it writes on the board, and by what the kernel says of its process."""

from evermesh.fault.process_state import TICKS_PER_S, ProcessState
from evermesh.launcher.agent.shared_memory import Slot

_LONGEST_LOOK_S = 0.5
"""What counts at most between two looks: who looks may have been stopped itself, or the whole machine."""
_COMPUTES = 0.15
"""Part of a core that a rank which waits does not use; threads of gloo wake up a hundred times per second."""
_BUSY = frozenset("RD")


class Pulse:
    """One local rank, looked at several times per second."""

    def __init__(self) -> None:
        self.slot: Slot | None = None
        """What it has written down last."""
        self._state: ProcessState | None = None
        self._looked_s: float | None = None
        self.idle_s = 0.0
        """Since it wrote something down, computed, or was held by a debugger, seconds."""
        self.stopped_s = 0.0
        """Since it is stopped, seconds."""

    def look(self, slot: Slot, now_s: float) -> None:
        """Take what it has written down by ``now_s``, on the monotonic clock."""
        since_s = 0.0 if self._looked_s is None else now_s - self._looked_s
        state, before = ProcessState.of(slot.pid), self._state
        has_written, self.slot, self._state, self._looked_s = slot != self.slot, slot, state, now_s
        seen_s = min(since_s, _LONGEST_LOOK_S)
        if state is None or before is None or has_written or state.is_held:
            self.idle_s = self.stopped_s = 0.0
            return
        self.stopped_s = self.stopped_s + seen_s if state.is_stopped else 0.0
        self.idle_s = 0.0 if _computes(before, state, since_s) else self.idle_s + seen_s


def _computes(before: ProcessState, after: ProcessState, seconds: float) -> bool:
    is_busy = before.letter in _BUSY and after.letter in _BUSY
    return is_busy or after.ticks - before.ticks > _COMPUTES * TICKS_PER_S * seconds

"""Whether a keeper answers: asked again and again by somebody who never waits for it."""

import time
from typing import Any

from evermesh.fault.process_state import ProcessState
from evermesh.fault.snapshot.keeper.client import KeeperClient

_EVERY_S = 1.0
_STOPPED_S, _SILENT_S = 2.0, 20.0
"""How long a keeper may owe an answer: one that is stopped, and one that may only be short of processor time."""
_LONGEST_LOOK_S = 0.5
"""What counts at most between two looks: who looks may have been stopped itself."""


class Answers:
    """What a keeper answers over one connection."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        """The last answer to ``inventory``."""
        self._owes = False
        self._looked_s = self._asked_s = time.monotonic()
        self._silent_s = self._stopped_s = 0.0
        """Since it owes an answer; of which it was stopped."""

    def take(self, client: KeeperClient) -> None:
        """Take what it has answered, and ask again. Raises ``KeeperLost``."""
        for answer in client.answers():
            self.last, self._owes = answer, False
        if not self._owes and time.monotonic() - self._asked_s >= _EVERY_S:
            client.tell("inventory")
            self._owes, self._asked_s, self._silent_s, self._stopped_s = True, time.monotonic(), 0.0, 0.0

    def missing(self, pid: int) -> str | None:
        """What is wrong with the keeper, process ``pid``, that it does not answer; None: nothing yet."""
        now_s, state = time.monotonic(), ProcessState.of(pid)
        seen_s, self._looked_s = min(now_s - self._looked_s, _LONGEST_LOOK_S), now_s
        if not self._owes or state is None or state.is_held:
            self._silent_s = self._stopped_s = 0.0
            return None
        self._silent_s += seen_s
        self._stopped_s = self._stopped_s + seen_s if state.is_stopped else 0.0
        if self._stopped_s >= _STOPPED_S:
            return f"it was stopped for {self._stopped_s:.1f} s"
        return f"it did not answer for {self._silent_s:.1f} s" if self._silent_s >= _SILENT_S else None

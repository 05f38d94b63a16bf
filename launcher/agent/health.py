"""The health of the node of an agent: a process beside it looks (``evermesh.fault.health``), the agent tells what changed."""

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from evermesh.fault.hardware.model import FoundGpu
from evermesh.fault.health.verdicts import Verdict, changed
from evermesh.launcher.agent.loop import Loop
from evermesh.launcher.agent.spec import AgentSpec
from evermesh.launcher.agent.warm import blocked_signals

_FIRST_WAIT_S = 20.0
"""For the first look, of milliseconds, after the warm process is there."""
_TESTS_WAIT_S = 120.0
_SILENT_S = 60.0
"""Longer than this and two looks nothing was heard: what it looks at does not answer."""
_CHECK = "health checks"


class NodeHealth:
    """Looks at the node from ``begin`` to ``close``; ``tell`` hears, in the loop's thread, all verdicts when one has changed.

    A job with ``preflight: off`` and no ``health_every_s`` has no such process, and no verdicts.
    """

    def __init__(self, loop: Loop, spec: AgentSpec, tell: Callable[[Sequence[Verdict]], None]) -> None:
        self._loop, self._spec, self._tell = loop, spec, tell
        self._child: subprocess.Popen[bytes] | None = None
        self._unread = b""
        self._at, self._heard_s = "its own start", time.monotonic()
        self.verdicts: tuple[Verdict, ...] = ()
        """The newest."""
        self.gpus: tuple[FoundGpu, ...] = ()
        """Of this node, without what is near them."""
        self._is_known = False

    def begin(self) -> None:
        """Start the process; it looks while the agent does something else."""
        if self._spec.preflight == "off" and self._spec.health_every_s is None:
            return
        told = {
            "places": _places(self._spec),
            "every_s": self._spec.health_every_s,
            "is_full": self._spec.preflight == "full",
        }
        command = [sys.executable, "-m", "evermesh.fault.health", json.dumps(told)]
        try:
            with blocked_signals():  # a signal to all that announces the end of the node is the agent's business
                self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        except OSError as error:
            self._cannot("warn", f"could not be started: {error}")
            return
        os.set_blocking(self._output, False)

    def finish_first(self) -> None:
        """Wait until the first look is over, and watch what follows. A node whose first look does not end is not fit."""
        wait_s = 0.0 if self._spec.preflight == "off" else _FIRST_WAIT_S
        until = time.monotonic() + (_TESTS_WAIT_S if self._spec.preflight == "full" else wait_s)
        while self._child is not None and not self._is_known and time.monotonic() < until:
            select.select([self._output], [], [], max(0.0, until - time.monotonic()))
            self._read()
        if self._child is not None:
            if not self._is_known and self._spec.preflight != "off":
                self._cannot("bad", f"did not get past {self._at}")
            self._loop.on_readable(self._output, self._hear)

    def look(self) -> None:
        """Notice that the process has fallen silent; called now and then."""
        every_s = self._spec.health_every_s
        if self._child is None or every_s is None:
            return
        silent_s = time.monotonic() - self._heard_s
        if silent_s > _SILENT_S + 2 * every_s and not any(verdict.check == _CHECK for verdict in self.verdicts):
            self._cannot("warn", f"have been looking at {self._at} for {silent_s:.0f} s")
            self._tell(self.verdicts)

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._loop.forget(self._output)
            self._child.kill()
            for pipe in (self._child.stdin, self._child.stdout):
                assert pipe is not None
                pipe.close()
            self._child.wait()
        self._child = None

    @property
    def _output(self) -> int:
        assert self._child is not None
        assert self._child.stdout is not None
        return self._child.stdout.fileno()

    def _hear(self) -> None:
        before = self.verdicts
        self._read()
        if changed({verdict.check: verdict for verdict in before}, self.verdicts) or not before:
            self._tell(self.verdicts)

    def _read(self) -> None:
        """Take what the process has said; where it has ended, give it up."""
        try:
            part = os.read(self._output, 1 << 20)
        except BlockingIOError:
            return
        self._heard_s = time.monotonic()
        *lines, self._unread = (self._unread + part).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        if not part:
            self._note_end()

    def _take(self, told: dict[str, Any]) -> None:
        self._at = told.get("at", self._at)
        if "gpus" in told:
            self.gpus = tuple(_gpu(values) for values in told["gpus"])
        if "verdicts" in told:
            self.verdicts, self._is_known = tuple(Verdict(**values) for values in told["verdicts"]), True

    def _note_end(self) -> None:
        """It ends by itself only where it was to look once; anything else costs verdicts, never the job."""
        assert self._child is not None
        child = self._child
        self.close()
        if not self._is_known or self._spec.health_every_s is not None:
            self._cannot("warn", f"ended with {child.returncode}; the last thing they looked at was {self._at}")
            self._is_known = True

    def _cannot(self, state: Any, reason: str) -> None:
        way_out = "`evermesh doctor` on the node tells more; dmesg tells which device hangs"
        known = tuple(verdict for verdict in self.verdicts if verdict.check != _CHECK)
        self.verdicts = (*known, Verdict(_CHECK, state, reason, {}, way_out))


def _gpu(told: dict[str, Any]) -> FoundGpu:
    """As the process tells it."""
    lists = {key: tuple(value) for key, value in told.items() if isinstance(value, list)}
    return FoundGpu(**told | lists)


def _places(spec: AgentSpec) -> dict[str, str]:
    """Folders that a job writes to from this node."""
    own = {"the journal": str(spec.journal_folder)} if spec.journal_folder is not None else {}
    return {"the run": str(spec.run)} | own

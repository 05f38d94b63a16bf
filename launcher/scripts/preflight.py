"""The look at this machine that scripts get too: a process beside the ranks, while they load their libraries.

With ``full`` it also tests, ten seconds and more, and ranks wait for it. A machine that is not fit ends the job.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from evermesh.launcher.scripts.options import Preflight
from evermesh.launcher.scripts.wakeups import Wakeups

TESTS_S = 120.0
"""How long tests may take before ranks start all the same."""


class Look:
    """One look; ``unfit_because`` says why the machine is not fit, in sentences, once that is known."""

    def __init__(self, mode: Preflight, folder: Path) -> None:
        self._mode, self._folder = mode, folder
        self._child: subprocess.Popen[bytes] | None = None
        self._wakeups: Wakeups | None = None
        self._unread = b""
        self.unfit_because = ""

    def begin(self, wakeups: Wakeups) -> None:
        """Start looking; what is found arrives with the wakeups."""
        told = {"places": {"the logs": str(self._folder)}, "every_s": None, "is_full": self._mode == "full"}
        command = [sys.executable, "-m", "evermesh.fault.health", json.dumps(told)]
        try:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        except OSError:  # no process can be started: the ranks will say so
            return
        self._wakeups = wakeups
        os.set_blocking(self._output, False)
        wakeups.add(self._output, self._hear)

    @property
    def is_under_way(self) -> bool:
        return self._child is not None

    def close(self) -> None:
        """End it, whatever it is doing."""
        if self._child is None:
            return
        assert self._wakeups is not None
        self._wakeups.remove(self._output)
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
        part = os.read(self._output, 1 << 20)
        *lines, self._unread = (self._unread + part).split(b"\n")
        for line in lines:
            self._take(json.loads(line))
        if not part:  # it has ended
            self.close()

    def _take(self, told: dict[str, Any]) -> None:
        bad = [verdict for verdict in told.get("verdicts", ()) if verdict["state"] == "bad"]
        self.unfit_because = " ".join(_sentence(verdict) for verdict in bad)


def _sentence(verdict: dict[str, Any]) -> str:
    way_out = f" Way out: {verdict['way_out']}." if verdict["way_out"] else ""
    return f"{verdict['check']}: {verdict['reason']}.{way_out}"

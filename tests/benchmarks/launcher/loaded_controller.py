"""``python -m tests.benchmarks.launcher.loaded_controller RUN RESULT SLOWER``: a real controller whose nodes somebody else
plays.

With SLOWER it is as many times more patient with agents. It writes how long messages took from who said them to the end of
their handling, and what it used, as JSON into RESULT.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import psutil

from evermesh.launcher.controller import __main__ as process
from evermesh.launcher.controller import leases
from evermesh.launcher.controller.controller import Controller
from evermesh.launcher.controller.nodes import Node
from evermesh.launcher.controller.watching import Watch, watcher_process
from evermesh.launcher.controller.watching.lines import Said
from evermesh.launcher.messages import Beat, FromAgent

_WATCHER = "tests.benchmarks.launcher.patient_watcher"

WARM_UP_S = 5.0
"""From the first beat of a training rank, until which nothing counts."""


class Played:
    """A place whose agents come by themselves."""

    address = "127.0.0.1"

    def start(self, nodes: Sequence[str]) -> None:
        """They are there."""

    def adopt(self, pids: dict[str, int]) -> None:
        """They are there."""

    def is_alive(self, node: str) -> bool | None:
        """Nobody knows."""
        return None

    def replace(self, node: str) -> bool:
        """There are no others."""
        return False

    def shortage(self) -> str:
        """Nothing is known."""
        return ""

    def time_left_s(self) -> float | None:
        """There is no limit."""
        return None

    def end(self, joining: Sequence[str] = ()) -> None:
        """They leave when they are told to."""


class Counted(Watch):
    """Notes how many windows detectors have joined, and how much memory their process took."""

    def _take(self, said: Said) -> None:
        super()._take(said)
        Measured.joined += 1

    def close(self) -> None:
        if self._watcher is not None:
            status = Path(f"/proc/{self._watcher.pid}/status").read_text()
            Measured.watcher_bytes = 1024 * int(status.split("VmHWM:")[1].split()[0])
        super().close()


class Measured(Controller):
    """Notes when the handling of each beat has ended; a beat says in ``memory_free_bytes`` when it was made, monotonic ns."""

    handled_s: list[float] = []  # noqa: RUF012  of the only one in this process
    began_s = float("inf")
    joined = 0
    """Windows of all ranks of which something was concluded."""
    watcher_bytes = 0
    """The most that the watcher took."""

    def receive(self, node: Node, message: FromAgent) -> None:
        super().receive(node, message)
        if isinstance(message, Beat) and message.ranks:
            now_s = time.monotonic()
            Measured.began_s = min(Measured.began_s, now_s)
            if now_s - Measured.began_s > WARM_UP_S:
                self.handled_s.append(now_s - message.memory_free_bytes / 1e9)


def main() -> None:
    """Control the run on one core; write the result when the job has ended."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    slower, result = float(sys.argv.pop(3)), Path(sys.argv.pop(2))
    with (
        mock.patch.object(process, "placement_for", return_value=Played()),
        mock.patch.object(process, "Controller", Measured),
        mock.patch("evermesh.launcher.controller.controller.Watch", Counted),
        mock.patch.object(process, "_PING_S", process._PING_S * slower),
        mock.patch.object(leases, "LEASE_S", leases.LEASE_S * slower),
        mock.patch.object(watcher_process, "COMMAND", (sys.executable, "-m", _WATCHER, str(slower))),
    ):
        try:
            process.main()
        finally:
            me = psutil.Process()
            used = me.cpu_times()
            found = {
                "handled_s": Measured.handled_s,
                "processor_s": used.user + used.system,
                "trained_s": time.monotonic() - Measured.began_s,
                "memory_bytes": me.memory_info().rss,
                "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "joined": Measured.joined,
                "watcher_bytes": Measured.watcher_bytes,
            }
            result.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

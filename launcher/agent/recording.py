"""The rings of the ranks of a node, as its agent has them."""

import subprocess
import sys
from pathlib import Path

from evermesh.fault.recorder.area import RingArea
from evermesh.fault.recorder.errors import TapUnusable
from evermesh.fault.recorder.native.building import find_compiler, is_settled, torch_version


class Recording:
    """Their folder in shared memory, made when ranks that record are started; and the native tap, built beside them.

    Whatever fails here costs records, never ranks.
    """

    def __init__(self, run: Path, node: str) -> None:
        self._run, self._node = run, node
        self._area: RingArea | None = None
        self._has_looked = False
        self._builder: subprocess.Popen[bytes] | None = None

    def begin(self, *, wanted: bool) -> RingArea | None:
        """Where the ranks of a new generation record; those of the one before are gone, and their rings were kept."""
        if not wanted:
            return None
        self._build_if_missing()
        try:
            self._area = self._area or RingArea(self._run, self._node)
            self._area.clear()
        except OSError as error:
            print(f"collectives are not recorded here: {error}", flush=True)
            self._area = None
        return self._area

    def keep(self) -> None:
        """Copy the rings into the directory of the run."""
        if self._area is not None:
            self._area.keep()

    def close(self) -> None:
        """Keep the rings, and give their memory back."""
        if self._area is not None:
            self._area.close()
        self._area = None
        if self._builder is not None:
            self._builder.poll()  # it builds for whoever comes next, and ends by itself

    def _build_if_missing(self) -> None:
        """Have the native tap built where that has not been tried: ranks that start now record in Python."""
        if self._has_looked:
            return
        self._has_looked = True
        try:
            version = torch_version()
            if version is None or is_settled(version):
                return
            find_compiler()
            command = [sys.executable, "-m", "evermesh.fault.recorder.native", "--gently"]
            self._builder = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
        except (OSError, TapUnusable) as error:
            print(f"the native tap is not built: {error}", flush=True)

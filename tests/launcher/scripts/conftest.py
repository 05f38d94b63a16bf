"""Scripts that know nothing of us, launched in processes of their own."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

EVERMESH = [sys.executable, "-c", "from evermesh.launcher.cli import main; main()", "launch"]


class Launcher:
    """``evermesh launch`` in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[subprocess.Popen[str]] = []
        self.variables = {"XDG_STATE_HOME": str(folder / "state"), "PET_PREFLIGHT": "off"}
        """Jobs of tests are not listed among those of the user; most count processes, and want no look at the machine."""

    def script(self, text: str, name: str = "script.py") -> str:
        """Write a script into the folder."""
        (self.folder / name).write_text(textwrap.dedent(text))
        return name

    def run(self, *arguments: str | Path, timeout_s: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            [*EVERMESH, "--log-dir", str(self.folder / "logs"), *map(str, arguments)],
            cwd=self.folder,
            env=os.environ | self.variables | variables,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """Start and return at once; killed when the test ends."""
        process = subprocess.Popen(
            [*EVERMESH, "--log-dir", str(self.folder / "logs"), *arguments],
            cwd=self.folder,
            env=os.environ | self.variables | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def wait_for(self, *names: str, timeout_s: float = 20) -> None:
        """Wait until the ranks have made these files."""
        deadline_s = time.monotonic() + timeout_s
        while not all((self.folder / name).exists() for name in names):
            assert time.monotonic() < deadline_s, f"{names} were not all made in {timeout_s} s"
            time.sleep(0.01)

    @property
    def logs(self) -> Path:
        """The folder of the only run."""
        (found,) = (self.folder / "logs").iterdir()
        return found


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    found = Launcher(tmp_path)
    yield found
    for process in found.started:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.communicate()


@pytest.fixture
def port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as found:
        found.bind(("", 0))
        return int(found.getsockname()[1])

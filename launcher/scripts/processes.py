"""The process tree of one rank, and the guardian that ends all of them when the launcher is killed."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from evermesh.launcher.scripts.nodes import Place

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


class RankProcess:
    """A rank and its children: a session, and with it a process group, of its own.

    The rank stays a zombie until ``reap``, so that no stranger gets its number while signals may still be sent to it.
    """

    def __init__(
        self, place: Place, command: Sequence[str], environment: Mapping[str, str], *, stdout: int, stderr: int
    ) -> None:
        launcher = os.getpid()
        self.place = place
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            preexec_fn=lambda: _die_with(launcher),
        )
        self.pidfd = os.pidfd_open(self.pid)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: int) -> None:
        """Send a signal to the rank itself; what its children should know is its own business."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def code(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        found = os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is None:
            return None
        return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status

    def kill_tree(self) -> None:
        """End the rank and whatever it started, at once; stopped processes too."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self, timeout_s: float) -> None:
        """Wait until the rank is gone, and forget it.

        Raises:
            subprocess.TimeoutExpired: the kernel holds it, as it does during some writes to a dead disk.
        """
        self._process.wait(timeout_s)
        os.close(self.pidfd)


def _die_with(launcher: int) -> None:
    """Runs in the child: it is killed when the thread that started it ends, whatever ends it."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != launcher:  # it was already gone
        os._exit(1)


class Guardian:
    """A process that only waits for the launcher's end and then kills the process groups it was told about.

    The death signal of the kernel reaches the ranks but not their children; this reaches both.
    """

    def __enter__(self) -> Self:
        reader, self._writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._writer)
                _guard(reader)
            finally:
                os._exit(0)
        os.close(reader)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._writer)
        os.waitpid(self._pid, 0)

    def watch(self, process: RankProcess) -> None:
        """Kill the group of this rank should the launcher die."""
        self._tell(f"{process.pid}\n")

    def forget(self, process: RankProcess) -> None:
        """The group is gone, and its number free for others."""
        self._tell(f"-{process.pid}\n")

    def _tell(self, line: str) -> None:
        with suppress(BrokenPipeError):  # somebody killed it; the ranks still have the death signal
            os.write(self._writer, line.encode())


def _guard(reader: int) -> None:
    os.setsid()  # no signal meant for the launcher's group ends it
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):  # who waits for the end of the launcher's output must not wait for us
        os.dup2(nowhere, descriptor)
    groups: set[int] = set()
    with os.fdopen(reader) as lines:
        for line in lines:
            groups ^= {abs(int(line))}
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, signal.SIGKILL)


@contextmanager
def held_port(wanted: int | None) -> Iterator[int]:
    """The port of a generation. A free one is held until the end of the block, so that nobody else is given it.

    It is bound but not listening: a server that sets SO_REUSEADDR, as torch's store does, may still open it.
    """
    if wanted is not None:
        yield wanted
        return
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("", 0))
        yield holder.getsockname()[1]

"""The warm process of a node: it has torch loaded, one task, no CUDA, and every worker is forked from it.

Python's fork server is that process. Whether it may still be forked is looked at from outside, before every fork: a
forked copy of a process with threads or an open CUDA device may hang at any later time.
"""

import os
import re
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, get_context, resource_tracker, util
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path

from evermesh.launcher.errors import WarmProcessLost
from evermesh.launcher.interrupts import SIGNALS

_FORK = get_context("forkserver")
_FRESH = get_context("spawn")
_FIRST = "evermesh.launcher.agent.warm_process"
_PROBE_WAIT_S = 10.0
_LONGEST_FOLDER = 107 - len("/pymp-12345678/listener-12345678")
"""Bytes of the name of a folder for temporary files in which ``multiprocessing`` can make sockets: their names are short."""
_SHORT_FOLDER = Path("/tmp")
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def warm_up(module: str, threads: int) -> None:
    """Start the warm process, unless it runs already, and wait until it has loaded ``module``.

    Numeric libraries read their number of threads when they are loaded: it is set before.

    Raises:
        WarmProcessLost: it ended while it loaded the module.
    """
    _FORK.set_forkserver_preload([_FIRST, module])
    # started on its own first: starting it unblocks SIGINT and SIGTERM, which it ignores itself
    with blocked_signals():
        resource_tracker.ensure_running()
    _keep_sockets_short()
    with thread_limits(threads), blocked_signals():
        forkserver.ensure_running()
    probe = _FORK.Process(target=_nothing, daemon=True)
    try:
        probe.start()
    except (EOFError, ConnectionError) as error:
        raise WarmProcessLost(f"the process that forks workers ended while it loaded {module}.") from error
    probe.join(_PROBE_WAIT_S)


def _keep_sockets_short() -> None:
    """Have ``multiprocessing`` make its sockets below /tmp where the folder of ``TMPDIR`` has too long a name for that."""
    folder = tempfile.gettempdir()
    if len(os.fsencode(folder)) > _LONGEST_FOLDER and _SHORT_FOLDER.is_dir():
        tempfile.tempdir = str(_SHORT_FOLDER)
        try:
            util.get_temp_dir()  # made once, and kept for this process and those that it starts
        finally:
            tempfile.tempdir = folder


def context() -> tuple[ForkServerContext | SpawnContext, str | None]:
    """How to start a worker now; with the reason where it must be a fresh interpreter."""
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    reason = unfit_to_fork(pid) if pid is not None else "there is no warm process"
    return (_FORK, None) if reason is None else (_FRESH, reason)


def unfit_to_fork(pid: int) -> str | None:
    """Why a process must not be forked; None if it may."""
    process = Path(f"/proc/{pid}")
    try:
        tasks = len(os.listdir(process / "task"))
        opened = list(_opened_files(process))
    except OSError as error:
        return f"the warm process {pid} cannot be looked at ({error.strerror})"
    if tasks != 1:
        return f"the warm process {pid} has {tasks} tasks"
    devices = [target for target in opened if re.match(r"/dev/nvidia(\d|ctl|-uvm)", target)]
    return f"the warm process {pid} has opened CUDA ({devices[0]})" if devices else None


@contextmanager
def thread_limits(threads: int) -> Iterator[None]:
    """The environment that numeric libraries read when they are loaded."""
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


@contextmanager
def blocked_signals() -> Iterator[None]:
    """What starts inside inherits the mask: signals reach the whole process group, but only the agent answers them.

    SIGUSR1, which asks a worker what it is doing, waits until the worker can answer.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (*SIGNALS, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _opened_files(process: Path) -> Iterator[str]:
    for link in os.listdir(process / "fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(process / "fd" / link)


def _nothing() -> None:
    """What a process runs that only shows that the warm process answers."""

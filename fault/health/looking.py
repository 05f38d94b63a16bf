"""Looking at a node: cheap reads only, some milliseconds, again and again; each look is judged with those before it."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from evermesh.fault.health.gpu.judging import judge_gpus
from evermesh.fault.health.gpu.reading import GpusReading, read_gpus
from evermesh.fault.health.gpu.xid import judge_xids
from evermesh.fault.health.host import load, memory, network
from evermesh.fault.health.host.clock import judge_clock, read_clock, read_keepers
from evermesh.fault.health.host.disks import judge_disk, judge_shared_memory, read_disk
from evermesh.fault.health.host.files import FileCheck, Files, Look, read_files
from evermesh.fault.health.host.kernel_log import KernelLog, LogLine, is_of_interest, judge_log
from evermesh.fault.health.verdicts import Verdict, unreadable

Places = Mapping[str, Path]
"""Folders that a job writes to, by what they are for."""
_FILE_CHECKS: Mapping[str, FileCheck] = {
    "memory": memory.AVAILABLE,
    "memory errors": memory.ERRORS,
    "swap": memory.SWAP,
    "OOM kills": memory.KILLED,
    "network": network.INTERFACES,
    "InfiniBand": network.INFINIBAND,
    "load": load.LOAD,
    "pressure": load.PRESSURE,
    "processes": load.PROCESSES,
    "open files": load.FILE_LIMIT,
}
_PATTERNS = sorted({pattern for check in _FILE_CHECKS.values() for pattern in check.patterns})
_SHARED_MEMORY = Path("/dev/shm")


class Watch:
    """Looks at this node whenever it is asked to; keeps what it needs to compare.

    ``tell`` hears what is looked at next: who looks from outside then knows where it hangs.
    """

    def __init__(
        self, places: Places | None = None, *, root: Path = Path("/"), tell: Callable[[str], None] | None = None
    ) -> None:
        self._places = {"temporary files": Path(tempfile.gettempdir())} | dict(places or {})
        self._root = root
        self._tell = tell or (lambda what: None)
        self._first: Files | None = None
        self._last: Files | None = None
        self._first_gpus: GpusReading | None = None
        self._log = KernelLog()
        self._lines: list[LogLine] = []
        self._began_s: float | None = None
        """Of the first look, by the clock of the kernel log: seconds after boot, without time asleep."""

    def look(self) -> list[Verdict]:
        """All verdicts, now."""
        return [*self.host(), *self.gpus()]

    def host(self) -> Iterator[Verdict]:
        """Of the machine without its GPUs, but for the clock."""
        self._tell("files of the kernel")
        now = read_files(_PATTERNS, self._root)
        look = Look(now, self._first, self._last)
        for name, check in _FILE_CHECKS.items():
            yield from _judged(name, check, look)
        self._first, self._last = self._first or now, now
        for what, folder in self._places.items():
            self._tell(f"the disk of {what}, {folder}")
            yield judge_disk(what, folder, read_disk(folder))
        yield judge_shared_memory(read_disk(_SHARED_MEMORY, writes=False), _SHARED_MEMORY)
        self._tell("the kernel log")
        self._lines += [line for line in self._log.read() if is_of_interest(line)]
        yield from judge_log(self._lines, self._log.why_not)

    def gpus(self) -> list[Verdict]:
        """Of the GPUs; ask ``host`` before, for it reads the kernel log."""
        self._tell("the GPU driver")
        reading = read_gpus()
        found = judge_gpus(reading, self._first_gpus) + judge_xids(self._lines, self._began_s)
        self._first_gpus = self._first_gpus or reading
        self._began_s = self._began_s or time.monotonic()
        return found


def clock(root: Path = Path("/")) -> Verdict:
    """Of the clock of this machine. Jobs do not depend on it: they compare clocks of nodes by what these do together."""
    return judge_clock(read_clock(), read_keepers(root))


def _judged(name: str, check: FileCheck, look: Look) -> Sequence[Verdict]:
    try:
        return check.judge(look)
    except (ValueError, KeyError, IndexError) as error:  # a kernel that writes these files in another way
        return [unreadable(name, f"{type(error).__name__}: {error}")]

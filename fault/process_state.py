"""What the kernel says of a process, for whoever looks at it from outside; see proc(5)."""

from pathlib import Path
from typing import NamedTuple, Self

TICKS_PER_S = 100


class ProcessState(NamedTuple):
    """A process at one moment."""

    letter: str
    """``R``: it runs, or would; ``D``: waits for a disk; ``T``: stopped; ``t``: held by a debugger."""
    ticks: int
    """Processor time of all its threads so far, 1/100 s."""
    is_held: bool
    """Stopped by a debugger."""

    @classmethod
    def of(cls, pid: int) -> Self | None:
        """That of ``pid``; None if it does not run."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return None
        letter = fields[0].decode()
        is_held = letter == "t" or (letter == "T" and _is_traced(pid))
        return cls(letter, int(fields[11]) + int(fields[12]), is_held)

    @property
    def is_stopped(self) -> bool:
        """By a signal, and by no debugger."""
        return self.letter == "T" and not self.is_held


def _is_traced(pid: int) -> bool:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    return any(line.startswith("TracerPid:") and line.split()[1] != "0" for line in lines)

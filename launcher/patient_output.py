"""Output of processes that must outlive a full disk: what the log cannot take is dropped."""

import io
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _PatientFile(io.FileIO):
    def write(self, content: "ReadableBuffer", /) -> int:
        try:
            return super().write(content)
        except OSError:
            return memoryview(content).nbytes


def outlive_a_full_disk() -> None:
    """Have ``print``, and tracebacks, raise nothing more in this process."""
    sys.stdout, sys.stderr = (_stream(descriptor) for descriptor in (1, 2))


def _stream(descriptor: int) -> io.TextIOWrapper:
    file = io.BufferedWriter(_PatientFile(descriptor, "w", closefd=False))
    return io.TextIOWrapper(file, encoding="utf-8", errors="replace", line_buffering=True)

"""Recorders for tests: rings in shared memory that go with the test."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evermesh.checkpoint.background.memory import FOLDER
from evermesh.fault.recorder.recorder import Recorder, Wanted
from evermesh.fault.recorder.ring import Ring, RingSpec


@contextmanager
def rings() -> Iterator[Path]:
    """A folder in shared memory."""
    folder = FOLDER / f"evermesh-test-rings-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


def spec_in(folder: Path, rank: int = 0, world_size: int = 1) -> RingSpec:
    """The ring of a rank there."""
    return RingSpec(folder / f"0-{rank}.ring", rank, world_size, 0, "node-0", str(folder))


def empty_ring(folder: Path) -> Ring:
    """One without records."""
    return Ring.make(spec_in(folder))


@contextmanager
def recording(folder: Path, rank: int, world_size: int, wanted: Wanted) -> Iterator[Recorder]:
    """Record what this process does in the block."""
    recorder = Recorder(spec_in(folder, rank, world_size), wanted=wanted)
    try:
        yield recorder
    finally:
        recorder.stop()

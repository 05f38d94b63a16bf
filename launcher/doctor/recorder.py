"""The section about the recorder: is there room for rings, which tap records, what does it cost. Imports no torch."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from evermesh.checkpoint.background.memory import FOLDER
from evermesh.fault.health.verdicts import Verdict
from evermesh.fault.recorder.errors import TapUnusable
from evermesh.fault.recorder.native.building import find_compiler, find_tap, forget_taps, torch_version
from evermesh.fault.recorder.ring_format import RING_BYTES

_BUILD_S = 700.0
_TEST_S = 120.0
_GOAL_US = 1.0
"""What a collective may take longer, with start and end."""


def check_recorder(*, rebuild: bool = False) -> Iterator[Verdict]:
    """Look, build what is missing, test and measure it. Takes half a minute where it builds, else seconds.

    ``rebuild``: as if nothing had been built here before.
    """
    yield _check_memory()
    version = torch_version()
    if version is None:
        yield Verdict("torch", "bad", "torch is not installed", way_out="pip install torch")
        return
    try:
        if rebuild:
            forget_taps()
        _build()
        library = find_tap(version)
    except TapUnusable as error:
        yield Verdict("tap", "warn", f"Python records, not the native tap: {error}", way_out=_way_out())
        return
    yield _measure(library, version)


def _check_memory() -> Verdict:
    ranks = os.cpu_count() or 1
    try:
        status = os.statvfs(FOLDER)
    except OSError as error:
        return Verdict("room for rings", "bad", f"{FOLDER}: {error.strerror}", way_out=f"mount a tmpfs at {FOLDER}")
    free, needed = status.f_bavail * status.f_frsize, ranks * RING_BYTES
    fact = f"{free >> 20:,} MiB are free in {FOLDER}; {ranks} ranks need {needed / (1 << 20):.1f} MiB"
    if free < needed:
        return Verdict("room for rings", "bad", fact, way_out="make it larger (docker: --shm-size), or set record: off")
    return Verdict("room for rings", "ok", fact)


def _build() -> None:
    """Build in a child: this process stays without torch.

    Raises:
        TapUnusable: it took too long.
    """
    command = [sys.executable, "-m", "evermesh.fault.recorder.native"]
    try:
        subprocess.run(command, capture_output=True, timeout=_BUILD_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise TapUnusable(f"building took more than {_BUILD_S:.0f} s") from error


def _way_out() -> str:
    try:
        find_compiler()
    except TapUnusable:
        return "install g++ (or set CXX) and run evermesh doctor again"
    return "evermesh doctor --rebuild; the tap in Python does not see what C++ issues, such as DDP's reducer"


def _measure(library: Path, version: str) -> Verdict:
    command = [sys.executable, "-m", "evermesh.fault.recorder.native.self_test", str(library)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TEST_S, check=False)
        cost = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        cost = None
    if cost is None:
        fact = f"the native tap for torch {version} was built, but fails its self-test now"
        return Verdict("tap", "warn", fact, way_out="evermesh doctor --rebuild")
    fact = (
        f"native, for torch {version}: adds {cost['start_us']:.2f} us to a collective, with its end "
        f"{cost['start_and_end_us']:.2f} us ({library})"
    )
    is_slow = cost["start_and_end_us"] > _GOAL_US
    return Verdict("tap", "ok", fact, way_out=f"more than {_GOAL_US} us: is the machine busy?" if is_slow else "")

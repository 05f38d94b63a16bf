"""The logs of a job: which files they are, and printing them as ``tail`` does."""

import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from evermesh.launcher.client import Client
from evermesh.launcher.errors import ControllerLost, RunNotFound
from evermesh.launcher.finding import FoundJob

_LOOK_S = 0.2
_DUMP_S = 0.5
"""How long the ranks get to write down what they are doing."""
_TAIL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class LogFile:
    """One log and what to call it."""

    label: str
    path: Path


def log_files(
    job: FoundJob, *, ranks: Sequence[int] | None = None, stacks: bool = False, control: bool = False
) -> list[LogFile]:
    """The logs that are asked for.

    Raises:
        RunNotFound: there are none; says which there are.
    """
    found = list(_script_logs(job.directory) if job.run is None else _run_logs(job.directory, stacks, control))
    wanted = [log for log in found if ranks is None or control or _rank(log.label) in ranks]
    if not wanted:
        known = ", ".join(log.label for log in found) or "none"
        raise RunNotFound(f"{job.name} has no such logs in {job.directory}. There are: {known}.")
    return wanted


def ask_for_stacks(job: FoundJob) -> None:
    """Have the ranks of a living run write down what they are doing; those of a dead one did when it failed."""
    if job.run is None or not job.run.is_alive():
        return
    try:
        Client(job.run, patience_s=0.0).write_stacks()
        time.sleep(_DUMP_S)
    except ControllerLost as error:
        print(f"what is shown is not new: {error}", file=sys.stderr)


def print_logs(logs: Sequence[LogFile], lines: int, *, follow: bool) -> None:
    """Print the last lines of every log, and with ``follow`` whatever comes, until Ctrl-C."""
    width = max(len(log.label) for log in logs)
    offsets = {}
    for log in logs:
        content, offsets[log] = _tail(log.path)
        _print(log, content.splitlines()[-lines:] if lines else [], width, len(logs) > 1)
    while follow:
        time.sleep(_LOOK_S)
        for log in logs:
            content, offsets[log] = _whole_lines(log.path, offsets[log])
            _print(log, content.splitlines(), width, len(logs) > 1)


def _run_logs(directory: Path, stacks: bool, control: bool) -> Iterator[LogFile]:
    folder = directory / "logs"
    if control:
        for path in [*folder.glob("controller.log"), *sorted(folder.glob("agent-*.log"))]:
            yield LogFile(path.stem, path)
        return
    paths = folder.glob(f"rank-*.{'stacks' if stacks else 'log'}")
    yield from (LogFile(path.stem, path) for path in sorted(paths, key=lambda path: _rank(path.stem)))


def _script_logs(directory: Path) -> Iterator[LogFile]:
    """Of the last generation, by node where there are several."""
    attempts = sorted(directory.glob("**/attempt_*"), key=lambda path: (path.parent, int(path.name.split("_")[1])))
    newest = {path.parent: path for path in attempts}
    for attempt in newest.values():
        for path in sorted(attempt.glob("*/std*.log")):
            yield LogFile(f"rank-{path.parent.name}.{path.stem}", path)


def _rank(label: str) -> int:
    found = re.match(r"rank-(\d+)", label)
    return int(found[1]) if found else -1


def _tail(path: Path) -> tuple[str, int]:
    """The end of a file, and where that is."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        content = file.read()
        return content.decode(errors="replace"), file.tell()


def _whole_lines(path: Path, offset: int) -> tuple[str, int]:
    if path.stat().st_size <= offset:
        return "", path.stat().st_size
    with path.open("rb") as file:
        file.seek(offset)
        content = file.read()
    whole = content[: content.rfind(b"\n") + 1]
    return whole.decode(errors="replace"), offset + len(whole)


def _print(log: LogFile, lines: Sequence[str], width: int, labelled: bool) -> None:
    for line in lines:
        print(f"{log.label:<{width}} | {line}" if labelled else line, flush=True)

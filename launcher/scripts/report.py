"""Why a rank failed, in its own words, and how that is told."""

import json
import os
import re
import signal
from pathlib import Path

from evermesh.launcher.scripts.environment import Start
from evermesh.launcher.scripts.policy import Failure

_MARK = "Traceback (most recent call last):"
_CHAINS = ("During handling of the above exception", "The above exception was the direct cause")
_NOISE = re.compile(r"^(\[rank\d+\]: ?|terminate called without an active exception$)", re.MULTILINE)
"""What torch puts before every line of a traceback, and what its threads may say at the end."""
_TAIL_BYTES = 64 << 10
_LINES = 60
"""At most so many lines of a traceback are shown,"""
_LINES_WITHOUT = 20
"""and so many where there is none."""


def read_failure(start: Start, rank: int, code: int, time_s: float) -> Failure:
    """What is known about the end of a rank: its error file as ``@record`` writes it, else the end of its stderr."""
    recorded = _recorded(start.error_file(rank))
    if recorded:
        return Failure(rank, code, time_s, recorded, has_traceback=True)
    text = _NOISE.sub("", _tail(start.folder / str(rank) / "stderr.log"))
    traceback = _last_traceback(text)
    if traceback and (code > 0 or code == -signal.SIGABRT):  # torch may abort while an exception ends the interpreter
        return Failure(rank, code, time_s, _cut(traceback, _LINES), has_traceback=True)
    return Failure(rank, code, time_s, _cut(text, _LINES_WITHOUT))


def told(failure: Failure, start: Start) -> str:
    """The last thing a user reads: rank, how it ended, log, and its own words."""
    memory = " (if memory ran out, dmesg tells)" if failure.code == -9 else ""
    where = start.folder / str(failure.rank)
    head = f"evermesh: rank {failure.rank} {failure.how}{memory} in generation {start.generation}. Its logs: {where}"
    return f"{head}\n{failure.text}" if failure.text else head


def _recorded(file: Path) -> str:
    try:
        message = json.loads(file.read_text())["message"]
        text = message if isinstance(message, str) else message["extraInfo"]["py_callstack"]
        return _cut(text.strip(), _LINES)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""  # most scripts write none; a killed one may have left half of it


def _tail(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def _last_traceback(text: str) -> str:
    """The last traceback in ``text``, with those that it says it came from."""
    place = text.rfind(_MARK)
    while place > 0:
        earlier = text.rfind(_MARK, 0, place)
        between = text[max(earlier, 0) : place].rstrip()
        if earlier < 0 or not between.splitlines()[-1].startswith(_CHAINS):
            break
        place = earlier
    return text[place:].strip() if place >= 0 else ""


def _cut(text: str, lines: int) -> str:
    return "\n".join(text.rstrip().splitlines()[-lines:])

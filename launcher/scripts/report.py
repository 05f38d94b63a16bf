"""Why a rank failed, in its own words, and how that is told."""

import json
import os
import re
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from evermesh.launcher.policy import Failure, is_lost_peer, root_cause
from evermesh.launcher.scripts.environment import Start
from evermesh.launcher.scripts.nodes import Place
from evermesh.launcher.scripts.peers import Report

Ends = tuple[tuple[Place, int, float], ...]
"""Of ranks: exit code, or minus the signal; monotonic clock."""

_MARK = "Traceback (most recent call last):"
_CHAINS = ("During handling of the above exception", "The above exception was the direct cause")
_NOISE = re.compile(r"^(\[rank\d+\]: ?|terminate called without an active exception$)", re.MULTILINE)
"""What torch puts before every line of a traceback, and what its threads may say at the end."""
_TAIL_BYTES = 64 << 10
_LINES = 60
"""At most so many lines of a traceback are shown,"""
_LINES_WITHOUT = 20
"""and so many where there is none."""


def report_of(start: Start, ends: Ends, ran_s: float, *, has_progressed: bool, forwarded: Iterable[int]) -> Report:
    """How the ranks of this machine ended, for all launchers of the job."""
    failures = failures_of(start, ends)
    told = ""
    if failures:
        first = root_cause(failures)
        told = _told(first, start, next(place for place, _, _ in ends if place.rank == first.rank))
    return Report(
        failures=failures,
        told=told,
        has_progressed=has_progressed,
        ran_s=ran_s,
        forwarded=frozenset(forwarded),
        sent_s=time.monotonic(),
    )


def refusal_of(start: Start, unfit_because: str) -> Report:
    """That ranks were ended before they did anything, for this machine is not fit."""
    first, host = start.nodes[0].first_rank, os.uname().nodename
    how = f"was ended at its start: {host} is not fit for a job"
    told = f"evermesh: {host} is not fit for a job. {unfit_because} Use another machine; --preflight off starts here anyway."
    now_s = time.monotonic()
    failure = Failure(rank=first, time_s=now_s, how=how, cause="refused", text=unfit_because)
    return Report(failures=(failure,), told=told, sent_s=now_s)


def failures_of(start: Start, ends: Ends) -> tuple[Failure, ...]:
    """What is known about the ranks that did not end with 0."""
    return tuple(_failure(start, place, code, time_s) for place, code, time_s in ends if code)


def _failure(start: Start, place: Place, code: int, time_s: float) -> Failure:
    """From its error file as ``@record`` writes it, else from the end of its stderr."""
    text, has_traceback = _last_words(start, place, code)
    return Failure(
        rank=place.rank,
        time_s=time_s,
        how=_how(code, text.splitlines()[-1].strip() if has_traceback else ""),
        cause="died" if code < 0 else "raised",
        code=code,
        peer_lost=is_lost_peer(code, text),
        text=text,
        has_traceback=has_traceback,
    )


def _told(failure: Failure, start: Start, place: Place) -> str:
    """The last thing a user reads: rank, how it ended, log, and its own words."""
    memory = " (if memory ran out, dmesg tells)" if failure.code == -9 else ""
    node = place.node
    where = f" on node {node.number} ({os.uname().nodename})" if node.count > 1 else ""
    head = f"evermesh: rank {failure.rank} {failure.how}{memory} in generation {start.generation}{where}."
    head += f" Its logs: {start.folder(place)}"
    return f"{head}\n{failure.text}" if failure.text else head


def _last_words(start: Start, place: Place, code: int) -> tuple[str, bool]:
    """And whether they are a traceback."""
    recorded = _recorded(start.error_file(place))
    if recorded:
        return recorded, True
    text = _NOISE.sub("", _tail(start.folder(place) / "stderr.log"))
    traceback = _last_traceback(text)
    if traceback and (code > 0 or code == -signal.SIGABRT):  # torch may abort while an exception ends the interpreter
        return _cut(traceback, _LINES), True
    return _cut(text, _LINES_WITHOUT), False


def _how(code: int, error: str) -> str:
    """In words, on one line."""
    reason = f" ({error})" if error else ""
    if code >= 0:
        return f"failed with exit code {code}{reason}"
    try:
        return f"was killed by {signal.Signals(-code).name}{reason}"
    except ValueError:  # a real-time signal
        return f"was killed by signal {-code}"


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

"""``python -m evermesh.launcher.controller.watching``: the watcher of a job, told by its controller on standard input.

It ends with its controller. What it says is on standard output, see ``lines``; whatever else prints there goes to the log.
"""

import os
import queue
import sys
import threading
from typing import BinaryIO

from pydantic import BaseModel, TypeAdapter

from evermesh.launcher.controller.watching.lines import Problem, Told, ToWatcherAdapter
from evermesh.launcher.controller.watching.watcher import AgentTells, Heard, Watcher
from evermesh.launcher.death import end_with_parent
from evermesh.launcher.watching.messages import Connections, PlannedWork, RingPart, Window

_LOOK_S = 0.1
_AgentAdapter: TypeAdapter[AgentTells] = TypeAdapter(Window | RingPart | PlannedWork | Connections)


def main() -> None:
    """Watch until the controller is gone."""
    end_with_parent()
    lines = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def say(line: BaseModel) -> None:
        lines.write(line.model_dump_json().encode() + b"\n")
        lines.flush()

    heard: queue.SimpleQueue[Heard] = queue.SimpleQueue()
    threading.Thread(target=_hear_all, args=(sys.stdin.buffer, heard), daemon=True).start()
    watcher = Watcher(say)
    while True:
        for one in _newest(heard):
            watcher.take(one)
        watcher.think()


def _newest(heard: "queue.SimpleQueue[Heard]") -> list[Heard]:
    """All that has been heard; after a moment nothing."""
    found = []
    try:
        found.append(heard.get(timeout=_LOOK_S))
        while True:
            found.append(heard.get_nowait())
    except queue.Empty:
        return found


def _hear_all(lines: BinaryIO, heard: "queue.SimpleQueue[Heard]") -> None:
    try:
        _hear(lines, heard)
    finally:  # a watcher that hears nothing any more is none
        os._exit(0)


def _hear(lines: BinaryIO, heard: "queue.SimpleQueue[Heard]") -> None:
    for line in lines:
        said = ToWatcherAdapter.validate_json(line)
        if not isinstance(said, Told):
            heard.put(said)
            continue
        try:
            heard.put((said.node, _AgentAdapter.validate_json(lines.readline())))
        except ValueError as error:  # of an agent of another version: nobody is watched through it
            heard.put(Problem(text=f"not understood of {said.node}: {str(error)[:500]}"))


if __name__ == "__main__":
    main()

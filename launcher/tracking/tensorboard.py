"""TensorBoard: event files. A step that is trained again makes it forget the ones from there on, by a mark in the file."""

import json
from collections.abc import Mapping
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event as Record
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from evermesh.fault.events import Event
from evermesh.launcher.tracking.tracker import Tracked


class TensorBoard:
    """Writes below ``folder``; see ``Tracker``."""

    key = None

    def __init__(self, folder: Path, run: Tracked) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._last: int | None = None
        is_new = not any(folder.glob("events.out.tfevents.*"))
        self._writer = EventFileWriter(str(folder))
        if is_new:
            told = json.dumps(dict(run.settings), indent=1)
            self._writer.add_event(Record(summary=text_pb("settings", f"```\n{told}\n```"), step=0))

    def step(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        if self._last is None or step <= self._last:  # what an earlier process wrote counts only up to here
            begins = SessionLog(status=SessionLog.START)
            self._writer.add_event(Record(wall_time=time_s, step=step, session_log=begins))
        self._last = step
        told = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(Record(wall_time=time_s, step=step, summary=Summary(value=told)))

    def event(self, step: int, event: Event) -> None:
        summary = text_pb(f"events/{event.kind.replace(' ', '-')}", event.text)
        self._writer.add_event(Record(wall_time=event.time_s, step=step, summary=summary))

    def flush(self) -> None:
        self._writer.flush()

    def close(self, state: str) -> None:
        self._writer.close()

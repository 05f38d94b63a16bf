"""The folder of a job: logs of the ranks, events, and the file in which the script may report progress."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evermesh.launcher.policy import Progress
from evermesh.launcher.scripts.options import ScriptJob

if TYPE_CHECKING:
    from evermesh.fault.events import EventLog


class LogFolder:
    """A new folder for ``job``. ``say`` is told when something cannot be written there."""

    def __init__(self, job: ScriptJob, say: Callable[[str], None]) -> None:
        self._say = say
        self.path = _new_folder(job)
        self._events: EventLog | None = None
        self._progress = Progress()

    def record(self, kind: str, text: str, **fields: Any) -> None:
        """Append to the event log; one that cannot be written ends no job."""
        from evermesh.fault.events import EventLog  # only now: the ranks are running already

        try:
            if self._events is None:
                self._events = EventLog(self.path / "events.jsonl")
            self._events.write(kind, text, **fields)
        except OSError as error:
            self._say(f"evermesh: {error}")

    def has_progressed(self) -> bool:
        """Whether the script has reported progress since this was asked last."""
        now = _read_progress(self.path / "progress")
        if not now.is_beyond(self._progress):
            return False
        self._progress = Progress(now.time_ns, self._progress.step if now.step is None else now.step)
        return True


def _new_folder(job: ScriptJob) -> Path:
    if job.log_dir is None:
        return Path(tempfile.mkdtemp(prefix="evermesh-"))
    job.log_dir.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{job.run_id}_", dir=job.log_dir.absolute()))


def _read_progress(file: Path) -> Progress:
    try:
        time_ns, text = file.stat().st_mtime_ns, file.read_text(errors="replace")[:32].strip()
    except FileNotFoundError:
        return Progress()
    return Progress(time_ns, int(text) if text.isdecimal() else None)

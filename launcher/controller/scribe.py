"""What the controller writes down: the journal for itself, events for people, the state for whoever looks."""

import os
from typing import Literal

from pydantic import JsonValue

from evermesh.fault.events import EventLog
from evermesh.launcher.controller.journal import Journal
from evermesh.launcher.controller.work import last_step
from evermesh.launcher.run_directory import Run, RunState, now

Kept = Literal["running", "finished", "stopped", "failed"]


class Scribe:
    """Writes into the directory of one run."""

    def __init__(self, run: Run, journal: Journal, workers: int) -> None:
        self._run, self._journal, self._workers = run, journal, workers
        self.generation = 0

    def note(self, kind: str, reason: str, **fields: JsonValue) -> int:
        """Append to the journal, on disk when this returns; the number of the entry, higher than any before.

        Raises:
            OSError: it could not be written.
        """
        return self._journal.append(self.generation, kind, reason, **fields).seq

    def tell(self, kind: str, text: str, *, step: int | None = None, **fields: JsonValue) -> None:
        """Note an event, for people too; an event log that takes nothing ends no job."""
        self.note(kind, text, **fields)
        try:
            with EventLog(self._run.events) as events:
                happened_at = last_step(self._run) if step is None else step
                events.write(kind, text, step=happened_at, phase=None, **fields)
        except OSError as error:
            print(f"the event log takes nothing: {error}", flush=True)

    def make_room(self) -> None:
        """On a full disk, use the space that was kept for it."""
        self._journal.make_room()

    def begin(self) -> None:
        """An attempt begins, or this controller takes over from one that died."""
        started = self._run.state().started or now()
        self._write(RunState(state="running", workers=self._workers, started=started))

    def end(self, state: Kept, exit_code: int | None, error: str | None, traceback: str | None) -> None:
        """The job is over."""
        self._write(
            RunState(
                state=state,
                workers=self._workers,
                started=self._run.state().started,
                ended=now(),
                exit_code=exit_code,
                error=error,
                traceback=traceback,
            )
        )

    def _write(self, state: RunState) -> None:
        self._run.write_state(state.model_copy(update={"pid": os.getpid(), "attempt": self.generation}))

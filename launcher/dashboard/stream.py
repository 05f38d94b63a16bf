"""The stream that the page lives on: one JSON object per line, which tells what has changed since the one before.

{"changed": {SECTION: {FIELD: VALUE}}, "steps": [...], "events": [...], "time_s": ..., "has_more": ...}

The first line tells all; whoever loses the connection begins anew. See ``board`` and ``history`` for what is in it.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any, Protocol

from evermesh.launcher.controller.status import ENDED, JobState, JobStatus
from evermesh.launcher.dashboard.board import Board, Section, board_of, changes
from evermesh.launcher.dashboard.history import Reader
from evermesh.launcher.finite import finite

PERIOD_S = 1.0
_LOOK_S = 0.1
"""A job that ends waits no longer than that for those who watch it."""


class Source(Protocol):
    """What the page is made of."""

    @property
    def state(self) -> JobState:
        """Of the job."""

    def status(self) -> JobStatus:
        """The job as it is now."""

    def plan(self) -> dict[str, Any] | None:
        """The plan of the batch that is trained, as ranks tell it; the same object as long as it is the same."""

    def recovery(self) -> Section:
        """Attempts and incidents; reads files, in another thread."""

    def reader(self) -> Reader:
        """For one viewer."""


class Feed:
    """Makes the board of ``source``, once per period for all viewers; in one event loop."""

    def __init__(self, source: Source, period_s: float = PERIOD_S) -> None:
        self._source, self._period_s = source, period_s
        self._board: Board = {}
        self._made_s: float | None = None
        self._told: tuple[dict[str, Any] | None, Section] = (None, {"told": None})
        self._one_at_a_time = asyncio.Lock()

    async def lines(self) -> AsyncIterator[bytes]:
        """Lines for one viewer, until the job has ended."""
        reader = self._source.reader()
        sent: Board = {}
        while True:
            has_ended = self._source.state in ENDED
            board = await self._newest(at_once=has_ended)
            news = await asyncio.to_thread(reader.read_on)
            yield _line({"changed": changes(sent, board), "time_s": time.time(), **news._asdict()})
            sent = board
            if has_ended and not news.has_more:
                return
            if not news.has_more:
                await self._pause()

    async def _newest(self, *, at_once: bool) -> Board:
        async with self._one_at_a_time:
            now_s = time.monotonic()
            if at_once or self._made_s is None or now_s - self._made_s >= self._period_s / 2:
                recovery = await asyncio.to_thread(self._source.recovery)
                self._board = {
                    **board_of(self._source.status()),
                    "recovery": recovery,
                    "plan": self._plan(self._source.plan()),
                }
                self._made_s = now_s
            return self._board

    def _plan(self, told: dict[str, Any] | None) -> Section:
        """A plan is large: what makes it JSON happens once."""
        if told is not self._told[0]:
            self._told = (told, {"told": finite(told)})
        return self._told[1]

    async def _pause(self) -> None:
        until = time.monotonic() + self._period_s
        while time.monotonic() < until and self._source.state not in ENDED:
            await asyncio.sleep(_LOOK_S)


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode() + b"\n"

"""What a controller streams to the page, and pages of logs; both ask for the token, as all below ``/api``."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query
from fastapi.responses import JSONResponse, StreamingResponse

from evermesh.launcher.controller.answers import Refusal
from evermesh.launcher.controller.reporting import job_status
from evermesh.launcher.controller.status import JobState, JobStatus
from evermesh.launcher.dashboard.board import Section
from evermesh.launcher.dashboard.history import FileReader, recovery_of
from evermesh.launcher.dashboard.logs import LogPage, read_page
from evermesh.launcher.dashboard.stream import Feed, Source

if TYPE_CHECKING:
    from evermesh.launcher.controller.controller import Controller

_FRESH = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_LINES = "application/x-ndjson"
_Offset = Annotated[int | None, Query(ge=0, lt=1 << 63)]


class ControllerSource:
    """What ``controller`` knows."""

    def __init__(self, controller: "Controller") -> None:
        self._controller = controller
        self._read: tuple[int, Section] = (-1, {})
        """Size of the journal, and what it told then."""

    @property
    def state(self) -> JobState:
        return self._controller.state

    def status(self) -> JobStatus:
        """The job as it is now."""
        return job_status(self._controller)

    def plan(self) -> dict[str, Any] | None:
        """As ranks told it last."""
        return self._controller.job.plan

    def recovery(self) -> Section:
        """Attempts and incidents; files are read when the journal has grown."""
        path = self._controller.run.journal
        size = path.stat().st_size if path.is_file() else 0
        if size != self._read[0]:
            self._read = (size, recovery_of(self._controller.run))
        return self._read[1]

    def reader(self) -> FileReader:
        """For one viewer."""
        return FileReader(self._controller.run)


def watching_router(source: Source, logs: Path) -> APIRouter:
    """``/api/watch``, the stream, and ``/api/logs/RANK``, from the folder ``logs``."""
    router, feed = APIRouter(prefix="/api"), Feed(source)

    @router.get("/watch", response_class=StreamingResponse, responses={200: {"content": {_LINES: {}}}})
    async def watch() -> StreamingResponse:
        return StreamingResponse(feed.lines(), media_type=_LINES, headers=_FRESH)

    @router.get(
        "/logs/{rank}", response_model=LogPage, responses={404: {"model": Refusal, "description": "No such file"}}
    )
    async def log(
        rank: int, kind: Literal["log", "stacks"] = "log", before: _Offset = None, after: _Offset = None
    ) -> JSONResponse:
        try:
            page = await asyncio.to_thread(read_page, logs / f"rank-{rank}.{kind}", before=before, after=after)
        except OSError as error:
            told = f"rank {rank} has no such file here: {error.strerror or error}"
            raise HTTPException(404, told) from error
        return JSONResponse(asdict(page), headers=_FRESH)

    return router

"""A server with the page and the answers of a controller, from what a real job has recorded."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from evermesh.launcher import Run
from evermesh.launcher.controller.guard import Guard
from evermesh.launcher.controller.status import JobState, JobStatus
from evermesh.launcher.dashboard import dashboard_router
from evermesh.launcher.dashboard.board import Section
from evermesh.launcher.dashboard.history import News, event_of, point_of, recovery_of
from evermesh.launcher.dashboard.watching import watching_router
from tests.launcher.dashboard.browser import Page
from tests.launcher.dashboard.recording import Recorded

TOKEN = "a-token-of-the-test"


class ToldReader:
    """Reads on in what was recorded."""

    def __init__(self, told: Recorded) -> None:
        self._told, self._steps, self._events = told, 0, 0

    def read_on(self) -> News:
        """What was added since the last call."""
        steps, events = self._told.steps[self._steps :], self._told.events[self._events :]
        self._steps, self._events = self._steps + len(steps), self._events + len(events)
        return News([point_of(report) for report in steps], [event_of(event) for event in events], has_more=False)


class ToldSource:
    """What a controller would know of what was recorded."""

    def __init__(self, told: Recorded) -> None:
        self._told = told
        self._plan: tuple[object, dict[str, Any] | None] = (None, None)

    @property
    def state(self) -> JobState:
        return "finished" if self._told.is_over else "training"  # the stream goes on, whatever the page is told

    def status(self) -> JobStatus:
        """As it was recorded, or changed since."""
        return self._told.status

    def plan(self) -> dict[str, Any] | None:
        """As a rank would tell it."""
        told = self._told
        if told.plan is not self._plan[0] and told.plan is not None:
            answer = {"step": told.plan_step, "plan": json.loads(told.plan.to_json())}
            spans = {"spans": [asdict(span) for span in told.timeline.spans]} if told.timeline else {}
            self._plan = (told.plan, answer | spans)
        return self._plan[1] if told.plan is not None else None

    def recovery(self) -> Section:
        """From the journal of the run, if it has one."""
        return recovery_of(Run(Path(self._told.status.directory)))

    def reader(self) -> ToldReader:
        """For one viewer."""
        return ToldReader(self._told)


def application(told: Recorded) -> ASGIApp:
    """The page, its stream and the logs as a controller serves them, behind its guard."""
    app = FastAPI()
    app.include_router(dashboard_router())
    app.include_router(watching_router(ToldSource(told), Path(told.status.directory) / "logs"))
    guarded = Guard(app, TOKEN)

    async def noted(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].startswith("/api"):
            told.asked.append(scope["path"])
        await guarded(scope, receive, send)

    return noted


@contextmanager
def serve(told: Recorded, port: int = 0) -> Iterator[int]:
    """Serve on 127.0.0.1 in a thread; gives the port."""
    server = uvicorn.Server(uvicorn.Config(application(told), log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        told.is_over = False
        try:
            yield listener.getsockname()[1]
        finally:
            told.is_over = True
            server.should_exit = True
            thread.join()


def show(page: Page, port: int, token: str = TOKEN) -> None:
    """Open the page as from the link that a user is given, and wait until everything is drawn."""
    page.open(f"http://127.0.0.1:{port}/#token={token}")
    page.wait("['loss', 'speed'].every(name => document.querySelector(`#${name}-chart .scatterlayer .js-line`))")

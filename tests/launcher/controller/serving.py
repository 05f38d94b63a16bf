"""A server with the page and the answers of a controller, from what a real job has recorded."""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response

from evermesh.launcher.controller.dashboard import dashboard_router
from tests.launcher.controller.recording import Recorded

TOKEN = "a-token-of-the-test"


def application(told: Recorded) -> FastAPI:
    """The page, and the controller's API as far as the page uses it."""

    def guard(request: Request) -> None:
        told.asked.append(request.url.path)
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            raise HTTPException(401)

    app = FastAPI()
    app.include_router(dashboard_router())

    @app.get("/api/status", dependencies=[Depends(guard)])
    def status() -> Response:
        return Response(told.status.model_dump_json(), media_type="application/json")

    @app.get("/api/steps", dependencies=[Depends(guard)])
    def steps(after: int) -> list[dict[str, Any]]:
        return told.steps[after:]

    @app.get("/api/events", dependencies=[Depends(guard)])
    def events(after: int) -> list[dict[str, Any]]:
        return told.events[after:]

    @app.get("/api/plan", dependencies=[Depends(guard)])
    def plan() -> dict[str, Any] | None:
        if told.plan is None:
            return None
        answer = {"step": told.plan_step, "plan": json.loads(told.plan.to_json())}
        return answer | ({"spans": [asdict(span) for span in told.timeline.spans]} if told.timeline else {})

    return app


@contextmanager
def serve(told: Recorded, port: int = 0) -> Iterator[int]:
    """Serve on 127.0.0.1 in a thread; gives the port."""
    server = uvicorn.Server(uvicorn.Config(application(told), log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()

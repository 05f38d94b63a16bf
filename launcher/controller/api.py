"""The controller's HTTP API: agents, the command line and the dashboard all use it; a token guards it."""

import asyncio
import json
import math
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, ValidationError

from evermesh.fault.events import read_events
from evermesh.launcher.controller.controller import Controller
from evermesh.launcher.controller.dashboard import dashboard_router
from evermesh.launcher.controller.journal import Journal, JournalIndex
from evermesh.launcher.controller.reporting import job_status
from evermesh.launcher.controller.status import JobStatus
from evermesh.launcher.messages import FromAgentAdapter, Hello

_MOST = 20_000
"""Lines in one answer."""


class StopRequest(BaseModel):
    """How the job is to end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    signal: int = Field(default=15, ge=1, le=64)
    """Number of the signal that asks, which decides the exit code."""
    at_once: bool = False
    grace_s: NonNegativeFloat | None = None
    """Then at once, seconds; None for no limit."""


def make_app(controller: Controller, journal: Journal, token: str) -> FastAPI:
    """The API of ``controller``."""
    app = FastAPI(title="Evermesh controller", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")
    app.include_router(_people(controller, journal, token))
    app.include_router(_agents(controller, token))
    app.include_router(dashboard_router())
    return app


def _people(controller: Controller, journal: Journal, token: str) -> APIRouter:
    def authorized(request: Request) -> None:
        if not _shows(request.headers.get("authorization"), token):
            raise HTTPException(401, "the token of the run is missing or wrong: Authorization: Bearer TOKEN")

    router = APIRouter(prefix="/api", dependencies=[Depends(authorized)])
    run = controller.run

    @router.get("/status", response_model=JobStatus)
    async def status() -> Response:
        return _json(job_status(controller).model_dump(mode="python"))

    @router.get("/steps")
    async def steps(after: int = 0) -> Response:
        return _json(_lines_after(run.telemetry, after))

    @router.get("/events")
    async def events(after: int = 0) -> Response:
        found = enumerate(read_events(run.events), 1) if run.events.is_file() else []
        return _json([{**event.model_dump(mode="json"), "seq": seq} for seq, event in found if seq > after][:_MOST])

    @router.get("/journal")
    async def entries(after: int = 0, kind: Annotated[str | None, "such as transition"] = None) -> Response:
        index = JournalIndex(run.journal.with_suffix(".sqlite"))
        try:
            return _json([entry.model_dump(mode="json") for entry in index.find(after=after, kind=kind)])
        finally:
            index.close()

    @router.get("/plan")
    async def plan() -> Response:
        return _json(controller.plan)

    @router.post("/stop", status_code=202)
    async def stop(request: StopRequest) -> None:
        controller.stop(request.signal, at_once=request.at_once, grace_s=request.grace_s)

    @router.post("/save", status_code=202)
    async def save() -> None:
        controller.save()

    @router.post("/stacks", status_code=202)
    async def stacks() -> None:
        controller.write_stacks()

    return router


def _agents(controller: Controller, token: str) -> APIRouter:
    router = APIRouter(prefix="/api")

    @router.websocket("/agents/{node}")
    async def agent(socket: WebSocket, node: str) -> None:
        if not _shows(socket.headers.get("authorization"), token):
            await socket.close(1008)
            return
        await socket.accept()
        try:
            hello = FromAgentAdapter.validate_json(await socket.receive_text())
            if isinstance(hello, Hello) and hello.node == node:
                await _talk(controller, socket, hello)
        except (WebSocketDisconnect, ValidationError, RuntimeError) as error:
            print(f"the connection of {node} ended: {type(error).__name__} {error}", flush=True)

    return router


async def _talk(controller: Controller, socket: WebSocket, hello: Hello) -> None:
    outbox: asyncio.Queue[str] = asyncio.Queue()
    node = controller.greet(hello.node, hello, outbox)
    sender = asyncio.create_task(_send_all(socket, outbox))
    try:
        while True:
            controller.receive(node, FromAgentAdapter.validate_json(await socket.receive_text()))
    finally:
        sender.cancel()
        controller.part(node, outbox)


async def _send_all(socket: WebSocket, outbox: "asyncio.Queue[str]") -> None:
    while True:
        await socket.send_text(await outbox.get())


def _shows(header: str | None, token: str) -> bool:
    return header is not None and secrets.compare_digest(header.encode(), f"Bearer {token}".encode())


def _lines_after(path: Path, after: int) -> Sequence[dict[str, Any]]:
    """The JSON lines of a file from number ``after`` + 1 on, each with its number as ``seq``; none is unfinished."""
    if not path.is_file():
        return []
    with path.open("rb") as lines:
        numbered = ((seq, line) for seq, line in enumerate(lines, 1) if seq > after and line.endswith(b"\n"))
        return [{**json.loads(line), "seq": seq} for seq, line in numbered][:_MOST]


def _json(values: Any) -> Response:
    """JSON as browsers read it: what is not finite becomes null."""
    return Response(json.dumps(_finite(values), allow_nan=False), media_type="application/json")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value

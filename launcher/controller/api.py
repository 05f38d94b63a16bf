"""The controller's HTTP API: agents, the command line and the dashboard all use it; a token guards it."""

import asyncio
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from signal import Signals
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator

from evermesh.fault.events import read_events
from evermesh.launcher.controller.answers import REFUSALS, TOKEN, After, Refusal
from evermesh.launcher.controller.controller import Controller
from evermesh.launcher.controller.exposition import metrics_router
from evermesh.launcher.controller.guard import Guard
from evermesh.launcher.controller.journal import Entry, JournalIndex
from evermesh.launcher.controller.reporting import job_status
from evermesh.launcher.controller.status import JobStatus
from evermesh.launcher.controller.watching.watch import is_for_watcher
from evermesh.launcher.dashboard import dashboard_router
from evermesh.launcher.dashboard.watching import ControllerSource, watching_router
from evermesh.launcher.errors import DrainRefused
from evermesh.launcher.finite import finite
from evermesh.launcher.messages import FromAgentAdapter, Hello
from evermesh.parallelism.layout import Layout

_MOST = 20_000
"""Lines in one answer."""
_LONGEST_ERROR = 300


class StopRequest(BaseModel):
    """How the job is to end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    signal: Signals = Signals.SIGTERM
    """Number of the signal that asks, which decides the exit code."""
    at_once: bool = False
    grace_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Then at once, seconds; None for no limit."""


class RelayoutRequest(BaseModel):
    """The layout that the ranks are to go on with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    changes: dict[str, JsonValue] = Field(
        min_length=1, json_schema_extra={"propertyNames": {"enum": list(Layout.model_fields)}}
    )
    """Fields of ``train.layout`` and what they become; without hdp, that is what the other degrees leave of the ranks."""

    @field_validator("changes")
    @classmethod
    def _are_of_a_layout(cls, changes: dict[str, JsonValue]) -> dict[str, JsonValue]:
        try:
            json.dumps(changes, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half of a character, which no file takes") from None
        unknown = sorted(changes.keys() - Layout.model_fields.keys())
        if unknown:
            raise ValueError(f"a layout has no {', '.join(unknown)}; it has {', '.join(Layout.model_fields)}")
        return changes


class DrainRequest(BaseModel):
    """The job is to go on without a node."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    node: str = Field(min_length=1)
    by: str = Field(min_length=1, max_length=_LONGEST_ERROR)
    because: str = Field(max_length=_LONGEST_ERROR)


class Drained(BaseModel):
    """The node that the job goes on without."""

    node: str
    """As the job calls it."""


def make_app(controller: Controller, token: str) -> Guard:
    """The API of ``controller``; all that begins with ``/api`` asks for the token."""
    app = FastAPI(title="Evermesh controller", docs_url=None, redoc_url=None, openapi_url="/api/openapi.json")
    for router in (
        _people(controller),
        metrics_router(controller),
        watching_router(ControllerSource(controller), controller.run.logs),
    ):
        app.include_router(router, dependencies=[TOKEN], responses=REFUSALS)
    app.include_router(_agents(controller))
    app.include_router(dashboard_router())
    app.add_exception_handler(RequestValidationError, _refuse)
    return Guard(app, token)


def _people(controller: Controller) -> APIRouter:
    """What is answered from files is answered in another thread: the loop has leases to renew."""
    router = APIRouter(prefix="/api")
    run = controller.run

    @router.get("/status", response_model=JobStatus)
    async def status() -> Response:
        return Response(job_status(controller).model_dump_json(), media_type="application/json")  # inf and NaN are null

    @router.get("/steps", response_model=list[dict[str, Any]])
    def steps(after: After = 0) -> Response:
        return _json(_lines_after(run.telemetry, after))

    @router.get("/events", response_model=list[dict[str, Any]])
    def events(after: After = 0) -> Response:
        found = enumerate(read_events(run.events), 1) if run.events.is_file() else []
        wanted = islice(((seq, event) for seq, event in found if seq > after), _MOST)
        return _json([{**event.model_dump(mode="json"), "seq": seq} for seq, event in wanted])

    @router.get("/journal", response_model=list[Entry])
    def entries(after: After = 0, kind: Annotated[str | None, "such as transition"] = None) -> Response:
        index = JournalIndex(run.journal.with_suffix(".sqlite"))
        try:
            return _json([entry.model_dump(mode="json") for entry in index.find(after=after, kind=kind)])
        finally:
            index.close()

    @router.get("/plan", response_model=dict[str, Any] | None)
    async def plan() -> Response:
        return _json(controller.job.plan)

    @router.post("/stop", status_code=202)
    async def stop(request: StopRequest) -> None:
        controller.stop(request.signal, at_once=request.at_once, grace_s=request.grace_s)

    @router.post("/save", status_code=202)
    async def save() -> None:
        controller.save()

    @router.post("/relayout", status_code=202)
    async def relayout(request: RelayoutRequest) -> None:
        controller.change_layout(request.changes)

    @router.post("/drain", response_model=Drained, responses={409: {"model": Refusal, "description": "It cannot"}})
    async def drain(request: DrainRequest) -> Response:
        try:
            return _json({"node": controller.drain(request.node, request.by, request.because)})
        except DrainRefused as error:
            return Response(json.dumps({"detail": str(error)}), 409, media_type="application/json")

    @router.post("/stacks", status_code=202)
    async def stacks() -> None:
        controller.write_stacks()

    return router


def _agents(controller: Controller) -> APIRouter:
    router = APIRouter(prefix="/api")

    @router.websocket("/agents/{node}")
    async def agent(socket: WebSocket, node: str) -> None:
        await socket.accept()
        try:
            hello = FromAgentAdapter.validate_json(await socket.receive_text())
            if isinstance(hello, Hello) and hello.node == node:
                await _talk(controller, socket, hello)
        except (WebSocketDisconnect, ValueError, TypeError, KeyError, RuntimeError, OSError) as error:
            told = str(error)[:_LONGEST_ERROR]
            print(f"the connection of {node!r} ended: {type(error).__name__} {told}", flush=True)

    return router


async def _talk(controller: Controller, socket: WebSocket, hello: Hello) -> None:
    outbox: asyncio.Queue[str] = asyncio.Queue()
    node = controller.greet(hello.node, hello, outbox)
    sender = asyncio.create_task(_send_all(socket, outbox))
    try:
        while True:
            text = await socket.receive_text()
            if is_for_watcher(text):
                controller.pass_on(node, text)
            else:
                controller.receive(node, FromAgentAdapter.validate_json(text))
    finally:
        sender.cancel()
        controller.part(node, outbox)


async def _send_all(socket: WebSocket, outbox: "asyncio.Queue[str]") -> None:
    while True:
        await socket.send_text(await outbox.get())


def _refuse(_: Request, error: Exception) -> Response:
    """What is wrong with a request, without what it said: that may hold numbers that are no JSON."""
    assert isinstance(error, RequestValidationError)
    problems = [{"where": list(found["loc"]), "what": found["msg"]} for found in error.errors()]
    return Response(json.dumps({"detail": problems}), 422, media_type="application/json")


def _lines_after(path: Path, after: int) -> Sequence[dict[str, Any]]:
    """The JSON lines of a file from number ``after`` + 1 on, each with its number as ``seq``; none is unfinished."""
    if not path.is_file():
        return []
    with path.open("rb") as lines:
        numbered = ((seq, line) for seq, line in enumerate(lines, 1) if seq > after and line.endswith(b"\n"))
        return [{**json.loads(line), "seq": seq} for seq, line in islice(numbered, _MOST)]


def _json(values: Any) -> Response:
    """JSON as browsers read it: what is not finite becomes null."""
    return Response(json.dumps(finite(values), allow_nan=False), media_type="application/json")

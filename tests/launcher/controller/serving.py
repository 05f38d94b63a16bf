"""A controller of no real job behind its real API, on loopback."""

import http.client
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
from fastapi import FastAPI
from websockets.sync.client import ClientConnection, connect

from evermesh.launcher.contact import make_token
from evermesh.launcher.controller.__main__ import _server
from evermesh.launcher.controller.api import make_app
from evermesh.launcher.controller.listening import listen
from tests.launcher.controller.worlds import World, world


@dataclass
class Served:
    """A controller of no real job, and its address."""

    job: World
    app: FastAPI
    """Behind the guard."""
    address: str
    token: str

    def ask(self, method: str, path: str, token: str | None = None, **what: Any) -> httpx2.Response:
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"}
        return httpx2.request(method, f"http://{self.address}{path}", headers=headers, trust_env=False, **what)

    def ask_raw(
        self, method: str, target: str, token: str | None = None, body: bytes | None = None
    ) -> tuple[int, bytes]:
        """Ask for ``target`` as it is written, which clients would tidy up: the status, and the beginning of the answer."""
        connection = http.client.HTTPConnection(self.address, timeout=10)
        try:
            headers = {"Authorization": f"Bearer {self.token if token is None else token}"}
            if body is not None:
                headers["Content-Type"] = "application/json"
            connection.request(method, target, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(1 << 16) if answer.getheader("Content-Length") else b""
        finally:
            connection.close()

    def agent(self, token: str | None = None, node: str = "node-0") -> ClientConnection:
        headers = {"Authorization": f"Bearer {self.token if token is None else token}"}
        return connect(
            f"ws://{self.address}/api/agents/{node}",
            additional_headers=headers,
            proxy=None,
            max_size=None,
            close_timeout=2,
        )

    def lives(self) -> bool:
        return self.ask("GET", "/api/status").status_code == 200

    def routes(self) -> list[tuple[str, set[str]]]:
        """Path and methods of every route that there is; a WebSocket has none."""
        return [(route.path, set(getattr(route, "methods", None) or ())) for route in _flat(self.app.routes)]


def _flat(routes: Iterable[Any]) -> Iterator[Any]:
    """With those of the routers that were included, which newer FastAPI keeps apart."""
    for route in routes:
        if hasattr(route, "path"):
            yield route
        else:
            yield from _flat(route.original_router.routes)


@contextmanager
def serving() -> Iterator[Served]:
    """Serve one until the block ends."""
    with world() as job:
        token = make_token(job.run.directory)
        guard = make_app(job.controller, token)
        server = _server(guard)
        listener = listen([("127.0.0.1", 0)])
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            host, port = listener.getsockname()[:2]
            app = guard.app
            assert isinstance(app, FastAPI)
            yield Served(job, app, f"{host}:{port}", token)
        finally:
            server.should_exit = True
            thread.join()

"""A controller that only listens, for tests of agents: it takes whoever shows the token, and keeps what is said."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Thread

from websockets.exceptions import ConnectionClosedError
from websockets.http11 import Request, Response
from websockets.sync.server import Server, ServerConnection, serve

TOKEN = "a-token-of-the-test"


class Controller:
    """Takes agents that show the token, and keeps what they say."""

    def __init__(self, port: int = 0) -> None:
        self.heard: list[str | bytes] = []
        self.refused = 0
        self.connections: list[ServerConnection] = []
        self.paths: list[str] = []
        self._server: Server = serve(self._talk, "127.0.0.1", port, process_request=self._admit)
        self.port: int = self._server.socket.getsockname()[1]
        self._thread = Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        self._server.shutdown()
        self._thread.join()

    def _admit(self, connection: ServerConnection, request: Request) -> Response | None:
        self.paths.append(request.path)
        if request.headers.get("Authorization") == f"Bearer {TOKEN}":
            return None
        self.refused += 1
        return connection.respond(403, "no")

    def _talk(self, connection: ServerConnection) -> None:
        self.connections.append(connection)
        with suppress(ConnectionClosedError):  # the agent is killed at the end of a test
            for message in connection:
                self.heard.append(message)


@contextmanager
def controlled(port: int = 0) -> Iterator[Controller]:
    controller = Controller(port)
    try:
        yield controller
    finally:
        controller.close()

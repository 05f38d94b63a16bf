"""Where a member is asked: a WebSocket server on the address of its node, which lets in who shows the token."""

import hmac
import threading
from contextlib import suppress
from http import HTTPStatus

from pydantic import ValidationError
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request as Handshake
from websockets.http11 import Response
from websockets.sync.server import ServerConnection, serve

from evermesh.launcher.succession.protocol import RequestAdapter, Seat
from evermesh.launcher.succession.replica import Replica


class ReplicaServer:
    """Answers for ``replica`` on ``address``, on any free port, until it is closed; a thread per connection."""

    def __init__(self, replica: Replica, node: str, address: str, token: str) -> None:
        self._replica, self._expected = replica, f"Bearer {token}".encode()
        self._server = serve(
            self._talk, address, 0, process_request=self._admit, ping_interval=None, compression=None, max_size=None
        )
        host, port = self._server.socket.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        self.seat = Seat(identity=replica.identity, node=node, url=f"ws://{shown}:{port}")
        self._thread = threading.Thread(target=self._server.serve_forever, name="replica", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more; open connections end with the process."""
        self._server.shutdown()
        self._thread.join()

    def _admit(self, connection: ServerConnection, request: Handshake) -> Response | None:
        shown = request.headers.get_all("Authorization")
        # bytes that are no text arrive as surrogates
        if len(shown) == 1 and hmac.compare_digest(shown[0].encode(errors="surrogateescape"), self._expected):
            return None
        return connection.respond(HTTPStatus.UNAUTHORIZED, "the token of the run is missing or wrong\n")

    def _talk(self, connection: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            for text in connection:
                try:
                    answer = self._replica.answer(RequestAdapter.validate_json(text))
                except (ValidationError, OSError) as error:  # no answer is an answer: nothing was promised
                    print(f"a request about the journal was not answered: {error}", flush=True)
                    return
                connection.send(answer.model_dump_json())

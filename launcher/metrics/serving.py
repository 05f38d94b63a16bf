"""A server of numbers for Prometheus: one path, guarded by a token where there is one."""

import hmac
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

PATH = "/metrics"
_WAIT_S = 5.0
"""For a request that does not come to its end."""


def rendered(collector: Collector) -> bytes:
    """What ``collector`` knows, in the text format of Prometheus."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)


class MetricsServer:
    """Serves ``/metrics`` from now on, from a thread of its own, until ``close``.

    Args:
        collector: asked at every request.
        host: what it listens on.
        port: 0 takes any that is free.
        token: what a request must show (``Authorization: Bearer TOKEN``); None: nothing.

    Raises:
        OSError: nothing can listen there.
    """

    def __init__(self, collector: Collector, host: str = "127.0.0.1", port: int = 0, token: str | None = None) -> None:
        self._server = _Server((host, port), collector, token)
        self.host, self.port = host, int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    @property
    def at(self) -> str:
        """Host and port."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.at}{PATH}"

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], collector: Collector, token: str | None) -> None:
        self.collector, self.expected = collector, None if token is None else f"Bearer {token}".encode()
        super().__init__(address, _Request)


class _Request(BaseHTTPRequestHandler):
    server: _Server
    timeout = _WAIT_S

    def do_GET(self) -> None:
        if self._is_admitted():
            self._tell()

    def do_POST(self) -> None:
        if self._is_admitted():
            self._answer(405, b"only GET\n", allow="GET")

    do_HEAD = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_POST

    def _is_admitted(self) -> bool:
        """Whether the token was shown, once; else that is the answer. Headers are read as Latin-1."""
        expected, shown = self.server.expected, self.headers.get_all("Authorization", [])
        if expected is None or (len(shown) == 1 and hmac.compare_digest(shown[0].encode("latin-1"), expected)):
            return True
        self._answer(401, b"the token is missing or wrong: Authorization: Bearer TOKEN\n")
        return False

    def _tell(self) -> None:
        if self.path.partition("?")[0] != PATH:
            self._answer(404, f"there is {PATH}\n".encode())
        else:
            self._answer(200, rendered(self.server.collector), CONTENT_TYPE_LATEST)

    def log_message(self, *_: object) -> None:
        """Say nothing: requests come every few seconds."""

    def _answer(
        self, status: int, body: bytes, content_type: str = "text/plain; charset=utf-8", allow: str | None = None
    ) -> None:
        self.send_response(status)
        if allow is not None:
            self.send_header("Allow", allow)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

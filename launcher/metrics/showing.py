"""What ``evermesh metrics`` does."""

import signal
from pathlib import Path

from rich.console import Console

from evermesh.launcher.client import Client
from evermesh.launcher.errors import ListenInvalid
from evermesh.launcher.metrics.node import NodeCollector
from evermesh.launcher.metrics.serving import MetricsServer
from evermesh.launcher.run_directory import Run


def numbers_of(run: Run) -> str:
    """The numbers of a living job, as its controller tells them."""
    return Client(run).metrics()


def serve_machine(listen: str, token_file: Path | None) -> None:
    """Serve numbers of this machine until Ctrl-C or SIGTERM.

    Raises:
        ListenInvalid: ``listen`` is no address, nothing can listen there, or the token cannot be read.
    """
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ListenInvalid(f"{listen!r} is no address; write HOST:PORT, such as 127.0.0.1:9464")
    try:
        token = token_file.read_text().strip() if token_file is not None else None
        server = MetricsServer(NodeCollector((Path.cwd(),)), host.strip("[]"), int(port), token)
    except OSError as error:
        raise ListenInvalid(f"nothing can be served at {listen}: {error}") from error
    if token == "":
        server.close()
        raise ListenInvalid(f"{token_file} is empty; write a token into it, or leave --token-file out")
    Console().print(f"serving {server.url}", highlight=False)
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    server.close()

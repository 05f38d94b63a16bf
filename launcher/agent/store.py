"""The rendezvous store of a job: a process of its own, forked from the warm one.

It outlives the attempts; every generation prefixes its keys with its number. In the warm process itself its threads
would make every later fork unsafe, and in a worker it would die with it.
"""

import os
import signal
import socket
from multiprocessing import connection
from multiprocessing.process import BaseProcess

from evermesh.launcher.agent import warm
from evermesh.launcher.agent.worker import die_with_parent
from evermesh.launcher.errors import WarmProcessLost
from evermesh.launcher.messages import Store

_OPEN_WAIT_S = 60.0
"""A fresh interpreter has to load torch first."""


class StoreProcess:
    """A store that listens on ``host`` until ``close``.

    Raises:
        WarmProcessLost: it did not open.
    """

    def __init__(self, host: str) -> None:
        context, _ = warm.context()
        self._pipe, theirs = context.Pipe()
        self._process: BaseProcess = context.Process(
            target=_serve, args=(host, theirs), name="evermesh-store", daemon=True
        )
        with warm.blocked_signals():
            self._process.start()
        theirs.close()
        try:
            if not self._pipe.poll(_OPEN_WAIT_S):
                raise EOFError
            self.address = Store(host=host, port=int(self._pipe.recv_bytes()))
        except (EOFError, OSError) as error:
            self.close()
            raise WarmProcessLost(
                f"no rendezvous store could be opened on {host}; the agent's log tells why."
            ) from error

    @property
    def is_alive(self) -> bool:
        """Whether the process lives."""
        return self._process.is_alive()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _serve(host: str, pipe: connection.Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    from torch.distributed import TCPStore

    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=4096)
    port = listener.getsockname()[1]
    # given a socket, the store listens on this address only; by itself it would listen on all of them
    store = TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), use_libuv=True
    )
    pipe.send_bytes(str(store.port).encode())
    try:
        pipe.recv_bytes()  # until the agent is gone
    except (EOFError, OSError):
        os._exit(0)

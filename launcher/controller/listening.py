"""Where the controller listens."""

import socket
from collections.abc import Sequence

from evermesh.launcher.config import ApiConfig
from evermesh.launcher.errors import ListenInvalid


def places(config: ApiConfig, address: str, last: int | None, *, again: bool) -> list[tuple[str, int]]:
    """Hosts and ports to listen on, the best first: a job that runs already goes on with any that agents reach."""
    host = config.host or address
    if config.port is not None and not again:
        return [(host, config.port)]
    found = [(host, port) for port in (config.port, last, 0) if port is not None]
    return [*found, (address, 0)] if again else found


def listen(wanted: Sequence[tuple[str, int]]) -> socket.socket:
    """A listening socket at the first of these places that can be had.

    Raises:
        ListenInvalid: none can.
    """
    refused: OSError | None = None
    for place in wanted:
        try:
            return socket.create_server(place, backlog=4096)
        except OSError as error:
            refused = error
    host, port = wanted[-1]
    raise ListenInvalid(
        f"the controller cannot listen on {host}:{port or 'any port'}: {refused}. Set api.host to an address of this "
        "machine, and api.port to one that is free; without them it takes any port."
    ) from refused

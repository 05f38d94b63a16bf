"""Asking members: a connection to each, kept while it answers. Used by the controller and by agents, one thread each."""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

from pydantic import ValidationError
from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect

from evermesh.launcher.succession.protocol import Answer, Request, Seat

TIMEOUT_S = 1.0
"""How long an answer is waited for; it takes a write to disk. The controller hears nobody meanwhile."""
_SILENT_S = 5.0
"""How long who has not answered in time is not asked by those who can do without."""
_CLOSE_S = 0.1
_MOST_AT_ONCE = 32


class Peers:
    """Asks over the network, with the token of the run."""

    def __init__(self, token: str, timeout_s: float = TIMEOUT_S) -> None:
        self._token, self._timeout_s = token, timeout_s
        self._connections: dict[Seat, ClientConnection] = {}
        self._closing: dict[Seat, ExitStack] = {}
        self._silent_until_s: dict[Seat, float] = {}

    def ask(self, requests: Mapping[Seat, Request]) -> dict[str, Answer]:
        """The answers that came in time."""
        asked = [seat for seat, request in requests.items() if self._send(seat, request)]
        others = [
            seat for seat in requests if seat not in self._connections
        ]  # a kept one may be of an agent that is gone
        self._connect(others)
        asked += [seat for seat in others if self._send(seat, requests[seat])]
        until_s = time.monotonic() + self._timeout_s
        answers = {}
        for seat in asked:
            answer = self._receive(seat, until_s)
            if answer is not None and answer.identity == seat.identity:
                answers[seat.identity] = answer
        return answers

    def responsive(self, seats: Iterable[Seat]) -> list[Seat]:
        """Those of ``seats`` that were not silent a moment ago."""
        now_s = time.monotonic()
        return [seat for seat in seats if self._silent_until_s.get(seat, 0.0) <= now_s]

    def close(self) -> None:
        """Close all connections."""
        for seat in list(self._connections):
            self._drop(seat)

    def _send(self, seat: Seat, request: Request) -> bool:
        """Whether there is a connection that takes it."""
        if seat not in self._connections:
            return False
        try:
            self._connections[seat].send(request.model_dump_json())
        except (WebSocketException, OSError):
            self._drop(seat)
            return False
        return True

    def _receive(self, seat: Seat, until_s: float) -> Answer | None:
        try:
            text = self._connections[seat].recv(max(0.001, until_s - time.monotonic()))
            answer = Answer.model_validate_json(text)
        except (WebSocketException, OSError, ValidationError):  # TimeoutError is an OSError
            self._drop(seat)  # an answer that comes later must not be taken for that to the next request
            self._note_silent(seat)
            return None
        self._silent_until_s.pop(seat, None)
        return answer

    def _note_silent(self, seat: Seat) -> None:
        self._silent_until_s[seat] = time.monotonic() + _SILENT_S

    def _connect(self, seats: Sequence[Seat]) -> None:
        """To all at the same time: one that is out of reach takes the whole time, and the others must not wait for it."""
        if not seats:
            return
        with ThreadPoolExecutor(min(len(seats), _MOST_AT_ONCE)) as pool:
            for seat, found in zip(seats, pool.map(self._connected, seats), strict=True):
                if found is None:
                    self._note_silent(seat)
                else:
                    self._connections[seat], self._closing[seat] = found

    def _connected(self, seat: Seat) -> tuple[ClientConnection, ExitStack] | None:
        stack = ExitStack()
        try:
            connecting = connect(
                seat.url,
                additional_headers={"Authorization": f"Bearer {self._token}"},
                open_timeout=self._timeout_s,
                ping_interval=None,
                close_timeout=_CLOSE_S,
                max_size=None,
                compression=None,
                proxy=None,
            )
            return stack.enter_context(connecting), stack
        except (WebSocketException, OSError, ValueError):
            return None

    def _drop(self, seat: Seat) -> None:
        if self._connections.pop(seat, None) is not None:
            self._closing.pop(seat).close()
